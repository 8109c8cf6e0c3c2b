"""The image tower made ready for inference: BatchNorm folded into prepared weights, packed spikes from layer to layer."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn import BNLIF, LIF, LinearNorm, SpikeConv2d, SpikingSelfAttention
from ..ops import (
    PackedSpikes,
    Sequence,
    SpikeWeights,
    lif,
    prepare_weights,
    spike_attention_lif,
    spike_conv2d,
    spike_conv2d_lif,
    spike_matmul_lif,
)

# A CPU's calls are recorded up to so many first neurons (32 images of 32x32 for spikeclip-4-384): beyond, Python hardly counts.
_RECORDED_NEURONS = 1_600_000
# Tensors of the recorded calls that no thread runs, all together; the last call is kept in any case.
_KEPT_BYTES = 128 * 2**20


class FoldedWeights(nn.Module):
    """Weights and bias of a layer and the BatchNorm behind it, as :func:`spikeclip.ops.prepare_weights` holds them.

    They are buffers, so that they are saved, copied and moved; ``forward()`` returns the weights in the kernel's layout, made
    anew after any of these. Floating ones stay float32 whatever dtype the module is sent to. Loading weights of another kind
    is an error.
    """

    def __init__(self, w: Tensor, bias: Tensor, dtype: str):
        super().__init__()
        prepared = prepare_weights(w, dtype)
        self.register_buffer("values", prepared.values)
        self.register_buffer("scale", prepared.scale)
        self.register_buffer("bias", bias.detach().float())
        self._prepared: SpikeWeights | None = prepared

    def forward(self) -> SpikeWeights:
        prepared = self._prepared
        if prepared is None:
            prepared = self._prepared = SpikeWeights(self.values, self.scale)
        return prepared

    def _apply(self, fn, recurse: bool = True) -> FoldedWeights:
        self._prepared = None
        return super()._apply(lambda tensor: _moved(tensor, fn), recurse)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        self._prepared = None
        given = state_dict.get(f"{prefix}values")
        if given is not None and given.dtype != self.values.dtype:
            error_msgs.append(f"{prefix}values must be {self.values.dtype}; got {given.dtype}")
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_prepared": None}


class _Recorded:
    """The layers between the first neurons' currents, of the shape of ``like``, and the features' projection, as one call."""

    def __init__(self, tower: ImageInference, like: Tensor):
        self.sequence = Sequence()
        self.layers = [(layer, layer(), layer.bias) for layer in tower.modules() if isinstance(layer, FoldedWeights)]
        self.readout = tower.readout.weight.data_ptr()
        with torch.inference_mode(False), torch.no_grad():  # what is kept outlives the caller's mode
            self.currents = torch.empty(like.shape)
            stream = tower.stream(self.currents, self.sequence)
            self.means = self.sequence.mean(stream, tower.readout.weight)
        self.nbytes = self.sequence.nbytes

    def is_of(self, tower: ImageInference) -> bool:
        """Whether the layers that were recorded still have the tensors that they had."""
        same = all(layer._prepared is weights and layer._buffers["bias"] is bias for layer, weights, bias in self.layers)
        return same and tower.readout.weight.data_ptr() == self.readout

    def __call__(self, currents: Tensor) -> Tensor:
        """What the readout makes of the stream, kept until the next call."""
        self.currents.copy_(currents)
        self.sequence.run()
        return self.means


class _Kept:
    """Recorded calls that no thread runs, the one that ran last at the end."""

    def __init__(self):
        self._calls: list[_Recorded] = []
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[_Recorded]:
        return iter(self._calls)

    def take(self, tower: ImageInference, currents: Tensor) -> _Recorded:
        """One for ``currents``, recorded where there is none; no other thread gets it before it is given back."""
        stale: list[_Recorded] = []
        with self._lock:
            found = [call for call in self._calls if call.currents.shape == currents.shape]
            if found:
                if found[-1].is_of(tower):
                    self._calls.remove(found[-1])
                    return found[-1]
                stale, self._calls = self._calls, []
        del found, stale  # before others take as much memory
        return _Recorded(tower, currents)

    def give(self, call: _Recorded) -> None:
        """Keep ``call``, and drop the ones that have not run for longest where all are too large."""
        dropped = []
        with self._lock:
            self._calls.append(call)
            while len(self._calls) > 1 and sum(call.nbytes for call in self._calls) > _KEPT_BYTES:
                dropped.append(self._calls.pop(0))


def _moved(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """Where ``fn`` takes it, in its own dtype."""
    moved = fn(tensor)
    return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)


@torch.no_grad()
def folded(weight: Tensor, bias: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight ``[O, ...]`` and bias ``[O]`` of a layer with its BatchNorm in evaluation, in float64."""
    scale = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
    shift = norm.bias.double() - norm.running_mean.double() * scale
    return weight.double() * scale.view(-1, *[1] * (weight.dim() - 1)), shift if bias is None else shift + bias.double() * scale


