"""Keep what ordinary layers save for their backward pass at one bit a spike."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import PackedSpikes, pack_spikes
from ..ops.packed import SPIKE_DTYPES

_LEAST = 4096
_SAMPLED = 512


class _Packed(NamedTuple):
    words: PackedSpikes
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class _Kept(NamedTuple):
    tensor: Tensor
    version: int


class PackedSavedSpikes:
    """Context manager: tensors of zeros and ones that autograd saves inside it are held at one bit a value until backward.

    For layers of ``torch.nn`` fed by spikes (``Linear``, ``Conv2d``, ``MaxPool2d``, ...) and anything else that saves them: a
    thirty-second of float32's memory, with gradients equal bit for bit (-0 counts as 0). A saved tensor is packed where it is
    floating, has at least 4096 elements without gaps in memory, and holds nothing but zeros and ones; a small sample turns
    most others away. Those are kept as they are, and changing one in place before the backward pass is an error, as without
    this context. On an accelerator each test waits for the device.

    ``dense_bytes`` and ``packed_bytes`` count what was packed inside, before and after.
    """

    def __init__(self):
        self.dense_bytes = 0
        self.packed_bytes = 0
        self._hooks: list[torch.autograd.graph.saved_tensors_hooks] = []

    def __enter__(self) -> PackedSavedSpikes:
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        hooks.__enter__()
        self._hooks.append(hooks)
        return self

    def __exit__(self, *exc) -> None:
        self._hooks.pop().__exit__(*exc)

    def _pack(self, tensor: Tensor) -> _Packed | _Kept:
        words = _packed(tensor.detach())
        if words is None:
            # detach: an operation's own output would otherwise keep itself alive.
            return _Kept(tensor.detach(), tensor._version)
        self.dense_bytes += tensor.nbytes
        self.packed_bytes += words.nbytes
        return _Packed(words, tensor.shape, tensor.stride(), tensor.dtype)


def _packed(x: Tensor) -> PackedSpikes | None:
    """The words of ``x`` in its order in memory, or None where it is not one dense block of spikes."""
    if type(x) is not Tensor or x.device.type not in ("cpu", "cuda") or x.layout != torch.strided:
        return None
    if not x.is_floating_point() or x.dtype not in SPIKE_DTYPES or x.numel() < _LEAST:
        return None
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    if not x.permute(order).is_contiguous():
        return None
    count = x.numel()
    flat = x.as_strided((count,), (1,))
    if not _binary(flat[:: count // _SAMPLED]) or (x.device.type != "cpu" and not _binary(flat)):
        return None
    # Rows of whole words where there are such, so that threads can share them.
    row = math.gcd(count, _LEAST)
    try:
        return pack_spikes(flat.view(-1, row if row >= 32 else count))
    except ValueError:  # the CPU's pack looks at every value
        return None


def _binary(x: Tensor) -> bool:
    return bool(((x == 0) | (x == 1)).all())


def _unpack(saved: _Packed | _Kept) -> Tensor:
    if isinstance(saved, _Packed):
        return saved.words.unpack(saved.dtype).as_strided(saved.shape, saved.stride)
    if saved.tensor._version != saved.version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"{saved.tensor.dtype} of shape {list(saved.tensor.shape)} is at version {saved.tensor._version}; "
            f"expected version {saved.version}"
        )
    return saved.tensor
