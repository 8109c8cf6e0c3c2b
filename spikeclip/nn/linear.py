"""Linear layers fed by spikes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import PackedSpikes, SpikeProduct, spike_matmul
from ..ops._backends import check_name
from .norm import BNLIF
from .prepared import SpikeLayer


class SpikeLinear(SpikeLayer, nn.Linear):
    """``torch.nn.Linear`` for spikes, zeros and ones: ``[..., in_features]`` to ``[..., out_features]``; ``ops.spike_matmul``.

    Constructor, parameters and state dict are those of ``torch.nn.Linear``; which kernel runs, dtypes and the binary contract
    are those of :func:`spikeclip.ops.spike_matmul`. In inference on a CPU the kernel's weight layout is kept: weights written
    through ``.data`` need a call of ``train()`` or ``eval()`` to be seen.

    Args:
        in_features, out_features, bias, device, dtype: as for ``torch.nn.Linear``.
        backend: ``auto``, ``cpu``, ``cuda``, ``triton`` or ``torch``; a named one never falls back.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        check_name(backend)
        self.backend = backend

    def _op_weight(self, weight: Tensor) -> Tensor:
        return weight.t()

    def forward(self, input: Tensor | PackedSpikes, with_product: bool = False) -> Tensor | tuple[Tensor, SpikeProduct]:
        """Dense spikes or :class:`~spikeclip.ops.PackedSpikes`, ``[..., in_features]``.

        ``with_product``, for packed spikes, also gives what the answer was made of, for a :class:`BNLIF` that is to keep less.

        Raises ValueError for another last dimension, dtype or device, or (see :func:`spikeclip.ops.spike_matmul`) a value that
        is neither 0 nor 1; TypeError for another type.
        """
        weight = self.weight
        given = (input, self._weight_for_op(weight), self.bias)
        y = self._as_weight(spike_matmul(*given, backend=self.backend), weight)
        return (y, SpikeProduct(*given, backend=self.backend)) if with_product else y


class LinearNorm(nn.Module):
    """:class:`SpikeLinear`, then BatchNorm over all leading dimensions: spikes ``[T, ..., C]`` to currents ``[T, ..., D]``.

    With ``neuron``, the arguments of a :class:`LIF`, the norm is a :class:`BNLIF` and packed spikes come out. Where
    ``grad_checkpointing`` is then set to True and packed spikes come in, the currents between the two are made again in the
    backward pass and not kept. Raises as :class:`SpikeLinear` does, and ValueError without a leading dimension.
    """

    grad_checkpointing = False

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, neuron: dict | None = None, backend: str = "auto"
    ):
        super().__init__()
        self.linear = SpikeLinear(in_features, out_features, bias=bias, backend=backend)
        self.fires = neuron is not None
        if self.fires:
            self.norm = BNLIF(out_features, channel_dim=-1, packed=True, backend=backend, **neuron)
        else:
            self.norm = nn.BatchNorm1d(out_features)

    def forward(self, spikes: Tensor | PackedSpikes) -> Tensor | PackedSpikes:
        if isinstance(spikes, (Tensor, PackedSpikes)) and len(spikes.shape) < 2:
            raise ValueError(f"spikes must have shape [T, ..., C] with leading dimensions; got {list(spikes.shape)}")
        again = self.fires and self.grad_checkpointing and torch.is_grad_enabled()
        if again and isinstance(spikes, PackedSpikes):
            return self.norm(*self.linear(spikes, with_product=True))
        y = self.linear(spikes)
        return self.norm(y) if self.fires else self.norm(y.flatten(0, -2)).view_as(y)
