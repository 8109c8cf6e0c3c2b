"""Compile every Triton kernel for sm_80 and sm_90, without a GPU, and report registers and spills.

Exit code 1 if one does not compile or spills. Both are read from the report of the assembler that triton ships.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from spikeclip.kernels import lif
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spikeclip.ops.surrogate import SURROGATES

DTYPES = ("fp32", "fp16", "bf16")
OPTIONS = {"num_warps": lif.LAUNCH["num_warps"], "enable_fp_fusion": False}


def forward_variants():
    for dtype, (learnt, decay, soft) in itertools.product(DTYPES, [(0, 1, 0), (1, 1, 0), (0, 0, 1)]):
        signature = dict.fromkeys(("x_ptr", "spikes_ptr"), f"*{dtype}")
        signature |= dict.fromkeys(("v0_ptr", "v_last_ptr", "tau_ptr"), "*fp32") | {"steps": "i32", "n": "i32"}
        signature |= dict.fromkeys(("tau", "v_threshold", "v_reset"), "fp32")
        constants = {"HAS_V0": bool(learnt), "TAU_TENSOR": bool(learnt), "DECAY_INPUT": bool(decay), "SOFT_RESET": bool(soft)}
        yield (
            f"fwd {dtype} tau_tensor={learnt} decay={decay} soft={soft}",
            lif._fwd,
            signature,
            {**constants, "BLOCK": lif.LAUNCH["BLOCK"]},
        )


def backward_variants():
    every = [(name, row.index, 0, 1, 0, 0, 0) for name, row in SURROGATES.items()]
    every += [("sigmoid", 0, 1, 1, 0, 0, 1), ("atan", 1, 1, 0, 1, 1, 1), ("atan", 1, 0, 1, 0, 1, 0)]
    for dtype, (name, kind, learnt, decay, soft, detach, long) in itertools.product(DTYPES, every):
        wide = dtype == "fp32"
        signature = dict.fromkeys(("ds_ptr", "x_ptr", "dx_ptr"), f"*{dtype}") | {"slots_ptr": "*i32" if wide else "*i16"}
        signature |= dict.fromkeys(("dv_last_ptr", "v0_ptr", "dv0_ptr", "tau_ptr"), "*fp32") | {"dtau_ptr": "*fp64"}
        signature |= {"steps": "i32", "n": "i32"}
        signature |= dict.fromkeys(("tau", "v_threshold", "v_reset", "alpha"), "fp32")
        constants = {
            "HAS_DS": True, "HAS_DV": bool(learnt), "HAS_V0": bool(learnt), "TAU_TENSOR": bool(learnt),
            "DECAY_INPUT": bool(decay), "SOFT_RESET": bool(soft), "DETACH_RESET": bool(detach), "KIND": kind, "WIDE": wide,
            "LONG": bool(long), "SEGMENT": lif.SEGMENT, "BLOCK": lif.LAUNCH["BLOCK"],
        }  # fmt: skip
        yield f"bwd {dtype} {name} tau_tensor={learnt} decay={decay} soft={soft} long={long}", lif._bwd, signature, constants


def resources(ptx: str) -> tuple[int, int]:
    """(registers, bytes spilled) as an assembler that triton ships reports them; it ships two, of different PTX versions."""
    target = re.search(r"\.target (\w+)", ptx)[1]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        for assembler in sorted((Path(triton.__file__).parent / "backends" / "nvidia" / "bin").glob("ptxas*")):
            command = [assembler, "-v", "--fmad=false", f"--gpu-name={target}", file.name, "-o", "/dev/null"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr).groups()
                return int(re.search(r"Used (\d+) registers", done.stderr)[1]), sum(map(int, spills))
    raise RuntimeError(f"no assembler takes this PTX: {done.stderr}")


def main() -> int:
    bad = 0
    print(f"triton {triton.__version__}")
    for capability in (80, 90):
        worst = {}
        for name, function, signature, constants in itertools.chain(forward_variants(), backward_variants()):
            order = {key: signature.get(key, "constexpr") for key in function.arg_names}
            source = ASTSource(function, order, {(function.arg_names.index(k),): v for k, v in constants.items()})
            try:
                compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=OPTIONS)
            except Exception as error:  # any compiler failure is the finding
                print(f"sm_{capability} {name}: does not compile: {error}")
                bad += 1
                continue
            registers, spilled = resources(compiled.asm["ptx"])
            if spilled:
                print(f"sm_{capability} {name}: spills {spilled} bytes at {registers} registers")
                bad += 1
            group = " ".join(name.split()[:2])
            worst.setdefault(group, []).append(registers)
        for group, counts in worst.items():
            print(f"sm_{capability} {group}: {len(counts)} variants, {min(counts)} to {max(counts)} registers")
    print("all compiled without spills" if not bad else f"{bad} kernels failed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
