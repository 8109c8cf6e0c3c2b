"""The LIF neuron in float64 with gradients by autograd: written from the equations, sharing no code with the package."""

import math

import torch
from torch import Tensor


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, grad):
        ctx.grad = grad
        ctx.save_for_backward(u)
        return (u >= 0).to(u.dtype)

    @staticmethod
    def backward(ctx, g):
        (u,) = ctx.saved_tensors
        return g * ctx.grad(u), None


def surrogate_gradient(name: str, alpha: float):
    def sigmoid(u):
        s = torch.sigmoid(alpha * u)
        return alpha * s * (1 - s)

    return {
        "sigmoid": sigmoid,
        "atan": lambda u: alpha / 2 / (1 + (math.pi / 2 * alpha * u) ** 2),
        "piecewise_quadratic": lambda u: torch.where(u.abs() <= 1 / alpha, alpha - alpha**2 * u.abs(), 0.0),
        "piecewise_exp": lambda u: alpha / 2 * torch.exp(-alpha * u.abs()),
        "soft_sign": lambda u: alpha / 2 / (1 + (alpha * u).abs()) ** 2,
        "super_spike": lambda u: alpha / (1 + u.abs()) ** 2,
        "erf": lambda u: alpha / math.sqrt(math.pi) * torch.exp(-(alpha**2) * u**2),
        "triangle": lambda u: torch.where(u.abs() < 1 / alpha, 1 - alpha * u.abs(), 0.0),
    }[name]


def lif(x: Tensor, v0: Tensor, tau: Tensor, v_threshold, v_reset, decay_input, detach_reset, surrogate, alpha):
    """x [T, ...], v0 [...], tau [] float64 -> (spikes, v_last, h of every step)."""
    gradient = surrogate_gradient(surrogate, alpha)
    rest = 0.0 if v_reset is None else v_reset
    v, spikes, charged = v0, [], []
    for current in x:
        h = v + (current - (v - rest)) / tau if decay_input else v - (v - rest) / tau + current
        s = _Spike.apply(h - v_threshold, gradient)
        gate = s.detach() if detach_reset else s
        v = h - gate * v_threshold if v_reset is None else gate * v_reset + (1 - gate) * h
        spikes.append(s)
        charged.append(h)
    return torch.stack(spikes), v, torch.stack(charged)
