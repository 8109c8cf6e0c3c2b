"""When an event-driven product pays: a pure function of measured density, with the break-even that benchmarks recorded."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

# Density from which a dense product is faster on a CPU, by the dtype of the weights, and for float weights of the dense
# product (benchmarks/results/cpu.md, "by density").
BREAK_EVEN = {torch.float32: 0.5, torch.bfloat16: 0.22, torch.int16: 0.95, torch.int8: math.inf}
_SAMPLED_ROWS = 64


@cache
def bf16_is_fast() -> bool:
    """Whether this CPU multiplies bfloat16 natively; else it is far slower than float32."""
    return torch.cpu._is_avx512_bf16_supported()


def dense_dtype(weights: torch.dtype, out: torch.dtype) -> torch.dtype:
    """What a CPU's dense product with weights of a dtype is made in: bfloat16 where that is asked for and fast."""
    if not weights.is_floating_point:
        return torch.float32
    return out if out == torch.bfloat16 and weights == torch.float32 and bf16_is_fast() else weights


def event_driven(density: float, weights: torch.dtype, dense: torch.dtype, rows: int) -> bool:
    """Whether adding the weights of spikes of this density beats a product in ``dense`` with all of them, for ``rows`` rows."""
    kind = weights if not weights.is_floating_point else dense if dense in BREAK_EVEN and bf16_is_fast() else torch.float32
    return rows < 4 or density < BREAK_EVEN[kind]


def sampled_density(s: Tensor, length: int, count) -> float:
    """Share of ones among ``length`` spikes of at most 64 evenly spaced rows of ``s``, dense, or words for ``count``."""
    rows = s[:: max(1, -(-s.shape[0] // _SAMPLED_ROWS))]
    ones = count(rows.contiguous()) if s.dtype == torch.int32 else int(torch.count_nonzero(rows))
    return ones / max(rows.shape[0] * length, 1)
