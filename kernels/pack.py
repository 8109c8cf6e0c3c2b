"""Spikes to bits and back in Triton: the `triton` backend of ``ops.pack_spikes``."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikeclip.ops._device import device_of

from ._bits import elements, expand

LAUNCH = {"BLOCK": 128, "num_warps": 4}  # words a program


@triton.jit
def _pack(s_ptr, words_ptr, flag_ptr, length, per_row, words, CHECK: tl.constexpr, BLOCK: tl.constexpr):
    word, word_mask, _, at, mask = elements(length, per_row, words, BLOCK)
    s = tl.load(s_ptr + at, mask=mask, other=0.0).to(tl.float32)
    spikes = s != 0.0
    bits = spikes.to(tl.int32) << tl.arange(0, 32)[None, :]
    tl.store(words_ptr + word, tl.sum(bits, axis=1), mask=word_mask)
    if CHECK:
        others = (spikes & (s != 1.0)).to(tl.int32)
        tl.store(flag_ptr, 1, mask=tl.max(tl.max(others, axis=1), axis=0) != 0)


@triton.jit
def _unpack(words_ptr, s_ptr, length, per_row, words, BLOCK: tl.constexpr):
    word, word_mask, _, at, mask = elements(length, per_row, words, BLOCK)
    bits = expand(tl.load(words_ptr + word, mask=word_mask, other=0)[:, None], s_ptr.dtype.element_ty)
    tl.store(s_ptr + at, bits, mask=mask)


def _plain(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.dtype == torch.bool else x


def pack(s: Tensor, check: bool) -> Tensor:
    """s [..., K] of zeros and ones, floating, bool or uint8 -> int32 [..., ceil(K / 32)]."""
    s = s.contiguous()
    length = s.shape[-1]
    per_row = triton.cdiv(length, 32)
    words = s.new_empty((*s.shape[:-1], per_row), dtype=torch.int32)
    flag = s.new_zeros(1 if check else 0, dtype=torch.int32)
    if n := words.numel():
        with device_of(s):
            _pack[(triton.cdiv(n, LAUNCH["BLOCK"]),)](_plain(s), words, flag, length, per_row, n, CHECK=check, **LAUNCH)
        if check and flag.item():
            raise ValueError("s must hold spikes, 0 or 1; got other values")
    return words


def unpack(words: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """int32 [..., ceil(length / 32)] -> ones and zeros [..., length] in ``dtype``."""
    words = words.contiguous()
    s = words.new_empty((*words.shape[:-1], length), dtype=dtype)
    if s.numel():
        n = words.numel()
        with device_of(words):
            _unpack[(triton.cdiv(n, LAUNCH["BLOCK"]),)](words, _plain(s), length, words.shape[-1], n, **LAUNCH)
    return s
