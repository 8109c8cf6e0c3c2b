"""Surrogate gradients: one row per name, in the order of ``enum Surrogate`` in ``csrc/lif_step.h``.

Formulas give d(spike)/d(u) at ``u = h - v_threshold``; names and default ``alpha`` are SpikingJelly's, and
``triangle`` is the pseudo-derivative of Bellec et al. 2018 (arXiv 1803.09574), peak 1 and half-width ``1 / alpha``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Surrogate(NamedTuple):
    """A surrogate gradient: its index in the kernels, its default ``alpha`` and its formula ``grad(u, alpha)``."""

    index: int
    alpha: float
    grad: Callable[[Tensor, float], Tensor]


def _sigmoid(u: Tensor, alpha: float) -> Tensor:
    e = torch.exp(-alpha * u.abs())
    return alpha * e / (1.0 + e) ** 2


_FORMULAS: tuple[tuple[str, float, Callable[[Tensor, float], Tensor]], ...] = (
    ("sigmoid", 4.0, _sigmoid),
    ("atan", 2.0, lambda u, a: 0.5 * a / (1.0 + (0.5 * math.pi * a * u) ** 2)),
    ("piecewise_quadratic", 1.0, lambda u, a: (a - a * a * u.abs()).clamp_min(0.0)),
    ("piecewise_exp", 1.0, lambda u, a: 0.5 * a * torch.exp(-a * u.abs())),
    ("soft_sign", 2.0, lambda u, a: 0.5 * a / (1.0 + a * u.abs()) ** 2),
    ("super_spike", 1.0, lambda u, a: a / (1.0 + u.abs()) ** 2),
    ("erf", 2.0, lambda u, a: a / math.sqrt(math.pi) * torch.exp(-((a * u) ** 2))),
    ("triangle", 1.0, lambda u, a: (1.0 - a * u.abs()).clamp_min(0.0)),
)

SURROGATES: dict[str, Surrogate] = {name: Surrogate(index, alpha, grad) for index, (name, alpha, grad) in enumerate(_FORMULAS)}
