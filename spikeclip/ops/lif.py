"""``ops.lif``: the fused multi-timestep leaky integrate-and-fire neuron, as a torch op with its gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _backends
from ._autograd import below_autocast, below_autograd, no_second_derivative, with_autograd
from ._dtypes import FLOATS, NUMBERS, compute_dtype
from .packed import PackedSpikes, new_edge, word_count
from .surrogate import SURROGATES

_NEURON = "float tau, Tensor? tau_tensor, float v_threshold, float? v_reset, bool decay_input"

_library = torch.library.Library("spikeclip", "FRAGMENT")
_library.define(
    f"lif_fwd(Tensor x, Tensor? v0, {_NEURON}, bool detach_reset, str surrogate, float alpha, "
    "ScalarType? spike_dtype, str backend) -> (Tensor, Tensor)"
)
_library.define(
    f"lif_bwd(Tensor? ds, Tensor? dv_last, Tensor x, Tensor? v0, {_NEURON}, bool detach_reset, str surrogate, "
    "float alpha, str backend) -> (Tensor, Tensor, Tensor)"
)


def lif(
    x: Tensor,
    v0: Tensor | None = None,
    *,
    tau: float | Tensor = 2.0,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    decay_input: bool = True,
    detach_reset: bool = False,
    surrogate: str = "sigmoid",
    alpha: float | None = None,
    packed: bool = False,
    backend: str = "auto",
) -> tuple[Tensor | PackedSpikes, Tensor]:
    """Leaky integrate-and-fire neurons over all time-steps at once, differentiable in ``x``, ``v0`` and ``tau``.

    For every step t, elementwise over the neurons::

        h = v + (x[t] - (v - v_reset)) / tau      if decay_input, else   h = v - (v - v_reset) / tau + x[t]
        s[t] = h >= v_threshold
        v = s[t] ? v_reset : h                    (hard reset)    or     h - s[t] * v_threshold   (v_reset=None)

    The membrane is kept in float32 inside (float64 for float64 ``x``) whatever the dtype of ``x``, and the backward
    pass recomputes it from ``x``: nothing else of the size of ``x`` is kept. Semantics follow SpikingJelly's
    ``LIFNode`` (Fang et al. 2023, doi 10.1126/sciadv.adi1480); surrogate gradients follow Neftci et al. 2019
    (arXiv 1901.09948).

    Args:
        x: input current, float32, float16, bfloat16 or float64, ``[T, ...]`` with T >= 1, any strides; when time is
            its slowest dimension (channels-last activations, say) its memory order is kept.
        v0: membrane before the first step, floating, of shape ``x.shape[1:]``; None starts at ``v_reset`` (0 for soft).
        tau: membrane time constant in steps, > 1 (``inf``: no leak), or a tensor of one element, which may require a
            gradient (PLIF). The value of a tensor on an accelerator is not checked: that would stall it.
        v_threshold: firing threshold, finite; the comparison is inclusive.
        v_reset: membrane after a spike; None subtracts ``v_threshold`` instead (soft reset).
        decay_input: whether the input is divided by ``tau`` too.
        detach_reset: whether gradients stop at the reset.
        surrogate: one of sigmoid, atan, piecewise_quadratic, piecewise_exp, soft_sign, super_spike, erf, triangle.
        alpha: sharpness of the surrogate, > 0; None takes the surrogate's default.
        packed: whether spikes come out at one bit each, packed along x's last dimension, for the ops that take
            :class:`PackedSpikes`; their gradient, from those ops, is dense. ``x`` then has two dimensions at least.
        backend: ``auto``, ``cpu``, ``cuda``, ``triton`` or ``torch``; a named one never falls back.

    Returns:
        ``(spikes, v_last)``: spikes in {0, 1}, the shape and dtype of ``x`` (under autocast, the autocast dtype, in
        which they are exact), or :class:`PackedSpikes`; ``v_last`` the membrane after the last step, float32 (float64
        for float64 ``x``), so that ``lif(x[k:], lif(x[:k])[1])`` continues the run bit for bit.

    Raises:
        TypeError: an argument of the wrong type. ValueError: a shape, dtype, device or number outside the
        above. RuntimeError: the named backend is not available, or a second derivative is asked for.
    """
    _check_input(x, v0)
    tau, tau_tensor = _check_tau(tau, x)
    check_neuron(v_threshold, v_reset, decay_input, detach_reset, surrogate, alpha, backend)
    v_threshold, v_reset = float(v_threshold), None if v_reset is None else float(v_reset)
    alpha = SURROGATES[surrogate].alpha if alpha is None else float(alpha)

    if packed:
        if x.dim() < 2:
            raise ValueError(f"x must have shape [T, ..., K] for packed spikes; got {list(x.shape)}")
        x, v0 = _contiguous_steps(x), None if v0 is None else v0.to(compute_dtype(x)).contiguous()
        learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, v0, tau_tensor))
        neuron = (v_threshold, v_reset, decay_input, detach_reset, surrogate, alpha)
        run = _LifPacked.apply if learns else _lif_fwd
        words, v_last, *edge = run(x, v0, tau, tau_tensor, *neuron, torch.int32, backend)
        return PackedSpikes.trusted(words, x.shape[-1], *edge), v_last
    x = _time_major(x)
    if v0 is not None:
        v0 = _laid_out_as(v0.to(compute_dtype(x)), x[0])
    return _lif_fwd(x, v0, tau, tau_tensor, v_threshold, v_reset, decay_input, detach_reset, surrogate, alpha, None, backend)


def check_neuron(v_threshold, v_reset, decay_input, detach_reset, surrogate, alpha, backend) -> None:
    """Raise TypeError or ValueError, naming the argument, unless :func:`lif` takes these."""
    if not isinstance(v_threshold, NUMBERS):
        raise TypeError(f"v_threshold must be a number; got {v_threshold!r}")
    if not -math.inf < v_threshold < math.inf:  # comparisons, unlike math.isfinite, can be traced for symbols
        raise ValueError(f"v_threshold must be a finite number; got {v_threshold}")
    if v_reset is not None:
        if not isinstance(v_reset, NUMBERS):
            raise TypeError(f"v_reset must be a number or None (soft reset); got {v_reset!r}")
        if not -math.inf < v_reset < math.inf:
            raise ValueError(f"v_reset must be a finite number or None (soft reset); got {v_reset}")
    if not (isinstance(decay_input, bool) and isinstance(detach_reset, bool)):
        raise TypeError(f"decay_input and detach_reset must be True or False; got {decay_input!r} and {detach_reset!r}")
    if not isinstance(surrogate, str):
        raise TypeError(f"surrogate must be a name; got {surrogate!r}")
    if surrogate not in SURROGATES:
        raise ValueError(f"surrogate must be one of {', '.join(SURROGATES)}; got {surrogate!r}")
    if alpha is not None:
        if not isinstance(alpha, NUMBERS):
            raise TypeError(f"alpha must be a number or None; got {alpha!r}")
        if not 0 < alpha < math.inf:
            raise ValueError(f"alpha must be a finite number > 0; got {alpha}")
    _backends.check_name(backend)


def check_tau(tau: float) -> None:
    """Raise TypeError or ValueError unless ``tau`` is a number > 1."""
    if not isinstance(tau, NUMBERS):
        raise TypeError(f"tau must be a number; got {tau!r}")
    if not tau > 1.0:
        raise ValueError(f"tau must be > 1 (in time-steps); got {tau}")


def checked_neuron(tau, v_threshold, v_reset, decay_input, backend) -> tuple[float, float, float | None, bool]:
    """The numbers of a neuron without a gradient. Raises as :func:`check_tau` and :func:`check_neuron`."""
    check_tau(tau)
    check_neuron(v_threshold, v_reset, decay_input, False, "sigmoid", None, backend)
    return float(tau), float(v_threshold), None if v_reset is None else float(v_reset), decay_input


def _check_input(x: Tensor, v0: Tensor | None) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor; got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise ValueError(f"x must be float32, float16, bfloat16 or float64; got {x.dtype}")
    if x.dim() == 0 or x.shape[0] == 0:
        raise ValueError(f"x must have shape [T, ...] with T >= 1 time-steps first; got {list(x.shape)}")
    if v0 is None:
        return
    if not isinstance(v0, Tensor):
        raise TypeError(f"v0 must be a torch.Tensor or None; got {type(v0).__name__}")
    if v0.shape != x.shape[1:]:
        raise ValueError(f"v0 must have shape {list(x.shape[1:])}, x's without time; got {list(v0.shape)}")
    if not v0.is_floating_point():
        raise ValueError(f"v0 must be floating; got {v0.dtype}")
    if v0.device != x.device:
        raise ValueError(f"v0 must be on x's device, {x.device}; got {v0.device}")


def _check_tau(tau: float | Tensor, x: Tensor) -> tuple[float, Tensor | None]:
    tensor = None
    if isinstance(tau, Tensor):
        if tau.numel() != 1 or not tau.is_floating_point():
            raise ValueError(f"tau must be a number or a floating tensor of one element; got {list(tau.shape)}, {tau.dtype}")
        if tau.device != x.device:
            raise ValueError(f"tau must be on x's device, {x.device}; got {tau.device}")
        tensor = tau.to(compute_dtype(x)).reshape(())
        readable = tau.device.type == "cpu" and not torch.compiler.is_compiling()
        tau = tau.item() if readable else 2.0
    elif not isinstance(tau, NUMBERS):
        raise TypeError(f"tau must be a number or a tensor; got {tau!r}")
    if not tau > 1.0:
        raise ValueError(f"tau must be > 1 (in time-steps); got {tau}")
    return (2.0 if tensor is not None else float(tau)), tensor


def _time_major(x: Tensor) -> Tensor:
    """x as a dense [T, N] block of memory: itself where it is one, else a copy that keeps the order of one step."""
    if x.is_contiguous():
        return x
    block = x[0]
    if not _dense(block):
        return x.contiguous()
    if x.shape[0] == 1 or x.stride(0) == block.numel():
        return x
    return x.new_empty_strided(x.shape, (block.numel(), *block.stride())).copy_(x)


def _contiguous_steps(x: Tensor) -> Tensor:
    """x as contiguous memory, of one step alone where it is the same at every step."""
    return x if _is_one_step(x) and x[0].is_contiguous() else x.contiguous()


def _is_one_step(x: Tensor) -> bool:
    """Whether memory holds one step that stands for several."""
    return x.stride(0) == 0 and x.shape[0] > 1


def gradient_memory(x: Tensor) -> Tensor:
    """For the gradient of x: laid out as x, or contiguous where x is one step, whose gradient differs from step to step."""
    return x.new_empty(x.shape) if _is_one_step(x) else torch.empty_like(x)


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory without gaps or overlaps, in any order of dimensions."""
    expected = 1
    for stride, size in sorted((st, n) for st, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _laid_out_as(tensor: Tensor, like: Tensor) -> Tensor:
    if tensor.stride() == like.stride():
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


_TAKE_ONE_STEP = ("cpu", "triton")  # whose packed forward pass reads an input that is the same at every step once


def _fwd(x, v0, tau, tau_tensor, v_threshold, v_reset, decay_input, detach_reset, surrogate, alpha, spike_dtype, backend):
    name = _backends.chosen(backend, x.device.type, x.dtype)
    backend = _backends.functions(backend, x.device.type, x.dtype)
    tau = tau if tau_tensor is None else tau_tensor
    if spike_dtype == torch.int32:
        x = x if name in _TAKE_ONE_STEP else x.contiguous()
        return backend.bn_lif_fwd(x, v0, None, None, tau, v_threshold, v_reset, decay_input, spike_dtype)
    return backend.lif_fwd(x, v0, tau, v_threshold, v_reset, decay_input, spike_dtype or x.dtype)


def _bwd(ds, dv_last, x, v0, tau, tau_tensor, v_threshold, v_reset, decay_input, detach_reset, surrogate, alpha, backend):
    name = _backends.chosen(backend, x.device.type, x.dtype)
    backend = _backends.functions(backend, x.device.type, x.dtype)
    if _is_one_step(x):
        x = x if name == "triton" else x.contiguous()
        ds = None if ds is None else ds.contiguous()
    elif ds is not None:
        ds = _laid_out_as(ds, x)
    if dv_last is not None:
        dv_last = _laid_out_as(dv_last, x[0])
    tau = tau if tau_tensor is None else tau_tensor
    return backend.lif_bwd(ds, dv_last, x, v0, tau, v_threshold, v_reset, decay_input, detach_reset, surrogate, alpha)


def _fwd_fake(x, *args):
    spike_dtype = args[-2]
    if spike_dtype == torch.int32:
        return x.new_empty((*x.shape[:-1], word_count(x.shape[-1])), dtype=torch.int32), x.new_empty(
            x.shape[1:], dtype=compute_dtype(x)
        )
    return torch.empty_like(x, dtype=spike_dtype or x.dtype), torch.empty_like(x[0], dtype=compute_dtype(x))


def _bwd_fake(ds, dv_last, x, v0, tau, tau_tensor, *args):
    none = x.new_empty(0, dtype=compute_dtype(x))
    dv0 = none if v0 is None else torch.empty_like(x[0], dtype=compute_dtype(x))
    return gradient_memory(x), dv0, none if tau_tensor is None else none.new_empty(())


def _save(ctx, x, v0, tau, tau_tensor, *options) -> None:
    ctx.save_for_backward(x, v0, tau_tensor)
    *neuron, _spike_dtype, backend = options
    ctx.options = (tau, neuron, backend)
    ctx.set_materialize_grads(False)


def _gradients(ctx, ds, dv_last) -> tuple:
    if ds is None and dv_last is None:
        return (None,) * 12
    x, v0, tau_tensor = ctx.saved_tensors
    tau, neuron, backend = ctx.options
    dx, dv0, dtau = _lif_bwd(ds, dv_last, x, v0, tau, tau_tensor, *neuron, backend)
    return dx, (None if v0 is None else dv0), None, (None if tau_tensor is None else dtau), *(None,) * 8


class _Lif(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        _save(ctx, *args)
        with below_autograd():
            return _lif_fwd(*args)

    @staticmethod
    def backward(ctx, ds, dv_last):
        return _gradients(ctx, ds, dv_last)


class _LifPacked(torch.autograd.Function):
    """Spikes as words, with an edge for their gradient: outside the dispatcher, as no op has an edge."""

    @staticmethod
    def forward(ctx, x, *rest):
        _save(ctx, x, *rest)
        words, v_last = _lif_fwd(x, *rest)
        ctx.mark_non_differentiable(words)
        return words, v_last, new_edge(x, x.shape, spikes_dtype(x))

    @staticmethod
    def backward(ctx, _, dv_last, ds):
        return _gradients(ctx, ds, dv_last)


def spikes_dtype(x: Tensor) -> torch.dtype:
    """What spikes of ``x`` come out in, and their gradient comes back in."""
    kind = x.device.type
    autocast = x.dtype == torch.float32 and kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if autocast else x.dtype


def _autocast(device_type: str):
    """The op's autocast kernel: x keeps its dtype, and spikes, exact in any, come out in the autocast dtype."""

    def call(x, *args):
        *rest, spike_dtype, backend = args
        if spike_dtype is None and x.dtype == torch.float32:
            spike_dtype = torch.get_autocast_dtype(device_type)
        with below_autocast(device_type):
            return _lif_fwd(x, *rest, spike_dtype, backend)

    return call


_lif_fwd = torch.ops.spikeclip.lif_fwd.default
_lif_bwd = torch.ops.spikeclip.lif_bwd.default
for _device in ("CPU", "CUDA"):
    _library.impl("lif_fwd", _fwd, _device)
    _library.impl("lif_bwd", _bwd, _device)
    _library.impl("lif_fwd", _autocast(_device.lower()), f"Autocast{_device}")
_library.impl("lif_fwd", with_autograd(_Lif, _lif_fwd), "Autograd")
_library.impl("lif_bwd", with_autograd(no_second_derivative("lif", _lif_bwd), _lif_bwd), "Autograd")
torch.library.register_fake("spikeclip::lif_fwd", _fwd_fake, lib=_library)
torch.library.register_fake("spikeclip::lif_bwd", _bwd_fake, lib=_library)
