"""The pictures of an energy report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib import style
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from .counts import Profile
from .estimate import Estimate
from .files import whole
from .table import break_even, checked, who
from .units import amount, digits, percent, ratio, size, unit

INK = "#1a1c20"
_SNN, _DENSE, _MACS = "#2878d0", "#9aa3b0", "#e08214"
_BASELINES = ("#7a8494", "#e08214", "#c2417c", "#3a9d6b", "#8a5cc2")
_VALUES = 32  # time-steps beyond which the numbers would not fit their cells

drawn = style.context(
    [
        "default",
        {
            **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
            "axes.facecolor": "none",
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlelocation": "left",
            "axes.titlesize": 10,
            "axes.titleweight": "bold",
            "figure.constrained_layout.use": True,
            "figure.titlesize": 12,
            "figure.titleweight": "bold",
            "font.size": 9,
            "legend.frameon": False,
            "svg.fonttype": "path",
            "svg.hashsalt": "spikeclip",
            "text.parse_math": False,
        },
    ]
)


@drawn
def firing_rates(profile: Profile) -> Figure:
    """Heat map of firing rates in percent, layers of neurons by time-steps; a layer of fewer steps leaves cells empty.

    Raises:
        ValueError: no neurons.
    """
    if not profile.neurons:
        raise ValueError("the profile has no neurons: no firing rates to draw")
    rows, steps = len(profile.neurons), max(neuron.steps for neuron in profile.neurons)
    figure = Figure(figsize=(min(5 + 0.5 * steps, 14), 1.3 + 0.27 * rows))
    _title(figure, "Firing rate, % of neurons a time-step", profile.partial)
    axes = figure.add_subplot()
    grid = [[100 * rate for rate in n.rates] + [math.nan] * (steps - n.steps) for n in profile.neurons]
    top = max(value for row in grid for value in row if not math.isnan(value)) or 1.0
    picture = axes.pcolormesh(grid, cmap="viridis", vmin=0, vmax=top, edgecolors="face", linewidth=0.3)
    every = 1 if steps <= _VALUES else 8
    ticks = [str(step) if step % every == 0 else "" for step in range(1, steps + 1)]
    _cells(axes, [_short(n.name) for n in profile.neurons], ticks)
    axes.set_xlabel("time-step")
    if steps <= _VALUES:
        for y, row in enumerate(grid):
            for x, value in enumerate(row):
                if not math.isnan(value):
                    _number(axes, x, y, "<0.1" if 0 < value < 0.05 else f"{value:.1f}", value > 0.6 * top)
    else:
        figure.colorbar(picture, ax=axes, pad=0.015, aspect=max(20, 2 * rows), label="%").outline.set_visible(False)
    return figure


@drawn
def layers(profile: Profile) -> Figure:
    """Bars by product: dense MACs of one run beside effective MACs and ACs of all runs, and bytes of weights and activations.

    Raises:
        ValueError: no products.
    """
    if not profile.products:
        raise ValueError("the profile has no products: no layers to draw")
    rows = len(profile.products)
    figure = Figure(figsize=(9.5, 1.7 + 0.36 * rows))
    _title(figure, "What each layer does for a sample", profile.partial)
    operations, memory = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    places = range(rows)
    dense = [p.dense_macs / p.runs for p in profile.products]
    macs, acs = ([getattr(p, f"effective_{kind}") for p in profile.products] for kind in ("macs", "acs"))
    upper, lower = [y - 0.2 for y in places], [y + 0.2 for y in places]
    operations.barh(upper, dense, 0.36, color=_DENSE, label="dense MACs, one run")
    operations.barh(lower, macs, 0.36, color=_MACS, label="MACs")
    operations.barh(lower, acs, 0.36, left=macs, color=_SNN, label="ACs (SynOps)")
    _ends(operations, [*upper, *lower], [*dense, *(m + a for m, a in zip(macs, acs, strict=True))], amount)
    weights = [p.weight_bytes for p in profile.products]
    activations = [p.activation_bytes for p in profile.products]
    memory.barh(places, weights, 0.6, color="#3a9d6b", label="weights")
    memory.barh(places, activations, 0.6, left=weights, color="#a9d8bf", label="activations in and out")
    _ends(memory, places, [w + a for w, a in zip(weights, activations, strict=True)], size)
    operations.set_yticks(places, [_short(p.name) for p in profile.products])
    operations.set_ylim(rows - 0.4, -0.6)
    for axes, of, name in (
        (operations, "", "operations a sample; MACs and ACs of all runs"),
        (memory, "B", "bytes a sample; activations of all runs"),
    ):
        axes.xaxis.set_major_formatter(EngFormatter(of))
        axes.locator_params(axis="x", nbins=5)
        axes.grid(axis="x", alpha=0.25)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(name)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=8, columnspacing=1.2, handlelength=1.2)
    return figure


@drawn
def comparison(estimates: Sequence[Estimate]) -> Figure:
    """Bars on a log scale: the SNN and its baselines, one panel a cost model. Raises ValueError without estimates."""
    _some(estimates)
    name, factor = unit(estimates)
    bars = [1 + len(one.baselines) for one in estimates]
    figure = Figure(figsize=(9, 0.9 + sum(0.55 + 0.24 * count for count in bars)))
    _title(figure, "Estimated energy of a sample; compare within a cost model only", estimates[0].partial)
    panels = figure.subplots(len(estimates), 1, squeeze=False, sharex=True, height_ratios=[count + 0.2 for count in bars])
    for axes, one in zip(panels.flat, estimates, strict=True):
        costs = {who(one): one.snn.total, **{title: b.energy.total for title, b in one.baselines.items()}}
        axes.barh(range(len(costs)), [cost * factor for cost in costs.values()], 0.72, color=_colours(one))
        axes.set_yticks(range(len(costs)), list(costs))
        axes.set_ylim(len(costs) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.set_title(f"{one.model}: {one.title}")
        axes.grid(axis="x", alpha=0.25)
        axes.set_axisbelow(True)
    spent = [e.total * factor for one in estimates for e in (one.snn, *(b.energy for b in one.baselines.values()))]
    positive = [cost for cost in spent if cost > 0] or [1.0]
    low, high = min(positive) / 2, max(positive)
    axes.set_xscale("log", nonpositive="clip")
    axes.set_xlim(low, high * (high / low) ** 0.4)
    axes.set_xlabel(f"{name} a sample, log scale")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    for axes, one in zip(panels.flat, estimates, strict=True):
        texts = [f"{digits(one.snn.total * factor)} {name}"]
        for baseline in one.baselines.values():
            cost = baseline.energy.total
            texts.append(f"{digits(cost * factor)} {name}; the {who(one)} costs {ratio(one.snn.total, cost)} this")
        costs = [one.snn.total, *(b.energy.total for b in one.baselines.values())]
        _ends(axes, range(len(costs)), [max(cost * factor, low) for cost in costs], texts)
    return figure


@drawn
def break_evens(estimates: Sequence[Estimate]) -> Figure:
    """Energy against mean firing rate, one panel a cost model: baselines level, the profiled rate and the crossings marked.

    Raises:
        ValueError: no estimates, or a network that fires never.
    """
    _some(estimates)
    _need_curve(estimates)
    name, factor = unit(estimates)
    figure, panels = _panels(len(estimates), height=3.4)
    _title(figure, "Break-even: the SNN if it fired more or less", estimates[0].partial)
    for axes, one in zip(panels, estimates, strict=True):
        rates, spent = zip(*one.curve, strict=True)
        colours = _colours(one)
        here = one.snn.total * factor
        line = [cost * 1e9 * factor for cost in spent]
        axes.plot(rates, line, color=_SNN, lw=2, label=f"SNN; profiled: {digits(here)} {name}")
        axes.axvline(one.rate, color=_SNN, lw=1, ls=":")
        axes.plot(one.rate, here, "o", color=_SNN, zorder=4)
        for (title, baseline), colour in zip(one.baselines.items(), colours[1:], strict=True):
            level = baseline.energy.total * factor
            axes.axhline(level, color=colour, lw=1.5, ls="--", label=f"{title}: SNN {_crossing(one, baseline)}")
            if baseline.break_even:
                axes.plot(baseline.break_even, level, "D", ms=6, color=colour, mec=INK, mew=0.8, zorder=5)
        axes.set_yscale("log", nonpositive="mask")
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.25)
        axes.set(title=one.model, xlabel=f"mean firing rate (dotted: profiled, {percent(one.rate)})", ylabel=f"{name} a sample")
        axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.2), fontsize=8)
    return figure


@drawn
def sensitivity(estimates: Sequence[Estimate]) -> Figure:
    """Heat maps of SNN / last baseline over T and mean firing rate, one panel a cost model; 1 is the middle of the colours.

    Raises:
        ValueError: no estimates, or a network that fires never.
    """
    _some(estimates)
    _need_curve(estimates)
    figure, panels = _panels(len(estimates), height=2.7)
    _title(figure, "SNN / ANN over T and firing rate; blue: SNN cheaper", estimates[0].partial)
    ratios = [list(ratios.values())[-1] for one in estimates for _, _, ratios in one.sweep]
    most = max(1.1, *(max(value, 1 / value) for value in ratios if value > 0))
    norm = LogNorm(1 / most, most, clip=True)
    for axes, one in zip(panels, estimates, strict=True):
        steps = list(dict.fromkeys(T for T, _, _ in one.sweep))
        rates = list(dict.fromkeys(rate for _, rate, _ in one.sweep))
        last = {(T, rate): list(ratios.items())[-1] for T, rate, ratios in one.sweep}
        grid = [[last[T, rate][1] for rate in rates] for T in steps]
        picture = axes.pcolormesh(grid, cmap="RdBu_r", norm=norm, edgecolors="face", linewidth=0.3)
        _cells(axes, [f"T = {T}, {last[T, rates[0]][0]}" for T in steps], [f"{100 * rate:g} %" for rate in rates])
        axes.set(title=one.model, xlabel="mean firing rate")
        for y, row in enumerate(grid):
            for x, value in enumerate(row):
                _number(axes, x, y, digits(value), 0.2 < norm(value) < 0.8)
    bar = figure.colorbar(picture, ax=panels, location="bottom", aspect=50, shrink=0.7, fraction=0.04, label="SNN / ANN")
    bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} ×"))
    bar.ax.xaxis.set_minor_formatter(NullFormatter())
    bar.outline.set_visible(False)
    return figure


def of_counts(profile: Profile) -> dict[str, Figure]:
    """By name, those that the profile has anything for."""
    figures = {"firing-rates": firing_rates(profile)} if profile.neurons else {}
    return {**figures, "layers": layers(profile)} if profile.products else figures


def of_estimates(estimates: Sequence[Estimate]) -> dict[str, Figure]:
    """By name, those that the estimates have anything for: a network that never fires has no break-even."""
    figures = {"comparison": comparison(estimates)}
    if all(one.curve and one.sweep for one in estimates):
        figures |= {"break-even": break_evens(estimates), "sensitivity": sensitivity(estimates)}
    return figures


def save_pngs(profile: Profile, estimates: Sequence[Estimate], folder: str | Path) -> list[Path]:
    """Write every figure that has anything to show, the text tower's too, each whole or not at all.

    Raises:
        ValueError: no estimates, or one of another profile.
    """
    figures = of_estimates(checked(profile, estimates)) | of_counts(profile)
    if profile.text is not None:
        figures |= {f"text-{name}": figure for name, figure in of_counts(profile.text).items()}
    paths = [Path(folder) / f"{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        whole(path, lambda half, figure=figure: save(figure, half, "png"))
    return paths


@drawn
def save(figure: Figure, file, kind: str) -> None:
    """Draw into a file, by path or open for bytes: ``png`` on white, ``svg`` on nothing, with the same ids each time."""
    if kind == "png":
        figure.savefig(file, format="png", dpi=130, facecolor="white")
    else:
        figure.savefig(file, format="svg", facecolor="none")


def _some(estimates: Sequence[Estimate]) -> None:
    if not estimates:
        raise ValueError("estimates must hold at least one Estimate; it was empty")


def _need_curve(estimates: Sequence[Estimate]) -> None:
    for one in estimates:
        if not (one.curve and one.sweep):
            raise ValueError(f"the network under {one.model} never fires: it has no break-even")


def _title(figure: Figure, text: str, partial: bool) -> None:
    figure.suptitle(f"PARTIAL. {text}" if partial else text, x=0.01, ha="left", color="#b3261e" if partial else INK)


def _colours(estimate: Estimate) -> list[str]:
    return [_SNN, *(_BASELINES[i % len(_BASELINES)] for i in range(len(estimate.baselines)))]


def _crossing(estimate: Estimate, baseline) -> str:
    text = break_even(estimate, baseline)
    return f"cheaper {text}" if text.startswith("below") else f"{text} cheaper"


def _short(name: str, most: int = 46) -> str:
    """A name that leaves room for the picture: its middle goes."""
    return name if len(name) <= most else f"{name[: most // 2 - 4]}…{name[-(most // 2 + 3) :]}"


def _panels(count: int, height: float):
    """A figure and ``count`` axes, two a row."""
    columns = min(count, 2)
    rows = -(-count // columns)
    figure = Figure(figsize=(4.9 * columns if columns > 1 else 6.5, 0.5 + height * rows))
    figure.get_layout_engine().set(h_pad=0.12)
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(count)]


def _cells(axes, rows: Sequence[str], columns: Sequence[str]) -> None:
    """Label a ``pcolormesh`` from the top down, each cell at its middle."""
    axes.set_yticks([y + 0.5 for y in range(len(rows))], rows)
    axes.set_xticks([x + 0.5 for x in range(len(columns))], columns)
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _number(axes, x: int, y: int, text: str, dark: bool) -> None:
    axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=7, color="#000000" if dark else "#ffffff")


def _ends(axes, places: Sequence[float], values: Sequence[float], text) -> None:
    """Write what ``text`` makes of each value, or its text, behind its bar."""
    texts = text if isinstance(text, list) else [text(value) for value in values]
    for y, value, words in zip(places, values, texts, strict=True):
        axes.annotate(words, (value, y), (3, 0), textcoords="offset points", va="center", fontsize=7)
    if axes.get_xscale() == "linear":
        axes.set_xlim(0, 1.18 * (max(values) or 1))
