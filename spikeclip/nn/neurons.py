"""Multi-step spiking neurons with SpikingJelly's argument names, defaults and numbers."""

from __future__ import annotations

import math
import re
from numbers import Real

import torch
from torch import Tensor, nn

from ..ops import PackedSpikes, lif
from ..ops.lif import check_neuron
from ..ops.surrogate import SURROGATES


class _Neuron(nn.Module):
    """What IF, LIF and PLIF share: threshold, reset, surrogate, backend and the optional state."""

    def __init__(self, v_threshold, v_reset, surrogate_function, detach_reset, step_mode, backend, stateful, packed):
        super().__init__()
        if step_mode != "m":
            raise ValueError(f"step_mode must be 'm': inputs carry all time-steps first, [T, ...]; got {step_mode!r}")
        self.v_threshold = v_threshold
        self.v_reset = v_reset
        self.surrogate, self.alpha = named_surrogate(surrogate_function)
        check_neuron(v_threshold, v_reset, True, detach_reset, self.surrogate, self.alpha, backend)
        self.detach_reset = detach_reset
        self.backend = backend
        self.stateful = stateful
        self.packed = packed
        self.v: Tensor | None = None

    def _spikes(self, x: Tensor, tau: float | Tensor, decay_input: bool) -> Tensor | PackedSpikes:
        v = self.v
        if v is not None and v.is_inference() and not torch.is_inference_mode_enabled():
            v = v.clone()  # autograd does not take what inference mode made
        spikes, v = lif(
            x,
            v,
            tau=tau,
            v_threshold=self.v_threshold,
            v_reset=self.v_reset,
            decay_input=decay_input,
            detach_reset=self.detach_reset,
            surrogate=self.surrogate,
            alpha=self.alpha,
            packed=self.packed,
            backend=self.backend,
        )
        if self.stateful:
            self.v = v
        return spikes

    def _apply(self, fn, recurse: bool = True) -> _Neuron:
        super()._apply(fn, recurse)
        if self.v is not None:
            self.v = fn(self.v).to(self.v.dtype)  # it moves with the module and stays float32
        return self

    def reset(self) -> None:
        """Forget the membrane of a stateful neuron; nothing to do for others."""
        self.v = None

    def detach(self) -> None:
        """Keep a stateful neuron's membrane but cut its history (truncated back-propagation through time)."""
        if self.v is not None:
            self.v = self.v.detach()

    def extra_repr(self) -> str:
        text = (
            f"v_threshold={self.v_threshold}, v_reset={self.v_reset}, surrogate_function={self.surrogate!r}, "
            f"alpha={self.alpha}, detach_reset={self.detach_reset}, backend={self.backend!r}"
        )
        return text + (", stateful=True" if self.stateful else "") + (", packed=True" if self.packed else "")


class LIF(_Neuron):
    """Leaky integrate-and-fire neurons over all time-steps: ``[T, ...]`` currents in, ``[T, ...]`` spikes out.

    Arguments, defaults and numbers are those of SpikingJelly's multi-step ``LIFNode``; see :func:`spikeclip.ops.lif` for
    the equations, dtypes and errors. Unlike there nothing has to be reset between batches.

    Args:
        tau: membrane time constant in steps, > 1.
        decay_input: whether the input is divided by ``tau`` too.
        v_threshold: firing threshold.
        v_reset: membrane after a spike; None for soft reset.
        surrogate_function: a surrogate's name, or a surrogate object of SpikingJelly (its class and ``alpha`` are read).
        detach_reset: whether gradients stop at the reset.
        step_mode: only ``"m"``, accepted so that existing constructor calls keep working.
        backend: see :func:`spikeclip.ops.lif`.
        stateful: carry the membrane over to the next call, until ``reset()``.
        packed: spikes come out as :class:`~spikeclip.ops.PackedSpikes` along the last dimension, for layers that spikes feed.
    """

    def __init__(
        self,
        tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: str | object = "sigmoid",
        detach_reset: bool = False,
        step_mode: str = "m",
        backend: str = "auto",
        *,
        stateful: bool = False,
        packed: bool = False,
    ):
        super().__init__(v_threshold, v_reset, surrogate_function, detach_reset, step_mode, backend, stateful, packed)
        self.tau = checked_tau("tau", tau)
        self.decay_input = decay_input

    def forward(self, x: Tensor) -> Tensor | PackedSpikes:
        return self._spikes(x, self.tau, self.decay_input)

    def extra_repr(self) -> str:
        return f"tau={self.tau}, decay_input={self.decay_input}, {super().extra_repr()}"


