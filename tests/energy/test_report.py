import io
import json
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from torch import nn

from spikeclip import nn as snn
from spikeclip.energy import Mean, NeuronCount, OtherCount, ProductCount, Profile, available, estimate, figures, profile
from spikeclip.energy.html import save_html
from spikeclip.energy.measure import Measurement
from spikeclip.energy.table import LATEX_HEADER, latex_row, print_table
from spikeclip.energy.units import amount, digits, interval, percent, size


def product(name, operands="spikes x weights", runs=4, rate=0.25, macs=1e6, first=False):
    """Of one run: ``macs``, and a hundredth as many values in and out."""
    spiking = operands.startswith("spikes")
    effective = macs * runs * rate
    return ProductCount(
        name, "mm", operands, runs, first, first, macs * runs, macs * runs, 0.0 if spiking else effective,
        effective if spiking else 0.0, Mean(effective, None), (effective / runs,) * runs, (rate,) * runs, macs / 100 * runs,
        macs / 100 * runs, int(macs), int(4 * macs), 8 * macs / 100 * runs,
    )  # fmt: skip


def neurons(name, rates, each=1000.0):
    return NeuronCount(name, len(rates), each, Mean(each * sum(rates), 12.0), tuple(rates), "spikes")


def counted(products, layers=(), **others) -> Profile:
    acs, macs = (sum(getattr(p, f"effective_{kind}") for p in products) for kind in ("acs", "macs"))
    values = {"model": "Net", "samples": 32, "steps": 4, "others": (), "acs": Mean(acs, acs / 50), "macs": Mean(macs, 0.0)}
    return Profile(**{**values, "products": tuple(products), "neurons": tuple(layers), **others})


SNN = counted(
    [product("stem", "analog x weights", runs=1, rate=1.0, first=True), product("head")],
    [neurons("lif", (0.1, 0.2, 0.3, 0.4)), neurons("late", (0.05, 0.15))],
    others=(
        OtherCount("bn", "native_batch_norm", "norm", 5000.0, 4, True),
        *(OtherCount(f"act{i}", "relu", "elementwise", 1000.0, 4, False) for i in range(6)),
    ),
)
ANN = counted([product("fc", "analog x weights", runs=1, rate=0.5)], steps=1, notes=("no neurons were seen",))


def estimates(seen, models=("45nm-fp32", "lemaire-2022")):
    return [estimate(seen, model) for model in models]


def html(seen, tmp_path, measured=None, models=("45nm-fp32", "lemaire-2022")):
    save_html(seen, estimates(seen, models), tmp_path / "report.html", measured)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def console_text(seen, **options):
    console = Console(file=io.StringIO(), width=100, **options)
    print_table(seen, estimates(seen), console)
    return console.file.getvalue()


class Tiny(nn.Module):
    """Names that would be markup, and formulas to matplotlib, if nothing escaped them."""

    def __init__(self):
        super().__init__()
        self.add_module("<b>&", nn.Conv2d(3, 8, 3))
        self.add_module("$x_$", snn.LIF(tau=1.5))
        self.add_module("[red]out\"'", nn.Linear(8 * 16, 5))

    def forward(self, x):
        first, lif, last = self.children()
        spikes = lif(2 * first(x).expand(3, *[-1] * 4).contiguous())
        return torch.stack([last(step) for step in spikes.flatten(2)]).mean(0)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return profile(Tiny(), torch.rand(6, 3, 6, 6))


def test_numbers_have_three_digits():
    assert [digits(x) for x in (0, 0.012345, 4.5678, 9.999, 99.96, 789.4, 7890.4, float("nan"), 1.234e-8)] == [
        "0", "0.0123", "4.57", "10.0", "100", "789", "7,890", "–", "1.23e-08",
    ]  # fmt: skip
    assert [amount(x) for x in (3, 0.5, 999.7, 6_959_733, 2e9)] == ["3", "0.500", "1.00 k", "6.96 M", "2.00 G"]
    assert [size(x) for x in (16, 73_728)] == ["16 B", "73.7 kB"]
    assert [percent(x) for x in (0.0995, 1.0, 0.0, float("nan"))] == ["9.95 %", "100 %", "0 %", "–"]
    assert interval(Mean(6.96e6, 152e3)) == "6.96 ± 0.152 M" and interval(Mean(6.96e6, None)) == "6.96 M"


