import importlib.util
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from spikeclip.ops._native_cuda import NativeCuda

CSRC = Path(__file__).parents[2] / "csrc"
LAUNCH = re.compile(r"(\w+(?:<[^<>;]*>)?)<<<(.+?), kThreads, 0, \w+>>>\((\w+)\);")


@pytest.fixture(scope="session")
def host_cuda(tmp_path_factory):
    """The `cuda` backend with its kernels, and the module's own table of functions, compiled for the host."""
    pybind11 = pytest.importorskip("pybind11")
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    folder = tmp_path_factory.mktemp("host")
    for header in ("cuda_bf16.h", "cuda_fp16.h"):
        (folder / header).write_text('#include "cuda_on_host.h"\n')
    sources = [CSRC / "bindings_cuda.cpp"]
    for kernel in sorted(CSRC.glob("cuda/*.cu")):
        text = kernel.read_text()
        changed, launches = LAUNCH.subn(r"launch_on_host(\1, \2, kThreads, \3);", text)
        assert launches == text.count("<<<") > 0
        sources.append(folder / f"{kernel.stem}.cpp")
        sources[-1].write_text(changed)
    module = folder / "_cuda.so"
    flags = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing"]
    places = [folder, Path(__file__).parent, CSRC, CSRC / "cuda", sysconfig.get_paths()["include"], pybind11.get_include()]
    command = [compiler, *flags, '-DSPIKECLIP_CUDA_ARCHS="host"', *(f"-I{p}" for p in places), *sources, "-o", module]
    done = subprocess.run(command, capture_output=True, text=True)
    if "_Float16" in done.stderr:
        pytest.skip("this g++ has no _Float16")
    assert done.returncode == 0, done.stderr[-3000:]
    spec = importlib.util.spec_from_file_location("_cuda", module)
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    return NativeCuda(extension, lambda x: 0)
