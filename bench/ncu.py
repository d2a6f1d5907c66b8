"""Kernels as Nsight Compute saw them, in the picture of the roofs: `python -m bench.ncu FILE.csv`.

FILE.csv is written, on a machine with a GPU, by the command at the end of `--help`: one forward pass, kernel by kernel.
The bytes are those of the memory itself, so that a kernel served by the L2 lies right of where `cost()` puts it.
"""

import argparse
import csv
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import harness, plots, roofline
from .command import exit_with

SCALES = {
    "ns": 1e-9, "nsecond": 1e-9, "us": 1e-6, "usecond": 1e-6, "ms": 1e-3, "msecond": 1e-3, "s": 1.0, "second": 1.0,
    "byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9,
}  # fmt: skip
TIME, BYTES = "gpu__time_duration.sum", "dram__bytes.sum"
# Flops of one count of each metric. Those of the tensor cores are disjoint: metrics of the same prefix are their parts.
FLOPS = {
    **{f"smsp__sass_thread_inst_executed_op_{op}_pred_on.sum": n for op, n in (("ffma", 2), ("fadd", 1), ("fmul", 1))},
    **{f"sm__ops_path_tensor_src_{kind}.sum": 1 for kind in ("bf16_dst_fp32", "fp16", "tf32_dst_fp32")},
}
COMMAND = f"""FILE.csv is written by
  ncu --csv --page raw --print-units base --nvtx --nvtx-include "regex:xlmr.*/" \\
      --metrics {",".join((TIME, BYTES, *FLOPS))} \\
      python -m bench.profile --profiler nvtx --step forward > FILE.csv"""
COLUMNS = ("name", "launches", "ms", "gbytes", "gflops", "gbytes_per_s", "gflops_per_s")


def read(lines: Iterable[str]) -> list[dict[str, Any]]:
    """A row a kernel name, of all its launches together, the longest first. ValueError where time or bytes are missing,
    or in a unit that is not known."""
    rows = list(csv.DictReader(line for line in lines if line.startswith('"')))  # between what the program itself says
    missing = [name for name in ("Kernel Name", TIME, BYTES) if not rows or name not in rows[0]]
    if missing:
        raise ValueError(f"no columns {', '.join(missing)}: see --help for how to write the file")
    units, *launches = rows  # the second line of the file
    unknown = [f"{name} in {units[name]!r}" for name in (TIME, BYTES) if units[name] not in SCALES]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: allowed are {', '.join(SCALES)}")
    totals: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for launch in launches:
        own = totals[launch["Kernel Name"]]
        own["launches"] += 1
        own["ms"] += 1e3 * _value(launch, TIME) * SCALES[units[TIME]]
        own["gbytes"] += _value(launch, BYTES) * SCALES[units[BYTES]] / 1e9
        own["gflops"] += sum(n * _value(launch, name) for name, n in FLOPS.items() if launch.get(name)) / 1e9
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


def _value(launch: dict[str, str], name: str) -> float:
    """A metric; that a GPU does not have one of the flops means that it has none of them."""
    text = launch[name].replace(",", "")
    if text != "n/a":
        return float(text)
    if name in FLOPS:
        return 0.0
    raise ValueError(f"{launch['Kernel Name']}: {name} is n/a: may this user read the GPU's counters?")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.ncu", description=__doc__, epilog=COMMAND,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("file", type=Path)
    roofs = harness.RESULTS / "kernels.csv"
    parser.add_argument(
        "--roofs", type=Path, default=roofs, help=f"the kernel benchmarks on that GPU (default {roofs})"
    )
    parser.add_argument("--out", type=Path, default=Path("ncu.svg"), help="picture to write (default %(default)s)")
    args = parser.parse_args()
    if not args.roofs.exists():
        raise SystemExit(f"{args.roofs} does not exist: measure the roofs with a bench.bench_<kernel>, or say --roofs")
    try:
        with args.file.open(encoding="utf-8") as lines:
            rows = read(lines)
    except ValueError as error:
        raise SystemExit(f"{args.file}: {error}") from error
    with args.roofs.open(newline="", encoding="utf-8") as file:
        roofs = roofline.roofs(csv.DictReader(file))
    drawn = [row for row in rows if row["gflops"] and row["gbytes"]]
    plots.roofline(drawn, roofs, args.out, "Kernels by Nsight Compute against the measured roofs")
    print(harness.table(rows, COLUMNS))
    harness.log(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    exit_with(main)
