"""Run the CPU benchmarks and keep the result: ``python benchmarks/run.py [ops] [towers]``, both without an argument.

``ops`` are single layers under both allocators, into results/cpu-<instruction set>.json and .md; ``towers`` is the whole image
tower with kept memory, into results/towers-<instruction set>.json and .md. Wants an otherwise idle machine.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from report import compact, table

HERE = Path(__file__).parent
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**26)}
LAYERS = ["test_lif.py", "test_spikes*.py"]
INTERRUPTED = 2  # pytest's exit code
OPTIONS = ["-q", "--tb=short", "--benchmark-warmup=on", "--benchmark-warmup-iterations=10", "--benchmark-min-rounds=20"]
OPTIONS += ["--benchmark-max-time=1.5", "--benchmark-disable-gc", "--benchmark-columns=median,iqr,rounds"]


def measure(
    allocator: str, settings: dict[str, str], cases: list[str], extra: list[str] | None = None, cut_off: bool = False
) -> dict:
    """Run and compact; with ``cut_off``, what an interrupted run has timed is kept."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "run.json")
        paths = [str(path) for case in cases for path in HERE.glob(case)]
        command = [sys.executable, "-m", "pytest", *paths, *OPTIONS, f"--benchmark-json={file}", *(extra or [])]
        process = subprocess.Popen(command, env={**os.environ, **settings}, cwd=HERE.parent)
        try:
            code = process.wait()
        except KeyboardInterrupt:  # of pytest too, which ends with what it has
            code = process.wait()
        if code and not (cut_off and code == INTERRUPTED):
            sys.exit(f"the benchmarks failed with {allocator} (pytest's exit code {code}): no figure is kept")
        if not file.exists():
            sys.exit(f"no benchmark ran with {allocator}: every case of {', '.join(cases)} was skipped")
        return compact(file, allocator)


def keep(name: str, runs: list[dict]) -> str:
    """Write results/<name>.json and .md; returns the table."""
    text = table(runs)
    machine = ", ".join(f"{key} {value}" for key, value in runs[0]["machine"].items() if value is not None)
    changed = " with uncommitted changes" if runs[0]["dirty"] else ""
    source = f"{runs[0]['date'][:10]}; commit {runs[0]['commit'][:12]}{changed}"
    head = f"{machine}; {source}. Medians; ratio 1 is spikeclip's fastest.\n\n"
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / f"{name}.json").write_text(json.dumps(runs, indent=1) + "\n")
    (HERE / "results" / f"{name}.md").write_text(head + text)
    return head + text


@contextlib.contextmanager
def _alone():
    """While no other process adds."""
    with open(Path(tempfile.gettempdir(), "spikeclip-results.lock"), "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        yield


def add(name: str, allocator: str, settings: dict[str, str], cases: list[str], extra: list[str]) -> None:
    """Measure, and keep the rows behind those that results/<name>.json has."""
    run, file = measure(allocator, settings, cases, extra, cut_off=True), HERE / "results" / f"{name}.json"
    with _alone():
        if file.exists():
            run["rows"] = json.loads(file.read_text())[0]["rows"] + run["rows"]
        keep(name, [run])


def main() -> None:
    wanted = sys.argv[1:] or ["ops", "towers"]
    if unknown := set(wanted) - {"ops", "towers"}:
        sys.exit(f"benchmarks are ops and towers; got {', '.join(unknown)}")
    instructions = torch.backends.cpu.get_cpu_capability().lower()
    if "ops" in wanted:
        print(keep(f"cpu-{instructions}", [measure("default allocator", {}, LAYERS), measure("kept memory", KEPT, LAYERS)]))
    if "towers" in wanted:
        print(keep(f"towers-{instructions}", [measure("kept memory", KEPT, ["test_towers.py"])]))


if __name__ == "__main__":
    main()
