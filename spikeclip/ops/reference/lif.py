"""Multi-timestep LIF in plain torch, forward and hand-written backward (the `torch` backend)."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dtypes import compute_dtype
from ..surrogate import SURROGATES


def _initial(x: Tensor, v0: Tensor | None, v_reset: float | None) -> Tensor:
    if v0 is not None:
        return v0.to(compute_dtype(x))
    return torch.full_like(x[0], v_reset or 0.0, dtype=compute_dtype(x))


def _charge(v: Tensor, x: Tensor, tau: float | Tensor, v_reset: float | None, decay_input: bool) -> Tensor:
    if not isinstance(tau, Tensor):  # by a number, CUDA would multiply with its rounded inverse
        tau = torch.full((), tau, dtype=v.dtype, device=v.device)
    leak = v - (v_reset or 0.0)
    return v + (x - leak) / tau if decay_input else (v - leak / tau) + x


def _reset(h: Tensor, s: Tensor, v_threshold: float, v_reset: float | None) -> Tensor:
    return h - s * v_threshold if v_reset is None else torch.where(s, v_reset, h)


def lif_fwd(
    x: Tensor,
    v0: Tensor | None,
    tau: float | Tensor,
    v_threshold: float,
    v_reset: float | None,
    decay_input: bool,
    spike_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """x [T, ...] -> (spikes [T, ...] in ``spike_dtype``, v_last [...] in float32, or float64 for float64 x)."""
    spikes = torch.empty_like(x, dtype=spike_dtype)
    v = _initial(x, v0, v_reset)
    for t in range(x.shape[0]):
        h = _charge(v, x[t].to(v.dtype), tau, v_reset, decay_input)
        s = h >= v_threshold
        spikes[t] = s
        v = _reset(h, s, v_threshold, v_reset)
    v_last = torch.empty_like(x[0], dtype=v.dtype)
    return spikes, v_last.copy_(v)


def lif_bwd(
    ds: Tensor | None,
    dv_last: Tensor | None,
    x: Tensor,
    v0: Tensor | None,
    tau: float | Tensor,
    v_threshold: float,
    v_reset: float | None,
    decay_input: bool,
    detach_reset: bool,
    surrogate: str,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dx [T, ...] in x's dtype, dv0 [...], dtau []); h is recomputed from x.

    ``dv0`` is empty when ``v0`` is None and ``dtau`` when ``tau`` is a number; both have the membrane's dtype.
    """
    grad = SURROGATES[surrogate].grad
    before, charged = [_initial(x, v0, v_reset)], []
    for t in range(x.shape[0]):
        h = _charge(before[-1], x[t].to(before[0].dtype), tau, v_reset, decay_input)
        charged.append(h)
        before.append(_reset(h, h >= v_threshold, v_threshold, v_reset))

    dx = torch.empty_like(x)
    dv = torch.zeros_like(before[0]) if dv_last is None else dv_last.to(before[0].dtype)
    learn_tau = isinstance(tau, Tensor)
    dtau = torch.zeros((), dtype=torch.float64, device=x.device)
    for t in reversed(range(x.shape[0])):
        h, v = charged[t], before[t]
        s = h >= v_threshold
        dspike = torch.zeros_like(dv) if ds is None else ds[t].to(dv.dtype)
        if not detach_reset:
            dspike = dspike + dv * (-v_threshold if v_reset is None else v_reset - h)
        dh = dspike * grad(h - v_threshold, alpha) + (dv if v_reset is None else torch.where(s, 0.0, dv))
        if learn_tau:
            leak = v - (v_reset or 0.0)
            dtau += (dh * (leak - x[t] if decay_input else leak) / tau**2).sum(dtype=torch.float64)
        dx[t] = dh / tau if decay_input else dh
        dv = dh - dh / tau
    none = dv.new_empty(0)
    dv0 = none if v0 is None else torch.empty_like(x[0], dtype=dv.dtype).copy_(dv)
    return dx, dv0, dtau.to(dv.dtype) if learn_tau else none
