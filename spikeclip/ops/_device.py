"""Where kernels are launched."""

from __future__ import annotations

import torch
from torch import Tensor


def device_of(x: Tensor) -> torch.cuda.device:
    """A context in which the CUDA device of ``x`` is the current one; a CPU tensor changes nothing."""
    return torch.cuda.device(x.device if x.is_cuda else -1)
