"""Products of packed spikes with weights in Triton: the `triton` backend of ``ops.spike_conv2d`` and ``ops.spike_matmul``.

A matrix product is the 1x1 convolution of M images of one pixel: Triton folds every run-time argument that equals 1, so
its index arithmetic costs nothing. Rows are output pixels; a tap of the kernel names the input pixel of each.

Tensor cores multiply 16 bits. Spikes are exact in them, so other weights go as a few 16-bit floats that sum to them exactly:
float32 as three bfloat16, int16 as two, int8 as one.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikeclip.ops._device import device_of

from ._bits import dot, spread, spread_down, table, thirds, upper

PARTS = {torch.float32: 3, torch.float16: 1, torch.bfloat16: 1, torch.int16: 2, torch.int8: 1}
PROGRAMS = 512  # about four for each multiprocessor of a large GPU; a weight gradient's rows are split until there are as many
LAUNCH_LAY = {"BLOCK": 1024, "num_warps": 4}
LAUNCH_COLLECT = {"BC": 32, "BN": 32, "num_warps": 4}


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
def _lay(
    w_ptr, out_ptr, channels, taps, per_line, size, stride_tap, stride_k, stride_n, PARTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """w [taps, channels, n] -> [PARTS, n, taps, per_line]: itself, or bfloat16 that sum to it."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    line = at // per_line
    k = at - line * per_line
    column = line // taps
    w_at = (line - column * taps) * stride_tap + k * stride_k + column * stride_n
    w = tl.load(w_ptr + w_at, mask=mask & (k < channels), other=0)
    if PARTS == 3:
        high, middle, low = thirds(w)
        tl.store(out_ptr + at, high, mask=mask)
        tl.store(out_ptr + size + at, middle, mask=mask)
        tl.store(out_ptr + 2 * tl.cast(size, tl.int64) + at, low, mask=mask)
    elif PARTS == 2:
        value = w.to(tl.int32)
        high, _ = upper((value & -256).to(tl.float32))
        low, _ = upper((value & 255).to(tl.float32))
        tl.store(out_ptr + at, high, mask=mask)
        tl.store(out_ptr + size + at, low, mask=mask)
    elif w.dtype == tl.int8:
        whole, _ = upper(w.to(tl.float32))
        tl.store(out_ptr + at, whole, mask=mask)
    else:
        tl.store(out_ptr + at, w, mask=mask)


