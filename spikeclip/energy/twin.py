"""The image tower in plain torch.nn, and with it the ANN twin: the same topology with ReLU, run once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..models.vision import SpikingImageEncoder
from ..nn import LinearNorm


class _Linear(nn.Module):
    """A layer, or one of its equal parts, over ``[T, B, N, C]``: a 1x1 convolution and BatchNorm of channels-last memory."""

    def __init__(self, layer: LinearNorm, part: int = 0, parts: int = 1):
        super().__init__()
        weight, bias = layer.linear.weight.chunk(parts)[part], layer.linear.bias
        self.conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=bias is not None)
        self.conv.weight.data.copy_(weight[:, :, None, None])
        if bias is not None:
            self.conv.bias.data.copy_(bias.chunk(parts)[part])
        self.norm = nn.BatchNorm2d(weight.shape[0])
        state = layer.norm.state_dict()
        self.norm.load_state_dict({name: t.chunk(parts)[part] if t.dim() else t for name, t in state.items()})

    def forward(self, x: Tensor) -> Tensor:
        steps, batch, tokens, channels = x.shape
        pixels = x.reshape(steps * batch, tokens, 1, channels).permute(0, 3, 1, 2)
        return self.norm(self.conv(pixels)).permute(0, 2, 3, 1).reshape(steps, batch, tokens, -1)


class _Block(nn.Module):
    def __init__(self, block, neuron):
        super().__init__()
        attention = block.attention
        self.heads, self.scale = attention.num_heads, attention.scale
        self.q, self.k, self.v = (_Linear(attention.qkv, part, 3) for part in range(3))
        self.project = _Linear(attention.project)
        self.fc1, self.fc2 = _Linear(block.fc1), _Linear(block.fc2)
        self.lif, self.q_lif, self.k_lif, self.v_lif, self.fc1_lif, self.fc2_lif = (neuron(1.0) for _ in range(6))
        self.attention_lif = neuron(attention.attention_lif.v_threshold)

    def forward(self, x: Tensor) -> Tensor:
        s = self.lif(x)
        parts = (self.q_lif(self.q(s)), self.k_lif(self.k(s)), self.v_lif(self.v(s)))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(2, 3) for part in parts)
        mixed = (q @ (k.mT @ v) * self.scale).transpose(2, 3).flatten(3)
        x = x + self.project(self.attention_lif(mixed))
        return x + self.fc2(self.fc2_lif(self.fc1(self.fc1_lif(x))))


class PlainTower(nn.Module):
    """The tower's network with its weights; ``neuron(v_threshold)`` makes what stands between layers.

    As in the published Spikingformer its matrix products are 1x1 convolutions, which oneDNN multiplies up to twice as fast as
    the MKL behind ``nn.Linear`` does on an AMD CPU, and queries, keys and values are three: as one, SpikingJelly's answers to
    32 images take 10 % longer and its training steps 16 %, its answers to one image 9 % less. The first convolution runs once
    for all steps and attention in the cheaper order, as the tower's do.
    """

    def __init__(self, tower: SpikingImageEncoder, neuron: Callable[[float], nn.Module], T: int):
        super().__init__()
        tokenizer = tower.tokenizer
        self.T, self.ann = T, isinstance(neuron(1.0), nn.ReLU)
        self.register_buffer("mean", tower.mean)
        self.register_buffer("std", tower.std)
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for conv, norm in zip(tokenizer.convs, tokenizer.norms, strict=True):
            self.convs.append(nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, bias=False))
            self.convs[-1].weight.data.copy_(conv.weight)
            self.norms.append(nn.BatchNorm2d(conv.out_channels))
            self.norms[-1].load_state_dict(norm.state_dict())
        pools = [tokenizer.first_pool, *(getattr(norm, "pool", None) for norm in tokenizer.norms[1:-1]), tokenizer.last_pool]
        self.pools = nn.ModuleList(nn.MaxPool2d(*pool) if isinstance(pool, tuple) else pool or nn.Identity() for pool in pools)
        self.neurons = nn.ModuleList(neuron(1.0) for _ in self.convs[1:])
        self.blocks = nn.ModuleList(_Block(block, neuron) for block in tower.blocks)
        self.step_weight = nn.Parameter(tower.readout.weight.detach().clone())
        self.project = nn.Linear(tower.project.in_features, tower.project.out_features)
        self.project.load_state_dict(tower.project.state_dict())
        self.to(tower.mean.device)

    def forward(self, images: Tensor) -> Tensor:
        x = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        x = self.pools[0](self.norms[0](self.convs[0](x))).expand(self.T, -1, -1, -1, -1)
        for neuron, conv, norm, pool in zip(self.neurons, self.convs[1:], self.norms[1:], self.pools[1:], strict=True):
            x = pool(norm(conv(neuron(x).flatten(0, 1)))).unflatten(0, (self.T, -1))
        x = x.flatten(3).transpose(2, 3)
        for block in self.blocks:
            x = block(x)
        x = x.mean(2)
        return self.project(x[0] if self.ann else torch.einsum("t,tbc->bc", self.step_weight, x))


def ann_twin(tower: SpikingImageEncoder, images: Tensor) -> PlainTower:
    """The twin of ``tower``, which ReLU and one step make of it, in evaluation.

    Its norms take their statistics from ``images``: with the tower's its activations would outgrow float32.
    """
    twin = PlainTower(tower, lambda v_threshold: nn.ReLU(), 1).to(tower.mean.device).train()
    for norm in twin.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1.0
    with torch.no_grad():
        twin(images.to(tower.mean.device))
    return twin.eval()
