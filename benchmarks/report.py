"""Tables of ratios from pytest-benchmark's JSON."""

from __future__ import annotations

import json
from pathlib import Path


def compact(source: Path, allocator: str) -> dict:
    """What is worth keeping of one run: machine, versions, commit, and medians in milliseconds."""
    run = json.loads(source.read_text())
    rows = [
        {
            "group": row["group"],
            "who": row["params"]["who"],
            "dtype": row["params"].get("dtype", "float32"),
            "median_ms": row["stats"]["median"] * 1e3,
            "iqr_ms": row["stats"]["iqr"] * 1e3,
            "rounds": row["stats"]["rounds"],
        }
        for row in run["benchmarks"]
    ]
    commit = run["commit_info"]
    return {
        "date": run["datetime"],
        "commit": commit.get("id"),
        "dirty": commit.get("dirty"),
        "allocator": allocator,
        "machine": run["machine_info"],
        "rows": rows,
    }


def table(runs: list[dict]) -> str:
    """Markdown: per group and implementation the median of every run, and how many times longer than spikeclip's best."""
    heads = [f"{run['allocator']}, ms" for run in runs]
    lines = []
    groups = list(dict.fromkeys(row["group"] for run in runs for row in run["rows"]))
    for group in groups:
        lines += [
            f"**{group}**",
            "",
            "| | " + " | ".join(f"{h} | ratio" for h in heads) + " |",
            "|---" * (1 + 2 * len(heads)) + "|",
        ]
        names = list(dict.fromkeys((r["who"], r["dtype"]) for run in runs for r in run["rows"] if r["group"] == group))
        several = len({dtype for _, dtype in names}) > 1
        for who, dtype in names:
            cells = [f"{who}, {dtype}" if several else who]
            for run in runs:
                times = {(r["who"], r["dtype"]): r["median_ms"] for r in run["rows"] if r["group"] == group}
                base = min(t for (name, kind), t in times.items() if name.startswith("spikeclip") and kind == "float32")
                mine = times.get((who, dtype))
                cells += ["-", "-"] if mine is None else [f"{mine:.3g}", f"{mine / base:.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)
