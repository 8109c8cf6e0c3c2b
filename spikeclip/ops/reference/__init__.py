"""The definition of right: every op in plain torch, on any device, with the signatures that all backends share."""

from .lif import lif_bwd, lif_fwd
from .pack import count, pack, unpack
from .spike_attention import spike_attention, spike_attention_bwd
from .spike_conv2d import spike_conv2d, spike_conv2d_dw
from .spike_matmul import spike_matmul, spike_matmul_dw

__all__ = [
    "count",
    "lif_bwd",
    "lif_fwd",
    "pack",
    "spike_attention",
    "spike_attention_bwd",
    "spike_conv2d",
    "spike_conv2d_dw",
    "spike_matmul",
    "spike_matmul_dw",
    "unpack",
]
