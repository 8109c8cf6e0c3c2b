"""The definition of right: every op in plain torch, on any device, with the signatures that all backends share."""

from .lif import lif_bwd, lif_fwd

__all__ = ["lif_bwd", "lif_fwd"]
