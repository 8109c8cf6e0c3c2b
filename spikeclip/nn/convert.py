"""Put this package's neurons and layers into an existing PyTorch model, and say what was left and why."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..ops import PackedSpikes
from .conv import SpikeConv1d, SpikeConv2d, check_convolution
from .linear import SpikeLinear
from .neurons import IF, LIF, PLIF
from .prepared import SpikeLayer

_SPIKINGJELLY = "spikingjelly.activation_based"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# What every module has of its own: kept when a neuron becomes another class.
_KEPT = ["training", *(name for name in vars(nn.Module()) if "hooks" in name)]


class Conversion(NamedTuple):
    """One module: its name, its class before and after (None: left as it was), and why it was left."""

    name: str
    before: str
    after: str | None
    reason: str


@dataclass
class ConversionReport:
    """What :func:`convert` did: ``rows`` in the model's order; printed as a table."""

    rows: list[Conversion] = field(default_factory=list)

    @property
    def replaced(self) -> list[Conversion]:
        return [row for row in self.rows if row.after is not None]

    @property
    def left(self) -> list[Conversion]:
        return [row for row in self.rows if row.after is None]

    def __str__(self) -> str:
        if not self.rows:
            return "no neurons and no linear or convolution layers found"
        lines = [("name", "from", "to", "reason")]
        lines += [(row.name or "(model)", row.before, row.after or "left", row.reason) for row in self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(3)]
        form = "  ".join(f"{{:{width}}}" for width in widths) + "  {}"
        table = [form.format(*line).rstrip() for line in lines]
        return "\n".join([*table, f"{len(self.replaced)} replaced, {len(self.left)} left"])


class StepsSpikeConv2d(SpikeConv2d):
    """:class:`SpikeConv2d` over time-steps: ``[T, B, C, H, W]`` (packed ``[T, B, H, W, C]``) to ``[T, B, O, OH, OW]``."""

    def forward(self, input: Tensor | PackedSpikes) -> Tensor:
        return super().forward(_merged(input, 5, "[T, B, C, H, W]")).unflatten(0, tuple(input.shape[:2]))


class StepsSpikeConv1d(SpikeConv1d):
    """:class:`SpikeConv1d` over time-steps: ``[T, B, C, L]`` (packed ``[T, B, L, C]``) to ``[T, B, O, OL]``."""

    def forward(self, input: Tensor | PackedSpikes) -> Tensor:
        return super().forward(_merged(input, 4, "[T, B, C, L]")).unflatten(0, tuple(input.shape[:2]))


def _merged(s: Tensor | PackedSpikes, dims: int, form: str) -> Tensor | PackedSpikes:
    if len(s.shape) != dims:
        raise ValueError(f"input must have shape {form}; got {list(s.shape)}")
    return s.flatten(0, 1)


