"""Convolutions fed by spikes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import PackedSpikes, SpikeProduct, spike_conv2d
from ..ops._backends import check_name
from .prepared import SpikeLayer


class _SpikeConv(SpikeLayer):
    """What both convolutions share: the arguments allowed, and a batch and a height for inputs without."""

    _form: str

    def _on_images(self, s: Tensor | PackedSpikes, with_product: bool = False) -> tuple[Tensor, SpikeProduct | None]:
        """The op on ``[B, C, H, W]`` and what it was made of; what comes out is laid out in memory as torch's layer would."""
        stride, padding = self._window()
        weight = self.weight
        given = (s, self._weight_for_op(weight), self.bias)
        options = {"stride": stride, "padding": padding, "backend": self.backend}
        y = self._as_weight(spike_conv2d(*given, **options), weight)
        y = y if isinstance(s, PackedSpikes) or _channels_last(s) or _channels_last(weight) else y.contiguous()
        return y, SpikeProduct(*given, **options) if with_product else None

    def _window(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(stride, padding), each over height and width."""
        padding = self.padding
        if isinstance(padding, str):
            padding = tuple(k // 2 if padding == "same" else 0 for k in self.kernel_size)
        missing = 2 - len(self.kernel_size)
        return (1,) * missing + tuple(self.stride), (0,) * missing + tuple(padding)

    def _batched(self, input: Tensor | PackedSpikes, dims: int) -> tuple[Tensor | PackedSpikes, bool]:
        """(``input`` with a batch dimension, whether it had one)."""
        inner = input.words if isinstance(input, PackedSpikes) else input
        if isinstance(inner, Tensor) and inner.dim() not in (dims - 1, dims):
            raise ValueError(f"input must have shape {self._form}; got {list(input.shape)}")
        batched = not isinstance(inner, Tensor) or inner.dim() == dims
        return (input if batched else _unsqueezed(input, 0, 0)), batched


class SpikeConv2d(_SpikeConv, nn.Conv2d):
    """``torch.nn.Conv2d`` for spikes: ``[B, C, H, W]`` or ``[C, H, W]`` zeros and ones, by ``ops.spike_conv2d``.

    Constructor, parameters and state dict are those of ``torch.nn.Conv2d``; which kernel runs, dtypes and the binary contract
    are those of :func:`spikeclip.ops.spike_conv2d`. Channels-last spikes are read and answered fastest; contiguous ones get a
    contiguous answer, as from torch, which costs a copy. In inference on a CPU the kernel's weight layout is kept: weights
    written through ``.data`` need a call of ``train()`` or ``eval()`` to be seen.

    Args:
        in_channels, out_channels, kernel_size, stride, bias, device, dtype: as for ``torch.nn.Conv2d``.
        padding: integers, ``"valid"``, or ``"same"`` with odd kernel sizes.
        dilation, groups, padding_mode: only 1, 1 and ``"zeros"``.
        backend: ``auto``, ``cpu``, ``cuda``, ``triton`` or ``torch``; a named one never falls back.

    Raises:
        ValueError: an argument outside the above.
    """

    _form = "[C, H, W] or [B, C, H, W] (packed: channels last)"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        check_convolution(self)
        check_name(backend)
        self.backend = backend

    def _op_weight(self, weight: Tensor) -> Tensor:
        return weight

    def forward(self, input: Tensor | PackedSpikes, with_product: bool = False) -> Tensor | tuple[Tensor, SpikeProduct]:
        """Dense spikes, or :class:`~spikeclip.ops.PackedSpikes` of shape ``[B, H, W, C]`` or ``[H, W, C]``.

        Returns ``[B, O, OH, OW]`` (``[O, OH, OW]`` for one image), and ``with_product``, for packed spikes, what that was made
        of, for a :class:`BNLIF` that is to keep less. Raises ValueError for another shape, dtype or device, or
        (see :func:`spikeclip.ops.spike_matmul`) a value that is neither 0 nor 1; TypeError for another type.
        """
        s, batched = self._batched(input, 4)
        y, product = self._on_images(s, with_product)
        y = y if batched else y.squeeze(0)
        return (y, product) if with_product else y


class SpikeConv1d(_SpikeConv, nn.Conv1d):
    """``torch.nn.Conv1d`` for spikes: ``[B, C, L]`` or ``[C, L]`` zeros and ones, as :class:`SpikeConv2d` on images one high.

    Arguments and errors as for :class:`SpikeConv2d`.
    """

    _form = "[C, L] or [B, C, L] (packed: channels last)"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int],
        stride: int | tuple[int] = 1,
        padding: str | int | tuple[int] = 0,
        dilation: int | tuple[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        check_convolution(self)
        check_name(backend)
        self.backend = backend

    def _op_weight(self, weight: Tensor) -> Tensor:
        return weight.unsqueeze(2)

    def forward(self, input: Tensor | PackedSpikes) -> Tensor:
        """Dense spikes, or :class:`~spikeclip.ops.PackedSpikes` of shape ``[B, L, C]`` or ``[L, C]``.

        Returns ``[B, O, OL]`` (``[O, OL]`` for one row). Raises as :meth:`SpikeConv2d.forward`.
        """
        s, batched = self._batched(input, 3)
        y = self._on_images(_unsqueezed(s, 2, 1))[0].squeeze(2)
        return y if batched else y.squeeze(0)


def check_convolution(conv: nn.Conv1d | nn.Conv2d) -> None:
    """Raise ValueError, naming the argument, unless the convolution of spikes can stand in for ``conv``."""
    if any(d != 1 for d in conv.dilation):
        raise ValueError(f"dilation must be 1 for a convolution of spikes; got {conv.dilation}")
    if conv.groups != 1:
        raise ValueError(f"groups must be 1 for a convolution of spikes; got {conv.groups}")
    if conv.padding_mode != "zeros":
        raise ValueError(f"padding_mode must be 'zeros' for a convolution of spikes; got {conv.padding_mode!r}")
    if conv.padding == "same" and any(k % 2 == 0 for k in conv.kernel_size):
        raise ValueError(f"padding='same' needs odd kernel_size for a convolution of spikes; got {conv.kernel_size}")


def _channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _unsqueezed(s: Tensor | PackedSpikes, dim: int, packed_dim: int) -> Tensor | PackedSpikes:
    if isinstance(s, PackedSpikes):
        return s.unsqueeze(packed_dim)
    return s.unsqueeze(dim) if isinstance(s, Tensor) else s