@triton.jit
def _collect(partial_ptr, dw_ptr, splits, taps, channels, n, BC: tl.constexpr, BN: tl.constexpr):
    """The sum of partial [splits, taps, channels, n] over splits, as [n, channels, taps]."""
    tiles = tl.cdiv(n, BN)
    channel = (tl.program_id(0) // tiles * BC + tl.arange(0, BC))[:, None]
    column = (tl.program_id(0) % tiles * BN + tl.arange(0, BN))[None, :]
    mask = (channel < channels) & (column < n)
    size = tl.cast(channels, tl.int64) * n
    for tap in range(taps):
        at = tap * size + channel * n + column
        total = tl.zeros((BC, BN), tl.float32)
        for _ in range(splits):
            total += tl.load(partial_ptr + at, mask=mask, other=0.0)
            at += taps * size
        tl.store(dw_ptr + (column * tl.cast(channels, tl.int64) + channel) * taps + tap, total, mask=mask)


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
def product(
    words_ptr, w_ptr, scale_ptr, bias_ptr, table_ptr, rows, rows_mask, columns, n, channels, per_row,
    height, width, out_height, out_width, kernel_width, stride_h, stride_w, pad_h, pad_w, taps,
    stride_part, stride_tap, stride_k, stride_n,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, PARTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """These rows and columns of the output, float32 [BM, BN], scaled and biased.

    Tensor cores drop what does not fit into a sum's 24 bits, so the parts of wide weights are summed for 32 J inputs at a
    time, and added as float32 is.
    """
    image, line, column = _place(rows, out_height, out_width)
    acc = tl.zeros((BM, BN), tl.float32)
    inner = tl.arange(0, 32 * J)
    w_inner = inner[:, None] * stride_k + columns[None, :] * stride_n
    blocks = (per_row + J - 1) // J
    for step in range(taps * blocks):
        tap = step // blocks
        block = step - tap * blocks
        pixel, inside = _source(image, line, column, tap, height, width, kernel_width, stride_h, stride_w, pad_h, pad_w)
        word = block * J + tl.arange(0, J)
        words_at = pixel.to(tl.int64)[:, None] * per_row + word[None, :]
        words = tl.load(words_ptr + words_at, mask=(inside & rows_mask)[:, None] & (word < per_row)[None, :], other=0)
        s = spread(words, table_ptr, w_ptr.dtype.element_ty)
        k = block * (32 * J)
        w_at = w_ptr + (tl.cast(tap, tl.int64) * stride_tap + tl.cast(k, tl.int64) * stride_k) + w_inner
        w_mask = (k + inner < channels)[:, None] & (columns < n)[None, :]
        if PARTS == 1:
            acc = dot(s, tl.load(w_at, mask=w_mask, other=0.0), acc, "ieee")
        else:
            part = tl.zeros((BM, BN), tl.float32)
            for i in tl.static_range(PARTS):
                w = tl.load(w_at + (PARTS - 1 - i) * tl.cast(stride_part, tl.int64), mask=w_mask, other=0.0)
                part = dot(s, w, part, "ieee")
            acc += part
    if HAS_SCALE:
        acc *= tl.load(scale_ptr + columns, mask=columns < n, other=0.0)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def _spike_product(
    words_ptr, w_ptr, scale_ptr, bias_ptr, table_ptr, y_ptr, m, n, channels, per_row,
    height, width, out_height, out_width, kernel_width, stride_h, stride_w, pad_h, pad_w, taps,
    stride_part, stride_tap, stride_k, stride_n,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, PARTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(n, BN)
    rows = tl.program_id(0) // tiles * BM + tl.arange(0, BM)
    columns = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    acc = product(
        words_ptr, w_ptr, scale_ptr, bias_ptr, table_ptr, rows, rows < m, columns, n, channels, per_row,
        height, width, out_height, out_width, kernel_width, stride_h, stride_w, pad_h, pad_w, taps,
        stride_part, stride_tap, stride_k, stride_n, HAS_SCALE, HAS_BIAS, PARTS, BM, BN, J,
    )  # fmt: skip
    y_at = rows.to(tl.int64)[:, None] * n + columns[None, :]
    tl.store(y_ptr + y_at, acc.to(y_ptr.dtype.element_ty), mask=(rows < m)[:, None] & (columns < n)[None, :])


@triton.jit
def _spike_product_dw(
    words_ptr, dy_ptr, dw_ptr, table_ptr, m, n, channels, per_row,
    height, width, out_height, out_width, kernel_width, stride_h, stride_w, pad_h, pad_w, taps, rows_each,
    J: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dw [splits, taps, channels, n] of dy [m, n]: a program owns 32 J channels of a tap and BN columns over rows_each rows."""
    tiles = tl.cdiv(n, BN)
    columns = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    tap = tl.program_id(0) // tiles % taps
    word = tl.program_id(0) // (tiles * taps) * J + tl.arange(0, J)
    begin = tl.program_id(1) * rows_each
    end = tl.minimum(begin + rows_each, m)
    acc = tl.zeros((32 * J, BN), tl.float32)
    for first in range(begin, end, BM):
        rows = first + tl.arange(0, BM)
        image, line, column = _place(rows, out_height, out_width)
        pixel, inside = _source(image, line, column, tap, height, width, kernel_width, stride_h, stride_w, pad_h, pad_w)
        words_at = (pixel.to(tl.int64) * per_row)[None, :] + word[:, None]
        words = tl.load(words_ptr + words_at, mask=(inside & (rows < end))[None, :] & (word < per_row)[:, None], other=0)
        dy_at = rows.to(tl.int64)[:, None] * n + columns[None, :]
        dy = tl.load(dy_ptr + dy_at, mask=(rows < end)[:, None] & (columns < n)[None, :], other=0.0)
        if dy.dtype == tl.float32:
            s = spread_down(words, table_ptr, tl.bfloat16)
            high, middle, low = thirds(dy)
            part = dot(s, low, tl.zeros((32 * J, BN), tl.float32), "ieee")
            acc += dot(s, high, dot(s, middle, part, "ieee"), "ieee")
        else:
            acc = dot(spread_down(words, table_ptr, dy.dtype), dy, acc, "ieee")
    channel = (tl.program_id(0) // (tiles * taps) * J * 32) + tl.arange(0, 32 * J)
    dw_row = (tl.program_id(1).to(tl.int64) * taps + tap) * channels + channel
    dw_mask = (channel < channels)[:, None] & (columns < n)[None, :]
    tl.store(dw_ptr + dw_row[:, None] * n + columns[None, :], acc, mask=dw_mask)


@functools.cache
def has_wgmma(device: torch.device) -> bool:
    """Whether four warps multiply together there (Hopper, Blackwell of data centres): tiles may be larger."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)


def launch_forward(parts: int, m: int, n: int, wgmma: bool) -> dict[str, int]:
    """Tile and warps of the product of m rows with n columns of weights in so many parts; no variant spills registers."""
    if m <= 64:
        return {"BM": 16, "BN": 32, "J": 2, "num_warps": 4, "num_stages": 3}
    if n <= 64 or m <= 2048 or (parts > 1 and not wgmma):
        return {"BM": 64, "BN": 32 if n <= 32 else 64, "J": 2, "num_warps": 4, "num_stages": 3}
    return {"BM": 128, "BN": 128, "J": 2, "num_warps": 4 if parts == 1 and wgmma else 8, "num_stages": 3}


def launch_gradient(dtype: torch.dtype, channels: int, n: int, wgmma: bool) -> dict[str, int]:
    """Tile and warps of a weight gradient of n columns: 32 J channels a program, BM rows a step."""
    columns, common = 32 if n <= 32 else 64 if n <= 64 else 128, {"num_stages": 3, "maxnreg": 255}
    if dtype != torch.float32:
        return {"J": 2, "BM": 64, "BN": columns, "num_warps": 4, **common}
    if channels <= 64:
        return {"J": 2, "BM": 32, "BN": min(columns, 64), "num_warps": 4, **common}
    return {"J": 4, "BM": 32, "BN": columns if wgmma else min(columns, 64), "num_warps": 8, **common}


def rows_each(m: int, tiles: int, step: int) -> int:
    """Rows per split of a weight gradient: as few splits as give PROGRAMS programs, whole steps each."""
    splits = triton.cdiv(PROGRAMS, tiles)
    return triton.cdiv(triton.cdiv(m, splits), step) * step


def check_rows(words: Tensor, m: int) -> int:
    most = max(m, words.shape[:-1].numel())
    if most >= 2**31 - 2**16:
        raise ValueError(f"at most 2^31 - 2^16 rows of spikes in one product; got {most}")
    return m


def _laid(w: Tensor, parts: int, dtype: torch.dtype, align: int) -> Tensor:
    """w [O, C, kh, kw] of any strides -> [parts, O, kh, kw, C], lines of channels a multiple of ``align`` apart."""
    n, channels, *kernel = w.shape
    out = w.new_empty((parts, n, *kernel, triton.cdiv(channels, align) * align), dtype=dtype)
    if out.numel():
        w, size = w.flatten(2), out[0].numel()
        with device_of(w):
            _lay[(triton.cdiv(size, LAUNCH_LAY["BLOCK"]),)](
                w, out, channels, w.shape[2], out.shape[-1], size, *w.stride()[::-1],
                PARTS=parts, enable_fp_fusion=False, **LAUNCH_LAY,
            )  # fmt: skip
    return out[..., :channels]


def channels_last(w: Tensor, dtype: torch.dtype) -> Tensor:
    """w [O, C, kh, kw] in ``dtype``, in memory channels last."""
    w = w.to(dtype)
    if w.is_contiguous(memory_format=torch.channels_last):
        return w
    return _laid(w, 1, dtype, 1)[0].permute(0, 3, 1, 2)


def tile(w: Tensor) -> Tensor:
    """What products read of w, [K, N] or [O, C, kh, kw]: 16-bit floats [parts, taps, channels, n] that sum to it.

    Of 16-bit matrices it is a view. Others have their channels side by side in memory and begin each tap's at a multiple of 16
    elements, where they are read fastest.
    """
    half = w.dtype in (torch.float16, torch.bfloat16)
    if half and w.dim() == 2:
        return w[None, None]
    w = w.t()[:, :, None, None] if w.dim() == 2 else w
    return _laid(w, PARTS[w.dtype], w.dtype if half else torch.bfloat16, 16).flatten(2, 3).permute(0, 2, 3, 1)


def forward(words, shape, channels, tiles, scale, bias, m, dtype):
    """words -> y [m, n] in ``dtype``; ``tiles`` as of :func:`tile`."""
    n = tiles.shape[3]
    y = words.new_empty((check_rows(words, m), n), dtype=dtype)
    if y.numel():
        launch = launch_forward(tiles.shape[0], m, n, has_wgmma(words.device))
        grid = (triton.cdiv(m, launch["BM"]) * triton.cdiv(n, launch["BN"]),)
        scale, bias = (words if x is None else x.contiguous() for x in (scale, bias))
        with device_of(words):
            _spike_product[grid](
                words, tiles, scale, bias, table(words.device), y, m, n, channels, words.shape[-1], *shape, *tiles.stride(),
                HAS_SCALE=scale is not words, HAS_BIAS=bias is not words, PARTS=tiles.shape[0], **launch,
            )  # fmt: skip
    return y


def gradient(words, shape, channels, dy):
    """words and dy [m, n] -> float32 [n, channels, taps]."""
    m, n = dy.shape
    dw = dy.new_empty((n, channels, shape.taps), dtype=torch.float32)
    if not (check_rows(words, m) and n and channels):
        return dw.zero_()
    dy = dy.contiguous()
    launch = launch_gradient(dy.dtype, channels, n, has_wgmma(words.device))
    tiles = shape.taps * triton.cdiv(words.shape[-1], launch["J"]) * triton.cdiv(n, launch["BN"])
    each = rows_each(m, tiles, launch["BM"])
    splits = triton.cdiv(m, each)
    partial = dy.new_empty((splits, shape.taps, channels, n), dtype=torch.float32)
    with device_of(words):
        _spike_product_dw[(tiles, splits)](
            words, dy, partial, table(words.device), m, n, channels, words.shape[-1], *shape, each, **launch
        )
        grid = (triton.cdiv(channels, LAUNCH_COLLECT["BC"]) * triton.cdiv(n, LAUNCH_COLLECT["BN"]),)
        _collect[grid](partial, dw, splits, shape.taps, channels, n, **LAUNCH_COLLECT)
    return dw


def spike_conv2d(
    words: Tensor, channels: int, w: Tensor, scale: Tensor | None, bias: Tensor | None,
    stride: tuple[int, int], padding: tuple[int, int], dtype: torch.dtype, tiles: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """words [B, H, W, ceil(channels / 32)], w [O, channels, kh, kw] -> [B, O, OH, OW] in ``dtype``, channels last in memory."""
    shape = geometry(words.shape[1:3], w.shape[2:], stride, padding)
    batch, n = words.shape[0], w.shape[0]
    pixels = batch * shape.out_height * shape.out_width
    y = forward(words.contiguous(), shape, channels, tile(w) if tiles is None else tiles, scale, bias, pixels, dtype)
    return y.view(batch, shape.out_height, shape.out_width, n).permute(0, 3, 1, 2)


def spike_conv2d_dw(
    words: Tensor, channels: int, dy: Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """The gradient of w, float32 [O, channels, kh, kw], from dy [B, O, OH, OW] of any strides."""
    shape = geometry(words.shape[1:3], kernel, stride, padding)
    n = dy.shape[1]
    return gradient(words.contiguous(), shape, channels, dy.permute(0, 2, 3, 1).reshape(-1, n)).view(n, channels, *kernel)
