"""Products of packed spikes with weights in Triton: the `triton` backend of ``ops.spike_conv2d`` and ``ops.spike_matmul``.

A matrix product is the 1x1 convolution of M images of one pixel: Triton folds every run-time argument that equals 1, so
its index arithmetic costs nothing. Rows are output pixels; a tap of the kernel names the input pixel of each.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._bits import alive, dot, expand, expand_down, first, merge

# What a product with weights of a dtype is made in; integers as floats that hold them exactly.
COMPUTE = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.int16: tl.float32,
    torch.int8: tl.float16,
}
LINES = tl.constexpr(16)  # words of a row that are looked at together for spikes
PROGRAMS = 256  # about two for each multiprocessor of a large GPU; a weight gradient's rows are split until there are as many


class Geometry(NamedTuple):
    """Of a convolution; its fields are the kernels' arguments of the same names."""

    height: int
    width: int
    out_height: int
    out_width: int
    kernel_width: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    taps: int


def geometry(size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> Geometry:
    out = [(size[i] + 2 * padding[i] - kernel[i]) // stride[i] + 1 for i in range(2)]
    return Geometry(*size, *out, kernel[1], *stride, *padding, kernel[0] * kernel[1])


ONE_PIXEL = geometry((1, 1), (1, 1), (1, 1), (0, 0))


@triton.jit
def _place(rows, out_height, out_width):
    """Output pixels -> (image, line, column)."""
    line = rows // out_width
    image = line // out_height
    return image, line - image * out_height, rows - line * out_width


@triton.jit
def _source(image, line, column, tap, height, width, kernel_width, stride_h, stride_w, pad_h, pad_w):
    """The input pixels that a tap of these output pixels reads, and whether they lie inside the image."""
    y = line * stride_h - pad_h + tap // kernel_width
    x = column * stride_w - pad_w + tap % kernel_width
    return (image * height + y) * width + x, (y >= 0) & (y < height) & (x >= 0) & (x < width)


@triton.jit
def _accumulate(
    acc, words_ptr, pixel, pixel_mask, per_row, w_ptr, length, columns_mask, stride_k, stride_n,
    COMPUTE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """acc [BM, BN] + S W, S the words of BM pixels, W [length, BN] at w_ptr."""
    w_at = tl.arange(0, BK)[:, None] * stride_k + tl.arange(0, BN)[None, :] * stride_n
    for chunk in range(0, per_row, LINES):
        word = chunk + tl.arange(0, LINES)
        mask = pixel_mask[:, None] & (word < per_row)[None, :]
        block = tl.load(words_ptr + pixel.to(tl.int64)[:, None] * per_row + word[None, :], mask=mask, other=0)
        left, some = alive(block, 0)
        for _ in range(some):
            j, left = first(left)
            words = tl.load(words_ptr + pixel.to(tl.int64) * per_row + chunk + j, mask=pixel_mask, other=0)
            for part in tl.static_range(32 // BK):
                k = (chunk + j) * 32 + part * BK
                w_mask = (k + tl.arange(0, BK) < length)[:, None] & columns_mask[None, :]
                w = tl.load(w_ptr + k.to(tl.int64) * stride_k + w_at, mask=w_mask, other=0)
                acc = dot(expand((words >> part * BK)[:, None], BK, COMPUTE), w.to(COMPUTE), acc, "ieee")
    return acc


@triton.jit
def product(
    words_ptr, w_ptr, scale_ptr, bias_ptr, rows, m, columns, n, channels, per_row,
    height, width, out_height, out_width, kernel_width, stride_h, stride_w, pad_h, pad_w, taps, stride_tap, stride_k, stride_n,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, COMPUTE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """These rows and columns of the output, float32 [BM, BN], scaled and biased; w_ptr is at the first column."""
    image, line, column = _place(rows, out_height, out_width)
    acc = tl.zeros((BM, BN), tl.float32)
    for tap in range(taps):
        pixel, inside = _source(image, line, column, tap, height, width, kernel_width, stride_h, stride_w, pad_h, pad_w)
        acc = _accumulate(
            acc, words_ptr, pixel, inside & (rows < m), per_row, w_ptr, channels, columns < n, stride_k, stride_n,
            COMPUTE, BN, BK,
        )  # fmt: skip
        w_ptr += stride_tap
    if HAS_SCALE:
        acc *= tl.load(scale_ptr + columns, mask=columns < n, other=0.0)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def _fwd(
    words_ptr, w_ptr, scale_ptr, bias_ptr, y_ptr, m, n, channels, per_row,
    height, width, out_height, out_width, kernel_width, stride_h, stride_w, pad_h, pad_w, taps, stride_tap, stride_k, stride_n,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, COMPUTE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(n, BN)
    rows = tl.program_id(0) // tiles * BM + tl.arange(0, BM)
    start = tl.program_id(0) % tiles * BN
    columns = start + tl.arange(0, BN)
    w_ptr += start.to(tl.int64) * stride_n
    acc = product(
        words_ptr, w_ptr, scale_ptr, bias_ptr, rows, m, columns, n, channels, per_row, height, width, out_height, out_width,
        kernel_width, stride_h, stride_w, pad_h, pad_w, taps, stride_tap, stride_k, stride_n,
        HAS_SCALE, HAS_BIAS, COMPUTE, BM, BN, BK,
    )  # fmt: skip
    y_at = rows.to(tl.int64)[:, None] * n + columns[None, :]
    tl.store(y_ptr + y_at, acc.to(y_ptr.dtype.element_ty), mask=(rows < m)[:, None] & (columns < n)[None, :])


@triton.jit
def _dw(
    words_ptr, dy_ptr, dw_ptr, m, n, channels, per_row,
    height, width, out_height, out_width, kernel_width, stride_h, stride_w, pad_h, pad_w, taps,
    stride_image, stride_line, stride_column, stride_n, rows_each,
    J: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dw [splits, taps, channels, n]: a program owns 32 J channels of one tap and BN columns, over rows_each rows."""
    tiles = tl.cdiv(n, BN)
    start = tl.program_id(0) % tiles * BN
    columns = start + tl.arange(0, BN)
    tap = tl.program_id(0) // tiles % taps
    word = tl.program_id(0) // (tiles * taps) * J + tl.arange(0, J)
    word_mask = (word < per_row)[:, None]
    dy_ptr += start.to(tl.int64) * stride_n
    dy_columns = tl.arange(0, BN)[None, :] * stride_n
    begin = tl.program_id(1) * rows_each
    end = tl.minimum(begin + rows_each, m)
    acc = tl.zeros((32 * J, BN), tl.float32)
    for chunk in range(begin, end, 32 * BM):
        every = chunk + tl.arange(0, 32 * BM)
        images, lines, places = _place(every, out_height, out_width)
        pixels, within = _source(images, lines, places, tap, height, width, kernel_width, stride_h, stride_w, pad_h, pad_w)
        block_mask = (within & (every < end))[None, :] & word_mask
        block = tl.load(words_ptr + (pixels.to(tl.int64) * per_row)[None, :] + word[:, None], mask=block_mask, other=0)
        left, some = alive(tl.reshape(tl.reduce(block, 0, merge), (32, BM)), 1)
        for _ in range(some):
            i, left = first(left)
            rows = chunk + i * BM + tl.arange(0, BM)
            image, line, column = _place(rows, out_height, out_width)
            pixel, inside = _source(image, line, column, tap, height, width, kernel_width, stride_h, stride_w, pad_h, pad_w)
            rows_mask = inside & (rows < end)
            words_at = (pixel.to(tl.int64) * per_row)[None, :] + word[:, None]
            words = tl.load(words_ptr + words_at, mask=rows_mask[None, :] & word_mask, other=0)
            dy_at = image.to(tl.int64) * stride_image + line.to(tl.int64) * stride_line + column.to(tl.int64) * stride_column
            dy_mask = rows_mask[:, None] & (columns < n)[None, :]
            dy = tl.load(dy_ptr + dy_at[:, None] + dy_columns, mask=dy_mask, other=0.0)
            acc = dot(expand_down(words, dy_ptr.dtype.element_ty), dy, acc, "ieee")
    channel = (tl.program_id(0) // (tiles * taps) * J * 32) + tl.arange(0, 32 * J)
    dw_row = (tl.program_id(1).to(tl.int64) * taps + tap) * channels + channel
    dw_mask = (channel < channels)[:, None] & (columns < n)[None, :]
    tl.store(dw_ptr + dw_row[:, None] * n + columns[None, :], acc, mask=dw_mask)


def launch_forward(dtype: torch.dtype, m: int, n: int) -> dict[str, int]:
    """Tile and warps of the product of m rows with n columns of weights; chosen so that no variant spills registers."""
    if COMPUTE[dtype] == tl.float32:
        if m <= 16:
            return {"BM": 16, "BN": 32, "BK": 32, "num_warps": 4, "num_stages": 1}
        if dtype == torch.int16:
            return {"BM": 64, "BN": 64, "BK": 16, "num_warps": 8, "num_stages": 1}
        return {"BM": 128, "BN": 64, "BK": 16, "num_warps": 8, "num_stages": 2}
    if m <= 16:
        return {"BM": 16, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 2}
    return {"BM": 64, "BN": 32 if n <= 32 else 64 if n <= 64 else 128, "BK": 32, "num_warps": 4, "num_stages": 3}


def launch_gradient(dtype: torch.dtype, n: int) -> dict[str, int]:
    """Tile and warps of a weight gradient of n columns: 32 J channels a program, BM rows a step."""
    return {"J": 2, "BM": 32, "BN": 32 if n <= 32 else 64, "num_warps": 4, "num_stages": 2 if dtype == torch.float32 else 3}


def rows_each(m: int, tiles: int, step: int) -> int:
    """Rows per split of a weight gradient: as few splits as give PROGRAMS programs, whole steps each."""
    splits = triton.cdiv(PROGRAMS, tiles)
    return triton.cdiv(triton.cdiv(m, splits), step) * step


def check_rows(words: Tensor, m: int) -> int:
    most = max(m, words.shape[:-1].numel())
    if most >= 2**31 - 2**16:
        raise ValueError(f"at most 2^31 - 2^16 rows of spikes in one product; got {most}")
    return m


def forward(words, shape, channels, w, strides, scale, bias, n, m, dtype):
    """words -> y [m, n] in ``dtype``; w by its strides of tap, channel and column."""
    y = words.new_empty((check_rows(words, m), n), dtype=dtype)
    if y.numel():
        launch = launch_forward(w.dtype, m, n)
        grid = (triton.cdiv(m, launch["BM"]) * triton.cdiv(n, launch["BN"]),)
        scale, bias = (words if x is None else x.contiguous() for x in (scale, bias))
        with torch.cuda.device(words.device if words.is_cuda else -1):
            _fwd[grid](
                words, w, scale, bias, y, m, n, channels, words.shape[-1], *shape, *strides,
                HAS_SCALE=scale is not words, HAS_BIAS=bias is not words, COMPUTE=COMPUTE[w.dtype], **launch,
            )  # fmt: skip
    return y


def gradient(words, shape, channels, dy, strides, n, m):
    """words and dy, by its strides of image, line, pixel and column -> float32 [taps, channels, n]."""
    if not (check_rows(words, m) and n and channels):
        return dy.new_zeros((shape.taps, channels, n), dtype=torch.float32)
    launch = launch_gradient(dy.dtype, n)
    tiles = shape.taps * triton.cdiv(words.shape[-1], launch["J"]) * triton.cdiv(n, launch["BN"])
    each = rows_each(m, tiles, 32 * launch["BM"])
    dw = dy.new_empty((triton.cdiv(m, each), shape.taps, channels, n), dtype=torch.float32)
    with torch.cuda.device(words.device if words.is_cuda else -1):
        _dw[(tiles, dw.shape[0])](words, dy, dw, m, n, channels, words.shape[-1], *shape, *strides, each, **launch)
    return dw[0] if dw.shape[0] == 1 else dw.sum(0)


def spike_conv2d(
    words: Tensor, channels: int, w: Tensor, scale: Tensor | None, bias: Tensor | None,
    stride: tuple[int, int], padding: tuple[int, int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """words [B, H, W, ceil(channels / 32)], w [O, channels, kh, kw] -> [B, O, OH, OW] in ``dtype``, channels last in memory."""
    shape = geometry(words.shape[1:3], w.shape[2:], stride, padding)
    batch, n = words.shape[0], w.shape[0]
    w = w.permute(2, 3, 1, 0).contiguous()  # so that a tile of it is read in whole lines
    strides = (channels * n, n, 1)
    pixels = batch * shape.out_height * shape.out_width
    y = forward(words.contiguous(), shape, channels, w, strides, scale, bias, n, pixels, dtype)
    return y.view(batch, shape.out_height, shape.out_width, n).permute(0, 3, 1, 2)


def spike_conv2d_dw(
    words: Tensor, channels: int, dy: Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """The gradient of w, float32 [O, channels, kh, kw], from dy [B, O, OH, OW] of any strides."""
    shape = geometry(words.shape[1:3], kernel, stride, padding)
    batch, n, *size = dy.shape
    image, column, line, pixel = dy.stride()
    dw = gradient(words.contiguous(), shape, channels, dy, (image, line, pixel, column), n, batch * size[0] * size[1])
    return dw.view(*kernel, channels, n).permute(3, 2, 0, 1).contiguous()
