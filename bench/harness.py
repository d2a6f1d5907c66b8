"""Measuring side by side: interleaved runs, medians and quantiles, the environment stamped beside the figures."""

import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """What the figures were measured on and with."""
    packages = ("torch", "triton", "transformers", "tokenizers", "sentencepiece")
    versions = {name: _version(name) for name in packages}
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "date": date.today().isoformat(),
        "commit": _commit(),
        "python": platform.python_version(),
        **versions,
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def interleaved(candidates: dict[str, Callable[[], Any]], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Wall-clock seconds of `rounds` calls of each candidate, in turn, so that a disturbance meets them all."""
    for _ in range(warm_up):
        for call in candidates.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Median and the 20 % and 80 % quantiles, in milliseconds."""
    cut = statistics.quantiles(seconds, n=5, method="inclusive")
    return {"median_ms": 1e3 * statistics.median(seconds), "q20_ms": 1e3 * cut[0], "q80_ms": 1e3 * cut[3]}


def table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """Rows as aligned text; numbers with three digits that count."""
    cells = [columns, *([_text(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def write(name: str, results: dict[str, Any]) -> Path:
    """Writes bench/results/<name>.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def log(message: str) -> None:
    """To stderr: standard output is for data."""
    print(message, file=sys.stderr, flush=True)


def _text(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if value >= 1e3 else f"{value:.3g}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None
