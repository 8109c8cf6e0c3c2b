"""The table of backends and the choice between them: the only place that reads the environment.

``SPIKECLIP_CPU_ISA`` (baseline, avx2, avx512) forces the C++ extension's instruction set; ``SPIKECLIP_CHECK=1`` looks for
values other than 0 and 1 in spikes on accelerators too (on the CPU it always happens); ``TRITON_INTERPRET=1`` is Triton's.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from ._dtypes import FLOATS

FUSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPS = ("lif", "bn_lif", "pack_spikes", "spike_matmul", "spike_conv2d", "spike_attention")


@dataclass(frozen=True)
class Backend:
    """One row: where it runs, what it takes, why it may be missing, and its functions, as in ``ops.reference``."""

    name: str
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    missing: Callable[[], str | None]
    load: Callable[[], object]


def triton_interpreted() -> bool:
    """True when ``TRITON_INTERPRET=1``: Triton kernels then run on CPU tensors, slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def checks_spikes(device: str) -> bool:
    """Whether values other than 0 and 1 among spikes are looked for on this device type: free on the CPU, a stall elsewhere."""
    return device == "cpu" or os.environ.get("SPIKECLIP_CHECK", "0") == "1"


def _extension_missing(name: str) -> str | None:
    if importlib.util.find_spec(f"spikeclip.{name}") is None:
        what = "nvcc" if name == "_cuda" else "a C++ compiler"
        return f"the extension spikeclip.{name} was not built (install spikeclip where {what} is found)"
    return None


def _cuda_missing() -> str | None:
    if reason := _extension_missing("_cuda"):
        return reason
    return None if torch.cuda.is_available() else "no CUDA device is available"


def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if triton_interpreted() or torch.cuda.is_available():
        return None
    return "no CUDA device is available (TRITON_INTERPRET=1 runs it on the CPU, for tests)"


def _cpu_extension():
    """The C++ extension, on the instruction set that ``SPIKECLIP_CPU_ISA`` asks for."""
    extension = importlib.import_module("spikeclip._cpu")
    if forced := os.environ.get("SPIKECLIP_CPU_ISA"):
        if forced not in extension.isas():
            raise ValueError(f"SPIKECLIP_CPU_ISA must be one of {', '.join(extension.isas())} here; got {forced!r}")
        extension.set_isa(forced)
    return extension


def _load_cpu() -> object:
    from ._native_cpu import NativeCpu

    return NativeCpu(_cpu_extension(), lambda x: torch.get_num_threads())


def _load_cuda() -> object:
    from ._native_cuda import NativeCuda

    extension = importlib.import_module("spikeclip._cuda")
    return NativeCuda(extension, lambda x: torch.cuda.current_stream(x.device).cuda_stream)


def _load_triton() -> object:
    names = ("lif", "bn_lif", "max_pool", "pack", "spike_matmul", "spike_conv2d", "spike_lif", "spike_attention")
    modules = [importlib.import_module(f"spikeclip.kernels.{name}") for name in names]
    kernels = {key: value for module in modules for key, value in vars(module).items() if key[0] != "_"}
    return SimpleNamespace(**kernels, count=_load_torch().count)


def _load_torch() -> object:
    return importlib.import_module("spikeclip.ops.reference")


# `auto` takes the first row that serves the device and the dtype.
BACKENDS: dict[str, Backend] = {
    row.name: row
    for row in (
        Backend("cpu", ("cpu",), FUSED_DTYPES, lambda: _extension_missing("_cpu"), _load_cpu),
        Backend("triton", ("cuda",), FUSED_DTYPES, _triton_missing, _load_triton),
        Backend("cuda", ("cuda",), FUSED_DTYPES, _cuda_missing, _load_cuda),
        Backend("torch", (), FLOATS, lambda: None, _load_torch),
    )
}


def unavailable(backend: str, device: str, dtype: torch.dtype = torch.float32) -> str | None:
    """Why ``backend`` cannot serve a tensor of this device type and dtype, or None when it can."""
    row = BACKENDS[backend]
    devices = (*row.devices, "cpu") if backend == "triton" and triton_interpreted() else row.devices
    if devices and device not in devices:
        return f"it runs on {' and '.join(devices)} tensors, not on {device}"
    if reason := row.missing():
        return reason
    if dtype not in row.dtypes:
        return f"it takes {', '.join(str(d).removeprefix('torch.') for d in row.dtypes)}, not {dtype}"
    return None


def check_name(backend: str) -> None:
    """Raise TypeError or ValueError unless ``backend`` is a known name or ``auto``."""
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a name; got {backend!r}")
    if backend not in BACKENDS and backend != "auto":
        raise ValueError(f"backend must be one of {', '.join(['auto', *BACKENDS])}; got {backend!r}")


@functools.cache
def chosen(backend: str, device: str, dtype: torch.dtype) -> str:
    """The name that ``backend`` stands for on this device and dtype; a named one never falls back.

    Raises:
        ValueError: unknown name. RuntimeError: the named backend cannot serve this tensor, with the reason.
    """
    check_name(backend)
    if backend != "auto":
        if reason := unavailable(backend, device, dtype):
            raise RuntimeError(f"backend={backend!r} is not available here: {reason}")
        return backend
    on_device = (n for n, row in BACKENDS.items() if device in row.devices or not row.devices)
    found = next((name for name in on_device if unavailable(name, device, dtype) is None), None)
    if found is None:
        raise RuntimeError(f"no backend takes {dtype} on {device}")
    return found


@functools.cache
def functions(backend: str, device: str, dtype: torch.dtype):
    """The object that holds this choice's functions, named and shaped as in ``spikeclip.ops.reference``."""
    return BACKENDS[chosen(backend, device, dtype)].load()


def built() -> list[str]:
    """What is compiled into this installation, a line each."""
    if (reason := _extension_missing("_cpu")) is None:
        extension = _cpu_extension()
        cpu = f"instruction set {extension.isa()} of {', '.join(extension.isas())}, {torch.get_num_threads()} threads"
    if (no_cuda := _extension_missing("_cuda")) is None:
        archs = importlib.import_module("spikeclip._cuda").archs().replace(";", ", ")
    triton = "not installed"
    if importlib.util.find_spec("triton") is not None:
        triton = importlib.import_module("triton").__version__
    return [
        f"C++ extension: {reason or cpu}",
        f"CUDA extension: {no_cuda or 'compiled for ' + archs}",
        f"triton: {triton}",
        f"CUDA device: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}",
    ]


def describe() -> list[SimpleNamespace]:
    """One entry per op and device for ``spikeclip info``: what ``auto`` chooses and why the others are not there."""
    rows = []
    for op in OPS:
        for device in ("cpu", "cuda"):
            reasons = {name: unavailable(name, device) for name in BACKENDS}
            auto = chosen("auto", device, torch.float32)
            if device == "cuda" and not torch.cuda.is_available():
                auto = None
            rows.append(SimpleNamespace(op=op, device=device, auto=auto, reasons=reasons))
    return rows
