"""The report as one HTML file that needs nothing else."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from matplotlib.figure import Figure

from .cost import Energy
from .counts import OtherCount, Profile
from .estimate import Estimate
from .figures import INK, of_counts, of_estimates, save
from .files import whole
from .table import PARTIAL, break_even, checked, named, notes, who
from .units import NONE, amount, digits, interval, percent, ratio, size, unit

if TYPE_CHECKING:
    from .measure import Measurement

_CSS = """
:root { color-scheme: light dark; --ink: #1a1c20; --paper: #fff; --soft: #f3f5f8; --line: #d3d8e0; --quiet: #5b6472;
  --bad: #b3261e }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e7e9ed; --paper: #14161a; --soft: #1f232a; --line: #3b414c; --quiet: #a3acb9; --bad: #ff8a80 }
}
body { margin: 0 auto; max-width: 72rem; padding: 1rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word }
h1 { font-size: 1.6rem; margin: .5rem 0 1rem }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem }
p, li, dd { max-width: 50rem }
small, figcaption { color: var(--quiet) }
figcaption { font-size: .9rem }
.partial { background: var(--bad); color: var(--paper); font-weight: 700; padding: .75rem 1rem; border-radius: .4rem;
  max-width: none }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(12rem, 40vw), 1fr)); gap: .6rem; margin: 1rem 0 }
