"""The CUDA C++ kernels on the host, without a GPU: their arithmetic, indices, barriers and exchanges between threads.

Everything about speed, and races that need threads at the same time, are left to machines with a GPU.
"""

import pytest
import torch
from compare import assert_error_bounded

from spikeclip.ops import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FLOOR = {torch.float32: 2e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3}
conv2d = torch.nn.functional.conv2d


def spikes(*shape, dead=slice(32, 64)):
    """Ones and zeros [..., K], with channels that never fire."""
    s = (torch.rand(shape) < 0.3).float()
    s[..., dead] = 0
    return s


def weights(shape, dtype):
    """(w, scale, dtype of the product, w as float64 without its scale)."""
    if dtype.is_floating_point:
        w = torch.randn(shape).to(dtype)
        return w, None, dtype, w.double()
    w = torch.randint(-128, 128, shape).to(dtype) * (1 if dtype == torch.int8 else 200)
    return w, torch.rand(1).expand(shape[-1] if len(shape) == 2 else shape[0]) + 0.5, torch.float32, w.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", [1, 3, 4, 5, 8, 9, 16, 17, 40])
@pytest.mark.parametrize("n", [1, 132, 1037])
@pytest.mark.parametrize("v_reset", [-0.1, None])
def test_lif_equals_the_reference(host_cuda, dtype, steps, n, v_reset):
    x, v0 = (torch.randn(steps, n) * 1.2 + 0.3).to(dtype), torch.randn(n) * 0.3
    ds, dv_last = torch.randn(steps, n).to(dtype), torch.randn(n)
    tau, v_threshold = torch.tensor(2.5), 0.9
    spikes, v_last = host_cuda.lif_fwd(x, v0, tau, v_threshold, v_reset, True, dtype)
    want, v_want = reference.lif_fwd(x, v0, tau, v_threshold, v_reset, True, dtype)
    assert torch.equal(spikes, want) and torch.equal(v_last, v_want)

    options = (ds, dv_last, x, v0, tau, v_threshold, v_reset, True, False, "atan", 3.0)
    dx, dv0, dtau = host_cuda.lif_bwd(*options)
    dx_want, dv0_want, dtau_want = reference.lif_bwd(*options)
    torch.testing.assert_close(dx.float(), dx_want.float(), rtol={torch.float32: 1e-4}.get(dtype, 1e-2), atol=1e-4)
    torch.testing.assert_close(dv0, dv0_want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dtau, dtau_want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.bool, torch.uint8], ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 31), (2, 5, 33), (70, 65), (0, 5), (3, 0), (2, 1024)])
def test_pack_equals_the_reference(host_cuda, dtype, shape):
    s = spikes(*shape, dead=[]).to(dtype)
    words = host_cuda.pack(s, True)
    assert torch.equal(words, reference.pack(s, True))
    assert torch.equal(host_cuda.unpack(words, shape[-1], dtype), s) and host_cuda.count(words) == int(s.float().sum())


@pytest.mark.parametrize("value", [2.0, -1.0, 0.5, float("nan"), float("inf")])
def test_pack_finds_the_one_value_that_is_no_spike(host_cuda, value):
    s = torch.zeros(3, 40)
    s[2, 39] = value
    host_cuda.pack(s, False)
    with pytest.raises(ValueError, match="0 or 1"):
        host_cuda.pack(s, True)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int16, torch.int8], ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (0, 5, 3), (5, 31, 17), (70, 33, 1), (130, 65, 70), (65, 1100, 33), (9, 96, 130)])
@pytest.mark.parametrize("by_row", [True, False])
def test_spike_matmul_and_its_gradient(host_cuda, dtype, sizes, by_row):
    m, k, n = sizes
    s = spikes(m, k)
    words = reference.pack(s, True)
    w, scale, out, exact = weights((k, n), dtype)
    w = w if by_row else w.t().contiguous().t()
    bias = torch.randn(n) if by_row else None
    want = s.double() @ exact * (1 if scale is None else scale.double()) + (0 if bias is None else bias.double())
    y = host_cuda.spike_matmul(words, k, w, scale, bias, out)
    plain = reference.spike_matmul(words, k, w, scale, bias, out)
    assert (y.shape, y.dtype) == (plain.shape, plain.dtype)
    assert_error_bounded(y, plain, want, floor=FLOOR[out])
    if dtype.is_floating_point:
        dy = torch.randn(m, n).to(dtype) if by_row else torch.randn(n, m).to(dtype).t()
        dw = host_cuda.spike_matmul_dw(words, k, dy)
        assert (dw.shape, dw.dtype) == ((k, n), torch.float32)
        assert_error_bounded(dw, reference.spike_matmul_dw(words, k, dy), s.double().t() @ dy.double(), floor=2e-6)


