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


def bn_affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    """x [..., C] -> (mean, variance divided by the rows less one, inverse, scale, shift), all [C]: see :func:`affine`."""
    return bn_affine_by(bn_stats, x, weight, bias, eps)


def bn_affine_by(
    bn_stats: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, ...]:
    """:func:`bn_affine` by any backend's ``bn_stats``."""
    mean, var = bn_stats(x)
    return mean, unbiased(var, x.shape[:-1].numel()), *affine(mean, var, weight, bias, eps)


def unbiased(var: Tensor, count: int | Tensor) -> Tensor:
    """A variance divided by ``count``, which is not 1, as running statistics take it: divided by one less."""
    return var * (count / (count - 1))


def affine(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(1 / sqrt(var + eps), scale and shift), of which the last two normalise: x * scale + shift."""
    inverse = (var + eps).rsqrt()
    scale = inverse.clone() if weight is None else weight.to(mean.dtype) * inverse
    return inverse, scale, -mean * scale if bias is None else bias.to(mean.dtype) - mean * scale


def bn_factors(
    sums: Tensor, scale: Tensor, inverse: Tensor, mean: Tensor, count: int | Tensor, apart: bool
) -> tuple[Tensor, Tensor]:
    """From the sums [2, C] of :func:`bn_lif_bwd` over ``count`` rows: (its factors for dx [3, C], the weight's gradient [C]).

    ``apart``, behind a pool: [5, C], first the factors for the picked values, a and two zeros, then b and c for x itself.
    """
    dz, dz_x = sums
    b = -scale * inverse.square() * dz_x / count
    c = -scale * dz / count - b * mean
    rows = [scale, *[torch.zeros_like(scale)] * 2, b, c] if apart else [scale, b, c]
    return torch.stack(rows), dz_x * inverse


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

    A backend with ``keeps_dz`` and ``bn_dx`` may return dz, rounded as dx, where there are no factors.

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
