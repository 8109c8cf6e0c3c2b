"""How long one answer takes against everything it depends on, as a figure: ``python benchmarks/latency.py``.

Times the image tower for inference over firing rate, time-steps, batch, width and image size, with the same network dense
(compiled) and its ANN twin beside, and writes results/latency.json and results/latency.png.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from conftest import cpu_name
from rates import fire_at
from towers import ANSWERING

import spikeclip
from spikeclip import SpikeCLIP
from spikeclip.models import load_config
from spikeclip.models.vision import SpikingImageEncoder

KINDS = ("fp32", "int16", "int8")
DENSE = {"dense SNN, compiled": "torch.compile of torch.nn + plain loop", "ANN twin, compiled": "ANN twin, compiled"}
BATCH = 8
RESULTS = Path(__file__).parent / "results"


def tower(rate: float = 0.1, T: int = 4, **vision) -> SpikingImageEncoder:
    config = load_config("spikeclip-4-384")
    torch.manual_seed(0)
    model = SpikeCLIP(replace(config, T=T, vision=replace(config.vision, **vision))).visual
    return fire_at(model, torch.rand(4, 3, model.image_size, model.image_size), rate)


@torch.no_grad()
def milliseconds(model, images: torch.Tensor) -> float:
    model(images)
    times = []
    while len(times) < 5 or (sum(times) < 0.5 and len(times) < 50):
        start = time.perf_counter()
        model(images)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def pictures(model: SpikingImageEncoder, batch: int = BATCH) -> torch.Tensor:
    return torch.rand(batch, 3, model.image_size, model.image_size)


def sweep(points: dict[float, SpikingImageEncoder]) -> dict[str, dict[float, float]]:
    """Milliseconds an image by kind of weights and point."""
    return {kind: {at: milliseconds(m.for_inference(kind), pictures(m)) / BATCH for at, m in points.items()} for kind in KINDS}


def main() -> None:
    spikeclip.keep_memory()
    base = tower()
    found: dict[str, dict[str, dict[float, float]]] = {}
    rates = {rate: tower(rate) for rate in (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)}
    found["firing rate"] = sweep(rates)
    for name, who in DENSE.items():
        found["firing rate"][name] = dict.fromkeys(rates, milliseconds(ANSWERING[who](base), pictures(base)) / BATCH)
    found["time-steps"] = sweep({T: tower(T=T) for T in (1, 2, 4, 8, 16)})
    ready = {kind: base.for_inference(kind) for kind in KINDS}
    batches = (1, 2, 3, 4, 7, 8, 16, 31, 32, 33, 64, 128, 256)
    found["batch"] = {kind: {n: milliseconds(m, pictures(base, n)) / n for n in batches} for kind, m in ready.items()}
    widths = {w: tower(channels=(w // 8, w // 4, w // 2, w, w), num_heads=w // 48) for w in (96, 192, 288, 384, 480, 576)}
    odd = {w: tower(channels=(50, 100, 200, w, w), num_heads=7) for w in (371, 385)}  # heads of 53 and 55
    found["width"] = sweep(dict(sorted((widths | odd).items())))
    found["image size"] = sweep({n: tower(image_size=n) for n in (16, 24, 32, 36, 48, 64)})
    RESULTS.mkdir(exist_ok=True)
    kept = {"cpu": cpu_name(), "batch": BATCH, "ms_per_image": found}
    (RESULTS / "latency.json").write_text(json.dumps(kept, indent=1) + "\n")
    draw(found)


def draw(found: dict[str, dict[str, dict[float, float]]]) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(3.2 * len(found), 3.4), layout="constrained")
    for axis, (what, series) in zip(axes, found.items(), strict=True):
        for name, points in series.items():
            dense = name not in KINDS
            axis.plot(points.keys(), points.values(), "--" if dense else "o-", label=name, markersize=3)
        axis.set_xlabel(what)
        if what == "batch":
            axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("milliseconds an image")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    rest = f"10 % firing, T = 4, batch {BATCH}, 32x32 where not said otherwise"
    figure.suptitle(f"Image tower of spikeclip-4-384, {torch.get_num_threads()} threads; {rest}")
    figure.savefig(RESULTS / "latency.png", dpi=110)


if __name__ == "__main__":
    main()
