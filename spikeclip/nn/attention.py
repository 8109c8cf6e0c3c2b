"""Attention on spikes without a softmax: Spikformer's self-attention and QKFormer's token and channel masks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..ops import PackedSpikes, spike_attention
from .linear import LinearNorm
from .neurons import LIF


class SpikingSelfAttention(nn.Module):
    """Spikformer's self-attention, ``(q k^T) v * scale`` per head (Zhou et al. 2023, arXiv 2209.15425).

    Spikes ``[T, B, N, dim]`` in, currents of the same shape out. Queries, keys and values are linear, BatchNorm and LIF: one
    layer, ``qkv``, of 3 dim channels, in this order. The attention (:func:`spikeclip.ops.spike_attention`) goes through its own
    LIF into a projection, linear and BatchNorm.

    Args:
        dim: channels. num_heads: divides ``dim``.
        scale: factor of the attention's counts, finite.
        attention_v_threshold: firing threshold of the LIF behind the attention.
        qkv_bias: whether the linear layers of queries, keys and values have a bias.
        backend: of every op inside: ``auto``, ``cpu``, ``cuda``, ``triton`` or ``torch``.
        neuron: options that :class:`LIF` and :class:`BNLIF` share (``tau``, ``v_threshold``, ``surrogate_function``, ...).

    Raises:
        ValueError: an argument outside the above; in :meth:`forward` another shape or dtype than spikes ``[T, B, N, dim]``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        scale: float = 0.125,
        attention_v_threshold: float = 0.5,
        qkv_bias: bool = False,
        *,
        backend: str = "auto",
        **neuron,
    ):
        super().__init__()
        _check(dim, num_heads, scale)
        self.dim, self.num_heads, self.scale, self.backend = dim, num_heads, scale, backend
        self.qkv = LinearNorm(dim, 3 * dim, bias=qkv_bias, neuron=neuron, backend=backend)
        self.attention_lif = LIF(**{**neuron, "v_threshold": attention_v_threshold}, packed=True, backend=backend)
        self.project = LinearNorm(dim, dim, backend=backend)

    def forward(self, spikes: Tensor | PackedSpikes) -> Tensor:
        _check_spikes(spikes, self.dim)
        mixed = spike_attention(self.qkv(spikes), scale=self.scale, num_heads=self.num_heads, backend=self.backend)
        return self.project(self.attention_lif(mixed))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, scale={self.scale}"


class QKAttention(nn.Module):
    """QKFormer's attention: a mask of spikes, made of the queries, multiplies the keys (Zhou et al. 2024, arXiv 2403.16552).

    Spikes ``[T, B, N, dim]`` in, currents of the same shape out, at a cost linear in N. Queries and keys are each linear,
    BatchNorm and LIF. The mask is a LIF's answer to how many queries fired: per token and head over its channels
    (``mode="token"``), or per channel over the tokens (``mode="channel"``). Masked keys are spikes again and go through a
    projection, linear and BatchNorm.

    Args:
        mode: ``token`` or ``channel``.
        scale: factor of the counts before their LIF (the paper: 1), finite.
        dim, num_heads, attention_v_threshold, qkv_bias, backend, neuron: as for :class:`SpikingSelfAttention`.

    Raises:
        ValueError: as :class:`SpikingSelfAttention`, or another mode.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        scale: float = 1.0,
        attention_v_threshold: float = 0.5,
        qkv_bias: bool = False,
        *,
        mode: str = "token",
        backend: str = "auto",
        **neuron,
    ):
        super().__init__()
        _check(dim, num_heads, scale)
        if mode not in ("token", "channel"):
            raise ValueError(f"mode must be 'token' or 'channel'; got {mode!r}")
        self.dim, self.num_heads, self.scale, self.mode = dim, num_heads, scale, mode
        self.q, self.k = (LinearNorm(dim, dim, bias=qkv_bias, backend=backend) for _ in range(2))
        self.q_lif, self.k_lif = (LIF(**neuron, backend=backend) for _ in range(2))
        self.attention_lif = LIF(**{**neuron, "v_threshold": attention_v_threshold}, backend=backend)
        self.project = LinearNorm(dim, dim, backend=backend)

    def forward(self, spikes: Tensor | PackedSpikes) -> Tensor:
        _check_spikes(spikes, self.dim)
        q, k = self.q_lif(self.q(spikes)), self.k_lif(self.k(spikes))
        q, k = (s.unflatten(-1, (self.num_heads, -1)) for s in (q, k))  # [T, B, N, heads, C / heads]
        # Counts above 256 are not exact in bfloat16.
        exact = torch.float64 if q.dtype == torch.float64 else torch.float32
        counts = q.sum(-1 if self.mode == "token" else -3, keepdim=True, dtype=exact)
        mask = self.attention_lif(counts * self.scale).to(k.dtype)
        return self.project((k * mask).flatten(-2))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, scale={self.scale}, mode={self.mode!r}"


def _check(dim: int, num_heads: int, scale: float) -> None:
    if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
        raise ValueError(f"dim must be an integer >= 1; got {dim!r}")
    if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_heads must be an integer that divides dim = {dim}; got {num_heads!r}")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number; got {scale!r}")


def _check_spikes(spikes: Tensor | PackedSpikes, dim: int) -> None:
    if not isinstance(spikes, (Tensor, PackedSpikes)):
        raise TypeError(f"spikes must be a torch.Tensor or PackedSpikes; got {type(spikes).__name__}")
    if len(spikes.shape) != 4 or spikes.shape[-1] != dim:
        raise ValueError(f"spikes must have shape [T, B, N, {dim}]; got {list(spikes.shape)}")
