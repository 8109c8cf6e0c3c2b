"""``ops.spike_matmul_lif``, ``spike_conv2d_lif``, ``spike_attention_lif``: products of spikes and the neurons behind."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _backends
from ._native import as_float
from .lif import checked_neuron
from .max_pool import check_pool
from .packed import PackedSpikes, word_count
from .reference.max_pool import pooled_size
from .sequence import Sequence
from .spike_attention import check_attention, spike_attention
from .spike_conv2d import out_size, pair, spike_conv2d
from .spike_matmul import check_beside, check_bias, spike_matmul
from .weights import SpikeWeights


def spike_matmul_lif(
    s: PackedSpikes,
    w: SpikeWeights,
    bias: Tensor | None = None,
    *,
    add: Tensor | None = None,
    currents: Tensor | None = None,
    tau: float = 2.0,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    decay_input: bool = True,
    backend: str = "auto",
    sequence: Sequence | None = None,
) -> PackedSpikes:
    """``lif(s @ w + bias + add)`` over all time-steps, from packed spikes to packed spikes, without a gradient.

    On a CPU the neurons are the epilogue of the event-driven product: currents and membranes stay in the caches and one bit a
    spike is written; what up to four neighbouring steps have in common is added once, so that over several steps this is faster
    than a dense product whatever the density. On a GPU with Triton they are its epilogue in registers. Elsewhere, and for a
    max-pool on a GPU, it is the ops one after the other. Currents and membranes are float32; the spikes are those of
    :func:`spikeclip.ops.lif`.

    Args:
        s: packed spikes ``[T, ..., K]``.
        w: :func:`prepare_weights` of ``[K, N]``, float32 or integers.
        bias: float ``[N]``, or None; like ``add`` it gets no gradient.
        add: float32 ``[T, ..., N]``, contiguous, added to the currents (a residual stream), or None.
        currents: a contiguous float32 tensor ``[T, ..., N]``, maybe ``add`` itself, that the currents are written to, or None.
        tau, v_threshold, v_reset, decay_input: the neuron, as for :func:`spikeclip.ops.lif`; tau is a number.
        backend: ``auto``, ``cpu``, ``cuda``, ``triton`` or ``torch``; a named one never falls back.
        sequence: a :class:`Sequence` to record the call in, in place of making it, or None; on a CPU.

    Returns:
        Packed spikes ``[T, ..., N]``.

    Raises:
        TypeError: an argument of the wrong type. ValueError: a shape, dtype, device or number outside the above.
        RuntimeError: the named backend is not available, or ``s`` carries a gradient.
    """
    _check(s, w, bias, 2)
    if s.length != w.shape[0]:
        raise ValueError(f"s must have K = {w.shape[0]} spikes in its last dimension, as w [K, N] has rows; got {s.length}")
    shape = (*s.shape[:-1], w.shape[1])
    neuron = checked_neuron(tau, v_threshold, v_reset, decay_input, backend)
    return _run(s, w, bias, None, None, shape, add, currents, neuron, backend, sequence)


def spike_conv2d_lif(
    s: PackedSpikes,
    w: SpikeWeights,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    pool: tuple[int, int, int] | None = None,
    add: Tensor | None = None,
    currents: Tensor | None = None,
    tau: float = 2.0,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    decay_input: bool = True,
    backend: str = "auto",
    sequence: Sequence | None = None,
) -> PackedSpikes:
    """``lif(max_pool(conv2d(s, w) + bias))``, as :func:`spike_matmul_lif`, for spikes ``[T, B, H, W, C]``.

    Args:
        s: packed spikes ``[T, B, H, W, C]``.
        w: :func:`prepare_weights` of ``[O, C, kh, kw]``.
        stride, padding: as for :func:`spike_conv2d`.
        pool: (size, stride, padding) of a max-pool before the neurons, or None; not together with ``add`` or ``currents``.
        bias, add, currents, tau, v_threshold, v_reset, decay_input, backend, sequence: as for :func:`spike_matmul_lif`.

    Returns:
        Packed spikes ``[T, B, OH, OW, O]``.

    Raises:
        As :func:`spike_matmul_lif`; also ValueError for a window larger than the padded image.
    """
    _check(s, w, bias, 4)
    if len(s.shape) != 5 or s.length != w.shape[1]:
        raise ValueError(f"s must have shape [T, B, H, W, {w.shape[1]}], as w [O, C, kh, kw] has channels; got {list(s.shape)}")
    window = pair("stride", stride, 1), pair("padding", padding, 0)
    size = out_size(s.shape[2:4], w.shape[2:], *window)
    if min(size) < 1:
        raise ValueError(f"w's window {list(w.shape[2:])} must fit into the padded image; got {list(s.shape)}")
    shape = (*s.shape[:2], *size, w.shape[0])
    if pool is not None:
        check_pool(pool, shape)
        if add is not None or currents is not None:
            raise ValueError("pool must be None beside add or currents")
        shape = (*s.shape[:2], *pooled_size(size, pool), w.shape[0])
    neuron = checked_neuron(tau, v_threshold, v_reset, decay_input, backend)
    return _run(s, w, bias, window, pool, shape, add, currents, neuron, backend, sequence)


def spike_attention_lif(
    q: PackedSpikes,
    k: PackedSpikes | None = None,
    v: PackedSpikes | None = None,
    *,
    scale: float,
    num_heads: int,
    tau: float = 2.0,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    decay_input: bool = True,
    backend: str = "auto",
    sequence: Sequence | None = None,
) -> PackedSpikes:
    """``lif(spike_attention(q, k, v))``, as :func:`spike_matmul_lif`; fused for heads of 16, 32, 48 or 64 channels.

    Args:
        q: packed spikes ``[T, B, N, C]``, or queries, keys and values in one, side by side, ``[T, B, N, 3 C]``.
        k, v: ``[T, B, S, C]``; None beside queries, keys and values in one.
        scale, num_heads: as for :func:`spike_attention`.
        tau, v_threshold, v_reset, decay_input, backend, sequence: as for :func:`spike_matmul_lif`.

    Returns:
        Packed spikes ``[T, B, N, C]``.

    Raises:
        As :func:`spike_matmul_lif` and :func:`spike_attention`.
    """
    for name, s in (("q", q), ("k", k), ("v", v)):
        if s is None and name != "q":
            continue
        _check_spikes(name, s)
        if len(s.shape) != 4:
            raise ValueError(f"{name} must have shape [T, B, tokens, C]; got {list(s.shape)}")
    (_, k_words, v_words), channels = check_attention(q, k, v, scale, num_heads, backend)
    neuron = checked_neuron(tau, v_threshold, v_reset, decay_input, backend)
    name = _backends.chosen(backend, q.device.type, torch.float32)
    _check_sequence(sequence, name)
    functions = _backends.functions(backend, q.device.type, torch.float32)
    tokens = q.shape[2] if k is None else k.shape[2]
    fused = name == "cpu" and q.words.numel() and tokens and channels // num_heads in Sequence.HEADS
    call = (q.words, k_words, v_words, channels, num_heads, float(scale), *neuron)
    if sequence is not None:
        if not fused:
            heads = f"{num_heads} of {channels // num_heads} channels, for {q.shape[2]} and {tokens} tokens"
            raise ValueError(f"sequence needs heads of 16, 32, 48 or 64 channels, and tokens; got {heads}")
        words = sequence.spike_attention_lif(*call)
    elif fused:
        words = functions.spike_attention_lif(*call)
    else:
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            counts = spike_attention(q, k, v, scale=scale, num_heads=num_heads, backend=backend)
            words, _ = functions.bn_lif_fwd(counts, None, None, None, *neuron, torch.int32)
    return PackedSpikes.trusted(words, channels)


def _check_spikes(name: str, s: PackedSpikes) -> None:
    if not isinstance(s, PackedSpikes):
        raise TypeError(f"{name} must be PackedSpikes; got {type(s).__name__}")
    if len(s.shape) < 2 or not s.shape[0]:
        raise ValueError(f"{name} must have shape [T, ..., K] with T >= 1; got {list(s.shape)}")
    if s.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{name} carries a gradient, and this op has none: call it under torch.no_grad()")


def _check(s, w, bias, dim: int) -> None:
    _check_spikes("s", s)
    if not isinstance(w, SpikeWeights):
        raise TypeError(f"w must be SpikeWeights (ops.prepare_weights); got {type(w).__name__}")
    if w.values.dim() != dim or 0 in w.shape:
        raise ValueError(f"w must have {dim} dimensions, none of them 0; got {list(w.shape)}")
    check_beside("w", w.values, s.words)
    check_bias(bias, w.shape[1 if dim == 2 else 0], s.words)


def _check_sequence(sequence: Sequence | None, name: str) -> None:
    if sequence is None:
        return
    if not isinstance(sequence, Sequence):
        raise TypeError(f"sequence must be an ops.Sequence or None; got {type(sequence).__name__}")
    if name != "cpu":
        raise ValueError(f"sequence must be None for the {name} backend: it records calls of cpu alone")


def _run(s, w, bias, window, pool, shape, add, currents, neuron, backend, sequence):
    for name, tensor in (("add", add), ("currents", currents)):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor or None; got {type(tensor).__name__}")
        if tensor.shape != shape or tensor.dtype != torch.float32 or not tensor.is_contiguous():
            given = f"{tensor.dtype} of shape {list(tensor.shape)}"
            raise ValueError(f"{name} must be float32, contiguous and of shape {list(shape)}; got {given}")
        check_beside(name, tensor, s.words)
    name = _backends.chosen(backend, s.device.type, torch.float32)
    _check_sequence(sequence, name)
    functions = _backends.functions(backend, s.device.type, torch.float32)
    words = s.words.new_empty((*shape[:-1], word_count(shape[-1])))
    if not words.numel():
        return PackedSpikes.trusted(words, shape[-1])
    if sequence is not None:
        sequence.spike_lif(s, w, as_float(bias), window, pool, add, currents, neuron, words)
        return PackedSpikes.trusted(words, shape[-1])
    if name == "cpu" or (name == "triton" and pool is None):
        functions.spike_lif(s.words, s.length, w, bias, window, pool, add, currents, *neuron, words)
        return PackedSpikes.trusted(words, shape[-1])
    with torch.no_grad(), torch.autocast(s.device.type, enabled=False):
        if window is None:
            y = spike_matmul(s, w, bias, backend=backend)
        else:
            y = spike_conv2d(s.flatten(0, 1), w, bias, stride=window[0], padding=window[1], backend=backend)
            y = y.permute(0, 2, 3, 1).unflatten(0, s.shape[:2])
        y = (y if add is None else y + add).contiguous()
        if currents is not None:
            currents.copy_(y)
        if pool is not None:
            y, _ = functions.max_pool(y, torch.ones_like(y[0, 0, 0, 0]), pool)
        words, _ = functions.bn_lif_fwd(y, None, None, None, *neuron, torch.int32)
    return PackedSpikes.trusted(words, shape[-1])
