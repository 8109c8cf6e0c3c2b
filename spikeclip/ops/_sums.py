"""Float32 sums of many thread blocks, ``[blocks, 2, C]``, made one in float64: in an order that no run changes."""

from __future__ import annotations

import torch
from torch import Tensor


def total(partial: Tensor) -> Tensor:
    """[blocks, 2, C] -> float32 [2, C]."""
    return partial.sum(0, dtype=torch.float64).to(torch.float32)


def mean_and_variance(partial: Tensor, first: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """From the sums of x - first and of its square over ``rows`` rows: both float32 [C], the variance divided by ``rows``."""
    offset, square = partial.sum(0, dtype=torch.float64) / rows
    return (first + offset).to(torch.float32), (square - offset.square()).clamp(min=0).to(torch.float32)
