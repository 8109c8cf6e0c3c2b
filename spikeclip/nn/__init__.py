"""Drop-in spiking layers: thin modules over ``spikeclip.ops``."""

from .encodings import DirectEncoding, LatencyEncoding, PoissonEncoding
from .monitor import FiringRates
from .neurons import IF, LIF, PLIF

__all__ = ["IF", "LIF", "PLIF", "DirectEncoding", "FiringRates", "LatencyEncoding", "PoissonEncoding"]
