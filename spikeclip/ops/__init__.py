"""Public functions: validate, torch op, fake, autograd, autocast; one file per op."""

from .bn_lif import bn_lif
from .lif import lif
from .packed import PackedSpikes, pack_spikes
from .sequence import Sequence
from .spike_attention import spike_attention
from .spike_conv2d import spike_conv2d
from .spike_lif import spike_attention_lif, spike_conv2d_lif, spike_matmul_lif
from .spike_matmul import spike_matmul
from .spike_product import SpikeProduct
from .weights import SpikeWeights, prepare_weights

__all__ = [
    "PackedSpikes",
    "Sequence",
    "SpikeProduct",
    "SpikeWeights",
    "bn_lif",
    "lif",
    "pack_spikes",
    "prepare_weights",
    "spike_attention",
    "spike_attention_lif",
    "spike_conv2d",
    "spike_conv2d_lif",
    "spike_matmul",
    "spike_matmul_lif",
]
