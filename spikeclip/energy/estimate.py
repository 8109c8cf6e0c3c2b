"""Energy of a profiled SNN beside its baselines under one cost model: break-even and sensitivity."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .cost import CostModel, Energy, Network, baselines, cost_model
from .counts import Mean, ProductCount, Profile
from .files import whole
from .formulas import by_layer, energy

STEPS = (1, 2, 4, 8, 16)
_POWERS = {"spikes x spikes": 2, "spikes x integers": 3}  # of the rate, by operands
RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Baseline:
    """An ANN of the same topology, and the mean firing rate below which the SNN costs less.

    ``break_even``: 0 where the SNN costs more even in silence, None where it costs less with every neuron firing at each step.
    """

    energy: Energy
    break_even: float | None


@dataclass(frozen=True)
class Estimate:
    """Millijoules are of one sample; every figure is of one cost model.

    Attributes:
        model, title, source, bits, leaves_out: the cost model's. steps, rate, partial: the profile's; no rate without neurons.
        snn: as it ran.
        layers: what each product, neuron layer and other op takes of ``snn``.
        baselines: by name.
        variants: the SNN counted otherwise: its first layer once, or at every step; BatchNorm not folded.
        prompt: of one prompt through the text tower; unless class vectors are kept an answer adds it for each of its prompts.
        curve: (mean firing rate, SNN) of the same network if all its rates were scaled.
        sweep: (T, mean firing rate, SNN / ANN by baseline); the last baseline's bits follow T.
    """

    model: str
    title: str
    source: str
    bits: int
    leaves_out: tuple[str, ...]
    steps: int
    rate: float | None
    partial: bool
    snn: Energy
    layers: tuple[tuple[str, Energy], ...]
    baselines: dict[str, Baseline]
    variants: dict[str, Energy]
    prompt: Energy | None
    curve: tuple[tuple[float, float], ...]
    sweep: tuple[tuple[int, float, dict[str, float]], ...]

    @property
    def nearest(self) -> str:
        """The baseline of the SNN's own precision, or the nearest to it."""
        return "ANN W8A8" if self.bits <= 8 else "ANN fp32"


def save_json(
    profile: Profile, estimates: Sequence[Estimate], path: str | Path, measured: Mapping[str, Any] | None = None
) -> None:
    """Write the profile, estimates and measurements (dataclasses, by name), whole or not at all."""
    content = {
        "profile": profile.to_dict(),
        "estimates": [asdict(part) for part in estimates],
        "measured": {name: asdict(part) for name, part in (measured or {}).items()},
    }
    text = json.dumps(content, indent=1, allow_nan=False)
    whole(path, lambda half: half.write_text(text, encoding="utf-8"))


def estimate(profile: Profile, model: str | Path | CostModel = "45nm-fp32") -> Estimate:
    """What the profiled network costs under a cost model, by name, from a TOML file or as an object.

    Raises:
        ValueError: see :func:`cost_model`.
    """
    prices = cost_model(model)
    layers = by_layer(prices, Network(profile))
    snn = sum((part for _, part in layers), Energy())
    spent = {name: energy(prices, network) for name, network in baselines(profile).items()}
    compared = {name: Baseline(budget, _break_even(prices, profile, budget.total)) for name, budget in spent.items()}
    return Estimate(
        prices.name,
        prices.title,
        prices.source,
        prices.bits,
        prices.leaves_out,
        profile.steps,
        profile.rate if profile.neurons else None,
        profile.partial,
        snn,
        tuple(layers),
        compared,
        _variants(prices, profile),
        None if profile.text is None else energy(prices, Network(profile.text)),
        tuple((rate, _at(prices, profile, rate).millijoules) for rate in _rates(profile)),
        tuple(_sweep(prices, profile)) if profile.neurons else (),
    )


def _rates(profile: Profile) -> tuple[float, ...]:
    return tuple(i / 50 for i in range(51)) if profile.rate > 0 else ()


def _at(model: CostModel, profile: Profile, rate: float) -> Energy:
    return energy(model, Network(scaled(profile, rate / profile.rate)))


def _break_even(model: CostModel, profile: Profile, budget: float) -> float | None:
    """The mean firing rate at which the SNN costs ``budget``; what it costs grows with the rate."""
    if not profile.rate > 0:
        return None if energy(model, Network(profile)).total <= budget else 0.0
    low, high = 0.0, 1.0
    if _at(model, profile, low).total >= budget:
        return 0.0
    if _at(model, profile, high).total <= budget:
        return None
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _at(model, profile, middle).total < budget else (low, middle)
    return low


