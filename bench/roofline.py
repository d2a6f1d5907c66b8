"""Every measured kernel against the roofs measured in the same run: `python -m bench.roofline kernels.csv`.

Of each provider, operation and dtype the points of the sweep; the roofs are the copy bandwidth and the rate of the
library's matrix product (bench.harness.roofs), so that a point above the slope was served by a cache.
"""

import argparse
import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import harness, plots
from .command import exit_with


def points(rows: Iterable[Mapping[str, Any]], provider: str, mode: str) -> list[dict[str, Any]]:
    """What plots.roofline draws."""
    return [
        {
            "name": f"{row['kernel_name']}, {json.loads(row['extra_benchmark_config_str'])['dtype']}",
            "gflops": float(row["gflops"]),
            "gbytes": float(row["gbytes"]),
            "ms": float(row["y_value_50"]),
        }
        for row in rows
        if row["kernel_provider"] == provider and row["kernel_operation_mode"] == mode
    ]


def title(rows: Sequence[Mapping[str, Any]], provider: str, mode: str) -> str:
    return f"{provider}, {mode}, against the measured roofs: {rows[0]['gpu_name']}"


def roofs(rows: Iterable[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """(flop/s, bytes/s) by dtype, taken back from the rows: roof time = fraction · time, of what bounds it. Of each
    command's own the best: one that somebody disturbed would flatter every kernel."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        seconds = float(row["fraction_of_roof"]) * float(row["y_value_50"]) / 1e3
        rate = float(row["gflops"] if row["roof"] == "compute" else row["gbytes"]) * 1e9 / seconds
        own = found.setdefault(json.loads(row["extra_benchmark_config_str"])["dtype"], {})
        own[row["roof"]] = max(rate, own.get(row["roof"], 0.0))
    return {dtype: (own["compute"], own["bandwidth"]) for dtype, own in found.items() if len(own) == 2}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=__doc__)
    parser.add_argument("file", type=Path, help="CSV file of the kernel benchmarks")
    parser.add_argument("--provider", help="whose points (default: xlmr triton where it was measured, else xlmr eager)")
    parser.add_argument("--mode", choices=harness.MODES, default="forward", help="default: forward")
    parser.add_argument("--out", type=Path, default=Path("roofline.svg"), help="picture to write (default %(default)s)")
    args = parser.parse_args()
    with args.file.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    measured = {row["kernel_provider"] for row in rows}
    provider = args.provider or ("xlmr triton" if "xlmr triton" in measured else "xlmr eager")
    if provider not in measured:
        raise SystemExit(f"{args.file} has no provider {provider!r}: it has {', '.join(sorted(measured))}")
    print(plots.roofline(points(rows, provider, args.mode), roofs(rows), args.out, title(rows, provider, args.mode)))
    return 0


if __name__ == "__main__":
    exit_with(main)
