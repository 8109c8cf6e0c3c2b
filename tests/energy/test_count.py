import torch

from spikeclip import SpikeCLIP
from spikeclip.energy import count


def test_counts_by_hand_and_rates_from_what_flowed():
    model = SpikeCLIP.from_config("spikeclip-demo").visual
    images = torch.rand(3, 3, 32, 32)
    inputs = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda m, i, o, name=name: inputs.update({name: (i[0], o)}))
    counted = count(model, images)
    layers = {layer.name: layer for layer in counted.layers}
    first, second = layers["tokenizer.convs.0"], layers["tokenizer.convs.1"]
    assert first.dense_macs == 32 * 32 * 32 * 3 * 9 and not first.spiking and first.synops == 0 and first.runs == 1
    assert second.dense_macs == 4 * 16 * 16 * 64 * 32 * 9 and second.spiking and second.runs == 4
    spikes = inputs["tokenizer.convs.1"][0].unpack()
    assert second.rate == (spikes.count_nonzero() / spikes.numel()).item() or abs(second.rate - spikes.mean().item()) < 1e-6
    assert second.synops == second.dense_macs * second.rate
    macs = first.dense_macs + layers["project"].dense_macs
    assert counted.analog_macs == macs
    assert abs(counted.snn_millijoules - (0.9 * counted.synops + 4.6 * macs) * 1e-9) < 1e-12
    assert "arithmetic only" in counted.line()


def test_silence_costs_only_the_analog_layers():
    model = SpikeCLIP.from_config("spikeclip-demo").visual
    for module in model.modules():
        if hasattr(module, "v_threshold"):
            module.v_threshold = 1e9
    counted = count(model, torch.rand(2, 3, 32, 32))
    assert counted.synops == 0 and counted.analog_macs > 0


def test_counting_leaves_the_tower_as_it_was():
    model = SpikeCLIP.from_config("spikeclip-demo").visual.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    count(model, torch.rand(2, 3, 32, 32))
    assert model.training and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
