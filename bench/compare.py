"""What became slower between two runs, beyond their noise: `python -m bench.compare A B`.

A and B are CSV files of the kernel benchmarks, or directories of bench.round. A figure has regressed where B's 20 %
quantile lies above A's 80 % quantile and the median grew by more than the tolerance. Exit 1 on a regression.
"""

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

from . import harness

KEY = (
    "kernel_name", "kernel_provider", "kernel_operation_mode", "extra_benchmark_config_str", "x_name", "x_value",
)  # fmt: skip
TOLERANCE = 0.05
SHOWN = ("kernel_name", "kernel_provider", "kernel_operation_mode", "x_value", "A_ms", "B_ms", "B/A", "verdict")


def read(path: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """The rows of a run by what they measure; of several measurements the last."""
    file = path / "kernels.csv" if path.is_dir() else path
    if not file.is_file():
        raise SystemExit(f"{path} is no CSV file of the kernel benchmarks and no directory of bench.round")
    with file.open(newline="", encoding="utf-8") as lines:
        reader = csv.DictReader(lines)
        missing = [name for name in (*KEY, "y_value_50") if name not in (reader.fieldnames or ())]
        if missing:
            raise SystemExit(f"{file} lacks the columns {', '.join(missing)}: was it written by bench.bench_<kernel>?")
        return {tuple(row[name] for name in KEY): row for row in reader}


def compare(before: dict[str, str], after: dict[str, str], tolerance: float) -> dict[str, Any]:
    """One line of the comparison."""
    ratio = float(after["y_value_50"]) / float(before["y_value_50"])
    slower = float(after["y_value_20"]) > float(before["y_value_80"]) and ratio > 1 + tolerance
    faster = float(after["y_value_80"]) < float(before["y_value_20"]) and ratio < 1 - tolerance
    return {
        **{name: before[name] for name in KEY},
        "A_ms": float(before["y_value_50"]),
        "B_ms": float(after["y_value_50"]),
        "B/A": ratio,
        "verdict": "REGRESSION" if slower else "faster" if faster else "",
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("before", type=Path, metavar="A")
    parser.add_argument("after", type=Path, metavar="B")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help=f"of the median (default {TOLERANCE})")
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of a table")
    args = parser.parse_args()
    before, after = read(args.before), read(args.after)
    common = [key for key in before if key in after]
    if not common:
        raise SystemExit("the two runs have no measurement in common: nothing can be compared")
    machines = {row["gpu_name"] for key in common for row in (before[key], after[key])}
    if len(machines) > 1:
        harness.log(f"the runs are of different machines: {', '.join(sorted(machines))}")
    rows = [compare(before[key], after[key], args.tolerance) for key in common]
    rows.sort(key=lambda row: row["B/A"], reverse=True)
    print("\n".join(map(json.dumps, rows)) if args.json else harness.table(rows, SHOWN))
    slower = sum(row["verdict"] == "REGRESSION" for row in rows)
    harness.log(f"{len(common)} in common, {slower} slower beyond noise, {len(before) - len(common)} only in A, "
                f"{len(after) - len(common)} only in B")  # fmt: skip
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
