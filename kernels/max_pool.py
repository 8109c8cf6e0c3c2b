"""Max-pool before the neurons in Triton: the `triton` backend of ``ops.max_pool``, the pool of ``ops.bn_lif``.

Images arrive as dense ``[images, height, width, channels]``. A thread owns 16 bytes of neighbouring channels of one pixel: of
the smaller image, whose window it reads, or backward of the larger one, whose gradient it gathers from the windows it lies in.
"""

import torch
import triton
import triton.language as tl

from spikeclip.ops._device import device_of
from spikeclip.ops.reference.max_pool import pooled_size

LAUNCH = {"BLOCK": 128, "num_warps": 4}  # groups of VECTOR channels a program, one a thread
MOST_UNROLLED = tl.constexpr(9)
NARROW = 2**30  # elements; offsets into more are 64 bits wide


@triton.jit
def _place(total, groups, channels, height, width, INDEX: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """(A program's images, rows, columns and flat indices of their pixels' first channels [BLOCK], channels [BLOCK, VECTOR],
    a mask of the groups [BLOCK, 1] and one of the channels).
    """
    group = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    pixel = group // groups
    line = pixel // width
    image = line // height
    channel = ((group - pixel * groups) * VECTOR)[:, None] + tl.arange(0, VECTOR)[None, :]
    row, column = line - image * height, pixel - line * width
    return image, row, column, pixel * channels, channel, (group < total)[:, None], channel < channels


@triton.jit
def _max_pool_fwd(
    x_ptr, scale_ptr, values_ptr, index_ptr, total, groups, channels, height, width, out_height, out_width,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, INDEX: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    image, row, column, out, channel, exists, inside = _place(
        total, groups, channels, out_height, out_width, INDEX, VECTOR, BLOCK
    )
    mask = exists & inside
    sign = tl.where(tl.load(scale_ptr + channel, mask=mask, other=0.0) < 0.0, -1.0, 1.0)
    lowest = (sign * float("-inf")).to(x_ptr.dtype.element_ty)
    top, left = row * STRIDE - PADDING, column * STRIDE - PADDING
    at = (((image * height + top) * width + left) * channels)[:, None] + channel
    best = tl.full((BLOCK, VECTOR), float("-inf"), tl.float32)
    number = (tl.maximum(-top, 0) * SIZE + tl.maximum(-left, 0)).to(tl.int32)[:, None] + tl.zeros((BLOCK, VECTOR), tl.int32)
    PLACES: tl.constexpr = SIZE * SIZE
    UNROLL: tl.constexpr = min(PLACES, MOST_UNROLLED)
    for place in tl.range(PLACES, loop_unroll_factor=UNROLL):
        i, j = place // SIZE, place % SIZE
        here = mask
        if PADDING > 0:
            here &= ((top + i >= 0) & (top + i < height) & (left + j >= 0) & (left + j < width))[:, None]
        x = tl.load(x_ptr + at + (i * width + j) * channels, mask=here, other=lowest).to(tl.float32) * sign
        larger = (x > best) | (x != x)  # as torch: of equals the first, of NaN the last
        best = tl.where(larger, x, best)
        number = tl.where(larger, place, number)
    tl.store(values_ptr + out[:, None] + channel, (best * sign).to(values_ptr.dtype.element_ty), mask=mask)
    tl.store(index_ptr + out[:, None] + channel, number.to(tl.uint8), mask=mask)


@triton.jit
def _max_pool_bwd(
    dvalues_ptr, index_ptr, x_ptr, factors_ptr, dx_ptr, total, groups, channels, height, width, out_height, out_width,
    HAS_FACTORS: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, INDEX: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image, row, column, at, channel, exists, inside = _place(total, groups, channels, height, width, INDEX, VECTOR, BLOCK)
    mask = exists & inside
    at = at[:, None] + channel
    if HAS_FACTORS:
        b = tl.load(factors_ptr + channel, mask=mask, other=0.0)
        c = tl.load(factors_ptr + channels + channel, mask=mask, other=0.0)
        rest = b * tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) + c
    WINDOWS: tl.constexpr = (SIZE + STRIDE - 1) // STRIDE  # a pixel lies in, at most, each way
    first_row, first_column = (row + PADDING) // STRIDE - (WINDOWS - 1), (column + PADDING) // STRIDE - (WINDOWS - 1)
    down, right = row + PADDING - first_row * STRIDE, column + PADDING - first_column * STRIDE
    start = (((image * out_height + first_row) * out_width + first_column) * channels)[:, None] + channel
    dx = tl.zeros((BLOCK, VECTOR), tl.float32)
    ALL: tl.constexpr = WINDOWS * WINDOWS
    UNROLL: tl.constexpr = min(ALL, MOST_UNROLLED)
    for near in tl.range(ALL, loop_unroll_factor=UNROLL):
        i, j = near // WINDOWS, near % WINDOWS
        y, x = down - i * STRIDE, right - j * STRIDE  # the pixel's place in the window
        covers = (y < SIZE) & (first_row + i >= 0) & (first_row + i < out_height)
        covers &= (x < SIZE) & (first_column + j >= 0) & (first_column + j < out_width)
        here = mask & covers[:, None]
        window = start + (i * out_width + j) * channels
        picked = tl.load(index_ptr + window, mask=here, other=255).to(tl.int32) == (y * SIZE + x)[:, None]
        dx += tl.where(picked, tl.load(dvalues_ptr + window, mask=here, other=0.0).to(tl.float32), 0.0)
    if HAS_FACTORS:
        dx += rest
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def _launch(kernel, tensors, x, values, backward, window, **constants) -> None:
    channels, vector = x.shape[-1], 16 // x.element_size()
    groups = triton.cdiv(channels, vector)
    total = (x if backward else values).numel() // channels * groups
    index = tl.int64 if max(x.numel(), values.numel()) > NARROW else tl.int32
    with device_of(x):
        kernel[(triton.cdiv(total, LAUNCH["BLOCK"]),)](
            *tensors, total, groups, channels, *x.shape[2:4], *values.shape[2:4], SIZE=window[0], STRIDE=window[1],
            PADDING=window[2], INDEX=index, VECTOR=vector, **constants, enable_fp_fusion=False, **LAUNCH,
        )  # fmt: skip


def max_pool(x, scale, window):
    values = x.new_empty((*x.shape[:2], *pooled_size(x.shape[2:4], window), x.shape[-1]))
    index = torch.empty_like(values, dtype=torch.uint8)
    if values.numel():
        _launch(_max_pool_fwd, (x, scale, values, index), x, values, False, window)
    return values, index


def max_pool_bwd(dvalues, index, x, factors, window):
    dx = torch.empty_like(x)
    if dx.numel():
        tensors = (dvalues, index, x, x if factors is None else factors, dx)
        _launch(_max_pool_bwd, tensors, x, dvalues, True, window, HAS_FACTORS=factors is not None)
    return dx
