"""Softmax-free attention on spikes in plain torch, (q k^T) v * scale per head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._dtypes import compute_dtype
from .pack import unpack


def _heads(s: Tensor, num_heads: int) -> Tensor:
    return s.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def _parts(q: Tensor, k: Tensor | None, v: Tensor | None, channels: int, num_heads: int, dtype: torch.dtype) -> list[Tensor]:
    if k is None:
        dense = unpack(q, 3 * channels, dtype).chunk(3, -1)
    else:
        dense = [unpack(words, channels, dtype) for words in (q, k, v)]
    return [_heads(s, num_heads) for s in dense]


def spike_attention(
    q: Tensor, k: Tensor | None, v: Tensor | None, channels: int, num_heads: int, scale: float, dtype: torch.dtype
) -> Tensor:
    """Packed q [L, N, W], k and v [L, S, W] with W = ceil(channels / 32), heads side by side -> [L, N, channels] in ``dtype``.

    Without k and v, q [L, N, ceil(3 channels / 32)] holds all three side by side.

    Products of spikes are small integers: exact in float32 (below 2^24) whatever the order; only ``scale`` rounds.
    """
    q, k, v = _parts(q, k, v, channels, num_heads, torch.float32)
    mixed = (q @ k.mT) @ v if k.shape[2] < k.shape[3] else q @ (k.mT @ v)
    return _merged(mixed * scale).to(dtype)


def spike_attention_bwd(
    dy: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None, channels: int, num_heads: int, scale: float
) -> Sequence[Tensor]:
    """Gradients of q, k, v, dense [L, N or S, channels] in dy's dtype, without an N x S matrix; one of all for one of all."""
    compute, apart = compute_dtype(dy), k is not None
    q, k, v = _parts(q, k, v, channels, num_heads, compute)
    dy_heads = _heads(dy.to(compute), num_heads) * scale
    q_dy = q.mT @ dy_heads
    grads = dy_heads @ (k.mT @ v).mT, v @ q_dy.mT, k @ q_dy
    grads = [_merged(g).to(dy.dtype) for g in grads]
    return grads if apart else [torch.cat(grads, -1)]
