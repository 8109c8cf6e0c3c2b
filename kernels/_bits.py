"""What tensor cores take: words of spikes as matrices of ones and zeros, and float32 as a few 16-bit floats."""

import functools

import torch
import triton
import triton.language as tl

from ._step import INTERPRETED


@triton.jit
def _ones(bits, dtype: tl.constexpr):
    """0 or 1 in ``dtype``, by its bit pattern: cheaper than a conversion, which the interpreter gets wrong for bfloat16."""
    if dtype == tl.float32:
        return (bits * 0x3F800000).to(tl.float32, bitcast=True)
    elif dtype == tl.float16:
        return (bits * 0x3C00).to(tl.int16).to(tl.float16, bitcast=True)
    elif dtype == tl.bfloat16:
        return (bits * 0x3F80).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return bits.to(dtype)


@triton.jit
def expand(words, dtype: tl.constexpr):
    """int32 [R, J] -> [R, 32 J]."""
    bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return _ones(bits.reshape(words.shape[0], 32 * words.shape[1]), dtype)


@triton.jit
def expand_down(words, dtype: tl.constexpr):
    """int32 [J, R] -> [32 J, R]."""
    bits = (words[:, None, :] >> tl.arange(0, 32)[None, :, None]) & 1
    return _ones(bits.reshape(32 * words.shape[0], words.shape[1]), dtype)


@functools.cache
def table(device: torch.device) -> torch.Tensor:
    """int32 [2, 32]: the mask of every bit of a word, and its number.

    Loaded, and not made in a kernel, so that Triton may spread words in the layout in which a matrix product takes them, which
    it does for loads alone: an expanded tile otherwise goes through shared memory first.
    """
    bits = torch.arange(32)
    return torch.stack([1 << bits, bits]).to(torch.int32).to(device)


@triton.jit
def spread(words, table_ptr, dtype: tl.constexpr):
    """int32 [R, J] -> [R, 32 J]."""
    masks = tl.load(table_ptr + tl.arange(0, 32))
    bits = tl.where((words[:, :, None] & masks[None, None, :]) != 0, 1, 0)
    return _ones(bits.reshape(words.shape[0], 32 * words.shape[1]), dtype)


@triton.jit
def spread_down(words, table_ptr, dtype: tl.constexpr):
    """int32 [J, R] -> [32 J, R]."""
    shifts = tl.load(table_ptr + 32 + tl.arange(0, 32))
    bits = (words[:, None, :] >> shifts[None, :, None]) & 1
    return _ones(bits.reshape(32 * words.shape[0], words.shape[1]), dtype)


@triton.jit
def elements(length, per_row, words, BLOCK: tl.constexpr):
    """A program's BLOCK words of rows of ``length`` values: their flat indices [BLOCK] and a mask, and by [BLOCK, 32] the
    columns of their values, the flat indices of these and a mask.
    """
    word = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = word // per_row
    column = ((word - row * per_row) * 32)[:, None] + tl.arange(0, 32)[None, :]
    return word, word < words, column, (row * length)[:, None] + column, (word < words)[:, None] & (column < length)


@triton.jit
def upper(x):
    """float32 -> its upper 16 bits as a bfloat16 and what they leave, nothing of what is infinite."""
    bits = x.to(tl.int32, bitcast=True)
    whole = (bits & -65536).to(tl.float32, bitcast=True)
    return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), tl.where(x == whole, 0.0, x - whole)


@triton.jit
def thirds(x):
    """float32 as three bfloat16 that sum to it exactly, the largest first."""
    first, rest = upper(x)
    second, rest = upper(rest)
    third, _ = upper(rest)
    return first, second, third


@triton.jit
def dot(a, b, acc, precision: tl.constexpr):
    if INTERPRETED:  # the interpreter multiplies bfloat16's bit patterns
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc, input_precision=precision)
