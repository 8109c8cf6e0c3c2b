"""BatchNorm and the neurons behind it as one layer."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from ..ops import PackedSpikes, SpikeProduct, bn_lif
from ..ops.lif import check_neuron
from .neurons import checked_tau, named_surrogate


class BNLIF(_NormBase):
    """``torch.nn.BatchNorm`` over steps, batch and places, then :class:`LIF`: currents ``[T, B, C, ...]`` to spikes.

    The state dict is BatchNorm's and the numbers are those of the two layers, so that checkpoints are interchangeable; see
    :func:`spikeclip.ops.bn_lif` for what is computed, kept and raised.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as for ``torch.nn.BatchNorm2d``.
        tau, decay_input, v_threshold, v_reset, surrogate_function, detach_reset, backend: as for :class:`LIF`.
        channel_dim: which dimension the channels are; memory with channels last is read fastest, others are copied.
        pool: (size, stride, padding) of a ``MaxPool2d`` between norm and neurons, for ``[T, B, C, H, W]``.
        packed: spikes come out as :class:`~spikeclip.ops.PackedSpikes`, channels last whatever ``channel_dim``.
        process_group: in training, take statistics over the processes of a group; ``torch.distributed.group.WORLD``, which
            exists once the process group is initialised, for all. (``SyncBatchNorm.convert_sync_batchnorm`` does not know this
            layer.)
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: str | object = "sigmoid",
        detach_reset: bool = False,
        channel_dim: int = 2,
        pool: tuple[int, int, int] | None = None,
        packed: bool = False,
        process_group: dist.ProcessGroup | None = None,
        backend: str = "auto",
    ):
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.tau, self.decay_input, self.v_threshold, self.v_reset = checked_tau("tau", tau), decay_input, v_threshold, v_reset
        self.surrogate, self.alpha = named_surrogate(surrogate_function)
        check_neuron(v_threshold, v_reset, decay_input, detach_reset, self.surrogate, self.alpha, backend)
        self.detach_reset, self.channel_dim, self.pool = detach_reset, channel_dim, pool
        self.packed, self.process_group, self.backend = packed, process_group, backend

    def forward(self, x: Tensor, product: SpikeProduct | None = None) -> Tensor | PackedSpikes:
        """With the ``product`` that made ``x``, the backward pass makes it again and ``x`` is not kept.

        Raises ValueError for another number of channels, and as :func:`spikeclip.ops.bn_lif` does.
        """
        if x.dim() < 2 or not -x.dim() <= self.channel_dim < x.dim() or x.shape[self.channel_dim] != self.num_features:
            raise ValueError(
                f"x must have {self.num_features} channels in dimension {self.channel_dim} and time first; got {list(x.shape)}"
            )
        momentum = self.momentum
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
            momentum = 1.0 / float(self.num_batches_tracked) if momentum is None else momentum
        spikes = bn_lif(
            x.movedim(self.channel_dim, -1),
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=self.training,
            momentum=momentum or 0.0,
            eps=self.eps,
            process_group=self.process_group,
            pool=self.pool,
            product=product,
            tau=self.tau,
            v_threshold=self.v_threshold,
            v_reset=self.v_reset,
            decay_input=self.decay_input,
            detach_reset=self.detach_reset,
            surrogate=self.surrogate,
            alpha=self.alpha,
            packed=self.packed,
            backend=self.backend,
        )
        return spikes if self.packed else spikes.movedim(-1, self.channel_dim)

    def __getstate__(self) -> dict:
        """Without the process group, which belongs to this process."""
        return {**self.__dict__, "process_group": None}

    def __deepcopy__(self, memo: dict) -> BNLIF:
        layer = memo[id(self)] = self.__class__.__new__(self.__class__)
        layer.__dict__.update(copy.deepcopy(self.__getstate__(), memo), process_group=self.process_group)
        return layer

    def extra_repr(self) -> str:
        text = (
            f"{super().extra_repr()}, tau={self.tau}, decay_input={self.decay_input}, v_threshold={self.v_threshold}, "
            f"v_reset={self.v_reset}, surrogate_function={self.surrogate!r}, alpha={self.alpha}, "
            f"detach_reset={self.detach_reset}, channel_dim={self.channel_dim}"
        )
        return text + (f", pool={self.pool}" if self.pool else "") + (", packed=True" if self.packed else "")
