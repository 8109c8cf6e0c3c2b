"""``spikeclip.energy.profile``: one pass over data, watched, and what it cost per sample."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..models import SpikeCLIP
from ..models.inference import ImageInference
from ..nn.neurons import _Neuron
from ..zeroshot import class_vectors, classify
from ..zeroshot.classifier import DEFAULT_TEMPLATES
from .counts import Profile
from .sums import Sums
from .watch import Watch, is_neuron


def profile(
    model: nn.Module,
    data: Tensor | Dataset | Iterable,
    *,
    T: int | None = None,
    classes: Sequence[str] | None = None,
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    neurons: Sequence[type[nn.Module]] = (),
    batch_dim: int = 0,
    batch_size: int = 128,
    call: Callable[[nn.Module, Any], Any] | None = None,
) -> Profile:
    """Run ``model`` over ``data`` in evaluation, without gradients, and count every operation, per sample.

    Any PyTorch model: products are seen where PyTorch dispatches them, layers and functions alike; neurons are ours
    (:mod:`spikeclip.nn`, :mod:`spikeclip.ops`), SpikingJelly's and snnTorch's, whose states are reset before each batch, and
    ``neurons``. Every op that ran is listed with what was done with it. Memory does not grow with the number of samples.

    What ran when is told from shapes: ``[T, B, ...]`` and ``[T * B, ...]`` hold all steps, time first, ``[B, ...]`` one, of as
    many as there are calls; a layer that folds something else into the batch (patches, heads) can be taken for one over time.

    Args:
        model: left as it was, but for the states of neurons; not run by other threads meanwhile. Of one made for inference,
            profile the model that it was made of.
        data: a batch ``[B, ...]``, a Dataset, or an iterable of batches: tensors, tuples whose first part is the input, or
            dicts of keyword arguments.
        T: time-steps; None: what the neurons show on one sample, which runs once more for it.
        classes, templates: of a SpikeCLIP, what it chooses between, as for :class:`~spikeclip.zeroshot.ZeroShotClassifier`: the
            profile of its answers has that of its text tower's prompts as ``text``.
        neurons: further classes of modules that fire, with spikes (first) in their output.
        batch_dim: of the inputs; 1 for data with time first.
        batch_size: for a Dataset.
        call: ``call(model, batch)`` in place of ``model(input)``.

    Raises:
        TypeError: an argument of the wrong type, or a model made for inference. ValueError: no data, no samples in a batch,
        NaN, or a SpikeCLIP without classes.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if any(isinstance(module, ImageInference) for module in model.modules()):
        raise TypeError("model must be one that learns: its copy for inference makes the same products out of PyTorch's sight")
    if T is not None and (isinstance(T, bool) or not isinstance(T, int) or T < 1):
        raise ValueError(f"T must be an integer >= 1 (time-steps) or None; got {T!r}")
    if isinstance(model, SpikeCLIP):
        return _zeroshot(model, data, classes, templates, batch_size)
    if classes is not None:
        raise ValueError("classes are for a SpikeCLIP; a text tower alone takes token ids as data")
    plain = getattr(model, "_orig_mod", model)  # a compiled model runs out of sight
    return _counted(plain, _batches(data, batch_size, batch_dim), T, neurons, batch_dim, call or _call)


def _zeroshot(model: SpikeCLIP, data: Any, classes: Sequence[str] | None, templates: Sequence[str], batch_size: int) -> Profile:
    if classes is None:
        raise ValueError("classes must name what a SpikeCLIP chooses between, a list of strings; got None")
    device, T = next(model.parameters()).device, model.config.T
    with _evaluation(model):
        vectors = class_vectors(model, classes, templates)

    def answer(model: SpikeCLIP, batch: Any) -> Tensor:
        return classify(model, _input(batch).to(device), vectors)

    images = _counted(model, _batches(data, batch_size), T, (), 0, answer)
    prompts = [template.replace("{}", name) for name in classes for template in templates]
    tokens = model.tokenizer(prompts).to(device)
    text = _counted(model.text, _batches(tokens, batch_size), T, (), 0, _call)
    return replace(images, text=text, prompts=len(prompts), partial=images.partial or text.partial)


