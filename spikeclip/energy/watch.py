"""Sees every op of a forward pass, by the module it ran in: the hooks and modes behind :func:`spikeclip.energy.profile`."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from .nonzeros import Operand, nonzeros
from .products import Call, NotANumber, Products
from .rules import AFFINE, EXACT, FUSED_ATTENTION, Convolution, Matmul, Neurons, category

PEERS = ("spikingjelly.activation_based.neuron", "snntorch._neurons")


def is_neuron(module: nn.Module, extra: Sequence[type] = ()) -> bool:
    """Whether it is a neuron of SpikingJelly or snnTorch, or of ``extra`` classes; ours are known by their ops."""
    return isinstance(module, tuple(extra)) or any(kind.__module__.startswith(PEERS) for kind in type(module).__mro__)


@dataclass
class Fired:
    """One layer of neurons in one pass, spikes ``[steps, samples]``."""

    steps: int
    spikes: Tensor
    neurons: int  # of all samples and steps
    values: str


@dataclass
class Seen:
    """What one forward pass did: calls of each product and neuron layer in the order of first use, and element counts."""

    products: dict[tuple, list[Call]] = field(default_factory=dict)
    names: dict[tuple, tuple[str, str]] = field(default_factory=dict)  # key -> (name, op)
    before_neurons: set[tuple] = field(default_factory=set)
    neurons: dict[str, list[Fired]] = field(default_factory=dict)
    # (name, op, category, folds) -> elements, time-steps
    others: dict[tuple[str, str, str, bool], tuple[int, int]] = field(default_factory=dict)


class Watch:
    """Context manager; inside it, forward passes of ``model`` fill ``seen``, a new :class:`Seen` at each :meth:`begin`.

    ``T`` time-steps are told from shapes: ``[T, B, ...]`` and ``[T * B, ...]`` hold all of them, ``[B, ...]`` one. With T None
    neurons alone are looked at, to learn it.
    """

    def __init__(self, model: nn.Module, neurons: Sequence[type], T: int | None):
        self.model, self.T = model, T
        self.names = {module: name or type(model).__name__ for name, module in model.named_modules()}
        self._neurons = {module for module in self.names if is_neuron(module, neurons)}
        self.seen, self.samples = Seen(), 0
        self.calls: Counter[nn.Module] = Counter()  # of modules that have parameters of their own
        self._stack: list[nn.Module] = []
        self.functions: list[Function] = []
        self._inside_neuron = 0
        # What was made of parameters and buffers alone is the same for every sample.
        self._constants = WeakTensorKeyDictionary()
        self._held = [t for t in (*model.parameters(), *model.buffers()) if t.numel()]  # or their memory might go to others
        self._storages = {t.untyped_storage().data_ptr() for t in self._held}
        self._products = Products(self._storages)
        self._written: dict[int, Tensor] = {}  # memory of constants into which data went in this pass
        self._product_memory = 0
        self._packed: dict[int, Operand] = {}
        self._open = ExitStack()
        self._modes = (_Dispatched(self), _Functions(self.functions))

    def begin(self, samples: int) -> None:
        self.samples, self.seen, self._product_memory, self._inside_neuron = samples, Seen(), 0, 0
        self._stack.clear()
        self._packed.clear()
        self._written.clear()
        self.functions.clear()

    def __enter__(self) -> Watch:
        with ExitStack() as opened:
            for module in self.names:
                if not isinstance(module, torch.jit.ScriptModule):  # it takes no hooks; its ops are seen all the same
                    opened.enter_context(module.register_forward_pre_hook(self._enter))
                    opened.enter_context(module.register_forward_hook(self._leave, always_call=True))
            for mode in self._modes:
                opened.enter_context(mode)
            self._open = opened.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self._open.__exit__(*error)

    def _enter(self, module: nn.Module, args: tuple) -> None:
        self._stack.append(module)
        if self.T is None and next(module.parameters(recurse=False), None) is not None:
            self.calls[module] += 1
        self._inside_neuron += module in self._neurons

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        if module in self._neurons:
            self._inside_neuron -= 1
            spikes = output[0] if isinstance(output, (tuple, list)) and output else output
            if isinstance(spikes, Tensor):
                with _no_modes():
                    self._fired(self.names[module], Operand(spikes), [tuple(spikes.shape)])
        self._stack.pop()

    @property
    def _place(self) -> str:
        return self.names[self._stack[-1] if self._stack else self.model]

    def _steps_in(self, shapes: Sequence[tuple[int, ...]]) -> int:
        T, B = self.T, self.samples
        if T == 1:
            return 1
        shapes = [shape for shape in shapes if shape]
        if any(len(s) > 1 and s[0] == T and s[1] == B for s in shapes):
            return T
        if any(s[0] == B for s in shapes):
            return 1
        return T if any(s[0] % (T * B) == 0 for s in shapes) else 1

    def constant(self, tensor: Tensor) -> bool:
        """Whether it is a parameter or buffer, or was made of such alone."""
        if tensor.is_sparse or tensor.numel() == 0:
            return tensor in self._constants
        memory = tensor.untyped_storage().data_ptr()
        return memory not in self._written and (memory in self._storages or tensor in self._constants)

    def dispatched(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        """Take note of an op that ran. Raises ValueError where a product was given NaN."""
        rule = EXACT.get(func)
        if self.T is None:
            if rule is not None and isinstance(found := rule(args, out), Neurons):
                self._fired(self._place, found.source, [tuple(found.currents.shape)])
            return
        inputs = [t for t in _flat((*args, *kwargs.values())) if isinstance(t, Tensor)]
        outputs = [t for t in _flat((out,)) if isinstance(t, Tensor)]
        varying = [t for t in inputs if not self.constant(t)]
        if inputs and not varying:
            for tensor in outputs:
                self._constants[tensor] = True
            self._other(func._opname, "constant", sum(t.numel() for t in outputs))
            return
        if func._schema.is_mutable and len(varying) < len(inputs):
            self._write(func, args)
            varying = [t for t in inputs if not self.constant(t)]
        if rule is not None:
            self._exact(func, rule(args, out), varying)
        elif func._opname in FUSED_ATTENTION:
            steps = self._steps_in(self._shapes(varying))
            self._product(func, [self._products.opaque_attention(*args[:3], outputs[0], steps, self.samples)])
        else:
            self._inexact(func, inputs, varying, outputs)

    def _write(self, func: Any, args: tuple) -> None:
        """Data goes into what may have been constant until now."""
        for given, argument in zip(args, func._schema.arguments, strict=False):
            written = isinstance(given, Tensor) and argument.alias_info is not None and argument.alias_info.is_write
            if written and self.constant(given):
                self._written[given.untyped_storage().data_ptr()] = given

    def _shapes(self, varying: Sequence[Tensor]) -> list[tuple[int, ...]]:
        """Of what the function that is running was given, else of the op's operands."""
        running = self.functions[-1] if self.functions else None
        given = () if running is None else _flat((*running.args, *running.kwargs.values()))
        shapes = [tuple(t.shape) for t in given if isinstance(t, Tensor) and not self.constant(t)]
        return shapes or [tuple(t.shape) for t in varying]

    def _known(self, spikes: Operand) -> Operand:
        """Packed spikes with the bits that were counted when they fired: kept, so that no other tensor takes their memory."""
        if spikes.words is not None and spikes.words.is_contiguous():
            earlier = self._packed.setdefault(spikes.words.data_ptr(), spikes)
            if earlier is not spikes and earlier.words.numel() == spikes.words.numel():
                spikes.bits = earlier.bits.view(spikes.words.shape)
        return spikes

    def _exact(self, func: Any, found: Any, varying: Sequence[Tensor]) -> None:
        found = found._replace(
            **{name: self._known(part) for name, part in found._asdict().items() if isinstance(part, Operand)}
        )
        if isinstance(found, Neurons):
            if found.norm:
                follows = found.currents.untyped_storage().data_ptr() == self._product_memory
                self._other("batch_norm", "norm", found.currents.numel(), follows, self.T)
            self._fired(self._place, found.source, [tuple(found.currents.shape)])
            return
        if isinstance(found, Matmul) and not found.weighted:
            steps = self._steps_in(self._shapes(varying))
        else:
            steps = self._steps_in([found.source.shape])
        weights = found.b if isinstance(found, Matmul) else found.w if isinstance(found, Convolution) else None
        key = self._key(func, weights)
        look = not self.seen.neurons or key in self.seen.before_neurons
        try:
            if isinstance(found, Matmul):
                calls = [self._products.matmul(found, self.constant, steps, self.samples, look)]
            elif isinstance(found, Convolution):
                calls = [self._products.convolution(found, steps, self.samples, look)]
            else:
                calls = self._products.attention(found, steps, self.samples)
        except NotANumber:
            raise ValueError(f"data must lead to no NaN; {self._site(func)} was given some") from None
        self._product(func, calls, weights)
        self._product_memory = found.out.untyped_storage().data_ptr()

    def _site(self, func: Any) -> str:
        """The module, and the function where the product is not what the module is for."""
        if self._stack and isinstance(self._stack[-1], (nn.Linear, nn.modules.conv._ConvNd)):
            return self._place
        return f"{self._place}:{self.functions[-1].name if self.functions else func._opname}"

    def _key(self, func: Any, weights: Tensor | None = None, part: str = "") -> tuple:
        """What tells a product from others, the same in every pass: where it is, what with."""
        memory = 0 if weights is None else weights.untyped_storage().data_ptr()
        place = self.functions[-1].place if self.functions else 0
        return self._site(func), place, func._opname, memory if memory in self._storages else 0, part

    def _product(self, func: Any, calls: Sequence[Call], weights: Tensor | None = None) -> None:
        for call, part in zip(calls, (" k^T v", " q (k^T v)") if len(calls) == 2 else ("",), strict=True):
            key = self._key(func, weights, part)
            self.seen.names[key] = (self._site(func) + part, func._opname)
            self.seen.products.setdefault(key, []).append(call)
            if not (self.seen.neurons or self._inside_neuron):
                self.seen.before_neurons.add(key)

    def _fired(self, name: str, spikes: Operand, shapes: list[tuple[int, ...]]) -> None:
        if spikes.kind == "nan":
            raise ValueError(f"data must lead to no NaN; {name} fired some")
        steps = spikes.shape[0] if self.T is None else self._steps_in(shapes)
        fired = Fired(steps, nonzeros(spikes, steps, self.samples), prod(spikes.shape), spikes.kind)
        self.seen.neurons.setdefault(name, []).append(fired)

    def _inexact(self, func: Any, inputs: Sequence[Tensor], varying: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        kind = category(func)
        sizes = [t.numel() for t in outputs] or [0]
        folds = False
        if self._inside_neuron and kind in ("elementwise", "reduction", "move"):
            kind = "neuron"
        elif kind in ("elementwise", "reduction") and not any(t.is_floating_point() for t in (*varying, *outputs)):
            kind = "move"  # indices, masks and checks
        elif kind == "norm":
            folds = varying[0].untyped_storage().data_ptr() == self._product_memory
        if kind in ("elementwise", "reduction", "norm"):  # what a norm behind it still folds through
            follows = any(t.untyped_storage().data_ptr() == self._product_memory for t in varying)
            affine = func._opname in AFFINE and len(varying) == 1 and len(inputs) > 1
            through = follows and outputs and ("max_pool" in func._opname or affine)
            self._product_memory = outputs[0].untyped_storage().data_ptr() if through else 0
        size = max(t.numel() for t in varying) if kind == "reduction" and varying else sizes[0]
        counted = kind in ("elementwise", "reduction", "norm", "unknown")
        steps = self._steps_in([tuple(t.shape) for t in (*varying, *outputs)]) if counted else 1
        self._other(func._opname, kind, size, folds, steps)

    def _other(self, op: str, kind: str, elements: int, folds: bool = False, steps: int = 1) -> None:
        key = (self._place, op, kind, folds)
        before, runs = self.seen.others.get(key, (0, 0))
        # Calls of one step each add up to the steps.
        self.seen.others[key] = (before + elements, steps if steps > 1 else min(runs + 1, self.T))


class Function(NamedTuple):
    """A torch function that is running, where in its caller it was called, and what it was given."""

    function: Any
    place: int
    args: tuple
    kwargs: dict

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", str(self.function)).removesuffix(".default")


class _Functions(TorchFunctionMode):
    def __init__(self, running: list[Function]):
        super().__init__()
        self.running = running

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.running.append(Function(func, sys._getframe(1).f_lasti, args, kwargs))
        try:
            return func(*args, **kwargs)
        finally:
            self.running.pop()


class _Dispatched(TorchDispatchMode):
    def __init__(self, watch: Watch):
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in EXACT and func._opname not in FUSED_ATTENTION and category(func) == "unknown":
            with self:  # in inference mode composite ops arrive whole
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        self.watch.dispatched(func, args, kwargs, out)
        return out


@contextmanager
def _no_modes() -> Iterator[None]:
    """What runs inside is not watched."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


def _flat(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _flat(value)
        else:
            yield value
