"""All build logic: the CPU extension always, the CUDA extension when nvcc is found (no GPU needed), both by ninja.

The extensions know nothing of torch (pointers, sizes, a stream), so one wheel serves every torch version.

Environment:
    SPIKECLIP_CUDA        auto (default): build the CUDA module if nvcc is found; 1: require it; 0: leave it out.
    SPIKECLIP_CUDA_ARCHS  compute capabilities, default "80;90a", the lowest also as PTX for newer devices.
    CXX, CUDA_HOME        compiler and CUDA toolkit to use.
    MAX_JOBS              parallel compiler processes, default the number of CPUs.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
DEFAULT_ARCHS = "80;90a"
X86 = platform.machine().lower() in ("x86_64", "amd64")

# -ffp-contract=off: no fused multiply-add, so that spikes equal those of plain torch.
# -falign-loops: where a short loop happens to lie was measured to be worth a tenth of its time.
CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-falign-loops=32",
    "-fPIC",
    "-fopenmp",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
]
ISA_FLAGS = {"baseline": []}
if X86:
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c", "-mbmi"]
    ISA_FLAGS["avx512"] = [
        *ISA_FLAGS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512",
    ]  # fmt: skip
NVCC_FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v"]


def cxx() -> str:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler or not shutil.which(compiler.split()[0]):
        sys.exit(
            "spikeclip: no C++ compiler found. Install one with OpenMP (Debian/Ubuntu: apt install g++; Fedora: dnf "
            "install gcc-c++; conda: conda install gxx), or name it in CXX, and install again."
        )
    return compiler


def nvcc() -> str | None:
    wanted = os.environ.get("SPIKECLIP_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        sys.exit(f"spikeclip: SPIKECLIP_CUDA must be 0, 1 or auto; got {wanted!r}")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    found = shutil.which(str(Path(home, "bin", "nvcc"))) if home else shutil.which("nvcc")
    found = found or shutil.which("/usr/local/cuda/bin/nvcc")
    if wanted == "1" and not found:
        sys.exit("spikeclip: SPIKECLIP_CUDA=1 but no nvcc was found; install the CUDA toolkit or set CUDA_HOME.")
    return found


def gencode() -> list[str]:
    archs = os.environ.get("SPIKECLIP_CUDA_ARCHS", DEFAULT_ARCHS).replace(",", ";").split(";")
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    lowest = min(archs, key=lambda a: int(a.rstrip("af")))
    return [*flags, f"-gencode=arch=compute_{lowest},code=compute_{lowest}"]


def ninja_path(path: Path | str) -> str:
    return str(path).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")


class NinjaBuild(build_ext):
    """Writes one build.ninja for all extensions and runs it."""

    def build_extensions(self) -> None:
        work = Path(self.build_temp).resolve()
        work.mkdir(parents=True, exist_ok=True)
        lines = [
            "ninja_required_version = 1.5",
            "rule compile",
            "  command = $compiler $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            "  command = $compiler $in -o $out $flags",
        ]
        for extension in self.extensions:
            lines += self.rules(extension, work)
        (work / "build.ninja").write_text("\n".join(lines) + "\n")
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        try:
            import ninja

            program = str(Path(ninja.BIN_DIR, "ninja"))
        except ImportError:
            program = "ninja"
        result = subprocess.run([program, "-C", str(work), "-j", jobs, "-v"], capture_output=True, text=True)
        (work / "build.log").write_text(result.stdout + result.stderr)
        if result.returncode:
            sys.exit(f"spikeclip: the extensions did not compile:\n{result.stdout[-8000:]}{result.stderr[-2000:]}")

    def rules(self, extension: Extension, work: Path) -> list[str]:
        import pybind11

        output = Path(self.get_ext_fullpath(extension.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{sysconfig.get_paths()['include']}", f"-I{pybind11.get_include()}"]
        on_cpu = extension.name == "spikeclip._cpu"
        bindings = CSRC / ("bindings_cpu.cpp" if on_cpu else "bindings_cuda.cpp")
        jobs = [(bindings, cxx(), [*CXX_FLAGS, *includes], extension.name)]
        if on_cpu:
            link = [cxx(), "-shared -fopenmp -s"]
            for source in sorted(CSRC.glob("cpu/*.cpp")):
                jobs += [
                    (source, cxx(), [*CXX_FLAGS, *flags, f"-DSPIKECLIP_ISA={isa}"], f"{source.stem}.{isa}")
                    for isa, flags in ISA_FLAGS.items()
                ]
        else:
            compiler = nvcc()
            link = [compiler, "-shared -cudart static"]
            jobs[0][2].append(f'-DSPIKECLIP_CUDA_ARCHS="{os.environ.get("SPIKECLIP_CUDA_ARCHS", DEFAULT_ARCHS)}"')
            jobs += [(s, compiler, [*NVCC_FLAGS, *gencode()], f"{s.stem}.cuda") for s in sorted(CSRC.glob("cuda/*.cu"))]
        lines, objects = [], []
        for source, compiler, flags, stem in jobs:
            objects.append(ninja_path(work / f"{stem}.o"))
            quoted = " ".join(f"'{flag}'" if any(c in flag for c in ' ;"') else flag for flag in flags)
            lines += [f"build {objects[-1]}: compile {ninja_path(source)}", f"  compiler = {compiler}", f"  flags = {quoted}"]
        lines += [f"build {ninja_path(output)}: link {' '.join(objects)}", f"  compiler = {link[0]}", f"  flags = {link[1]}"]
        return lines


extensions = [Extension("spikeclip._cpu", sources=[])]
if nvcc() and any(CSRC.glob("cuda/*.cu")):
    extensions.append(Extension("spikeclip._cuda", sources=[]))

setup(ext_modules=extensions, cmdclass={"build_ext": NinjaBuild})
