"""Products of spikes against dense products on a CPU. Every result is checked before it is timed.

Dense peers do not depend on the spikes, so each is timed once per group; ratios are against the fastest dense float32 one.
"""

import time

import pytest
import torch
from torch.nn import functional as F

from spikeclip import nn as snn
from spikeclip.ops import pack_spikes, prepare_weights, spike_attention, spike_conv2d, spike_matmul

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="about the CPU; test_spikes_gpu.py has the GPU's cases")
ROWS = 8192  # 32 images of 64 tokens at T = 4
SIZES = [(384, 384), (384, 1536), (1536, 384)]
DENSITIES = [0.05, 0.1, 0.2, 0.5, 1.0]
OURS = ["spikeclip, packed", "spikeclip, dense spikes", "spikeclip, int16 weights", "spikeclip, int8 weights"]
DENSE = ["torch.mm", "torch.compile of torch.mm", "oneDNN 1x1 convolution", "torch.mm, bf16", "torch._int_mm"]


def spikes(*shape, density):
    torch.manual_seed(0)
    return (torch.rand(*shape) < density).float()


def timed(benchmark, call, baseline=False):
    """Rounds by the time that a call takes; some peers take seconds where the CPU lacks their arithmetic."""
    call()
    started = time.perf_counter()
    call()
    took = time.perf_counter() - started
    benchmark.extra_info["baseline"] = baseline
    benchmark.pedantic(call, rounds=int(min(100, max(3, 1.5 / took))), warmup_rounds=3 if took < 0.3 else 0)


def close(got, want, tolerance):
    assert (got.double() - want.double()).norm() <= tolerance * want.double().norm()


def no_grad(call):
    def run():
        with torch.no_grad():
            return call()

    return run


