"""Dense rows times weights in the C++ extension: in float32, from and to rows of any fused dtype."""

import pytest
import torch
from compare import assert_error_bounded

from spikeclip.ops import PackedSpikes, _backends, _density, pack_spikes, spike_matmul
from spikeclip.ops._dense import fused_product_pays

pytestmark = pytest.mark.skipif(
    _backends.triton_interpreted() or _backends.unavailable("cpu", "cpu") is not None, reason="about the C++ extension"
)
# rows, depth, columns
CASES = [(1, 1, 1), (7, 5, 9), (50, 33, 40), (13, 384, 16), (200, 385, 35), (400, 1000, 64), (97, 4, 300), (700, 3000, 17)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def functions():
    return _backends.functions("cpu", "cpu", torch.float32)


def tensors(rows, depth, columns, dtype):
    return torch.randn(rows, depth).to(dtype), torch.randn(depth, columns) / depth**0.5


@pytest.mark.parametrize("out", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_oracle(isa, case, dtype, out):
    x, w = tensors(*case, dtype)
    got = functions().dense_product(x, w, out)
    assert got.dtype == out
    assert_error_bounded(got, (x.float() @ w).to(out), x.double() @ w.double(), floor=torch.finfo(out).eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides_sizes_and_dtypes(dtype):
    x, w = torch.randn(3, 24, 40).to(dtype).transpose(1, 2), torch.randn(24, 30, dtype=torch.float64)
    got = functions().dense_product(x, w.t().contiguous().t(), torch.float64)
    assert got.shape == (3, 40, 30) and got.dtype == torch.float64
    torch.testing.assert_close(got, x.double() @ w, rtol=1e-5, atol=1e-5)
    assert functions().dense_product(x[:0], w, dtype).shape == (0, 40, 30)
    assert functions().dense_product(x[..., :0], w[:0], dtype).equal(torch.zeros(3, 40, 30, dtype=dtype))


def test_does_not_depend_on_the_number_of_threads():
    x, w = tensors(301, 500, 70, torch.bfloat16)
    threads, runs = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        runs.append(functions().dense_product(x, w, torch.float32))
    torch.set_num_threads(threads)
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_spikes_get_their_gradient_this_way_where_it_pays(dtype, packed, monkeypatch):
    kind, used = type(functions()), []
    way = kind.dense_product
    monkeypatch.setattr(kind, "dense_product", lambda *args: used.append(args) or way(*args))
    s, w, dy = (torch.rand(512, 160) < 0.1).to(dtype), torch.randn(160, 256) / 16, torch.randn(512, 256)
    for isa, slow, backend, times in (
        ("avx2", True, "auto", 1), ("avx2", True, "cpu", 1), ("avx2", True, "torch", 0), ("avx2", False, "auto", 0),
        ("avx512", True, "auto", 0),
    ):  # fmt: skip
        used.clear()
        monkeypatch.setattr(kind, "isa", lambda self, isa=isa: isa)
        monkeypatch.setattr(_density, "SLOW_ON_CPU", frozenset({dtype} if slow else ()))
        leaf = s.clone().requires_grad_()
        spikes = PackedSpikes.trusted(pack_spikes(s).words, 160, leaf) if packed else leaf
        with torch.autocast("cpu", dtype):
            y = spike_matmul(spikes, w.requires_grad_(), backend=backend)
        assert y.dtype == dtype
        y.backward(dy.to(dtype))
        right = dy.to(dtype).double() @ w.detach().double().t()
        assert len(used) == times
        assert_error_bounded(leaf.grad, right.to(dtype), right, floor=torch.finfo(dtype).eps)


def test_pays_for_large_ones_of_sixteen_bits_on_avx2_alone(monkeypatch):
    monkeypatch.setattr(_density, "SLOW_ON_CPU", frozenset({torch.bfloat16, torch.float16}))
    x = torch.empty(512, 256, dtype=torch.bfloat16)
    assert fused_product_pays(x, 128, "avx2") and fused_product_pays(x.half(), 128, "avx2")
    assert not fused_product_pays(x, 127, "avx2")
    assert not fused_product_pays(x.float(), 128, "avx2")
    assert not any(fused_product_pays(x, 128, isa) for isa in ("baseline", "avx512"))
    monkeypatch.setattr(_density, "SLOW_ON_CPU", frozenset({torch.float16}))
    assert not fused_product_pays(x, 128, "avx2")
