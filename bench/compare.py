"""What became slower between two runs, beyond their noise: `python -m bench.compare A B`.

A and B are CSV files of the kernel benchmarks, JSON files of bench_model, or directories of bench.round. What other
libraries' providers took beside ours, interleaved, tells how much slower the machine was that day: a figure of ours has
regressed where, after that drift, B's 20 % quantile lies above A's 80 % quantile and the median grew by more than the
tolerance. Exit 1 on a regression.
"""

import argparse
import csv
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from . import harness

KEY = (
    "kernel_name", "kernel_provider", "kernel_operation_mode", "extra_benchmark_config_str", "x_name", "x_value",
)  # fmt: skip
TOLERANCE = 0.1
SHOWN = (
    "kernel_name", "kernel_operation_mode", "extra_benchmark_config_str", "x_name", "x_value", "kernel_provider",
    "A_ms", "B_ms", "B/A", "drift", "verdict",
)  # fmt: skip


Run = dict[tuple[str, ...], dict[str, Any]]


def read(path: Path) -> Run:
    """The rows of a run by what they measure; of several measurements the last."""
    files = [path / "kernels.csv", path / "models.json"] if path.is_dir() else [path]
    found = [file for file in files if file.is_file()]
    if not found:
        raise SystemExit(f"{path} is no CSV or JSON file of the benchmarks and no directory of bench.round")
    rows = [row for file in found for row in (_models(file) if file.suffix == ".json" else _kernels(file))]
    return {tuple(row[name] for name in KEY): row for row in rows}


def _kernels(file: Path) -> list[dict[str, Any]]:
    with file.open(newline="", encoding="utf-8") as lines:
        reader = csv.DictReader(lines)
        missing = [name for name in (*KEY, "y_value_50") if name not in (reader.fieldnames or ())]
        if missing:
            raise SystemExit(f"{file} lacks the columns {', '.join(missing)}: was it written by bench.bench_<kernel>?")
        return list(reader)


def _models(file: Path) -> list[dict[str, Any]]:
    """The rows of bench_model, in the kernels' columns."""
    results = json.loads(file.read_text(encoding="utf-8"))
    if not results.get("rows") or "median_ms" not in results["rows"][0]:
        raise SystemExit(f"{file} has no rows with a median: was it written by bench.bench_model?")
    machine = results["environment"]["gpu"] or f"CPU: {results['environment']['cpu']}"
    return [
        {
            "kernel_name": row["case"], "kernel_provider": row["provider"], "kernel_operation_mode": row["dtype"],
            "extra_benchmark_config_str": "", "x_name": "", "x_value": "", "gpu_name": machine,
            **{f"y_value_{q}": row[name] for q, name in ((20, "q20_ms"), (50, "median_ms"), (80, "q80_ms"))},
        }
        for row in results["rows"]
    ]  # fmt: skip


def compare(before: dict[str, Any], after: dict[str, Any], drift: float, tolerance: float) -> dict[str, Any]:
    """One line of the comparison, of a figure of ours."""
    ratio = _ratio(before, after)
    slower = float(after["y_value_20"]) > drift * float(before["y_value_80"]) and ratio > drift * (1 + tolerance)
    faster = float(after["y_value_80"]) < drift * float(before["y_value_20"]) and ratio < drift * (1 - tolerance)
    return {
        **{name: before[name] for name in KEY},
        "A_ms": float(before["y_value_50"]),
        "B_ms": float(after["y_value_50"]),
        "B/A": ratio,
        "drift": drift,
        "verdict": "REGRESSION" if slower else "faster" if faster else "",
    }


def drifts(before: Run, after: Run) -> dict[tuple[str, ...], float]:
    """By point: how many times as long other libraries took there in B, the median of them."""
    found: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for key in before.keys() & after.keys():
        if not _ours(before[key]):
            found[_point(key)].append(_ratio(before[key], after[key]))
    return {point: statistics.median(ratios) for point, ratios in found.items()}


def _point(key: tuple[str, ...]) -> tuple[str, ...]:
    """What the providers of one interleaved run share."""
    return tuple(part for name, part in zip(KEY, key, strict=True) if name != "kernel_provider")


def _ours(row: dict[str, Any]) -> bool:
    return row["kernel_provider"].startswith(harness.OURS)


def _ratio(before: dict[str, Any], after: dict[str, Any]) -> float:
    return float(after["y_value_50"]) / float(before["y_value_50"])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("before", type=Path, metavar="A")
    parser.add_argument("after", type=Path, metavar="B")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help=f"of the median (default {TOLERANCE})")
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of a table")
    args = parser.parse_args()
    before, after = read(args.before), read(args.after)
    common = [key for key in before if key in after and _ours(before[key])]
    if not common:
        raise SystemExit("the two runs have no measurement of ours in common: nothing can be compared")
    machines = {row["gpu_name"] for key in common for row in (before[key], after[key])}
    if len(machines) > 1:
        harness.log(f"the runs are of different machines: {', '.join(sorted(machines))}")
    drift = drifts(before, after)
    rows = [compare(before[key], after[key], drift.get(_point(key), 1.0), args.tolerance) for key in common]
    rows.sort(key=lambda row: row["B/A"] / row["drift"], reverse=True)
    print("\n".join(map(json.dumps, rows)) if args.json else harness.table(rows, SHOWN))
    slower = sum(row["verdict"] == "REGRESSION" for row in rows)
    only_a, only_b = (sum(map(_ours, run.values())) - len(common) for run in (before, after))
    harness.log(f"{len(common)} in common, {slower} slower beyond noise, {only_a} only in A, {only_b} only in B")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
