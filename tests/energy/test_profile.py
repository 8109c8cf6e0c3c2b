import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from by_hand import Run, met, spikes
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from spikeclip import SpikeCLIP
from spikeclip import nn as snn
from spikeclip.energy import Profile, estimate, profile


def small(T=4, **neuron):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        snn.DirectEncoding(T),
        snn.LIF(v_threshold=0.3, **neuron),
        nn.Flatten(2),
        snn.SpikeLinear(8 * 36, 10),
    ).eval()


def test_a_layer_at_every_step_and_one_before_time_begins():
    net, x = small(), torch.rand(5, 3, 6, 6)
    seen = profile(net, x)
    assert seen.steps == 4 and seen.model == "Sequential"
    conv, linear = seen.products
    assert (conv.name, conv.runs, conv.before_neurons, conv.spiking) == ("0", 1, True, False)
    assert (linear.name, linear.runs, linear.before_neurons, linear.spiking) == ("5", 4, False, True)
    fired = net[:5](x).detach()  # [T, B, 288]
    assert linear.per_run == tuple((fired.sum((1, 2)) * 10 / 5).tolist())
    assert linear.rates == pytest.approx(fired.mean((1, 2)).tolist())
    assert seen.first_layer_macs == (conv.dense_macs, 4 * conv.dense_macs)
    (neurons,) = seen.neurons
    assert (neurons.steps, neurons.neurons, neurons.updates) == (4, 288, 1152)
    assert neurons.state_reads == neurons.state_writes == neurons.updates == seen.updates
    assert neurons.spikes.mean * 5 == fired.sum() and seen.rate == pytest.approx(fired.mean().item())
    assert seen.ann_macs == conv.dense_macs + 2880 and seen.norm_operations == (288, 0)


def test_one_step_a_call_costs_what_all_steps_at_once_do():
    class Loop(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.before, self.neuron, self.after = net[:2], net[3], net[5]
            self.neuron.stateful = True

        def forward(self, x):
            self.neuron.reset()
            y = self.before(x)
            return sum(self.after(self.neuron(y[None])[0].flatten(1)) for _ in range(4))

    x = torch.rand(5, 3, 6, 6)
    at_once, stepwise = profile(small(), x), profile(Loop(small()), x)
    assert stepwise.steps == 4 and stepwise.acs == at_once.acs and stepwise.macs == at_once.macs
    assert [p.per_run for p in stepwise.products] == [p.per_run for p in at_once.products]
    assert stepwise.neurons[0].rates == at_once.neurons[0].rates


def test_the_first_layer_at_every_step_is_told_from_data_that_changes():
    x = torch.rand(5, 4)
    still = nn.Sequential(snn.DirectEncoding(3), nn.Linear(4, 6), snn.LIF())
    assert profile(still, x).products[0].same_input and profile(still, x).products[0].runs == 3
    stepwise = Run(lambda x, w: sum(F.linear(x, w).sum() for _ in range(3)), torch.ones(6, 4))
    assert profile(stepwise, x, T=3).products[0].same_input
    noisy = nn.Sequential(snn.PoissonEncoding(3), nn.Linear(4, 6), snn.LIF())
    assert not profile(noisy, x).products[0].same_input


def test_means_and_intervals_are_those_of_single_samples():
    net, x = small(), torch.rand(7, 3, 6, 6)
    seen = profile(net, x, batch_size=3)
    alone = torch.tensor([profile(net, part[None]).acs.mean for part in x], dtype=torch.float64)
    assert seen.samples == 7 and seen.acs.mean == pytest.approx(alone.mean().item(), rel=1e-12)
    assert seen.acs.half == pytest.approx(1.959964 * alone.std().item() / math.sqrt(7), rel=1e-6)
    assert seen.products[1].effective == seen.acs
    assert profile(net, x[:1]).acs.half is None


@pytest.mark.parametrize("form", ["tensor", "loader", "pairs", "dicts", "dataset"])
def test_data_in_every_form(form):
    class Named(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x)

    x, y = torch.rand(6, 3, 6, 6), torch.zeros(6)
    data = {
        "tensor": x,
        "loader": DataLoader(x, 4),
        "pairs": [(x[:4], y[:4]), (x[4:], y[4:])],
        "dicts": [{"x": x[:4]}, {"x": x[4:]}],
        "dataset": TensorDataset(x, y),
    }[form]
    assert profile(Named(small()), data).acs == pytest.approx(profile(small(), x).acs)


def test_what_else_ran_is_listed_with_what_was_done_with_it():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.AvgPool2d(2), nn.Flatten())
    others = {(o.name, o.category): o for o in profile(net, torch.rand(2, 3, 6, 6), T=1).others}
    assert others["1", "norm"].folds and "folds" in others["1", "norm"].handled and others["1", "norm"].operations == 64
    assert not others["3", "norm"].folds and "one multiply" in others["3", "norm"].handled
    assert others["2", "elementwise"].operations == 64 and others["4", "reduction"].operations == 64
    assert others["5", "move"].handled == "moves data: no arithmetic"


