"""Packed spikes in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(s: Tensor, check: bool) -> Tensor:
    """s [..., K] of zeros and ones -> int32 [..., ceil(K / 32)], bit j of word i is s[..., 32 i + j]; the rest is 0.

    With ``check``, raises ValueError where a value is neither 0 nor 1.
    """
    if check and not bool(((s == 0) | (s == 1)).all()):
        raise ValueError("s must hold spikes, 0 or 1; got other values")
    length = s.shape[-1]
    bits = torch.nn.functional.pad((s != 0).to(torch.int64), (0, -length % 32)).unflatten(-1, (-1, 32))
    words = (bits << torch.arange(32, device=s.device)).sum(-1)
    return (words - ((words >> 31) << 32)).to(torch.int32)


def unpack(words: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`pack`: ones and zeros [..., length] in ``dtype``."""
    bits = words.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=words.device) & 1
    return bits.flatten(-2)[..., :length].to(dtype)


def count(words: Tensor) -> int:
    """Spikes among int32 ``words`` of any shape."""
    return int(unpack(words, 32 * words.shape[-1], torch.uint8).sum(dtype=torch.int64)) if words.numel() else 0
