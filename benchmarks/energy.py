"""What counting costs: ``python benchmarks/energy.py`` times ``energy.profile`` against the plain forward pass.

Into results/energy.md, with the memory that it takes for few and for many images. Wants an otherwise idle machine.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from memory import resident

import spikeclip
from spikeclip import SpikeCLIP
from spikeclip.energy import profile
from spikeclip.training.compositions import render

HERE = Path(__file__).parent
IMAGES, BATCH, ROUNDS = 1024, 128, 9


def seconds(run) -> float:
    run()
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def tower(name: str):
    return (SpikeCLIP.from_pretrained(name) if name == "spikeclip-demo" else SpikeCLIP.from_config(name)).visual.eval()


def overhead(name: str, images: int) -> str:
    model, pictures = tower(name), render(images, seed=3).images

    @torch.no_grad()
    def plain() -> None:
        for part in pictures.split(BATCH):
            model(part)

    forward, counted = seconds(plain), seconds(lambda: profile(model, pictures, batch_size=BATCH))
    return f"| {name} | {images} | {forward:.3f} | {counted:.3f} | {counted / forward:.2f} |"


def peak(images: int) -> float:
    """Megabytes that a fresh process has held at most after counting so many images, made one batch at a time."""
    profile(tower("spikeclip-demo"), (render(BATCH, seed=seed).images for seed in range(images // BATCH)), T=4)
    return resident("VmHWM") / 1e3  # getrusage would tell the parent's, too


def main() -> None:
    if sys.argv[1:2] == ["peak"]:
        print(peak(int(sys.argv[2])))
        return
    spikeclip.keep_memory()
    lines = ["| | images | forward pass, s | counted, s | times |", "|---|---|---|---|---|"]
    lines += [overhead("spikeclip-demo", IMAGES), overhead("spikeclip-4-384", BATCH)]
    lines += ["", "| images | most memory of the process, MB |", "|---|---|"]
    for images in (BATCH, 8 * BATCH, 64 * BATCH):
        command = [sys.executable, str(Path(__file__).resolve()), "peak", str(images)]
        lines.append(f"| {images} | {float(subprocess.run(command, capture_output=True, text=True, check=True).stdout):.0f} |")
    text = f"Batches of {BATCH}; medians of {ROUNDS}; torch {torch.__version__}, {torch.get_num_threads()} threads.\n\n"
    (HERE / "results" / "energy.md").write_text(text + "\n".join(lines) + "\n")
    print(text + "\n".join(lines))


if __name__ == "__main__":
    main()
