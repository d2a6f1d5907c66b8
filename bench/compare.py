"""What became slower between two runs, beyond their noise: `python -m bench.compare A B`.

A and B are CSV files of the kernel benchmarks, JSON files of bench_model, or directories of bench.round. All is
reckoned in logarithms of times, for what disturbs a time multiplies it.

A figure of ours changed by x = log(B / A) of its medians, minus the drift of the machine, which is the same of the
other libraries that ran in turn with it: a busy machine slows all alike. What x is when no code changed spreads, by

- noise within the runs, as the quantiles of the four times show it. Of single calls, not of their median: the calls of
  one sitting share their disturbances, however many they are;
- where no other library ran in turn with ours, how much the drift of all others in the two runs spreads;
- what differs between two processes and no quantile shows, as the layout of memory: the spread of x over our figures,
  or over those of the operation, if it is larger.

Spreads are robust (1.4826 median absolute deviations): up to half of the figures may change without hiding it. x is a
regression where it is so many spreads above 0 that a comparison, all its tests together, has a false alarm with the
probability --alpha (Bonferroni, as if x were normal). That is strict for a single figure; but what slows an operation
slows it at most points, so the median of its figures is tested too, whose error is smaller: 1.2533 spreads over the
root of their number, and PROCESS. Exit 1 on a regression.

What that detects depends on the noise: on the stored round of two CPU cores an operation that is 6 % slower is reported
and one that is 2 % slower is not; of single figures one that is 30 % slower is (tests/test_bench_compare.py plants
them). One figure in many may still be called wrongly: measure such a one again before you believe it.
"""

import argparse
import csv
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import harness
from .command import exit_with

KEY = (
    "kernel_name", "kernel_provider", "kernel_operation_mode", "extra_benchmark_config_str", "x_name", "x_value",
)  # fmt: skip
SHOWN = (*KEY, "A_ms", "B_ms", "B/A", "drift", "slower_%", "beyond_%", "verdict")
ALPHA = 0.01
PROCESS = 0.01  # assumed of what a process makes of all figures of an operation: rounds of unchanged code suggest it
UNKNOWN = 0.1  # assumed spread of the drift where no other library was measured: suggested alike
FEW = 6  # figures of which a median says little
WIDTH = 2 * statistics.NormalDist().inv_cdf(0.8)  # standard deviations from the 20 % to the 80 % quantile
Key = tuple[str, ...]
Run = dict[Key, dict[str, Any]]


@dataclass(frozen=True)
class Change:
    """Of a time, from A to B: the logarithm of their ratio, and its standard deviation where nothing changed."""

    log: float
    spread: float

    def less(self, drift: "Change") -> "Change":
        return Change(self.log - drift.log, math.hypot(self.spread, drift.spread))


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
    environment = results["environment"]
    machine = environment["gpu"] or f"CPU: {environment['cpu']}"
    return [
        {
            "kernel_name": "model", "kernel_provider": row["provider"], "kernel_operation_mode": row["dtype"],
            "extra_benchmark_config_str": "", "x_name": "case", "x_value": row["case"],
            "gpu_name": machine, "torch": environment["torch"], "triton": environment["triton"] or "",
            **{f"y_value_{q}": row[name] for q, name in ((20, "q20_ms"), (50, "median_ms"), (80, "q80_ms"))},
        }
        for row in results["rows"]
    ]  # fmt: skip


def compare(before: Run, after: Run, alpha: float = ALPHA) -> list[dict[str, Any]]:
    """A line for each figure of ours that both have, and one for each operation of enough of them; the worst first."""
    changes = {key: _change(before[key], after[key]) for key in before if key in after}
    drift = _drifts(changes)
    own = {key: change.less(drift[_point(key)]) for key, change in changes.items() if _ours(key)}
    groups = _groups(own)
    overall = max(PROCESS, spread([change.log for change in own.values()]))
    between = {name: max(overall, spread(logs)) for name, logs in groups.items()}
    figures = {
        key: Change(change.log, math.hypot(change.spread, between.get(key[:2], overall))) for key, change in own.items()
    }
    operations = {(*name, "all", "", "figures", str(len(logs))): _median(logs) for name, logs in groups.items()}
    limit = statistics.NormalDist().inv_cdf(1 - alpha / (len(figures) + len(operations)))
    lines = [_line(key, change, limit) for key, change in operations.items()]
    for key, change in figures.items():
        times = {f"{run}_ms": float(row[key]["y_value_50"]) for run, row in (("A", before), ("B", after))}
        ratios = {"B/A": math.exp(changes[key].log), "drift": math.exp(drift[_point(key)].log)}
        lines.append(_line(key, change, limit) | times | ratios)
    return sorted(lines, key=lambda line: line["slower_%"] / line["beyond_%"], reverse=True)


