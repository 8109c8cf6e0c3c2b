"""Multi-timestep LIF in Triton: the `triton` backend of ``ops.lif``.

Tensors arrive as dense ``[T, N]`` blocks of memory. A program owns a block of neurons for all T steps. The backward pass
recomputes the membrane from x: within a segment of at most SEGMENT steps from the segment's first membrane, re-reading x
from cache; the first membranes of later segments are parked, as bits, in slots of dx that are not yet due.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikeclip.ops._device import device_of
from spikeclip.ops.surrogate import SURROGATES

from ._step import charge, charge_grad_tau, neuron_numbers, reset, single, step_grad

SEGMENT = 8  # steps recomputed at a time; >= 2, as a 16-bit dx parks a membrane in two steps' slots
LAUNCH = {"BLOCK": 512, "num_warps": 4}  # 4 neurons a thread


@triton.jit
def _fwd(
    x_ptr, v0_ptr, spikes_ptr, v_last_ptr, tau_ptr, steps, n, tau, v_threshold, v_reset,
    HAS_V0: tl.constexpr, TAU_TENSOR: tl.constexpr, DECAY_INPUT: tl.constexpr, SOFT_RESET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    if TAU_TENSOR:
        tau = tl.load(tau_ptr)
    inverse = tl.div_rn(1.0, tau)
    if HAS_V0:
        v = tl.load(v0_ptr + at, mask=mask, other=0.0)
    else:
        v = tl.zeros((BLOCK,), tl.float32) + v_reset
    here = at
    for _ in range(steps):
        h = charge(v, tl.load(x_ptr + here, mask=mask, other=0.0).to(tl.float32), tau, inverse, v_reset, DECAY_INPUT)
        tl.store(spikes_ptr + here, (h >= v_threshold).to(tl.float32).to(spikes_ptr.dtype.element_ty), mask=mask)
        v = reset(h, v_threshold, v_reset, SOFT_RESET)
        here += n
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
def _bwd(
    ds_ptr, dv_last_ptr, x_ptr, v0_ptr, dx_ptr, slots_ptr, dv0_ptr, dtau_ptr, tau_ptr,
    steps, n, tau, v_threshold, v_reset, alpha,
    HAS_DS: tl.constexpr, HAS_DV: tl.constexpr, HAS_V0: tl.constexpr, TAU_TENSOR: tl.constexpr, DECAY_INPUT: tl.constexpr,
    SOFT_RESET: tl.constexpr, DETACH_RESET: tl.constexpr, KIND: tl.constexpr, WIDE: tl.constexpr, LONG: tl.constexpr,
    SEGMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    stride = tl.cast(n, tl.int64)  # n = 1 is a constant, without .to
    if TAU_TENSOR:
        tau = tl.load(tau_ptr)
    inverse = tl.div_rn(1.0, tau)
    if HAS_V0:
        start = tl.load(v0_ptr + at, mask=mask, other=0.0)
    else:
        start = tl.zeros((BLOCK,), tl.float32) + v_reset
    segments = (steps + SEGMENT - 1) // SEGMENT
    if LONG:
        v = start
        for t in range((segments - 1) * SEGMENT):
            here = at + t * stride
            h = charge(v, tl.load(x_ptr + here, mask=mask, other=0.0).to(tl.float32), tau, inverse, v_reset, DECAY_INPUT)
            v = reset(h, v_threshold, v_reset, SOFT_RESET)
            if (t + 1) % SEGMENT == 0:
                _park(slots_ptr, here, v, mask, stride, WIDE)
        tl.debug_barrier()

    if HAS_DV:
        dv = tl.load(dv_last_ptr + at, mask=mask, other=0.0)
    else:
        dv = tl.zeros((BLOCK,), tl.float32)
    dtau = tl.zeros((BLOCK,), tl.float32)
    for back in range(segments):
        first = (segments - 1 - back) * SEGMENT
        last = tl.minimum(first + SEGMENT, steps)
        first_v = start
        if LONG:
            if first > 0:
                first_v = _unpark(slots_ptr, at + (first - 1) * stride, mask, stride, WIDE)
            tl.debug_barrier()  # the steps below overwrite slots that other threads may still be reading
        for down in range(last - first):
            t = last - 1 - down
            v = first_v
            for u in range(first, t):
                x = tl.load(x_ptr + at + u * stride, mask=mask, other=0.0).to(tl.float32)
                v = reset(charge(v, x, tau, inverse, v_reset, DECAY_INPUT), v_threshold, v_reset, SOFT_RESET)
            here = at + t * stride
            x = tl.load(x_ptr + here, mask=mask, other=0.0).to(tl.float32)
            h = charge(v, x, tau, inverse, v_reset, DECAY_INPUT)
            if HAS_DS:
                ds = tl.load(ds_ptr + here, mask=mask, other=0.0).to(tl.float32)
            else:
                ds = tl.zeros((BLOCK,), tl.float32)
            dh = step_grad(h, ds, dv, v_threshold, v_reset, alpha, KIND, SOFT_RESET, DETACH_RESET)
            if TAU_TENSOR:
                dtau += dh * charge_grad_tau(v, x, tau, v_reset, DECAY_INPUT)
            through = dh * inverse
            if DECAY_INPUT:
                dx = through
            else:
                dx = dh
            tl.store(dx_ptr + here, dx.to(dx_ptr.dtype.element_ty), mask=mask)
            dv = dh - through
    if HAS_V0:
        tl.store(dv0_ptr + at, dv, mask=mask)
    if TAU_TENSOR:
        tl.store(dtau_ptr + tl.program_id(0), tl.sum(tl.where(mask, dtau, 0.0).to(tl.float64), axis=0))


def lif_fwd(x, v0, tau, v_threshold, v_reset, decay_input, spike_dtype):
    spikes = torch.empty_like(x, dtype=spike_dtype)
    v_last = torch.empty_like(x[0], dtype=torch.float32)
    n = v_last.numel()
    if n:
        tau_tensor, *numbers = neuron_numbers(tau, v_threshold, v_reset, x)
        with device_of(x):
            _fwd[(triton.cdiv(n, LAUNCH["BLOCK"]),)](
                x, x if v0 is None else v0, spikes, v_last, tau_tensor, x.shape[0], n, *numbers,
                HAS_V0=v0 is not None, TAU_TENSOR=isinstance(tau, Tensor), DECAY_INPUT=decay_input, SOFT_RESET=v_reset is None,
                enable_fp_fusion=False, **LAUNCH,
            )  # fmt: skip
    return spikes, v_last


def lif_bwd(ds, dv_last, x, v0, tau, v_threshold, v_reset, decay_input, detach_reset, surrogate, alpha):
    learn_tau = isinstance(tau, Tensor)
    none = x.new_empty(0, dtype=torch.float32)
    dx = torch.empty_like(x)
    dv0 = none if v0 is None else torch.empty_like(x[0], dtype=torch.float32)
    steps = x.shape[0]
    n = x.numel() // steps
    programs = triton.cdiv(n, LAUNCH["BLOCK"])
    partial = x.new_empty(programs if learn_tau else 0, dtype=torch.float64)
    if n:
        tau_tensor, *numbers = neuron_numbers(tau, v_threshold, v_reset, x)
        wide = x.dtype == torch.float32
        with device_of(x):
            _bwd[(programs,)](
                x if ds is None else ds, x if dv_last is None else dv_last, x, x if v0 is None else v0, dx,
                dx.view(torch.int32 if wide else torch.int16), dv0, partial, tau_tensor, steps, n, *numbers, single(alpha),
                HAS_DS=ds is not None, HAS_DV=dv_last is not None, HAS_V0=v0 is not None, TAU_TENSOR=learn_tau,
                DECAY_INPUT=decay_input, SOFT_RESET=v_reset is None, DETACH_RESET=detach_reset,
                KIND=SURROGATES[surrogate].index, WIDE=wide, LONG=steps > SEGMENT, SEGMENT=SEGMENT,
                enable_fp_fusion=False, **LAUNCH,
            )  # fmt: skip
    return dx, dv0, partial.sum().to(torch.float32) if learn_tau else none