def convert(model: nn.Module, example: Tensor | tuple | dict | None = None) -> ConversionReport:
    """Make neurons and the layers that spikes feed, in place, into this package's, where that keeps what they compute.

    Neurons: SpikingJelly's multi-step ``IFNode``, ``LIFNode`` and ``ParametricLIFNode``, which become ``stateful`` (there too
    the membrane stays until ``reset()``); the same spikes bit for bit in float32, while half precision keeps its membrane in
    float32 here. Layers: ``nn.Linear``, ``nn.Conv1d`` and ``nn.Conv2d`` and SpikingJelly's of those names, where every input
    they got while ``example`` ran held only zeros and ones, and not only zeros; their currents agree to rounding. Everything
    else stays, with the reason in the report: subclasses, replaced ``forward`` methods, options without a counterpart.
    snnTorch's neurons stay, as they take one time-step a call and fire above their threshold, not at it; layers between them
    are converted.

    Modules keep their identity (their class changes), so shared modules, tied parameters, hooks, optimizers and references held
    elsewhere stay right, and so do device, dtype, ``training``, ``requires_grad`` and the state dict.

    Args:
        model: any module; may itself be a neuron or a layer.
        example: input for one forward pass: a tensor, a tuple of positional or a dict of keyword arguments, with values like
            the real ones (an image that happens to be black and white would pass for spikes). It runs without gradient in
            evaluation mode, and where some module is in training mode once more so, with BatchNorm alone still in evaluation:
            behind dropout, spikes are spikes in evaluation only. Training flags, buffers, neuron states and the random
            generators are put back. None: neurons alone are converted.

    Raises:
        TypeError: ``model`` is not a module. ValueError: ``example`` is none of the above. Whatever the model itself raises
        for ``example``; it is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    modules = {name: m for name, m in model.named_modules() if not isinstance(m, (IF, LIF, PLIF, SpikeLayer))}
    layers = [m for m in modules.values() if _is_layer(m)]
    seen = None if example is None else _seen_inputs(model, layers, example)
    report = ConversionReport()
    for name, module in modules.items():
        before = type(module).__name__
        try:
            if _is_layer(module):
                after = _convert_layer(module, None if seen is None else seen[module])
            elif _is_neuron(module):
                after = _convert_neuron(module)
            else:
                continue
            report.rows.append(Conversion(name, before, after, ""))
        except _Left as left:
            report.rows.append(Conversion(name, before, None, str(left)))
    return report


class _Left(Exception):
    """The reason why a module stays as it is."""


def _peer(path: str, name: str) -> type | None:
    """A class of another package, if a model can hold one: that package is imported then."""
    return getattr(sys.modules.get(path), name, None)


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))


def _is_neuron(module: nn.Module) -> bool:
    return any(c.__module__.startswith((f"{_SPIKINGJELLY}.neuron", "snntorch._neurons")) for c in type(module).__mro__)


def _convert_layer(module: nn.Module, fed_by: str | None) -> str:
    wrapped = {_peer(f"{_SPIKINGJELLY}.layer", name): name for name in ("Linear", "Conv1d", "Conv2d")}
    plain = {nn.Linear: "Linear", nn.Conv1d: "Conv1d", nn.Conv2d: "Conv2d"}
    kind = plain.get(type(module)) or wrapped.get(type(module))
    if kind is None:
        raise _Left("only Linear, Conv1d and Conv2d themselves have a counterpart, not other classes")
    _check_forward(module)
    if kind != "Linear":
        try:
            check_convolution(module)
        except ValueError as error:
            raise _Left(str(error)) from error
    if module.weight.dtype not in _DTYPES:
        raise _Left(f"its weights are {module.weight.dtype}")
    if fed_by is None:
        raise _Left("no example was given, so it is not known whether spikes feed it")
    if fed_by != "spikes":
        raise _Left(fed_by)
    steps = kind != "Linear" and getattr(module, "step_mode", "s") == "m"
    target = {
        "Linear": SpikeLinear,
        "Conv1d": StepsSpikeConv1d if steps else SpikeConv1d,
        "Conv2d": StepsSpikeConv2d if steps else SpikeConv2d,
    }[kind]
    object.__setattr__(module, "__class__", target)
    return target.__name__


def _convert_neuron(node: nn.Module) -> str:
    if isinstance(node, _peer("snntorch", "SpikingNeuron") or ()):
        raise _Left("it takes one time-step a call and fires above its threshold, where these fire at it")
    kinds = {
        _peer(f"{_SPIKINGJELLY}.neuron", "IFNode"): IF,
        _peer(f"{_SPIKINGJELLY}.neuron", "LIFNode"): LIF,
        _peer(f"{_SPIKINGJELLY}.neuron", "ParametricLIFNode"): PLIF,
    }
    target = kinds.get(type(node))
    if target is None:
        raise _Left("only IFNode, LIFNode and ParametricLIFNode themselves have a counterpart, not other classes")
    _check_forward(node)
    if node.step_mode != "m":
        raise _Left(f"step_mode={node.step_mode!r}: these neurons take all time-steps at once, 'm'")
    if getattr(node, "store_v_seq", False):
        raise _Left("store_v_seq=True: membranes are not kept here")
    if getattr(node, "_neuron_precision", None) is not None:
        raise _Left("it has a precision of its own")
    rest = 0.0 if node.v_reset is None else node.v_reset
    start = node._memories_rv.get("v") if set(node._memories) == {"v"} else None
    if start != rest or not (isinstance(node.v, Tensor) or node.v == rest):
        raise _Left("its state does not start at v_reset alone")
    if not type(node.surrogate_function).__module__.startswith("spikingjelly."):
        raise _Left("its surrogate_function is not one of SpikingJelly's")
    options = {"tau": node.tau} if target is LIF else {}
    options |= {} if target is IF else {"decay_input": node.decay_input}
    try:
        neuron = target(
            v_threshold=node.v_threshold,
            v_reset=node.v_reset,
            surrogate_function=node.surrogate_function,
            detach_reset=node.detach_reset,
            stateful=True,
            **options,
        )
    except (TypeError, ValueError) as error:
        raise _Left(str(error)) from error
    if target is PLIF:
        neuron.w = node.w
    neuron.v = node.v if isinstance(node.v, Tensor) else None
    state = vars(neuron) | {key: vars(node)[key] for key in _KEPT}
    object.__setattr__(node, "__class__", target)
    object.__setattr__(node, "__dict__", state)
    return target.__name__


def _check_forward(module: nn.Module) -> None:
    if "forward" in vars(module):
        raise _Left("its forward method was replaced")


def _seen_inputs(model: nn.Module, layers: list[nn.Module], example: Tensor | tuple | dict) -> dict[nn.Module, str]:
    """What fed each layer while ``example`` ran: ``spikes``, or why not."""
    if not isinstance(example, (Tensor, tuple, dict)):
        raise ValueError(
            f"example must be a tensor, a tuple of positional or a dict of keyword arguments; got {type(example).__name__}"
        )
    args = example if isinstance(example, tuple) else () if isinstance(example, dict) else (example,)
    kwargs = example if isinstance(example, dict) else {}
    # Of every call: (zeros and ones only, any but zeros), or None for what is no tensor.
    calls: dict[nn.Module, list[tuple[bool, bool] | None]] = {layer: [] for layer in layers}

    def look(layer: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else kwargs.get("input")
        calls[layer].append((bool(((x == 0) | (x == 1)).all()), bool((x != 0).any())) if isinstance(x, Tensor) else None)

    with _undisturbed(model), torch.no_grad():
        for layer in layers:
            layer.register_forward_pre_hook(look, with_kwargs=True)
        training = [m for m in model.modules() if m.training]
        model.eval()
        model(*args, **kwargs)
        verdicts = {layer: _verdict(seen) for layer, seen in calls.items()}
        if training:
            for module in training:
                module.training = not isinstance(module, nn.modules.batchnorm._NormBase)
            model(*args, **kwargs)
    for layer, seen in calls.items():
        if verdicts[layer] == "spikes" and _verdict(seen) != "spikes":
            verdicts[layer] = f"in training {_verdict(seen)}"
    return verdicts


def _verdict(calls: list[tuple[bool, bool] | None]) -> str:
    if not calls:
        return "the example did not reach it"
    if None in calls:
        return "it is not called with a tensor, by position or as input="
    if not all(binary for binary, _ in calls):
        return "its input is not spikes: there are values other than 0 and 1"
    return "spikes" if any(some for _, some in calls) else "its input was all zeros, which does not say whether spikes feed it"


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Whatever the modules hold (flags, buffers, states, hooks) and the random generators are afterwards as before."""
    holders = []
    for module in model.modules():
        holders += [vars(module), *(value for value in vars(module).values() if isinstance(value, dict))]
    before = [(holder, dict(holder)) for holder in holders]
    lists = [(value, list(value)) for holder in holders for value in holder.values() if isinstance(value, list)]
    tensors = {id(t): t for holder in holders for t in holder.values() if type(t) is Tensor}
    copies = [(t, t.detach().clone()) for t in tensors.values()]
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            for holder, content in before:
                holder.clear()
                holder.update(content)
            for value, content in lists:
                value[:] = content
            for tensor, copy in copies:
                if not torch.equal(tensor, copy):
                    tensor.detach().copy_(copy)