def product(who, s, w):
    """(callable, relative error allowed, whether it is a dense float32 baseline)."""
    rows, length = s.shape
    columns = w.shape[1]
    if who.startswith("spikeclip"):
        kind = {"spikeclip, int16 weights": "int16", "spikeclip, int8 weights": "int8"}.get(who, "fp32")
        weights, packed = prepare_weights(w, kind), s if who == "spikeclip, dense spikes" else pack_spikes(s)
        return no_grad(lambda: spike_matmul(packed, weights)), {"fp32": 1e-6, "int16": 3e-3, "int8": 2e-2}[kind], False
    if who == "torch.mm":
        return no_grad(lambda: s @ w), 1e-6, True
    if who == "torch.compile of torch.mm":
        compiled = torch.compile(lambda: s @ w)
        return no_grad(compiled), 1e-6, True
    if who == "oneDNN 1x1 convolution":
        images = s.view(rows // 64, 8, 8, length).permute(0, 3, 1, 2)
        kernel = w.t().contiguous().view(columns, length, 1, 1).contiguous(memory_format=torch.channels_last)
        return no_grad(lambda: F.conv2d(images, kernel).permute(0, 2, 3, 1).reshape(rows, columns)), 1e-6, True
    if who == "torch.mm, bf16":
        low = s.bfloat16(), w.bfloat16()
        return no_grad(lambda: low[0] @ low[1]), 1e-2, False
    if who == "torch._int_mm":
        unit = w.abs().max() / 127
        integers = s.to(torch.int8), (w / unit).round().to(torch.int8)
        return no_grad(lambda: torch._int_mm(*integers) * unit), 2e-2, False
    if who == "torch.sparse CSR":
        rows_csr = s.to_sparse_csr()
        return no_grad(lambda: rows_csr @ w), 1e-6, False
    linear = pytest.importorskip("spikingjelly.activation_based.functional").sparse_linear
    transposed = w.t().contiguous()
    return no_grad(lambda: linear(s, transposed)), 1e-6, True


CASES = [(who, d) for who in OURS for d in DENSITIES] + [(who, None) for who in [*DENSE, "SpikingJelly sparse_linear"]]
CASES += [("torch.sparse CSR", d) for d in (0.05, 0.1, 0.2)]


@pytest.mark.parametrize(("who", "density"), CASES)
@pytest.mark.parametrize(("length", "columns"), SIZES)
def test_spike_matmul(benchmark, length, columns, who, density):
    benchmark.group = f"spike_matmul [{ROWS}, {length}] x [{length}, {columns}]"
    s, w = spikes(ROWS, length, density=density or 0.1), torch.randn(length, columns)
    call, tolerance, baseline = product(who, s, w)
    close(call(), s @ w, tolerance)
    timed(benchmark, call, baseline)


@pytest.mark.parametrize(("who", "density"), [("SpikeLinear", d) for d in DENSITIES] + [("nn.Linear", 0.1)])
@pytest.mark.parametrize(("length", "columns"), SIZES)
def test_linear_training(benchmark, length, columns, who, density):
    benchmark.group = f"linear layer, forward + backward, [{ROWS}, {length}] to {columns}"
    s, dy = spikes(ROWS, length, density=density).requires_grad_(), torch.randn(ROWS, columns)
    layers = {"nn.Linear": torch.nn.Linear(length, columns), "SpikeLinear": snn.SpikeLinear(length, columns)}
    layers["SpikeLinear"].load_state_dict(layers["nn.Linear"].state_dict())
    grads = {name: torch.autograd.grad(layer(s), [s, layer.weight, layer.bias], dy) for name, layer in layers.items()}
    for mine, theirs in zip(*grads.values(), strict=True):
        close(mine, theirs, 1e-5)
    layer = layers[who]
    timed(benchmark, lambda: torch.autograd.grad(layer(s), [s, layer.weight, layer.bias], dy), who == "nn.Linear")


def convolution(who, s, w):
    if who.startswith("spikeclip"):
        kind = {"spikeclip, int16 weights": "int16", "spikeclip, int8 weights": "int8"}.get(who, "fp32")
        weights = prepare_weights(w, kind)
        given = s if who == "spikeclip, dense spikes" else pack_spikes(s.permute(0, 2, 3, 1))
        return no_grad(lambda: spike_conv2d(given, weights, padding=1)), {"fp32": 1e-6, "int16": 3e-3, "int8": 2e-2}[kind]
    if who == "F.conv2d, channels last":
        kernel = w.contiguous(memory_format=torch.channels_last)
        return no_grad(lambda: F.conv2d(s, kernel, padding=1)), 1e-6
    low, kernel = s.bfloat16(), w.bfloat16().contiguous(memory_format=torch.channels_last)
    return no_grad(lambda: F.conv2d(low, kernel, padding=1)), 1e-2


@pytest.mark.parametrize(
    ("who", "density"),
    [(who, d) for who in OURS for d in DENSITIES] + [("F.conv2d, channels last", 0.1), ("F.conv2d, channels last, bf16", 0.1)],
)
def test_spike_conv2d(benchmark, who, density):
    benchmark.group = "spike_conv2d 3x3, 384 to 384 channels, 8x8, 128 images"
    s = spikes(128, 384, 8, 8, density=density).contiguous(memory_format=torch.channels_last)
    w = torch.randn(384, 384, 3, 3)
    call, tolerance = convolution(who, s, w)
    close(call(), F.conv2d(s, w, padding=1), tolerance)
    timed(benchmark, call, who == "F.conv2d, channels last")


def attention(who, parts, heads, scale):
    if who.startswith("spikeclip"):
        given = parts if who == "spikeclip, dense spikes" else [pack_spikes(t) for t in parts]
        return no_grad(lambda: spike_attention(*given, scale=scale, num_heads=heads))
    dtype = torch.bfloat16 if "bf16" in who else torch.float32
    q, k, v = (t.to(dtype).unflatten(-1, (heads, -1)).transpose(1, 2).contiguous() for t in parts)
    if "(q k^T) v" in who:
        return no_grad(lambda: ((q @ k.mT) @ v * scale).transpose(1, 2).flatten(2))
    return no_grad(lambda: (q @ (k.mT @ v) * scale).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("who", "density"),
    [(who, d) for who in OURS[:2] for d in DENSITIES]
    + [(f"torch {order}{dtype}", 0.1) for order in ("(q k^T) v", "q (k^T v)") for dtype in ("", ", bf16")],
)
@pytest.mark.parametrize("tokens", [64, 196])
def test_spike_attention(benchmark, tokens, who, density):
    benchmark.group = f"spike_attention, 8 heads x 48, {tokens} tokens, 128 images"
    parts = [t.contiguous() for t in spikes(3, 128, tokens, 384, density=density)]
    call = attention(who, parts, 8, 0.125)
    q, k, v = (t[:4].unflatten(-1, (8, 48)).transpose(1, 2) for t in parts)
    close(call()[:4], ((q @ k.mT) @ v * 0.125).transpose(1, 2).flatten(2), 2e-2 if "bf16" in who else 0.0)
    timed(benchmark, call, who.startswith("torch") and "bf16" not in who)
