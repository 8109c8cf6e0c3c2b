"""The compiled extensions behind one face: tensors become pointers here, and outputs are allocated here.

Currents arrive with time first, in memory a dense ``[T, N]`` block (``ops.lif`` sees to that); for packed spikes also as one
step, of stride 0, that stands for all.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from .reference.bn_lif import bn_affine_by, bn_factors
from .surrogate import SURROGATES

DTYPE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # enum Dtype in csrc/lif_step.h


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def as_float(x: Tensor | None) -> Tensor | None:
    if x is None or (x.dtype == torch.float32 and x.is_contiguous()):
        return x
    return x.to(torch.float32).contiguous()


class Native:
    """What both extensions share; ``context`` gives the threads (CPU) or the stream (CUDA) of one."""

    bn_factors = staticmethod(bn_factors)

    def __init__(self, extension: ModuleType, context: Callable[[Tensor], int]):
        self._ext = extension
        self._context = context

    def bn_affine(self, x, *norm):
        return bn_affine_by(self.bn_stats, x, *norm)

    @staticmethod
    def _tau(tau: float | Tensor, x: Tensor) -> tuple[float, int]:
        if not isinstance(tau, Tensor):
            return tau, 0
        return (0.0, tau.data_ptr()) if x.is_cuda else (tau.item(), 0)

    def lif_fwd(self, x, v0, tau, v_threshold, v_reset, decay_input, spike_dtype):
        steps = x.shape[0]
        spikes = torch.empty_like(x, dtype=spike_dtype)
        v_last = torch.empty_like(x[0], dtype=torch.float32)
        n = v_last.numel()
        if n:
            self._ext.lif_fwd(
                x.data_ptr(), DTYPE[x.dtype], pointer(v0), spikes.data_ptr(), DTYPE[spike_dtype],
                v_last.data_ptr(), steps, n, *self._tau(tau, x), v_threshold,
                0.0 if v_reset is None else v_reset, decay_input, v_reset is None, self._context(x),
            )  # fmt: skip
        return spikes, v_last

    def lif_bwd(self, ds, dv_last, x, v0, tau, v_threshold, v_reset, decay_input, detach_reset, surrogate, alpha):
        steps = x.shape[0]
        learn_tau = isinstance(tau, Tensor)
        dx = torch.empty_like(x)
        dv0 = (
            torch.empty_like(x[0] if v0 is None else v0, dtype=torch.float32)
            if v0 is not None
            else x.new_empty(0, dtype=torch.float32)
        )
        n = x.numel() // steps
        partial = x.new_zeros(self._ext.tau_partials(n) if learn_tau else 0, dtype=torch.float64)
        if n:
            self._ext.lif_bwd(
                pointer(ds), 0 if ds is None else DTYPE[ds.dtype], pointer(dv_last), x.data_ptr(), DTYPE[x.dtype],
                pointer(v0), dx.data_ptr(), dv0.data_ptr() if v0 is not None else 0,
                partial.data_ptr() if learn_tau else 0, steps, n, *self._tau(tau, x), v_threshold,
                0.0 if v_reset is None else v_reset, decay_input, v_reset is None, detach_reset,
                SURROGATES[surrogate].index, alpha, self._context(x),
            )  # fmt: skip
        dtau = partial.sum().to(torch.float32) if learn_tau else x.new_empty(0, dtype=torch.float32)
        return dx, dv0, dtau
