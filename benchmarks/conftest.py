import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.backends.cudnn.allow_tf32 = False  # a peer's float32 convolution multiplies float32, as its matrix products and ours do


def pytest_benchmark_update_machine_info(config, machine_info):
    def installed(package):
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    machine_info.clear()
    machine_info["cpu"] = cpu_name()
    machine_info["threads"] = torch.get_num_threads()
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine_info["python"] = platform.python_version()
    for package in ("torch", "triton", "spikeclip", "spikingjelly", "snntorch"):
        machine_info[package] = installed(package)


def cpu_name() -> str:
    """Model and widest vectors that PyTorch takes: one model name can mean several kinds of cores."""
    return f"{_model_name()} ({torch.backends.cpu.get_cpu_capability()})"


def _model_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
