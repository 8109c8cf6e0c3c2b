"""The CUDA C++ LIF kernels compiled for the host: their arithmetic, indices and parking of membranes, without a GPU.

The sum over a block (the gradient of tau) and everything about speed are left to machines with one.
"""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from spikeclip.ops import reference
from spikeclip.ops.surrogate import SURROGATES

CSRC = Path(__file__).parents[2] / "csrc"
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
DRIVER = """
using namespace spikeclip;
extern "C" void host_forward(void* x, int x_dtype, float* v0, void* spikes, int s_dtype, float* v_last, long steps, long n,
                             float tau, float v_threshold, float v_reset, int decay, int soft) {
  lif_forward({x, Dtype(x_dtype), v0, spikes, Dtype(s_dtype), v_last, steps, n, nullptr,
               LifParams{tau, v_threshold, v_reset, 1.0f, decay != 0, soft != 0, false}}, nullptr);
}
extern "C" void host_backward(void* ds, int ds_dtype, float* dv_last, void* x, int x_dtype, float* v0, void* dx, float* dv0,
                              long steps, long n, float tau, float v_threshold, float v_reset, float alpha, int decay, int soft,
                              int detach, int surrogate) {
  const LifParams params{tau, v_threshold, v_reset, alpha, decay != 0, soft != 0, detach != 0};
  lif_backward({ds, Dtype(ds_dtype), dv_last, x, Dtype(x_dtype), v0, dx, dv0, nullptr, steps, n, nullptr, params,
                Surrogate(surrogate)}, nullptr);
}
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    folder = tmp_path_factory.mktemp("host")
    source = (CSRC / "cuda" / "lif.cu").read_text()
    source, launches = re.subn(
        r"(\w+<[^<>]*>)<<<(.+?), kThreads, 0, stream>>>\(c\);", r"launch_on_host(\1, \2, kThreads, c);", source
    )
    assert launches == 5
    for header in ("cuda_bf16.h", "cuda_fp16.h"):
        (folder / header).write_text('#include "cuda_on_host.h"\n')
    (folder / "lif.cpp").write_text(source.replace('"lif.cuh"', '"cuda/lif.cuh"') + DRIVER)
    library = folder / "lif.so"
    flags = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing"]
    includes = [f"-I{folder}", f"-I{Path(__file__).parent}", f"-I{CSRC}"]
    done = subprocess.run([compiler, *flags, *includes, folder / "lif.cpp", "-o", library], capture_output=True, text=True)
    if "_Float16" in done.stderr:
        pytest.skip("this g++ has no _Float16")
    assert done.returncode == 0, done.stderr[-3000:]
    return ctypes.CDLL(str(library))


def address(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def floats(*values):
    return [ctypes.c_float(value) for value in values]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", [1, 3, 4, 5, 8, 9, 16, 17, 40])
@pytest.mark.parametrize("n", [1, 132, 1037])
@pytest.mark.parametrize("v_reset", [-0.1, None])
def test_kernels_equal_the_reference(kernels, dtype, steps, n, v_reset):
    x, v0 = (torch.randn(steps, n) * 1.2 + 0.3).to(dtype), torch.randn(n) * 0.3
    ds, dv_last = torch.randn(steps, n).to(dtype), torch.randn(n)
    tau, v_threshold, alpha, surrogate = 2.5, 0.9, 3.0, "atan"
    sizes = (ctypes.c_long(steps), ctypes.c_long(n))
    soft, rest = int(v_reset is None), v_reset or 0.0

    spikes, v_last = torch.full_like(x, torch.nan), torch.full((n,), torch.nan)
    kernels.host_forward(
        address(x), DTYPES[dtype], address(v0), address(spikes), DTYPES[dtype], address(v_last), *sizes,
        *floats(tau, v_threshold, rest), 1, soft,
    )  # fmt: skip
    want, v_want = reference.lif_fwd(x, v0, tau, v_threshold, v_reset, True, dtype)
    assert torch.equal(spikes, want) and torch.equal(v_last, v_want)

    dx, dv0 = torch.full_like(x, torch.nan), torch.full((n,), torch.nan)
    kernels.host_backward(
        address(ds), DTYPES[dtype], address(dv_last), address(x), DTYPES[dtype], address(v0), address(dx), address(dv0), *sizes,
        *floats(tau, v_threshold, rest, alpha), 1, soft, 0, SURROGATES[surrogate].index,
    )  # fmt: skip
    dx_want, dv0_want, _ = reference.lif_bwd(ds, dv_last, x, v0, tau, v_threshold, v_reset, True, False, surrogate, alpha)
    torch.testing.assert_close(dx.float(), dx_want.float(), rtol={0: 1e-4}.get(DTYPES[dtype], 1e-2), atol=1e-4)
    torch.testing.assert_close(dv0, dv0_want, rtol=1e-4, atol=1e-4)
