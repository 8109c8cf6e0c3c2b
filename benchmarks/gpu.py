"""Everything that needs a GPU, in one call of minutes and without a network: ``python benchmarks/gpu.py``.

Installs the sources in place (with ``--wheels``, first the wheels of a folder as they are), runs the tests of ops and layers
on every backend of the device, times the cases against the peers that are installed, and writes gpu.json and gpu.md into
``benchmarks/results`` and, with ``--out``, there, with all output in gpu.log. Cases come in order of worth; a group of
commands compiles at once, and its cases take turns to be timed. What has not ended after ``--minutes`` is cut off, and said to
be; what it has timed is kept. ``--part tests`` ends with the tests and ``--part benchmarks`` begins after them, for two calls.
Needs torch, triton, nvcc, setuptools, pybind11, ninja, hypothesis, pytest, pytest-benchmark and open_clip_torch, which needs
ftfy and wcwidth. Exit code 2 without a CUDA device, 1 when the build, a test or a benchmark fails or runs out of time: no
speed is measured on a red test.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TextIO

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
NEEDED = "import hypothesis, ninja, open_clip, pybind11, pytest_benchmark, setuptools, triton"
TOWERS = "test_towers_gpu.py"
CASES = (  # of groups that run at once: file, pytest's -k; a capture that fails spoils its process for what comes after
    (
        (TOWERS, "training and 4-384 and bfloat16 and not compile and not (Jelly and graph)"),
        (TOWERS, "training and 4-384 and bfloat16 and plain"),
        (TOWERS, "training and 4-384 and bfloat16 and compile and not plain"),
        (TOWERS, "training and 8-512-64-bfloat16 and not compile"),
        (TOWERS, "training and 8-512 and bfloat16 and plain and not graph"),
        (TOWERS, "training and 8-512 and bfloat16 and compile and not plain"),
    ),
    (
        (TOWERS, "training and 4-384 and float32 and not compile and not (Jelly and graph)"),
        (TOWERS, "training and 4-384 and float32 and plain"),
        (TOWERS, "training and 4-384 and float32 and compile and not plain"),
        (TOWERS, "answering"),
    ),
    ((TOWERS, "training and 8-512-64-float32 and not compile"),),
    ((TOWERS, "training and 8-512-256-bfloat16 and not compile"),),
    (("test_spikes_gpu.py", ""),),
    (("test_lif.py", "not compile"),),
    ((TOWERS, "training and 8-512 and bfloat16 and plain and graph"), (TOWERS, "training and 8-512 and float32 and compile")),
    ((TOWERS, "training and 8-512-256-float32 and not compile"),),
    ((TOWERS, "training and bfloat16 and Jelly and graph"),),
    ((TOWERS, "training and float32 and Jelly and graph"),),
    (("test_lif.py", "compile"),),
    (("test_towers.py", ""),),
)
MEASURE = "import sys; from run import add; add('gpu', 'CUDA', {}, sys.argv[1:2], sys.argv[2:])"
GRACE = 10  # seconds that a command has to end when it is told to
KEPT = ("gpu.json", "gpu.md")
TESTED = ("ops/test_*.py", "nn/test_*.py", "models/test_inference.py")
TESTS = ("-m", "pytest", "-q", "--tb=short", "--maxfail=40", "-k", "not in_its_interpreter")


class Steps:
    """Steps of the whole run, each a Python command, their output shown and written to ``log``."""

    def __init__(self, log: TextIO, minutes: float):
        self.log, self.end, self.failed = log, time.monotonic() + 60 * minutes, False

    def say(self, text: str) -> None:
        print(text, end="", flush=True)
        self.log.write(text)
        self.log.flush()

    def run(self, what: str, commands: list[tuple[str, ...]], folder: Path = ROOT, **settings: str) -> bool:
        """Whether all commands, which run at once, end well and in time; what each prints comes when it ends."""
        started, left = time.monotonic(), self.end - time.monotonic()
        if left <= 0:
            self.say(f"== {what}: left out, no time left\n")
            self.failed = True
            return False
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **settings}  # what is cut off has said how far it came
        options = {"cwd": folder, "env": environment, "stderr": subprocess.STDOUT, "start_new_session": True}
        with contextlib.ExitStack() as files:
            outputs = [files.enter_context(tempfile.TemporaryFile("w+")) for _ in commands]
            pairs = zip(commands, outputs, strict=True)
            running = [subprocess.Popen([sys.executable, *command], stdout=out, **options) for command, out in pairs]
            late = _running(running, self.end)
            for process in late:  # with what it has started; a benchmark keeps the cases that it has timed
                os.killpg(process.pid, signal.SIGINT)
            for process in _running(late, time.monotonic() + GRACE):
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            for process, out in zip(running, outputs, strict=True):
                out.seek(0)
                self.say(out.read() + ("== cut off: no time left\n" if process in late else ""))
        well = not late and all(process.returncode == 0 for process in running)
        self.say(f"== {what}: {'done' if well else 'FAILED'}, {time.monotonic() - started:.0f} s\n")
        self.failed |= not well
        return well


def _running(processes: list[subprocess.Popen], until: float) -> list[subprocess.Popen]:
    """Those that still run then."""
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=max(0.0, until - time.monotonic()))
    return [process for process in processes if process.poll() is None]


def tested(steps: Steps, wheels: list[str], arch: str) -> bool:
    """Install, and run the tests: whether all went well."""
    install = ("-m", "pip", "install", "-q", "--no-deps", "--no-index")
    build = (*install, "--no-build-isolation", "-e", str(ROOT))
    tell = ("-c", "from spikeclip.ops._backends import built; print(*built(), sep='\\n')")
    files = sorted(file for part in TESTED for file in (ROOT / "tests").glob(part))
    few = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return (
        (not wheels or steps.run("carried wheels", [(*install, *wheels)]))
        and steps.run("what is needed", [("-c", NEEDED)])
        and steps.run("build", [build], SPIKECLIP_CUDA="1", SPIKECLIP_CUDA_ARCHS=arch)
        and steps.run("what was built", [tell])
        and steps.run("tests", [(*TESTS, str(file)) for file in files], **few)
    )


def measure(steps: Steps, out: Path) -> None:
    """Time the cases, and keep the results after each."""
    results = HERE / "results"
    for name in KEPT:
        (results / name).unlink(missing_ok=True)
    for group in CASES:
        commands = [("-c", MEASURE, file, "-k", words, "--benchmark-max-time=0.5") for file, words in group]
        steps.run("; ".join(f"{file} {words}" for file, words in group), commands, HERE)
        if out != results:
            for name in KEPT:
                if (results / name).exists():
                    shutil.copy(results / name, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--part", choices=("all", "tests", "benchmarks"), default="all")
    given = parser.parse_args()
    wheels = sorted(map(str, given.wheels.resolve().glob("*.whl"))) if given.wheels else []
    if given.wheels and not wheels:
        parser.error(f"--wheels must be a folder with wheels; got {given.wheels}")

    import torch

    if not torch.cuda.is_available():
        print("no CUDA device: nothing was run", file=sys.stderr)
        sys.exit(2)
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}a" if major >= 9 else f"{major}{minor}"
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "gpu.log", "w") as log:
        steps = Steps(log, given.minutes)
        if (given.part == "benchmarks" or tested(steps, wheels, arch)) and given.part != "tests":
            measure(steps, out)
    sys.exit(steps.failed)


if __name__ == "__main__":
    main()