def _fold_linear(layer: LinearNorm, dtype: str) -> FoldedWeights:
    w, bias = folded(layer.linear.weight, layer.linear.bias, layer.norm)
    return FoldedWeights(w.t(), bias, dtype)


def _fold_conv(conv: SpikeConv2d, norm: nn.Module, dtype: str) -> FoldedWeights:
    return FoldedWeights(*folded(conv.weight, conv.bias, norm), dtype)


def _neuron(module: LIF | BNLIF) -> dict:
    names = ("tau", "v_threshold", "v_reset", "decay_input")
    return {name: getattr(module, name) for name in names}


class _Block(nn.Module):
    """Spikes ``[T, B, N, C]`` and the stream behind them; adds to the stream and hands on its spikes."""

    def __init__(self, block: nn.Module, behind: dict, dtype: str):
        super().__init__()
        attention: SpikingSelfAttention = block.attention
        self.heads, self.width, self.attention_scale = attention.num_heads, attention.dim, attention.scale
        self.inner, self.mixed = _neuron(attention.qkv.norm), _neuron(attention.attention_lif)
        self.mlp, self.hidden, self.behind = _neuron(block.fc1_lif), _neuron(block.fc1.norm), behind
        layers = (attention.qkv, attention.project, block.fc1, block.fc2)
        self.qkv, self.project, self.fc1, self.fc2 = (_fold_linear(layer, dtype) for layer in layers)

    def forward(self, spikes: PackedSpikes, stream: Tensor, sequence: Sequence | None) -> PackedSpikes:
        def product(spikes: PackedSpikes, w: FoldedWeights, neuron: dict, **residual: Tensor) -> PackedSpikes:
            return spike_matmul_lif(spikes, w(), w.bias, sequence=sequence, **neuron, **residual)

        qkv = product(spikes, self.qkv, self.inner)
        mixed = spike_attention_lif(qkv, scale=self.attention_scale, num_heads=self.heads, sequence=sequence, **self.mixed)
        spikes = product(mixed, self.project, self.mlp, add=stream, currents=stream)
        spikes = product(spikes, self.fc1, self.hidden)
        return product(spikes, self.fc2, self.behind, add=stream, currents=stream)