def _change(before: dict[str, Any], after: dict[str, Any]) -> Change:
    (low, a, high), (least, b, most) = ([float(row[f"y_value_{q}"]) for q in (20, 50, 80)] for row in (before, after))
    return Change(math.log(b / a), math.hypot(math.log(high / low), math.log(most / least)) / WIDTH)


def _drifts(changes: dict[Key, Change]) -> dict[Key, Change]:
    """By point: what others, interleaved with ours, took there; where there are none, what all others took."""
    by_point: dict[Key, list[Change]] = defaultdict(list)
    for key, change in changes.items():
        if not _ours(key):
            by_point[_point(key)].append(change)
    logs = [change.log for others in by_point.values() for change in others]
    anywhere = Change(statistics.median(logs), max(PROCESS, spread(logs))) if logs else Change(0.0, UNKNOWN)
    here = {point: Change(*(statistics.median(part) for part in zip(*((c.log, c.spread) for c in others), strict=True)))
            for point, others in by_point.items()}  # fmt: skip
    return {_point(key): here.get(_point(key), anywhere) for key in changes}


def _groups(figures: dict[Key, Change]) -> dict[Key, list[float]]:
    """The changes of each operation and provider that have enough of them."""
    found: dict[Key, list[float]] = defaultdict(list)
    for (operation, provider, *_), change in figures.items():
        found[operation, provider].append(change.log)
    return {name: logs for name, logs in found.items() if len(logs) >= FEW}


def _median(logs: Sequence[float]) -> Change:
    """The median of changes, with its error."""
    return Change(statistics.median(logs), math.hypot(1.2533 * spread(logs) / len(logs) ** 0.5, PROCESS))


def spread(values: Sequence[float]) -> float:
    """The standard deviation, from the median absolute deviation."""
    middle = statistics.median(values)
    return 1.4826 * statistics.median(abs(value - middle) for value in values)


def _line(key: Key, change: Change, limit: float) -> dict[str, Any]:
    beyond = limit * change.spread
    verdict = "REGRESSION" if change.log > beyond else "faster" if change.log < -beyond else ""
    percent = {"slower_%": 100 * math.expm1(change.log), "beyond_%": 100 * math.expm1(beyond)}
    return {**dict(zip(KEY, key, strict=True)), **percent, "verdict": verdict}


def _point(key: Key) -> Key:
    """What the providers of one interleaved run share."""
    return tuple(part for name, part in zip(KEY, key, strict=True) if name != "kernel_provider")


def _ours(key: Key) -> bool:
    return key[KEY.index("kernel_provider")].startswith(harness.OURS)


def differences(rows: Iterable[tuple[dict[str, Any], dict[str, Any]]]) -> list[str]:
    """What else differs between two runs, and may be taken for a change of ours."""
    pairs = list(rows)
    found = []
    for name in ("gpu_name", "torch", "triton"):
        values = [sorted({pair[i].get(name) or "none" for pair in pairs}) for i in (0, 1)]
        if values[0] != values[1]:
            found.append(f"the runs differ in {name}: {', '.join(values[0])}; {', '.join(values[1])}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("before", type=Path, metavar="A")
    parser.add_argument("after", type=Path, metavar="B")
    parser.add_argument("--alpha", type=float, default=ALPHA, help=f"odds of a false alarm (default {ALPHA})")
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of a table")
    args = parser.parse_args()
    before, after = read(args.before), read(args.after)
    common = [key for key in before if key in after and _ours(key)]
    if not common:
        raise SystemExit("the two runs have no measurement of ours in common: nothing can be compared")
    for difference in differences((before[key], after[key]) for key in common):
        harness.log(difference)
    rows = compare(before, after, args.alpha)
    print("\n".join(map(json.dumps, rows)) if args.json else harness.table(rows, SHOWN))
    slower = sum(row["verdict"] == "REGRESSION" for row in rows)
    only_a, only_b = (sum(map(_ours, run)) - len(common) for run in (before, after))
    harness.log(f"{len(common)} in common, {slower} slower beyond noise, {only_a} only in A, {only_b} only in B")
    return 1 if slower else 0


if __name__ == "__main__":
    exit_with(main)
