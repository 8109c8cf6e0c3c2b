"""Packed spikes in registers: words become matrices of ones and zeros, and words without a spike are passed over."""

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
def expand(words, BITS: tl.constexpr, dtype: tl.constexpr):
    """The lowest BITS of int32 [R, J] -> [R, BITS J]."""
    bits = (words[:, :, None] >> tl.arange(0, BITS)[None, None, :]) & 1
    return _ones(bits.reshape(words.shape[0], BITS * words.shape[1]), dtype)


@triton.jit
def expand_down(words, dtype: tl.constexpr):
    """int32 [J, R] -> [32 J, R]."""
    bits = (words[:, None, :] >> tl.arange(0, 32)[None, :, None]) & 1
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
def merge(a, b):
    return a | b


@triton.jit
def alive(words, axis: tl.constexpr):
    """int32 of at most 32 lines -> (a mask of the lines that hold a spike, their number); ``axis`` runs along a line."""
    some = (tl.reduce(words, axis, merge) != 0).to(tl.int32)
    return tl.sum(some << tl.arange(0, some.shape[0]), axis=0), tl.sum(some, axis=0)


@triton.jit
def first(mask):
    """The lowest bit's index and the mask without it: a power of two is a float whose exponent is the index."""
    rest = mask & (mask - 1)
    lowest = (mask ^ rest).to(tl.uint32, bitcast=True).to(tl.float32)
    return (lowest.to(tl.int32, bitcast=True) >> 23) - 127, rest


@triton.jit
def dot(a, b, acc, precision: tl.constexpr):
    if INTERPRETED:  # the interpreter multiplies bfloat16's bit patterns
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc, input_precision=precision)
