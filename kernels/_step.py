"""One time-step of the neuron in Triton, forward and backward: the only place with this math in Triton.

Forward, numbers equal plain torch: divisions by tau are correctly rounded here, and launches switch fused multiply-add off.
Surrogates and gradients take the device's approximate instructions, and a multiply-add where one is written.
"""

import ctypes
import math

import triton
import triton.language as tl
from torch import Tensor

from spikeclip.ops._backends import triton_interpreted

INTERPRETED = tl.constexpr(triton_interpreted())
SEGMENT = 8  # steps at most; >= 2, as a 16-bit gradient parks a membrane in two steps' slots (lif.py)


@triton.jit
def fma(a, b, c):
    """a * b + c, rounded once; the interpreter's tl.fma rounds twice."""
    if INTERPRETED:
        return (a.to(tl.float64) * b + c).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def _divide(a, tau, inverse):
    """a / tau, correctly rounded, by a product corrected once (Markstein 1990); ``inverse`` is 1 / tau, correctly rounded.

    A true division's slow path costs a call and spilled registers. Where a or tau is infinite there is nothing to correct.
    """
    q = a * inverse
    remainder = fma(-q, tau, a)
    return tl.where(remainder == remainder, fma(remainder, inverse, q), q)


@triton.jit
def charge(v, x, tau, inverse, v_reset, DECAY_INPUT: tl.constexpr, EXACT: tl.constexpr):
    """The membrane before its reset; EXACT: no quotient by tau differs from the product with ``inverse``."""
    leak = v - v_reset
    if DECAY_INPUT:
        leak = x - leak
    if EXACT:
        part = leak * inverse
    else:
        part = _divide(leak, tau, inverse)
    if DECAY_INPUT:
        return v + part
    else:
        return (v - part) + x


@triton.jit
def reset(h, v_threshold, v_reset, SOFT_RESET: tl.constexpr):
    s = h >= v_threshold
    if SOFT_RESET:
        return h - tl.where(s, v_threshold, 0.0)
    else:
        return tl.where(s, v_reset, h)


@triton.jit
def _exp(x, factor):
    """e^(factor x) for factor x <= 0, one instruction behind a product that is rounded; too small ones are 0."""
    y = x * (factor * 1.4426950408889634)
    if INTERPRETED:
        return tl.exp2(y)
    else:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [y], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _reciprocal(x):
    """1 / x for x >= 1 to 2^-23 of it, in one instruction."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def surrogate_grad(u, alpha, KIND: tl.constexpr):
    """d(spike)/d(u); KIND is the row's index in spikeclip/ops/surrogate.py."""
    a = tl.abs(u)
    if KIND == 0:  # sigmoid
        e = _exp(a, -alpha)
        r = _reciprocal(1.0 + e)
        return alpha * e * (r * r)
    elif KIND == 1:  # atan
        z = 1.5707963267948966 * alpha * u
        return 0.5 * alpha * _reciprocal(fma(z, z, 1.0))
    elif KIND == 2:  # piecewise_quadratic
        return tl.maximum(alpha - alpha * alpha * a, 0.0)
    elif KIND == 3:  # piecewise_exp
        return 0.5 * alpha * _exp(a, -alpha)
    elif KIND == 4:  # soft_sign
        r = _reciprocal(fma(a, alpha, 1.0))
        return 0.5 * alpha * (r * r)
    elif KIND == 5:  # super_spike
        r = _reciprocal(1.0 + a)
        return alpha * (r * r)
    elif KIND == 6:  # erf
        z = alpha * u
        return alpha * 0.5641895835477563 * _exp(z * z, -1.0)
    else:  # triangle
        return tl.maximum(1.0 - alpha * a, 0.0)


@triton.jit
def step_grad(h, ds, dv, v_threshold, v_reset, alpha, KIND: tl.constexpr, SOFT_RESET: tl.constexpr, DETACH_RESET: tl.constexpr):
    """dh from ds and dv (gradient of the membrane after reset)."""
    if not DETACH_RESET:
        if SOFT_RESET:
            ds = ds - dv * v_threshold
        else:
            ds = ds + dv * (v_reset - h)
    if not SOFT_RESET:
        dv = tl.where(h >= v_threshold, 0.0, dv)
    return fma(ds, surrogate_grad(h - v_threshold, alpha, KIND), dv)


@triton.jit
def charge_grad_tau(v, x, tau, v_reset, DECAY_INPUT: tl.constexpr):
    leak = v - v_reset
    if DECAY_INPUT:
        return (leak - x) / (tau * tau)
    else:
        return leak / (tau * tau)


@triton.jit
def load_steps(ptr, at, first, steps, stride, mask, SEGMENT: tl.constexpr, LONG: tl.constexpr):
    """What lies at SEGMENT steps from ``first`` on, as it is in memory: all loads before the first use, and before any store
    that could be to the same place. LONG: some of them may be behind the last step.
    """
    found = ()
    for i in tl.static_range(SEGMENT):
        found = found + (tl.load(ptr + at + (first + i) * stride, mask=of_step(mask, first + i, steps, LONG), other=0.0),)
    return found


@triton.jit
def of_step(mask, t, steps, LONG: tl.constexpr):
    if LONG:
        return mask & (t < steps)
    else:
        return mask


@triton.jit
def advanced(new, old, here, LONG: tl.constexpr):
    """The state after a step: the new one unless the step is behind the last."""
    if LONG:
        return tl.where(here, new, old)
    else:
        return new


def segments(steps: int) -> dict[str, int | bool]:
    """How kernels take so many steps: SEGMENT of them at a time, in registers."""
    return {"SEGMENT": min(steps, SEGMENT), "LONG": steps > SEGMENT}


def has_exact_inverse(tau: float | Tensor) -> bool:
    """Whether tau is known to be a power of two."""
    return not isinstance(tau, Tensor) and math.frexp(single(tau))[0] == 0.5


def single(value: float) -> float:
    """Rounded to float32, as a launch does; the interpreter would keep all digits."""
    return ctypes.c_float(value).value


def neuron_numbers(
    tau: float | Tensor, v_threshold: float, v_reset: float | None, x: Tensor
) -> tuple[Tensor, float, float, float]:
    """Of a launch: where a kernel reads a tensor tau (else any pointer), then tau, v_threshold and v_reset."""
    learnt = isinstance(tau, Tensor)
    numbers = (1.0 if learnt else tau, v_threshold, 0.0 if v_reset is None else v_reset)
    return (tau if learnt else x), *map(single, numbers)