def test_terminal_shows_layers_totals_and_cost_models():
    text = console_text(replace(SNN, notes=("mind the gap",)))
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.split()}
    assert rows["stem"] == ["stem", "1", "100", "%", "1.00", "M", "1.00", "M", "0", "4.00", "MB"]
    assert rows["head"] == ["head", "4", "25.0", "%", "4.00", "M", "0", "1.00", "M", "4.00", "MB"]
    assert rows["all"] == ["all", "5.00", "M", "1.00", "M", "1.00", "M", "8.00", "MB"]
    assert "32 samples, T = 4, mean firing rate 20.0 %" in text
    assert "1.00 ± 0.0200 M ACs (SynOps), 1.00 ± 0 M MACs (mean ± 95 % interval)" in text
    # 4.6 pJ a MAC and 0.9 pJ an AC: 5.5 µJ beside 9.2
    assert rows["45nm-fp32"] == ["45nm-fp32", "SNN", "5.50"]
    ann = next(line for line in text.splitlines() if "ANN fp32" in line)
    assert ann.split() == ["ANN", "fp32", "(same", "precision)", "9.20", "0.598", "×", "always"]
    assert "below 15.1 %" in text and "never" in text
    assert "note: mind the gap" in text and "PARTIAL" not in text


def test_terminal_marks_what_is_partial_in_red_and_takes_names_as_they_are(tiny):
    text = console_text(replace(SNN, partial=True), force_terminal=True, color_system="standard", legacy_windows=False)
    assert re.search(r"\x1b\[1;31mPARTIAL: something that ran was not counted", text)
    text = console_text(tiny)
    assert "[red]out\"'" in text and "<b>&" in text


def test_a_network_without_neurons_is_no_snn(tmp_path):
    text = console_text(ANN)
    assert "no neurons" in text and "SNN cheaper" in text and "below" not in text and "always" not in text
    page = html(ANN, tmp_path)
    assert "No neurons: nothing fires." in page and "no neurons were seen" in page and page.count("<svg") == 2
    paths = figures.save_pngs(ANN, estimates(ANN), tmp_path / "png")
    assert [path.name for path in paths] == ["comparison.png", "layers.png"]
    for draw, given in (
        (figures.firing_rates, ANN),
        (figures.break_evens, estimates(ANN)),
        (figures.sensitivity, estimates(ANN)),
    ):
        with pytest.raises(ValueError, match="no firing rates|never fires"):
            draw(given)
    assert latex_row(ANN, estimates(ANN)[0], "fc").split(" & ")[2] == "--"


def test_a_silent_network_has_rates_and_no_break_even(tmp_path):
    silent = replace(SNN, neurons=(neurons("lif", (0.0, 0.0, 0.0, 0.0)),))
    page = html(silent, tmp_path)
    assert page.count("<svg") == 3 and "<td>0 %" not in page and "break-even-" not in page


def test_latex_row():
    cells = re.split(r"(?<!\\) & ", latex_row(SNN, estimates(SNN)[0], r"A_1 & 50% {x}\~^#$<").removesuffix(r" \\"))
    assert cells == [
        r"A\_1 \& 50\% \{x\}\textbackslash{}\textasciitilde{}\textasciicircum{}\#\$\textless{}",
        "4", r"20.0\%", "1.00", "1.00", "0.00550", "0.00920 (fp32)", "0.598",
    ]  # fmt: skip
    assert LATEX_HEADER.count(" & ") == 7 and LATEX_HEADER.endswith(r"\\")
    partial = replace(SNN, partial=True)
    assert latex_row(partial, estimate(partial), "A").startswith("A (partial) & ")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "at least one"),
        (estimate(SNN), "must be a list of Estimates; got Estimate"),
        (["45nm-fp32"], "must hold Estimates; got str"),
        ([estimate(ANN)], "of another profile: its T is 1"),
    ],
)
def test_estimates_that_do_not_belong(given, message, tmp_path):
    for show in (
        lambda: save_html(SNN, given, tmp_path / "report.html"),
        lambda: figures.save_pngs(SNN, given, tmp_path / "png"),
        lambda: print_table(SNN, given, Console(file=io.StringIO())),
    ):
        with pytest.raises(ValueError, match=message):
            show()
    assert not list(tmp_path.iterdir())


