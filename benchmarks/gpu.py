"""Everything that needs a GPU, in one call of minutes and without a network: ``python benchmarks/gpu.py``.

Installs the sources in place (with ``--wheels``, first the wheels of a folder as they are), runs the op tests on every backend
of the device, times the cases against the peers that are installed, and writes gpu.json and gpu.md into ``benchmarks/results``
and, with ``--out``, there, with all output in gpu.log. Needs torch, triton, nvcc, setuptools, pybind11, ninja, pytest and
pytest-benchmark. Exit code 2 without a CUDA device, 1 when the build or a test fails: no speed is measured on a red test.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MEASURE = "from run import keep, measure; keep('gpu', [measure('CUDA', {}, ['test_*.py'], ['--benchmark-max-time=0.5'])])"
TESTS = ("-m", "pytest", "-q", "--tb=short", "--maxfail=40", "tests/ops", "-k", "not in_its_interpreter")


def run(log: TextIO, what: str, *command: str, folder: Path = ROOT, **settings: str) -> None:
    """One step, its output shown and written to ``log``; a step that fails ends the run."""
    started = time.perf_counter()

    def say(line: str) -> None:
        print(line, end="", flush=True)
        log.write(line)
        log.flush()

    say(f"== {what}\n")
    command, environment = [sys.executable, *command], {**os.environ, **settings}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=folder, env=environment, **pipes) as process:
        for line in process.stdout:
            say(line)
    say(f"== {what}: exit code {process.returncode}, {time.perf_counter() - started:.0f} s\n")
    if process.returncode:
        sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--wheels", type=Path)
    given = parser.parse_args()
    wheels = sorted(map(str, given.wheels.glob("*.whl"))) if given.wheels else []
    if given.wheels and not wheels:
        parser.error(f"--wheels must be a folder with wheels; got {given.wheels}")

    import torch

    if not torch.cuda.is_available():
        print("no CUDA device: nothing was run", file=sys.stderr)
        sys.exit(2)
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}a" if major >= 9 else f"{major}{minor}"
    install = ("-m", "pip", "install", "-q", "--no-deps", "--no-index")
    given.out.mkdir(parents=True, exist_ok=True)
    with open(given.out / "gpu.log", "w") as log:
        if wheels:
            run(log, "carried wheels", *install, *wheels)
        run(log, "build", *install, "--no-build-isolation", "-e", str(ROOT), SPIKECLIP_CUDA="1", SPIKECLIP_CUDA_ARCHS=arch)
        run(log, "what was built", "-c", "from spikeclip.ops._backends import built; print(*built(), sep='\\n')")
        run(log, "op tests", *TESTS)
        run(log, "benchmarks", "-c", MEASURE, folder=HERE)
    if given.out != HERE / "results":
        for name in ("gpu.json", "gpu.md"):
            shutil.copy(HERE / "results" / name, given.out)


if __name__ == "__main__":
    main()