.tiles div { background: var(--soft); border-radius: .4rem; padding: .6rem .8rem }
.tiles dt { font-size: .85rem; font-weight: 400; color: var(--quiet); margin: 0 }
.tiles dd { font-size: 1.15rem; font-weight: 600 }
.tiles small { display: block; font-size: .8rem; font-weight: 400 }
.scroll, figure { overflow-x: auto; margin: .75rem 0 }
figure { margin: 1.5rem 0 2.5rem }
figure svg { display: block; width: 100%; height: auto }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; min-width: 60% }
th, td { padding: .3rem .6rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top }
th.number, td.number { text-align: right }
td.number { white-space: nowrap }
td.text { min-width: 8rem; overflow-wrap: anywhere }
td.text:first-child { min-width: min(15rem, 30vw) }
thead th, tfoot td { background: var(--soft); font-weight: 600 }
tbody th { padding-top: .9rem }
summary { cursor: pointer; font-weight: 600; padding: .4rem 0 }
dt { font-weight: 600; margin-top: .75rem }
dd { margin: 0 }
"""

_CAPTIONS = {
    "firing-rates": "How often neurons fired, layer by layer; a layer that runs for fewer steps leaves cells empty.",
    "layers": "Grey: multiply-accumulates of one run if no zero were skipped. Below it what all runs did with factors that are "
    "not 0. Right: bytes of weights and of activations, as the machine held them.",
    "comparison": "Energies of different cost models say nothing about one another: compare the bars of one panel.",
    "break-even": "The SNN's cost if all its firing rates were scaled alike. Diamonds: where a baseline costs the same.",
    "sensitivity": "The SNN's cost in units of the last baseline's, if it ran for T steps and its rates were scaled alike.",
}


def save_html(
    profile: Profile, estimates: Sequence[Estimate], path: str | Path, measured: Mapping[str, Measurement] | None = None
) -> None:
    """Write the whole report, figures included, as one file, whole or not at all; ``measured``: by what was measured.

    Raises:
        ValueError: no estimates, or one of another profile.
    """
    page = _page(profile, checked(profile, estimates), measured or {})
    whole(path, lambda half: half.write_text(page, encoding="utf-8"))


def _page(profile: Profile, estimates: tuple[Estimate, ...], measured: Mapping[str, Measurement]) -> str:
    title = escape(f"Energy report: {profile.model}")
    parts = [
        f"<h1>{title}</h1>",
        _warnings(profile),
        _headline(profile),
        "<h2>Estimated energy</h2>",
        _costs(estimates),
        "<h2>The same network counted otherwise</h2>",
        _variants(estimates),
        "<h2>Figures</h2>",
        _limit(profile),
        *(_figure(name, figure) for name, figure in of_estimates(estimates).items()),
        *(_figure(name, figure) for name, figure in of_counts(profile).items()),
        "<h2>Layers</h2>",
        _layers(profile),
        _others(profile),
    ]
    if profile.text is not None:
        parts += ["<h2>Text tower</h2>", _text(profile, estimates)]
    parts += ["<h2>Measured on a machine (not estimated)</h2>", _measurements(measured)]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_CSS}</style></head>\n'
        f"<body>\n{chr(10).join(part for part in parts if part)}\n</body></html>\n"
    )


def _warnings(profile: Profile) -> str:
    lines = [f"<li>{escape(note)}</li>" for note in notes(profile)]
    banner = ""
    if profile.partial:
        banner = f'<p class="partial" role="alert">{PARTIAL}</p>'
    return banner + (f"<ul>{''.join(lines)}</ul>" if lines else "")


def _headline(profile: Profile) -> str:
    bound = "no interval: one sample" if profile.acs.half is None else "mean ± 95 % interval"
    tiles = [
        ("samples", f"{profile.samples:,}", ""),
        ("time-steps T", str(profile.steps), ""),
        ("mean firing rate", percent(profile.rate), "of neurons a step" if profile.neurons else "no neurons"),
        ("SynOps (ACs) a sample", interval(profile.acs), bound),
        ("MACs a sample, zeros skipped", interval(profile.macs), bound),
        ("MACs a sample, dense", amount(profile.analog_macs), "of layers that no spikes feed, as they are priced"),
        ("the same topology as an ANN", f"{amount(profile.ann_macs)} MACs", "run once, dense"),
        ("neurons", amount(sum(n.neurons for n in profile.neurons)), f"{amount(profile.updates)} updates a sample"),
        ("spikes a sample", amount(profile.spikes), ""),
        ("weights", size(profile.weight_bytes), "as the machine held them"),
    ]
    cells = (
        f"<div><dt>{escape(a)}</dt><dd>{escape(b)}{f'<small>{escape(c)}</small>' if c else ''}</dd></div>" for a, b, c in tiles
    )
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def _costs(estimates: Sequence[Estimate]) -> str:
    name, factor = unit(estimates)
    groups = []
    for one in estimates:
        rows = [(who(one), digits(one.snn.total * factor), "", "")]
        for title, baseline in one.baselines.items():
            spent = baseline.energy.total
            rows.append((named(one, title), digits(spent * factor), ratio(one.snn.total, spent), break_even(one, baseline)))
        groups.append((f"{one.model}: {one.title}", rows))
    me = who(estimates[0])
    headings = ("network", f"{name} a sample", f"{me} / it", f"{me} cheaper at mean firing rates")
    parts = [field.name for field in fields(Energy)]
    spent = [(one.model, *(digits(getattr(one.snn, part) * factor) for part in parts)) for one in estimates]
    sources = (
        f"<dt>{escape(one.model)}: {escape(one.title)}</dt>"
        f"<dd>{escape(one.source)}.<br>Leaves out: {escape(', '.join(one.leaves_out) or 'nothing that was counted')}.</dd>"
        for one in estimates
    )
    return (
        "<p>Counted operations at published prices: no measurement. Each cost model prices other things: compare within one. "
        "The baselines are ANNs of the same topology that run once, dense; W and A: bits of weights and activations.</p>"
        + _table(headings, groups)
        + f"<h3>What the {me} spends it on, {name} a sample</h3>"
        + _table(("cost model", *parts), [("", spent)])
        + f"<h3>Where the prices come from</h3><dl>{''.join(sources)}</dl>"
    )


def _limit(profile: Profile) -> str:
    """Up to where all rates can be scaled alike."""
    if not profile.reachable_rate < 1:
        return ""
    return (
        f"<p>Break-even and sensitivity scale all firing rates alike. Beyond a mean of {percent(profile.reachable_rate)} the "
        "busiest layer would have to fire more than once a step: arithmetic, not a network.</p>"
    )


def _variants(estimates: Sequence[Estimate]) -> str:
    name, factor = unit(estimates)
    titles = list(dict.fromkeys(title for one in estimates for title in one.variants))
    if not titles:
        return "<p>Nothing in it can be counted otherwise.</p>"

    def cell(one: Estimate, title: str) -> str:
        if title not in one.variants:
            return NONE
        other = one.variants[title].total
        return f"{digits(other * factor)} ({ratio(other, one.snn.total)})"

    rows = [(one.model, digits(one.snn.total * factor), *(cell(one, title) for title in titles)) for one in estimates]
    return (
        f"<p>In {name} a sample; in brackets, in units of it as it ran. {NONE}: this cost model does not price it.</p>"
        + _table(("cost model", "as it ran", *titles), [("", rows)])
    )


def _layers(profile: Profile) -> str:
    return (
        "<h3>Products</h3>"
        + (_products(profile) if profile.products else "<p>No products ran.</p>")
        + "<h3>Neurons</h3>"
        + (_neurons(profile) if profile.neurons else "<p>No neurons: nothing fires.</p>")
    )


def _products(profile: Profile) -> str:
    rows = []
    for p in profile.products:
        operations = map(amount, (p.dense_macs, p.effective_macs, p.effective_acs))
        memory = size(p.weight_bytes), size(p.activation_bytes)
        rows.append((p.name, p.op, p.operands, str(p.runs), percent(p.rate), *operations, *memory))
    macs, acs = (sum(getattr(p, f"effective_{kind}") for p in profile.products) for kind in ("macs", "acs"))
    memory = size(profile.weight_bytes), size(profile.activation_bytes)
    total = ("all", "", "", "", "", *map(amount, (profile.dense_macs, macs, acs)), *memory)
    headings = ("product", "op", "operands", "runs", "rate", "dense MACs", "MACs", "ACs (SynOps)", "weights", "activations")
    return "<p>Of a sample, over all runs. Rate: share of the inputs that is not 0. MACs and ACs: no factor is 0.</p>" + _table(
        headings, [("", rows)], total, texts=3
    )


def _neurons(profile: Profile) -> str:
    rows = []
    for n in profile.neurons:
        states = map(amount, (n.updates, n.state_reads, n.state_writes))
        rows.append((n.name, n.values, str(n.steps), amount(n.neurons), percent(n.rate), interval(n.spikes), *states))
    neurons, reads, writes = (
        sum(getattr(n, what) for n in profile.neurons) for what in ("neurons", "state_reads", "state_writes")
    )
    states = map(amount, (profile.spikes, profile.updates, reads, writes))
    total = ("all", "", "", amount(neurons), percent(profile.rate), *states)
    headings = ("layer", "values", "steps", "neurons", "rate", "spikes", "updates", "state reads", "state writes")
    return "<p>Of a sample, over all steps.</p>" + _table(headings, [("", rows)], total, texts=2)


_ORDER = ("unknown", "norm", "elementwise", "reduction", "neuron", "constant", "move")


def _others(profile: Profile) -> str:
    found: dict[tuple[int, str, str], list[OtherCount]] = {}
    for other in sorted(profile.others, key=lambda o: (_ORDER.index(o.category), not o.folds)):
        found.setdefault((other.category, other.handled, other.op), []).append(other)
    groups: dict[str, list[tuple[str, ...]]] = {}
    for (category, handled, op), others in found.items():
        names = list(dict.fromkeys(other.name for other in others))
        shown = names if category == "unknown" else names[:3]
        more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
        row = (op, ", ".join(shown) + more, amount(sum(other.operations for other in others)))
        groups.setdefault(f"{category}: {handled}", []).append(row)
    if not groups:
        return "<p>Nothing else ran.</p>"
    opened = " open" if any(other.category == "unknown" for other in profile.others) else ""
    table = _table(("op", "in", "elements a sample"), groups.items(), texts=2)
    return f"<details{opened}><summary>Everything else that ran, and what was done with it</summary>{table}</details>"


def _text(profile: Profile, estimates: Sequence[Estimate]) -> str:
    name, factor = unit(estimates)
    rows = []
    for one in estimates:
        kept, prompt = one.snn.total, one.prompt.total
        rows.append((one.model, *(digits(cost * factor) for cost in (kept, kept + profile.prompts * prompt, prompt))))
    headings = ("cost model", f"class vectors kept, {name} an answer", f"all {profile.prompts} prompts anew", "one prompt")
    return (
        f"<p>An answer needs {profile.prompts} prompts through this tower, once: their class vectors can be kept. The counts "
        "below are of one prompt.</p>"
        + _table(headings, [("", rows)])
        + _headline(profile.text)
        + "".join(_figure(key, figure, "text-") for key, figure in of_counts(profile.text).items())
        + _layers(profile.text)
        + _others(profile.text)
    )


def _measurements(measured: Mapping[str, Measurement]) -> str:
    if not measured:
        return "<p>No measurements were made: every energy on this page is an estimate.</p>"
    shown = (
        f"<h3>{escape(name)}</h3><p>{escape(one.line())}<br>"
        f"<small>{one.calls:,} calls in {one.repetitions} repetitions; threads of PyTorch on the CPU: {one.threads}</small></p>"
        for name, one in measured.items()
    )
    return (
        "<p>Latency of the median repetition, mean energy; in brackets the lowest and highest repetition's. They are of one "
        "machine and say nothing about the hardware that the estimates are of.</p>" + "".join(shown)
    )


def _table(
    headings: Sequence[str],
    groups: Iterable[tuple[str, Iterable[Sequence[str]]]],
    total: Sequence[str] = (),
    texts: int = 1,
) -> str:
    """Rows of escaped cells, in groups of a heading or none; the first ``texts`` columns are words, the others numbers."""

    def cells(row: Sequence[str], tag: str = "td") -> str:
        kinds = ["text"] * texts + ["number"] * (len(row) - texts)
        return "".join(f'<{tag} class="{kind}">{escape(cell)}</{tag}>' for kind, cell in zip(kinds, row, strict=True))

    body = ""
    for heading, rows in groups:
        body += f'<tr><th colspan="{len(headings)}">{escape(heading)}</th></tr>' if heading else ""
        body += "".join(f"<tr>{cells(row)}</tr>" for row in rows)
    foot = f"<tfoot><tr>{cells(total)}</tr></tfoot>" if total else ""
    head = f"<thead><tr>{cells(headings, 'th')}</tr></thead>"
    return f'<div class="scroll" tabindex="0"><table>{head}<tbody>{body}</tbody>{foot}</table></div>'


def _figure(name: str, figure: Figure, prefix: str = "") -> str:
    caption = escape(_CAPTIONS[name])
    return f"<figure>{_svg(figure, prefix + name, caption)}<figcaption>{caption}</figcaption></figure>"


def _svg(figure: Figure, name: str, label: str) -> str:
    """Markup of the figure that can stand in a page: ids of its own, the page's text colour, no namespaces."""
    file = io.BytesIO()
    save(figure, file, "svg")
    root = ElementTree.fromstring(file.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {_local(key): _own(_local(key), value, name) for key, value in element.attrib.items()}
    width = float(root.attrib["viewBox"].split()[2]) * 4 / 3  # pixels of points
    for given in ("width", "height", "version"):
        del root.attrib[given]
    look = f"max-width: {width:.0f}px; min-width: min({width:.0f}px, 44rem); stroke-linejoin: round; stroke-linecap: butt"
    root.attrib |= {"role": "img", "aria-label": label, "style": look}
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: Any) -> str:
    return str(name).rpartition("}")[2]


def _own(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "href" and value.startswith("#"):
        return f"#{name}-{value[1:]}"
    return value.replace("url(#", f"url(#{name}-").replace(INK, "currentColor")
