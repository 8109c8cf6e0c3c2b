"""Packed spikes: one bit a spike, and the ops that pack and unpack."""

from __future__ import annotations

from numbers import Integral
from pathlib import Path

import torch
from torch import Tensor

from . import _backends
from ._dtypes import FLOATS

_library = torch.library.Library("spikeclip", "FRAGMENT")
_library.define("pack_spikes(Tensor s, str backend) -> Tensor")
_library.define("unpack_spikes(Tensor words, SymInt length, ScalarType dtype, str backend) -> Tensor")

SPIKE_DTYPES = (*FLOATS, torch.bool, torch.uint8)


class PackedSpikes:
    """Spikes of shape ``[..., K]`` at one bit each: int32 ``words`` ``[..., ceil(K / 32)]``.

    Bit j of word i (low bits first) is spike ``32 i + j`` of the last dimension; bits past K are 0. The ops that take spikes
    take it in place of a dense tensor. Made by :func:`pack_spikes`, without a gradient, or by neurons (``packed=True``), with
    one: such spikes carry an ``edge``, a tensor of their dense shape without memory of its own, to which ops send the dense
    gradient and from which the neuron takes it.

    Raises:
        TypeError: ``words`` is not a tensor, ``length`` not an integer. ValueError: ``words`` is not int32, does not have
        ``ceil(K / 32)`` words a row, or has bits past K (looked for where :func:`pack_spikes` looks for its errors).
    """

    __slots__ = ("_edge", "_length", "_words")

    def __init__(self, words: Tensor, length: int):
        if not isinstance(words, Tensor):
            raise TypeError(f"words must be a torch.Tensor; got {type(words).__name__}")
        if isinstance(length, bool) or not isinstance(length, Integral):
            raise TypeError(f"length must be an integer; got {length!r}")
        if length < 0:
            raise ValueError(f"length must be >= 0; got {length}")
        if words.dtype != torch.int32 or words.dim() == 0 or words.shape[-1] != word_count(length):
            raise ValueError(
                f"words must be int32 of shape [..., {word_count(length)}] for {length} spikes a row; "
                f"got {words.dtype} of shape {list(words.shape)}"
            )
        if _backends.checks_spikes(words.device.type) and length % 32 and bool((words[..., -1] >> length % 32).any()):
            raise ValueError(f"words must have no bits past the {length} spikes of a row; some have")
        self._words, self._length, self._edge = words.contiguous(), int(length), None

    @classmethod
    def trusted(cls, words: Tensor, length: int, edge: Tensor | None = None) -> PackedSpikes:
        """Of words that are known to be right: no check."""
        packed = object.__new__(cls)
        packed._words, packed._length = words.contiguous(), length
        packed._edge = edge if edge is not None and edge.requires_grad else None
        return packed

    @property
    def words(self) -> Tensor:
        return self._words

    @property
    def length(self) -> int:
        return self._length

    @property
    def edge(self) -> Tensor | None:
        """Where gradients of the spikes go, ``[..., K]``; None: they have none."""
        return self._edge

    @property
    def requires_grad(self) -> bool:
        return self._edge is not None

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.words.shape[:-1], self.length))

    @property
    def device(self) -> torch.device:
        return self.words.device

    @property
    def nbytes(self) -> int:
        return self.words.nbytes

    def numel(self) -> int:
        return self.shape.numel()

    def count(self) -> int:
        """How many spikes there are."""
        return _backends.functions("auto", self.device.type, torch.float32).count(self.words)

    def density(self) -> float:
        """The share of ones, 0 for no elements."""
        return self.count() / max(self.numel(), 1)

    def unpack(self, dtype: torch.dtype = torch.float32, backend: str = "auto") -> Tensor:
        """Ones and zeros of ``dtype`` (float32, float16, bfloat16, float64, bool or uint8), ``[..., K]``."""
        if dtype not in SPIKE_DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, SPIKE_DTYPES))}; got {dtype}")
        _backends.check_name(backend)
        s = torch.ops.spikeclip.unpack_spikes(self.words, self.length, dtype, backend)
        return s if self.edge is None or not dtype.is_floating_point else _Dense.apply(s, self.edge)

    def to(self, device: torch.device | str) -> PackedSpikes:
        words, edge = self.words.to(device), self.edge
        if edge is not None:  # one element travels
            edge = edge[(0,) * edge.dim()].to(device).expand(edge.shape) if edge.numel() else edge.to(device)
        return PackedSpikes.trusted(words, self.length, edge)

    def flatten(self, start: int, end: int) -> PackedSpikes:
        """Dimensions ``start`` to ``end``, counted from the front and not the last, as one."""
        edge = None if self.edge is None else self.edge.flatten(start, end)
        return PackedSpikes.trusted(self.words.flatten(start, end), self.length, edge)

    def unsqueeze(self, dim: int) -> PackedSpikes:
        """A dimension of size 1 at ``dim``, counted from the front, before the last."""
        edge = None if self.edge is None else self.edge.unsqueeze(dim)
        return PackedSpikes.trusted(self.words.unsqueeze(dim), self.length, edge)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        from safetensors.torch import save_file

        save_file({"words": self.words, "length": torch.tensor(self.length)}, path)

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> PackedSpikes:
        """Read what :meth:`save` wrote. Raises ValueError for a file of something else."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(path, device=device)
            return cls(tensors["words"], int(tensors["length"]))
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path} does not hold packed spikes: {error}") from error

    def __repr__(self) -> str:
        return f"PackedSpikes(shape={list(self.shape)}, device='{self.device}')"


class _Dense(torch.autograd.Function):
    """Unpacked spikes, whose gradient goes to the packed ones' edge."""

    @staticmethod
    def forward(ctx, s, edge):
        ctx.dtype = edge.dtype
        return s.view_as(s)

    @staticmethod
    def backward(ctx, ds):
        return None, ds.to(ctx.dtype)


