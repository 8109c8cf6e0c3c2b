import copy
import io

import pytest
import torch
from compare import assert_error_bounded
from torch import nn

from spikeclip import nn as snn
from spikeclip.ops import _backends, pack_spikes
from spikeclip.ops.spike_product import again

FLOOR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def spikes(*shape, dtype=torch.float32, density=0.2):
    return (torch.rand(*shape) < density).to(DEVICE, dtype)


def pair(bias=True, dtype=torch.float32):
    """torch's layer and ours with its weights."""
    plain = nn.Linear(70, 33, bias=bias, device=DEVICE, dtype=dtype)
    ours = snn.SpikeLinear(70, 33, bias=bias, device=DEVICE, dtype=dtype)
    ours.load_state_dict(plain.state_dict())
    return plain, ours


def run(layer, x, seed):
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(seed.to(y.dtype))
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("dtype", FLOOR, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(), (9,), (4, 3, 5)], ids=str)
def test_numbers_and_gradients_are_torchs(dtype, bias, leading):
    plain, ours = pair(bias, dtype)
    x, seed = spikes(*leading, 70, dtype=dtype), torch.randn(*leading, 33, device=DEVICE)
    want = run(copy.deepcopy(plain).double(), x.double(), seed.double())
    for got, reference, oracle in zip(run(ours, x, seed), run(plain, x, seed), want, strict=True):
        assert got.dtype == dtype and got.shape == oracle.shape
        assert_error_bounded(got, reference, oracle, floor=FLOOR[dtype])
    with torch.no_grad():
        assert ours(x).dtype == dtype
        assert_error_bounded(ours(x), plain(x), want[0], floor=FLOOR[dtype])


def test_float64_stays_float64():
    plain, ours = pair(dtype=torch.float64)
    x = spikes(6, 70, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-13, atol=1e-13)


def test_constructor_and_state_dict_are_torchs():
    ours = snn.SpikeLinear(5, 3, False, None, torch.bfloat16, backend="torch")
    assert isinstance(ours, nn.Linear) and ours.bias is None and ours.weight.dtype == torch.bfloat16
    assert "backend='torch'" in repr(ours) and repr(snn.SpikeLinear(5, 3)).endswith("bias=True)")
    plain, ours = pair()
    with torch.no_grad():
        ours(spikes(5, 70))
        ours.weight.add_(1.0)
    plain.load_state_dict(ours.state_dict())
    assert torch.equal(plain.weight, ours.weight) and list(plain.state_dict()) == list(ours.state_dict())


def test_packed_spikes():
    plain, ours = pair()
    x, seed = spikes(4, 5, 70), torch.randn(4, 5, 33, device=DEVICE)
    torch.testing.assert_close(ours(pack_spikes(x)), plain(x), rtol=1e-5, atol=1e-5)
    ours(pack_spikes(x)).backward(seed)
    plain(x).backward(seed)
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(ours(pack_spikes(x)), plain(x), rtol=1e-5, atol=1e-5)


