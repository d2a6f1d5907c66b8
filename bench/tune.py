"""Tuning of the kernels' configuration tables for the GPU at hand: `python -m bench.tune [KERNEL …] [--write]`.

For each entry of the tables that this GPU uses, its neighbours are tried: configurations one step away in a tile, the
warps, the stages, or in a tile and the warps together (candidates.py says what may vary). One that the compile gate
refuses, in any of its cases, is not run; one whose results differ is not timed. What is timed are the launches that the
entry decides, replayed as CUDA graphs, on inputs that no cache holds, interleaved. A neighbour is better where it is
more than 3 % faster, beyond the quantiles, among all and again alone with the present one. `--write` puts it into the
kernel's file, which must have no uncommitted changes; tuning again goes on from there.
"""

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from tqdm import tqdm

from xlmr.kernels import _launch
from xlmr.kernels._launch import Config

from . import harness, loads, tables
from .candidates import Gate, limits, neighbours, same_bits, standing
from .command import exit_with
from .tables import Entry

Call = Callable[[], Any]
Clock = Callable[[Mapping[Config, Sequence[Call]]], dict[Config, dict[str, float]]]

GAIN = 1.03  # less is left alone
ROUNDS = 30
MOST_COPIES = 32  # of the inputs, so that none is in a cache
COLUMNS = ("entry", "present", "best", "present_ms", "best_ms", "ratio", "refused", "wrong", "timed", "better")


