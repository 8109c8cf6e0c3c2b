"""Adds up what watched forward passes did, into a :class:`~spikeclip.energy.Profile`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .counts import Mean, NeuronCount, OtherCount, ProductCount, Profile, accumulates
from .products import Call
from .watch import Fired, Seen

_Z = 1.959963984540054  # 95 %


class Series:
    """Sums over samples of numbers per step, and of each sample's total and its square."""

    def __init__(self, steps: int):
        self.steps = torch.zeros(steps, dtype=torch.float64)
        self.total = self.square = 0.0

    def add(self, values: Tensor) -> None:
        """``[steps, samples]``."""
        self.steps += values.sum(1)
        totals = values.sum(0)
        self.total += float(totals.sum())
        self.square += float(totals.square().sum())

    def mean(self, samples: int) -> Mean:
        mean = self.total / samples
        if samples < 2:
            return Mean(mean, None)
        variance = max(self.square - samples * mean * mean, 0.0) / (samples - 1)
        return Mean(mean, _Z * math.sqrt(variance / samples))


class ProductSums:
    """Of one product."""

    def __init__(self, name: str, op: str, runs: int):
        self.name, self.op, self.runs = name, op, runs
        self.before_neurons = self.same_input = self.apart = True
        self.operands: set[str] = set()
        self.nonzeros, self.effective = Series(runs), Series(runs)
        self.macs = self.acs = self.dense = self.padded = self.activation_bytes = 0.0
        self.inputs = self.outputs = self.second = 0
        self.weights = self.weight_bytes = 0


