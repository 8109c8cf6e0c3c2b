"""The gradient of the spikes of large 3x3 convolutions, which the C++ extension makes by Winograd's F(4x4, 3x3)."""

import pytest
import torch
from compare import assert_error_bounded

from spikeclip.ops import PackedSpikes, _backends, pack_spikes, spike_conv2d
from spikeclip.ops._dense import winograd_pays

pytestmark = pytest.mark.skipif(
    _backends.triton_interpreted() or _backends.unavailable("cpu", "cpu") is not None, reason="about the C++ extension"
)
# batch, channels, outputs, height, width, padding
CASES = [
    (1, 1, 1, 1, 1, (1, 1)),
    (2, 5, 7, 9, 6, (1, 1)),
    (1, 33, 20, 5, 4, (0, 0)),
    (3, 16, 32, 1, 3, (1, 2)),
    (2, 48, 40, 8, 7, (2, 0)),
    (15, 32, 16, 8, 8, (1, 1)),
    (130, 17, 31, 4, 3, (1, 1)),
    (2, 384, 384, 8, 8, (1, 1)),
    (8, 64, 16, 24, 24, (1, 1)),
]


def tensors(batch, channels, outputs, height, width, padding):
    dy = torch.randn(batch, outputs, height + 2 * padding[0] - 2, width + 2 * padding[1] - 2)
    return torch.randn(outputs, channels, 3, 3) / (9 * outputs) ** 0.5, dy


def of_torch(w, dy, size, padding):
    return torch.nn.grad.conv2d_input((len(dy), w.shape[1], *size), w, dy, padding=padding)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_oracle(isa, case):
    *_, height, width, padding = case
    w, dy = tensors(*case)
    got = _backends.functions("cpu", "cpu", torch.float32).conv3x3_gradient(w, dy, (height, width), padding)
    plain, want = of_torch(w, dy, (height, width), padding), of_torch(w.double(), dy.double(), (height, width), padding)
    assert got.shape == want.shape and got.is_contiguous(memory_format=torch.channels_last)
    assert_error_bounded(got, plain, want, factor=12.0, floor=1e-6)
    assert (got - want).square().mean().sqrt() < 3e-6 * want.square().mean().sqrt()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_are_rounded_once(isa, case, dtype):
    *_, height, width, padding = case
    w, dy = tensors(*case)
    dy = dy.to(dtype)
    got = _backends.functions("cpu", "cpu", torch.float32).conv3x3_gradient(w, dy, (height, width), padding)
    want = of_torch(w.double(), dy.double(), (height, width), padding)
    assert got.dtype == dtype and got.is_contiguous(memory_format=torch.channels_last)
    assert_error_bounded(got, want.to(dtype), want, factor=1.1, floor=1e-5)


@pytest.mark.parametrize("case", CASES[4:7], ids=str)
def test_does_not_depend_on_the_number_of_threads(case):
    *_, height, width, padding = case
    w, dy = tensors(*case)
    functions, threads, runs = _backends.functions("cpu", "cpu", torch.float32), torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        runs.append(functions.conv3x3_gradient(w, dy, (height, width), padding))
    torch.set_num_threads(threads)
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_spikes_get_their_gradient_this_way_where_it_pays(packed, monkeypatch):
    s, w = (torch.rand(4, 32, 24, 24) < 0.1).float(), (torch.randn(48, 32, 3, 3) / 20).requires_grad_()
    dy, used = torch.randn(4, 48, 24, 24), []
    kind = type(_backends.functions("cpu", "cpu", torch.float32))
    way = kind.conv3x3_gradient
    monkeypatch.setattr(kind, "conv3x3_gradient", lambda *args: used.append(args) or way(*args))
    for backend, times in (("auto", 1), ("cpu", 1), ("torch", 0)):
        used.clear()
        leaf = s.clone().requires_grad_()
        spikes = leaf
        if packed:
            last = leaf.permute(0, 2, 3, 1)
            spikes = PackedSpikes.trusted(pack_spikes(last.detach()).words, 32, last)
        spike_conv2d(spikes, w, padding=1, backend=backend).backward(dy)
        plain, want = of_torch(w.detach(), dy, (24, 24), 1), of_torch(w.detach().double(), dy.double(), (24, 24), 1)
        assert len(used) == times
        assert_error_bounded(leaf.grad, plain, want, factor=12.0, floor=1e-6)


def test_pays_for_large_ones_of_its_kind_alone():
    w, dy = torch.empty(64, 64, 3, 3, device="meta"), torch.empty(8, 64, 16, 16, device="meta")
    assert winograd_pays(w, dy, (16, 16), (1, 1), (1, 1))
    assert not winograd_pays(w, dy[:7], (16, 16), (1, 1), (1, 1))
    assert not winograd_pays(w, dy.repeat(10, 1, 1, 1), (5, 5), (1, 1), (1, 1))
    assert not winograd_pays(w[:, :31], dy, (16, 16), (1, 1), (1, 1))
    assert not winograd_pays(w, dy.bfloat16(), (16, 16), (1, 1), (1, 1))
    assert not winograd_pays(w, dy, (31, 31), (2, 2), (1, 1))
    assert not winograd_pays(w, dy, (12, 12), (1, 1), (3, 3))
    assert not winograd_pays(w[..., :1], dy, (16, 16), (1, 1), (1, 0))


def test_the_gradients_op():
    op = torch.ops.spikeclip.spike_conv2d_ds.default
    torch.library.opcheck(op, (torch.randn(32, 33, 1, 1), torch.randn(2, 32, 6, 6), [6, 6], [1, 1], [0, 0], "auto"))
    for batch in (2, 8):
        w, dy = torch.randn(32, 33, 3, 3), torch.randn(batch, 32, 16, 16)
        torch.library.opcheck(op, (w, dy, [16, 16], [1, 1], [1, 1], "auto"))
        leaf = dy.clone().requires_grad_()
        with pytest.raises(RuntimeError, match="no second derivative"):
            op(w, leaf, [16, 16], [1, 1], [1, 1], "auto").sum().backward()
