"""What ops take and what they compute in."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
NUMBERS = (float, int, Real)  # the exact types first: an abstract one costs a call


def compute_dtype(x: Tensor) -> torch.dtype:
    """What membranes and sums over ``x`` are held in: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