CHANGES = {
    "optimizer": lambda layer: torch.optim.SGD(layer.parameters(), 0.5).step(),
    "fused optimizer": lambda layer: torch.optim.AdamW(layer.parameters(), 0.5, fused=True).step(),
    "load_state_dict": lambda layer: layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()}),
    "assign": lambda layer: layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()}, assign=True),
    "init": lambda layer: nn.init.normal_(layer.weight),
    "view": lambda layer: layer.weight.detach()[0].add_(1.0),
    "half": lambda layer: layer.half(),
    "double": lambda layer: layer.double(),
    "new parameter": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight + 1)),
    "new data": lambda layer: setattr(layer.weight, "data", layer.weight.data + 1),
    "through .data, then eval()": lambda layer: (layer.weight.data.add_(1.0), layer.eval()),
    "inference mode": lambda layer: torch.inference_mode()(layer.weight.add_)(1.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_kept_weights_are_remade_when_they_change(change):
    plain, ours = pair()
    x = spikes(5, 70)
    for p in ours.parameters():
        p.grad = torch.randn_like(p)
    with torch.no_grad():
        before = ours(x)
        CHANGES[change](ours)
        plain.to(ours.weight.dtype).load_state_dict(ours.state_dict())
        x = x.to(ours.weight.dtype)
        assert (ours(x) - before).abs().max() > (0 if change in ("half", "double") else 0.1)
        torch.testing.assert_close(ours(x), plain(x))


@pytest.mark.skipif(DEVICE != "cpu" or _backends.unavailable("cpu", "cpu") is not None, reason="the CPU kernel's layout")
def test_weights_are_laid_out_once_in_inference_and_not_kept_in_training(monkeypatch):
    from spikeclip.ops._native_cpu import NativeCpu

    tile, made = NativeCpu.tile, []
    monkeypatch.setattr(NativeCpu, "tile", lambda self, w: made.append(w.shape) or tile(self, w))
    _, ours = pair()
    x = spikes(5, 70)
    with torch.no_grad():
        ours(x), ours(x), ours(pack_spikes(x))
    with torch.inference_mode():
        ours(x)
    assert len(made) == 1
    ours.requires_grad_(False)
    ours(x)
    assert len(made) == 1
    ours.requires_grad_(True)
    ours(x)
    assert ours._prepared is None


def test_frozen_weights_kept_from_inference_mode_pass_gradients_on():
    for dtype in (torch.float32, torch.bfloat16):
        _, ours = pair(dtype=dtype)
        ours.requires_grad_(False)
        x = spikes(5, 70, dtype=dtype).requires_grad_()
        with torch.inference_mode():
            ours(x)
        ours(x).sum().backward()
        torch.testing.assert_close(x.grad, ours.weight.sum(0).expand(5, 70), rtol=1e-2, atol=1e-2)


def test_a_layer_made_in_inference_mode():
    with torch.inference_mode():
        plain, ours = pair()
        x = spikes(5, 70)
        ours(x), ours.weight.add_(1.0), plain.weight.add_(1.0)
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["deepcopy", "save"])
def test_copies_are_independent_and_hold_no_layout(how):
    plain, ours = pair()
    x = spikes(5, 70)
    with torch.no_grad():
        ours(x)
        if how == "deepcopy":
            other = copy.deepcopy(ours)
        else:
            file = io.BytesIO()
            torch.save(ours, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        assert "_prepared" not in vars(other)
        ours.weight.zero_()
        torch.testing.assert_close(other(x), plain(x), rtol=1e-5, atol=1e-5)
        other.weight.mul_(2.0)
        torch.testing.assert_close(other(x), x @ (2 * plain.weight.t()) + plain.bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", FLOOR, ids=str)
def test_autocast_answers_in_its_dtype(grad, dtype):
    plain, ours = pair(dtype=dtype)
    x = spikes(6, 70, dtype=dtype)
    with torch.set_grad_enabled(grad), torch.autocast(DEVICE, torch.bfloat16):
        got, reference = ours(x), plain(x)
    assert got.dtype == reference.dtype == torch.bfloat16
    assert_error_bounded(got, reference, plain.double()(x.double()), floor=8e-3)


def test_compiles_into_one_graph():
    layers = nn.Sequential(pair()[1], snn.LIF(), snn.SpikeLinear(33, 7, device=DEVICE))
    x = spikes(4, 6, 70, density=0.4)
    compiled = torch.compile(layers, fullgraph=True)
    want, got = (run(model, x, torch.ones(4, 6, 7, device=DEVICE)) for model in (copy.deepcopy(layers), compiled))
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layers(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(3, 69), ValueError, "s must have K = 70 spikes in its last dimension.*got 69"),
        (torch.zeros(()), ValueError, "s must have at least one dimension"),
        (torch.zeros(3, 70, dtype=torch.int64), ValueError, "s must be one of float32, .*bool, uint8; got torch.int64"),
        ([0.0] * 70, TypeError, "s must be a torch.Tensor or PackedSpikes; got list"),
    ],
)
def test_bad_input_names_the_argument(x, error, message):
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
            snn.SpikeLinear(70, 33)(x)


@pytest.mark.skipif(DEVICE != "cpu", reason="values are looked at on the CPU")
def test_values_that_are_no_spikes_are_refused():
    with torch.no_grad(), pytest.raises(ValueError, match="s must hold spikes, 0 or 1"):
        snn.SpikeLinear(70, 33)(spikes(9, 70) * 0.5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_what_an_answer_was_made_of_makes_it_again(bias, backend):
    layer = snn.SpikeLinear(40, 24, bias, backend=backend)
    y, product = layer(pack_spikes(spikes(3, 5, 40)), with_product=True)
    assert product.shape == y.shape and product.options[-1] == backend
    assert torch.equal(again(product.tensors, product.options), y)


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend must be one of auto, cpu.*got 'cupy'"):
        snn.SpikeLinear(4, 3, backend="cupy")(torch.zeros(1, 4))


@pytest.mark.parametrize("packed", [True, False])
def test_linear_norm(packed):
    ours = snn.LinearNorm(70, 33, bias=True)
    assert list(dict(ours.named_parameters())) == ["linear.weight", "linear.bias", "norm.weight", "norm.bias"]
    norm, x = copy.deepcopy(ours.norm), spikes(4, 3, 5, 70).cpu()
    want = norm((x @ ours.linear.weight.t() + ours.linear.bias).flatten(0, 2)).view(4, 3, 5, 33)
    torch.testing.assert_close(ours(pack_spikes(x) if packed else x), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.norm.running_var, norm.running_var)


def test_a_parametrised_weight_is_computed_once_a_call():
    plain, ours = pair()
    for layer in (plain, ours):
        torch.manual_seed(4)
        nn.utils.parametrizations.spectral_norm(layer)
    x = spikes(32, 70)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.parametrizations.weight[0]._u, plain.parametrizations.weight[0]._u)


def test_weights_in_shared_memory_are_read_anew():
    ours = snn.SpikeLinear(70, 33).share_memory()
    x = spikes(9, 70).cpu()
    with torch.no_grad():
        ours(x)
        ours.weight.detach().numpy()[...] = 1.0
        torch.testing.assert_close(ours(x), nn.functional.linear(x, ours.weight, ours.bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0)])
def test_empty_weights_in_inference(sizes):
    layer = snn.SpikeLinear(*sizes)
    with torch.no_grad():
        y = layer(torch.zeros(2, sizes[0]))
    assert torch.equal(y, nn.functional.linear(torch.zeros(2, sizes[0]), layer.weight, layer.bias))


def test_bad_construction_and_shapes():
    with pytest.raises(ValueError, match="backend must be one of auto"):
        snn.SpikeLinear(8, 4, backend="gpu")
    with pytest.raises(ValueError, match=r"spikes must have shape \[T, ..., C\] with leading dimensions; got \[8\]"):
        snn.LinearNorm(8, 4)(torch.zeros(8))