def _sweep(model: CostModel, profile: Profile):
    if not (profile.rate > 0 and profile.products):
        return
    for steps in STEPS:
        for rate in RATES:
            other = scaled(profile, rate / profile.rate, steps)
            snn = energy(model, Network(other)).total
            yield steps, rate, {name: snn / energy(model, ann).total for name, ann in baselines(other).items()}


def scaled(profile: Profile, spikes: float, steps: int | None = None) -> Profile:
    """The profile of the same network if its neurons fired ``spikes`` times as often, over ``steps`` time-steps.

    What ran at every step runs at each of the new ones; what ran once still does. Every neuron's rate is scaled alike, the
    input's not; beyond ``profile.reachable_rate`` this is arithmetic, not a network. Operations of a product of spikes and
    spikes go with the square of the rate, of spikes and such a product with its cube, up to all there are; analog operands
    stay as they are.
    """
    steps = steps or profile.steps
    longer = steps / profile.steps

    def repeats(p: ProductCount) -> bool:
        """Of a profile of one step: what spikes feed, but not the layers before time begins."""
        return p.runs == profile.steps and (profile.steps > 1 or not (p.analog or p.before_neurons))

    def stretched(rates: tuple[float, ...], factor: float, runs: int) -> tuple[float, ...]:
        mean = sum(rates) / len(rates)
        return tuple(rate * factor for rate in rates) if runs == len(rates) else (mean * factor,) * runs

    products = []
    for p in profile.products:
        more, runs = (longer, steps) if repeats(p) else (1.0, p.runs)
        fed = not (p.analog or p.before_neurons)
        factor = spikes if fed else 1.0
        total = p.effective_macs + p.effective_acs
        met = min(spikes ** _POWERS.get(p.operands, 1), max(p.dense_macs / total, 1.0)) if fed and total else 1.0
        per_run = (p.effective.mean * more * met / runs,) * runs
        products.append(
            replace(
                p,
                runs=runs,
                dense_macs=p.dense_macs * more,
                padded_macs=p.padded_macs * more,
                effective_macs=p.effective_macs * more * met,
                effective_acs=p.effective_acs * more * met,
                effective=Mean(p.effective.mean * more * met, None),
                per_run=per_run,
                rates=stretched(p.rates, factor, runs),
                inputs=p.inputs * more,
                second=p.second * more,
                outputs=p.outputs * more,
                activation_bytes=p.activation_bytes * more,
            )
        )
    neurons = []
    for n in profile.neurons:
        more, ran = (longer, steps) if n.steps == profile.steps else (1.0, n.steps)
        fired = Mean(n.spikes.mean * more * spikes, None)
        neurons.append(replace(n, steps=ran, spikes=fired, rates=stretched(n.rates, spikes, ran)))
    others = tuple(
        replace(o, operations=o.operations * longer, runs=steps) if o.runs == profile.steps else o for o in profile.others
    )
    return replace(profile, steps=steps, products=tuple(products), neurons=tuple(neurons), others=others)


def _variants(model: CostModel, profile: Profile) -> dict[str, Energy]:
    found = {}
    first = [p for p in profile.products if p.before_neurons and not p.spiking]
    if first and profile.steps > 1:
        for title, runs in (("first layer once", 1), ("first layer at every step", profile.steps)):
            changed = tuple(_run(p, runs) if p in first else p for p in profile.products)
            if runs == 1 and not all(p.runs == 1 or p.same_input for p in first):
                continue  # its input changes from step to step
            found[title] = energy(model, Network(replace(profile, products=changed)))
    if any(other.category == "norm" for other in profile.others) and model.formula == "once":
        unfolded = tuple(replace(other, folds=False) for other in profile.others)
        found["BatchNorm not folded"] = energy(model, Network(replace(profile, others=unfolded)))
    return found


_SUMS = ("dense_macs", "padded_macs", "effective_macs", "effective_acs", "inputs", "second", "outputs", "activation_bytes")


def _run(product: ProductCount, runs: int) -> ProductCount:
    """The product as if it had run so many times."""
    share = runs / product.runs
    changes = {name: getattr(product, name) * share for name in _SUMS}
    rate = product.rate
    return replace(product, runs=runs, rates=(rate,) * runs, per_run=(product.effective.mean * share / runs,) * runs, **changes)
