"""Exact counts of the operations that a product needs when zeros are skipped, per time-step and sample."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


@dataclass
class Operand:
    """What feeds a product: dense values, or spikes packed along the last dimension (``words``, ``length`` a row)."""

    values: Tensor | None
    words: Tensor | None = None
    length: int = 0

    @cached_property
    def kind(self) -> str:
        return "spikes" if self.words is not None else kind(self.values)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape) if self.words is None else (*self.words.shape[:-1], self.length)

    @property
    def nbytes(self) -> int:
        return (self.values if self.words is None else self.words).nbytes

    @cached_property
    def bits(self) -> Tensor:
        """Spikes in each word."""
        return bits(self.words)

    def nonzero(self) -> Tensor:
        """1 where a value is not 0, else 0, float32 in the dense shape."""
        if self.words is None:
            return (self.values != 0).float()
        return torch.ops.spikeclip.unpack_spikes(self.words, self.length, torch.float32, "auto")

    def chunks(self, samples: int) -> Iterator[Tensor]:
        """:meth:`nonzero` of so many at a time of all but the last two dimensions, ``[n, ...]`` each."""
        source = self.values if self.words is None else self.words
        for part in source.reshape(-1, *source.shape[-2:]).split(samples):
            yield (Operand(part) if self.words is None else Operand(None, part, self.length)).nonzero()


def kind(values: Tensor) -> str:
    """``spikes`` (0 and 1), ``signed spikes`` (-1 too), ``integers``, ``analog``, or ``nan`` where one is."""
    if values.dtype == torch.bool or values.numel() == 0:
        return "spikes"
    low, high = (float(v) for v in torch.aminmax(values))
    if math.isnan(low) or math.isnan(high):
        return "nan"
    if low >= -1 and high <= 1:
        squares = values * values
        if bool((squares == values).all() if low >= 0 else (squares * values == values).all()):
            return "spikes" if low >= 0 else "signed spikes"
    if not values.dtype.is_floating_point:
        return "integers"
    small = max(-low, high) <= 2**24
    return "integers" if small and bool((values.round() == values).all()) else "analog"


def bits(words: Tensor) -> Tensor:
    """Ones in each word of int32 ``words``, in their shape."""
    if words.device.type == "cpu":  # several times as fast as the steps below
        return torch.from_numpy(np.bitwise_count(words.contiguous().numpy().view(np.uint32)))
    x = words - ((words >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    return (((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24


def split(rows: Tensor, steps: int, samples: int) -> Tensor:
    """Sums of rows that lie by step, then by sample, ``[steps, samples]``; the same share for each where they do not."""
    if rows.numel() % (steps * samples):
        return (rows.sum(dtype=torch.float64) / (steps * samples)).expand(steps, samples)
    rows = rows.reshape(steps, samples, -1)
    exact = torch.float64 if rows.is_floating_point() or rows.shape[-1] >= 2**26 else torch.int32  # of 32 a word at most
    return rows.sum(-1, dtype=exact).double()


def nonzeros(operand: Operand, steps: int, samples: int) -> Tensor:
    """Values that are not 0, ``[steps, samples]`` as in :func:`split`."""
    if operand.words is not None:
        return split(operand.bits, steps, samples)
    if operand.kind == "spikes" and operand.values.dtype == torch.float32 and operand.values.numel() < 2**24 * samples * steps:
        rows = (
            operand.values.reshape(steps * samples, -1) if operand.values.numel() % (steps * samples) == 0 else operand.values
        )
        return split(rows.sum(-1), steps, samples)  # float32 holds the sums
    return split(operand.values != 0, steps, samples)


def of_weights(operand: Operand, uses: Tensor | None, columns: int, steps: int, samples: int) -> tuple[Tensor, Tensor]:
    """Nonzeros and operations of ``operand @ weights``, ``[steps, samples]``.

    ``uses`` ``[K]`` is how many of the ``columns`` weights that input k meets are not 0; None: all.
    """
    found = nonzeros(operand, steps, samples)
    if uses is None:
        return found, found * columns
    return found, split(operand.nonzero().double() @ uses, steps, samples)


@dataclass(frozen=True)
class Reach:
    """How many operations a nonzero at ``each`` place ``[C, ...]`` of a convolution's input causes.

    ``even``: the same for all C. ``dense``: operations of one sample when nothing but the padding is skipped.
    """

    each: Tensor
    even: bool
    dense: float

    @classmethod
    def of(cls, weight: Tensor, places: tuple[int, ...], options: tuple) -> Reach:
        each = reach_of(weight, places, options, every=False)
        dense = float(reach_of(weight, places, options, every=True).sum())
        return cls(each.to(weight.device), bool((each == each[:1]).all()), dense)


def of_pixels(operand: Operand, reach: Reach, last: bool, steps: int, samples: int) -> tuple[Tensor, Tensor]:
    """Nonzeros and operations of a convolution's input, ``[steps, samples]``.

    Channels are the second dimension, or the ``last``, as in packed spikes.
    """
    found = nonzeros(operand, steps, samples)
    if operand.words is None and float(found.sum()) == operand.values.numel():
        operations = reach.each.sum().expand(len(operand.values))
    elif operand.words is not None and reach.even:
        operations = operand.bits.sum(-1).double().flatten(1) @ reach.each[0].flatten()
    else:
        each = reach.each.movedim(0, -1) if last else reach.each
        operations = operand.nonzero().flatten(1).double() @ each.flatten()
    return found, split(operations, steps, samples)


def reach_of(weight: Tensor, places: tuple[int, ...], options: tuple, every: bool) -> Tensor:
    """Operations that each input value of a convolution takes part in, float64 ``[C, *places]``: padding meets no value.

    ``options`` are aten.convolution's from stride on; weights that are 0 do not count unless ``every``. It is the derivative
    of the sum of all outputs of a convolution with ones for weights.
    """
    transposed, groups = options[3], options[5]
    taps = torch.ones_like(weight, dtype=torch.float64, device="cpu") if every else (weight != 0).double().cpu()
    if transposed:  # [C, O / groups, ...]
        taps, channels = taps.sum(1, keepdim=True), weight.shape[0]
    else:  # [O, C / groups, ...]
        taps, channels = taps.unflatten(0, (groups, -1)).sum(1), weight.shape[1] * groups
    x = torch.zeros((1, channels, *places), dtype=torch.float64)
    y = torch.ops.aten.convolution(x, taps, None, *options)
    wanted = [True, False, False]
    return torch.ops.aten.convolution_backward(torch.ones_like(y), x, taps, None, *options, wanted)[0][0].round()
