"""When an event-driven product pays: a pure function of measured density, with the break-even that benchmarks recorded."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

# Density from which a dense product is faster on a CPU, by the dtype of the weights, and for float weights of the dense
# product (benchmarks/results/cpu.md, "by density").
BREAK_EVEN = {torch.float32: 0.5, torch.bfloat16: 0.22, torch.int16: 0.95, torch.int8: math.inf}
_SAMPLED_ROWS, _SAMPLED_WORD_ROWS = 64, 1024


@cache
def bf16_is_fast() -> bool:
    """Whether this CPU multiplies bfloat16 natively; else it is far slower than float32."""
    return torch.cpu._is_avx512_bf16_supported()


def dense_dtype(weights: torch.dtype, out: torch.dtype) -> torch.dtype:
    """What a CPU's dense product with weights of a dtype is made in: bfloat16 where that is asked for and fast."""
    if not weights.is_floating_point:
        return torch.float32
    return out if out == torch.bfloat16 and weights == torch.float32 and bf16_is_fast() else weights


def break_even(weights: torch.dtype, dense: torch.dtype) -> float:
    """The density from which a product in ``dense`` with all weights beats adding those of spikes; inf: never."""
    kind = weights if not weights.is_floating_point else dense if dense in BREAK_EVEN and bf16_is_fast() else torch.float32
    return BREAK_EVEN[kind]


def event_driven(s: Tensor, length: int, weights: torch.dtype, dense: torch.dtype, count) -> bool:
    """Whether adding the weights of the spikes ``s``, rows of ``length`` or of words for ``count``, beats such a product."""
    least = break_even(weights, dense)
    return s.shape[0] < 4 or least == math.inf or sampled_density(s, length, count) < least


def sampled_density(s: Tensor, length: int, count) -> float:
    """Share of ones among ``length`` spikes of evenly spaced rows of ``s``: 64 dense ones, or 1024 of words for ``count``."""
    packed = s.dtype == torch.int32
    step = -(-s.shape[0] // (_SAMPLED_WORD_ROWS if packed else _SAMPLED_ROWS))
    rows = s[::step] if step > 1 else s
    ones = count(rows.contiguous()) if packed else int(torch.count_nonzero(rows))
    return ones / max(rows.shape[0] * length, 1)
