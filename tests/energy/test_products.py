"""Every kind of product, counted by hand."""

import pytest
import torch
import torch.nn.functional as F
from by_hand import Run, met, spikes

from spikeclip.energy import profile
from spikeclip.ops import pack_spikes, spike_attention


def holes(*shape):
    """Weights of which some are 0."""
    return torch.randn(shape) * spikes(*shape, rate=0.8)


MATMULS = {
    "mm": lambda x, w: x @ w,
    "linear": lambda x, w: F.linear(x, w.t(), torch.ones(w.shape[1])),
    "einsum": lambda x, w: torch.einsum("bk,kn->bn", x, w),
    "mv": lambda x, w: x @ w[:, 0],
    "addmm": lambda x, w: torch.addmm(torch.ones(w.shape[1]), x, w),
}


@pytest.mark.parametrize("name", MATMULS)
def test_products_with_weights_by_hand(name):
    torch.manual_seed(0)
    x, w = spikes(6, 20), holes(20, 7)
    seen = profile(Run(MATMULS[name], w), x, T=1)
    (product,) = seen.products
    columns = 1 if name == "mv" else 7
    assert product.effective_acs * 6 == met(torch.matmul, x, w[:, :columns]) > 0 and product.effective_macs == 0
    assert product.dense_macs == product.padded_macs == 20 * columns and product.weights == 20 * columns
    assert product.rate == pytest.approx(x.mean().item()) and product.operands == "spikes x weights"
    assert seen.samples == 6 and not seen.partial


CONVOLUTIONS = {
    "1d": (F.conv1d, (4, 11), (6, 4, 3), {"padding": 1, "stride": 2}),
    "2d": (F.conv2d, (4, 9, 8), (6, 4, 3, 3), {"padding": 1}),
    "2d, strides": (F.conv2d, (4, 9, 8), (6, 4, 3, 2), {"padding": (2, 1), "stride": (1, 3)}),
    "2d, groups and dilation": (F.conv2d, (4, 9, 8), (6, 2, 3, 3), {"padding": 2, "dilation": 2, "groups": 2}),
    "depthwise": (F.conv2d, (4, 9, 8), (4, 1, 3, 3), {"padding": 1, "groups": 4}),
    "3d": (F.conv3d, (2, 4, 5, 6), (3, 2, 2, 3, 3), {"padding": 1}),
    "transposed": (F.conv_transpose2d, (4, 5, 6), (4, 3, 3, 3), {"padding": 1, "stride": 2, "output_padding": 1}),
    "transposed, groups": (F.conv_transpose2d, (4, 5, 6), (4, 3, 3, 3), {"stride": 2, "groups": 2}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("zeros", [False, True], ids=["full", "holes"])
def test_convolutions_by_hand(name, zeros):
    torch.manual_seed(0)
    function, shape, weight, options = CONVOLUTIONS[name]
    x, w = spikes(3, *shape), holes(*weight) if zeros else torch.randn(weight)
    (product,) = profile(Run(lambda x, w: function(x, w, **options), w), x, T=1).products
    assert product.effective_acs * 3 == met(function, x, w, **options) > 0
    assert product.dense_macs * 3 == met(function, torch.ones_like(x), torch.ones_like(w), **options)
    taps = w[0].numel() * (x.numel() if "transposed" in name else function(x, w, **options).numel())
    assert product.padded_macs * 3 == taps


def test_analog_operands_are_multiply_accumulates():
    torch.manual_seed(0)
    x, w = torch.randn(5, 8) * spikes(5, 8), holes(8, 3)
    seen = profile(Run(MATMULS["mm"], w), x, T=1)
    assert seen.macs.mean * 5 == met(torch.matmul, x, w) > 0 and seen.acs.mean == 0
    assert seen.products[0].operands == "analog x weights" and seen.analog_macs == seen.dense_macs == 24


def test_signed_spikes_are_accumulated_and_counts_are_not_spikes():
    w = torch.ones(8, 3)
    signed = torch.tensor([[-1.0, 0, 1, 0, 0, 0, 0, 1]])
    assert profile(Run(MATMULS["mm"], w), signed, T=1).acs.mean == 9
    seen = profile(Run(MATMULS["mm"], w), 2 * signed, T=1)
    assert seen.acs.mean == 0 and seen.macs.mean == 9 and seen.products[0].operands == "integers x weights"


@pytest.mark.parametrize("order", ["scores", "values"])
def test_attention_in_the_order_that_runs(order):
    torch.manual_seed(0)
    T, B, heads, N, d = 2, 3, 4, 6, 5
    q, k, v = (spikes(T, B, heads, N, d) for _ in range(3))

    def attend(x):
        q, k, v = x.unbind(-1)
        return (q @ k.mT) @ v if order == "scores" else q @ (k.mT @ v)

    seen = profile(Run(attend), torch.stack([q, k, v], -1), T=T, batch_dim=1)
    first, second = seen.products
    assert first.operands == "spikes x spikes" and second.operands == "spikes x integers"
    inner = (q @ k.mT) if order == "scores" else k.mT @ v
    assert first.effective_acs * B == (met(torch.matmul, q, k.mT) if order == "scores" else met(torch.matmul, k.mT, v))
    assert second.effective_acs * B == (met(torch.matmul, inner, v) if order == "scores" else met(torch.matmul, q, inner))
    assert first.dense_macs == T * heads * N * d * (N if order == "scores" else d)
    assert first.runs == second.runs == T and first.weights == 0


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("d", [5, 8])
def test_fused_attention_is_counted_as_its_two_products(packed, together, d):
    torch.manual_seed(0)
    T, B, heads, N = 2, 3, 4, 6
    q, k, v = (spikes(T, B, N, heads * d) for _ in range(3))

    def attend(x):
        parts = [torch.cat(x.unbind(-1), -1)] if together else x.unbind(-1)
        parts = [pack_spikes(s) for s in parts] if packed else parts
        return spike_attention(*parts, scale=1.0, num_heads=heads)

    first, second = profile(Run(attend), torch.stack([q, k, v], -1), T=T, batch_dim=1).products
    q, k, v = (s.unflatten(-1, (heads, d)).transpose(2, 3) for s in (q, k, v))
    assert first.effective_acs * B == met(torch.matmul, k.mT, v)
    assert second.effective_acs * B == met(torch.matmul, q, k.mT @ v)
    assert (first.operands, second.operands) == ("spikes x spikes", "spikes x integers")
    assert first.dense_macs == second.dense_macs == T * heads * N * d * d


def test_softmax_attention_counts_dense():
    x = torch.randn(2, 4, 6, 5)
    (product,) = profile(Run(lambda x: F.scaled_dot_product_attention(x, x, x)), x, T=1).products
    assert product.dense_macs == product.effective_macs == 4 * 6 * 6 * 5 * 2
