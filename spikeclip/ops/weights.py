"""Weights made ready once for products with spikes: laid out for the kernel, and, where asked, in 16 or 8 bits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _backends
from ._dtypes import FLOATS

# Sums of at most this many integers stay in 16 bits: rows of a tile in csrc/cpu/spike_matmul.h.
_INT16_BLOCK = 448
_DTYPES = {"fp32": None, "int16": torch.int16, "int8": torch.int8}


class SpikeWeights:
    """What :func:`prepare_weights` makes of weights of :func:`spike_matmul` (``[K, N]``) or :func:`spike_conv2d`.

    ``values`` are float32, or int16 or int8 with a ``scale`` per output column; ``tiles`` is their layout for the kernels that
    ``auto`` chooses, or None. Both are copies: later changes of the weights are not seen.
    """

    __slots__ = ("scale", "tiles", "values")

    def __init__(self, values: Tensor, scale: Tensor | None):
        self.values = values
        self.scale = None if scale is None else scale.float().contiguous()
        tile = getattr(_backends.functions("auto", values.device.type, torch.float32), "tile", None)
        self.tiles: Tensor | None = None if tile is None else tile(values)

    def __reduce__(self):
        return SpikeWeights, (self.values, self.scale)  # the layout of tiles is the kernels' own

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def dequantize(self) -> Tensor:
        """The weights that products are made with, float32, in the shape given."""
        if self.scale is None:
            return self.values
        scale = self.scale if self.values.dim() == 2 else self.scale.view(-1, 1, 1, 1)
        return self.values.float() * scale

    def __repr__(self) -> str:
        return f"SpikeWeights(shape={list(self.shape)}, dtype={self.values.dtype})"


def tiles_are_for(name: str, device_type: str) -> bool:
    """Whether ``SpikeWeights.tiles`` on this device type are laid out for the kernels of this backend."""
    return name == _backends.chosen("auto", device_type, torch.float32)


def prepare_weights(w: Tensor, dtype: str = "fp32") -> SpikeWeights:
    """Make weights ready for many products with spikes, without a gradient.

    Args:
        w: floating, ``[K, N]`` for :func:`spike_matmul` or ``[O, C, kh, kw]`` for :func:`spike_conv2d`.
        dtype: ``fp32`` (exact), ``int16`` or ``int8``, the integers with one unit per output column. The int16 unit is such
            that the positive and the negative weights of the kernel's blocks, at most 448 inputs, each sum to less than 2^15,
            so that no sum of any set of them can overflow; int8 sums at most 256 bytes in 16 bits.

    Raises:
        TypeError: ``w`` is not a tensor. ValueError: shape or dtype outside the above, or weights that are not finite.
    """
    if not isinstance(w, Tensor):
        raise TypeError(f"w must be a torch.Tensor; got {type(w).__name__}")
    if w.dim() not in (2, 4) or w.dtype not in FLOATS:
        raise ValueError(
            f"w must be float32, float16, bfloat16 or float64, [K, N] or [O, C, kh, kw]; got {w.dtype} of shape {list(w.shape)}"
        )
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}; got {dtype!r}")
    w = w.detach().resolve_neg().to(torch.float32, copy=True)
    if dtype == "fp32":
        return SpikeWeights(w, None)
    if not bool(w.isfinite().all()):
        raise ValueError("w must be finite to be held as integers; got NaN or infinity")
    taps = w.unsqueeze(0) if w.dim() == 2 else w.permute(2, 3, 1, 0).flatten(0, 1)  # [taps, inputs, columns]
    unit = _int16_unit(taps) if dtype == "int16" else _int8_unit(taps)
    scale = torch.where(unit > 0, unit, 1.0)
    values = (w / (scale if w.dim() == 2 else scale.view(-1, 1, 1, 1))).round().to(_DTYPES[dtype])
    return SpikeWeights(values, scale)


def _int16_unit(taps: Tensor) -> Tensor:
    """Per column: the least unit with which no block's one-signed sum, rounding included, leaves 16 bits."""
    room = 2**15 - 1 - _INT16_BLOCK // 2
    blocks = [b.double() for b in _blocks(taps)]  # float32's range would not hold every sum
    sums = torch.stack([b.clamp_min(0).sum(0).maximum(b.clamp_max(0).sum(0).neg()) for b in blocks])
    return (sums.amax(0) / room).float()


def _int8_unit(taps: Tensor) -> Tensor:
    """Per column: the largest magnitude becomes 127."""
    rows = taps.abs().flatten(0, 1)
    return rows.amax(0) / 127 if len(rows) else taps.new_zeros(taps.shape[-1])


def _blocks(taps: Tensor) -> list[Tensor]:
    """The rows [*, columns] that the kernel sums in 16 bits, as ``struct Tiles`` in csrc/cpu/spike_matmul.h lays them out."""
    tap = taps.shape[1]
    if not taps.numel() or tap <= _INT16_BLOCK:
        return [group.flatten(0, 1) for group in taps.split(_INT16_BLOCK // max(tap, 1))]
    parts = math.ceil(tap / _INT16_BLOCK)
    part = math.ceil(math.ceil(tap / parts) / 8) * 8
    return [rows for one in taps for rows in one.split(part)]