def test_a_long_gradient_is_split(host_cuda):
    s, dy = spikes(2500, 40), torch.randn(2500, 5)
    words = reference.pack(s, True)
    assert host_cuda._ext.gradient_splits(2500, 5, 40, 1) == 3
    dw = host_cuda.spike_matmul_dw(words, 40, dy)
    assert_error_bounded(dw, reference.spike_matmul_dw(words, 40, dy), s.double().t() @ dy.double(), floor=2e-6)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int16, torch.int8], ids=str)
@pytest.mark.parametrize(
    ("images", "w_shape", "stride", "padding"),
    [
        ((1, 1, 1, 1), (1, 1, 1, 1), (1, 1), (0, 0)),
        ((2, 5, 4, 33), (17, 33, 3, 3), (1, 1), (1, 1)),
        ((1, 6, 7, 70), (40, 70, 3, 2), (2, 1), (1, 2)),
        ((0, 4, 4, 5), (3, 5, 2, 2), (2, 2), (0, 0)),
    ],
)
def test_spike_conv2d_and_its_gradient(host_cuda, dtype, images, w_shape, stride, padding):
    s = spikes(*images)
    channels, x = images[3], s.double().permute(0, 3, 1, 2)
    words = reference.pack(s, True)
    w, scale, out, exact = weights(w_shape, dtype)
    w = w.transpose(2, 3).contiguous().transpose(2, 3)
    bias = torch.randn(w_shape[0])
    exact = exact if scale is None else exact * scale.double().view(-1, 1, 1, 1)
    want = conv2d(x, exact, bias.double(), stride, padding)
    y = host_cuda.spike_conv2d(words, channels, w, scale, bias, stride, padding, out)
    plain = reference.spike_conv2d(words, channels, w, scale, bias, stride, padding, out)
    assert (y.shape, y.dtype, y.stride()) == (plain.shape, plain.dtype, plain.stride())
    assert_error_bounded(y, plain, want, floor=FLOOR[out])
    if dtype.is_floating_point and images[0]:
        dy = torch.randn(want.shape).to(dtype)
        dy = dy.contiguous(memory_format=torch.channels_last) if dtype == torch.float16 else dy
        dw = host_cuda.spike_conv2d_dw(words, channels, dy, w_shape[2:], stride, padding)
        dw_plain = reference.spike_conv2d_dw(words, channels, dy, w_shape[2:], stride, padding)
        assert (dw.shape, dw.dtype) == (w_shape, torch.float32)
        dw_want = torch.nn.grad.conv2d_weight(x, w_shape, dy.double(), stride, padding)
        assert_error_bounded(dw, dw_plain, dw_want, floor=2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("length", "n", "s", "num_heads", "width"),
    [(1, 1, 1, 1, 1), (2, 5, 7, 3, 5), (2, 17, 60, 2, 48), (1, 9, 300, 3, 12), (1, 70, 33, 1, 64), (1, 6, 20, 2, 100),
     (1, 270, 8, 2, 5), (2, 33, 33, 2, 20), (1, 260, 260, 1, 36), (1, 0, 3, 1, 4), (1, 4, 0, 1, 4)],
)  # fmt: skip
def test_spike_attention_and_its_gradients(host_cuda, dtype, length, n, s, num_heads, width):
    channels, scale = num_heads * width, 0.125
    q, k, v = (spikes(length, rows, channels, dead=[]) for rows in (n, s, s))
    words = [reference.pack(x, True) for x in (q, k, v)]
    y = host_cuda.spike_attention(*words, channels, num_heads, scale, dtype)
    assert torch.equal(y, reference.spike_attention(*words, channels, num_heads, scale, dtype))

    dy = torch.randn(length, n, channels).to(dtype)
    q, k, v, dy_heads = (x.double().unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v, dy))
    weighed = dy_heads @ v.mT * scale
    want = (weighed @ k, weighed.mT @ q, (q @ k.mT).mT @ dy_heads * scale)
    got = host_cuda.spike_attention_bwd(dy, *words, channels, num_heads, scale)
    plain = reference.spike_attention_bwd(dy, *words, channels, num_heads, scale)
    for mine, ref, oracle in zip(got, plain, want, strict=True):
        assert (mine.shape, mine.dtype) == (ref.shape, ref.dtype)
        assert_error_bounded(mine, ref, oracle.transpose(1, 2).flatten(2), floor=FLOOR[dtype])
    if n == s:
        qkv = reference.pack(torch.cat([reference.unpack(w, channels, torch.float32) for w in words], -1), True)
        assert torch.equal(host_cuda.spike_attention(qkv, None, None, channels, num_heads, scale, dtype), y)
        (together,) = host_cuda.spike_attention_bwd(dy, qkv, None, None, channels, num_heads, scale)
        assert torch.equal(together, torch.cat(got, -1))