class Checked(HTMLParser):
    """Collects ids, references and what is open; raises on a tag that closes another."""

    VOID = ("meta", "br", "link", "img", "input", "hr")

    def __init__(self, page):
        super().__init__()
        self.open, self.ids, self.references, self.tags = [], Counter(), set(), Counter()
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        if tag not in self.VOID:
            self.open.append(tag)
        for key, value in attributes:
            assert not key.startswith("on") and key != "src"
            if key == "id":
                self.ids[value] += 1
            self.references |= set(re.findall(r"url\(#([^)]+)\)", value or ""))
            if key == "href":
                assert value.startswith(("#", "data:image/png;base64,"))
                self.references |= {value[1:]} if value.startswith("#") else set()

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag) if tag not in self.VOID else None

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_alone(tiny, tmp_path):
    page = html(tiny, tmp_path, models=available())
    seen = Checked(page)
    assert seen.tags["svg"] == 5 and seen.references and seen.references <= set(seen.ids)
    assert set(seen.ids.values()) == {1}, "ids of different figures must differ"
    assert not set(seen.tags) & {"script", "link", "iframe", "img", "object", "b"}
    assert not re.search(r"https?:|src=|@import|url\((?!#)", page)
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert "prefers-color-scheme: dark" in page and "currentColor" in page and figures.INK not in page.split("</style>")[1]
    assert html(tiny, tmp_path, models=available()) == page, "the same profile must make the same file"


def test_the_page_says_it_all(tmp_path):
    page = unescape(html(SNN, tmp_path))
    for text in (
        "Energy report: Net", "20.0 %", "1.00 ± 0.0200 M", "mean ± 95 % interval", "5.50", "0.598 ×", "always", "below 15.1 %",
        "never", "first layer at every step", "Horowitz", "Lemaire", "Leaves out: membrane updates", "analog x weights",
        "act0, act1, act2 and 3 more", "6.00 k", "Beyond a mean of 80.0 % the busiest layer",
        "norm: folds into the product before it",
        "No measurements were made: every energy on this page is an estimate.",
    ):  # fmt: skip
        assert text in page, text
    assert "PARTIAL" not in page and "Text tower" not in page and page.count("<details>") == 1


def test_the_page_escapes_names(tiny, tmp_path):
    page = html(tiny, tmp_path)
    assert "<b>" not in page
    for name in ("<b>&", "$x_$", "[red]out\"'"):
        assert f'<td class="text">{escape(name)}</td>' in page


def test_the_page_warns_of_what_is_partial(tmp_path):
    unknown = tuple(OtherCount(f"mix{i}", "fft", "unknown", 1.0, 1, False) for i in range(5))
    page = html(replace(SNN, partial=True, notes=("fft is <unknown>",), others=unknown), tmp_path)
    assert '<p class="partial" role="alert">PARTIAL: something that ran was not counted' in page
    assert "<li>fft is &lt;unknown&gt;</li>" in page and "<details open>" in page and "mix0, mix1, mix2, mix3, mix4<" in page


def test_the_page_shows_the_text_tower(tmp_path):
    text = replace(counted([product("words", macs=2e5)], [neurons("word_lif", (0.1,) * 4)]), notes=("cut",))
    seen = replace(SNN, text=text, prompts=7)
    page = html(seen, tmp_path)
    assert Checked(page).tags["svg"] == 7
    assert "<li>text tower: cut</li>" in page and "all 7 prompts anew" in page and "words" in page
    # 5.5 µJ for an image and 7 * 0.2 M * 4 * 0.25 * 0.9 pJ for prompts
    row = re.search(r"class vectors kept.*?45nm-fp32</td>(.*?)</tr>", page, re.S)[1]
    assert re.findall(r">([\d.]+)<", row) == ["5.50", "6.76", "0.180"]
    names = [path.name for path in figures.save_pngs(seen, estimates(seen), tmp_path)]
    assert names[-2:] == ["text-firing-rates.png", "text-layers.png"]


def test_measurements_stand_apart(tmp_path):
    measured = {"SNN <1>": Measurement(32, 40, 5, "cpu", 2, 0.012, 0.011, 0.013, 2667.0, reason="no counter")}
    page = html(SNN, tmp_path, measured)
    section = page.split("<h2>Measured on a machine (not estimated)</h2>")[1]
    assert "<h3>SNN &lt;1&gt;</h3>" in section and measured["SNN <1>"].line() in unescape(section) and "40 calls" in section
    assert "No measurements were made" not in page and "2,667" not in page.split("<h2>Measured")[0]


