"""The report as text: how its numbers are written, a glance in the terminal, a row for a paper."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .counts import Mean, Profile
from .estimate import Baseline, Estimate

NONE = "–"
PARTIAL = "PARTIAL: something that ran was not counted, or the run was cut short"
LATEX_HEADER = r"Model & $T$ & Rate & MACs (M) & SynOps (M) & SNN (mJ) & ANN (mJ) & SNN / ANN \\"


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


def break_even(estimate: Estimate, baseline: Baseline) -> str:
    """At which mean firing rates the SNN costs less: ``below 11.9 %``, ``always``, ``never``; ``–`` for what never fires."""
    if not estimate.rate:
        return NONE
    if baseline.break_even is None:
        return "always"
    return f"below {percent(baseline.break_even)}" if baseline.break_even else "never"


def who(estimate: Estimate) -> str:
    """What the estimate is of: a profile without neurons is of no SNN."""
    return "network" if estimate.rate is None else "SNN"


def unit(estimates: Iterable[Estimate]) -> tuple[str, float]:
    """One unit of energy for a report, and how much of it a picojoule is: the middle one of all costs is 1 to 1000 of it."""
    costs = sorted(e.total for one in estimates for e in (one.snn, *(b.energy for b in one.baselines.values())) if e.total > 0)
    middle = costs[len(costs) // 2] if costs else 0.0
    units = (("J", 1e-12), ("mJ", 1e-9), ("µJ", 1e-6), ("nJ", 1e-3))
    return next((pair for pair in units if middle * pair[1] >= 1), ("pJ", 1.0))


def checked(profile: Profile, estimates: Sequence[Estimate]) -> tuple[Estimate, ...]:
    """``estimates`` as a tuple. Raises ValueError unless they are at least one, and of ``profile``."""
    if not isinstance(profile, Profile):
        raise ValueError(f"profile must be a Profile (spikeclip.energy.profile); got {type(profile).__name__}")
    if isinstance(estimates, Estimate) or not isinstance(estimates, Iterable):
        raise ValueError(f"estimates must be a list of Estimates; got {type(estimates).__name__}")
    estimates = tuple(estimates)
    if not estimates:
        raise ValueError("estimates must hold at least one Estimate (spikeclip.energy.estimate); it was empty")
    for one in estimates:
        if not isinstance(one, Estimate):
            raise ValueError(f"estimates must hold Estimates; got {type(one).__name__}")
        if (one.steps, one.rate, one.partial) != (profile.steps, profile.rate if profile.neurons else None, profile.partial):
            raise ValueError(
                f"the estimate under {one.model} is of another profile: its T is {one.steps} and its rate {one.rate}, "
                f"the profile's are {profile.steps} and {profile.rate}"
            )
    return estimates


def notes(profile: Profile) -> list[str]:
    """Of the profile and of its text tower's."""
    return [*profile.notes, *(f"text tower: {note}" for note in (profile.text.notes if profile.text else ()))]


def print_table(profile: Profile, estimates: Sequence[Estimate], console: Console) -> None:
    """Print layers and totals, then each cost model's SNN beside its baselines, then notes.

    Raises:
        ValueError: no estimates, or one of another profile.
    """
    estimates = checked(profile, estimates)
    if profile.partial:
        console.print(Text(PARTIAL, style="bold red"))
    samples = f"{profile.samples:,} sample{'s' if profile.samples > 1 else ''}"
    rate = f"mean firing rate {percent(profile.rate)}" if profile.neurons else "no neurons"
    console.print(Text(f"{profile.model}: {samples}, T = {profile.steps}, {rate}", style="bold"))
    bound = " (mean ± 95 % interval)" if profile.acs.half is not None else ""
    console.print(Text(f"a sample: {interval(profile.acs)} ACs (SynOps), {interval(profile.macs)} MACs{bound}"))
    console.print(_layers(profile))
    console.print(_costs(estimates))
    for note in notes(profile):
        console.print(Text(f"note: {note}", style="yellow"))


def _layers(profile: Profile) -> Table:
    table = Table(
        title="Operations of a sample, all runs", show_footer=True, title_justify="left", box=box.SIMPLE, pad_edge=False
    )
    macs, acs = (sum(getattr(p, f"effective_{kind}") for p in profile.products) for kind in ("macs", "acs"))
    table.add_column("layer", "all", overflow="fold")
    for heading, total in (
        ("runs", ""),
        ("rate", ""),
        ("dense MACs", amount(profile.dense_macs)),
        ("MACs", amount(macs)),
        ("ACs", amount(acs)),
        ("weights", size(profile.weight_bytes)),
    ):
        table.add_column(heading, total, justify="right")
    for p in profile.products:
        numbers = (str(p.runs), percent(p.rate), amount(p.dense_macs), amount(p.effective_macs), amount(p.effective_acs))
        table.add_row(Text(p.name), *numbers, size(p.weight_bytes))
    return table


def _costs(estimates: Sequence[Estimate]) -> Table:
    name, factor = unit(estimates)
    table = Table(title="Estimated energy of a sample, by cost model", title_justify="left", box=box.SIMPLE, pad_edge=False)
    table.add_column("cost model", overflow="fold")
    table.add_column("network", overflow="fold")
    table.add_column(name, justify="right")
    table.add_column("SNN / it", justify="right")
    table.add_column("SNN cheaper", justify="right")
    for one in estimates:
        table.add_row(Text(one.model), who(one), digits(one.snn.total * factor), "", "")
        for title, baseline in one.baselines.items():
            spent = baseline.energy.total
            numbers = (digits(spent * factor), ratio(one.snn.total, spent), break_even(one, baseline))
            table.add_row("", Text(title), *numbers)
        table.add_section()
    return table


_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
    },
}


def latex_row(profile: Profile, estimate: Estimate, name: str) -> str:
    r"""``name & T & rate & MACs & SynOps & SNN & ANN & SNN / ANN \\`` for a table under :data:`LATEX_HEADER`.

    MACs (millions): of the layers that no spikes feed, as the cost models price them, no zero skipped. SynOps (millions):
    accumulates that spikes cause. Energies in mJ under the estimate's one cost model; the ANN is its first baseline. A partial
    profile's name says so.

    Raises:
        ValueError: the estimate is of another profile.
    """
    (estimate,) = checked(profile, [estimate])
    snn, ann = estimate.snn, next(iter(estimate.baselines.values())).energy
    cells = (
        "".join(_LATEX.get(character, character) for character in name) + (" (partial)" if profile.partial else ""),
        str(profile.steps),
        rf"{digits(100 * profile.rate)}\%" if profile.neurons else "--",
        digits(profile.analog_macs / 1e6),
        digits(profile.synops / 1e6),
        digits(snn.millijoules),
        digits(ann.millijoules),
        digits(snn.total / ann.total) if ann.total else "--",
    )
    return " & ".join(cells) + r" \\"
