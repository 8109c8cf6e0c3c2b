"""Products of spikes with weights in plain torch: unpack, then multiply densely."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dtypes import compute_dtype
from .pack import unpack


def spike_matmul(
    words: Tensor, length: int, w: Tensor, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """words [M, ceil(length / 32)], w [length, N] -> [M, N] in ``dtype``.

    Integer ``w`` comes with ``scale`` [N], its columns' unit; ``bias`` [N] or None.
    """
    w = w if scale is None else w.float()
    y = unpack(words, length, w.dtype) @ w
    y = y if scale is None else y * scale
    return (y if bias is None else y + bias.to(y.dtype)).to(dtype)


def spike_matmul_dw(words: Tensor, length: int, dy: Tensor) -> Tensor:
    """The gradient of w [length, N], float32 (float64 for float64 dy), from dy [M, N]."""
    return (unpack(words, length, dy.dtype).mT @ dy).to(compute_dtype(dy))
