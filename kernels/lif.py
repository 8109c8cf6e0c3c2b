"""Multi-timestep LIF in Triton: the `triton` backend of ``ops.lif``.

Tensors arrive as dense ``[T, N]`` blocks of memory, the backward pass's x maybe as one step that stands for all. A program
owns a block of neurons for all T steps, up to SEGMENT of them in registers at a time. The backward pass recomputes a segment's
membranes from its first one; the first membranes of later segments are parked, as bits, in slots of dx that are not yet due.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikeclip.ops._device import device_of
from spikeclip.ops.lif import gradient_memory
from spikeclip.ops.surrogate import SURROGATES

from ._step import (
    SEGMENT,
    advanced,
    charge,
    charge_grad_tau,
    has_exact_inverse,
    load_steps,
    neuron_numbers,
    of_step,
    reset,
    segments,
    single,
    step_grad,
)

LAUNCH = {"BLOCK": 512, "num_warps": 4}  # 4 neurons a thread


@triton.jit
def _lif_fwd(
    x_ptr, v0_ptr, spikes_ptr, v_last_ptr, tau_ptr, steps, n, tau, v_threshold, v_reset,
    HAS_V0: tl.constexpr, TAU_TENSOR: tl.constexpr, DECAY_INPUT: tl.constexpr, SOFT_RESET: tl.constexpr, EXACT: tl.constexpr,
    SEGMENT: tl.constexpr, LONG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    stride = tl.cast(n, tl.int64)  # n = 1 is a constant, without .to
    if TAU_TENSOR:
        tau = tl.load(tau_ptr)
    inverse = tl.div_rn(1.0, tau)
    if HAS_V0:
        v = tl.load(v0_ptr + at, mask=mask, other=0.0)
    else:
        v = tl.zeros((BLOCK,), tl.float32) + v_reset
    for first in range(0, steps if LONG else SEGMENT, SEGMENT):
        xs = load_steps(x_ptr, at, first, steps, stride, mask, SEGMENT, LONG)
        for i in tl.static_range(SEGMENT):
            here = of_step(mask, first + i, steps, LONG)
            h = charge(v, xs[i].to(tl.float32), tau, inverse, v_reset, DECAY_INPUT, EXACT)
            spikes = (h >= v_threshold).to(tl.float32).to(spikes_ptr.dtype.element_ty)
            tl.store(spikes_ptr + at + (first + i) * stride, spikes, mask=here)
            v = advanced(reset(h, v_threshold, v_reset, SOFT_RESET), v, here, LONG)
    tl.store(v_last_ptr + at, v, mask=mask)


@triton.jit
def _park(slots_ptr, at, v, mask, n, WIDE: tl.constexpr):
    bits = v.to(tl.int32, bitcast=True)
    if WIDE:
        tl.store(slots_ptr + at, bits, mask=mask)
    else:
        tl.store(slots_ptr + at, (bits >> 16).to(tl.int16), mask=mask)
        tl.store(slots_ptr + at - n, (bits & 0xFFFF).to(tl.int16), mask=mask)


@triton.jit
def _unpark(slots_ptr, at, mask, n, WIDE: tl.constexpr):
    if WIDE:
        bits = tl.load(slots_ptr + at, mask=mask, other=0)
    else:
        high = tl.load(slots_ptr + at, mask=mask, other=0).to(tl.int32)
        low = tl.load(slots_ptr + at - n, mask=mask, other=0).to(tl.int32)
        bits = (high << 16) | (low & 0xFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _lif_bwd(
    ds_ptr, dv_last_ptr, x_ptr, v0_ptr, dx_ptr, slots_ptr, dv0_ptr, dtau_ptr, tau_ptr,
    steps, n, x_step, tau, v_threshold, v_reset, alpha,
    HAS_DS: tl.constexpr, HAS_DV: tl.constexpr, HAS_V0: tl.constexpr, TAU_TENSOR: tl.constexpr, DECAY_INPUT: tl.constexpr,
    SOFT_RESET: tl.constexpr, DETACH_RESET: tl.constexpr, KIND: tl.constexpr, WIDE: tl.constexpr, EXACT: tl.constexpr,
    SEGMENT: tl.constexpr, LONG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    stride = tl.cast(n, tl.int64)  # n = 1 is a constant, without .to
    x_stride = tl.cast(x_step, tl.int64)
    if TAU_TENSOR:
        tau = tl.load(tau_ptr)
    inverse = tl.div_rn(1.0, tau)
    if HAS_V0:
        start = tl.load(v0_ptr + at, mask=mask, other=0.0)
    else:
        start = tl.zeros((BLOCK,), tl.float32) + v_reset
    last = 0  # the first step of the last segment
    if LONG:
        last = (steps - 1) // SEGMENT * SEGMENT
        v = start
        for first in range(0, last, SEGMENT):
            xs = load_steps(x_ptr, at, first, steps, x_stride, mask, SEGMENT, False)
            for i in tl.static_range(SEGMENT):
                h = charge(v, xs[i].to(tl.float32), tau, inverse, v_reset, DECAY_INPUT, EXACT)
                v = reset(h, v_threshold, v_reset, SOFT_RESET)
            _park(slots_ptr, at + (first + SEGMENT - 1) * stride, v, mask, stride, WIDE)
        tl.debug_barrier()

    if HAS_DV:
        dv = tl.load(dv_last_ptr + at, mask=mask, other=0.0)
    else:
        dv = tl.zeros((BLOCK,), tl.float32)
    dtau = tl.zeros((BLOCK,), tl.float32)
    for back in range(0, last + 1 if LONG else SEGMENT, SEGMENT):
        first = last - back
        v = start
        if LONG:
            if first > 0:
                v = _unpark(slots_ptr, at + (first - 1) * stride, mask, stride, WIDE)
            tl.debug_barrier()  # the steps below overwrite slots that other threads may still be reading
        xs = load_steps(x_ptr, at, first, steps, x_stride, mask, SEGMENT, LONG)
        if HAS_DS:
            given = load_steps(ds_ptr, at, first, steps, stride, mask, SEGMENT, LONG)
        vs, hs = (), ()
        for i in tl.static_range(SEGMENT):
            h = charge(v, xs[i].to(tl.float32), tau, inverse, v_reset, DECAY_INPUT, EXACT)
            vs, hs = vs + (v,), hs + (h,)
            v = reset(h, v_threshold, v_reset, SOFT_RESET)
        for i in tl.static_range(SEGMENT - 1, -1, -1):
            here = of_step(mask, first + i, steps, LONG)
            if HAS_DS:
                ds = given[i].to(tl.float32)
            else:
                ds = tl.zeros((BLOCK,), tl.float32)
            dh = step_grad(hs[i], ds, dv, v_threshold, v_reset, alpha, KIND, SOFT_RESET, DETACH_RESET)
            if TAU_TENSOR:
                part = dh * charge_grad_tau(vs[i], xs[i].to(tl.float32), tau, v_reset, DECAY_INPUT)
                dtau += tl.where(here, part, 0.0)
            through = dh * inverse
            if DECAY_INPUT:
                dx = through
            else:
                dx = dh
            tl.store(dx_ptr + at + (first + i) * stride, dx.to(dx_ptr.dtype.element_ty), mask=here)
            dv = advanced(dh - through, dv, here, LONG)
    if HAS_V0:
        tl.store(dv0_ptr + at, dv, mask=mask)
    if TAU_TENSOR:
        tl.store(dtau_ptr + tl.program_id(0), tl.sum(dtau.to(tl.float64), axis=0))


def lif_fwd(x, v0, tau, v_threshold, v_reset, decay_input, spike_dtype):
    spikes = torch.empty_like(x, dtype=spike_dtype)
    v_last = torch.empty_like(x[0], dtype=torch.float32)
    n = v_last.numel()
    if n:
        tau_tensor, *numbers = neuron_numbers(tau, v_threshold, v_reset, x)
        with device_of(x):
            _lif_fwd[(triton.cdiv(n, LAUNCH["BLOCK"]),)](
                x, x if v0 is None else v0, spikes, v_last, tau_tensor, x.shape[0], n, *numbers,
                HAS_V0=v0 is not None, TAU_TENSOR=isinstance(tau, Tensor), DECAY_INPUT=decay_input, SOFT_RESET=v_reset is None,
                EXACT=has_exact_inverse(tau), enable_fp_fusion=False, **segments(x.shape[0]), **LAUNCH,
            )  # fmt: skip
    return spikes, v_last


def launch_backward(steps: int) -> dict[str, int]:
    """Half as many neurons a thread for long runs, which keep more in registers."""
    return LAUNCH | {"BLOCK": 256} if steps > SEGMENT else LAUNCH


def lif_bwd(ds, dv_last, x, v0, tau, v_threshold, v_reset, decay_input, detach_reset, surrogate, alpha):
    learn_tau = isinstance(tau, Tensor)
    none = x.new_empty(0, dtype=torch.float32)
    dx = gradient_memory(x)
    dv0 = none if v0 is None else torch.empty_like(x[0], dtype=torch.float32)
    steps = x.shape[0]
    n = x.numel() // steps
    launch = launch_backward(steps)
    programs = triton.cdiv(n, launch["BLOCK"])
    partial = x.new_empty(programs if learn_tau else 0, dtype=torch.float64)
    if n:
        tau_tensor, *numbers = neuron_numbers(tau, v_threshold, v_reset, x)
        wide = x.dtype == torch.float32
        with device_of(x):
            _lif_bwd[(programs,)](
                x if ds is None else ds, x if dv_last is None else dv_last, x, x if v0 is None else v0, dx,
                dx.view(torch.int32 if wide else torch.int16), dv0, partial, tau_tensor, steps, n, x.stride(0), *numbers,
                single(alpha), HAS_DS=ds is not None, HAS_DV=dv_last is not None, HAS_V0=v0 is not None, TAU_TENSOR=learn_tau,
                DECAY_INPUT=decay_input, SOFT_RESET=v_reset is None, DETACH_RESET=detach_reset,
                KIND=SURROGATES[surrogate].index, WIDE=wide, EXACT=has_exact_inverse(tau), enable_fp_fusion=False,
                **segments(steps), **launch,
            )  # fmt: skip
    return dx, dv0, partial.sum().to(torch.float32) if learn_tau else none
