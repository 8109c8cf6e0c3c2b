import copy
import io

import pytest
import torch
from torch import nn

from spikeclip import nn as snn
from spikeclip.nn.convert import StepsSpikeConv1d, StepsSpikeConv2d

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BINARY = "its input is not spikes: there are values other than 0 and 1"
UNKNOWN = "no example was given, so it is not known whether spikes feed it"


class Spike(nn.Module):
    def forward(self, x):
        return (x > 0).to(x.dtype)


class Unbatch(nn.Module):
    """A module that changes its state, its buffers and a list in every pass."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(2))
        self.seen, self.state = [], None
        self.offset = torch.zeros(())

    def forward(self, x):
        self.calls += 1
        self.offset.add_(1)
        self.seen.append(x)
        self.state = x
        return x + torch.rand_like(x) * 1e-9


def plain():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Unbatch(), Spike(), nn.Conv2d(8, 8, 3, padding=1, bias=False), Spike(),
        nn.Flatten(2), nn.Conv1d(8, 4, 5, stride=2), Spike(), nn.Flatten(1), nn.Linear(64, 10), nn.Dropout(0.5),
    ).to(DEVICE)  # fmt: skip


def rows(report):
    return {row.name: (row.before, row.after, row.reason) for row in report.rows}


def test_a_plain_model_keeps_its_outputs_and_everything_it_holds():
    model, x = plain(), torch.randn(5, 3, 8, 8, device=DEVICE)
    model[4].weight.requires_grad_(False)
    model[5].eval()
    fired = []
    handle = model[4].register_forward_hook(lambda *_: fired.append(1))
    model[10].register_forward_pre_hook(lambda _, args: fired.append(2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = copy.deepcopy(model)
    modules, parameters = list(model.modules()), dict(model.named_parameters())
    generator = torch.get_rng_state()
    report = snn.convert(model, x)
    assert torch.equal(generator, torch.get_rng_state())
    assert rows(report) == {
        "0": ("Conv2d", None, BINARY),
        "4": ("Conv2d", "SpikeConv2d", ""),
        "7": ("Conv1d", "SpikeConv1d", ""),
        "10": ("Linear", "SpikeLinear", ""),
    }
    assert [type(model[i]) for i in (0, 4, 7, 10)] == [nn.Conv2d, snn.SpikeConv2d, snn.SpikeConv1d, snn.SpikeLinear]
    assert list(model.modules()) == modules and all(p is parameters[n] for n, p in model.named_parameters())
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]
    assert all(torch.equal(v, before.state_dict()[k]) for k, v in model.state_dict().items())
    assert model[2].seen == [] and model[2].state is None and model[2].offset == 0
    model.eval(), before.eval(), fired.clear()
    got = model(x)
    assert fired == [1, 2]
    torch.testing.assert_close(got, before(x), rtol=1e-5, atol=1e-5)
    handle.remove()
    fired.clear()
    model(x).sum().backward()
    assert fired == [2]
    before(x).sum().backward()
    for mine, theirs in zip(model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    optimizer.step()
    assert not torch.equal(model[10].weight, before[10].weight)


def test_copies_and_saved_files_of_a_converted_model():
    model, x = plain().eval(), torch.randn(5, 3, 8, 8, device=DEVICE)
    snn.convert(model, x)
    with torch.no_grad():
        want = model(x)
        file = io.BytesIO()
        model[2] = nn.Identity()
        torch.save(model, file)
        file.seek(0)
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            torch.testing.assert_close(other(x), want, rtol=1e-5, atol=1e-5)
    fresh = plain()
    fresh[2] = nn.Identity()
    fresh.load_state_dict(model.state_dict())


def test_without_an_example_layers_are_left():
    model = plain()
    report = snn.convert(model)
    assert {reason for _, _, reason in rows(report).values()} == {UNKNOWN} and report.replaced == []
    assert type(model[4]) is nn.Conv2d


def test_converting_again_changes_nothing():
    model, x = plain(), torch.randn(5, 3, 8, 8, device=DEVICE)
    snn.convert(model, x)
    assert list(rows(snn.convert(model, x))) == ["0"]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.spike = nn.Linear(6, 6), Spike()
        self.again, self.other = self.one, nn.Linear(6, 6)
        self.other.weight = self.one.weight
        self.outside = [self.one]
        self.mixed, self.unused, self.silent = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, *, scale=1.0):
        s = self.spike(x * scale)
        y = self.again(s) + self.other(input=s) + self.outside[0](s) + self.silent(0 * s)
        return self.mixed(y) + self.mixed(s)


def test_shared_modules_tied_weights_and_reasons():
    model, x = Tied(), torch.randn(4, 6)
    want = model(x)
    report = snn.convert(model, {"x": x, "scale": 2.0})
    assert model.again is model.one is model.outside[0] and type(model.one) is snn.SpikeLinear
    assert model.other.weight is model.one.weight
    assert rows(report) == {
        "one": ("Linear", "SpikeLinear", ""),
        "other": ("Linear", "SpikeLinear", ""),
        "mixed": ("Linear", None, BINARY),
        "unused": ("Linear", None, "the example did not reach it"),
        "silent": ("Linear", None, "its input was all zeros, which does not say whether spikes feed it"),
    }
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)


def test_spikes_behind_dropout_are_spikes_in_evaluation_only():
    linear, norm, last = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)
    model, x = nn.Sequential(Spike(), nn.Dropout(0.5), linear, norm, Spike(), last), torch.ones(1, 6)
    left = snn.convert(model, x)
    assert rows(left)["2"] == ("Linear", None, f"in training {BINARY}") and rows(left)["5"][1] == "SpikeLinear"
    assert all(m.training for m in model.modules())
    assert rows(snn.convert(model.eval(), x)) == {"2": ("Linear", "SpikeLinear", "")}


class Mine(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def test_layers_without_a_counterpart_are_left_with_the_reason():
    replaced = nn.Linear(4, 4)
    replaced.forward = lambda x: x
    model = nn.Sequential(
        Spike(), Mine(4, 4), Spike(), replaced, Spike(), nn.Unflatten(1, (4, 1)), nn.Conv1d(4, 4, 1, groups=2),
        Spike(), nn.Conv1d(4, 4, 1, padding_mode="circular"), Spike(), nn.ConvTranspose1d(4, 4, 1),
        nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 1)),
    )  # fmt: skip
    before, x = [type(m) for m in model], torch.randn(7, 4)
    want = model(x)
    reasons = [reason for _, _, reason in rows(snn.convert(model, x)).values()]
    other = "only Linear, Conv1d and Conv2d themselves have a counterpart, not other classes"
    assert reasons[:2] == [other, "its forward method was replaced"] and reasons[4:] == [other, other]
    assert reasons[2].startswith("groups must be 1") and reasons[3].startswith("padding_mode must be 'zeros'")
    assert [type(m) for m in model] == before and torch.equal(model(x), want)


def test_a_failing_example_leaves_the_model_as_it_was():
    model = plain()
    types = [type(m) for m in model]
    with pytest.raises(RuntimeError):
        snn.convert(model, torch.randn(5, 3, 3, 3, device=DEVICE))
    assert [type(m) for m in model] == types and model.training and model[2].seen == []
    assert all(not m._forward_pre_hooks for m in model)


def test_the_report_is_an_aligned_table():
    lines = str(snn.convert(nn.ModuleDict({"body": plain()}))).splitlines()
    assert lines[0].split() == ["name", "from", "to", "reason"] and lines[-1] == "0 replaced, 4 left"
    assert len({line.index(UNKNOWN) for line in lines[1:-1]}) == 1 and lines[4].startswith("body.10  Linear  left")
    assert str(snn.convert(nn.ReLU())) == "no neurons and no linear or convolution layers found"
    root = nn.Linear(4, 4)
    assert "(model)  Linear  SpikeLinear\n" in str(snn.convert(root, torch.ones(1, 4))) and type(root) is snn.SpikeLinear


def test_bad_arguments():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module; got list"):
        snn.convert([])
    with pytest.raises(ValueError, match="example must be a tensor, a tuple .*got list"):
        snn.convert(nn.Linear(2, 2), [torch.ones(2)])


def jelly():
    pytest.importorskip("spikingjelly", reason="spikingjelly is not installed (the bench extra has it)")
    from spikingjelly.activation_based import functional, layer, neuron, surrogate

    return functional, layer, neuron, surrogate


def spikingjelly_model():
    _, layer, neuron, surrogate = jelly()
    shared = neuron.LIFNode(tau=1.6, surrogate_function=surrogate.ATan(), detach_reset=True, step_mode="m")
    model = nn.Sequential(
        layer.Conv2d(3, 8, 3, padding=1, step_mode="m"), layer.BatchNorm2d(8, step_mode="m"), shared,
        layer.Conv2d(8, 8, 3, padding=1, bias=False, step_mode="m"), layer.BatchNorm2d(8, step_mode="m"),
        neuron.ParametricLIFNode(1.7, decay_input=False, v_threshold=0.7, v_reset=None, step_mode="m"),
        layer.SeqToANNContainer(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)), shared,
        layer.Flatten(start_dim=1, step_mode="m"), layer.Linear(8 * 36, 32, step_mode="m"), neuron.IFNode(step_mode="m"),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(0.05)
    return model.to(DEVICE)


def states(model):
    return [m.v for m in model.modules() if isinstance(m, (snn.IF, snn.LIF, snn.PLIF))]


def test_a_spikingjelly_model_gives_the_same_spikes():
    functional, layer, neuron, _ = jelly()
    model, x = spikingjelly_model(), torch.randn(4, 3, 3, 6, 6, device=DEVICE) * 2
    hooked = []
    model[5].register_forward_hook(lambda module, *_: hooked.append(type(module)))
    model[7].eval()
    before, w = copy.deepcopy(model), model[5].w
    report = snn.convert(model, x)
    assert {name: after for name, (_, after, _) in rows(report).items()} == {
        "0": None, "2": "LIF", "3": "StepsSpikeConv2d", "5": "PLIF", "6.0": "SpikeConv2d", "9": "SpikeLinear", "10": "IF",
    }  # fmt: skip
    assert type(model[3]) is StepsSpikeConv2d and model[2] is model[7] and model[5].w is w and not model[2].training
    assert list(model.state_dict()) == list(before.state_dict()) and states(model) == [None] * 3
    model.eval(), before.eval(), hooked.clear()
    for _ in range(2):  # the membrane stays between calls, there and here
        got, want = model(x), before(x)
        assert torch.equal(got, want) and 0.02 < got.mean() < 0.98
    assert hooked == [snn.PLIF, neuron.ParametricLIFNode] * 2
    functional.reset_net(model), functional.reset_net(before)
    assert states(model) == [None] * 3
    seed = torch.randn_like(want)
    model.train()(x).backward(seed)
    before.train()(x).backward(seed)
    for (name, mine), theirs in zip(model.named_parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=2e-3, atol=2e-3, msg=lambda m, name=name: f"{name}: {m}")


def test_a_spikingjelly_state_goes_on_after_conversion():
    functional, *_ = jelly()
    model, x = spikingjelly_model().eval(), torch.randn(4, 3, 3, 6, 6, device=DEVICE) * 2
    with torch.no_grad():
        model(x)
    before = copy.deepcopy(model)
    snn.convert(model, (x,))
    assert torch.equal(model(x), before(x))


def test_spikingjelly_neurons_without_a_counterpart_are_left_with_the_reason():
    _, layer, neuron, surrogate = jelly()

    class Mine(neuron.LIFNode):
        pass

    class MyAtan(surrogate.ATan):
        pass

    started = neuron.LIFNode(step_mode="m")
    started.v = 0.3
    model = nn.Sequential(
        neuron.LIFNode(), Mine(step_mode="m"), neuron.QIFNode(step_mode="m"),
        neuron.LIFNode(step_mode="m", store_v_seq=True), started,
        neuron.IFNode(step_mode="m", surrogate_function=surrogate.LeakyKReLU()),
        neuron.IFNode(step_mode="m", surrogate_function=MyAtan()),
        neuron.IFNode(step_mode="m", surrogate_function=surrogate.ATan(spiking=False)),
        layer.Conv3d(2, 2, 1, step_mode="m"), neuron.IFNode(step_mode="m"),
    )  # fmt: skip
    before = [type(m) for m in model]
    report = snn.convert(model)
    wanted = [
        "step_mode='s'", "only IFNode, LIFNode", "only IFNode, LIFNode", "store_v_seq=True", "its state does not start",
        "surrogate_function must be one of", "its surrogate_function is not", "surrogate_function must spike",
        "only Linear, Conv1d and Conv2d",
    ]  # fmt: skip
    assert len(report.left) == len(wanted)
    for row, reason in zip(report.left, wanted, strict=True):
        assert row.reason.startswith(reason), row
    assert [type(m) for m in model][:-1] == before[:-1] and type(model[-1]) is snn.IF


def test_a_spikingjelly_conv1d_over_steps_and_wrong_shapes():
    _, layer, neuron, _ = jelly()
    model = nn.Sequential(neuron.IFNode(step_mode="m"), layer.Conv1d(4, 4, 3, step_mode="m"))
    x = torch.rand(3, 2, 4, 9) * 2
    before = copy.deepcopy(model)
    snn.convert(model, x)
    assert type(model[1]) is StepsSpikeConv1d
    torch.testing.assert_close(model(x), before(x), rtol=1e-5, atol=1e-5)
    model[0].reset()
    with pytest.raises(ValueError, match=r"input must have shape \[T, B, C, L\]; got \[3, 4, 9\]"):
        model(x[:, 0])


def test_an_snntorch_model_keeps_its_neurons_and_converts_the_layers_between():
    snntorch = pytest.importorskip("snntorch", reason="snntorch is not installed (the bench extra has it)")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.lif1 = nn.Linear(20, 50), snntorch.Leaky(beta=0.9, init_hidden=True)
            self.fc2, self.lif2 = nn.Linear(50, 10), snntorch.Leaky(beta=0.9)

        def forward(self, x):
            membrane, record = None, []
            self.lif1.reset_mem(), self.lif2.reset_mem()
            for _ in range(5):
                spikes, membrane = self.lif2(self.fc2(self.lif1(self.fc1(x))), membrane)
                record.append(spikes)
            return torch.stack(record)

    model, x = Net(), torch.randn(6, 20) * 3
    want = model(x)
    mem = model.lif1.mem
    report = snn.convert(model, x)
    assert model.lif1.mem is mem
    assert {name: after for name, (_, after, _) in rows(report).items()} == {
        "fc1": None, "lif1": None, "fc2": "SpikeLinear", "lif2": None,
    }  # fmt: skip
    assert "above its threshold" in rows(report)["lif1"][2]
    assert torch.equal(model(x), want) and 0.02 < want.mean() < 0.98
