import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _float32_is_float32():
    """cuDNN would multiply float32 in TensorFloat-32."""
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Uninitialised outputs hold NaN, so that an element nobody wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request):
    """The C++ extension runs on this instruction set, where the machine has it."""
    from spikeclip import _cpu

    if request.param not in _cpu.isas():
        pytest.skip(f"this machine has no {request.param}")
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(before)
