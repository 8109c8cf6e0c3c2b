"""The demo's pictures, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from .training import History


def loss_curves(histories: dict[str, History], path: Path) -> None:
    """One panel per stage: loss against step, smoothed over 20 steps, and validation scores where there are any."""
    figure = Figure(figsize=(4 * len(histories), 3.2), layout="constrained")
    for index, (name, history) in enumerate(histories.items(), start=1):
        axes = figure.add_subplot(1, len(histories), index)
        axes.plot(history.losses, alpha=0.3, color="tab:blue")
        window = min(20, len(history.losses))
        smooth = [sum(history.losses[i - window : i]) / window for i in range(window, len(history.losses) + 1)]
        axes.plot(range(window - 1, len(history.losses)), smooth, color="tab:blue")
        axes.set(title=name, xlabel="step", ylabel="loss")
        if history.scores:
            scores = axes.twinx()
            scores.plot(*zip(*history.scores, strict=True), "o-", color="tab:orange")
            scores.set_ylabel("validation top-1", color="tab:orange")
    figure.savefig(path, dpi=120)


def answers(images: Tensor, labels: Sequence[str], tops: Sequence[str], certainty: Sequence[float], path: Path) -> None:
    """A grid of images ``[n, 3, H, W]``, each under its top answer: green when right, red with the truth when not."""
    columns = 8
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.7 * columns, 2.0 * rows), layout="constrained")
    for i, image in enumerate(images):
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.imshow(image.permute(1, 2, 0).numpy())
        axes.set_axis_off()
        right = tops[i] == labels[i]
        text = f"{tops[i]}\n{certainty[i]:.0%}" if right else f"{tops[i]}\nnot {labels[i]}"
        axes.set_title(text, fontsize=8, color="tab:green" if right else "tab:red")
    figure.savefig(path, dpi=120)
