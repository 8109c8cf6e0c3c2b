"""Watch neurons fire: mean rate per layer and time-step, by forward hooks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import PackedSpikes
from .neurons import IF, LIF, PLIF
from .norm import BNLIF


class FiringRates:
    """Context manager that records the firing rates of every ``spikeclip.nn`` neuron inside ``model``.

    ``rates()`` gives, per layer name in the order of first use, a float64 tensor ``[T]``: spikes per neuron at each step,
    averaged over everything that ran inside the context. Memory does not grow with the number of batches.
    """

    def __init__(self, model: nn.Module):
        self._neurons = {name: m for name, m in model.named_modules() if isinstance(m, (IF, LIF, PLIF, BNLIF))}
        self._sums: dict[str, tuple[Tensor, int]] = {}
        self._handles: list = []

    def __enter__(self) -> FiringRates:
        for name, module in self._neurons.items():
            self._handles.append(module.register_forward_hook(self._recorder(name)))
        return self

    def __exit__(self, *exc) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _recorder(self, name: str):
        def record(module: nn.Module, inputs: tuple, spikes: Tensor | PackedSpikes) -> None:
            dense = spikes.unpack(torch.uint8) if isinstance(spikes, PackedSpikes) else spikes.detach()
            fired = dense.flatten(1).sum(1, dtype=torch.float64)
            total, count = self._sums.get(name, (torch.zeros_like(fired), 0))
            self._sums[name] = (total + fired, count + dense[0].numel())

        return record

    def rates(self) -> dict[str, Tensor]:
        return {name: total / max(count, 1) for name, (total, count) in self._sums.items()}

    def silent(self) -> list[str]:
        """Layers of which not one neuron fired: nothing is learnt through them."""
        return [name for name, rate in self.rates().items() if not bool(rate.any())]
