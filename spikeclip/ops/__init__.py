"""Public functions: validate, torch op, fake, autograd, autocast; one file per op."""

from .lif import lif

__all__ = ["lif"]
