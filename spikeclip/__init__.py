"""spikeclip: train, ask and cost spiking vision-language models."""

from __future__ import annotations

from importlib.metadata import version

from . import nn, ops
from .memory import keep_memory

__version__ = version("spikeclip")
__all__ = ["SpikeCLIP", "keep_memory", "nn", "ops"]


def __getattr__(name: str):
    if name == "SpikeCLIP":
        from .models import SpikeCLIP

        return SpikeCLIP
    raise AttributeError(f"module 'spikeclip' has no attribute {name!r}")
