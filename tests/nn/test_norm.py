import copy
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from spikeclip import nn as snn
from spikeclip.ops import PackedSpikes

NEURON = {"tau": 3.0, "v_threshold": 0.7, "surrogate_function": "atan", "detach_reset": True}


def two_layers(layer: snn.BNLIF, kind=nn.BatchNorm2d) -> tuple[nn.Module, nn.Module]:
    """BatchNorm with the layer's state, and its neuron."""
    norm = kind(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
    norm.load_state_dict(layer.state_dict())
    return norm.train(layer.training), snn.LIF(**NEURON)


def run(function, x, parameters):
    x = x.clone().requires_grad_()
    s = function(x)
    s.backward(torch.randn(s.shape, generator=torch.Generator().manual_seed(0)))
    return [s.detach(), x.grad, *(p.grad for p in parameters)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pool", [None, (3, 2, 1)])
@pytest.mark.parametrize("last", [True, False])
def test_it_is_batch_norm_and_lif_of_the_field(training, pool, last):
    layer = snn.BNLIF(20, pool=pool, **NEURON).train(training)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    x = torch.randn(4, 3, 20, 6, 5)
    x = x.movedim(2, -1).contiguous().movedim(-1, 2) if last else x
    norm, lif = two_layers(layer)
    window = nn.Identity() if pool is None else nn.MaxPool2d(*pool)
    want = run(lambda x: lif(window(norm(x.flatten(0, 1))).unflatten(0, (4, 3))), x, norm.parameters())
    got = run(layer, x, layer.parameters())
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.state_dict(), norm.state_dict())
    norm.load_state_dict(layer.state_dict())


@pytest.mark.parametrize("options", [{"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.1}])
def test_batch_norms_options(options):
    layer = snn.BNLIF(8, **options, **NEURON)
    norm, lif = two_layers(layer)
    for _ in range(3):
        x = torch.randn(2, 5, 8, 3, 3) + 0.5
        assert torch.equal(layer(x), lif(norm(x.flatten(0, 1)).unflatten(0, (2, 5))))
    torch.testing.assert_close(layer.state_dict(), norm.state_dict())
    x = torch.randn(2, 5, 8, 3, 3)
    assert torch.equal(layer.eval()(x), lif(norm.eval()(x.flatten(0, 1)).unflatten(0, (2, 5))))


def test_packed_spikes_lie_along_the_channels():
    layer = snn.BNLIF(40, packed=True, **NEURON)
    x = torch.randn(3, 2, 40, 4, 5)
    packed = layer(x)
    assert isinstance(packed, PackedSpikes) and packed.shape == (3, 2, 4, 5, 40) and packed.requires_grad
    dense = copy.deepcopy(layer)
    dense.packed = False
    torch.testing.assert_close(packed.unpack().movedim(-1, 2), dense(x))
    with snn.FiringRates(layer) as watch:
        layer(x)
    torch.testing.assert_close(watch.rates()[""], packed.unpack().mean((1, 2, 3, 4)).double())


def test_a_stack_of_packed_layers_learns_what_dense_layers_learn():
    """Neurons to convolution to norm and neurons to linear, packed or dense: the same gradients."""
    torch.manual_seed(0)
    layers = nn.ModuleList([snn.LIF(), snn.SpikeConv2d(32, 64, 3, padding=1), snn.BNLIF(64), snn.SpikeLinear(64, 10)])
    x = torch.randn(4, 2, 6, 6, 32) + 0.5

    def forward(x, packed):
        layers[0].packed = layers[2].packed = packed
        s = layers[0](x)
        s = s.flatten(0, 1) if packed else s.flatten(0, 1).permute(0, 3, 1, 2)
        s = layers[2](layers[1](s).unflatten(0, (4, 2)))
        return layers[3](s if packed else s.movedim(2, -1))

    results = []
    for packed in (True, False):
        layers.zero_grad()
        results.append(run(lambda x, packed=packed: forward(x, packed), x, layers.parameters()))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: snn.BNLIF(8, tau=1.0), ValueError, "tau must be a finite number > 1"),
        (lambda: snn.BNLIF(8, surrogate_function="step"), ValueError, "surrogate_function must be one of"),
        (lambda: snn.BNLIF(8, backend="fast"), ValueError, "backend must be one of"),
        (lambda: snn.BNLIF(8)(torch.zeros(2, 3, 7)), ValueError, r"x must have 8 channels in dimension 2.*got \[2, 3, 7\]"),
        (lambda: snn.BNLIF(8, channel_dim=-1)(torch.zeros(8)), ValueError, "x must have 8 channels"),
        (lambda: snn.BNLIF(8, pool=(3, 2, 1))(torch.zeros(2, 3, 8)), ValueError, "pool must have"),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


SCRIPT = """
import json, os, sys, torch
import torch.distributed as dist
from pathlib import Path
from spikeclip.nn import BNLIF

dist.init_process_group("gloo")
rank = dist.get_rank()
x, seed = (torch.randn(4, 7, 24, 3, generator=torch.Generator().manual_seed(s)) + 0.3 for s in (0, 1))
mine = slice(0, 5) if rank == 0 else slice(5, 7)  # batches of different sizes
layer = BNLIF(24, process_group=dist.group.WORLD)
part = x[:, mine].clone().requires_grad_()
s = layer(part)
s.backward(seed[:, mine])
for p in layer.parameters():
    dist.all_reduce(p.grad)
result = {"s": s.tolist(), "dx": part.grad.tolist(), "dw": layer.weight.grad.tolist(), "mean": layer.running_mean.tolist(),
          "var": layer.running_var.tolist()}
Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(result))
dist.barrier()
dist.destroy_process_group()
os._exit(0)
"""


def test_statistics_over_two_processes_are_those_of_the_whole_batch(tmp_path):
    (tmp_path / "norm.py").write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launcher, tmp_path / "norm.py", tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    parts = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    x, seed = (torch.randn(4, 7, 24, 3, generator=torch.Generator().manual_seed(s)) + 0.3 for s in (0, 1))
    layer = snn.BNLIF(24)
    s, dx, dw, _ = run_seeded(layer, x, seed)
    assert torch.equal(torch.cat([torch.tensor(p["s"]) for p in parts], 1), s)
    torch.testing.assert_close(torch.cat([torch.tensor(p["dx"]) for p in parts], 1), dx, rtol=1e-4, atol=1e-5)
    for part in parts:
        torch.testing.assert_close(torch.tensor(part["dw"]), dw, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.tensor(part["mean"]), layer.running_mean)
        torch.testing.assert_close(torch.tensor(part["var"]), layer.running_var)


def run_seeded(layer, x, seed):
    x = x.clone().requires_grad_()
    s = layer(x)
    s.backward(seed)
    return s.detach(), x.grad, *(p.grad for p in layer.parameters())


@pytest.mark.parametrize("parametrized", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_grad_checkpointing_reads_a_weight_that_is_made_anew_once(parametrized):
    """Spectral norm's weight is another one each time that it is read."""
    x, results = torch.randn(4, 3, 40), []
    for enable in (False, True):
        torch.manual_seed(0)
        layer = snn.LinearNorm(40, 24, neuron=NEURON)
        parametrized(layer.linear)
        layer.grad_checkpointing = enable
        results.append(run(lambda x, layer=layer: layer(snn.LIF(packed=True)(x)).unpack(), x, layer.parameters()))
        results[-1] += list(layer.buffers())
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True))


def test_without_gradients_grad_checkpointing_asks_for_nothing():
    layer = snn.LinearNorm(40, 24, neuron=NEURON)
    layer.grad_checkpointing = True
    seen = []
    layer.norm.register_forward_pre_hook(lambda _, given: seen.append(len(given)))
    spikes = snn.LIF(packed=True)(torch.randn(4, 3, 40))
    layer(spikes)
    layer(spikes.unpack())
    with torch.no_grad():
        layer(spikes)
    assert seen == [2, 1, 1]
