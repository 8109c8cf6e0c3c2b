"""Answers of the image tower beside its peers', by turns: ``python benchmarks/turns.py``.

Every round asks every model once, so that a neighbour who slows the machine for a while slows all of them; how many times as
long a peer takes is the median over the rounds' ratios. Writes results/turns-<instruction set>.md. That the peers give our
features is checked in test_towers.py, which also has the figures one model after the other.
"""

from __future__ import annotations

import copy
import statistics
import time
from pathlib import Path

import torch
from conftest import cpu_name
from peers import Missing
from rates import STEPS, by_rate, mean_rate, trained
from torch import Tensor
from towers import ANSWERING

import spikeclip
from spikeclip.training.compositions import render

ROUNDS = {32: 9, 1: 41}  # by batch
AGAINST = {
    "SpikingJelly": "torch.nn + SpikingJelly",
    "torch.compile": "torch.compile of torch.nn + plain loop",
    "ANN twin": "ANN twin, compiled",
}


def models(towers: dict[float | None, torch.nn.Module], images: Tensor) -> dict[tuple[str, float | None], object]:
    """By name and firing rate; peers, which are dense, at one rate. Each has answered twice: compiled, and its memory kept."""
    found = {}
    for who, make in ANSWERING.items():
        for rate in towers if who.startswith("spikeclip") else [None]:
            try:
                found[who, rate] = make(copy.deepcopy(towers[rate]).eval())
            except Missing as reason:
                print(f"{who}: {reason}")
    for model in found.values():  # after all of them are made: making some resets the compiler
        for _ in range(2):
            model(images)
    return found


@torch.no_grad()
def by_turns(towers: dict[float | None, torch.nn.Module], images: Tensor) -> dict[tuple[str, float | None], list[float]]:
    """Milliseconds of every round; the call before a timed one brings the model's weights back into the caches."""
    found = models(towers, images)
    times: dict[tuple[str, float | None], list[float]] = {key: [] for key in found}
    for _ in range(ROUNDS[len(images)]):
        for key, model in found.items():
            model(images)
            begin = time.perf_counter()
            model(images)
            times[key].append((time.perf_counter() - begin) * 1e3)
    return times


def table(times: dict[tuple[str, float | None], list[float]]) -> list[str]:
    against = {short: times[who, None] for short, who in AGAINST.items() if (who, None) in times}
    lines = ["| | firing | ms | " + " | ".join(against) + " |", "|---" * (3 + len(against)) + "|"]
    for (who, rate), mine in times.items():
        ours, firing = who.startswith("spikeclip"), f"{100 * rate:.0f} %" if rate else "as trained"
        cells = [who, firing if ours else "", f"{statistics.median(mine):.3g}"]
        for theirs in against.values():
            ratio = statistics.median(a / b for a, b in zip(theirs, mine, strict=True))
            cells.append(f"{ratio:.2f}x as long" if ours else "")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    spikeclip.keep_memory()
    images = render(max(ROUNDS), seed=5).images
    towers = by_rate(trained(STEPS), images)
    rate = mean_rate(copy.deepcopy(towers[None]), images)
    lines = [f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}."]
    lines.append(f"Image tower of spikeclip-4-384, by turns; as trained ({STEPS} steps) it fires at {rate:.1%}.")
    for batch, rounds in ROUNDS.items():
        lines += ["", f"**batch {batch}, medians of {rounds} rounds**", "", *table(by_turns(towers, images[:batch]))]
    text = "\n".join(lines) + "\n"
    instructions = torch.backends.cpu.get_cpu_capability().lower()
    (Path(__file__).parent / "results" / f"turns-{instructions}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
