"""Our counts beside other counters', exact where they see the same, and where not, why."""

import re
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from spikeclip import SpikeCLIP
from spikeclip import nn as snn
from spikeclip.energy import CostModel, cost_model, estimate, profile
from spikeclip.energy.cost import Network
from spikeclip.energy.formulas import energy


class Steps(nn.Module):
    """A network that takes one time-step a call, run over still images."""

    def __init__(self, net: nn.Module, T: int):
        super().__init__()
        self.net, self.T = net, T

    def forward(self, x):
        return torch.stack([self.net(x) for _ in range(self.T)]).mean(0)


def sparse_weights(net: nn.Module) -> nn.Module:
    """Some weights 0, so that skipping them shows."""
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                layer.weight[torch.rand_like(layer.weight) < 0.2] = 0.0
    return net


def neurobench(net: nn.Module, x: torch.Tensor) -> dict[str, float]:
    """NeuroBench's synaptic operations per sample."""
    pytest.importorskip("neurobench", reason="neurobench is not installed")
    from neurobench.metrics.workload import SynapticOperations
    from neurobench.models import TorchModel

    model = TorchModel(net)
    model.register_hooks()
    with torch.no_grad():
        predictions = model(x)
    found = SynapticOperations()(model, predictions, (x, None))
    model.cleanup_hooks()
    return found


def spiking_net(neuron) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        neuron(),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2, bias=False),
        neuron(),
        nn.Flatten(),
        nn.Linear(8 * 64, 10),
    )
    return sparse_weights(net)


def test_neurobench_counts_the_same_of_linear_and_convolution():
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron", reason="spikingjelly is not installed")
    net = Steps(spiking_net(lambda: neuron.LIFNode(v_threshold=0.1)), T=3)
    x = torch.rand(4, 3, 16, 16)
    theirs = neurobench(net, x)
    ours = profile(net, x)
    assert ours.steps == 3 and ours.rate > 0.03
    assert ours.macs.mean == theirs["Effective_MACs"] > 0 and ours.acs.mean == theirs["Effective_ACs"] > 0
    assert ours.dense_macs == theirs["Dense"]


def test_neurobench_does_not_see_attention():
    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

        def forward(self, s):
            q, k, v = ((layer(s) > 0.1).to(s) for layer in (self.q, self.k, self.v))
            return q @ (k.mT @ v)

    torch.manual_seed(0)
    net, s = Attend(), (torch.rand(4, 12, 16) < 0.3).float()
    theirs, ours = neurobench(net, s), profile(net, s, T=1)
    products = {p.name: p for p in ours.products}
    assert set(products) == {"q", "k", "v", "Attend:matmul", "Attend:matmul #2"}
    unseen = [products["Attend:matmul"], products["Attend:matmul #2"]]
    assert [p.operands for p in unseen] == ["spikes x spikes", "spikes x integers"]
    assert ours.dense_macs - sum(p.dense_macs for p in unseen) == theirs["Dense"]
    assert abs(ours.acs.mean - sum(p.effective_acs for p in unseen) - theirs["Effective_ACs"]) < 1e-9
    assert all(p.effective_acs > 0 for p in unseen)


def test_spikingjellys_synops_where_no_weight_is_zero():
    counting = pytest.importorskip("spikingjelly.activation_based.op_counter", reason="spikingjelly is not installed")
    from spikingjelly.activation_based import neuron

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 30), neuron.LIFNode(v_threshold=0.3), nn.Linear(30, 30, bias=False), neuron.IFNode())
    net = Steps(net.append(nn.Linear(30, 5)), T=4).eval()
    x = torch.randn(6, 20)

    def theirs() -> float:
        counter = counting.SynOpCounter()
        with torch.no_grad(), counting.DispatchCounterMode([counter]):
            net(x)
        for module in net.modules():
            if isinstance(module, neuron.IFNode | neuron.LIFNode):
                module.reset()
        return counter.get_total() / len(x)

    assert profile(net, x).acs.mean == theirs() > 0
    # It multiplies spikes by all weights of a row; those that are 0 cost nothing here.
    sparse_weights(net)
    assert profile(net, x).acs.mean < theirs()


def test_spikingjellys_energy_after_lemaire_of_linear_layers():
    counting = pytest.importorskip("spikingjelly.activation_based.op_counter", reason="spikingjelly is not installed")
    from spikingjelly.activation_based import layer, neuron

    torch.manual_seed(0)
    nodes = [neuron.LIFNode(v_threshold=v, step_mode="m") for v in (0.3, 0.2)]
    layers = [layer.Linear(n, m, bias=False, step_mode="m") for n, m in ((40, 30), (30, 5))]
    net = nn.Sequential(nodes[0], layers[0], nodes[1], layers[1]).eval()
    x = torch.randn(4, 1, 40)
    profiler = counting.LemaireEnergyProfiler()
    profiler.bind_model(net)
    with torch.no_grad(), profiler:
        net(x)
    theirs = profiler.get_report()
    ours = energy(cost_model("lemaire-2022"), Network(profile(net, x, batch_dim=1)))
    breakdown = theirs.breakdown_pj
    assert ours.total == pytest.approx(theirs.total_pj, rel=1e-6), (ours, breakdown)


