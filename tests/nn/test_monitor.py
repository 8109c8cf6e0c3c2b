import torch

from spikeclip.nn import LIF, FiringRates


def test_rates_are_spikes_per_neuron_and_step():
    model = torch.nn.ModuleDict({"lively": LIF(), "dead": LIF(v_threshold=1e9)})
    x = torch.randn(5, 4, 10) + 1
    with FiringRates(model) as watch:
        spikes = [model["lively"](x), model["lively"](x[:, :2] * 2)]
        model["dead"](x)
    model["lively"](x * 100)
    rates = watch.rates()
    assert list(rates) == ["lively", "dead"]
    want = (spikes[0].flatten(1).sum(1) + spikes[1].flatten(1).sum(1)) / 60
    torch.testing.assert_close(rates["lively"], want.double())
    assert watch.silent() == ["dead"]
    assert not model["lively"]._forward_hooks