def test_pngs_are_pictures_and_are_written_whole_or_not_at_all(tiny, tmp_path, monkeypatch):
    paths = figures.save_pngs(tiny, estimates(tiny), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)
    assert {path.stem for path in paths} == {"comparison", "break-even", "sensitivity", "firing-rates", "layers"}
    for path in paths:
        (width, height), shares = Image.open(path).size, colours(path)
        assert min(width, height) > 150 and len(shares) > 100 and max(shares.values()) < 0.98
    before = {path: path.read_bytes() for path in paths}

    def breaks(self, file, **options):
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", breaks)
    with pytest.raises(OSError, match="disk full"):
        figures.save_pngs(tiny, estimates(tiny), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def colours(path):
    """Share of the pixels by colour."""
    picture = Image.open(path).convert("RGB")
    pixels = picture.width * picture.height
    return {colour: count / pixels for count, colour in picture.getcolors(pixels)}


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_heat_map_leaves_cells_empty_where_a_layer_ran_fewer_steps():
    figure = figures.firing_rates(SNN)
    (axes,) = figure.axes
    assert texts(axes) == ["10.0", "20.0", "30.0", "40.0", "5.0", "15.0"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["lif", "late"]
    drawn = axes.collections[0].get_array()
    assert drawn.shape == (2, 4) and drawn.mask.tolist() == [[False] * 4, [False, False, True, True]]


def test_bars_are_of_one_run_and_of_all_runs():
    both = replace(SNN.products[1], name="both", effective_macs=5e5, effective_acs=2.5e5)
    operations, _ = figures.layers(replace(SNN, products=(*SNN.products, both))).axes
    dense, macs, acs = ([(bar.get_x(), bar.get_width()) for bar in bars] for bars in operations.containers)
    assert dense == [(0, 1e6)] * 3
    assert macs == [(0, 1e6), (0, 0), (0, 5e5)] and acs == [(1e6, 0), (0, 1e6), (5e5, 2.5e5)]
    operations, memory = figures.layers(SNN).axes
    assert [[bar.get_width() for bar in bars] for bars in memory.containers] == [[4e6, 4e6], [8e4, 3.2e5]]
    assert texts(operations) == ["1.00 M"] * 4 and texts(memory) == ["4.08 MB", "4.32 MB"]
    assert operations.get_xlim()[1] > 1.1e6


def test_comparison_keeps_cost_models_apart():
    one, other = figures.comparison(estimates(SNN)).axes
    assert one.get_title("left").startswith("45nm-fp32: ") and other.get_title("left").startswith("lemaire-2022: ")
    assert one.get_xscale() == "log" and "5.50 µJ" in texts(one)[0] and "the SNN costs 0.598 × this" in texts(one)[1]


def test_break_even_marks_the_profiled_rate_and_the_crossings():
    (one,) = estimates(SNN, ("lemaire-2022",))
    (axes,) = figures.break_evens([one]).axes
    points = {line.get_marker(): [] for line in axes.lines}
    for line in axes.lines:
        points[line.get_marker()].append((line.get_xdata()[0], line.get_ydata()[0]))
    micro = {name: baseline.energy.total * 1e-6 for name, baseline in one.baselines.items()}
    crossings = [(b.break_even, micro[name]) for name, b in one.baselines.items() if b.break_even]
    assert crossings and points["D"] == crossings
    assert points["o"] == [(one.rate, pytest.approx(one.snn.total * 1e-6))]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    for label, (name, baseline) in zip(labels[1:], one.baselines.items(), strict=True):
        rate = baseline.break_even
        verdict = "always cheaper" if rate is None else f"cheaper below {percent(rate)}" if rate else "never cheaper"
        assert label == f"{name}: SNN {verdict}"


def test_sensitivity_is_white_where_both_cost_the_same():
    one, other = estimates(SNN)
    panels = figures.sensitivity([one, other]).axes[:2]
    for axes, part in zip(panels, (one, other), strict=True):
        mesh = axes.collections[0]
        assert mesh.norm(1.0) == pytest.approx(0.5) and mesh.norm(10) == pytest.approx(1 - mesh.norm(0.1))
        assert mesh.get_array().ravel().tolist() == [list(ratios.values())[-1] for _, _, ratios in part.sweep]
    assert panels[0].get_yticklabels()[2].get_text() == "T = 4, ANN W8A3"


def test_many_layers_make_a_taller_figure_and_long_names_fit():
    many = counted(
        [product(f"encoder.stage.{i}.a_name_that_is_much_too_long_for_a_figure.$w_{i}") for i in range(60)],
        [neurons(f"encoder.stage.{i}.a_name_that_is_much_too_long_for_a_figure.$v_{i}", (0.1,) * 40) for i in range(60)],
        steps=40,
    )
    for draw, each in ((figures.firing_rates, 0.25), (figures.layers, 0.3)):
        figure = draw(many)
        FigureCanvasAgg(figure).draw()
        axes = figure.axes[0]
        labels = axes.get_yticklabels()
        boxes = [label.get_window_extent() for label in labels]
        assert len(labels) == 60 and figure.get_figheight() > 60 * each
        assert all(box.x0 >= 0 for box in boxes) and all(a.y0 > b.y1 for a, b in zip(boxes, boxes[1:], strict=False))
        assert labels[59].get_text().endswith("_59") and axes.get_position().width > 0.35


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not found:
        pytest.skip("no chromium, chromium-browser or google-chrome on the PATH")
    flags = "--headless --no-sandbox --disable-gpu --hide-scrollbars --virtual-time-budget=2000 --enable-logging=stderr"
    home = f"--user-data-dir={tmp_path_factory.mktemp('browser')}"

    def run(page, *more):
        done = subprocess.run([found, *flags.split(), home, *more, page.as_uri()], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "CONSOLE" not in done.stderr, done.stderr
        return done.stdout

    return run


PROBE = """
onload = () => {
  const page = document.querySelector('iframe').contentDocument
  const svgs = [...page.querySelectorAll('svg')]
  const found = {
    overflow: page.documentElement.scrollWidth - innerWidth,
    heights: svgs.map(svg => svg.getBoundingClientRect().height),
    lost: [...page.querySelectorAll('use')].filter(use => !page.querySelector(use.getAttribute('href'))).length,
    ink: getComputedStyle(page.querySelector('svg [style*="fill: currentColor"]')).fill,
    text: page.body.innerText,
  }
  document.body.replaceChildren(JSON.stringify(found))
}
"""


def test_a_browser_shows_the_page(browser, tiny, tmp_path):
    page = html(tiny, tmp_path, models=available())
    path = tmp_path / "report.html"
    dom = browser(path, "--dump-dom")
    assert dom.count("<svg") == 5 and dom.count("<figure") == 5
    assert f"<dd>{interval(tiny.acs)}<small>" in dom and f"<dd>{percent(tiny.rate)}<small>" in dom

    picture = tmp_path / "page.png"
    browser(path, f"--screenshot={picture}", "--window-size=1200,3000")
    shares = colours(picture)
    assert Image.open(picture).size == (1200, 3000) and len(shares) > 500 and 0.3 < shares[255, 255, 255] < 0.95

    for width in (390, 1200):
        probe = tmp_path / "probe.html"
        frame = f'<iframe srcdoc="{escape(page)}" style="border: 0; width: {width}px; height: 9000px"></iframe>'
        probe.write_text(
            f'<!doctype html><meta charset="utf-8"><body>{frame}<script>{PROBE}</script>'.replace("innerWidth", str(width))
        )
        found = json.loads(unescape(re.search(r"<body>(.*?)</body>", browser(probe, "--dump-dom"), re.S)[1]))
        assert found["overflow"] <= 0 and found["lost"] == 0 and len(found["heights"]) == 5 and min(found["heights"]) > 100
        assert found["ink"] == "rgb(26, 28, 32)" and "<b>&" in found["text"] and "never" in found["text"]


def test_a_browser_shows_it_in_the_dark_and_on_a_phone(browser, tiny, tmp_path):
    html(tiny, tmp_path)
    picture = tmp_path / "phone.png"
    browser(tmp_path / "report.html", f"--screenshot={picture}", "--window-size=500,2400", "--force-dark-mode")
    shares = colours(picture)
    assert max(shares, key=shares.get) == (20, 22, 26) and len(shares) > 200
