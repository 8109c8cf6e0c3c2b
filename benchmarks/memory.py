"""Bytes that a training step of the image tower keeps for its backward pass: ``python benchmarks/memory.py``.

Counted through ``saved_tensors_hooks``: every piece of memory once, parameters and buffers left out. Writes results/memory.md.
"""

from __future__ import annotations

from pathlib import Path

import torch
from rates import fresh
from towers import TRAINING

from spikeclip.nn import PackedSavedSpikes

BATCH = 8
CONFIGS = ("spikeclip-demo", "spikeclip-4-384")
EAGER = [name for name in TRAINING if not name.startswith("torch.compile")]


def saved_bytes(tower: torch.nn.Module, images: torch.Tensor) -> int:
    known = {t.untyped_storage().data_ptr() for t in [*tower.parameters(), *tower.buffers()]}
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor  # held by the graph, so that no address is used twice

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        graph = tower(images)
    assert graph.requires_grad
    return sum(sizes.values())


def resident(name: str) -> int:
    """A figure in kB of /proc/self/status."""
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)).split()[1])


def main() -> None:
    heads = ["", *EAGER, "spikes that SpikingJelly's save", "the same inside PackedSavedSpikes"]
    lines = [
        f"Megabytes kept for backward by one forward pass of the image tower in training, batch {BATCH}, T = 4, fp32.",
        "",
        "| " + " | ".join(heads) + " |",
        "|---" * len(heads) + "|",
    ]
    for name in CONFIGS:
        tower = fresh(name).train()
        images = torch.rand(BATCH, 3, tower.image_size, tower.image_size)
        figures = [saved_bytes(TRAINING[who](tower), images) for who in EAGER]
        with PackedSavedSpikes() as packed:
            TRAINING["torch.nn + SpikingJelly"](tower)(images)
        figures += [packed.dense_bytes, packed.packed_bytes]
        lines.append(f"| {name} | " + " | ".join(f"{figure / 1e6:.1f}" for figure in figures) + " |")
    text = "\n".join(lines) + "\n"
    (Path(__file__).parent / "results" / "memory.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