def _batches(data: Any, batch_size: int, batch_dim: int = 0) -> Iterable:
    if isinstance(data, Tensor):
        return data.split(batch_size, batch_dim) if data.dim() > batch_dim else [data]
    if isinstance(data, Dataset):
        return DataLoader(data, batch_size)
    if not isinstance(data, Iterable):
        raise TypeError(f"data must be a tensor, a Dataset or an iterable of batches; got {type(data).__name__}")
    return data


def _input(batch: Any) -> Any:
    while isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    return batch


def _call(model: nn.Module, batch: Any) -> Any:
    device = next((t.device for t in itertools.chain(model.parameters(), model.buffers())), torch.device("cpu"))
    if isinstance(batch, dict):
        return model(**{key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()})
    x = _input(batch)
    return model(x.to(device) if isinstance(x, Tensor) else x)


def _tensor_of(batch: Any) -> Tensor:
    first = next((v for v in batch.values() if isinstance(v, Tensor)), None) if isinstance(batch, dict) else _input(batch)
    if not isinstance(first, Tensor):
        raise TypeError(
            f"data must yield tensors, tuples that begin with one, or dicts that hold one; got {type(batch).__name__}"
        )
    return first


def _counted(
    model: nn.Module, batches: Iterable, T: int | None, neurons: Sequence[type], batch_dim: int, call: Callable
) -> Profile:
    sums = None
    with torch.no_grad(), _evaluation(model):
        for batch in batches:
            x = _tensor_of(batch)
            if x.dim() <= batch_dim or x.shape[batch_dim] == 0:
                raise ValueError(f"data must yield batches with samples in dimension {batch_dim}; got {list(x.shape)}")
            if sums is None:
                steps = T or _learn_steps(model, batch, neurons, batch_dim, call)
                sums, watch = Sums(type(model).__name__, steps), Watch(model, neurons, steps)
            reset(model, neurons)
            watch.begin(x.shape[batch_dim])
            try:
                with watch:
                    call(model, batch)
            except KeyboardInterrupt:
                if not sums.samples:
                    raise
                sums.notes.append("interrupted: the counts are of the samples before")
                sums.partial = True
                break
            sums.add(watch.seen, x.shape[batch_dim])
        reset(model, neurons)
    if sums is None:
        raise ValueError("data must hold at least one batch; it was empty")
    return sums.profile()


def _learn_steps(model: nn.Module, batch: Any, neurons: Sequence[type], batch_dim: int, call: Callable) -> int:
    """What most neurons ran of one sample: the rows of a call, or calls of one row; 1 without neurons."""

    def one(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.narrow(batch_dim, 0, 1) if value.dim() > batch_dim else value
        if isinstance(value, dict):
            return {key: one(part) for key, part in value.items()}
        if isinstance(value, (tuple, list)):
            parts = [one(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        return value

    watch = Watch(model, neurons, None)
    watch.begin(1)
    reset(model, neurons)
    with watch:
        call(model, one(batch))
    torch.clear_autocast_cache()  # of weights that were cast out of sight of the watch that counts
    found = Counter(_steps_of([fired.steps for fired in calls], watch.calls) for calls in watch.seen.neurons.values())
    return min(found, key=lambda steps: (-found[steps], steps)) if found else 1


def _steps_of(rows: list[int], calls: Mapping[nn.Module, int]) -> int:
    """Time-steps of neurons from the rows of each of their calls; the same neurons may serve several layers.

    Of one row a call, their calls are a multiple of those of a layer with weights that runs at every step.
    """
    if max(rows) > 1:
        return max(rows)
    repeated = [count for count in calls.values() if count > 1 and len(rows) % count == 0]
    return min(repeated, default=len(rows))


def reset(model: nn.Module, neurons: Sequence[type] = ()) -> None:
    """Bring what keeps a state to rest: our neurons, all of SpikingJelly's modules that do, snnTorch's and ``neurons``."""
    for module in model.modules():
        peer = is_neuron(module, neurons) or any(kind.__name__ == "MemoryModule" for kind in type(module).__mro__)
        if (isinstance(module, _Neuron) or peer) and callable(getattr(module, "reset", None)):
            module.reset()
        elif peer and getattr(module, "init_hidden", False):
            module.reset_mem()


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
