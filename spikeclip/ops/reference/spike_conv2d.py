"""Convolutions of spikes in plain torch: unpack, then convolve densely."""

from __future__ import annotations

import torch
from torch import Tensor

from .pack import unpack


def _images(words: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    return unpack(words, channels, dtype).permute(0, 3, 1, 2)


def _zeros(images: Tensor, w: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    sizes = zip(images.shape[2:], w.shape[2:], stride, padding, strict=True)
    return images.new_zeros(len(images), len(w), *((n + 2 * p - k) // step + 1 for n, k, step, p in sizes))


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
    # Without channels conv2d gives its output no channels either.
    y = torch.nn.functional.conv2d(images, w, None, stride, padding) if channels else _zeros(images, w, stride, padding)
    y = y if scale is None else y * scale.view(-1, 1, 1)
    y = y if bias is None else y + bias.to(y.dtype).view(-1, 1, 1)
    return y.to(dtype).contiguous(memory_format=torch.channels_last)


def spike_conv2d_dw(
    words: Tensor, channels: int, dy: Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """The gradient of w [O, channels, kh, kw], float32 (float64 for float64 dy), from dy [B, O, OH, OW]."""
    s = _images(words, channels, dy.dtype)
    dw = torch.nn.grad.conv2d_weight(s, (dy.shape[1], channels, *kernel), dy, stride, padding).contiguous()
    return dw if dw.dtype == torch.float64 else dw.float()