class ImageInference(nn.Module):
    """What :meth:`SpikingImageEncoder.for_inference` returns: images ``[B, 3, H, W]`` to features ``[B, embed_dim]``.

    Its features and spikes are those of the tower in evaluation, to rounding for fp32 weights. Nothing in it learns; weights
    are buffers, so that ``state_dict``, ``copy.deepcopy`` and ``to(device)`` work. It computes in float32, whatever dtype it is
    sent to and under autocast too, and may be called from several threads. On a CPU the calls that up to 1.6 million first
    neurons need (32 images of 32x32 for spikeclip-4-384) are recorded (:class:`spikeclip.ops.Sequence`). Their memory is kept,
    for the last numbers of images: 128 MiB, or more for the last call alone.

    On a GPU a call for few images is mostly launches of kernels. Nothing in it waits for the device, so that PyTorch can replay
    it as one CUDA graph: ``torch.cuda.make_graphed_callables(ready, (images,))``. It then takes this batch size alone and
    checks nothing (one image is taken for each of the batch), one thread at a time, and features last until the next call.
    """

    def __init__(self, tower: nn.Module, weights: str):
        super().__init__()
        tokenizer, first = tower.tokenizer, tower.tokenizer.norms[0]
        self.image_size, self.T = tower.image_size, tokenizer.encode.T
        self.register_buffer("mean", tower.mean.clone(), persistent=False)
        self.register_buffer("std", tower.std.clone(), persistent=False)
        w, bias = folded(tokenizer.convs[0].weight, tokenizer.convs[0].bias, first)
        self.register_buffer("first_weight", w.float().contiguous(memory_format=torch.channels_last))
        self.register_buffer("first_bias", bias.float())
        self.first_pool, self.last_pool = copy.deepcopy(tokenizer.first_pool), copy.deepcopy(tokenizer.last_pool)
        self.first = _neuron(tokenizer.first_lif)
        pairs = list(zip(tokenizer.convs[1:], tokenizer.norms[1:], strict=True))
        self.convs = nn.ModuleList(_fold_conv(conv, norm, weights) for conv, norm in pairs)
        self.between = [{**_neuron(norm), "pool": norm.pool} for _, norm in pairs[:-1]]
        neurons = [_neuron(block.lif) for block in tower.blocks]
        self.entry = neurons[0] if neurons else None
        following = [*neurons[1:], *neurons[-1:]]  # nobody reads the last block's spikes, but its stream
        self.blocks = nn.ModuleList(_Block(b, n, weights) for b, n in zip(tower.blocks, following, strict=True))
        fused = all(block.width // block.heads in Sequence.HEADS for block in self.blocks)
        self.recordable = fused and self.entry is not None and isinstance(self.last_pool, nn.Identity)
        self._recorded = _Kept()
        self.readout, self.project = copy.deepcopy(tower.readout).float(), copy.deepcopy(tower.project).float()
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Raises ValueError for another shape or dtype."""
        check_images(images, self.image_size)
        with torch.autocast(images.device.type, enabled=False):
            return self._features(images)

    def _features(self, images: Tensor) -> Tensor:
        x = ((images.float() - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        x = self.first_pool(F.conv2d(x, self.first_weight, self.first_bias, padding=1)).permute(0, 2, 3, 1)
        if self._may_record(x):
            recorded = self._recorded.take(self, x)
            features = self.project(recorded(x))
            self._recorded.give(recorded)
            return features
        return self.project(self.readout(self.stream(x).mean(2)))

    def _may_record(self, currents: Tensor) -> bool:
        small = 0 < currents.numel() <= _RECORDED_NEURONS
        return small and self.recordable and Sequence.available(currents.device) and not torch.compiler.is_compiling()

    def stream(self, currents: Tensor, sequence: Sequence | None = None) -> Tensor:
        """The stream ``[T, B, N, C]`` behind all blocks, of the first neurons' currents ``[B, H, W, C]``; made or recorded."""
        if sequence is None:
            spikes, _ = lif(currents.expand(self.T, *currents.shape), packed=True, **self.first)
        else:
            spikes = sequence.lif(currents, self.T, **self.first)
        for conv, options in zip(self.convs[:-1], self.between, strict=True):
            spikes = spike_conv2d_lif(spikes, conv(), conv.bias, padding=1, sequence=sequence, **options)
        spikes, stream = self._enter(spikes, sequence)
        for block in self.blocks:
            spikes = block(spikes, stream, sequence)
        return stream

    def _enter(self, spikes: PackedSpikes, sequence: Sequence | None) -> tuple[PackedSpikes | None, Tensor]:
        """The last convolution: the stream and, where there are blocks, its spikes."""
        conv = self.convs[-1]
        if self.entry is not None and isinstance(self.last_pool, nn.Identity):
            stream = conv.bias.new_empty((*spikes.shape[:-1], len(conv.bias)))
            spikes = spike_conv2d_lif(spikes, conv(), conv.bias, padding=1, currents=stream, sequence=sequence, **self.entry)
            return spikes.flatten(2, 3), stream.flatten(2, 3)
        y = self.last_pool(spike_conv2d(spikes.flatten(0, 1), conv(), conv.bias, padding=1))
        stream = y.permute(0, 2, 3, 1).unflatten(0, spikes.shape[:2]).flatten(2, 3).contiguous()
        return (None if self.entry is None else lif(stream, packed=True, **self.entry)[0]), stream

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_recorded": None}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__({**state, "_recorded": _Kept()})

    def _apply(self, fn, recurse: bool = True) -> ImageInference:
        return super()._apply(lambda tensor: _moved(tensor, fn), recurse)

    def train(self, mode: bool = True) -> ImageInference:
        """Stays in evaluation, whatever ``mode``."""
        return super().train(False)


def check_images(images: Tensor, size: int) -> None:
    """Raise ValueError unless ``images`` are floating, ``[B, 3, size, size]``."""
    if images.dim() != 4 or images.shape[1:] != (3, size, size):
        raise ValueError(f"images must have shape [B, 3, {size}, {size}]; got {list(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"images must be floating, in [0, 1]; got {images.dtype}")
