"""The report as text: a glance in the terminal, a row for a paper."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .counts import Profile
from .estimate import Baseline, Estimate
from .units import NONE, amount, digits, interval, percent, ratio, size, unit

PARTIAL = "PARTIAL: something that ran was not counted, or the run was cut short"
LATEX_HEADER = r"Model & $T$ & Rate & MACs (M) & SynOps (M) & SNN (mJ) & ANN (mJ) & SNN / ANN \\"


def break_even(estimate: Estimate, baseline: Baseline) -> str:
    """At which mean firing rates the SNN costs less: ``below 11.9 %``, ``always``, ``never``; ``–`` for what never fires."""
    if not estimate.rate:
        return NONE
    if baseline.break_even is None:
        return "always"
    return f"below {percent(baseline.break_even)}" if baseline.break_even else "never"


def named(estimate: Estimate, baseline: str) -> str:
    """The baseline's name, and whether its precision is the SNN's."""
    return f"{baseline} (same precision)" if baseline == estimate.nearest else baseline


def who(estimate: Estimate) -> str:
    """What the estimate is of: a profile without neurons is of no SNN."""
    return "network" if estimate.rate is None else "SNN"


def checked(profile: Profile, estimates: Sequence[Estimate]) -> tuple[Estimate, ...]:
    """``estimates`` as a tuple. Raises ValueError unless they are at least one, and of ``profile``."""
    if not isinstance(profile, Profile):
        raise ValueError(f"profile must be a Profile (spikeclip.energy.profile); got {type(profile).__name__}")
    if not isinstance(estimates, Iterable):
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
    for line in _otherwise(profile, estimates):
        console.print(Text(line))
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
            table.add_row("", Text(named(one, title)), *numbers)
        table.add_section()
    return table


def _otherwise(profile: Profile, estimates: Sequence[Estimate]) -> Iterator[str]:
    """How the SNN's cost changes with what is counted."""
    name, factor = unit(estimates)
    titles = dict.fromkeys(title for one in estimates for title in one.variants)
    for title in titles:
        found = ((one.model, one.variants[title].total) for one in estimates if title in one.variants)
        yield f"{title}, {name}: " + ", ".join(f"{digits(total * factor)} ({model})" for model, total in found)
    if profile.text is not None:
        found = ((one.model, one.snn.total + profile.prompts * one.prompt.total) for one in estimates)
        costs = ", ".join(f"{digits(total * factor)} ({model})" for model, total in found)
        yield f"with all {profile.prompts} prompts through the text tower, no class vectors kept, {name}: {costs}"


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
    accumulates that spikes cause. Energies in mJ under the estimate's one cost model; the ANN is the baseline of the
    SNN's own precision, which is named. A partial profile's name says so.

    Raises:
        ValueError: the estimate is of another profile.
    """
    (estimate,) = checked(profile, [estimate])
    snn, ann = estimate.snn, estimate.baselines[estimate.nearest].energy
    cells = (
        "".join(_LATEX.get(character, character) for character in name) + (" (partial)" if profile.partial else ""),
        str(profile.steps),
        rf"{digits(100 * profile.rate)}\%" if profile.neurons else "--",
        digits(profile.analog_macs / 1e6),
        digits(profile.synops / 1e6),
        digits(snn.millijoules),
        f"{digits(ann.millijoules)} ({estimate.nearest.removeprefix('ANN ')})",
        digits(snn.total / ann.total) if ann.total else "--",
    )
    return " & ".join(cells) + r" \\"