def test_a_norm_folds_through_a_max_pool_and_inside_bnlif():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.BatchNorm2d(4))
    assert [o.folds for o in profile(net, torch.rand(2, 3, 6, 6), T=1).others if o.category == "norm"] == [True]
    spiking = nn.Sequential(snn.DirectEncoding(2), nn.Linear(4, 8), snn.BNLIF(8, channel_dim=-1))
    assert profile(spiking, torch.rand(3, 4)).norm_operations == (16, 0)


def test_neurons_of_ones_own_and_what_they_fire():
    class Graded(nn.Module):
        def forward(self, x):
            return x.clamp_min(0)

    net = nn.Sequential(nn.Linear(4, 6), Graded(), nn.Linear(6, 2))
    seen = profile(net, torch.randn(5, 4), neurons=[Graded])
    assert [n.name for n in seen.neurons] == ["1"] and seen.neurons[0].values == "analog"
    assert any("not 0 and 1" in note for note in seen.notes) and seen.acs.mean == 0
    assert [o.category for o in seen.others if o.name == "1"] == ["neuron"]


def test_a_network_without_neurons_says_so():
    seen = profile(nn.Linear(4, 2), torch.randn(3, 4))
    assert seen.steps == 1 and not seen.neurons and any("no neurons" in note for note in seen.notes) and not seen.partial


_library = torch.library.Library("energy_test", "DEF")
_library.define("mystery(Tensor x) -> Tensor")
_library.impl("mystery", lambda x: x.clone(), "CPU")


def test_an_unknown_op_makes_the_profile_partial():
    seen = profile(Run(torch.ops.energy_test.mystery), torch.rand(2, 3), T=1)
    assert seen.partial and any("mystery in Run" in note for note in seen.notes)
    assert [o.handled for o in seen.others] == ["not counted"]


def test_time_steps_that_are_not_those_given_or_change_are_told():
    assert any("no neurons ran 3 steps" in note for note in profile(small(), torch.rand(2, 3, 6, 6), T=3).notes)
    lengths = nn.Sequential(nn.Identity(), snn.LIF())
    with pytest.raises(ValueError, match="as many steps in every batch; 1: 3, then 1"):
        profile(lengths, [torch.rand(3, 2, 4), torch.rand(5, 2, 4)], batch_dim=1)
    twice = Run(lambda x, w: x @ w if len(x) == 2 else (x @ w) + (x @ w), torch.ones(4, 4))

    def loop(x, w):
        for _ in range(len(x)):
            x = x @ w
        return x

    with pytest.raises(ValueError, match="as many runs in every batch"):
        profile(Run(loop, torch.ones(4, 4)), [torch.ones(2, 4), torch.ones(3, 4)], T=2)
    assert profile(twice, torch.ones(3, 4), T=1).products[1].name.endswith("#2")


def test_a_layer_used_twice_in_a_step_is_one_layer_that_runs_once_a_step():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8, bias=False)
            self.neuron = snn.LIF(v_threshold=0.2)
            nn.init.eye_(self.layer.weight)

        def forward(self, x):
            s = self.neuron(x.expand(3, *x.shape))
            return sum(self.layer(self.layer(step)) for step in s)

    seen = profile(Twice(), torch.rand(5, 8))
    (product,) = seen.products
    assert product.runs == 3 and product.dense_macs == 2 * 3 * 64 and seen.ann_macs == 2 * 64
    assert profile(Run(lambda x, w: (x @ w, x @ w), torch.eye(4)), torch.ones(2, 4)).ann_macs == 32


class _Masked(nn.Module):
    def __init__(self, rate):
        super().__init__()
        self.register_buffer("mask", spikes(16, 16, rate=rate))

    def forward(self, w):
        return w * self.mask


def test_weights_that_are_made_anew_at_each_call():
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(3)))
    convolutions = nn.Sequential(*(nn.Conv1d(16, 16, 1, bias=False) for _ in range(3)))
    x = spikes(6, 16)
    for layers, images in ((net, x), (convolutions, x[..., None])):
        for layer, rate in zip(layers, (0.2, 0.5, 0.9), strict=True):
            shaped = _Masked(rate)
            shaped.mask = shaped.mask.reshape(layer.weight.shape)
            nn.utils.parametrize.register_parametrization(layer, "weight", shaped)
        counted, y = [], images
        for layer in layers:
            counted.append(met(torch.matmul, y.flatten(1), layer.weight.flatten(1).t()) / 6)
            y = layer(y)
        assert [p.effective.mean for p in profile(layers, images, T=1).products] == pytest.approx(counted)


