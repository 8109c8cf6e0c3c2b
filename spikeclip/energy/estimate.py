"""Energy of a profiled SNN beside its baselines under one cost model: break-even and sensitivity."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .cost import CostModel, Energy, Network, baselines, cost_model
from .counts import Mean, Profile, written
from .formulas import by_layer, energy

STEPS = (1, 2, 4, 8, 16)
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
        model, title, source, leaves_out: the cost model's. steps, rate, partial: the profile's; rate None without neurons.
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


def save_json(
    profile: Profile, estimates: Sequence[Estimate], path: str | Path, measured: Mapping[str, Any] | None = None
) -> None:
    """Write the profile, estimates and measurements (dataclasses, by name), whole or not at all."""
    content = {
        "profile": profile.to_dict(),
        "estimates": [asdict(part) for part in estimates],
        "measured": {name: asdict(part) for name, part in (measured or {}).items()},
    }
    written(path, lambda file: json.dump(content, file, indent=1, allow_nan=False))


def estimate(profile: Profile, model: str | Path | CostModel = "45nm-fp32") -> Estimate:
    """What the profiled network costs under a cost model, by name, from a TOML file or as an object.

    Raises:
        ValueError: see :func:`cost_model`.
    """
    prices = cost_model(model)
    layers = by_layer(prices, Network(profile))
    snn = sum((part for _, part in layers), Energy())
    compared = {
        name: Baseline(energy(prices, network), _break_even(prices, profile, energy(prices, network).total))
        for name, network in baselines(profile).items()
    }
    return Estimate(
        prices.name,
        prices.title,
        prices.source,
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

    What ran at every step runs at each of the new ones; what ran once still does. Every layer's rate is scaled alike; beyond
    100 % of the mean this is arithmetic, not a network.
    """
    steps = steps or profile.steps
    longer = steps / profile.steps

    def runs(count: int) -> int:
        return steps if count == profile.steps else count

    def stretched(rates: tuple[float, ...], factor: float) -> tuple[float, ...]:
        mean = sum(rates) / len(rates)
        return tuple(rate * factor for rate in rates) if steps == profile.steps or len(rates) == 1 else (mean * factor,) * steps

    products = []
    for p in profile.products:
        more = longer if p.runs == profile.steps else 1.0
        factor = spikes if p.spiking else 1.0
        effective = Mean(p.effective.mean * more * factor, None)
        per_run = tuple(effective.mean / runs(p.runs) for _ in range(runs(p.runs)))
        products.append(
            replace(
                p,
                runs=runs(p.runs),
                dense_macs=p.dense_macs * more,
                padded_macs=p.padded_macs * more,
                effective_macs=p.effective_macs * more * factor,
                effective_acs=p.effective_acs * more * factor,
                effective=effective,
                per_run=per_run,
                rates=stretched(p.rates, factor),
                inputs=p.inputs * more,
                outputs=p.outputs * more,
                activation_bytes=p.activation_bytes * more,
            )
        )
    neurons = tuple(
        replace(n, steps=runs(n.steps), spikes=Mean(n.spikes.mean * longer * spikes, None), rates=stretched(n.rates, spikes))
        for n in profile.neurons
    )
    others = tuple(
        replace(o, operations=o.operations * longer, runs=steps) if o.runs == profile.steps else o for o in profile.others
    )
    return replace(profile, steps=steps, products=tuple(products), neurons=neurons, others=others)


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


def _run(product, runs: int):
    share = runs / product.runs
    changes = {
        name: getattr(product, name) * share
        for name in ("dense_macs", "padded_macs", "effective_macs", "effective_acs", "inputs", "outputs", "activation_bytes")
    }
    rate = product.rate
    return replace(product, runs=runs, rates=(rate,) * runs, per_run=(product.effective.mean * share / runs,) * runs, **changes)
