"""Where a training step of the image tower goes, and what an answer takes in memory: ``python benchmarks/shares.py``.

The time of every operator in it, and the resident memory that one call for batch 32 needs beyond a call for one image. Writes
results/shares.md.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from conftest import cpu_name
from memory import resident
from rates import mean_rate, trained
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from towers import ANSWERING

import spikeclip
from spikeclip.training.compositions import render

BATCH, WARMUP, STEPS = 32, 4, 10
KINDS = {
    "products of spikes, forward": ("spike_matmul", "spike_conv2d"),
    "their weights' gradient": ("spike_matmul_dw", "spike_conv2d_dw"),
    "their spikes' gradient, dense, and the first convolution": (
        "spike_matmul_ds",
        "convolution",
        "convolution_backward",
        "mm",
        "addmm",
    ),
    "the spikes' gradient of convolutions, by Winograd where that pays": ("spike_conv2d_ds",),
    "BatchNorm and LIF as one": ("bn_affine", "bn_stats", "bn_lif_fwd", "bn_lif_bwd", "bn_dx", "bn_factors"),
    "max-pool": ("max_pool", "max_pool_bwd", "max_pool2d_with_indices", "max_pool2d_with_indices_backward"),
    "LIF alone": ("lif_fwd", "lif_bwd"),
    "BatchNorm alone": ("native_batch_norm", "native_batch_norm_backward"),
    "attention": ("spike_attention", "spike_attention_bwd"),
}


class Times(TorchDispatchMode):
    """Seconds in every operator. (torch.profiler takes memory in between; the operators' own then comes with page faults.)"""

    def __init__(self):
        super().__init__()
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        begin = time.perf_counter()
        result = op(*args, **(kwargs or {}))
        self.seconds[op._schema.name.rpartition("::")[2]] += time.perf_counter() - begin
        return result


def shares() -> list[str]:
    spikeclip.keep_memory()
    images = render(BATCH, seed=5).images
    tower = trained(40)
    rate = mean_rate(tower, images)
    tower.train()
    optimizer = torch.optim.Adam(tower.parameters(), lr=1e-4)
    target = F.normalize(torch.randn(BATCH, 512), dim=1)
    for i in range(-WARMUP, STEPS):
        if i <= 0:  # what is counted begins with step 0
            times, whole, optimizing = Times(), 0.0, 0.0
        begin = time.perf_counter()
        with times:
            optimizer.zero_grad()
            (1 - F.cosine_similarity(tower(images), target).mean()).backward()
        middle = time.perf_counter()
        optimizer.step()
        optimizing += time.perf_counter() - middle
        whole += time.perf_counter() - begin
    rows = {kind: sum(times.seconds[name] for name in names) for kind, names in KINDS.items()}
    rows["optimizer"] = optimizing
    rows["everything else"] = whole - sum(rows.values())
    each = 1e3 / STEPS
    lines = [f"A training step of spikeclip-4-384, batch {BATCH}, fp32, firing at {rate:.1%}: {whole * each:.0f} ms.", ""]
    lines += ["| | ms | share |", "|---|---|---|"]
    return lines + [f"| {kind} | {seconds * each:.0f} | {seconds / whole:.0%} |" for kind, seconds in rows.items()]


def peak(who: str) -> None:
    """Print the megabytes of resident memory that a call for 32 images needs beyond what a call for one has left (Linux)."""
    torch.manual_seed(0)
    model = ANSWERING[who](spikeclip.SpikeCLIP.from_config("spikeclip-4-384").visual.eval())
    images = torch.rand(BATCH, 3, 32, 32)
    with torch.no_grad():
        model(images[:1])
        ctypes.CDLL(None).malloc_trim(0)  # what was freed until now shall not be what the call takes
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = resident("VmRSS")
        model(images)
    print((resident("VmHWM") - before) / 1e3)


def main() -> None:
    if len(sys.argv) > 1:
        return peak(sys.argv[1])
    lines = [f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}.", "", *shares(), ""]
    lines += [f"Memory of one call for {BATCH} images beyond that of a call for one, no gradient:", "", "| | MB |", "|---|---|"]
    for who in ("spikeclip, fp32", "spikeclip, int8", "spikeclip, tower in evaluation", "torch.nn + SpikingJelly"):
        done = subprocess.run([sys.executable, __file__, who], capture_output=True, text=True, check=True)
        lines.append(f"| {who} | {float(done.stdout):.0f} |")
    text = "\n".join(lines) + "\n"
    (Path(__file__).parent / "results" / "shares.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
