"""Max-pool between BatchNorm and LIF in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

Window = tuple[int, int, int]


def pooled_size(size: tuple[int, int], window: Window) -> tuple[int, int]:
    """Height and width of what a max-pool of (size, stride, padding) leaves."""
    extent, stride, padding = window
    return tuple((n + 2 * padding - extent) // stride + 1 for n in size)


def max_pool(x: Tensor, scale: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """x [T, B, H, W, C] -> what a max-pool of x * scale would pick of x, and each one's number in its window, uint8."""
    sign = torch.where(scale < 0, -1.0, 1.0).to(x.dtype)
    values, flat = F.max_pool2d(_images(x * sign), *window, return_indices=True)
    row, column = flat // x.shape[3], flat % x.shape[3]
    index = (row - _first(flat, window, 2)) * window[0] + column - _first(flat, window, 3)
    return _steps(values, x) * sign, _steps(index.to(torch.uint8), x)


def max_pool_bwd(dvalues: Tensor, index: Tensor, x: Tensor, factors: Tensor | None, window: Window) -> Tensor:
    """Each gradient back to where its value came from; with ``factors`` [2, C], b and c, added to b x + c."""
    size, stride, padding = window
    place = _images(index).long()
    row, column = place // size + _first(place, window, 2), place % size + _first(place, window, 3)
    dx = torch.ops.aten.max_pool2d_with_indices_backward(
        _images(dvalues), _images(x), [size] * 2, [stride] * 2, [padding] * 2, [1, 1], False, row * x.shape[3] + column
    )
    dx = _steps(dx, x)
    return dx if factors is None else (dx + (factors[0] * x + factors[1])).to(x.dtype)


def _first(images: Tensor, window: Window, dim: int) -> Tensor:
    """Along ``dim``, where each window begins, to be broadcast over ``images``."""
    _, stride, padding = window
    shape = [1] * images.dim()
    shape[dim] = -1
    return (torch.arange(images.shape[dim], device=images.device) * stride - padding).view(shape)


def _images(x: Tensor) -> Tensor:
    return x.flatten(0, 1).permute(0, 3, 1, 2)


def _steps(images: Tensor, x: Tensor) -> Tensor:
    return images.permute(0, 2, 3, 1).unflatten(0, x.shape[:2]).contiguous()
