"""Softmax-free attention on packed spikes in Triton: the `triton` backend of ``ops.spike_attention``.

A head is a range of bits of a packed row, at any bit: rows of q, of k and of v, or of all three side by side, ``apart`` bits
from one to the next. Products of spikes are small integers, so their sums are exact in any order. Where a head's matrices fit
into registers, a program owns rows of one head of one sequence, backward all of them; a matrix of tokens by tokens exists only
as a tile there.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikeclip.ops._device import device_of
from spikeclip.ops._side_by_side import gradients, parts

from ._bits import dot, expand, expand_down, upper

EXACT_IN_FLOAT16 = 2048  # every integer up to it
WIDEST = 64  # head, in channels, whose square matrices a program holds
PROGRAMS = 512  # about four for each multiprocessor of a large GPU


@triton.jit
def _cut(low, high, start, j, width):
    """Words j of the ``width`` bits from bit ``start`` of a row, out of the words there and the words after those."""
    shift = (start % 32).to(tl.uint32)
    left = tl.minimum(tl.maximum(width - 32 * j, 0), 32)
    keep = tl.where(left == 32, -1, (1 << (left % 32)) - 1)
    words = (low.to(tl.uint32, bitcast=True) >> shift) | ((high.to(tl.uint32, bitcast=True) << 1) << (31 - shift))
    return words.to(tl.int32, bitcast=True) & keep


@triton.jit
def _rows(words_ptr, row, rows, per_row, start, width, J: tl.constexpr):
    """[R, J] words of the ``width`` bits from bit ``start`` of rows [R] of one sequence."""
    j = tl.arange(0, J)[None, :]
    word = start // 32 + j
    at = words_ptr + row.to(tl.int64)[:, None] * per_row + word
    inside = (row < rows)[:, None]
    low = tl.load(at, mask=inside & (word < per_row), other=0)
    return _cut(low, tl.load(at + 1, mask=inside & (word + 1 < per_row), other=0), start, j, width)


@triton.jit
def _rows_down(words_ptr, row, rows, per_row, start, width, J: tl.constexpr):
    """The transpose of :func:`_rows`, [J, R]."""
    j = tl.arange(0, J)[:, None]
    word = start // 32 + j
    at = words_ptr + row.to(tl.int64)[None, :] * per_row + word
    inside = (row < rows)[None, :]
    low = tl.load(at, mask=inside & (word < per_row), other=0)
    return _cut(low, tl.load(at + 1, mask=inside & (word + 1 < per_row), other=0), start, j, width)


@triton.jit
def _store_head(y_ptr, acc, sequence, row, rows, y_row, start, column, width):
    at = (sequence * rows + row)[:, None] * y_row + (start + column)[None, :]
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (column < width)[None, :])


@triton.jit
def _head(x_ptr, sequence, row, rows, channels, start, column, width):
    """[R, columns] dense values of one head."""
    at = (sequence * rows + row)[:, None] * channels + (start + column)[None, :]
    return tl.load(x_ptr + at, mask=(row < rows)[:, None] & (column < width)[None, :], other=0.0)


@triton.jit
def _attention_direct(
    q_ptr, k_ptr, v_ptr, y_ptr, n, s, channels, per_row, apart, heads, width, scale,
    J: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """(q k^T) v, whose inner product must be exact in float16."""
    sequence = (tl.program_id(0) // heads).to(tl.int64)
    start = tl.program_id(0) % heads * width
    k_start, v_start = start + apart, start + 2 * apart
    tiles = tl.cdiv(width, 32 * J)
    row = tl.program_id(1) // tiles * BN + tl.arange(0, BN)
    first = tl.program_id(1) % tiles * 32 * J
    q_ptr += sequence * n * per_row
    k_ptr += sequence * s * per_row
    v_ptr += sequence * s * per_row
    acc = tl.zeros((BN, 32 * J), tl.float32)
    for token in range(0, s, BS):
        others = token + tl.arange(0, BS)
        scores = tl.zeros((BN, BS), tl.float32)
        for i in range(0, width, 32 * J):
            q = expand(_rows(q_ptr, row, n, per_row, start + i, width - i, J), tl.float16)
            k = expand_down(_rows_down(k_ptr, others, s, per_row, k_start + i, width - i, J), tl.float16)
            scores = dot(q, k, scores, "ieee")
        v = expand(_rows(v_ptr, others, s, per_row, v_start + first, width - first, J), tl.float16)
        acc = dot(scores.to(tl.float16), v, acc, "ieee")
    _store_head(y_ptr, acc * scale, sequence, row, n, channels, start, first + tl.arange(0, 32 * J), width)


@triton.jit
def _attention(
    q_ptr, k_ptr, v_ptr, y_ptr, n, s, channels, per_row, apart, heads, width, rows_each, scale,
    J: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """q (k^T v) for rows_each rows of a head of at most 32 J channels; k^T v must be exact in float16."""
    sequence = (tl.program_id(0) // heads).to(tl.int64)
    start = tl.program_id(0) % heads * width
    k_start, v_start = start + apart, start + 2 * apart
    q_ptr += sequence * n * per_row
    k_ptr += sequence * s * per_row
    v_ptr += sequence * s * per_row
    kv = tl.zeros((32 * J, 32 * J), tl.float32)
    for token in range(0, s, BS):
        others = token + tl.arange(0, BS)
        k = expand_down(_rows_down(k_ptr, others, s, per_row, k_start, width, J), tl.float16)
        v = expand(_rows(v_ptr, others, s, per_row, v_start, width, J), tl.float16)
        kv = dot(k, v, kv, "ieee")
    operand = kv.to(tl.float16)
    begin = tl.program_id(1) * rows_each
    for first in range(begin, tl.minimum(begin + rows_each, n), BN):
        row = first + tl.arange(0, BN)
        q = expand(_rows(q_ptr, row, n, per_row, start, width, J), tl.float16)
        y = dot(q, operand, tl.zeros((BN, 32 * J), tl.float32), "ieee") * scale
        _store_head(y_ptr, y, sequence, row, n, channels, start, tl.arange(0, 32 * J), width)


@triton.jit
def _attention_bwd(
    dy_ptr, q_ptr, k_ptr, v_ptr, dq_ptr, dk_ptr, dv_ptr, n, s, channels, y_row, per_row, apart, heads, width, scale,
    J: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """All gradients of a head of at most 32 J channels from a 16-bit dy; v^T k must be exact in float16.

    What is no integer goes on as two bfloat16, of which a 16-bit result shows no more.
    """
    sequence = (tl.program_id(0) // heads).to(tl.int64)
    start = tl.program_id(0) % heads * width
    k_start, v_start = start + apart, start + 2 * apart
    column = tl.arange(0, 32 * J)
    q_ptr += sequence * n * per_row
    k_ptr += sequence * s * per_row
    v_ptr += sequence * s * per_row
    half = dy_ptr.dtype.element_ty
    q_dy = tl.zeros((32 * J, 32 * J), tl.float32)
    for first in range(0, n, BR):
        row = first + tl.arange(0, BR)
        q = expand_down(_rows_down(q_ptr, row, n, per_row, start, width, J), half)
        q_dy = dot(q, _head(dy_ptr, sequence, row, n, channels, start, column, width), q_dy, "ieee")
    vk = tl.zeros((32 * J, 32 * J), tl.float32)
    for first in range(0, s, BR):
        row = first + tl.arange(0, BR)
        v = expand_down(_rows_down(v_ptr, row, s, per_row, v_start, width, J), tl.float16)
        vk = dot(v, expand(_rows(k_ptr, row, s, per_row, k_start, width, J), tl.float16), vk, "ieee")
    none = tl.zeros((BR, 32 * J), tl.float32)
    vk_high, rest = upper(vk)
    vk_low, _ = upper(rest)
    for first in range(0, n, BR):
        row = first + tl.arange(0, BR)
        dy = _head(dy_ptr, sequence, row, n, channels, start, column, width)
        if half == tl.float16:
            dq = dot(dy, vk.to(tl.float16), none, "ieee")
        else:
            dq = dot(dy, vk_high, dot(dy, vk_low, none, "ieee"), "ieee")
        _store_head(dq_ptr, dq * scale, sequence, row, n, y_row, start, column, width)
    q_dy_high, rest = upper(q_dy)
    q_dy_low, _ = upper(rest)
    dy_q_high, dy_q_low = tl.trans(q_dy_high), tl.trans(q_dy_low)
    for first in range(0, s, BR):
        row = first + tl.arange(0, BR)
        v = expand(_rows(v_ptr, row, s, per_row, v_start, width, J), tl.bfloat16)
        dk = dot(v, dy_q_high, dot(v, dy_q_low, none, "ieee"), "ieee")
        _store_head(dk_ptr, dk * scale, sequence, row, s, y_row, start, column, width)
        k = expand(_rows(k_ptr, row, s, per_row, k_start, width, J), tl.bfloat16)
        dv = dot(k, q_dy_high, dot(k, q_dy_low, none, "ieee"), "ieee")
        _store_head(dv_ptr, dv * scale, sequence, row, s, y_row, start, column, width)


@triton.jit
def _gram(
    a_ptr, b_ptr, gram_ptr, rows, channels, per_row, a_first, b_first, heads, width,
    B_BITS: tl.constexpr, J: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """a^T b of every head, float32 [L, heads, width, width]: a packed, b packed or dense [L, rows, channels]."""
    sequence = (tl.program_id(0) // heads).to(tl.int64)
    start = tl.program_id(0) % heads * width
    tiles = tl.cdiv(width, 32 * J)
    i = tl.program_id(1) // tiles * 32 * J
    first = tl.program_id(1) % tiles * 32 * J
    column = first + tl.arange(0, 32 * J)
    a_ptr += sequence * rows * per_row
    acc = tl.zeros((32 * J, 32 * J), tl.float32)
    for token in range(0, rows, BR):
        row = token + tl.arange(0, BR)
        a_words = _rows_down(a_ptr, row, rows, per_row, a_first + start + i, width - i, J)
        if B_BITS:
            b_rows = b_ptr + sequence * rows * per_row
            b = expand(_rows(b_rows, row, rows, per_row, b_first + start + first, width - first, J), tl.float16)
        else:
            b = _head(b_ptr, sequence, row, rows, channels, start, column, width)
        acc = dot(expand_down(a_words, b.dtype), b, acc, "ieee")
    line = i + tl.arange(0, 32 * J)
    at = (tl.program_id(0).to(tl.int64) * width + line)[:, None] * width + column[None, :]
    tl.store(gram_ptr + at, acc, mask=(line < width)[:, None] & (column < width)[None, :])


@triton.jit
def _apply(
    a_ptr, gram_ptr, y_ptr, rows, channels, y_row, per_row, a_first, heads, width, stride_i, stride_j, scale,
    A_BITS: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, J: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """y [L, rows, channels], rows y_row apart, = a gram * scale for every head: a packed or dense, gram by its strides."""
    sequence = (tl.program_id(0) // heads).to(tl.int64)
    start = tl.program_id(0) % heads * width
    tiles = tl.cdiv(width, 32 * J)
    row = tl.program_id(1) // tiles * BR + tl.arange(0, BR)
    column = tl.program_id(1) % tiles * 32 * J + tl.arange(0, 32 * J)
    gram_ptr += tl.program_id(0).to(tl.int64) * width * width
    acc = tl.zeros((BR, 32 * J), tl.float32)
    for i in range(0, width, 32):
        line = i + tl.arange(0, 32)
        if A_BITS:
            words = _rows(a_ptr + sequence * rows * per_row, row, rows, per_row, a_first + start + i, width - i, 1)
            a = expand(words, OPERAND)
        else:
            a = _head(a_ptr, sequence, row, rows, channels, start, line, width).to(OPERAND)
        gram_mask = (line < width)[:, None] & (column < width)[None, :]
        gram = tl.load(gram_ptr + line[:, None] * stride_i + column[None, :] * stride_j, mask=gram_mask, other=0.0)
        acc = dot(a, gram.to(OPERAND), acc, PRECISION)
    _store_head(y_ptr, acc * scale, sequence, row, rows, y_row, start, column, width)


def launch_forward(width: int) -> dict[str, int]:
    """Words of a head a tile, rows of q and of k and v, warps; three stages spill in narrow heads."""
    rows = {"BN": 64, "BS": 32, "num_warps": 4}
    return {"J": 1, **rows, "num_stages": 2} if width <= 32 else {"J": 2, **rows}


def launch_backward(width: int) -> dict[str, int]:
    return {"J": 1, "BR": 32, "num_warps": 4, "num_stages": 2} if width <= 32 else {"J": 2, "BR": 64, "num_warps": 4}


def launch_gram(width: int) -> dict[str, int]:
    return {"J": 1 if width <= 32 else 2, "BR": 32, "num_warps": 4}


def launch_apply(width: int, operand: torch.dtype, precision: str) -> dict[str, int]:
    wide = operand == torch.float32 and precision == "ieee"
    return {"J": 1 if width <= 32 else 2, "BR": 128 if wide else 64, "num_warps": 8 if wide else 4}


def _head_gram(a: tuple[Tensor, int], b: tuple[Tensor, int] | Tensor, channels: int, num_heads: int) -> Tensor:
    words, a_first = a
    b, b_first = (b, 0) if isinstance(b, Tensor) else b
    length, rows, per_row = words.shape
    width = channels // num_heads
    gram = words.new_empty((length, num_heads, width, width), dtype=torch.float32)
    launch = launch_gram(width)
    grid = (length * num_heads, triton.cdiv(width, 32 * launch["J"]) ** 2)
    _gram[grid](
        words, b, gram, rows, channels, per_row, a_first, b_first, num_heads, width, B_BITS=b.dtype == torch.int32, **launch
    )
    return gram


def _head_apply(a: tuple[Tensor, int] | Tensor, gram: Tensor, scale: float, y: Tensor, operand, precision: str) -> Tensor:
    """``y`` [L, rows, channels], whose rows may lie apart, with a gram * scale for every head."""
    a, first = (a, 0) if isinstance(a, Tensor) else a
    length, rows, channels = y.shape
    num_heads, width = gram.shape[1:3]
    launch = launch_apply(width, operand, precision)
    grid = (length * num_heads, triton.cdiv(rows, launch["BR"]) * triton.cdiv(width, 32 * launch["J"]))
    _apply[grid](
        a, gram, y, rows, channels, y.stride(1), a.shape[2], first, num_heads, width, *gram.stride()[2:], scale,
        A_BITS=a.dtype == torch.int32, OPERAND={torch.float32: tl.float32, torch.float16: tl.float16}[operand],
        PRECISION=precision, **launch,
    )  # fmt: skip
    return y


def spike_attention(
    q: Tensor, k: Tensor | None, v: Tensor | None, channels: int, num_heads: int, scale: float, dtype: torch.dtype
) -> Tensor:
    """Packed q [L, N, W], k and v [L, S, W] with W = ceil(channels / 32) -> [L, N, channels] in ``dtype``.

    Without k and v, q [L, N, ceil(3 channels / 32)] holds all three side by side.
    """
    q, k, v = parts(q, k, v, channels)
    (words, _), (k_words, apart), (v_words, _) = q, k, v
    (length, n, per_row), s = words.shape, k_words.shape[1]
    width = channels // num_heads
    direct = s < width
    launch = launch_forward(width)
    y = words.new_empty((length, n, channels), dtype=dtype)
    if not y.numel():
        return y
    sizes, tiles = (n, s, channels, per_row, apart, num_heads, width), triton.cdiv(n, launch["BN"])
    with device_of(y):
        if direct and width <= EXACT_IN_FLOAT16:
            grid = (length * num_heads, tiles * triton.cdiv(width, 32 * launch["J"]))
            _attention_direct[grid](words, k_words, v_words, y, *sizes, scale, **launch)
        elif width <= WIDEST and s <= EXACT_IN_FLOAT16:
            programs = min(tiles, triton.cdiv(PROGRAMS, length * num_heads))
            each = triton.cdiv(tiles, programs) * launch["BN"]
            grid = (length * num_heads, triton.cdiv(n, each))
            _attention[grid](words, k_words, v_words, y, *sizes, each, scale, **launch)
        else:
            gram, operand = _head_gram(k, v, channels, num_heads), torch.float16 if s <= EXACT_IN_FLOAT16 else torch.float32
            return _head_apply(q, gram, scale, y, operand, "ieee")
    return y


def spike_attention_bwd(
    dy: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None, channels: int, num_heads: int, scale: float
) -> Sequence[Tensor]:
    """Gradients of q, k, v, dense [L, N or S, channels] in dy's dtype, from dy [L, N, channels]; one of all for one of all."""
    found, (dq, dk, dv) = gradients(dy, q, k, v, channels)
    if not (dq.numel() and dk.numel()):
        return [g.zero_() for g in found]
    q, k, v = parts(q, k, v, channels)
    (words, _), (k_words, apart), (v_words, _) = q, k, v
    (n, per_row), s, width = words.shape[1:], k_words.shape[1], channels // num_heads
    if dy.dtype != torch.float32 and width <= WIDEST and s <= EXACT_IN_FLOAT16:
        with device_of(dy):
            _attention_bwd[(len(dy) * num_heads,)](
                dy, words, k_words, v_words, dq, dk, dv, n, s, channels, dq.stride(1), per_row, apart, num_heads, width, scale,
                **launch_backward(width),
            )  # fmt: skip
        return found
    # Three products of tf32 keep 22 bits of the sums: more than a 16-bit result can show.
    last = (torch.float32, "ieee" if dy.dtype == torch.float32 else "tf32x3")
    with device_of(dy):
        kv, q_dy = _head_gram(k, v, channels, num_heads), _head_gram(q, dy, channels, num_heads)
        _head_apply(dy, kv.mT, scale, dq, *last)
        _head_apply(v, q_dy.mT, scale, dk, *last)
        _head_apply(k, q_dy, scale, dv, *last)
    return found
