"""``ops.Sequence``: fused calls on a CPU, recorded once and made again without Python between them."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _backends
from .lif import checked_neuron
from .packed import PackedSpikes


class Sequence:
    """Calls of :func:`spike_matmul_lif`, :func:`spike_conv2d_lif` and :func:`spike_attention_lif`, to be made again and again.

    An op that is given one (``sequence=``) records its call in place of making it: what it returns is filled by :meth:`run`,
    from what the tensors that it was given hold then. That saves what Python takes between the calls, a third of a small
    batch's time. It is for a CPU what a CUDA graph is for a GPU: a sequence keeps its tensors, whose contents may change in
    place and whose sizes may not, and is run by one thread at a time.

    Raises:
        RuntimeError: the C++ extension is not available.
    """

    HEADS = (16, 32, 48, 64)  # channels of a head that attention is recorded for

    @staticmethod
    def available(device: torch.device) -> bool:
        """Whether ``auto`` takes the kernels on this device whose calls can be recorded."""
        return _backends.chosen("auto", device.type, torch.float32) == "cpu"

    def __init__(self):
        self._calls = _backends.functions("cpu", "cpu", torch.float32).recording()
        self._tensors: list[object] = []

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are kept, those of prepared weights apart."""
        storages = [t.untyped_storage() for t in self._tensors if isinstance(t, Tensor)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def run(self) -> None:
        """Make the calls."""
        self._calls.run()

    def lif(
        self, x: Tensor, T: int, *, tau: float, v_threshold: float, v_reset: float | None, decay_input: bool
    ) -> PackedSpikes:
        """Record the packed spikes ``[T, ..., K]`` of neurons whose currents ``x [..., K]`` are the same at every step.

        Raises:
            TypeError, ValueError: ``x`` is not contiguous float32 on a CPU; T < 1; as :func:`lif` for the neuron.
        """
        neuron = checked_neuron(tau, v_threshold, v_reset, decay_input, "cpu")
        _check_floats("x", x)
        if not isinstance(T, int) or T < 1:
            raise ValueError(f"T must be an integer >= 1; got {T!r}")
        x = x.detach()
        words, v_last = self._calls.bn_lif_fwd(x.expand(T, *x.shape), None, None, None, *neuron, torch.int32)
        self._tensors += [x, words, v_last]
        return PackedSpikes.trusted(words, x.shape[-1])

    def mean(self, x: Tensor, weights: Tensor) -> Tensor:
        """Record the mean of ``x [T, B, N, C]`` over N, summed over T with ``weights [T]``: ``[B, C]``.

        Raises:
            TypeError, ValueError: an argument is not contiguous float32 on a CPU, or has another shape.
        """
        _check_floats("x", x, 4)
        _check_floats("weights", weights, 1)
        if weights.shape[0] != x.shape[0]:
            raise ValueError(f"weights must have shape [{x.shape[0]}], one for each of x's steps; got {list(weights.shape)}")
        out = x.new_empty((x.shape[1], x.shape[3]))
        self._calls.mean(x, weights, out)
        self._tensors += [x.detach(), weights.detach(), out]
        return out

    def spike_lif(self, s: PackedSpikes, w, bias: Tensor | None, window, pool, add, currents, neuron, words) -> None:
        """Record what fills ``words``."""
        self._calls.spike_lif(s.words, s.length, w, bias, window, pool, add, currents, *neuron, words)
        self._tensors += [s.words, w, words, *(t.detach() for t in (bias, add, currents) if t is not None)]

    def spike_attention_lif(self, q: Tensor, k: Tensor | None, v: Tensor | None, *options) -> Tensor:
        """Record attention on words and its neurons, and return the words that these will fill."""
        words = self._calls.spike_attention_lif(q, k, v, *options)
        self._tensors += [q, k, v, words]
        return words


def _check_floats(name: str, x: Tensor, dim: int | None = None) -> None:
    """Raise unless a recorded call can read ``x``, of so many dimensions or, with None, of one at least, where it lies."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(x).__name__}")
    fits = x.dim() > 0 if dim is None else x.dim() == dim
    if x.dtype != torch.float32 or not x.is_contiguous() or x.device.type != "cpu" or not fits or not x.numel():
        given = f"{x.dtype} of shape {list(x.shape)} and strides {list(x.stride())} on {x.device}"
        raise ValueError(f"{name} must be contiguous float32 on a CPU, not empty, with {dim or 'some'} dimensions; got {given}")
