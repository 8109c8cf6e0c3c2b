"""What a forward pass costs in operations, per sample: the result of :func:`spikeclip.energy.profile`."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .files import whole

FORMAT = "spikeclip energy profile 1"


def accumulates(operands: str) -> bool:
    """Whether a product of such operands adds without multiplying: one is spikes, which are named first."""
    return operands.startswith(("spikes", "signed spikes"))


@dataclass(frozen=True)
class Mean:
    """A mean over samples; the true mean lies within ``half`` of it in 95 % of such measurements (normal approximation).

    ``half`` is None for one sample, and where samples lie so in memory that they could not be told apart.
    """

    mean: float
    half: float | None


@dataclass(frozen=True)
class ProductCount:
    """A product that ran: a layer's, or one of two activations. All numbers are per sample, over all time-steps.

    Attributes:
        name: the module, and the function where it is not the module's own product. op: the op that PyTorch dispatched.
        operands: what was multiplied, ``spikes x weights``, ``analog x weights``, ``spikes x integers`` (multi-bit), ...
        runs: how often the product ran: once a time-step, or once.
        before_neurons: nothing had fired yet: the layer that encodes the input. same_input: it saw the same at each run.
        dense_macs: multiply-accumulates when no zero is skipped but the padding's (NeuroBench's Dense).
        padded_macs: the same with the padding's zeros, as FLOP counters count.
        effective_macs, effective_acs: those whose two factors are not 0 (NeuroBench): of calls with an analog operand, and of
            calls with an operand of zeros and ones (or minus ones): SynOps. effective: their sum.
        per_run: effective operations of each run. rates: share of the inputs that is not 0, of each run.
        inputs, outputs: elements; second: of the other factor, in a product of activations. weights: elements of the layer, 0
            for such a product. weight_bytes, activation_bytes (inputs and outputs): as this machine held them.
    """

    name: str
    op: str
    operands: str
    runs: int
    before_neurons: bool
    same_input: bool
    dense_macs: float
    padded_macs: float
    effective_macs: float
    effective_acs: float
    effective: Mean
    per_run: tuple[float, ...]
    rates: tuple[float, ...]
    inputs: float
    outputs: float
    weights: int
    weight_bytes: int
    activation_bytes: float
    second: float = 0.0

    @property
    def spiking(self) -> bool:
        """Whether every call had an operand of spikes."""
        return accumulates(self.operands)

    @property
    def analog(self) -> bool:
        """Whether it is fed by values of which none is skipped, neither spikes nor integers, which are sums of spikes."""
        return self.operands.startswith("analog")

    @property
    def rate(self) -> float:
        """Share of the inputs that is not 0, over all runs."""
        return sum(self.rates) / len(self.rates)

    @property
    def nonzeros(self) -> float:
        """Inputs that are not 0: for a spiking product the spikes that reach it."""
        return self.inputs * self.rate


@dataclass(frozen=True)
class NeuronCount:
    """A layer of neurons, per sample: ``updates`` of membranes (neurons times steps), each a read and a write of state."""

    name: str
    steps: int
    neurons: float
    spikes: Mean
    rates: tuple[float, ...]
    values: str

    @property
    def updates(self) -> float:
        return self.neurons * self.steps

    @property
    def state_reads(self) -> float:
        return self.updates

    @property
    def state_writes(self) -> float:
        return self.updates

    @property
    def rate(self) -> float:
        return sum(self.rates) / len(self.rates)


@dataclass(frozen=True)
class OtherCount:
    """Anything else that ran in a module: ``operations`` on elements, per sample, and what the count did with them.

    ``category``: norm, elementwise, reduction, move (no arithmetic), constant (of parameters alone, done once for any number of
    samples), neuron (inside a neuron: part of its update) or unknown (not counted: the profile is partial). ``runs``: as many
    as there are time-steps, or 1.
    """

    name: str
    op: str
    category: str
    operations: float
    runs: int
    folds: bool

    @property
    def handled(self) -> str:
        texts = {
            "norm": "folds into the product before it" if self.folds else "one multiply and one add an element",
            "elementwise": "one operation an element",
            "reduction": "one operation an input element",
            "move": "moves data: no arithmetic",
            "constant": "of parameters alone: not per sample",
            "neuron": "part of the membrane update",
            "unknown": "not counted",
        }
        return texts[self.category]


@dataclass(frozen=True)
class Profile:
    """Everything that ran for a sample, averaged over ``samples``: sums are properties, layers are ``products`` and so on.

    ``text``: the profile of one prompt through the text tower of a SpikeCLIP, of which an answer needs ``prompts`` unless the
    class vectors are kept. ``notes`` say what a reader must know; ``partial``: something that ran was not counted, or a run was
    cut short.
    """

    model: str
    samples: int
    steps: int
    products: tuple[ProductCount, ...]
    neurons: tuple[NeuronCount, ...]
    others: tuple[OtherCount, ...]
    acs: Mean
    macs: Mean
    notes: tuple[str, ...] = ()
    partial: bool = False
    text: Profile | None = None
    prompts: int = 0

    @property
    def synops(self) -> float:
        """Effective accumulates that spikes cause."""
        return self.acs.mean

    @property
    def dense_macs(self) -> float:
        return sum(product.dense_macs for product in self.products)

    @property
    def ann_macs(self) -> float:
        """Multiply-accumulates of the network of the same topology that runs once, on analog values."""
        return sum(product.dense_macs / product.runs for product in self.products)

    @property
    def analog_macs(self) -> float:
        """Multiply-accumulates of the products that no spikes feed: of all analog values, of integers other than 0."""
        return sum(p.dense_macs if p.analog else p.effective_macs for p in self.products if not p.spiking)

    @property
    def updates(self) -> float:
        return sum(neuron.updates for neuron in self.neurons)

    @property
    def spikes(self) -> float:
        return sum(neuron.spikes.mean for neuron in self.neurons)

    @property
    def rate(self) -> float:
        """Spikes a neuron and step, over all neurons; NaN without neurons."""
        return self.spikes / self.updates if self.updates else float("nan")

    @property
    def reachable_rate(self) -> float:
        """Mean rate at which the busiest layer would fire at every step, if all rates grew alike; NaN if nothing fires."""
        busiest = max((neuron.rate for neuron in self.neurons), default=0.0)
        return self.rate / busiest if busiest else float("nan")

    @property
    def weight_bytes(self) -> int:
        return sum(product.weight_bytes for product in self.products)

    @property
    def activation_bytes(self) -> float:
        return sum(product.activation_bytes for product in self.products)

    @property
    def first_layer_macs(self) -> tuple[float, float]:
        """Dense MACs of the layers before the first neuron: (run once, run at each of the steps)."""
        once = sum(p.dense_macs / p.runs for p in self.products if p.before_neurons)
        return once, once * self.steps

    @property
    def norm_operations(self) -> tuple[float, float]:
        """Elements that norms behind a product (they fold into its weights) and other norms work on."""
        norms = [other for other in self.others if other.category == "norm"]
        return sum(n.operations for n in norms if n.folds), sum(n.operations for n in norms if not n.folds)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Profile:
        """What :meth:`to_dict` made. Raises ValueError for something else."""
        try:
            if values.get("format", FORMAT) != FORMAT:
                raise ValueError(f"format must be {FORMAT!r}; got {values['format']!r}")
            parts = {key: value for key, value in values.items() if key != "format"}
            for key, kind in (("products", ProductCount), ("neurons", NeuronCount), ("others", OtherCount)):
                parts[key] = tuple(_built(kind, part) for part in parts[key])
            if parts.get("text") is not None:
                parts["text"] = cls.from_dict(parts["text"])
            return _built(cls, parts)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is not an energy profile: {error!r}") from error

    def save(self, path: str | Path) -> None:
        """Write JSON, whole or not at all."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        whole(path, lambda half: half.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read what :meth:`save` wrote. Raises ValueError for a file of something else, OSError for none."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error

    def save_csv(self, path: str | Path) -> None:
        """Write one row a product, neuron layer and other op, and step: what ran when, and what it cost in operations."""

        def write(half: Path) -> None:
            with half.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, _COLUMNS)
                writer.writeheader()
                writer.writerows(self._rows())

        whole(path, write)

    def _rows(self) -> Iterator[dict[str, Any]]:
        for p in self.products:
            share, total = 1 / p.runs, p.effective_macs + p.effective_acs
            for run, (effective, rate) in enumerate(zip(p.per_run, p.rates, strict=True)):
                acs = effective * (p.effective_acs / total if total else 0.0)
                yield {
                    "kind": "product",
                    "name": p.name,
                    "op": p.op,
                    "operands": p.operands,
                    "step": run,
                    "rate": rate,
                    "nonzeros": p.inputs * share * rate,
                    "dense_macs": p.dense_macs * share,
                    "padded_macs": p.padded_macs * share,
                    "effective_macs": effective - acs,
                    "effective_acs": acs,
                    "weight_bytes": p.weight_bytes,
                    "activation_bytes": p.activation_bytes * share,
                }
        for n in self.neurons:
            for run, rate in enumerate(n.rates):
                states = dict.fromkeys(("updates", "state_reads", "state_writes"), n.neurons)
                found = {"operands": n.values, "step": run, "rate": rate, "nonzeros": n.neurons * rate, **states}
                yield {"kind": "neurons", "name": n.name, **found}
        for o in self.others:
            yield {"kind": "other", "name": o.name, "op": o.op, "operands": o.handled, "operations": o.operations}


_COLUMNS = """kind name op operands step rate nonzeros dense_macs padded_macs effective_macs effective_acs updates state_reads
    state_writes weight_bytes activation_bytes operations""".split()


def _built(kind: type, values: dict[str, Any]):
    known = {field.name for field in fields(kind)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"this is not an energy profile: {kind.__name__} has no {', '.join(unknown)}")
    made = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    means = {key: Mean(**value) for key, value in made.items() if isinstance(value, dict)}
    return kind(**{**made, **means})
