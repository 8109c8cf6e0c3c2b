"""The spiking image tower: Spikingformer (Zhou et al. 2023, arXiv 2304.11954) with SpikeCLIP's readout.

Activations are time-first and channels-last: convolutions see ``[T*B, C, H, W]`` in channels-last memory, blocks see the same
memory as ``[T, B, N, C]``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..nn import BNLIF, LIF, DirectEncoding, LinearNorm, SpikeConv2d, SpikingSelfAttention
from ..ops._density import product_dtype
from .config import LIFConfig, VisionConfig
from .inference import ImageInference, check_images
from .readout import StepReadout


def _by_dense_layer(layer: nn.Conv2d | nn.Linear | StepReadout, x: Tensor) -> Tensor:
    """``layer(x)`` for what is no spikes; under autocast in 16 bits that this CPU does not multiply, rounded to them after."""
    if x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and layer.weight.dtype == torch.float32:
        dtype = torch.get_autocast_dtype("cpu")
        if product_dtype(x, dtype) != dtype:
            with torch.autocast("cpu", enabled=False):
                return layer(x.float()).to(dtype)
    return layer(x)


class SpikingTokenizer(nn.Module):
    """3x3 convolutions with BatchNorm, spikes between them, and pools: images ``[B, 3, H, W]`` to currents ``[T, B, N, C]``.

    The still image is the same at every step, so the first convolution, norm and pool run once and are repeated after; their
    batch statistics are those of T copies (the running variance differs by its 1/n correction alone).
    """

    grad_checkpointing = False

    def __init__(self, config: VisionConfig, T: int, lif: LIFConfig):
        super().__init__()
        sizes = (3, *config.channels)
        pairs = list(zip(sizes, sizes[1:], strict=False))
        kinds = (nn.Conv2d, *[SpikeConv2d] * len(config.channels))  # the image itself is no spikes
        self.convs = nn.ModuleList(kind(i, o, 3, padding=1, bias=False) for kind, (i, o) in zip(kinds, pairs, strict=False))
        windows = [(3, 2, 1) if pool else None for pool in config.pools]
        inner = (BNLIF(o, pool=w, packed=True, **lif.neuron()) for (_, o), w in zip(pairs[1:-1], windows[1:-1], strict=True))
        first, last = (nn.BatchNorm2d(o) for _, o in (pairs[0], pairs[-1]))
        self.norms = nn.ModuleList([first, *inner, last])
        self.first_pool, self.last_pool = (nn.MaxPool2d(*w) if w else nn.Identity() for w in (windows[0], windows[-1]))
        self.encode = DirectEncoding(T)
        self.first_lif = LIF(**lif.neuron(), packed=True)

    def forward(self, images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=torch.channels_last)
        x = self.encode(self.first_pool(self.norms[0](_by_dense_layer(self.convs[0], images))))
        spikes = self.first_lif(x.movedim(2, -1))
        again = self.grad_checkpointing and torch.is_grad_enabled()
        for conv, norm in zip(self.convs[1:-1], self.norms[1:-1], strict=True):
            flat = spikes.flatten(0, 1)
            y, *product = conv(flat, with_product=True) if again else (conv(flat),)
            spikes = norm(y.unflatten(0, x.shape[:2]), *product)
        y = self.last_pool(self.norms[-1](self.convs[-1](spikes.flatten(0, 1))))
        return y.unflatten(0, x.shape[:2]).flatten(3).transpose(2, 3)


class SpikingBlock(nn.Module):
    """Pre-activation block: spikes feed attention and MLP, whose currents add to the float stream ``[T, B, N, C]``."""

    def __init__(self, config: VisionConfig, lif: LIFConfig):
        super().__init__()
        hidden = int(config.width * config.mlp_ratio)
        self.lif = LIF(**lif.neuron(), packed=True)
        self.attention = SpikingSelfAttention(
            config.width, config.num_heads, config.attention_scale, config.attention_v_threshold, **lif.neuron()
        )
        self.fc1_lif = LIF(**lif.neuron(), packed=True)
        self.fc1 = LinearNorm(config.width, hidden, bias=True, neuron=lif.neuron())
        self.fc2 = LinearNorm(hidden, config.width, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.lif(x))
        return x + self.fc2(self.fc1(self.fc1_lif(x)))


class SpikingImageEncoder(nn.Module):
    """Images ``[B, 3, H, W]``, floating in [0, 1], to features ``[B, embed_dim]``.

    Raises ValueError for another shape or dtype.
    """

    def __init__(self, config: VisionConfig, embed_dim: int, T: int, lif: LIFConfig):
        super().__init__()
        self.image_size = config.image_size
        self.register_buffer("mean", torch.tensor(config.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(1, 3, 1, 1), persistent=False)
        self.tokenizer = SpikingTokenizer(config, T, lif)
        self.blocks = nn.ModuleList(SpikingBlock(config, lif) for _ in range(config.depth))
        self.readout = StepReadout(T)
        self.project = nn.Linear(config.width, embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        check_images(images, self.image_size)
        x = self.tokenizer((images - self.mean) / self.std)
        for block in self.blocks:
            x = block(x)
        return _by_dense_layer(self.project, _by_dense_layer(self.readout, x.mean(dim=2)))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training makes the currents of spiking layers again in its backward pass in place of keeping them.

        The products that make them are made twice, and a third (``spikeclip-4-384``) to a half (``spikeclip-demo``) of the
        bytes is kept. Gradients stay what they are, and running statistics are updated once. Forward hooks of these products
        then see a pair, (product, :class:`~spikeclip.ops.SpikeProduct`), and what they change of it is not made again.
        """
        for module in self.modules():
            if isinstance(module, (LinearNorm, SpikingTokenizer)):
                module.grad_checkpointing = enable

    def for_inference(self, weights: str = "fp32") -> ImageInference:
        """A tower of its own with this one's weights in evaluation, several times as fast and without gradients.

        BatchNorm is folded into the weights, held as ``weights``: fp32, int16 or int8, the integers with one unit per output
        channel (:func:`spikeclip.ops.prepare_weights`); the first convolution stays float32. Spikes go from layer to layer at
        one bit each, and neurons are the epilogue of the product that feeds them. Later changes of this tower are not seen.

        Raises ValueError for other ``weights``.
        """
        return ImageInference(self, weights)
