"""The CUDA C++ kernels of BatchNorm before LIF on the host, against plain torch."""

import itertools

import pytest
import torch

from spikeclip.ops import reference
from spikeclip.ops.surrogate import SURROGATES

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [(1, 1), (5, 31), (3, 64), (2, 3, 33), (2, 200)]
# v_threshold, v_reset, decay_input; by the last a channel that is not there would fire.
NEURONS = [(0.9, 0.0, True), (1.0, None, False), (-0.6, -0.5, True)]
STEEPNESS = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
MANY_EACH = [(2, 10_000, 3), (2, 50, 19_200)]  # more rows than warps, of few channels and of many


def norm(channels):
    return torch.randn(channels) * 1.5, torch.randn(channels) + 0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 31), (17, 2, 3, 70), (1, 9, 129), *MANY_EACH], ids=str)
def test_bn_stats_beside_a_large_mean(host_cuda, dtype, shape):
    spread = {torch.float32: 0.01, torch.float16: 1.0, torch.bfloat16: 4.0}[dtype]
    x = (torch.randn(shape) * spread + 100).to(dtype)
    mean, var = host_cuda.bn_stats(x)
    rows = x.double().flatten(0, -2)
    assert (mean.shape, mean.dtype, var.shape, var.dtype) == (shape[-1:], torch.float32, shape[-1:], torch.float32)
    torch.testing.assert_close(mean.double(), rows.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), rows.var(0, correction=0), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", [1, 3, 4, 8, 9, 17])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bn_lif_fwd_equals_the_reference(host_cuda, dtype, steps, size):
    x, v0 = (torch.randn(steps, *size) * 1.2 + 0.3).to(dtype), torch.randn(size) * 0.3
    spike_dtypes = [torch.int32, *(DTYPES if dtype == torch.float32 else [dtype])]
    for neuron, spike_dtype, scaled in itertools.product(NEURONS, spike_dtypes, (True, False)):
        start, tau = (None, 2.3) if scaled else (v0, torch.tensor(2.5))
        options = (x, start, *(norm(size[-1]) if scaled else (None, None)), tau, *neuron, spike_dtype)
        (spikes, v_last), (want, v_want) = host_cuda.bn_lif_fwd(*options), reference.bn_lif_fwd(*options)
        assert spikes.dtype == spike_dtype and torch.equal(spikes, want) and torch.equal(v_last, v_want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", [1, 2, 4, 5, 8, 9, 17])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bn_lif_bwd_equals_the_reference(host_cuda, dtype, steps, size):
    surrogates = itertools.cycle(SURROGATES.items())
    for neuron, detach, asked in itertools.product(NEURONS, (True, False), [(True, True), (True, False), (False, True)]):
        name, row = next(surrogates)
        ds_dtype = torch.bfloat16 if dtype == torch.float32 and detach else dtype
        check_gradient(host_cuda, (steps, *size), dtype, ds_dtype, *asked, 2.3, *neuron, detach, name, row.alpha)


@pytest.mark.parametrize("shape", MANY_EACH, ids=str)
def test_bn_lif_bwd_of_many_rows(host_cuda, shape):
    check_gradient(host_cuda, shape, torch.float32, torch.float32, True, True, 2.0, 1.0, 0.0, True, False, "sigmoid", 4.0)


def check_gradient(host_cuda, shape, dtype, ds_dtype, write, sums, *neuron):
    channels = shape[-1]
    x, ds = (torch.randn(shape) * 1.2 + 0.3).to(dtype), torch.randn(shape).to(ds_dtype)
    factors = torch.randn(3, channels) if write else None
    options = (ds, x, *norm(channels), torch.randn(channels), factors, sums, *neuron)
    (dx, total), (dx_want, want) = host_cuda.bn_lif_bwd(*options), reference.bn_lif_bwd(*options)
    assert (dx.shape, dx.dtype, total.shape, total.dtype) == (dx_want.shape, dtype, want.shape, torch.float32)
    torch.testing.assert_close(dx.float(), dx_want.float(), rtol=STEEPNESS[dtype], atol=1e-4)
    if sums:
        torch.testing.assert_close(total, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())
