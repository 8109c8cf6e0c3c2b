"""Products of packed spikes with matrices in Triton: the `triton` backend of ``ops.spike_matmul``."""

import torch
from torch import Tensor

from .spike_conv2d import ONE_PIXEL, forward, gradient, tile


def spike_matmul(
    words: Tensor,
    length: int,
    w: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    tiles: Tensor | None = None,
) -> Tensor:
    """words [M, ceil(length / 32)], w [length, N] of any strides -> [M, N] in ``dtype``.

    Integer ``w`` comes with ``scale`` [N], float32; ``bias`` [N], floating, or None.
    """
    return forward(words.contiguous(), ONE_PIXEL, length, tile(w) if tiles is None else tiles, scale, bias, len(words), dtype)


def spike_matmul_dw(words: Tensor, length: int, dy: Tensor) -> Tensor:
    """The gradient of w, float32 [length, N], from dy [M, N] of any strides."""
    return gradient(words.contiguous(), ONE_PIXEL, length, dy)[..., 0].t()
