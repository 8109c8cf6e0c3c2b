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
            "density": row["params"].get("density"),
            **{"baseline": False, **row.get("extra_info", {})},
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
    """Markdown: per group and implementation the median of every run and a ratio.

    Where a group has baselines (dense products, an ANN twin) the ratio says how many times faster than the fastest of them;
    elsewhere how many times longer than spikeclip's fastest.
    """
    lines = []
    for group in dict.fromkeys(row["group"] for run in runs for row in run["rows"]):
        rows = [[row for row in run["rows"] if row["group"] == group] for run in runs]
        against = any(row["baseline"] for row in rows[0])
        bases = {row["who"] for row in rows[0] if row["baseline"]}
        ratio = f"times faster than {bases.pop() if len(bases) == 1 else 'dense'}" if against else "ratio"
        heads = [f"{run['allocator']}, ms | {ratio}" for run in runs]
        saves = any("saved_megabytes" in row for row in rows[0])
        heads += ["kept for backward, MB"] if saves else []
        peaks = any("peak_megabytes" in row for row in rows[0])
        heads += ["most memory at once, MB"] if peaks else []
        answers = any("images" in row for row in rows[0])
        heads += ["images a second | M SynOps an image | G SynOps a second | least cosine with the tower"] if answers else []
        roofs = any("roof" in row for row in rows[0])
        heads += ["share of roof | extra memory, MB"] if roofs else []
        lines += [f"**{group}**", "", "| | " + " | ".join(heads) + " |", "|---" * (1 + " | ".join(heads).count("|") + 1) + "|"]
        names = list(dict.fromkeys(_name(row) for run in rows for row in run))
        several = len({dtype for _, dtype, _ in names}) > 1
        for name in names:
            who, dtype, density = name
            cells = [who + (f", {dtype}" if several else "") + (f", {density:.0%} firing" if _varies(name, names) else "")]
            for run in rows:
                mine = next((row["median_ms"] for row in run if _name(row) == name), None)
                base = min((row["median_ms"] for row in _bases(run, against)), default=None)
                ratio = None if None in (mine, base) else base / mine if against else mine / base
                cells += ["-" if mine is None else f"{mine:.3g}", "-" if ratio is None else f"{ratio:.2f}"]
            for wanted, key in ((saves, "saved_megabytes"), (peaks, "peak_megabytes")):
                if wanted:
                    figure = next((row.get(key) for row in rows[0] if _name(row) == name), None)
                    cells.append("-" if figure is None else f"{figure:.0f}")
            if answers:
                cells += _answers(next(row for row in rows[0] if _name(row) == name))
            if roofs:
                row = next(row for row in rows[0] if _name(row) == name)
                cells += [f"{row['roof']:.0%}" if "roof" in row else "-", f"{row['memory'] / 1e6:.1f}"]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _answers(row: dict) -> list[str]:
    """Speed and cost side by side, and what the weights' type does to the worst picture; an ANN makes no SynOps."""
    a_second = row["images"] / row["median_ms"] * 1e3
    synops = ["-", "-"] if row["synops"] is None else [f"{row['synops'] / 1e6:.1f}", f"{a_second * row['synops'] / 1e9:.1f}"]
    return [f"{a_second:.0f}", *synops, f"{row['cosine']:.3f}" if "cosine" in row else "-"]


def _name(row: dict) -> tuple[str, str, float | None]:
    return row["who"], row["dtype"], row["density"]


def _varies(name: tuple, names: list[tuple]) -> bool:
    return name[2] is not None and sum(other[0] == name[0] for other in names) > 1


def _bases(rows: list[dict], against: bool) -> list[dict]:
    if against:
        return [row for row in rows if row["baseline"]]
    one_dtype = len({row["dtype"] for row in rows}) == 1
    return [row for row in rows if row["who"].startswith("spikeclip") and (one_dtype or row["dtype"] == "float32")]
