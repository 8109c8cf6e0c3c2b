"""Operations of the image tower per image, watched by hooks, and the field's arithmetic-only energy estimate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models.vision import SpikingImageEncoder
from ..nn import SpikingSelfAttention
from ..ops import PackedSpikes

PJ_MAC, PJ_AC = 4.6, 0.9  # 45 nm, fp32: Horowitz 2014, doi 10.1109/ISSCC.2014.6757323


@dataclass(frozen=True)
class LayerCount:
    """One layer, per image: dense multiply-accumulates over ``runs`` time-steps, and the share of its inputs that is not 0."""

    name: str
    dense_macs: float
    runs: int
    rate: float
    spiking: bool

    @property
    def synops(self) -> float:
        """Accumulates that spikes cause: dense MACs times the input's firing rate; 0 for a layer fed by analog values."""
        return self.dense_macs * self.rate if self.spiking else 0.0


@dataclass(frozen=True)
class Count:
    """A tower's layers and their sums, per image."""

    layers: tuple[LayerCount, ...]

    @property
    def synops(self) -> float:
        return sum(layer.synops for layer in self.layers)

    @property
    def analog_macs(self) -> float:
        return sum(layer.dense_macs for layer in self.layers if not layer.spiking)

    @property
    def ann_macs(self) -> float:
        """Of the twin of the same topology that runs once, on analog values."""
        return sum(layer.dense_macs / layer.runs for layer in self.layers)

    @property
    def snn_millijoules(self) -> float:
        return (PJ_AC * self.synops + PJ_MAC * self.analog_macs) * 1e-9

    @property
    def ann_millijoules(self) -> float:
        return PJ_MAC * self.ann_macs * 1e-9

    def line(self) -> str:
        """One sentence with the estimate and what it leaves out."""
        return (
            f"{self.snn_millijoules:.4f} mJ an image against {self.ann_millijoules:.4f} mJ for the same-topology ANN "
            f"({self.synops / 1e6:.2f} M SynOps + {self.analog_macs / 1e6:.2f} M MAC against {self.ann_macs / 1e6:.2f} M MAC; "
            "arithmetic only, 45 nm fp32: memory traffic, membrane updates and addressing are left out)"
        )


@torch.no_grad()
def count(tower: SpikingImageEncoder, images: Tensor) -> Count:
    """Run ``tower`` on ``images`` ``[B, 3, H, W]`` in eval mode and count its convolutions, linears and attention products.

    Attention's two products are counted in the order of the event-driven kernel, q (k^T v), at the rate of the spikes that
    select rows: k in the first, q in the second, whose other operand is a small integer, not a spike. Raises TypeError for
    another tower, one made for inference among them.
    """
    if not isinstance(tower, SpikingImageEncoder):
        raise TypeError(f"tower must be a SpikingImageEncoder, one that learns; got {type(tower).__name__}")
    batch, found, handles = len(images), {}, []

    def record(name: str, x: Tensor | PackedSpikes, dense: float, runs: int) -> None:
        packed = isinstance(x, PackedSpikes)
        spiking = packed or bool(((x == 0) | (x == 1)).all())
        rate = x.density() if packed else torch.count_nonzero(x).item() / x.numel()
        found[name] = LayerCount(name, dense / batch, runs, rate, spiking)

    def product(name: str):
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            x = inputs[0]
            if isinstance(module, nn.Conv2d):
                record(name, x, output.numel() * module.weight[0].numel(), x.shape[0] // batch)
            else:
                record(name, x, output.numel() * module.in_features, x.shape[0] if len(x.shape) == 4 else 1)

        return hook

    def attention(name: str, module: SpikingSelfAttention):
        spikes: dict[str, PackedSpikes] = {}
        for part in ("q", "k"):
            layer = getattr(module, part)
            handles.append(layer.register_forward_hook(lambda m, i, out, part=part: spikes.__setitem__(part, out)))

        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            steps, b, tokens, width = output.shape
            dense = steps * b * tokens * width * (width // module.num_heads)
            record(f"{name}.product1", spikes["k"], dense, steps)
            record(f"{name}.product2", spikes["q"], dense, steps)

        return hook

    for name, module in tower.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            handles.append(module.register_forward_hook(product(name)))
        elif isinstance(module, SpikingSelfAttention):
            handles.append(module.register_forward_hook(attention(name, module)))
    was_training = tower.training
    try:
        tower.eval()(images)
    finally:
        tower.train(was_training)
        for handle in handles:
            handle.remove()
    return Count(tuple(found.values()))
