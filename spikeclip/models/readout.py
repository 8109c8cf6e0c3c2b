"""The readout of both towers: a learnable weight per time-step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class StepReadout(nn.Module):
    """Weighted sum over time, ``[T, B, C] -> [B, C]``; the weights are used as they are, without a softmax.

    Initialised as in the paper, ln(0.1), ln(0.2), ln(0.4), ln(0.8) for T = 4; for other T the same doubling towards ln(0.8).
    """

    def __init__(self, T: int):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([math.log(0.8 / 2 ** (T - 1 - t)) for t in range(T)]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("t,tbc->bc", self.weight.to(x.dtype), x)
