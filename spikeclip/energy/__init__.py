"""What a forward pass costs: operations counted on real inputs, and energy estimated from them."""

from .count import Count, LayerCount, count

__all__ = ["Count", "LayerCount", "count"]
