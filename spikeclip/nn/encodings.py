"""Encodings of still values into time: ``[B, ...] -> [T, B, ...]``."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class _Encoding(nn.Module):
    def __init__(self, T: int):
        super().__init__()
        if isinstance(T, bool) or not isinstance(T, int) or T < 1:
            raise ValueError(f"T must be an integer >= 1 (time-steps); got {T!r}")
        self.T = T

    def extra_repr(self) -> str:
        return f"T={self.T}"


class DirectEncoding(_Encoding):
    """The same analog value at every step (the paper's encoding); a view, no copy: ``[B, ...] -> [T, B, ...]``.

    Images ``[B, C, H, W]`` with channels last in memory have a gradient that lies as they do.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
            return self._repeated(x.movedim(1, -1)).movedim(-1, 2)  # as [B, C, H, W] the steps' sum has channels first
        return self._repeated(x)

    def _repeated(self, x: Tensor) -> Tensor:
        return x.unsqueeze(0).expand(self.T, *x.shape)


class PoissonEncoding(_Encoding):
    """Rate code: at each step an independent spike with probability ``x``, in ``[0, 1]``; dtype of ``x``.

    ``generator`` in :meth:`forward` makes it repeatable. Raises ValueError for values outside [0, 1] or NaN.
    """

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        _check_unit_range(x)
        noise = torch.rand((self.T, *x.shape), dtype=torch.float32, device=x.device, generator=generator)
        return (noise < x).to(x.dtype)


class LatencyEncoding(_Encoding):
    """Time-to-first-spike code: one spike per value, at step ``round((T - 1) * (1 - x))``: the larger the earlier.

    The linear latency code of SpikingJelly's ``LatencyEncoder``; values in ``[0, 1]``, dtype of ``x``. Raises ValueError for
    values outside [0, 1] or NaN.
    """

    def forward(self, x: Tensor) -> Tensor:
        _check_unit_range(x)
        step = torch.round((self.T - 1) * (1.0 - x.float())).long()
        steps = torch.arange(self.T, device=x.device).view(self.T, *[1] * x.dim())
        return (steps == step).to(x.dtype)


def _check_unit_range(x: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"x must be floating, with values in [0, 1]; got {x.dtype}")
    if x.numel() and not bool(((x >= 0) & (x <= 1)).all()):
        raise ValueError(f"x must have values in [0, 1]; got {x.min().item()} to {x.max().item()}")
