"""One time-step of the neuron in Triton, forward and backward: the only place with this math in Triton.

Numbers equal plain torch: divisions are correctly rounded here, and launches switch fused multiply-add off.
"""

import triton
import triton.language as tl


@triton.jit
def charge(v, x, tau, v_reset, DECAY_INPUT: tl.constexpr):
    leak = v - v_reset
    if DECAY_INPUT:
        return v + tl.div_rn(x - leak, tau)
    else:
        return (v - tl.div_rn(leak, tau)) + x


@triton.jit
def reset(h, v_threshold, v_reset, SOFT_RESET: tl.constexpr):
    s = h >= v_threshold
    if SOFT_RESET:
        return h - tl.where(s, v_threshold, 0.0)
    else:
        return tl.where(s, v_reset, h)


@triton.jit
def surrogate_grad(u, alpha, KIND: tl.constexpr):
    """d(spike)/d(u); KIND is the row's index in spikeclip/ops/surrogate.py."""
    a = tl.abs(u)
    if KIND == 0:  # sigmoid
        e = tl.exp(-alpha * a)
        return alpha * e / ((1.0 + e) * (1.0 + e))
    elif KIND == 1:  # atan
        z = 1.5707963267948966 * alpha * u
        return 0.5 * alpha / (1.0 + z * z)
    elif KIND == 2:  # piecewise_quadratic
        return tl.maximum(alpha - alpha * alpha * a, 0.0)
    elif KIND == 3:  # piecewise_exp
        return 0.5 * alpha * tl.exp(-alpha * a)
    elif KIND == 4:  # soft_sign
        d = 1.0 + alpha * a
        return 0.5 * alpha / (d * d)
    elif KIND == 5:  # super_spike
        d = 1.0 + a
        return alpha / (d * d)
    elif KIND == 6:  # erf
        z = alpha * u
        return alpha * 0.5641895835477563 * tl.exp(-z * z)
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
    dh = ds * surrogate_grad(h - v_threshold, alpha, KIND)
    if SOFT_RESET:
        return dh + dv
    else:
        return dh + tl.where(h >= v_threshold, 0.0, dv)


@triton.jit
def charge_grad_tau(v, x, tau, v_reset, DECAY_INPUT: tl.constexpr):
    leak = v - v_reset
    if DECAY_INPUT:
        return (leak - x) / (tau * tau)
    else:
        return leak / (tau * tau)
