import copy

import pytest
import torch
from compare import assert_error_bounded
from torch import nn

from spikeclip import nn as snn
from spikeclip.ops import PackedSpikes, lif, pack_spikes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEURON = {"tau": 3.0, "v_threshold": 0.3, "surrogate_function": "atan", "detach_reset": True}
MAKE = {
    "spikformer": lambda **options: snn.SpikingSelfAttention(24, 3, **options),
    "token": lambda **options: snn.QKAttention(24, 3, mode="token", **options),
    "channel": lambda **options: snn.QKAttention(24, 3, mode="channel", **options),
}
BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def make(kind, dtype=torch.float32, **options):
    layer = MAKE[kind](**{**NEURON, **options}).to(DEVICE, dtype)
    for module in layer.modules():
        if isinstance(module, (nn.BatchNorm1d, snn.BNLIF)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.uniform_(module.running_var, 0.05, 0.3)
    return layer


def spikes(*shape, dtype=torch.float32):
    return (torch.rand(*(shape or (4, 2, 7, 24))) < 0.3).to(DEVICE, dtype)


def batch_norm(norm, y):
    if norm.training:
        norm.num_batches_tracked += 1
    statistics = (norm.running_mean, norm.running_var)
    return nn.functional.batch_norm(y, *statistics, norm.weight, norm.bias, norm.training, norm.momentum, norm.eps)


def plain(layer, kind, x, scale=None):
    """What the papers say, written with torch's products and explicit heads ``[T, B, heads, N, C / heads]``."""

    def current(part, s):
        y = s @ part.linear.weight.t() + (0 if part.linear.bias is None else part.linear.bias)
        return batch_norm(part.norm, y.flatten(0, -2)).view_as(y)

    def heads(part, neuron):
        options = {"tau": neuron.tau, "v_threshold": neuron.v_threshold, "surrogate": neuron.surrogate}
        s, _ = lif(current(part, x), detach_reset=True, **options)
        return [third.unflatten(-1, (3, 8)).transpose(2, 3) for third in s.split(24, -1)]

    if kind == "spikformer":
        q, k, v = heads(layer.qkv, layer.qkv.norm)
        fired = layer.attention_lif((q @ k.mT @ v * (scale or 0.125)).transpose(2, 3).flatten(3)).unpack(x.dtype)
    else:
        (q,), (k,) = heads(layer.q, layer.q_lif), heads(layer.k, layer.k_lif)
        mask = layer.attention_lif(q.sum(-1 if kind == "token" else -2, keepdim=True) * (scale or 1.0))
        assert 0.05 < mask.mean() < 0.95
        fired = (mask * k).transpose(2, 3).flatten(3)
    return fired, current(layer.project, fired)


def gradients(function, layer, x, seed):
    x = x.clone().requires_grad_()
    y = function(x)
    y.backward(seed.to(y.dtype))
    grads = [y.detach(), x.grad, *(p.grad for p in layer.parameters())]
    layer.zero_grad()
    return grads


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("training", [True, False])
def test_currents_and_gradients_are_the_papers(kind, training):
    threshold = {"spikformer": 0.5, "token": 1.2, "channel": 0.9}[kind]
    layer = make(kind, attention_v_threshold=threshold).train(training)
    x, seed = spikes(), torch.randn(4, 2, 7, 24, device=DEVICE)
    reference = copy.deepcopy(layer)
    got = gradients(layer, layer, x, seed)
    want = gradients(lambda s: plain(reference, kind, s)[1], reference, x, seed)
    assert got[0].shape == (4, 2, 7, 24) and got[0].std() > 0.1
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(layer.state_dict(), reference.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", MAKE)
def test_half_precision_is_bounded_by_torchs(kind):
    layer = make(kind, torch.bfloat16).eval()
    x = spikes(dtype=torch.bfloat16)
    seen = {}
    layer.project.register_forward_pre_hook(lambda _, args: seen.update(fired=args[0]))
    with torch.no_grad():
        got, fired = layer(x), seen["fired"]
        fired = fired.unpack(x.dtype) if isinstance(fired, PackedSpikes) else fired
        agree = (fired == plain(layer, kind, x)[0]).float().mean()
        exact = copy.deepcopy(layer.project).double()
        want = exact.norm((fired.double() @ exact.linear.weight.t() + exact.linear.bias).flatten(0, 2)).view_as(fired)
        reference = layer.project.norm((fired @ layer.project.linear.weight.t() + layer.project.linear.bias).flatten(0, 2))
    assert got.dtype == fired.dtype == torch.bfloat16 and agree > 0.95
    assert_error_bounded(got, reference.view_as(fired), want, floor=8e-3)


def test_many_tokens_are_counted_exactly_in_bfloat16():
    layer = make("channel", attention_v_threshold=0.999 * 801 / 2, tau=2.0)
    counted = []
    layer.attention_lif.register_forward_pre_hook(lambda _, args: counted.append(args[0]))
    x = torch.ones(1, 1, 801, 24, device=DEVICE)
    layer.q_lif = layer.k_lif = nn.Identity()
    layer.q = layer.k = nn.Identity()
    layer(x.bfloat16()) if DEVICE == "cuda" else layer.bfloat16()(x.bfloat16())
    assert counted[0].unique().tolist() == [801.0]


@pytest.mark.parametrize("kind", MAKE)
def test_scale_bias_and_neuron_options_reach_their_places(kind):
    layer = make(kind, scale=0.7, qkv_bias=True, attention_v_threshold=0.8, backend="torch").eval()
    first = layer.qkv if kind == "spikformer" else layer.q
    assert first.linear.bias is not None and layer.project.linear.bias is not None
    neurons = {name: m for name, m in layer.named_modules() if isinstance(m, (snn.LIF, snn.BNLIF))}
    assert {m.tau for m in neurons.values()} == {3.0} and {m.surrogate for m in neurons.values()} == {"atan"}
    assert {name: m.v_threshold for name, m in neurons.items() if m.v_threshold != 0.3} == {"attention_lif": 0.8}
    assert {m.backend for m in layer.modules() if hasattr(m, "backend")} == {"torch"}
    x = spikes()
    torch.testing.assert_close(layer(x), plain(layer, kind, x, scale=0.7)[1], rtol=1e-4, atol=1e-4)
    without = MAKE[kind]()
    assert (without.qkv if kind == "spikformer" else without.q).linear.bias is None
    assert "num_heads=3" in repr(layer)


def test_state_dict_names_are_those_of_checkpoints():
    for kind, parts in (("spikformer", ("qkv", "project")), ("token", ("q", "k", "project"))):
        norms = [f"{part}.norm.{name}" for part in parts for name in BATCH_NORM]
        weights = [f"{part}.linear.weight" for part in parts]
        assert set(make(kind).state_dict()) == {*norms, *weights, "project.linear.bias"}


@pytest.mark.parametrize("kind", MAKE)
def test_packed_spikes_copies_and_autocast(kind):
    layer = make(kind).eval()
    x = spikes()
    torch.testing.assert_close(layer(pack_spikes(x)), layer(x), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x), rtol=1e-4, atol=1e-4)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), torch.autocast(DEVICE, torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16 and torch.isfinite(y).all()
        torch.testing.assert_close(y.mean(), layer(x).mean().bfloat16(), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kind", MAKE)
def test_compiles_into_one_graph(kind):
    layer = make(kind)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    x, seed = spikes(), torch.randn(4, 2, 7, 24, device=DEVICE)
    got, want = gradients(compiled, compiled, x, seed), gradients(layer, layer, x, seed)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda kind: type(MAKE[kind]())(0, 1), ValueError, "dim must be an integer >= 1; got 0"),
        (lambda kind: type(MAKE[kind]())(24, 5), ValueError, "num_heads must be an integer that divides dim = 24; got 5"),
        (lambda kind: type(MAKE[kind]())(24, 3, scale=float("nan")), ValueError, "scale must be a finite number; got nan"),
        (lambda kind: MAKE[kind](tau=0.5), ValueError, "tau must be a finite number > 1"),
        (lambda kind: MAKE[kind](taw=2.0), TypeError, "taw"),
        (lambda kind: MAKE[kind]()(torch.zeros(2, 7, 24)), ValueError, r"spikes must have shape \[T, B, N, 24\]; got \[2, 7"),
        (lambda kind: MAKE[kind]()(torch.zeros(1, 2, 7, 23)), ValueError, r"spikes must have shape .*got \[1, 2, 7, 23\]"),
        (lambda kind: MAKE[kind]()(None), TypeError, "spikes must be a torch.Tensor or PackedSpikes; got NoneType"),
    ],
)
def test_bad_input_names_the_argument(kind, call, error, message):
    with pytest.raises(error, match=message):
        call(kind)


def test_unknown_mode():
    with pytest.raises(ValueError, match="mode must be 'token' or 'channel'; got 'head'"):
        snn.QKAttention(24, 3, mode="head")
