"""Bytes that a training step of the image tower keeps for its backward pass: ``python benchmarks/memory.py``.

Counted through ``saved_tensors_hooks``: every piece of memory once, parameters and buffers left out. Writes results/memory.md.
"""

from __future__ import annotations

from pathlib import Path

import torch

from spikeclip import SpikeCLIP
from spikeclip.nn import PackedSavedSpikes, SpikeConv2d, SpikeLinear

BATCH = 8
CONFIGS = ("spikeclip-demo", "spikeclip-4-384")
PLAIN = {SpikeConv2d: torch.nn.Conv2d.forward, SpikeLinear: torch.nn.Linear.forward}


def plain(model: torch.nn.Module) -> torch.nn.Module:
    """The same model through torch's own dense layers."""
    for module in model.modules():
        if type(module) in PLAIN:
            module.forward = PLAIN[type(module)].__get__(module)
    return model


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


def main() -> None:
    lines = [
        f"Megabytes kept for backward by one forward pass of the image tower in training, batch {BATCH}, T = 4, fp32.",
        "",
        "| | torch.nn layers | spike layers | spikes that torch.nn layers save | the same inside PackedSavedSpikes |",
        "|---|---|---|---|---|",
    ]
    for name in CONFIGS:
        torch.manual_seed(0)
        tower = SpikeCLIP.from_config(name).visual.train()
        images = torch.rand(BATCH, 3, tower.image_size, tower.image_size)
        ours = saved_bytes(tower, images)
        dense = saved_bytes(plain(tower), images)
        with PackedSavedSpikes() as packed:
            tower(images)
        figures = (dense, ours, packed.dense_bytes, packed.packed_bytes)
        lines.append(f"| {name} | " + " | ".join(f"{figure / 1e6:.1f}" for figure in figures) + " |")
    text = "\n".join(lines) + "\n"
    (Path(__file__).parent / "results" / "memory.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
