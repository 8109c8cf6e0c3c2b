"""When an event-driven product pays: a pure function of measured density, with the break-even that benchmarks recorded."""

from __future__ import annotations

import torch
from torch import Tensor

# Density from which dense float32 is faster on a CPU, by kind of weights (benchmarks/results/cpu.md, "by density").
BREAK_EVEN = {torch.float32: 0.45, torch.int16: 1.0, torch.int8: 1.0}
_SAMPLED_ROWS = 64


def event_driven(density: float, weights: torch.dtype, rows: int) -> bool:
    """Whether adding the weights of the spikes beats multiplying by all of them, for ``rows`` rows of this density."""
    return rows < 4 or density < BREAK_EVEN.get(weights, BREAK_EVEN[torch.float32])


def sampled_density(s: Tensor, count) -> float:
    """Share of ones among at most 64 evenly spaced rows of ``s`` [M, K], or of words (counted by ``count``) [M, W]."""
    rows = s[:: max(1, -(-s.shape[0] // _SAMPLED_ROWS))]
    if s.dtype == torch.int32:
        return count(rows.contiguous()) / max(32 * rows.numel(), 1)
    return int(torch.count_nonzero(rows)) / max(rows.numel(), 1)
