"""Convolutions of spikes in plain torch: unpack, then convolve densely."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dtypes import compute_dtype
from .pack import unpack


def _images(words: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    return unpack(words, channels, dtype).permute(0, 3, 1, 2)


def spike_conv2d(
    words: Tensor,
    channels: int,
    w: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """words [B, H, W, ceil(channels / 32)], w [O, channels, kh, kw] -> [B, O, OH, OW] in ``dtype``, channels last in memory.

    Integer ``w`` comes with ``scale`` [O], its channels' unit; ``bias`` [O] or None.
    """
    w = w if scale is None else w.float()
    images = _images(words, channels, w.dtype)
    if not channels:  # conv2d would give its output no channels either
        images, w = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 1)) for x in (images, w))
    y = torch.nn.functional.conv2d(images, w, None, stride, padding)
    y = y if scale is None else y * scale.view(-1, 1, 1)
    y = y if bias is None else y + bias.to(y.dtype).view(-1, 1, 1)
    return y.to(dtype).contiguous(memory_format=torch.channels_last)


def spike_conv2d_dw(
    words: Tensor, channels: int, dy: Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """The gradient of w [O, channels, kh, kw], float32 (float64 for float64 dy), from dy [B, O, OH, OW]."""
    s = _images(words, channels, dy.dtype)
    dw = torch.nn.grad.conv2d_weight(s, (dy.shape[1], channels, *kernel), dy, stride, padding)
    return dw.to(compute_dtype(dy)).contiguous()
