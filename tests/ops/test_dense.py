"""Dense products beside the spikes' own: never in 16 bits that the CPU does not multiply natively."""

import pytest
import torch
from compare import assert_error_bounded
from multiplied import Multiplied
from torch.nn import functional as F

from spikeclip.ops import _density, pack_spikes
from spikeclip.ops._dense import dense_product
from spikeclip.ops.spike_conv2d import _ds as conv_ds
from spikeclip.ops.spike_conv2d import _dw as conv_dw
from spikeclip.ops.spike_conv2d import _fwd as conv_fwd
from spikeclip.ops.spike_matmul import _dw as matmul_dw
from spikeclip.ops.spike_matmul import _fwd as matmul_fwd


def dense_spikes(*shape, dtype=torch.float32):
    """So many that ``auto`` takes a dense product."""
    return (torch.rand(shape) < 0.98).to(dtype)


def matmul(dtype):
    s, w, bias = dense_spikes(64, 40), torch.randn(40, 24), torch.randn(24)
    return lambda t: s.to(t) @ w.to(t) + bias.to(t), lambda: matmul_fwd(s, 40, w, None, None, bias, False, dtype, "auto")[0]


def halved_matmul(dtype):
    s, w = dense_spikes(64, 40, dtype=dtype), torch.randn(40, 24).to(dtype)
    return lambda t: s.to(t) @ w.to(t), lambda: matmul_fwd(s, 40, w, None, None, None, False, None, "auto")[0]


def halved_convolution(dtype):
    s, w = dense_spikes(2, 16, 8, 8, dtype=dtype), torch.randn(24, 16, 3, 3).to(dtype)
    made = lambda: conv_fwd(s, 16, w, None, None, None, (1, 1), (1, 1), False, None, "auto")[0]  # noqa: E731
    return lambda t: F.conv2d(s.to(t), w.to(t), padding=1), made


def large_product(dtype):
    x, w = torch.randn(512, 256).to(dtype), torch.randn(256, 160)
    return lambda t: x.to(t) @ w.to(t), lambda: dense_product(x, w)


def weights_of_matmul(dtype):
    s, dy = dense_spikes(64, 40), torch.randn(64, 24).to(dtype)
    return lambda t: s.to(t).t() @ dy.to(t), lambda: matmul_dw(pack_spikes(s).words, 40, dy, "auto")


def weights_of_convolution(dtype):
    s, dy = dense_spikes(2, 8, 8, 16), torch.randn(2, 24, 8, 8).to(dtype)
    right = lambda t: torch.nn.grad.conv2d_weight(s.permute(0, 3, 1, 2).to(t), (24, 16, 3, 3), dy.to(t), padding=1)  # noqa: E731
    return right, lambda: conv_dw(pack_spikes(s).words, 16, dy, (3, 3), (1, 1), (1, 1), "auto")


def spikes_of_convolution(dtype, channels=16, size=8, outputs=24):
    w, dy = torch.randn(outputs, channels, 3, 3), torch.randn(2, outputs, size, size).to(dtype)
    right = lambda t: torch.nn.grad.conv2d_input((2, channels, size, size), w.to(t), dy.to(t), padding=1)  # noqa: E731
    return right, lambda: conv_ds(w, dy, (size, size), (1, 1), (1, 1), "auto")


def spikes_by_winograd(dtype):
    return spikes_of_convolution(dtype, channels=64, size=32, outputs=32)


GRADIENTS = [large_product, weights_of_matmul, weights_of_convolution, spikes_of_convolution, spikes_by_winograd]
MADE = [matmul, halved_matmul, halved_convolution, *GRADIENTS]


@pytest.mark.parametrize("slow", [True, False], ids=["slow", "native"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", MADE, ids=lambda case: case.__name__)
def test_sixteen_bits_are_multiplied_where_that_is_native(monkeypatch, case, dtype, slow):
    monkeypatch.setattr(_density, "SLOW_ON_CPU", frozenset({torch.bfloat16, torch.float16} if slow else ()))
    right, made = case(dtype)
    with Multiplied() as seen:
        got = made()
    assert got.dtype in (dtype, torch.float32)
    if case in (large_product, spikes_of_convolution, spikes_by_winograd):
        assert got.dtype == dtype
    assert not slow or seen.dtypes <= {torch.float32}, seen.dtypes
    assert_error_bounded(got, right(dtype), right(torch.float64), floor=torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_gradient_of_spikes_is_what_it_says_to_the_compiler(dtype):
    dy, w = torch.randn(3, 5, 24).to(torch.bfloat16), torch.randn(40, 24)
    op = torch.ops.spikeclip.spike_matmul_ds.default
    torch.library.opcheck(op, (dy, w, dtype, "auto"))
    assert_error_bounded(op(dy, w, dtype, "auto"), (dy @ w.to(dy.dtype).t()), dy.double() @ w.double().t(), floor=2**-7)
