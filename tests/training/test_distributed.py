import json
import subprocess
import sys

SCRIPT = """
import json, os, sys, torch
from pathlib import Path
from torch.utils.data import TensorDataset
from spikeclip.nn import LIF
from spikeclip.training import Settings
from spikeclip.training.loop import fit

torch.manual_seed(0)
spiking = (torch.nn.Unflatten(0, (1, -1)), LIF(), torch.nn.Flatten(0, 1))
module = torch.nn.Sequential(torch.nn.Linear(6, 8), *spiking, torch.nn.Linear(8, 1))
x = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
data = TensorDataset(x, x[:, :1])
seen, saved = [], []

def loss(module, batch):
    seen.append(len(batch[0]))
    return (module(batch[0]) - batch[1]).square().mean(), {}

settings = Settings(steps=6, batch_size=8, lr=0.05, validate_every=3)
log = Path(sys.argv[1], "log.jsonl")
fit(module, data, loss, settings, name="two", validate=lambda: len(saved) - 1.0, save=lambda: saved.append(1), log=log)
rank = torch.distributed.get_rank()
assert torch.distributed.get_world_size() == 2
weights = torch.cat([p.flatten() for p in module.parameters()]).tolist()
Path(sys.argv[1], f"{rank}.json").write_text(json.dumps({"weights": weights, "seen": seen, "saved": len(saved)}))
torch.distributed.destroy_process_group()
os._exit(0)  # gloo was seen to abort a process in its exit handlers, after all of the above
"""


def test_two_processes_train_one_model(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launcher, tmp_path / "train.py", tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["weights"] == second["weights"] and first["seen"] == second["seen"] == [8] * 6
    assert first["saved"] > 0 and second["saved"] == 0
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 6
