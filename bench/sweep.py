"""What the kernel benchmarks have in common: where they run, what they sweep over, their command line."""

import argparse
import functools
import importlib.util
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xlmr import ops

from . import harness

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
TOKENS = (1024, 4096, 16384, 65536) if GPU else (64, 512, 2048)
WIDTHS = (384, 768, 1024, 2560)  # of MiniLM, XLM-R base, large and XL
WIDTH, ROWS = 768, (16384 if GPU else 512)  # what stands still while the other is swept

Cases = Callable[[str], Iterable[harness.Case]]


@dataclass(frozen=True)
class Point:
    """One point of a sweep over T tokens or over N hidden units, the other standing still."""

    x_name: str
    x_label: str
    T: int
    N: int

    @property
    def x(self) -> tuple[str, str, int]:
        """Name, label and value of what is swept."""
        return self.x_name, self.x_label, getattr(self, self.x_name)

    @property
    def rest(self) -> dict[str, int]:
        return {"N": self.N} if self.x_name == "T" else {"T": self.T}


def over_tokens(T: int) -> Point:
    return Point("T", "tokens", T, WIDTH)


def points(tokens: Iterable[int] = TOKENS, rows: int = ROWS) -> list[Point]:
    """A sweep over tokens at one width, and one over WIDTHS of so many rows."""
    return [over_tokens(T) for T in tokens] + [Point("N", "hidden units", rows, N) for N in WIDTHS]


def providers(operation: str, torch_ways: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """xlmr's eager twin, which judges, then torch's ways, and on a GPU the first of them compiled and the kernel."""
    found = {"xlmr eager": getattr(ops.EAGER, operation), **torch_ways}
    if GPU:
        found["torch.compile"] = torch.compile(next(iter(torch_ways.values())))
        found["xlmr triton"] = getattr(ops.triton(), operation)
    return found


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def tensors(dtype: str) -> Callable[..., torch.Tensor]:
    """randn of a dtype where the benchmark runs."""
    return functools.partial(torch.randn, dtype=DTYPES[dtype], device=DEVICE)


def main(name: str, description: str | None, cases: Cases) -> int:
    """The command line of bench_<kernel>: measures, prints a table or JSON, appends to a CSV file."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=description)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--mode", nargs="+", choices=harness.MODES, default=list(harness.MODES))
    parser.add_argument(
        "--cases", type=re.compile, default="", help="only those in whose shape this expression is found"
    )
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each case and mode (default 0.5)")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "kernels.csv", help="CSV file to append to")
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of a table")
    args = parser.parse_args()
    found = [(f"{case.operation}: {case.shape}", case) for dtype in args.dtype for case in cases(dtype)]
    chosen = [(title, case) for title, case in found if re.search(args.cases, title)]
    if not chosen:
        raise SystemExit(f"--cases {args.cases.pattern!r} finds none of {len(found)}, such as {found[0][0]!r}")
    rows = []
    for title, case in chosen:
        harness.log(title)
        measured = list(harness.measure(case, args.mode, args.seconds))
        harness.append(args.out, measured)
        rows += measured
    if not rows:
        raise SystemExit("nothing was measured: no provider runs here")
    print("\n".join(map(json.dumps, rows)) if args.json else harness.table(rows, harness.KERNEL_COLUMNS))
    harness.log(f"appended to {args.out}")
    return 0
