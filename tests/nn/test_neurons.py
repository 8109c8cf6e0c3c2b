import math

import oracle
import pytest
import torch

import spikeclip
from spikeclip import nn as snn

SURROGATES = {
    "sigmoid": "Sigmoid",
    "atan": "ATan",
    "piecewise_quadratic": "PiecewiseQuadratic",
    "piecewise_exp": "PiecewiseExp",
    "soft_sign": "SoftSign",
    "super_spike": "SuperSpike",
    "erf": "Erf",
}


def gradients(module, x, seed):
    x = x.clone().requires_grad_()
    spikes = module(x)
    spikes.backward(seed)
    return [spikes.detach(), x.grad, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("v_reset", [0.0, -0.3, None])
@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize("decay_input", [False, True])
def test_lif_and_plif_equal_spikingjelly(name, v_reset, detach_reset, decay_input):
    pytest.importorskip("spikingjelly", reason="spikingjelly is not installed (the bench extra has it)")
    from spikingjelly.activation_based import neuron, surrogate

    options = {"decay_input": decay_input, "v_threshold": 0.8, "v_reset": v_reset, "detach_reset": detach_reset}
    function = getattr(surrogate, SURROGATES[name])()
    x, seed = torch.randn(6, 3, 50) * 1.5 + 0.3, torch.randn(6, 3, 50)
    pairs = [
        (
            snn.LIF(2.5, surrogate_function=function, **options),
            neuron.LIFNode(2.5, surrogate_function=function, step_mode="m", **options),
        ),
        (
            snn.PLIF(1.7, surrogate_function=name, **options),
            neuron.ParametricLIFNode(1.7, surrogate_function=function, step_mode="m", **options),
        ),
    ]  # fmt: skip
    for ours, theirs in pairs:
        got, want = gradients(ours, x, seed), gradients(theirs, x, seed)
        assert torch.equal(got[0], want[0]) and 0.05 < got[0].mean() < 0.95
        for mine, peer in zip(got[1:], want[1:], strict=True):
            torch.testing.assert_close(mine, peer, rtol=2e-4, atol=2e-5)


def test_defaults_are_spikingjellys():
    pytest.importorskip("spikingjelly", reason="spikingjelly is not installed (the bench extra has it)")
    from spikingjelly.activation_based import neuron

    x, seed = torch.randn(4, 200) + 0.5, torch.randn(4, 200)
    for ours, theirs in (
        (snn.LIF(), neuron.LIFNode(step_mode="m")),
        (snn.IF(), neuron.IFNode(step_mode="m")),
        (snn.PLIF(), neuron.ParametricLIFNode(step_mode="m")),
    ):
        got, want = gradients(ours, x, seed), gradients(theirs, x, seed)
        assert torch.equal(got[0], want[0])
        torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-5)


def test_plif_state_dict_is_spikingjellys():
    plif = snn.PLIF(init_tau=4.0)
    assert list(plif.state_dict()) == ["w"]
    assert math.isclose(1 / torch.sigmoid(plif.w).item(), 4.0, rel_tol=1e-6)


def test_plif_learns_its_time_constant_as_the_oracle_says():
    plif = snn.PLIF(init_tau=3.0)
    x = torch.randn(5, 40) + 0.5
    plif(x).sum().backward()
    w = plif.w.detach().double().requires_grad_()
    spikes, *_ = oracle.lif(x.double(), torch.zeros(40).double(), 1 / w.sigmoid(), 1.0, 0.0, True, False, "sigmoid", 4.0)
    spikes.sum().backward()
    torch.testing.assert_close(plif.w.grad.double(), w.grad, rtol=1e-4, atol=1e-6)


def test_neurons_have_no_memory_unless_asked():
    x = torch.full((3, 5), 0.7)
    lif, keeping = snn.LIF(), snn.LIF(stateful=True)
    assert torch.equal(lif(x), lif(x)) and lif.v is None
    whole = lif(torch.cat([x, x]))
    assert torch.equal(torch.cat([keeping(x), keeping(x)]), whole)
    keeping.reset()
    assert torch.equal(keeping(x), whole[:3])


def test_detach_cuts_the_history_of_a_stateful_neuron():
    lif = snn.LIF(stateful=True)
    x = torch.randn(2, 4, requires_grad=True)
    lif(x)
    assert lif.v.requires_grad
    lif.detach()
    assert lif.v is not None and not lif.v.requires_grad


def test_a_plain_model_with_lif_learns():
    x = torch.randn(256, 10)
    y = (x[:, 0] * x[:, 1] > 0).long()
    model = torch.nn.Sequential(torch.nn.Linear(10, 64), snn.DirectEncoding(T=4), snn.LIF(), torch.nn.Linear(64, 2))
    adam = torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model(x).mean(0), y)
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_a_learnt_tau_stays_above_one():
    plif = snn.PLIF()
    with torch.no_grad():
        plif.w.fill_(40.0)  # sigmoid(w) rounds to 1
    spikes = plif(torch.rand(4, 8))
    spikes.sum().backward()
    assert 1.0 < plif.tau.item() < 1.001 and torch.isfinite(plif.w.grad)


def test_numpy_numbers_are_numbers():
    np = pytest.importorskip("numpy")
    x = torch.rand(4, 8) * 2
    assert torch.equal(snn.LIF(tau=np.float32(3), v_threshold=np.float64(1))(x), snn.LIF(tau=3.0)(x))


def test_a_stateful_membrane_moves_with_its_module_and_stays_float32():
    lif = snn.LIF(stateful=True)
    lif(torch.randn(4, 8))
    assert lif.half().v.dtype == torch.float32 and lif.to("meta").v.device.type == "meta"


def test_a_membrane_made_in_inference_mode_can_be_trained_on():
    lif = snn.LIF(stateful=True)
    with torch.inference_mode():
        lif(torch.randn(4, 8))
    x = torch.randn(4, 8, requires_grad=True)
    lif(x).sum().backward()
    assert x.grad.any()


def test_modules_copy_and_print():
    text = repr(torch.nn.Sequential(snn.IF(), snn.LIF(tau=3.0, v_reset=None), snn.PLIF()))
    assert "tau=3.0" in text and "v_reset=None" in text and "surrogate_function='sigmoid'" in text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: snn.LIF(tau=1.0), r"tau must be a finite number > 1 .*got 1\.0"),
        (lambda: snn.LIF(tau=math.nan), "tau must be a finite number > 1"),
        (lambda: snn.LIF(tau="2"), "tau must be a finite number > 1 .*got '2'"),
        (lambda: snn.PLIF(init_tau=0.5), "init_tau must be a finite number > 1"),
        (lambda: snn.LIF(step_mode="s"), "step_mode must be 'm'.*got 's'"),
        (lambda: snn.LIF(surrogate_function="relu"), "surrogate_function must be one of sigmoid, atan.*got 'relu'"),
        (lambda: snn.LIF(surrogate_function=torch.relu), "surrogate_function must be one of"),
        (lambda: snn.LIF(v_threshold=math.nan), "v_threshold must be a finite number; got nan"),
        (lambda: snn.LIF(backend="cupy"), "backend must be one of auto, cpu.*got 'cupy'"),
        (lambda: snn.LIF()(torch.ones(())), r"x must .*\[T, \.\.\.\]"),
    ],
)
def test_bad_input_names_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_top_level_names():
    assert spikeclip.nn is snn and set(snn.__all__) >= {"IF", "LIF", "PLIF", "DirectEncoding", "FiringRates"}
