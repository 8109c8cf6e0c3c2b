"""Dense products beside the spikes' own, by the faster of torch's ways."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ._density import product_dtype

_LARGE = 2**24  # multiplications
_ONEDNN = torch.backends.mkldnn.is_available()


def dense_product(x: Tensor, w: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """``x @ w + bias`` for x ``[..., K]`` and w ``[K, N]``, as ``dtype`` (default: that of ``x``).

    Large float32 ones on a CPU go to oneDNN as a convolution of one pixel: MKL, which ``torch.mm`` takes there, was measured
    to need 1.7 to 2.3 times as long on an AMD CPU with AVX-512 (small ones half as long).
    """
    dtype = x.dtype if dtype is None else dtype
    x = x.to(product_dtype(x))
    w, bias = w.to(x.dtype), None if bias is None else bias.to(x.dtype)
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32 and _ONEDNN
    if not on_cpu or x.numel() * w.shape[1] < _LARGE:
        return F.linear(x, w.t(), bias).to(dtype)
    pixels = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    y = F.conv2d(pixels, w.t()[:, :, None, None], bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], w.shape[1]).to(dtype)


def fused_product_pays(x: Tensor, columns: int, isa: str) -> bool:
    """Whether the C++ extension's product of x with ``columns`` columns is faster than :func:`dense_product`.

    Measured with AVX2: 1.15 to 1.3 times as fast where oneDNN's needs copies of x and y in float32, otherwise hardly faster.
    """
    return isa == "avx2" and product_dtype(x) != x.dtype and x.numel() * columns >= _LARGE


def conv2d_input_gradient(
    shape: tuple[int, int, int, int], w: Tensor, dy: Tensor, stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """The gradient of a convolution's input ``[B, C, H, W]``, channels last in memory, from dy ``[B, O, OH, OW]``.

    ``torch.nn.grad.conv2d_input`` would work, and answer, with channels first, and so copy twice; aten answers so for
    windows of one pixel.
    """
    w = w.to(dy.dtype).contiguous(memory_format=torch.channels_last)
    dy = dy.contiguous(memory_format=torch.channels_last)
    options = ([0], list(stride), list(padding), [1, 1], False, [0, 0], 1, (True, False, False))
    dx = torch.ops.aten.convolution_backward(dy, _absent(shape, dy), w, *options)[0]
    return dx.contiguous(memory_format=torch.channels_last)


def _absent(shape: tuple[int, int, int, int], dy: Tensor) -> Tensor:
    """An input of this shape that nobody reads. On a GPU it lies channels last: torch lays dy out as it, and back again."""
    if dy.device.type == "cpu":
        return dy.new_empty(1).expand(shape)
    _, channels, height, width = shape
    memory = dy if dy.numel() >= math.prod(shape) else dy.new_empty(math.prod(shape))
    return memory.as_strided(shape, (channels * height * width, 1, channels * width, channels))


def winograd_pays(w: Tensor, dy: Tensor, size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> bool:
    """Whether the C++ extension's Winograd makes this input gradient, and faster than oneDNN (which has bfloat16's own).

    Measured on AMD CPUs with AVX-512: it is as fast at 32 channels, 128 tiles of 4x4 pixels and three quarters of these
    inside the image, and twice as fast from 64 channels and 500 tiles on.
    """
    if product_dtype(dy) != torch.float32 or tuple(w.shape[2:]) != (3, 3) or tuple(stride) != (1, 1) or max(padding) > 2:
        return False
    tiles = dy.shape[0] * -(-size[0] // 4) * -(-size[1] // 4)
    return min(w.shape[:2]) >= 32 and tiles >= 128 and dy.shape[0] * size[0] * size[1] >= 12 * tiles
