"""How the numbers of a report are written."""

from __future__ import annotations

import math
from collections.abc import Iterable

from .counts import Mean
from .estimate import Estimate

NONE = "–"


def digits(value: float) -> str:
    """Three digits that count, e.g. ``0.0123``, ``4.56``, ``7,890``; ``–`` for NaN."""
    if math.isnan(value):
        return NONE
    if value == 0:
        return "0"
    if abs(value) >= 999.5:
        return f"{value:,.0f}"
    value = float(f"{value:.3g}")
    places = 2 - math.floor(math.log10(abs(value)))
    return f"{value:.{max(places, 0)}f}" if places <= 6 else f"{value:.2e}"


_PREFIXES = ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k"))


def _scale(value: float) -> tuple[float, str]:
    return next(((factor, prefix) for factor, prefix in _PREFIXES if abs(value) >= 0.9995 * factor), (1.0, ""))


def amount(value: float) -> str:
    """A count with its prefix, e.g. ``6.96 M``."""
    factor, prefix = _scale(value)
    return f"{value:.0f}" if factor == 1 and value % 1 == 0 else digits(value / factor) + prefix


def interval(mean: Mean) -> str:
    """The mean and how far the true one may be, e.g. ``6.96 ± 0.152 M``; the mean alone for one sample."""
    factor, prefix = _scale(mean.mean)
    return amount(mean.mean) if mean.half is None else f"{digits(mean.mean / factor)} ± {digits(mean.half / factor)}{prefix}"


def size(count: float) -> str:
    """Bytes, e.g. ``73.7 kB`` (1000 bytes)."""
    text = amount(count)
    return f"{text}B" if text[-1].isalpha() else f"{text} B"


def percent(rate: float) -> str:
    return NONE if math.isnan(rate) else f"{digits(100 * rate)} %"


def ratio(snn: float, ann: float) -> str:
    """What the SNN costs in units of the ANN, e.g. ``0.171 ×``; ``–`` where the ANN costs nothing."""
    return f"{digits(snn / ann)} ×" if ann else NONE


def unit(estimates: Iterable[Estimate]) -> tuple[str, float]:
    """One unit of energy for a report, and how much of it a picojoule is: the middle one of all costs is 1 to 1000 of it."""
    costs = sorted(e.total for one in estimates for e in (one.snn, *(b.energy for b in one.baselines.values())) if e.total > 0)
    middle = costs[len(costs) // 2] if costs else 0.0
    units = (("J", 1e-12), ("mJ", 1e-9), ("µJ", 1e-6), ("nJ", 1e-3))
    return next((pair for pair in units if middle * pair[1] >= 1), ("pJ", 1.0))
