import copy

import pytest
import torch
from torch import nn

from spikeclip import nn as snn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def model():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.Unflatten(0, (4, -1)), snn.LIF(), nn.Flatten(0, 1),
        nn.Conv2d(16, 16, 3, padding=1), nn.Unflatten(0, (4, -1)), snn.LIF(), nn.Flatten(0, 1), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16 * 64, 5),
    ).to(DEVICE)  # fmt: skip


def gradients(layers, x, inside):
    layers, x = copy.deepcopy(layers), x.clone().requires_grad_()
    with inside:
        y = layers(x)
    y.square().sum().backward()
    return [x.grad, *(p.grad for p in layers.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_are_equal_bit_for_bit(dtype, layout):
    layers = model().to(dtype)
    x = torch.randn(8, 3, 16, 16, device=DEVICE, dtype=dtype).mul(2).to(memory_format=layout)
    packing = snn.PackedSavedSpikes()
    want, got = gradients(layers, x, torch.enable_grad()), gradients(layers, x, packing)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, want, strict=True))
    spikes = 2 * 8 * 16 * 16 * 16 + 8 * 16 * 64  # into the second convolution, the pool and the linear layer
    assert packing.dense_bytes == spikes * x.element_size()
    assert packing.packed_bytes * 8 == spikes


class Saving(torch.autograd.Function):
    """Saves its input and shows what it gets back."""

    back: list = []

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sum()

    @staticmethod
    def backward(ctx, dy):
        Saving.back = list(ctx.saved_tensors)
        return torch.ones_like(Saving.back[0])


def saved(x):
    """(what comes back in the backward pass, the bytes packed for it)."""
    packing = snn.PackedSavedSpikes()
    with packing:
        y = Saving.apply(x.requires_grad_())
    y.backward()
    return Saving.back[0], packing.packed_bytes


BLOCK = (torch.arange(6 * 35 * 40, device=DEVICE) % 7 == 0).float().view(6, 35, 40)  # a move would close gaps
PACKED = {
    "contiguous": BLOCK,
    "transposed": BLOCK.permute(2, 0, 1),
    "at an offset": BLOCK[1:],
    "with sizes of one": BLOCK[:, None].transpose(1, 3),
    "odd": BLOCK.flatten()[:4099],
    "half": BLOCK.half(),
    "double": BLOCK.double(),
    "zeros": torch.zeros(5000),
    "ones": torch.ones(70, 70),
}
KEPT = {
    "small": BLOCK[:, :5],
    "with gaps": BLOCK[:, :, ::2],
    "expanded": torch.ones(1, 1, device=DEVICE).expand(100, 100),
    "numbers": torch.rand(5000),
    "one other value": torch.ones(5000).index_fill(0, torch.tensor([4321]), 0.5),
    "nan": torch.zeros(5000).index_fill(0, torch.tensor([4321]), torch.nan),
    "minus one": -torch.ones(5000),
}


@pytest.mark.parametrize("name", PACKED)
def test_spikes_come_back_as_they_were(name):
    x = PACKED[name].to(DEVICE).detach()
    back, count = saved(x)
    assert torch.equal(back, x) and back.dtype == x.dtype and back.stride() == x.stride()
    assert count == 4 * -(-x.numel() // 32)


@pytest.mark.parametrize("name", KEPT)
def test_everything_else_is_kept_as_it_is(name):
    x = KEPT[name].to(DEVICE).detach()
    back, count = saved(x)
    assert count == 0 and back.data_ptr() == x.data_ptr() and back.stride() == x.stride()


def test_a_kept_tensor_changed_in_place_is_an_error_and_a_packed_one_is_safe():
    x = torch.randn(100, 100, device=DEVICE, requires_grad=True)
    with snn.PackedSavedSpikes():
        y = x.exp()
        z = y * y
    with torch.no_grad():
        y.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()
    spikes = PACKED["contiguous"].to(DEVICE).detach().clone()
    linear = nn.Linear(40, 3, device=DEVICE)
    linear(spikes).sum().backward()
    want = linear.weight.grad.clone()
    linear.zero_grad()
    with snn.PackedSavedSpikes():
        y = linear(spikes)
    spikes.zero_()
    y.sum().backward()
    assert torch.equal(linear.weight.grad, want)


def test_second_derivatives_and_nesting():
    x = (torch.rand(80, 64, device=DEVICE) < 0.3).float()
    linear = nn.Linear(64, 64, device=DEVICE)

    def norm(inside):
        linear.zero_grad()
        s = x.clone().requires_grad_()
        with inside, inside:
            y = linear(s).tanh().sum()
        (grad,) = torch.autograd.grad(y, s, create_graph=True)
        grad.square().sum().backward()
        return linear.weight.grad.clone()

    assert torch.equal(norm(snn.PackedSavedSpikes()), norm(torch.enable_grad()))


def test_outside_nothing_changes():
    packing = snn.PackedSavedSpikes()
    with packing:
        pass
    Saving.apply(PACKED["contiguous"].to(DEVICE).detach().requires_grad_()).backward()
    assert packing.dense_bytes == packing.packed_bytes == 0


def test_no_graph_is_kept_alive():
    import gc
    import weakref

    gc.disable()
    try:
        x = torch.randn(64, 64, device=DEVICE, requires_grad=True)
        with snn.PackedSavedSpikes():
            y = x.exp()
        gone = weakref.ref(y)
        del y
        assert gone() is None
    finally:
        gc.enable()
