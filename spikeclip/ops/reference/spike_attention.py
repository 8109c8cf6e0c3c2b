"""Softmax-free attention on spikes in plain torch, (q k^T) v * scale per head."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dtypes import compute_dtype
from .pack import unpack


def _heads(words: Tensor, channels: int, num_heads: int, dtype: torch.dtype) -> Tensor:
    return unpack(words, channels, dtype).unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def _parts(q: Tensor, k: Tensor, v: Tensor, channels: int, num_heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(_heads(words, channels, num_heads, dtype) for words in (q, k, v))


def spike_attention(q: Tensor, k: Tensor, v: Tensor, channels: int, num_heads: int, scale: float, dtype: torch.dtype) -> Tensor:
    """Packed q [L, N, W], k and v [L, S, W] with W = ceil(channels / 32), heads side by side -> [L, N, channels] in ``dtype``.

    Products of spikes are small integers: exact in float32 (below 2^24) whatever the order; only ``scale`` rounds.
    """
    q, k, v = _parts(q, k, v, channels, num_heads, torch.float32)
    mixed = (q @ k.mT) @ v if k.shape[2] < k.shape[3] else q @ (k.mT @ v)
    return _merged(mixed * scale).to(dtype)


def spike_attention_bwd(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, channels: int, num_heads: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, dense [L, N or S, channels] in dy's dtype, without an N x S matrix."""
    compute = compute_dtype(dy)
    q, k, v = _parts(q, k, v, channels, num_heads, compute)
    dy_heads = dy.to(compute).unflatten(-1, (num_heads, -1)).transpose(1, 2) * scale
    q_dy = q.mT @ dy_heads
    grads = dy_heads @ (k.mT @ v).mT, v @ q_dy.mT, k @ q_dy
    return tuple(_merged(g).to(dy.dtype) for g in grads)
