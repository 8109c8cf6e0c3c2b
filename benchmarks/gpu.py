"""Everything that needs a GPU, in one call of minutes and without a network: ``python benchmarks/gpu.py``.

Installs the sources in place (with ``--wheels``, first the wheels of a folder as they are), runs the op tests on every backend
of the device, times the cases against the peers that are installed, and writes gpu.json and gpu.md into ``benchmarks/results``
and, with ``--out``, there. Needs torch, triton, nvcc, setuptools, pybind11, ninja, pytest and pytest-benchmark. Exit code 2
without a CUDA device, 1 when the build or a test fails: no speed is measured on a red test.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MEASURE = "from run import keep, measure; print(keep('gpu', [measure('CUDA', {}, [])]))"


def run(what: str, *command: str, folder: Path = ROOT, **settings: str) -> None:
    started = time.perf_counter()
    print(f"== {what}", flush=True)
    code = subprocess.run([sys.executable, *command], cwd=folder, env={**os.environ, **settings}).returncode
    print(f"== {what}: exit code {code}, {time.perf_counter() - started:.0f} s", flush=True)
    if code:
        sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--wheels", type=Path)
    given = parser.parse_args()
    out = given.out
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
    if wheels:
        run("carried wheels", *install, *wheels)
    run("build", *install, "--no-build-isolation", "-e", str(ROOT), SPIKECLIP_CUDA="1", SPIKECLIP_CUDA_ARCHS=arch)
    run("what was built", "-c", "from spikeclip.ops._backends import built; print(*built(), sep='\\n')")
    run("op tests", "-m", "pytest", "-q", "-x", "tests/ops", "-k", "not in_its_interpreter")
    run("benchmarks", "-c", MEASURE, folder=HERE)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        for file in (HERE / "results").glob("gpu.*"):
            shutil.copy(file, out)


if __name__ == "__main__":
    main()