class Sums:
    """Adds up what forward passes did; its size does not depend on how many."""

    def __init__(self, model: str, T: int):
        self.model, self.T = model, T
        self.samples = 0
        self.products: dict[tuple, ProductSums] = {}
        self.neurons: dict[str, tuple[Series, list[int], set[str]]] = {}
        self.others: dict[tuple, tuple[int, int]] = {}
        self.acs, self.macs = Series(1), Series(1)
        self.notes: list[str] = []
        self.partial = False

    def add(self, seen: Seen, samples: int) -> None:
        """What a pass over so many samples did. Raises ValueError where it is not as before."""
        self.samples += samples
        acs, macs = torch.zeros(1, samples, dtype=torch.float64), torch.zeros(1, samples, dtype=torch.float64)
        for key, calls in seen.products.items():
            self._add_product(key, calls, seen, acs, macs)
        self.acs.add(acs)
        self.macs.add(macs)
        for name, fired in seen.neurons.items():
            spikes = _by_step(fired, lambda f: f.spikes, self.T)
            if name in self.neurons and len(self.neurons[name][0].steps) != len(spikes):
                before = len(self.neurons[name][0].steps)
                raise ValueError(f"data must lead to as many steps in every batch; {name}: {before}, then {len(spikes)}")
            series, sizes, values = self.neurons.setdefault(name, (Series(len(spikes)), [0], set()))
            series.add(spikes)
            sizes[0] += sum(f.neurons for f in fired)
            values.update(f.values for f in fired)
        for key, (elements, runs) in seen.others.items():
            before, most = self.others.get(key, (0, 0))
            self.others[key] = before + elements, max(most, runs)

    def _add_product(self, key: tuple, calls: list[Call], seen: Seen, acs: Tensor, macs: Tensor) -> None:
        nonzeros, effective = (
            _by_step(calls, lambda c, part=part: getattr(c, part), self.T) for part in ("nonzeros", "effective")
        )
        sums = self.products.setdefault(key, ProductSums(*seen.names[key], len(nonzeros)))
        if len(nonzeros) != sums.runs:
            raise ValueError(
                f"data must lead to as many runs in every batch; {sums.name} made {sums.runs}, then {len(nonzeros)}"
            )
        sums.before_neurons &= key in seen.before_neurons
        marks = [mark for call in calls for mark in call.marks]
        sums.same_input &= len(marks) == sums.runs and len(set(marks)) == 1
        sums.nonzeros.add(nonzeros)
        sums.effective.add(effective)
        for call in calls:
            spiking = accumulates(call.operands)
            total = call.effective.sum(0, keepdim=True).cpu()
            (acs if spiking else macs).add_(total)
            sums.acs += float(total.sum()) if spiking else 0.0
            sums.macs += 0.0 if spiking else float(total.sum())
            sums.operands.add(call.operands)
            sums.apart &= call.apart
            sums.second += call.second
            sums.dense += call.dense
            sums.padded += call.padded
            sums.inputs += call.inputs
            sums.outputs += call.outputs
            sums.activation_bytes += call.activation_bytes
            sums.weights, sums.weight_bytes = call.weights, call.weight_bytes

    def profile(self) -> Profile:
        """The means."""
        n = self.samples
        names = Counter()
        products = []
        if self.neurons and self.T not in (len(series.steps) for series, _, _ in self.neurons.values()):
            self.notes.append(f"no neurons ran {self.T} steps, as many as T: what ran when is not to be trusted")
        for sums in self.products.values():
            names[sums.name] += 1
            name = sums.name if names[sums.name] == 1 else f"{sums.name} #{names[sums.name]}"
            if len(sums.operands) > 1:
                self.notes.append(
                    f"{name}: its operands were {' and '.join(sorted(sums.operands))}, by call; counted as each was"
                )
            products.append(
                ProductCount(
                    name,
                    sums.op,
                    min(sums.operands),
                    sums.runs,
                    sums.before_neurons,
                    sums.same_input,
                    sums.dense / n,
                    sums.padded / n,
                    sums.macs / n,
                    sums.acs / n,
                    sums.effective.mean(n) if sums.apart else Mean(sums.effective.total / n, None),
                    tuple((sums.effective.steps / n).tolist()),
                    tuple((sums.nonzeros.steps * sums.runs / max(sums.inputs, 1)).tolist()),
                    sums.inputs / n,
                    sums.outputs / n,
                    sums.weights,
                    sums.weight_bytes,
                    sums.activation_bytes / n,
                    sums.second / n,
                )
            )
            if any(operands.startswith("integers") for operands in sums.operands):
                self.notes.append(f"{name}: it is fed by integers, as sums of spikes are: they count, without zeros, as MACs")
        neurons = []
        for name, (series, (size,), values) in self.neurons.items():
            steps = len(series.steps)
            each = size / n / steps
            if wrong := sorted(values - {"spikes", "signed spikes"}):
                self.notes.append(f"{name}: its spikes are {' and '.join(wrong)}, not 0 and 1: what they feed counts as MACs")
            rates = tuple((series.steps / n / each).tolist()) if each else (0.0,) * steps
            neurons.append(NeuronCount(name, steps, each, series.mean(n), rates, " and ".join(sorted(values))))
        others = tuple(
            OtherCount(name, op, category, elements / n, runs, folds)
            for (name, op, category, folds), (elements, runs) in self.others.items()
        )
        unknown = sorted({f"{other.op} in {other.name}" for other in others if other.category == "unknown"})
        if unknown:
            self.notes.append(f"not counted, since their cost is not known here: {', '.join(unknown)}")
        if not self.neurons:
            self.notes.append("no neurons were seen: this is not a spiking network, or its neurons must be named (neurons=)")
        apart = all(sums.apart for sums in self.products.values())
        partial = self.partial or bool(unknown)
        return Profile(
            self.model,
            n,
            self.T,
            tuple(products),
            tuple(neurons),
            others,
            *((series.mean(n) if apart else Mean(series.total / n, None)) for series in (self.acs, self.macs)),
            tuple(self.notes),
            partial,
        )


def _by_step(calls: Sequence[Call | Fired], part: Callable[[Any], Tensor], T: int) -> Tensor:
    """``[steps, samples]`` of all calls, or of the pass as a whole, ``[1, samples]``, where they are not as many in each step.

    Calls that hold all steps are added; those of one step follow one another.
    """
    most = max(call.steps for call in calls)
    if most > 1:
        return sum(part(call).expand(most, -1) / (most // call.steps) for call in calls).cpu()
    each = torch.cat([part(call) for call in calls]).cpu()
    return each.unflatten(0, (T, -1)).sum(1) if len(each) % T == 0 else each.sum(0, keepdim=True)
