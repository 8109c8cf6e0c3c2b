import pytest
import torch
from compare import assert_error_bounded
from torch.nn import functional as F

from spikeclip.ops import _backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOOR = {torch.float64: 1e-15, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
BACKENDS = [
    pytest.param(name, dtype, id=f"{name}-{dtype}")
    for name in _backends.BACKENDS
    for dtype in FLOOR
    if _backends.unavailable(name, DEVICE, dtype) is None
]
WINDOWS = [(3, 2, 1), (2, 2, 0), (3, 1, 1), (2, 1, 1), (2, 3, 0), (5, 2, 2), (1, 1, 0), (15, 4, 7)]
op, op_bwd = torch.ops.spikeclip.max_pool, torch.ops.spikeclip.max_pool_bwd


def images(x):
    return x.flatten(0, 1).permute(0, 3, 1, 2)


def steps(y, like):
    return y.permute(0, 2, 3, 1).unflatten(0, like.shape[:2])


def pool(x, scale, window):
    """(Values, numbers in the window and flat indices in the image of channels-first images), by torch in float64."""
    sign = torch.where(scale < 0, -1.0, 1.0).double()
    y, flat = F.max_pool2d(images(x.double() * sign), *window, return_indices=True)
    (size, stride, padding), (rows, columns) = window, flat.shape[2:]
    down = flat // x.shape[3] - (torch.arange(rows) * stride - padding)[:, None]
    right = flat % x.shape[3] - (torch.arange(columns) * stride - padding)
    return steps(y, x) * sign, steps(down * size + right, x), flat


def gradient(dvalues, flat, x, factors):
    dx = torch.zeros_like(images(x), dtype=torch.float64).flatten(2)
    dx = dx.scatter_add(2, flat.flatten(2), images(dvalues).flatten(2).double())
    dx = steps(dx.view_as(images(x)), x)
    return dx if factors is None else dx + factors[0].double() * x.double() + factors[1].double()


def moved(*tensors):
    return [None if t is None else t.to(DEVICE) for t in tensors]


def inputs(shape, dtype):
    """Numbers with many ties, and scales of both signs, zero and a negative zero among them."""
    x = (torch.randn(shape) * 2).round().to(dtype)
    scale = torch.randn(shape[-1], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    scale[-2:] = torch.tensor([0.0, -0.0])[-shape[-1] :]
    return x, scale


def check_forward(x, scale, window, backend):
    want, number, flat = pool(x, scale, window)
    values, index = op(*moved(x, scale), window, backend)
    assert (values.dtype, index.dtype) == (x.dtype, torch.uint8) and values.is_contiguous() and index.is_contiguous()
    torch.testing.assert_close(values.cpu().double(), want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(index.cpu().long(), number)
    return index, flat


def check(x, scale, window, backend, with_factors):
    index, flat = check_forward(x, scale, window, backend)
    dvalues = torch.randn(index.shape).to(x.dtype)
    factors = torch.randn(2, x.shape[-1]).to(scale) if with_factors else None
    want = gradient(dvalues, flat, x, factors)
    plain = op_bwd(dvalues, index.cpu(), x, factors, window, "torch")
    got = op_bwd(*moved(dvalues, index, x, factors), window, backend)
    assert got.dtype == x.dtype and got.is_contiguous()
    assert_error_bounded(got.cpu(), plain, want, floor=FLOOR[x.dtype])


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_every_window_matches_the_oracle(backend, dtype, window):
    for size in [(7, 6), (4, 5)]:
        if min(size) + 2 * window[2] >= window[0]:
            for factors in (False, True):
                check(*inputs((2, 3, *size, 5), dtype), window, backend, factors)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize("channels", [1, 3, 16, 24, 40, 48, 96, 516])
def test_every_number_of_channels_matches_the_oracle(backend, dtype, channels):
    check(*inputs((1, 2, 5, 4, channels), dtype), (3, 2, 1), backend, True)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_images_as_small_as_the_window(backend, dtype):
    for size, window in [((1, 1), (1, 1, 0)), ((1, 1), (2, 1, 1)), ((1, 2), (2, 2, 1)), ((3, 3), (3, 5, 0))]:
        check(*inputs((2, 1, *size, 24), dtype), window, backend, True)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_nan_wins_and_takes_the_gradient(backend, dtype):
    for window in [(3, 2, 1), (2, 2, 0), (3, 1, 1)]:
        x, scale = inputs((2, 2, 6, 7, 24), dtype)
        x[torch.rand(x.shape) < 0.2] = torch.nan
        check(x, scale, window, backend, False)


@pytest.mark.parametrize(("backend", "dtype"), [case for case in BACKENDS if case.values[0] in ("cpu", "triton")])
def test_padding_never_wins(backend, dtype):
    for window in [(3, 2, 1), (2, 1, 1), (5, 3, 2)]:
        scale = torch.tensor([1.0, -1.0] * 12)
        x = torch.full((1, 2, 5, 6, 24), -torch.inf, dtype=dtype) * scale.to(dtype)
        check_forward(x, scale, window, backend)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_a_gradient_that_is_not_finite_stays_with_its_pixel(backend, dtype):
    x, scale = inputs((1, 1, 6, 6, 8), dtype)
    index, flat = check_forward(x, scale, (3, 2, 1), backend)
    dvalues = torch.ones(index.shape, dtype=dtype)
    dvalues[0, 0, 1, 1] = torch.inf
    got = op_bwd(*moved(dvalues, index, x, None), (3, 2, 1), backend)
    assert torch.equal(got.cpu().double(), gradient(dvalues, flat, x, None))


no_triton = pytest.mark.skipif(_backends.unavailable("triton", DEVICE) is not None, reason="triton is not available here")


@no_triton
def test_triton_of_no_images():
    for shape in [(2, 0, 6, 6, 8), (0, 2, 6, 6, 8)]:
        x, ones = torch.zeros(shape, device=DEVICE), torch.ones(2, 8, device=DEVICE)
        values, index = op(x, ones[0], (3, 2, 1), "triton")
        assert values.shape == index.shape == (*shape[:2], 3, 3, 8)
        assert op_bwd(values, index, x, ones, (3, 2, 1), "triton").shape == shape


@no_triton
@pytest.mark.parametrize("channels", [5, 32])
def test_triton_offsets_of_64_bits_give_the_same(monkeypatch, channels):
    monkeypatch.setattr("spikeclip.kernels.max_pool.NARROW", 0)
    check(*inputs((2, 2, 7, 5, channels), torch.float32), (3, 2, 1), "triton", True)