@contextlib.contextmanager
def launches(entry: Entry) -> Iterator[list[Call]]:
    """Collects the launches that the entry decides: each the next one after it was picked."""
    from triton.runtime.jit import KernelInterface

    found: list[Call] = []
    chosen = False
    pick, launcher = entry.module.pick, KernelInterface.__getitem__

    def picked(table: _launch.Table, device: torch.device, bucket: object) -> Config:
        nonlocal chosen
        chosen = table is vars(entry.module)[entry.table] and bucket == entry.bucket
        return pick(table, device, bucket)

    def launching(kernel: Any, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> Any:
            nonlocal chosen
            if chosen:
                found.append(partial(launcher(kernel, grid), *args, **kwargs))
            chosen = False
            return launcher(kernel, grid)(*args, **kwargs)

        return launch

    with (
        mock.patch.object(entry.module, "pick", picked),
        mock.patch.object(KernelInterface, "__getitem__", launching),
        mock.patch.object(_launch, "REMEMBERS", False),
    ):
        yield found


def run(entry: Entry, config: Config, copies: Sequence[Sequence[Call]]) -> tuple[list[Tensor], list[Call]]:
    """With `config` in the entry's place: what the first copy's calls return, and the launches of all copies."""
    first, *others = copies
    with standing(entry, config), launches(entry) as found, torch.no_grad():
        torch.manual_seed(0)  # of dropout
        with poisoned():
            results = list(tensors([call() for call in first]))
        for call in itertools.chain.from_iterable(others):
            call()
    return results, found


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, not what an earlier configuration wrote there."""

    def poison(allocate: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    with (
        mock.patch.object(torch, "empty", partial(poison, torch.empty)),
        mock.patch.object(torch, "empty_like", partial(poison, torch.empty_like)),
    ):
        yield


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)


def agree(results: Sequence[Tensor], expected: Sequence[Tensor], bits: bool) -> bool:
    """Whether they are the same: to the bit, or as two orders of a sum are, measured by element and its like."""
    if bits:
        return all(map(torch.equal, results, expected))
    pairs = [(a.float(), b.float(), b.dtype) for a, b in zip(results, expected, strict=True) if b.is_floating_point()]
    return all(
        bool(((a - b).abs() <= max(8 * torch.finfo(dtype).eps, 1e-4) * (b.abs() + b.square().mean().sqrt())).all())
        for a, b, dtype in pairs
    )


def graphs(found: Mapping[Config, Sequence[Call]]) -> dict[Config, dict[str, float]]:
    """The clock: median and quantiles, in ms, of replaying each configuration's launches, in turn."""
    replays = {}
    for config, calls in found.items():
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        replays[tables.text(config)] = graph.replay
    seconds = harness.interleaved(replays, ROUNDS, lead=harness.LEAD)
    return {config: harness.quantiles(seconds[tables.text(config)]) for config in found}


def faster(present: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether `other` is, beyond noise."""
    return present["median_ms"] > GAIN * other["median_ms"] and present["q20_ms"] > other["q80_ms"]


def tuned(
    entry: Entry, candidates: Sequence[Config], copies: Sequence[Sequence[Call]], clock: Clock
) -> tuple[Config, dict[str, Any]]:
    """The configuration that the entry should have, the present one if none is better, and what was measured."""
    expected, calls = run(entry, entry.present, copies)
    if not calls:
        raise RuntimeError(f"{entry}: none of its calls launches a kernel with it")
    found = {entry.present: calls}
    for config in candidates:
        results, calls = run(entry, config, copies)
        if agree(results, expected, same_bits(entry)):
            found[config] = calls
    times = clock(found)
    best = min(times, key=lambda config: times[config]["median_ms"])
    better = faster(times[entry.present], times[best])
    if better:  # the best of many was lucky too: alone with the present one it must win again
        times = clock({config: found[config] for config in (entry.present, best)})
        better = faster(times[entry.present], times[best])
    present_ms, best_ms = (times[config]["median_ms"] / len(copies) for config in (entry.present, best))
    row = {
        "entry": str(entry), "present": tables.text(entry.present), "best": tables.text(best),
        "present_ms": present_ms, "best_ms": best_ms, "ratio": present_ms / best_ms,
        "wrong": len(candidates) + 1 - len(found), "timed": len(found), "better": better,
    }  # fmt: skip
    return best if better else entry.present, row


def copies(entry: Entry, device: torch.device, cache: int) -> list[list[partial[Any]]]:
    """The calls that an entry is tuned for, on so many inputs that `cache` bytes hold a quarter of them at most."""
    first = loads.calls(entry, device)
    size = sum(t.nbytes for call in first for t in tensors([call.args, call.keywords]))
    count = min(MOST_COPIES, 1 + 4 * cache // max(size, 1))
    return [first, *(loads.calls(entry, device) for _ in range(count - 1))]


def changed(paths: Sequence[Path]) -> str:
    """What git does not know of these files: what is written should be all that is new. Nothing where they stand in no
    repository, or there is no git."""
    command = ["git", "-C", str(paths[0].parent), "status", "--porcelain", "--", *map(str, paths)]
    with contextlib.suppress(FileNotFoundError):
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return ""


def source(file: str) -> Path:
    return Path(__file__).resolve().parent.parent / "kernels" / f"{file}.py"


def kernel(name: str) -> str:
    if name not in tables.FILES:
        raise argparse.ArgumentTypeError(f"{name!r} has no tables: allowed are {', '.join(tables.FILES)}")
    return name


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.split("\n")[0])
    parser.add_argument("kernel", nargs="*", type=kernel, help=f"files of kernels/; default: {' '.join(tables.FILES)}")
    parser.add_argument("--minutes", type=float, default=30, help="begin no entry after that time (default 30)")
    parser.add_argument("--write", action="store_true", help="write what is better into the kernels' files")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "tune.json", help="JSON file of all rows")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/xlmr/compile_gate", metavar="DIR")
    given = parser.parse_args(arguments)
    files, end = given.kernel or list(tables.FILES), time.monotonic() + 60 * given.minutes
    os.environ["TRITON_INTERPRET"] = "0"  # read when a kernel is defined: here it is to be compiled
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9's default; unset, it warns
    device = torch.device("cuda")
    why = _launch.unsupported(device)
    if why is not None:
        parser.exit(2, f"python -m bench.tune times kernels on the GPU at hand: {why}. Without one, "
                    "python -m bench.compile_gate says which configurations compile.\n")  # fmt: skip
    if given.write and (found := changed([source(file) for file in files])):
        parser.exit(2, f"--write changes files that git knows as they stand; commit or take back first:\n{found}")
    target = _launch.target(device)
    try:
        gate = Gate(target, given.cache, len(os.sched_getaffinity(0)))
    except ValueError as error:
        parser.exit(2, f"python -m bench.tune: {error}\n")
    todo, rows = tables.entries(files, target), list[dict[str, Any]]()
    results = {"environment": harness.environment(), "written": given.write, "rows": rows}
    path = harness.write(given.out, results)
    for entry in tqdm(todo, unit="entry"):
        if time.monotonic() > end:
            harness.log(f"out of time: {len(todo) - len(rows)} of {len(todo)} entries are left as they are")
            break
        candidates = neighbours(entry.present, limits(entry))
        fitting = gate.fitting(entry, candidates)
        best, row = tuned(entry, fitting, copies(entry, device, harness._cache_bytes()), graphs)
        rows.append({**row, "refused": len(candidates) - len(fitting)})
        if given.write and best != entry.present:
            tables.write(source(entry.file), entry.table, target, {entry.bucket: best})
        harness.write(path, results)  # a round may end this process
    print(json.dumps(results, indent=1) if given.json else harness.table(rows, COLUMNS))
    harness.log(f"{sum(row['better'] for row in rows)} of {len(rows)} are better; wrote {path}")
    return 0


if __name__ == "__main__":
    exit_with(main)