def test_data_written_into_what_was_made_of_parameters_is_no_parameter():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias, self.encode, self.neuron = nn.Parameter(torch.zeros(4)), snn.DirectEncoding(4), snn.LIF(v_threshold=0.1)
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 6)
            self.register_buffer("spikes", torch.zeros(16, 4, 4))

        def forward(self, x):
            y = torch.zeros_like(self.bias).repeat(len(x), 1)
            y.add_(self.first(x))
            self.spikes[: 4 * len(x)].view(4, len(x), 4, 4)[:, :, 0].copy_(self.neuron(self.encode(y)))
            return self.last(self.spikes[: 4 * len(x)].view(4, len(x), 4, 4)[:, :, 0])

    seen = profile(Written(), torch.rand(3, 4))
    assert [(p.name, p.dense_macs, p.runs) for p in seen.products] == [("first", 16, 1), ("last", 96, 4)]


@pytest.mark.parametrize("steps", ["at once", "one by one"])
def test_neurons_that_serve_several_layers_do_not_lengthen_time(steps):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.neuron = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), Fire()

        def forward(self, x):
            if steps == "at once":
                x = x.expand(5, *x.shape)
            for _ in range(1 if steps == "at once" else 5):
                y = x
                for layer in self.layers:
                    y = self.neuron(layer(y))
            return y

    class Fire(nn.Module):
        def forward(self, x):
            return (x > 0).to(x)

    seen = profile(Shared(), torch.rand(3, 4), neurons=[Fire])
    assert seen.steps == 5 and seen.ann_macs == 48 and [p.runs for p in seen.products] == [5, 5, 5]


def test_time_first_batches_are_cut_by_sample():
    net = nn.Sequential(nn.Linear(6, 4), snn.LIF(), nn.Linear(4, 2))
    seen = profile(net, torch.randn(4, 3, 6), batch_dim=1, batch_size=2)
    assert seen.samples == 3 and seen.steps == 4 and seen.dense_macs == 4 * (24 + 8)


def test_weights_of_a_loop_are_products_of_their_own():
    weights = [torch.eye(8) for _ in range(3)]

    def loop(x, *weights):
        for w in weights:
            x = F.relu(x @ w)
        return x

    seen = profile(Run(loop, *weights), torch.rand(2, 8), T=1)
    assert [p.weights for p in seen.products] == [64, 64, 64] and seen.ann_macs == 3 * 64


def test_neurons_of_ones_own_are_brought_to_rest():
    class Adding(nn.Module):
        def __init__(self):
            super().__init__()
            self.v = 0.0

        def reset(self):
            self.v = 0.0

        def forward(self, x):
            self.v = self.v + x
            return (self.v >= 1).to(x)

    net = nn.Sequential(Adding(), nn.Linear(4, 2))
    assert profile(net, torch.full((5, 4), 0.6), neurons=[Adding], batch_size=3).acs.mean == 0


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)])
def test_inside_inference_mode_and_autocast(mode):
    x, net = torch.rand(5, 3, 6, 6), small()
    net[5] = nn.Linear(8 * 36, 10)
    with mode():
        seen = profile(net, x)
    assert not seen.partial and [p.operands for p in seen.products] == ["analog x weights", "spikes x weights"]
    assert [p.weights for p in seen.products] == [216, 2880] and seen.dense_macs == profile(net, x).dense_macs


def test_sums_of_spikes_are_told_and_priced_by_what_is_not_zero():
    x = torch.tensor([[2.0, 0, 0, 1]])
    seen = profile(Run(torch.matmul, torch.ones(4, 3)), x, T=1)
    assert any("fed by integers" in note for note in seen.notes) and seen.macs.mean == 6
    assert estimate(seen, "45nm-fp32").snn.total == pytest.approx(6 * 4.6)


def test_no_interval_where_samples_cannot_be_told_apart():
    x = spikes(5, 7, 4)
    seen = profile(Run(lambda x, w: torch.einsum("oc,btc->bto", w, x), torch.randn(3, 4)), x, T=1)
    assert seen.acs.mean * 5 == met(torch.matmul, x, torch.ones(4, 3))
    columns = profile(Run(lambda x, w: w @ x.flatten(1).t(), torch.randn(3, 28)), x, T=1)
    assert columns.acs.half is None and columns.acs.mean * 5 == met(torch.matmul, x.flatten(1), torch.ones(28, 3))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
