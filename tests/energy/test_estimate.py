import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from spikeclip import SpikeCLIP
from spikeclip import nn as snn
from spikeclip.energy import Energy, Profile, available, cost_model, estimate, profile
from spikeclip.energy.cost import COSTS, Network, ann, baselines, mac_of_bits
from spikeclip.energy.estimate import save_json, scaled
from spikeclip.energy.formulas import energy
from spikeclip.ops import spike_attention
from spikeclip.training.compositions import render


@pytest.fixture(scope="module")
def seen():
    """An analog layer run once, then two of spikes over 4 steps, with a norm and an addition."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(6, 8, bias=False),
        snn.DirectEncoding(4),
        snn.LIF(v_threshold=0.3),
        nn.Linear(8, 8, bias=False),
        nn.Dropout(),
        snn.LIF(v_threshold=0.2),
        nn.Linear(8, 4, bias=False),
    )
    return profile(net, torch.randn(50, 6))


def acs(seen):
    return sum(p.effective_acs for p in seen.products)


def test_arithmetic_alone_by_hand(seen):
    assert energy(cost_model("45nm-fp32"), Network(seen)) == Energy(compute=pytest.approx(4.6 * 48 + 0.9 * acs(seen)))
    assert energy(cost_model("45nm-int8"), Network(seen)) == Energy(compute=pytest.approx(0.23 * 48 + 0.03 * acs(seen)))
    dense = 48 + 64 + 32
    assert energy(cost_model("45nm-fp32"), ann(seen, 32, 32)).total == pytest.approx(4.6 * dense)
    assert energy(cost_model("45nm-fp32"), ann(seen, 8, 8)).total == pytest.approx(0.23 * dense)


def test_every_value_moved_once_by_hand(seen):
    found = energy(cost_model("45nm-memory"), Network(seen))
    cache = 10 / 64  # pJ a bit from the smallest
    updates = 4 * (8 + 8)
    assert found.weights == pytest.approx((48 + 64 + 32) * 32 / 64 * 1300)
    assert found.neurons == pytest.approx(updates * (3.7 + 0.9))
    assert found.state == pytest.approx(2 * updates * 32 * cache)
    # The analog layer's input and output in 32 bits; spikes read by two layers, and written, in one.
    assert found.activations == pytest.approx(((6 + 8) * 32 + 4 * (8 + 8) + updates) * cache)
    assert found.compute == pytest.approx(4.6 * 48 + 0.9 * acs(seen)) and found.addressing == 0


def test_events_by_hand(seen):
    found = energy(cost_model("lemaire-2022"), Network(seen))

    def access(count, values):
        return count * 10 * values * 4 / 8192

    _, first, second = seen.products
    fired, updates = seen.spikes, seen.updates
    assert found.compute == pytest.approx(3.2 * 48 + 0.1 * acs(seen))
    assert found.neurons == pytest.approx(3.2 * updates + 0.1 * fired)
    assert found.addressing == pytest.approx(0.1 * (acs(seen) + 6 + 8))
    weights = access(48, 48) + access(first.effective_acs, 64) + access(second.effective_acs, 32)
    assert found.weights == pytest.approx(weights)
    assert found.activations == pytest.approx(access(6, 6) + access(2 * fired, 1000))
    states = access(2 * first.effective_acs, 8) + access(2 * second.effective_acs, 4) + access(2 * updates, 8)
    assert found.state == pytest.approx(states)


def test_data_movement_by_hand(seen):
    found = energy(cost_model("data-movement"), Network(seen))
    bit = 10 / 64
    assert found.weights == pytest.approx((48 + 4 * (64 + 32)) * 8 * bit)
    # A step's 8 spikes go as a bitmap of 8 bits, or as addresses of 3 bits each.
    spikes = sum(min(8, 8 * rate * 3) for p in seen.products[1:] for rate in p.rates)
    assert found.activations == pytest.approx((6 * 8 + spikes) * bit)
    assert found.state == pytest.approx(2 * seen.updates * 16 * bit)
    assert energy(cost_model("data-movement"), ann(seen, 8, 3)).activations == pytest.approx((6 + 8 + 8) * 3 * bit)


@pytest.mark.parametrize("steps, bits", [(1, 1), (3, 2), (4, 3), (7, 3), (8, 4), (16, 5)])
def test_the_quantised_twin_has_a_level_for_every_count_of_spikes(seen, steps, bits):
    assert f"ANN W8A{bits}" in baselines(replace(seen, steps=steps))


def test_prices_of_other_bits_meet_the_published_ones():
    assert mac_of_bits(32, 32) == pytest.approx(4.6) and mac_of_bits(8, 8) == pytest.approx(0.23)
    assert mac_of_bits(8, 3) == pytest.approx(0.2 * 3 / 8 + 0.03)


@pytest.mark.parametrize("name", available())
def test_break_even_is_where_both_cost_the_same(seen, name):
    found = estimate(seen, name)
    prices = cost_model(name)
    assert set(found.baselines) == {"ANN fp32", "ANN W8A8", "ANN W8A3"}
    for baseline in found.baselines.values():
        budget = baseline.energy.total
        silent, full = (energy(prices, Network(scaled(seen, rate / seen.rate))).total for rate in (0.0, 1.0))
        if baseline.break_even is None:
            assert full <= budget
        elif baseline.break_even == 0:
            assert silent >= budget
        else:
            there = energy(prices, Network(scaled(seen, baseline.break_even / seen.rate)))
            assert there.total == pytest.approx(budget, rel=1e-6)


@pytest.mark.parametrize("name", available())
def test_layers_add_up_and_the_curve_passes_through_the_measured_rate(seen, name):
    found = estimate(seen, name)
    assert sum(part.total for _, part in found.layers) == pytest.approx(found.snn.total)
    assert energy(cost_model(name), Network(scaled(seen, 1.0))) == found.snn
    rates, costs = zip(*found.curve, strict=True)
    assert rates[0] == 0 and rates[-1] == 1 and list(costs) == sorted(costs)
    low = max(i for i, rate in enumerate(rates) if rate <= seen.rate)
    assert costs[low] <= found.snn.millijoules <= costs[low + 1]


def test_scaled_by_time_repeats_what_ran_at_every_step(seen):
    longer = scaled(seen, 1.0, 8)
    assert longer.steps == 8 and [p.runs for p in longer.products] == [1, 8, 8] and longer.rate == pytest.approx(seen.rate)
    assert longer.updates == 2 * seen.updates and longer.spikes == pytest.approx(2 * seen.spikes)
    assert longer.ann_macs == seen.ann_macs and acs(longer) == pytest.approx(2 * acs(seen))
    sweep = {(T, rate): ratios for T, rate, ratios in estimate(seen).sweep}
    assert "ANN W8A4" in sweep[8, 0.1] and "ANN W8A1" in sweep[1, 0.1]
    assert sweep[8, 0.1]["ANN fp32"] > sweep[4, 0.1]["ANN fp32"] > sweep[4, 0.05]["ANN fp32"]


def test_input_spikes_do_not_follow_the_neurons_rate():
    torch.manual_seed(0)
    net = nn.Sequential(snn.PoissonEncoding(4), nn.Linear(6, 8), snn.LIF(v_threshold=0.3), nn.Linear(8, 4))
    found = profile(net, torch.rand(20, 6))
    silent = scaled(found, 0.0)
    assert silent.products[0].effective_acs == found.products[0].effective_acs > 0 and silent.products[1].effective_acs == 0


def test_attention_goes_with_the_square_and_the_cube_of_the_rate():
    model = SpikeCLIP.from_pretrained("spikeclip-demo")
    found = profile(model.visual, render(4, seed=0).images)
    half = scaled(found, 0.5)
    ratios = {
        p.operands: q.effective_acs / p.effective_acs for p, q in zip(found.products, half.products, strict=True) if p.spiking
    }
    assert ratios == pytest.approx({"spikes x weights": 0.5, "spikes x spikes": 0.25, "spikes x integers": 0.125})
    assert all(p.effective_acs <= p.dense_macs for p in scaled(found, 1e6).products if p.spiking)


def test_one_step_stretched_over_time_keeps_the_layers_before_it_once():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), snn.DirectEncoding(1), snn.LIF(v_threshold=0.1), nn.Linear(8, 4))
    assert [p.runs for p in scaled(profile(net, torch.rand(9, 6)), 1.0, 16).products] == [1, 16]


def test_both_factors_of_attention_move():
    T, B, N, C = 2, 1, 4, 32

    class Attend(nn.Module):
        def forward(self, x):
            return spike_attention(*x.unbind(-1), scale=1.0, num_heads=1)

    found = profile(Attend(), (torch.rand(T, B, N, C, 3) < 0.5).float(), T=T, batch_dim=1)
    spent = energy(cost_model("data-movement"), Network(found)).activations
    bitmaps = [sum(min(N * C, N * C * rate * 7) for rate in p.rates) for p in found.products]
    # v at one bit each; k^T v, C by C, at eight.
    assert spent == pytest.approx(10 / 64 * (sum(bitmaps) + T * N * C + T * C * C * 8))
    moved = energy(cost_model("45nm-memory"), Network(found)).activations
    assert moved == pytest.approx(10 / 64 * T * (3 * N * C + 2 * C * C * 32))


def test_the_first_layer_counted_once_and_at_every_step(seen):
    once = estimate(seen).snn.total
    variants = estimate(seen).variants
    assert variants["first layer once"].total == pytest.approx(once)
    assert variants["first layer at every step"].total == pytest.approx(once + 3 * 48 * 4.6)
    torch.manual_seed(0)
    noisy = profile(nn.Sequential(snn.PoissonEncoding(3), nn.Linear(4, 6), snn.LIF(), nn.Linear(6, 2)), torch.rand(5, 4))
    assert noisy.products[0].spiking and not estimate(noisy).variants


def test_an_answer_with_and_without_its_class_vectors():
    model = SpikeCLIP.from_config("spikeclip-demo")
    seen = profile(model, torch.rand(2, 3, 32, 32), classes=["red star", "blue ring"])
    assert estimate(seen).prompt == estimate(seen.text).snn and estimate(seen).prompt.total > 0
    assert estimate(seen.text).prompt is None


def test_batchnorm_that_does_not_fold_costs_a_multiply_and_an_add():
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), snn.DirectEncoding(2), snn.LIF(), nn.Linear(6, 2))
    found = estimate(profile(net, torch.randn(5, 4)), "45nm-memory")
    assert found.variants["BatchNorm not folded"].total - found.snn.total == pytest.approx(6 * 4.6)


def test_a_silent_network_and_one_without_neurons():
    silent = nn.Sequential(snn.DirectEncoding(2), snn.LIF(v_threshold=1e9), nn.Linear(4, 2))
    found = estimate(profile(silent, torch.rand(3, 4)))
    assert found.snn.total == 0 and not found.curve and found.baselines["ANN fp32"].break_even is None
    plain = estimate(profile(nn.Linear(4, 2), torch.rand(3, 4)))
    assert plain.snn.total == pytest.approx(plain.baselines["ANN fp32"].energy.total) and plain.rate is None
    assert not plain.sweep and not plain.curve


def test_rates_that_no_network_reaches_are_told(seen):
    busiest = max(n.rate for n in seen.neurons)
    assert scaled(seen, 1 / busiest).rate == pytest.approx(seen.reachable_rate)


def test_every_cost_model_tells_its_source():
    assert available() == ["45nm-fp32", "45nm-int8", "45nm-memory", "data-movement", "lemaire-2022"]
    for name in available():
        prices = cost_model(name)
        assert ("arXiv" in prices.source or "doi" in prices.source) and prices.leaves_out and prices.name == name


def test_a_cost_model_of_ones_own(tmp_path, seen):
    file = tmp_path / "mine.toml"
    file.write_text((COSTS / "45nm-fp32.toml").read_text().replace("ac = 0.9", "ac = 1.8").replace("mac = 4.6", "mac = 9.2"))
    assert cost_model(file).name == "mine"
    assert estimate(seen, file).snn.total == pytest.approx(2 * estimate(seen, "45nm-fp32").snn.total)


@pytest.mark.parametrize(
    "before, after, message",
    [
        ('formula = "arithmetic"', 'formula = "magic"', "formula must be one of"),
        ('formula = "arithmetic"', "", "formula must be given"),
        ("mac = 4.6", "mac = -1", "pj.mac must be a number >= 0"),
        ("mac = 4.6", 'mac = "much"', "pj.mac must be a number"),
        ("ac = 0.9", "", "pj must give mac, ac"),
        ("bits = 32", "bits = 0", "bits must be 1 to 64"),
        ("bits = 32", "bits = true", "bits must be given, as a int"),
        ("[pj]", "colour = 3\n[pj]", "settings must be of"),
        ("[pj]", "[pj", "is not TOML"),
        ('formula = "arithmetic"', 'formula = "movement"', "pj must give mac, ac, multiply, add"),
    ],
)
def test_a_bad_cost_model_is_refused(tmp_path, before, after, message):
    text = (COSTS / "45nm-fp32.toml").read_text()
    assert before in text
    (tmp_path / "bad.toml").write_text(text.replace(before, after))
    with pytest.raises(ValueError, match=message):
        cost_model(tmp_path / "bad.toml")


@pytest.mark.parametrize(
    "name, before, after, message",
    [
        ("lemaire-2022", "sram = [[0, 0.0]", "sram = [[9e9, 0.0]", "memory.sram must be pairs"),
        ("lemaire-2022", "entries = 1000", "", "fifo must give entries"),
        ("data-movement", "[state]\nbits = 16", "", "state must be a table"),
        ("45nm-memory", 'state = "cache"', "", "levels must name"),
        ("45nm-memory", 'state = "cache"', 'state = "tape"', "memory.tape must be pairs"),
    ],
)
def test_a_bad_memory_is_refused(tmp_path, name, before, after, message):
    text = (COSTS / f"{name}.toml").read_text()
    assert before in text
    (tmp_path / "bad.toml").write_text(text.replace(before, after))
    with pytest.raises(ValueError, match=message):
        cost_model(tmp_path / "bad.toml")


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="cost model must be one of 45nm-fp32"):
        cost_model("7nm")


def test_json_holds_profile_and_estimates(tmp_path, seen):
    save_json(seen, [estimate(seen, name) for name in available()], tmp_path / "e.json")
    content = json.loads((tmp_path / "e.json").read_text())
    assert Profile.from_dict(content["profile"]) == seen and content["measured"] == {}
    assert [part["model"] for part in content["estimates"]] == available()
    assert content["estimates"][0]["snn"]["compute"] == pytest.approx(4.6 * 48 + 0.9 * acs(seen))