@pytest.fixture
def towers(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return pytest.importorskip("towers")


QKV = re.compile(r"\.([qkv]|attention\.qkv)(\.conv|\.linear|_lif(\.\w+)?|\.norm)$")  # three layers in plain torch, one in ours


def totals(found, numbers):
    """``numbers`` of each product or neuron, added up over queries, keys and values."""
    groups = groupby(found, lambda one: QKV.sub(".qkv", one.name) if QKV.search(one.name) else one.name)
    return [[sum(values) for values in zip(*map(numbers, group), strict=True)] for _, group in groups]


@pytest.mark.parametrize("neuron", ["_Loop", "_SpikingJelly", "_SnnTorch"])
@pytest.mark.parametrize("name", ["spikeclip-4-384", "spikeclip-demo"])
def test_the_same_network_in_plain_torch_costs_the_same(towers, name, neuron):
    """Its products are 1x1 convolutions and matmuls, its spikes dense, its neurons a loop over steps or a peer's."""
    if neuron != "_Loop":
        pytest.importorskip({"_SpikingJelly": "spikingjelly", "_SnnTorch": "snntorch"}[neuron])
    torch.manual_seed(0)
    tower, images = SpikeCLIP.from_config(name).visual.eval().double(), torch.rand(2, 3, 32, 32, dtype=torch.float64)
    plain = towers.PlainTower(tower, getattr(towers, neuron), tower.tokenizer.encode.T).eval().double()
    assert torch.allclose(plain(images), tower(images))
    ours, theirs = profile(tower, images), profile(plain, images, neurons=[towers._Loop])
    assert theirs.steps == ours.steps == 4 and theirs.acs == ours.acs and theirs.macs == ours.macs
    operations = lambda p: (p.dense_macs, p.effective_acs, p.effective_macs, *p.per_run)  # noqa: E731
    assert totals(theirs.products, operations) == totals(ours.products, operations)
    assert len(theirs.products) == len(ours.products) + 2 * len(tower.blocks)
    assert [p.rates for p in theirs.products if not re.search(r"\.[kv]\.conv$", p.name)] == [p.rates for p in ours.products]
    fired = lambda n: (n.spikes.mean, n.updates)  # noqa: E731
    assert totals(theirs.neurons, fired) == totals(ours.neurons, fired)
    spikes = [[n.spikes for n in found.neurons if not QKV.search(n.name)] for found in (theirs, ours)]
    assert spikes[0] == spikes[1] and len(spikes[0]) == len(ours.neurons) - len(tower.blocks)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        plain(images)
    assert counter.get_total_flops() == 2 * 2 * sum(p.padded_macs for p in ours.products)


def test_the_papers_dense_macs():
    """934.2 M a step forms q k^T first, 64 tokens by 64; k^T v, 48 by 48 in each head, is what runs here."""
    seen = profile(SpikeCLIP.from_config("spikeclip-4-384").visual, torch.rand(1, 3, 32, 32))
    ours = sum(p.padded_macs / p.runs for p in seen.products)
    scores_first = 4 * 2 * 384 * 64 * (64 - 48)
    assert ours + scores_first == pytest.approx(934.2e6, rel=1e-4)


def test_spikingformers_log():
    """Spikingformer-8-512 on ImageNet: 0.347 G MACs and 6.518 G ACs are 7.46 mJ (its released log)."""
    prices = cost_model("45nm-fp32")
    assert isinstance(prices, CostModel)
    assert (0.347e9 * prices.pj["mac"] + 6.518e9 * prices.pj["ac"]) * 1e-9 == pytest.approx(7.46, abs=0.005)
    counts = ours_of(macs=0.347e9, acs=6.518e9)
    assert estimate(counts, "45nm-fp32").snn.millijoules == pytest.approx(7.46, abs=0.005)


def ours_of(macs: float, acs: float):
    """A profile with these counts: an analog product and one of spikes."""
    seen = profile(
        nn.Sequential(nn.Linear(4, 4, bias=False), snn.DirectEncoding(4), snn.LIF(), nn.Linear(4, 2)), torch.randn(8, 4)
    )
    first, second = seen.products
    assert not first.spiking and second.spiking
    products = (replace(first, dense_macs=macs, effective_macs=macs), replace(second, effective_acs=acs))
    return replace(seen, products=products)
