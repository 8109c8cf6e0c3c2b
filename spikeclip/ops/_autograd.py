"""How every op of this package hangs under autograd: by hand, as ``torch.library.register_autograd`` costs 30 us a call."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

below_autograd = torch._C._AutoDispatchBelowAutograd


def with_autograd(function: type[torch.autograd.Function], op):
    """The Autograd kernel of ``op``: through ``function`` where a gradient may be asked for, else straight on."""

    def call(*args):
        if forward_ad._current_level >= 0:
            _refuse_tangents(op, args)
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return function.apply(*args)
        with below_autograd():
            return op(*args)

    return call


def _refuse_tangents(op, args: tuple) -> None:
    """Below autograd a tangent would be lost without a word."""
    if any(isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args):
        name = op.name().removeprefix("spikeclip::")
        raise RuntimeError(f"spikeclip.ops.{name} has no forward-mode derivative: use reverse mode (backward, torch.func.vjp)")


def no_second_derivative(name: str, op) -> type[torch.autograd.Function]:
    """The autograd function of a gradient op: it runs ``op`` and refuses to be differentiated."""

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            with below_autograd():
                return op(*args)

        @staticmethod
        def backward(ctx, *grads):
            raise RuntimeError(f"spikeclip.ops.{name} has no second derivative: call backward() without create_graph=True")

    return Gradient


def below_autocast(device_type: str):
    """A context in which ``device_type``'s autocast kernels are passed over."""
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}"))
    return torch._C._ExcludeDispatchKeyGuard(key)
