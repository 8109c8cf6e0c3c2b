"""Who computes LIF in the benchmarks: ``name -> make(case)``, a callable ``x -> spikes``, all of the same neuron.

tau 2, hard reset to 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Run = Callable[[Tensor], Tensor]


class Missing(Exception):
    """The peer is not installed, or does not serve this case; the message says which."""


class Neuron(NamedTuple):
    """``surrogate`` is sigmoid with alpha 4 or atan with alpha 2; ``decay_input``: whether the input is divided by tau."""

    surrogate: str
    decay_input: bool = True
    detach_reset: bool = False
    v_threshold: float = 1.0


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return (u >= 0).to(u)

    @staticmethod
    def backward(ctx, g):
        s = torch.sigmoid(4.0 * ctx.saved_tensors[0])
        return g * 4.0 * s * (1.0 - s)


class _ATan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return (u >= 0).to(u)

    @staticmethod
    def backward(ctx, g):
        return g / (1.0 + (math.pi * ctx.saved_tensors[0]).square())


def plain_loop(neuron: Neuron) -> Run:
    """What a user writes by hand."""
    spike = {"sigmoid": _Sigmoid, "atan": _ATan}[neuron.surrogate].apply

    def run(x: Tensor) -> Tensor:
        v = torch.zeros_like(x[0])
        spikes = []
        for t in range(x.shape[0]):
            h = v + (x[t] - v) / 2.0 if neuron.decay_input else v - v / 2.0 + x[t]
            s = spike(h - neuron.v_threshold)
            v = h * (1.0 - (s.detach() if neuron.detach_reset else s))
            spikes.append(s)
        return torch.stack(spikes)

    return run


def compiled_loop(neuron: Neuron) -> Run:
    torch.compiler.reset()
    return torch.compile(plain_loop(neuron), fullgraph=True)


def ours(backend: str) -> Callable[[Neuron], Run]:
    def make(neuron: Neuron) -> Run:
        from spikeclip.nn import LIF

        return LIF(2.0, neuron.decay_input, surrogate_function=neuron.surrogate, backend=backend)

    return make


def _spikingjelly(neuron: Neuron):
    try:
        from spikingjelly.activation_based import surrogate
    except ImportError as error:
        raise Missing("spikingjelly is not installed (the bench extra has it)") from error
    return {"sigmoid": surrogate.Sigmoid, "atan": surrogate.ATan}[neuron.surrogate]()


def spikingjelly_lif(neuron: Neuron) -> torch.nn.Module:
    """SpikingJelly's module; it must be reset between batches."""
    function = _spikingjelly(neuron)
    from spikingjelly.activation_based.neuron import LIFNode

    options = {"surrogate_function": function, "detach_reset": neuron.detach_reset, "step_mode": "m"}
    return LIFNode(2.0, neuron.decay_input, v_threshold=neuron.v_threshold, **options)


def spikingjelly_node(neuron: Neuron) -> Run:
    node = spikingjelly_lif(neuron)

    def run(x: Tensor) -> Tensor:
        node.reset()
        return node.to(x.device)(x)

    return run


def spikingjelly_compiled(neuron: Neuron) -> Run:
    function = _spikingjelly(neuron)
    from spikingjelly.activation_based.functional import lif_multi_step

    def run(x: Tensor) -> Tensor:
        v = torch.zeros_like(x[0], dtype=torch.float32)
        return lif_multi_step(x, v, 2.0, neuron.decay_input, 1.0, 0.0, surrogate_function=function)[0]

    torch.compiler.reset()
    return torch.compile(run)


def snntorch_module(neuron: Neuron) -> torch.nn.Module:
    """snnTorch's module, of one time-step a call."""
    if neuron.decay_input:
        raise Missing("snnTorch's Leaky does not divide the input by tau")
    try:
        import snntorch
        from snntorch import surrogate
    except ImportError as error:
        raise Missing("snntorch is not installed (the bench extra has it)") from error
    grad = {"sigmoid": lambda: surrogate.sigmoid(slope=4), "atan": lambda: surrogate.atan(alpha=2.0)}[neuron.surrogate]()
    options = {"spike_grad": grad, "reset_mechanism": "zero", "reset_delay": False}
    return snntorch.Leaky(beta=0.5, threshold=neuron.v_threshold, **options)


def snntorch_leaky(neuron: Neuron) -> Run:
    leaky = snntorch_module(neuron)

    def run(x: Tensor) -> Tensor:
        mem = torch.zeros_like(x[0])
        spikes = []
        for step in x:
            s, mem = leaky(step, mem)
            spikes.append(s)
        return torch.stack(spikes)

    return run


PEERS: dict[str, Callable[[Neuron], Run]] = {
    "plain loop": plain_loop,
    "torch.compile of the plain loop": compiled_loop,
    "SpikingJelly LIFNode": spikingjelly_node,
    "torch.compile of SpikingJelly lif_multi_step": spikingjelly_compiled,
    "snnTorch Leaky": snntorch_leaky,
}
