"""The max-pool between BatchNorm and the neurons of ``ops.bn_lif``, as torch ops: of x itself, by the sign of its scale."""

from __future__ import annotations

import torch

from . import _backends
from ._autograd import no_second_derivative, with_autograd
from .reference.max_pool import pooled_size

_library = torch.library.Library("spikeclip", "FRAGMENT")
_library.define("max_pool(Tensor x, Tensor scale, int[] window, str backend) -> (Tensor, Tensor)")
_library.define("max_pool_bwd(Tensor dvalues, Tensor index, Tensor x, Tensor? factors, int[] window, str backend) -> Tensor")


def check_pool(pool: tuple[int, int, int], shape: torch.Size) -> None:
    """Raise TypeError or ValueError unless the window fits images of a shape [T, B, H, W, C]."""
    if not isinstance(pool, (tuple, list)) or len(pool) != 3 or not all(isinstance(n, int) for n in pool):
        raise TypeError(f"pool must be three integers, size, stride and padding, or None; got {pool!r}")
    size, stride, padding = pool
    valid = len(shape) == 5 and 1 <= size <= 15 and stride >= 1 and 0 <= 2 * padding <= size
    if not valid or min(shape[2:4]) + 2 * padding < size:
        raise ValueError(
            "pool must have size in 1..15, stride >= 1, 0 <= padding <= size / 2 and fit into the images of [T, B, H, W, C]; "
            f"got {tuple(pool)} for {list(shape)}"
        )


def _pool(x, scale, window, backend):
    return _backends.functions(backend, x.device.type, x.dtype).max_pool(x, scale, tuple(window))


def _pool_bwd(dvalues, index, x, factors, window, backend):
    return _backends.functions(backend, x.device.type, x.dtype).max_pool_bwd(dvalues, index, x, factors, tuple(window))


def _pool_fake(x, scale, window, backend):
    values = x.new_empty((*x.shape[:2], *pooled_size(x.shape[2:4], window), x.shape[-1]))
    return values, torch.empty_like(values, dtype=torch.uint8)


def _pool_bwd_fake(dvalues, index, x, factors, window, backend):
    return torch.empty_like(x)


_max_pool_bwd = torch.ops.spikeclip.max_pool_bwd.default
for _device in ("CPU", "CUDA"):
    _library.impl("max_pool", _pool, _device)
    _library.impl("max_pool_bwd", _pool_bwd, _device)
_library.impl("max_pool_bwd", with_autograd(no_second_derivative("bn_lif", _max_pool_bwd), _max_pool_bwd), "Autograd")
torch.library.register_fake("spikeclip::max_pool", _pool_fake, lib=_library)
torch.library.register_fake("spikeclip::max_pool_bwd", _pool_bwd_fake, lib=_library)
