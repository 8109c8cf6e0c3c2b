"""``ops.SpikeProduct``: what a product of packed spikes was made of, so that a backward pass can make it again."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _backends
from .packed import PackedSpikes
from .spike_conv2d import checked_window, out_size
from .spike_matmul import check_beside, check_bias, float_dtype, weights_of
from .weights import SpikeWeights


class SpikeProduct:
    """What ``x = spike_matmul(s, w, bias)`` or ``x = spike_conv2d(s, w, bias, ...)`` was made of.

    :func:`bn_lif` that is given one with its ``x`` keeps ``s`` and ``w``, which the product most often keeps for its own
    gradient anyway, and makes ``x`` again in its backward pass. That is right for the product as it came out, at most with its
    first dimension unflattened, or cast: for anything else gradients are wrong without an error. Make it where ``x`` is made,
    whose autocast it has. Neither ``s``, ``w`` nor ``bias`` may change before the backward pass; what PyTorch counts of that
    is an error.

    Args:
        s: :class:`PackedSpikes`, ``[..., K]`` or, for a convolution, ``[B, H, W, C]``.
        w: ``[K, N]`` or ``[O, C, kh, kw]``, as for the op. bias: ``[N]`` or ``[O]``, or None.
        stride, padding: of a convolution, as for the op. backend: as for the op.

    Raises:
        TypeError: ``s`` is not packed, ``w`` no weights, ``bias`` no tensor. ValueError: shapes, dtypes or devices that do not
        fit, or an argument outside the above.
    """

    __slots__ = ("options", "shape", "tensors")

    def __init__(
        self,
        s: PackedSpikes,
        w: Tensor | SpikeWeights,
        bias: Tensor | None = None,
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        backend: str = "auto",
    ):
        if not isinstance(s, PackedSpikes):
            raise TypeError(f"s must be PackedSpikes; got {type(s).__name__}")
        convolves = isinstance(w, (Tensor, SpikeWeights)) and len(w.shape) == 4
        values, scale, tiles = weights_of(w, 4 if convolves else 2, "[K, N] or [O, C, kh, kw]")
        rows, columns = (values.shape[1], values.shape[0]) if convolves else values.shape
        if s.length != rows or (convolves and len(s.shape) != 4):
            raise ValueError(f"w of shape {list(values.shape)} does not fit spikes of shape {list(s.shape)}")
        if not convolves and (stride, padding) != (1, 0):
            raise ValueError(f"stride and padding are a convolution's; got {stride!r} and {padding!r}")
        check_beside("w", values, s)
        check_bias(bias, columns, s)
        _backends.check_name(backend)
        window, leading = (), s.shape[:-1]
        if convolves:
            window = checked_window(values.shape[2:], s.shape[1:3], stride, padding)
            leading = (s.shape[0], *out_size(s.shape[1:3], values.shape[2:], *window))
        kind = s.device.type
        cast = kind != "meta" and torch.is_autocast_enabled(kind) and values.dtype != torch.float64
        dtype = torch.get_autocast_dtype(kind) if cast else float_dtype(values)
        self.shape = torch.Size((*leading, columns))
        self.tensors = (s.words, values, scale, tiles, bias)
        self.options = (s.length, *window, dtype, backend)

    def __repr__(self) -> str:
        return f"SpikeProduct(shape={list(self.shape)})"


def again(tensors: tuple[Tensor | None, ...], options: tuple) -> Tensor:
    """The product of a :class:`SpikeProduct`'s tensors and options, channels last."""
    length, *window, dtype, backend = options
    words, *weights = tensors
    if not window:
        return torch.ops.spikeclip.spike_matmul_again(words, length, *weights, False, dtype, backend)[0]
    y, _ = torch.ops.spikeclip.spike_conv2d_again(words, length, *weights, *window, False, dtype, backend)
    return y.permute(0, 2, 3, 1)
