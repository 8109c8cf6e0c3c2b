"""The definition of right: every op in plain torch, on any device, with the signatures that all backends share."""

from .bn_lif import bn_affine, bn_factors, bn_lif_bwd, bn_lif_fwd, bn_stats
from .lif import lif_bwd, lif_fwd
from .max_pool import max_pool, max_pool_bwd
from .pack import count, pack, unpack
from .spike_attention import spike_attention, spike_attention_bwd
from .spike_conv2d import spike_conv2d, spike_conv2d_dw
from .spike_matmul import spike_matmul, spike_matmul_dw

__all__ = [
    "bn_affine",
    "bn_factors",
    "bn_lif_bwd",
    "bn_lif_fwd",
    "bn_stats",
    "count",
    "lif_bwd",
    "lif_fwd",
    "max_pool",
    "max_pool_bwd",
    "pack",
    "spike_attention",
    "spike_attention_bwd",
    "spike_conv2d",
    "spike_conv2d_dw",
    "spike_matmul",
    "spike_matmul_dw",
    "unpack",
]
