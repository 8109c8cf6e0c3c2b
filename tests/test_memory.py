import subprocess
import sys

import pytest

PROBE = """
import resource, sys, torch, spikeclip
if sys.argv[1] == "keep":
    assert spikeclip.keep_memory() is True
for _ in range(5):
    torch.zeros(16_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.zeros(16_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_large_tensors_stop_faulting_pages():
    faults = {
        how: int(subprocess.run([sys.executable, "-c", PROBE, how], capture_output=True, text=True, check=True).stdout)
        for how in ("default", "keep")
    }
    assert faults["keep"] < faults["default"] / 3