class PLIF(_Neuron):
    """LIF whose time constant is learnt, ``1 / tau = sigmoid(w)`` (Fang et al. 2021, arXiv 2007.05785).

    Arguments as for :class:`LIF`, with ``init_tau`` for ``tau``; the parameter ``w`` is named as in SpikingJelly's
    ``ParametricLIFNode``, so state dicts are interchangeable.
    """

    def __init__(
        self,
        init_tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: str | object = "sigmoid",
        detach_reset: bool = False,
        step_mode: str = "m",
        backend: str = "auto",
        *,
        stateful: bool = False,
        packed: bool = False,
    ):
        super().__init__(v_threshold, v_reset, surrogate_function, detach_reset, step_mode, backend, stateful, packed)
        self.decay_input = decay_input
        self.w = nn.Parameter(torch.tensor(-math.log(checked_tau("init_tau", init_tau) - 1.0)))

    @property
    def tau(self) -> Tensor:
        """The time constant, a scalar that stays > 1 in float32 even where ``sigmoid(w)`` rounds to 1."""
        least = 1.0 + max(torch.finfo(self.w.dtype).eps, torch.finfo(torch.float32).eps)
        return (1.0 / self.w.sigmoid()).clamp_min(least)

    def forward(self, x: Tensor) -> Tensor | PackedSpikes:
        return self._spikes(x, self.tau, self.decay_input)

    def extra_repr(self) -> str:
        return f"tau={self.tau.item():.6g}, decay_input={self.decay_input}, {super().extra_repr()}"


class IF(_Neuron):
    """Integrate-and-fire neurons, ``h = v + x``: LIF without a leak. Arguments as for :class:`LIF`."""

    def __init__(
        self,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: str | object = "sigmoid",
        detach_reset: bool = False,
        step_mode: str = "m",
        backend: str = "auto",
        *,
        stateful: bool = False,
        packed: bool = False,
    ):
        super().__init__(v_threshold, v_reset, surrogate_function, detach_reset, step_mode, backend, stateful, packed)

    def forward(self, x: Tensor) -> Tensor | PackedSpikes:
        return self._spikes(x, math.inf, False)


def checked_tau(name: str, tau: float) -> float:
    """``tau`` as a float. Raises ValueError unless it is a finite number > 1."""
    if isinstance(tau, bool) or not isinstance(tau, Real) or not 1.0 < tau < math.inf:
        raise ValueError(f"{name} must be a finite number > 1 (in time-steps); got {tau!r}")
    return float(tau)


def named_surrogate(function: str | object) -> tuple[str, float]:
    """(name, alpha) of a name or of an object like SpikingJelly's ``surrogate.ATan(alpha=2.0)``."""
    if isinstance(function, str):
        name, alpha = function, None
    else:
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(function).__name__).lower()
        name = "atan" if name == "atan" or name == "a_tan" else name
        alpha = getattr(function, "alpha", None)
        if getattr(function, "spiking", True) is not True:
            raise ValueError(f"surrogate_function must spike in the forward pass; got {function!r} with spiking=False")
    if name not in SURROGATES:
        raise ValueError(
            f"surrogate_function must be one of {', '.join(SURROGATES)}, or an object of such a class; got {function!r}"
        )
    return name, SURROGATES[name].alpha if alpha is None else float(alpha)
