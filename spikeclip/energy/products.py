"""The operations of one product that ran: dense, and effective by time-step and sample."""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .nonzeros import Operand, Reach, nonzeros, of_pixels, of_weights, split
from .rules import Attention, Convolution, Matmul

_CACHED = 2**18  # elements of a tensor that stays in a core's cache


@dataclass
class Call:
    """One product of a forward pass; ``nonzeros`` and ``effective`` are ``[steps, samples]``, numbers are sums over both.

    ``marks``: per step, numbers that are equal where the inputs of two steps are; none where nobody looked.
    ``second``: elements of the other activation. ``apart``: False where samples could not be told apart and differ.
    """

    operands: str
    steps: int
    nonzeros: Tensor
    effective: Tensor
    dense: float
    padded: float
    inputs: int
    outputs: int
    weights: int
    weight_bytes: int
    activation_bytes: int
    second: int = 0
    apart: bool = True
    marks: list[tuple[float, ...]] = field(default_factory=list)


class NotANumber(ValueError):
    """An operand holds NaN."""


def described(operand: Operand) -> str:
    """``spikes``, ``signed spikes``, ``integers`` or ``analog``. Raises NotANumber."""
    if operand.kind == "nan":
        raise NotANumber
    return operand.kind


class Products:
    """Makes a :class:`Call` of what ran, rows by time-step, then by sample.

    ``parameters``: memory that stays with the same weights; what depends on them alone is kept, of others as long as they live.
    """

    def __init__(self, parameters: Container[int]):
        self._parameters = parameters
        self._kept: dict[tuple, Any] = {}
        self._alive = WeakTensorKeyDictionary()

    def _of_weights(self, w: Tensor, key: Hashable, make: Callable[[], Any]) -> Any:
        """What ``make`` makes of ``w``, once for these weights as they are."""
        version = 0 if w.is_inference() else w._version
        if w.untyped_storage().data_ptr() in self._parameters:
            table, key = self._kept, (w.data_ptr(), w.shape, w.stride(), version, key)
        else:
            table, key = self._alive.setdefault(w, {}), (version, key)
        if key not in table:
            table[key] = make()
        return table[key]

    def matmul(self, found: Matmul, constant: Callable[[Tensor], bool], steps: int, samples: int, look: bool) -> Call:
        a, b = found.source, found.b
        weighted = found.weighted or constant(b)
        if not weighted and a.words is None and constant(a.values):
            return self._columns(found, samples)
        rows, inner = prod(a.shape[:-1]), a.shape[-1]
        columns = b.shape[-1]
        if weighted and b.dim() == 3 and b.shape[0] == 1:
            b = b[0]
        if weighted and b.dim() == 2:
            apart = rows % (steps * samples) == 0
            per_sample = of_weights(a, self._of_weights(b, None, lambda: _uses(b)), columns, steps, samples)
            operands = f"{described(a)} x weights"
        else:
            other = Operand(b)
            meets = a.nonzero().sum(-2, dtype=torch.float64) * other.nonzero().sum(-1, dtype=torch.float64)  # [n, K]
            apart = meets[..., 0].numel() % (steps * samples) == 0
            per_sample = nonzeros(a, steps, samples), split(meets.sum(-1), steps, samples)
            operands = f"{described(a)} x weights" if weighted else " x ".join(_ordered(described(a), described(other)))
        dense = float(rows) * inner * columns
        return Call(
            operands,
            steps,
            *per_sample,
            dense,
            dense,
            rows * inner,
            found.out.numel(),
            found.b.numel() if weighted else 0,
            found.b.nbytes if weighted else 0,
            a.nbytes + found.out.nbytes + (0 if weighted else found.b.nbytes),
            second=0 if weighted else found.b.numel(),
            apart=apart or float(per_sample[1].sum()) == dense,
            marks=marks(a, steps) if look else [],
        )

    def _columns(self, found: Matmul, samples: int) -> Call:
        """``weights @ activations``: samples are somewhere in the columns, each with the same share."""
        w, x = found.source.values, Operand(found.b)
        each = [
            part.expand(1, samples)
            for part in (
                nonzeros(x, 1, 1) / samples,
                (x.nonzero().sum(-1, dtype=torch.float64) * (w != 0).sum(-2)).sum() / samples,
            )
        ]
        dense = float(w.shape[-2]) * x.values.numel()
        size = x.values.numel()
        activations = x.nbytes + found.out.nbytes
        return Call(
            f"{described(x)} x weights",
            1,
            *each,
            dense,
            dense,
            size,
            found.out.numel(),
            w.numel(),
            w.nbytes,
            activations,
            apart=float(each[1].sum()) == dense,
        )

    def convolution(self, found: Convolution, steps: int, samples: int, look: bool) -> Call:
        x, w, options = found.source, found.w, found.options
        n, *rest = x.shape
        places = tuple(rest[:-1] if found.last else rest[1:])
        reach = self._of_weights(w, (places, str(options)), lambda: Reach.of(w, places, options))
        per_sample = of_pixels(x, reach, found.last, steps, samples)
        taps = w.shape[1] * prod(w.shape[2:])  # of an output; transposed: of an input
        size = prod(x.shape)
        return Call(
            f"{described(x)} x weights",
            steps,
            *per_sample,
            reach.dense * n,
            float(size if options[3] else found.out.numel()) * taps,
            size,
            found.out.numel(),
            w.numel(),
            w.nbytes,
            x.nbytes + found.out.nbytes,
            apart=n % (steps * samples) == 0,
            marks=marks(x, steps) if look else [],
        )

    def attention(self, found: Attention, steps: int, samples: int) -> tuple[Call, Call]:
        """k^T v, whose result is integers, then the rows of it that q's spikes select."""
        heads, width = found.heads, found.source.shape[-1] // found.heads
        tokens = found.source.shape[-2] * found.source.shape[-1]
        parts = zip(*(part.chunks(max(1, _CACHED // tokens)) for part in (found.source, found.k, found.v)), strict=True)
        first, second = (torch.cat(rows) for rows in zip(*(_met(*part, heads) for part in parts), strict=True))
        between = first.numel() * heads * width * width
        calls = []
        for operand, effective, operands, other, outputs, nbytes in (
            (found.k, first, "spikes x spikes", prod(found.v.shape), between, found.k.nbytes + found.v.nbytes),
            (found.source, second, "spikes x integers", between, found.out.numel(), found.source.nbytes + found.out.nbytes),
        ):
            per_sample = nonzeros(operand, steps, samples), split(effective, steps, samples)
            inputs = prod(operand.shape)
            dense = float(inputs) * width
            apart = effective.numel() % (steps * samples) == 0
            moved = nbytes + 4 * between
            calls.append(
                Call(operands, steps, *per_sample, dense, dense, inputs, outputs, 0, 0, moved, second=other, apart=apart)
            )
        return calls[0], calls[1]

    def opaque_attention(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, steps: int, samples: int) -> Call:
        """Softmax attention in one op: its scores are not seen, so both products count as dense."""
        pairs = float(q.shape[:-1].numel()) * k.shape[-2]
        dense = pairs * (q.shape[-1] + v.shape[-1])
        for part in (q, k, v):
            described(Operand(part))
        each = torch.full((steps, samples), 1.0 / (steps * samples), dtype=torch.float64)
        nbytes = q.nbytes + k.nbytes + v.nbytes + out.nbytes
        return Call(
            "analog x analog",
            steps,
            each * q.numel(),
            each * dense,
            dense,
            dense,
            q.numel(),
            out.numel(),
            0,
            0,
            nbytes,
            second=k.numel() + v.numel(),
        )


def _uses(w: Tensor) -> Tensor | None:
    """Weights other than 0 that each input meets, of ``[K, N]``; None: all of them are."""
    uses = torch.count_nonzero(w, dim=1).double()
    return None if bool((uses == w.shape[1]).all()) else uses


def _met(q: Tensor, k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Operations of k^T v and of q (k^T v) that meet no 0, of spikes ``[n, N, C]``, each ``[n]``."""
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(-2, -3) for part in (q, k, v))  # [n, heads, N, C / heads]
    counts = k.mT @ v
    met = counts.sum((-1, -2, -3))
    return met, (q.sum(-2) * counts.clamp_max_(1.0).sum(-1)).sum((-1, -2))


def _ordered(a: str, b: str) -> tuple[str, str]:
    """Spikes first: they are what makes a product an accumulation."""
    return (b, a) if b.endswith("spikes") and not a.endswith("spikes") else (a, b)


def marks(operand: Operand, steps: int) -> list[tuple[float, ...]]:
    """Numbers of each step's input that are equal where the inputs are (and hardly where they are not)."""
    values = operand.values if operand.words is None else operand.words
    if values.numel() % steps:
        return []
    parts = values.reshape(steps, -1)
    if steps > 1 and all(torch.equal(parts[0], part) for part in parts[1:]):
        return [(0.0,)] * steps
    if steps > 1:
        return [(float(step),) for step in range(steps)]
    return [(float(parts.sum()), float(torch.linalg.vector_norm(parts.float())))]
