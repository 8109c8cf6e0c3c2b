"""The image tower in plain torch, as its peers would build it: ``name -> make(tower)``, weights copied from ours.

The same network with the same state dict (:class:`spikeclip.energy.twin.PlainTower`), products in the order ours have: what is
left to differ are neurons, products and memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from ann_int8 import check_installed, quantized
from peers import Neuron, plain_loop, snntorch_module, spikingjelly_lif
from torch import Tensor, nn

from spikeclip.energy.twin import PlainTower, ann_twin
from spikeclip.models.inference import FoldedWeights, ImageInference
from spikeclip.models.vision import SpikingImageEncoder
from spikeclip.training.compositions import render

NEURON = Neuron("sigmoid", detach_reset=True)


class _Loop(nn.Module):
    def __init__(self, v_threshold: float):
        super().__init__()
        self.run = plain_loop(NEURON._replace(v_threshold=v_threshold))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


class _SpikingJelly(nn.Module):
    def __init__(self, v_threshold: float):
        super().__init__()
        self.node = spikingjelly_lif(NEURON._replace(v_threshold=v_threshold))

    def forward(self, x: Tensor) -> Tensor:
        self.node.reset()
        return self.node(x)


class _SnnTorch(nn.Module):
    """snnTorch's Leaky does not divide its input by tau and fires above its threshold: half the input is the same neuron,
    and a threshold one step of float32 lower.
    """

    def __init__(self, v_threshold: float):
        super().__init__()
        below = torch.nextafter(torch.tensor(v_threshold), torch.tensor(0.0)).item()
        self.leaky = snntorch_module(NEURON._replace(decay_input=False, v_threshold=below))

    def forward(self, x: Tensor) -> Tensor:
        mem, spikes = torch.zeros_like(x[0]), []
        for step in x:
            s, mem = self.leaky(step / 2.0, mem)
            spikes.append(s.to(x.dtype))  # float32 also for float64
        return torch.stack(spikes)


def _spiking(neuron: Callable[[float], nn.Module]) -> Callable[[SpikingImageEncoder], nn.Module]:
    return lambda tower: PlainTower(tower, neuron, tower.tokenizer.encode.T).train(tower.training)


def _checkpointed(tower: SpikingImageEncoder) -> nn.Module:
    tower.set_grad_checkpointing()
    return tower


def _compiled(tower: SpikingImageEncoder) -> nn.Module:
    torch.compiler.reset()
    return torch.compile(_spiking(_Loop)(tower))


def _ann(tower: SpikingImageEncoder) -> nn.Module:
    return ann_twin(tower, render(32, seed=6).images)


def _compiled_ann(tower: SpikingImageEncoder) -> nn.Module:
    torch.compiler.reset()
    return torch.compile(_ann(tower))


def _half_ann(tower: SpikingImageEncoder) -> Callable[[Tensor], Tensor]:
    compiled = _compiled_ann(tower)

    def run(images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16):
            return compiled(images)

    return run


def _int8_ann(tower: SpikingImageEncoder) -> Callable[[Tensor], Tensor]:
    """Quantised anew for each shape."""
    check_installed(tower.mean.device.type)
    ready: dict[int, nn.Module] = {}

    def run(images: Tensor) -> Tensor:
        if len(images) not in ready:
            ready[len(images)] = quantized(_ann(tower), images)
        with torch._inductor.config.patch(freezing=True):  # packed weights must be constants; an option of compile is too late
            return ready[len(images)](images)

    return run


@torch.no_grad()
def check_same_network(model, tower, images):
    """A peer's features are ours in float64, where rounding turns no spikes; in float32 one turned spike turns others."""
    plain = copy.deepcopy(getattr(model, "_orig_mod", model)).double().eval()
    few = images[:2].double()
    torch.testing.assert_close(plain(few), copy.deepcopy(tower).double().eval()(few), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def dequantized(ready: ImageInference, tower: SpikingImageEncoder) -> ImageInference:
    """``ready``, of integer weights, in float32: with the numbers that these stand for."""
    plain = tower.for_inference("fp32")
    for mine, theirs in zip(plain.modules(), ready.modules(), strict=True):
        if isinstance(mine, FoldedWeights):
            mine.load_state_dict({"values": theirs().dequantize(), "bias": theirs.bias})
    return plain


TRAINING = {
    "spikeclip": lambda tower: tower,
    "spikeclip, grad checkpointing": _checkpointed,
    "torch.nn + SpikingJelly": _spiking(_SpikingJelly),
    "torch.compile of torch.nn + plain loop": _compiled,
    "torch.nn + snnTorch": _spiking(_SnnTorch),
}
ANSWERING = {
    **{f"spikeclip, {kind}": lambda tower, kind=kind: tower.for_inference(kind) for kind in ("fp32", "int16", "int8")},
    "spikeclip, tower in evaluation": lambda tower: tower,
    "torch.nn + SpikingJelly": _spiking(_SpikingJelly),
    "torch.compile of torch.nn + plain loop": _compiled,
    "torch.nn + snnTorch": _spiking(_SnnTorch),
    "ANN twin, compiled": _compiled_ann,
    "ANN twin, compiled, bf16": _half_ann,
    "ANN twin, compiled, int8 (torchao)": _int8_ann,
}