def new_edge(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of a shape that has one element of memory, which nobody reads."""
    return like.new_empty((), dtype=dtype).expand(shape)


def word_count(length: int) -> int:
    """32-bit words that hold ``length`` spikes."""
    return (length + 31) // 32


def pack_spikes(s: Tensor, backend: str = "auto") -> PackedSpikes:
    """Spikes ``[..., K]`` to one bit each, along the last dimension.

    Args:
        s: zeros and ones, float32, float16, bfloat16, float64, bool or uint8; any strides.
        backend: ``auto``, ``cpu``, ``cuda``, ``triton`` or ``torch``; a named one never falls back.

    Raises:
        TypeError: ``s`` is not a tensor. ValueError: a dtype outside the above, no dimension, or a value that is neither 0
        nor 1 (looked for on the CPU always, elsewhere where ``SPIKECLIP_CHECK=1`` is set: it stalls an accelerator).
    """
    check_spikes("s", s)
    _backends.check_name(backend)
    return PackedSpikes.trusted(torch.ops.spikeclip.pack_spikes(s, backend), s.shape[-1])


def check_spikes(name: str, s: Tensor) -> None:
    """Raise TypeError or ValueError, naming the argument, unless ``s`` can hold spikes."""
    if not isinstance(s, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or PackedSpikes; got {type(s).__name__}")
    if s.dtype not in SPIKE_DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in SPIKE_DTYPES)
        raise ValueError(f"{name} must be one of {allowed}; got {s.dtype}")
    if s.dim() == 0:
        raise ValueError(f"{name} must have at least one dimension; got a scalar")


def pack(s: Tensor, backend: object) -> Tensor:
    """Words of ``s`` by the functions of a backend, with the check that this device gets."""
    return backend.pack(s.contiguous(), _backends.checks_spikes(s.device.type))


def _pack(s: Tensor, backend: str) -> Tensor:
    dtype = s.dtype if s.is_floating_point() else torch.float32
    return pack(s, _backends.functions(backend, s.device.type, dtype))


def _unpack(words: Tensor, length: int, dtype: torch.dtype, backend: str) -> Tensor:
    fused = dtype if dtype.is_floating_point else torch.float32
    return _backends.functions(backend, words.device.type, fused).unpack(words, length, dtype)


def _pack_fake(s: Tensor, backend: str) -> Tensor:
    return s.new_empty((*s.shape[:-1], word_count(s.shape[-1])), dtype=torch.int32)


def _unpack_fake(words: Tensor, length: int, dtype: torch.dtype, backend: str) -> Tensor:
    return words.new_empty((*words.shape[:-1], length), dtype=dtype)


for _device in ("CPU", "CUDA"):
    _library.impl("pack_spikes", _pack, _device)
    _library.impl("unpack_spikes", _unpack, _device)
torch.library.register_fake("spikeclip::pack_spikes", _pack_fake, lib=_library)
torch.library.register_fake("spikeclip::unpack_spikes", _unpack_fake, lib=_library)
