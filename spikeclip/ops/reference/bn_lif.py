"""BatchNorm before LIF in plain torch: statistics, forward and hand-written backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._dtypes import compute_dtype
from .lif import lif_bwd, lif_fwd
from .pack import pack


def bn_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., C] -> (mean [C], variance [C] divided by the number of rows), float32, or float64 for float64 x."""
    var, mean = torch.var_mean(x.to(compute_dtype(x)).flatten(0, -2), 0, correction=0)
    return mean, var


def bn_lif_fwd(
    x: Tensor,
    v0: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    tau: float | Tensor,
    v_threshold: float,
    v_reset: float | None,
    decay_input: bool,
    spike_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """x [T, ..., C], scale and shift [C] -> (spikes of the current x * scale + shift, v_last); int32 asks for packed words."""
    current = x if scale is None else x.to(scale.dtype) * scale + shift
    packed = spike_dtype == torch.int32
    spikes, v_last = lif_fwd(current, v0, tau, v_threshold, v_reset, decay_input, torch.uint8 if packed else spike_dtype)
    return (pack(spikes, False) if packed else spikes), v_last


def bn_lif_bwd(
    ds: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    factors: Tensor | None,
    sums: bool,
    tau: float,
    v_threshold: float,
    v_reset: float | None,
    decay_input: bool,
    detach_reset: bool,
    surrogate: str,
    alpha: float,
) -> tuple[Tensor, Tensor]:
    """With dz, the gradient of the current: (dx, the sums [2, C] of dz and of dz (x - mean)), each empty where not asked for.

    ``factors`` [3, C] are a, b and c of dx = a dz + b x + c.
    """
    neuron = (tau, v_threshold, v_reset, decay_input, detach_reset, surrogate, alpha)
    return bn_lif_bwd_by(lif_bwd, ds, x, scale, shift, mean, factors, sums, *neuron)


def bn_lif_bwd_by(
    lif_bwd: Callable[..., tuple[Tensor, ...]],
    ds: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    factors: Tensor | None,
    sums: bool,
    *neuron,
) -> tuple[Tensor, Tensor]:
    """:func:`bn_lif_bwd` with currents and their gradient in memory, by any backend's ``lif_bwd``."""
    wide = x.to(scale.dtype)
    dz, _, _ = lif_bwd(ds, None, wide * scale + shift, None, *neuron)
    none = dz.new_empty(0)
    dx = none.to(x.dtype) if factors is None else (factors[0] * dz + (factors[1] * wide + factors[2])).to(x.dtype)
    total = torch.stack([dz.flatten(0, -2).sum(0), (dz * (wide - mean)).flatten(0, -2).sum(0)]) if sums else none
    return dx, total
