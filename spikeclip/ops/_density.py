"""When a product of spikes pays beside a dense one: on a CPU by measured density, on a GPU by size."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Density from which a dense product without neurons is faster on a CPU, by the dtype of the weights, and for float weights of
# the dense product (benchmarks/results/cpu-avx512.md, "by density").
BREAK_EVEN = {torch.float32: 0.5, torch.bfloat16: 0.22, torch.int16: 0.95, torch.int8: math.inf}
_SAMPLED_ROWS, _SAMPLED_WORD_ROWS = 64, 1024
# Multiplications, rows by inputs by outputs, from which a GPU's library is faster with 16-bit weights, spikes unpacked for it,
# than the kernel that expands them in registers (benchmarks/results/gpu-runs.md).
LARGE_ON_GPU = 2**31


# Sixteen bits that this CPU does not multiply natively: PyTorch then takes 5 to 50 times as long as for float32.
SLOW_ON_CPU = frozenset(
    dtype
    for dtype, native in (
        (torch.bfloat16, torch.cpu._is_avx512_bf16_supported),
        (torch.float16, lambda: torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported()),
    )
    if not native()
)


def product_dtype(x: Tensor, dtype: torch.dtype | None = None) -> torch.dtype:
    """What a dense product on ``x``'s device, in ``dtype`` (default: its own), is made in: float32 where that is slow."""
    dtype = x.dtype if dtype is None else dtype
    return torch.float32 if x.device.type == "cpu" and dtype in SLOW_ON_CPU else dtype


def dense_dtype(w: Tensor, out: torch.dtype) -> torch.dtype:
    """What a dense product with such weights is made in: on a CPU bfloat16 where that is asked for and fast."""
    if not w.is_floating_point():
        return torch.float32
    halved = w.device.type == "cpu" and out == torch.bfloat16 and w.dtype == torch.float32
    return product_dtype(w, out if halved else None)


def large_on_gpu(dtype: torch.dtype, multiplications: int) -> bool:
    """Whether a GPU's library multiplies unpacked spikes faster; float32 it multiplies slowly or inexactly."""
    return dtype in (torch.float16, torch.bfloat16) and multiplications >= LARGE_ON_GPU


def event_driven(s: Tensor, length: int, weights: torch.dtype, dense: torch.dtype, count) -> bool:
    """Whether adding the weights of the spikes ``s``, rows of ``length`` or of words for ``count``, beats a dense product.

    That would be made in ``dense``, which ``product_dtype`` gave.
    """
    floating = dense if dense in BREAK_EVEN else torch.float32
    least = BREAK_EVEN[floating if weights.is_floating_point else weights]
    return s.shape[0] < 4 or least == math.inf or sampled_density(s, length, count) < least


def sampled_density(s: Tensor, length: int, count) -> float:
    """Share of ones among ``length`` spikes of evenly spaced rows of ``s``: 64 dense ones, or 1024 of words for ``count``."""
    packed = s.dtype == torch.int32
    step = -(-s.shape[0] // (_SAMPLED_WORD_ROWS if packed else _SAMPLED_ROWS))
    rows = s[::step] if step > 1 else s
    ones = count(rows.contiguous()) if packed else int(torch.count_nonzero(rows))
    return ones / max(rows.shape[0] * length, 1)
