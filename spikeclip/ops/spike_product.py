"""``ops.SpikeProduct``: what a product of packed spikes was made of, so that a backward pass can make it again."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _backends
from .packed import PackedSpikes
from .spike_conv2d import out_size, pair
from .spike_matmul import check_beside, check_bias, float_dtype, weights_of
from .weights import SpikeWeights


class SpikeProduct:
    """What ``x = spike_matmul(s, w, bias)`` or ``x = spike_conv2d(s, w, bias, ...)`` was made of.

    :func:`bn_lif` that is given one for its ``x`` keeps spikes and weights, which the product keeps for its own gradient
    anyway, and makes ``x`` again in its backward pass: two to four bytes less a value, for one product more. Make it where
    ``x`` is made: under autocast it has its dtype from there.

    Args:
        s: :class:`PackedSpikes`, ``[..., K]`` or, for a convolution, ``[B, H, W, C]``.
        w: ``[K, N]`` or ``[O, C, kh, kw]``, as for the op. bias: ``[N]`` or ``[O]``, or None.
        stride, padding, backend: as for the op.

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
        columns = values.shape[0 if convolves else 1]
        check_beside("w", values, s)
        check_bias(bias, columns, s)
        _backends.check_name(backend)
        if s.length != values.shape[1 if convolves else 0] or (convolves and len(s.shape) != 4):
            raise ValueError(f"w of shape {list(values.shape)} does not fit spikes of shape {list(s.shape)}")
        window = (pair("stride", stride, 1), pair("padding", padding, 0)) if convolves else ()
        size = out_size(s.shape[1:3], values.shape[2:], *window) if convolves else s.shape[1:-1]
        kind = s.device.type
        cast = torch.is_autocast_enabled(kind) and values.dtype != torch.float64
        dtype = torch.get_autocast_dtype(kind) if cast else float_dtype(values)
        self.shape = torch.Size((s.shape[0], *size, columns))
        self.tensors = tuple(t if t is None else t.detach() for t in (s.words, values, scale, tiles, bias))
        self.options = (s.length, *window, dtype, backend)


def again(tensors: tuple[Tensor | None, ...], options: tuple) -> Tensor:
    """The product of a :class:`SpikeProduct`'s tensors and options, channels last."""
    length, *window, dtype, backend = options
    words, *weights = tensors
    if not window:
        return torch.ops.spikeclip.spike_matmul_again(words, length, *weights, False, dtype, backend)[0]
    y, _ = torch.ops.spikeclip.spike_conv2d_again(words, length, *weights, *window, False, dtype, backend)
    return y.permute(0, 2, 3, 1)
