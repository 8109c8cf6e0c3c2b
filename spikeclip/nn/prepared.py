"""What the layers fed by spikes share: a backend, and weights kept in the kernel's layout while nothing learns."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..ops import SpikeWeights, prepare_weights

_PREPARED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_optimizer_steps = 0


def _count_step(*_: object) -> None:
    global _optimizer_steps
    if not torch.compiler.is_compiling():
        _optimizer_steps += 1


# Fused optimizers write parameters without a new version.
register_optimizer_step_post_hook(_count_step)


class SpikeLayer(nn.Module):
    """Base of layers with a ``weight``, of which :meth:`_op_weight` gives the form that the op takes.

    On a CPU, where no gradient is asked for, a copy of the weights and the layout that the kernel reads are made once and kept
    (each as large as float32 weights). They are made anew after any change that PyTorch counts (optimizers,
    ``load_state_dict``, in-place operations) or a move to another memory, dtype or device; writes through ``weight.data`` or
    NumPy are not counted, so call ``train()`` or ``eval()`` after those: both drop them. Weights in shared memory are never
    kept. They are never saved or copied.
    """

    backend: str = "auto"
    weight: Tensor
    # (the weight's memory, its versions, what was made of it); holding the memory keeps its address from being reused.
    _prepared: tuple[Tensor, tuple[int, int], SpikeWeights] | None = None

    def _op_weight(self, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def _weight_for_op(self, weight: Tensor) -> Tensor | SpikeWeights:
        """What the op takes for ``weight``, which is ``self.weight``, read once a call: it may be computed anew each time."""
        if torch.compiler.is_compiling():
            return self._op_weight(weight)
        if (torch.is_grad_enabled() and weight.requires_grad) or not self._preparable(weight):
            if self._prepared is not None:
                self._prepared = None
            return self._op_weight(weight)
        prepared = self._prepared  # another thread may drop it meanwhile
        if prepared is None or not _is_same(weight, *prepared[:2]):
            # Tensors made in inference mode could not be saved for a later backward pass.
            with torch.inference_mode(False), torch.no_grad():
                prepared = (weight.detach(), _versions(weight), prepare_weights(self._op_weight(weight), "fp32"))
                self._prepared = prepared
        return prepared[2]

    def _preparable(self, weight: Tensor) -> bool:
        return (
            weight.device.type == "cpu"
            and weight.dtype in _PREPARED_DTYPES
            and type(weight) in (Tensor, nn.Parameter)
            and self.backend in ("auto", "cpu")
            and not weight.is_inference()
            and not weight.is_shared()  # other processes write without a new version
        )

    @staticmethod
    def _as_weight(y: Tensor, weight: Tensor) -> Tensor:
        """``y`` in the weight's dtype: prepared weights are float32 whatever they were made of."""
        if y.dtype == weight.dtype or torch.is_autocast_enabled(y.device.type):
            return y
        return y.to(weight.dtype)

    def train(self, mode: bool = True) -> SpikeLayer:
        self._prepared = None
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True) -> SpikeLayer:
        self._prepared = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_prepared"}

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.backend == "auto" else f", backend={self.backend!r}")


def _versions(weight: Tensor) -> tuple[int, int]:
    return weight._version, _optimizer_steps


def _is_same(weight: Tensor, seen: Tensor, versions: tuple[int, int]) -> bool:
    return (
        _versions(weight) == versions
        and weight.data_ptr() == seen.data_ptr()
        and weight.dtype == seen.dtype
        and weight.device == seen.device
        and weight.shape == seen.shape
        and weight.stride() == seen.stride()
    )
