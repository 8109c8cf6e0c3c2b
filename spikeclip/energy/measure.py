"""What this machine does, measured: latency, and joules where it has an energy counter. Nothing here is estimated."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import torch

from .units import digits

SETTLE_SECONDS = 0.5  # threads stop spinning, and NVML's counter, about 0.1 s late, leaves behind what ran before
IDLE_SECONDS = 1.0


@dataclass(frozen=True)
class Counter:
    """``read()``: joules since some start, of all the device did for anyone; never falls. ``resolution``: joules a step."""

    name: str
    resolution: float
    read: Callable[[], float]


@dataclass(frozen=True)
class Measurement:
    """Calls of one function on one machine; lowest and highest are of the means over each repetition.

    Attributes:
        samples: of a call. calls: timed, in all ``repetitions``. device; threads: PyTorch's on the CPU.
        latency: seconds a call, until the device is done; the median repetition's. samples_per_second: at this latency, one
            call after the other.
        joules_per_sample: beyond idle, mean over repetitions; None where not measured, ``reason`` says why.
        idle_watts: of the device and all else that ran on it, just before. counter: its name, None without one.
    """

    samples: int
    calls: int
    repetitions: int
    device: str
    threads: int
    latency: float
    latency_lowest: float
    latency_highest: float
    samples_per_second: float
    joules_per_sample: float | None = None
    joules_lowest: float | None = None
    joules_highest: float | None = None
    idle_watts: float | None = None
    counter: str | None = None
    reason: str | None = None

    def line(self) -> str:
        """One sentence: milliseconds, samples a second, and millijoules a sample or why there are none."""

        def milli(value: float, lowest: float, highest: float, unit: str) -> str:
            return f"{digits(1e3 * value)} {unit} ({digits(1e3 * lowest)} to {digits(1e3 * highest)})"

        latency = milli(self.latency, self.latency_lowest, self.latency_highest, "ms")
        text = f"{latency} a call of {self.samples} on {self.device}, {digits(self.samples_per_second)} samples/s"
        if self.joules_per_sample is None:
            return f"{text}; joules not measured: {self.reason}."
        joules = milli(self.joules_per_sample, self.joules_lowest, self.joules_highest, "mJ")
        return f"{text}; {joules} a sample beyond {digits(self.idle_watts)} W idle, by {self.counter}."


def measure(
    run: Callable[[], object],
    samples: int,
    *,
    seconds: float = 2.0,
    repetitions: int = 5,
    counter: Counter | None = None,
    device: str | torch.device = "cpu",
) -> Measurement:
    """Call ``run``, which answers for so many ``samples`` on ``device``, for about ``seconds``, after a repetition of warm-up.

    A repetition takes ``seconds / repetitions``, or one call that is longer. ``counter`` None: :func:`find_counter`'s, if any.
    Idle power is measured before, in 1.5 s of sleep. Joules are None where a repetition took less beyond idle than the counter
    resolves.

    Raises:
        TypeError: ``run`` cannot be called, or ``counter`` is no Counter.
        ValueError: another argument is out of range, or ``device`` is not here.
    """
    if not callable(run):
        raise TypeError(f"run must be a function of no arguments; got {type(run).__name__}")
    if not isinstance(counter, Counter | None):
        raise TypeError(f"counter must be a Counter or None; got {type(counter).__name__}")
    for name, value in (("samples", samples), ("repetitions", repetitions)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an int >= 1; got {value!r}")
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf:
        raise ValueError(f"seconds must be a finite number > 0; got {seconds!r}")
    device = _checked(device)
    reason = None
    if counter is None:
        counter, reason = find_counter(device)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def repeat() -> tuple[int, float, float]:
        before, start, calls, elapsed = counter.read() if counter else 0.0, time.perf_counter(), 0, 0.0
        while elapsed < seconds / repetitions:
            run()
            wait()
            calls, elapsed = calls + 1, time.perf_counter() - start
        return calls, elapsed, (counter.read() if counter else 0.0) - before

    wait()
    idle = _idle_watts(counter) if counter else None
    repeat()
    runs = [repeat() for _ in range(repetitions)]
    latencies = [elapsed / calls for calls, elapsed, _ in runs]
    joules = (None, None, None)
    if counter:
        least = min(used - idle * elapsed for _, elapsed, used in runs)
        reason = f"a repetition took {least:.3g} J beyond idle, and {counter.name} resolves {counter.resolution:.3g} J"
        if least >= counter.resolution:
            per_sample = [(used - idle * elapsed) / (calls * samples) for calls, elapsed, used in runs]
            joules, reason = (fmean(per_sample), min(per_sample), max(per_sample)), None
    return Measurement(
        samples,
        sum(calls for calls, _, _ in runs),
        repetitions,
        str(device),
        torch.get_num_threads(),
        median(latencies),
        min(latencies),
        max(latencies),
        samples / median(latencies),
        *joules,
        idle,
        counter.name if counter else None,
        reason,
    )


def find_counter(
    device: str | torch.device = "cpu", *, powercap: Path = Path("/sys/class/powercap")
) -> tuple[Counter | None, str]:
    """The energy counter of a device and ``""``, or None and why there is none.

    A CPU's: the sum of RAPL's packages and their DRAM; read it at least once a wrap, which takes minutes. A CUDA GPU's: NVML's,
    of the whole GPU and without the CPU; needs the package nvidia-ml-py. Raises ValueError when ``device`` is neither, or not
    here.
    """
    device = _checked(device)
    return _nvml(device) if device.type == "cuda" else _rapl(Path(powercap))


def _checked(device: str | torch.device) -> torch.device:
    count = torch.cuda.device_count()
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = None
    if found is None or not (found.type == "cpu" or (found.type == "cuda" and (found.index or 0) < count)):
        raise ValueError(f"device must be cpu or one of the {count} CUDA GPUs here; got {str(device)!r}")
    return found


def _idle_watts(counter: Counter) -> float:
    time.sleep(SETTLE_SECONDS)
    before, start = counter.read(), time.perf_counter()
    time.sleep(IDLE_SECONDS)
    return (counter.read() - before) / (time.perf_counter() - start)


def _rapl(powercap: Path) -> tuple[Counter | None, str]:
    found = sorted(powercap.glob("intel-rapl:*"))
    if not found:
        return None, f"no {powercap}/intel-rapl:* on this machine (virtual machines hide it)"
    try:
        names = {folder: (folder / "name").read_text().strip() for folder in found}
        domains = []
        for folder, name in names.items():
            if folder.name.count(":") == 1 and name.startswith("package"):
                parts = [part for part in found if part.name.startswith(f"{folder.name}:") and names[part] == "dram"]
                domains += [(name, folder), *((f"{name} dram", part) for part in parts)]
        if not domains:
            return None, f"no {powercap}/intel-rapl:* is a package"
        wraps = [int((folder / "max_energy_range_uj").read_text()) for _, folder in domains]
        read = _unwrapped([folder / "energy_uj" for _, folder in domains], wraps)
    except PermissionError:
        return None, f"{powercap}/intel-rapl:*/energy_uj is readable by root alone"
    except OSError as error:
        return None, f"RAPL cannot be read: {error}"
    step = max(wraps) / 0xFFFFFFFF  # the range is a register's 32 bits, in its unit
    return Counter(f"RAPL {' + '.join(name for name, _ in domains)} (powercap)", step / 1e6, read), ""


def _unwrapped(files: list[Path], wraps: list[int]) -> Callable[[], float]:
    """Joules that counters of microjoules grew by since now, each of which wraps on its own."""
    last, total = [int(file.read_text()) for file in files], 0

    def read() -> float:
        nonlocal last, total
        now = [int(file.read_text()) for file in files]
        total += sum(new - old if new >= old else new - old + wrap for new, old, wrap in zip(now, last, wraps, strict=True))
        last = now
        return total / 1e6

    return read


def _nvml(device: torch.device) -> tuple[Counter | None, str]:
    try:
        import pynvml
    except ImportError:
        return None, "nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
        # By UUID: CUDA_VISIBLE_DEVICES renumbers PyTorch's GPUs, not NVML's.
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        name = pynvml.nvmlDeviceGetName(handle)
    except pynvml.NVMLError as error:
        if isinstance(error, pynvml.NVMLError_NotSupported):
            return None, "this GPU keeps no energy counter"
        return None, f"NVML cannot read this GPU: {error}"
    return Counter(f"NVML {name}", 1e-3, lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3), ""
