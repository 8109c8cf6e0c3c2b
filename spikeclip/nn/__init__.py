"""Drop-in spiking layers: thin modules over ``spikeclip.ops``."""

from .attention import QKAttention, SpikingSelfAttention
from .conv import SpikeConv1d, SpikeConv2d
from .convert import ConversionReport, convert
from .encodings import DirectEncoding, LatencyEncoding, PoissonEncoding
from .linear import LinearNorm, SpikeLinear
from .monitor import FiringRates
from .neurons import IF, LIF, PLIF
from .norm import BNLIF
from .saved import PackedSavedSpikes

__all__ = [
    "BNLIF",
    "IF",
    "LIF",
    "PLIF",
    "ConversionReport",
    "DirectEncoding",
    "FiringRates",
    "LatencyEncoding",
    "LinearNorm",
    "PackedSavedSpikes",
    "PoissonEncoding",
    "QKAttention",
    "SpikeConv1d",
    "SpikeConv2d",
    "SpikeLinear",
    "SpikingSelfAttention",
    "convert",
]
