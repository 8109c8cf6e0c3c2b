"""Products of packed spikes on a GPU against cuBLAS and SpikingJelly, with the share of the device's roof that each reached.

The roof is the larger of bytes over memory bandwidth and operations over bf16 throughput, on paper, for packed spikes: what a
dense peer moves beyond that counts against it.
"""

import pytest
import torch

from spikeclip.ops import _backends, pack_spikes, spike_attention, spike_conv2d, spike_matmul

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
T, TOKENS = 4, 64
DENSITIES = [0.05, 0.1, 0.2, 0.3]
# bytes/s and dense bf16 operations/s: NVIDIA's data sheets, SXM.
PEAKS = {"H100": (3.35e12, 989e12), "H200": (4.8e12, 989e12), "A100": (2.04e12, 312e12)}
OURS = [n for n in ("triton", "cuda") if _backends.unavailable(n, "cuda") is None]


def roof_seconds(moved, operations):
    peak = next((p for name, p in PEAKS.items() if name in torch.cuda.get_device_name()), None)
    return None if peak is None else max(moved / peak[0], operations / peak[1])


def timed(benchmark, call, want, tolerance, moved, operations, baseline=False):
    def synchronised():
        with torch.no_grad():
            y = call()
        torch.cuda.synchronize()
        return y

    error = (synchronised().float() - want.float()).norm() / want.float().norm()
    assert error <= tolerance, f"relative error {error:.1e}"
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    synchronised()
    roof = roof_seconds(moved, operations)
    benchmark.extra_info.update(baseline=baseline, bytes=moved, memory=torch.cuda.max_memory_allocated() - before)
    benchmark.pedantic(synchronised, rounds=30, warmup_rounds=5)
    if roof is not None:
        benchmark.extra_info["roof"] = roof / benchmark.stats.stats.median


def spikes(*shape, density):
    torch.manual_seed(0)
    return (torch.rand(*shape, device="cuda") < density).bfloat16()


MATMULS = [(f"spikeclip ({n})", d) for n in OURS for d in DENSITIES]
MATMULS += [("cuBLAS bf16", None)] + [("SpikingJelly sparse_linear", d) for d in DENSITIES]


@pytest.mark.parametrize(("who", "density"), MATMULS)
@pytest.mark.parametrize("channels", [384, 512, 768])
@pytest.mark.parametrize("batch", [1, 32, 256])
def test_spike_matmul(benchmark, batch, channels, who, density):
    rows = T * batch * TOKENS
    benchmark.group = f"spike_matmul bf16, [{rows}, {channels}] x [{channels}, {channels}]"
    s = spikes(rows, channels, density=density or 0.1)
    w = torch.randn(channels, channels, device="cuda").bfloat16()
    moved, operations = rows * channels // 8 + 2 * channels**2 + 2 * rows * channels, 2 * rows * channels**2
    if who.startswith("spikeclip"):
        backend, packed = who[11:-1], pack_spikes(s)
        call = lambda: spike_matmul(packed, w, backend=backend)  # noqa: E731
    elif who == "cuBLAS bf16":
        call = lambda: s @ w  # noqa: E731
    else:
        functional = pytest.importorskip("spikingjelly.activation_based.functional")
        transposed = w.t().contiguous()
        call = lambda: functional.sparse_linear(s, transposed, strategy="sparse")  # noqa: E731
    timed(benchmark, call, s.float() @ w.float(), 1e-2, moved, operations, who == "cuBLAS bf16")


@pytest.mark.parametrize("who", [*(f"spikeclip ({n})" for n in OURS), "cuDNN bf16, channels last"])
@pytest.mark.parametrize("batch", [32, 256])
def test_spike_conv2d(benchmark, batch, who):
    images, channels = T * batch, 384
    benchmark.group = f"spike_conv2d bf16 3x3, {channels} to {channels} channels, 8x8, {images} images, 10% firing"
    s = spikes(images, channels, 8, 8, density=0.1).contiguous(memory_format=torch.channels_last)
    w = torch.randn(channels, channels, 3, 3, device="cuda").bfloat16().contiguous(memory_format=torch.channels_last)
    pixels = images * 64
    moved = pixels * channels // 8 + 2 * w.numel() + 2 * pixels * channels
    want = torch.nn.functional.conv2d(s.float(), w.float(), padding=1)
    if who.startswith("spikeclip"):
        backend, packed = who[11:-1], pack_spikes(s.permute(0, 2, 3, 1))
        call = lambda: spike_conv2d(packed, w, padding=1, backend=backend)  # noqa: E731
    else:
        call = lambda: torch.nn.functional.conv2d(s, w, padding=1)  # noqa: E731
    timed(benchmark, call, want, 1e-2, moved, 2 * pixels * 9 * channels**2, who.startswith("cuDNN"))


@pytest.mark.parametrize("who", [*(f"spikeclip ({n})" for n in OURS), "torch bf16, q (k^T v)", "torch bf16, (q k^T) v"])
@pytest.mark.parametrize("tokens", [64, 196])
def test_spike_attention(benchmark, tokens, who):
    images, heads, width = T * 64, 8, 48
    benchmark.group = f"spike_attention bf16, {heads} heads x {width}, {tokens} tokens, {images} images, 10% firing"
    parts = spikes(3, images, tokens, heads * width, density=0.1).unbind()
    q, k, v = (t.unflatten(-1, (heads, width)).transpose(1, 2).contiguous() for t in parts)
    want = ((q.float() @ (k.float().mT @ v.float())) * 0.125).transpose(1, 2).flatten(2)
    moved = images * tokens * heads * width * (3 / 8 + 2)
    if who.startswith("spikeclip"):
        backend, packed = who[11:-1], [pack_spikes(t) for t in parts]
        call = lambda: spike_attention(*packed, scale=0.125, num_heads=heads, backend=backend)  # noqa: E731
    elif "(k^T v)" in who:
        call = lambda: (q @ (k.mT @ v) * 0.125).transpose(1, 2).flatten(2)  # noqa: E731
    else:
        call = lambda: ((q @ k.mT) @ v * 0.125).transpose(1, 2).flatten(2)  # noqa: E731
    timed(benchmark, call, want, 2e-2, moved, 4 * images * tokens * heads * width**2, who.startswith("torch"))
