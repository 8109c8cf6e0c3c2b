"""Towers that fire: trained for a while on embedded pictures, or with biases set so that every layer fires at one rate."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spikeclip import SpikeCLIP
from spikeclip.models.vision import SpikingImageEncoder
from spikeclip.nn import FiringRates
from spikeclip.ops import lif
from spikeclip.training.compositions import render

STEPS = 100  # of training before anything is timed: rates have settled by then
RATES = (0.1, 0.2)


def fresh(name: str = "spikeclip-4-384") -> SpikingImageEncoder:
    torch.manual_seed(0)
    return SpikeCLIP.from_config(name).visual


def trained(steps: int, batch: int = 32) -> SpikingImageEncoder:
    """A tower after ``steps`` of Adam on which of the embedded pictures' labels each is: far enough for real firing rates."""
    tower = fresh().train()
    head = nn.Linear(tower.project.out_features, 80)
    optimizer = torch.optim.Adam([*tower.parameters(), *head.parameters()], lr=1e-3)
    pictures = render(steps * batch, seed=0)
    for images, labels in zip(pictures.images.split(batch), pictures.labels.split(batch), strict=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(tower(images)), labels).backward()
        optimizer.step()
    return tower


def by_rate(learnt: SpikingImageEncoder, images: Tensor) -> dict[float | None, SpikingImageEncoder]:
    """``learnt`` as it is (None), and towers of which every layer fires at one of ``RATES``."""
    return {None: learnt, **{rate: fire_at(fresh().to(images.device), images[:8], rate) for rate in RATES}}


def mean_rate(tower: SpikingImageEncoder, images: Tensor) -> float:
    """Spikes per neuron and step over all layers."""
    with FiringRates(tower.eval()) as watch, torch.no_grad():
        tower(images)
    return torch.stack([rates.mean() for rates in watch.rates().values()]).mean().item()


@torch.no_grad()
def settled(tower: SpikingImageEncoder, images: Tensor) -> SpikingImageEncoder:
    """``tower`` with the running statistics of ``images``: evaluation then fires as training does."""
    for norm in tower.modules():
        if isinstance(norm, nn.modules.batchnorm._NormBase):
            norm.momentum = 1.0
    tower.train()(images)
    return tower.eval()


@torch.no_grad()
def fire_at(tower: SpikingImageEncoder, images: Tensor, rate: float) -> SpikingImageEncoder:
    """Shift the norms' biases, and the attention's thresholds, until every layer fires at ``rate`` on ``images``."""
    tokenizer = settled(tower, images).tokenizer

    def shift(norm: nn.Module, currents: Tensor, neuron: nn.Module) -> None:
        norm.bias += _bisect(lambda c: _rate(currents + c, neuron, neuron.v_threshold) >= rate, -20.0, 20.0)

    def current(norm: nn.Module, x: Tensor) -> Tensor:
        """What a BNLIF integrates, for x [..., C]; the bias moves a max-pool's output as it moves its input."""
        y = nn.functional.batch_norm(x.flatten(0, -2), norm.running_mean, norm.running_var, norm.weight, norm.bias).view_as(x)
        if getattr(norm, "pool", None):
            y = nn.functional.max_pool2d(y.flatten(0, 1).permute(0, 3, 1, 2), *norm.pool)
            y = y.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])
        return y

    x = (images - tower.mean) / tower.std
    steps = lambda: tokenizer.encode(tokenizer.first_pool(tokenizer.norms[0](tokenizer.convs[0](x)))).movedim(2, -1)  # noqa: E731
    shift(tokenizer.norms[0], steps(), tokenizer.first_lif)
    spikes = tokenizer.first_lif(steps())
    for conv, norm in zip(tokenizer.convs[1:-1], tokenizer.norms[1:-1], strict=True):
        y = conv(spikes.flatten(0, 1)).unflatten(0, spikes.shape[:2])
        shift(norm, current(norm, y.movedim(2, -1)), norm)
        spikes = norm(y)
    y = tokenizer.convs[-1](spikes.flatten(0, 1))
    blocks = list(tower.blocks)
    flat = lambda: tokenizer.last_pool(tokenizer.norms[-1](y)).unflatten(0, spikes.shape[:2]).flatten(3).mT  # noqa: E731
    shift(tokenizer.norms[-1], flat(), blocks[0].lif)
    stream = flat()
    for block, behind in zip(blocks, [*blocks[1:], None], strict=True):
        attention, spikes = block.attention, block.lif(stream)
        shift(attention.qkv.norm, current(attention.qkv.norm, attention.qkv.linear(spikes)), attention.qkv.norm)
        seen: list[Tensor] = []
        handle = attention.attention_lif.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        attention(spikes)
        handle.remove()
        neuron = attention.attention_lif
        neuron.v_threshold = -_bisect(lambda c, n=neuron, x=seen[0]: _rate(x, n, -c) >= rate, -50.0, -1e-3)
        shift(attention.project.norm, stream + attention(spikes), block.fc1_lif)
        stream = stream + attention(spikes)
        spikes = block.fc1_lif(stream)
        shift(block.fc1.norm, current(block.fc1.norm, block.fc1.linear(spikes)), block.fc1.norm)
        added = block.fc2(block.fc1(spikes))
        if behind is not None:
            shift(block.fc2.norm, stream + added, behind.lif)
        stream = stream + block.fc2(block.fc1(spikes))
    return tower


def _rate(currents: Tensor, neuron: nn.Module, v_threshold: float) -> float:
    s, _ = lif(currents, tau=neuron.tau, v_threshold=v_threshold, v_reset=neuron.v_reset, decay_input=neuron.decay_input)
    return s.mean().item()


def _bisect(enough, low: float, high: float) -> float:
    """The least value in ``low..high`` for which ``enough`` holds, which holds for all larger ones."""
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
