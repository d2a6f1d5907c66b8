"""Kernels as Nsight Compute saw them, in the picture of the roofs: `python -m bench.ncu FILE.csv --roofs kernels.csv`.

FILE.csv is written, on a machine with a GPU, by
    ncu --csv --page raw --metrics gpu__time_duration.sum,dram__bytes.sum,\\
smsp__sass_thread_inst_executed_op_ffma_pred_on.sum,regex:sm__ops_path_tensor_.*sum python -m bench.profile > FILE.csv
The bytes are those of the memory itself, so that a kernel served by the L2 lies right of where `cost()` puts it.
"""

import argparse
import csv
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import harness, plots, roofline

SCALES = {
    "ns": 1e-9, "nsecond": 1e-9, "us": 1e-6, "usecond": 1e-6, "ms": 1e-3, "msecond": 1e-3, "s": 1.0, "second": 1.0,
    "byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9,
}  # fmt: skip
TIME, BYTES = "gpu__time_duration.sum", "dram__bytes.sum"
FMA = "smsp__sass_thread_inst_executed_op_ffma_pred_on.sum"
TENSOR = re.compile(r"sm__ops_path_tensor_.*\.sum")
COLUMNS = ("name", "launches", "ms", "gbytes", "gflops", "gbytes_per_s", "gflops_per_s")


def read(lines: Iterable[str]) -> list[dict[str, Any]]:
    """A row a kernel name, of all its launches together, the longest first."""
    rows = list(
        csv.DictReader(line for line in lines if line.startswith('"'))
    )  # the program's own output stands between
    missing = [name for name in ("Kernel Name", TIME, BYTES) if not rows or name not in rows[0]]
    if missing:
        raise ValueError(
            f"no columns {', '.join(missing)}: write the file with ncu --csv --page raw --metrics {TIME},{BYTES},…"
        )
    units, *launches = rows  # the second line of the file
    totals: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for launch in launches:
        own = totals[launch["Kernel Name"]]
        own["launches"] += 1
        own["ms"] += 1e3 * _value(launch, units, TIME)
        own["gbytes"] += _value(launch, units, BYTES) / 1e9
        own["gflops"] += 2 * _value(launch, units, FMA) / 1e9
        own["gflops"] += sum(_value(launch, units, name) for name in launch if TENSOR.fullmatch(name)) / 1e9
    found = [
        {
            "name": name,
            **own,
            "gbytes_per_s": 1e3 * own["gbytes"] / own["ms"],
            "gflops_per_s": 1e3 * own["gflops"] / own["ms"],
        }
        for name, own in totals.items()
    ]
    return sorted(found, key=lambda row: row["ms"], reverse=True)


def _value(launch: dict[str, str], units: dict[str, str], name: str) -> float:
    text = launch.get(name, "")
    return float(text.replace(",", "")) * SCALES.get(units[name], 1.0) if text else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ncu", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--roofs", type=Path, required=True, help="CSV file of the kernel benchmarks on that GPU")
    parser.add_argument("--out", type=Path, default=Path("ncu.svg"))
    args = parser.parse_args()
    try:
        with args.file.open(encoding="utf-8") as lines:
            rows = read(lines)
    except ValueError as error:
        raise SystemExit(f"{args.file}: {error}") from error
    with args.roofs.open(newline="", encoding="utf-8") as file:
        roofs = roofline.roofs(csv.DictReader(file))
    plots.roofline([row for row in rows if row["gflops"] and row["gbytes"]], roofs, args.out)
    print(harness.table(rows, COLUMNS))
    harness.log(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
