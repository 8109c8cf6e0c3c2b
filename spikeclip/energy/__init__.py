"""What a forward pass costs: operations counted on real inputs, energy estimated from them, and what this machine measures."""

from .cost import CostModel, Energy, available, cost_model
from .counts import Mean, NeuronCount, OtherCount, ProductCount, Profile
from .estimate import Baseline, Estimate, estimate
from .profile import profile

__all__ = [
    "Baseline",
    "CostModel",
    "Energy",
    "Estimate",
    "Mean",
    "NeuronCount",
    "OtherCount",
    "ProductCount",
    "Profile",
    "available",
    "cost_model",
    "estimate",
    "profile",
]
