"""What a forward pass costs: operations counted on real inputs, energy estimated from them, and what this machine measures."""

from .cost import CostModel, Energy, available, cost_model
from .counts import Mean, NeuronCount, OtherCount, ProductCount, Profile
from .estimate import Baseline, Estimate, estimate, save_json
from .figures import save_pngs
from .html import save_html
from .measure import Counter, Measurement, find_counter, measure
from .profile import profile
from .table import latex_row, print_table
from .twin import ann_twin

__all__ = [
    "Baseline",
    "CostModel",
    "Counter",
    "Energy",
    "Estimate",
    "Mean",
    "Measurement",
    "NeuronCount",
    "OtherCount",
    "ProductCount",
    "Profile",
    "ann_twin",
    "available",
    "cost_model",
    "estimate",
    "find_counter",
    "latex_row",
    "measure",
    "print_table",
    "profile",
    "save_html",
    "save_json",
    "save_pngs",
]