def test_a_scripted_layer_takes_no_hooks_and_is_seen_all_the_same():
    net = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 4)))
    assert profile(net, torch.rand(3, 4)).dense_macs == 32
    assert not net[0]._forward_hooks


def test_an_interrupted_run_is_kept_and_marked():
    x = torch.rand(4, 3, 6, 6)
    batches = iter([x, x, None])

    def call(model, batch):
        if next(batches) is None:
            raise KeyboardInterrupt
        return model(batch)

    seen = profile(small(), [x, x, x], T=4, call=call)
    assert seen.partial and seen.samples == 8 and any("interrupted" in note for note in seen.notes)


def test_the_model_is_left_as_it_was():
    net = small().train()
    net[1].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    profile(net, torch.rand(3, 3, 6, 6))
    with pytest.raises(ValueError):
        profile(net, torch.full((3, 3, 6, 6), math.nan))
    assert [m.training for m in net] == [True, False, True, True, True, True] and net.training
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_nothing_of_earlier_batches_is_kept():
    kept = []

    def batches():
        for _ in range(5):
            x = torch.rand(4, 3, 6, 6)
            kept.append(weakref.ref(x))
            yield x
            del x
            gc.collect()
            assert not any(ref() is not None for ref in kept[:-1])

    assert profile(small(), batches()).samples == 20


def test_a_spikeclip_with_its_text_tower():
    model = SpikeCLIP.from_config("spikeclip-demo")
    classes, templates = ["red star", "blue ring"], ["a photo of a {}.", "a {}.", "one {}."]
    seen = profile(model, torch.rand(3, 3, 32, 32), classes=classes, templates=templates)
    names = [p.name for p in seen.products]
    assert {"visual.readout:einsum", "visual.project", "SpikeCLIP:matmul"} <= set(names)
    similarity = seen.products[names.index("SpikeCLIP:matmul")]
    assert similarity.dense_macs == len(classes) * model.config.embed_dim and similarity.runs == 1
    assert seen.prompts == seen.text.samples == 6 and seen.text.products[0].name == "fc1"
    tower = profile(model.visual, torch.rand(3, 3, 32, 32))
    assert tower.dense_macs == seen.dense_macs - similarity.dense_macs
    assert Profile.from_dict(seen.to_dict()) == seen


def test_files_hold_what_was_counted(tmp_path):
    seen = profile(small(), torch.rand(3, 3, 6, 6))
    seen.save(tmp_path / "a" / "p.json")
    assert Profile.load(tmp_path / "a" / "p.json") == seen
    seen.save_csv(tmp_path / "p.csv")
    header, *rows = [line.split(",") for line in (tmp_path / "p.csv").read_text().splitlines()]
    acs = [float(row[header.index("effective_acs")]) for row in rows if row[0] == "product"]
    assert len(acs) == 1 + 4 and sum(acs) == pytest.approx(seen.acs.mean)
    assert sum(float(row[header.index("updates")]) for row in rows if row[0] == "neurons") == seen.updates
    assert not list(tmp_path.glob(".half*"))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"format": "else"}', '{"model": "m"}', '{"format": "spikeclip energy profile 1", "x": 1}']
)
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(ValueError):
        Profile.load(tmp_path / "p.json")


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"model": "net"}, TypeError, "model must be"),
        ({"data": []}, ValueError, "data must hold at least one batch"),
        ({"data": 3}, TypeError, "data must be"),
        ({"data": ["a"]}, TypeError, "data must yield"),
        ({"data": torch.rand(0, 3, 6, 6)}, ValueError, "batches with samples"),
        ({"data": torch.full((2, 3, 6, 6), math.nan)}, ValueError, "no NaN; 0 was given some"),
        ({"T": 0}, ValueError, "T must be"),
        ({"T": True}, ValueError, "T must be"),
        ({"classes": ["a"]}, ValueError, "classes are for a SpikeCLIP"),
        ({"model": SpikeCLIP.from_config("spikeclip-demo")}, ValueError, "classes must name"),
        ({"model": SpikeCLIP.from_config("spikeclip-demo").for_inference()}, TypeError, "one that learns"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {"model": small(), "data": torch.rand(2, 3, 6, 6), **change}
    with pytest.raises(error, match=message):
        profile(**arguments)


def test_nan_inside_names_the_layer():
    net = small()
    net[0].weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="no NaN"):
        profile(nn.Sequential(net[0], nn.Conv2d(8, 2, 1)), torch.rand(2, 3, 6, 6), T=1)
