"""Tunes the kernels' configuration tables for the GPU at hand: `python -m bench.tune [KERNEL …] [--write]`.

Every entry that a benchmark reaches is raced against its neighbours (a tile or the warps halved or doubled, a stage
more or less) on the largest case that reaches it, interleaved; the winner's neighbours come next, until none is faster
by more than noise. A neighbour has to give the same bits as the present entry: the tables promise orders of sums, and
that one text gives the same bits in every batch. `--write` puts the winners into the table of this GPU's target.
"""

import argparse
import ast
import functools
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from xlmr.files import write_atomically
from xlmr.kernels import _launch
from xlmr.kernels._launch import Config, Table

from . import harness

KERNELS = ("attention", "linear", "vocab_softmax", "layer_norm", "embedding")
TABLES = (*KERNELS, "_products")  # the files of kernels/ that have some
GAIN = 1.03  # what a winner must be faster by, beside quantiles that do not overlap
LIMITS = {"num_warps": (1, 16), "num_stages": (1, 8), "tile": (1, 256)}

Work = tuple[harness.Case, str]  # a case and a mode
Race = Callable[[dict[Config, Callable[[], Any]]], dict[Config, dict[str, float]]]  # to harness.quantiles of each


@dataclass(frozen=True)
class Entry:
    """One entry of a table for the target at hand."""

    module: str
    table: str
    bucket: Any
    present: Config


@dataclass
class Picker:
    """Stands in for _launch.pick: gives what is `chosen` for an entry, and remembers which entries were asked for."""

    modules: Iterable[ModuleType]
    chosen: dict[Entry, Config] = field(default_factory=dict)
    reached: list[Entry] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.names = {id(table): (module, name) for module in self.modules for name, table in tables(module)}

    def __call__(self, table: Table, device: torch.device, bucket: object) -> Config:
        module, name = self.names[id(table)]
        entry = Entry(module.__name__, name, bucket, _launch.pick(table, device, bucket))
        self.reached.append(entry)
        return self.chosen.get(entry, entry.present)

    def __enter__(self) -> "Picker":
        self.patches = [mock.patch.object(m, "pick", self) for m in self.modules if hasattr(m, "pick")]
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        for patch in self.patches:
            patch.stop()


def tables(module: ModuleType) -> Iterator[tuple[str, Table]]:
    return ((name, value) for name, value in vars(module).items() if isinstance(value, Mapping) and "portable" in value)


def neighbours(config: Config) -> list[Config]:
    """What differs from `config` in one step of one number, within LIMITS."""

    def within(limits: tuple[int, int], *values: int) -> list[int]:
        return [value for value in values if limits[0] <= value <= limits[1]]

    warps, stages = config.num_warps, config.num_stages
    found = [replace(config, num_warps=n) for n in within(LIMITS["num_warps"], warps // 2, 2 * warps)]
    found += [replace(config, num_stages=n) for n in within(LIMITS["num_stages"], stages - 1, stages + 1)]
    for i, (name, size) in enumerate(config.tiles):
        for other in within(LIMITS["tile"], size // 2, 2 * size):
            found.append(replace(config, tiles=(*config.tiles[:i], (name, other), *config.tiles[i + 1 :])))
    return found


def reached(picker: Picker, works: Iterable[Work]) -> dict[Entry, Work]:
    """The entries that the works reach, each with the largest work that does: a forward pass, unless only gradients
    need the entry."""
    found: dict[Entry, tuple[bool, int, Work]] = {}
    for case, mode in works:
        picker.reached.clear()
        harness.results(case.providers["xlmr triton"], harness.inputs_of(case), case.wanted, mode)
        rank = mode == "forward", sum(case.cost(mode == "backward"))
        for entry in picker.reached:
            if entry not in found or rank > found[entry][:2]:
                found[entry] = *rank, (case, mode)
    return {entry: work for entry, (*_, work) in found.items()}


def same_bits(picker: Picker, entry: Entry, config: Config, work: Work) -> bool:
    """Whether `config` computes what the entry's present configuration computes; False where it cannot run."""
    case, mode = work

    def computed(chosen: Config) -> list[torch.Tensor]:
        picker.chosen[entry] = chosen
        out = harness.results(case.providers["xlmr triton"], harness.inputs_of(case), case.wanted, mode)
        return list(out) if isinstance(out, tuple) else [out]

    expected = computed(entry.present)
    try:
        found = computed(config)
    except Exception as error:  # Triton has no common class: too much shared memory, an assertion, the compiler's
        harness.log(f"  {shown(config)}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
        return False
    return all(map(torch.equal, expected, found))


def interleaved(calls: dict[Config, Callable[[], Any]]) -> dict[Config, dict[str, float]]:
    return {config: harness.quantiles(t) for config, t in harness.interleaved(calls, rounds=20, warm_up=3).items()}


def climb(
    picker: Picker, entry: Entry, work: Work, race: Race = interleaved, end: float = float("inf")
) -> tuple[Config, float]:
    """The fastest configuration of an entry that can be reached step by step, each faster than the one before, and how
    many times faster than the present one it is."""
    case, mode = work
    run = harness.timed(case.providers["xlmr triton"], case, mode)

    def calling(config: Config) -> Any:
        picker.chosen[entry] = config
        return run()

    best, ratio, tried = entry.present, 1.0, {entry.present}
    while time.monotonic() < end:
        fresh = [config for config in neighbours(best) if config not in tried]
        tried.update(fresh)
        fit = [config for config in fresh if same_bits(picker, entry, config, work)]
        times = race({config: functools.partial(calling, config) for config in (best, *fit)})
        winner = min(times, key=lambda config: times[config]["median_ms"])
        if not faster(times[winner], times[best]):
            break
        best, ratio = winner, ratio * times[best]["median_ms"] / times[winner]["median_ms"]
    picker.chosen.pop(entry, None)
    return best, ratio


def faster(a: dict[str, float], b: dict[str, float]) -> bool:
    """Whether a is faster than b by more than noise."""
    return GAIN * a["median_ms"] < b["median_ms"] and a["q80_ms"] < b["q20_ms"]


def rewritten(source: str, table: str, target: str, entries: Mapping[Any, Config], note: str) -> str:
    """The source of a file of kernels/ whose `table` has these entries for `target`, and nothing else changed."""
    (assignment,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == table
    )
    assert isinstance(assignment.value, ast.Dict)
    keys = [key.value if isinstance(key, ast.Constant) else None for key in assignment.value.keys]
    lines = [f"        {literal(bucket)}: {shown(config)},\n" for bucket, config in entries.items()]
    text = f"{{  # {note}\n{''.join(lines)}    }}"
    if target in keys:
        place: ast.expr = assignment.value.values[keys.index(target)]
        return source[: _offset(source, place)] + text + source[_offset(source, place, end=True) :]
    last = _offset(source, assignment.value.values[-1], end=True)
    return f'{source[:last]},\n    "{target}": {text},\n}}{source[_offset(source, assignment, end=True) :]}'


def _offset(source: str, node: ast.expr | ast.stmt, end: bool = False) -> int:
    line, column = (node.end_lineno, node.end_col_offset) if end else (node.lineno, node.col_offset)
    assert line is not None
    assert column is not None
    before = "".join(source.splitlines(keepends=True)[: line - 1])
    return len(before) + len(source.splitlines()[line - 1].encode()[:column].decode())


def literal(bucket: Any) -> str:
    if isinstance(bucket, tuple):
        return f"({', '.join(map(literal, bucket))})"
    return json.dumps(bucket)


def shown(config: Config) -> str:
    """As the tables write it."""
    tiles = "".join(f", {name}={size}" for name, size in config.tiles)
    return f"config({config.num_warps}, {config.num_stages}{tiles})"


def write(winners: Mapping[Entry, Config], target: str, note: str) -> list[Path]:
    """Puts the winners into the files of kernels/; the other entries of the target stay as they are."""
    changed: dict[Path, str] = {}
    for name, table in dict.fromkeys((entry.module, entry.table) for entry in winners):
        module = importlib.import_module(name)
        path = Path(str(module.__file__)).resolve()
        found = {e.bucket: config for e, config in winners.items() if (e.module, e.table) == (name, table)}
        former = getattr(module, table)
        entries = {**former.get(target, former["portable"]), **found}
        source = changed.get(path) or path.read_text(encoding="utf-8")
        changed[path] = rewritten(source, table, target, entries, note)
    for path, source in changed.items():
        write_atomically(path.parent, {path.name: source})
    return list(changed)


def works(kernel: str) -> Iterator[Work]:
    """The benchmark's cases of a kernel in every dtype, and their gradients."""
    cases = importlib.import_module(f"bench.bench_{kernel}").cases
    for dtype in ("bf16", "fp32"):
        for case in cases(dtype):
            yield from ((case, mode) for mode in (("forward", "backward") if case.wanted else ("forward",)))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"of {', '.join(KERNELS)}; default: all")
    parser.add_argument("--minutes", type=float, default=20, help="time for all entries (default 20)")
    parser.add_argument("--write", action="store_true", help="put the winners into the tables in kernels/")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    args = parser.parse_args()
    if unknown := set(args.kernels) - set(KERNELS):
        parser.error(f"unknown kernel {', '.join(sorted(unknown))}: allowed are {', '.join(KERNELS)}")
    if not torch.cuda.is_available():
        parser.error("tuning measures on a GPU, and PyTorch sees none (torch.cuda.is_available() is False)")
    end = time.monotonic() + 60 * args.minutes
    target = _launch.target(torch.device("cuda"))
    winners: dict[Entry, Config] = {}
    rows = []
    with Picker([importlib.import_module(f"xlmr.kernels.{name}") for name in TABLES]) as picker:
        for kernel in args.kernels or KERNELS:
            for entry, work in reached(picker, works(kernel)).items():
                if time.monotonic() > end:
                    harness.log(f"out of time: {entry.table} {entry.bucket} stays as it is")
                    continue
                harness.log(f"{kernel}: {entry.table} {entry.bucket}")
                best, ratio = climb(picker, entry, work, end=end)
                if best != entry.present:
                    winners[entry] = best
                rows.append({"kernel": kernel, "table": entry.table, "bucket": literal(entry.bucket),
                             "present": shown(entry.present), "best": shown(best), "ratio": ratio})  # fmt: skip
    columns = ["kernel", "table", "bucket", "present", "best", "ratio"]
    print(json.dumps(rows) if args.json else harness.table(rows, columns))
    if args.write and winners:
        note = f"measured on {harness.device_name()}, {date.today().isoformat()}: python -m bench.tune"
        harness.log(f"written: {', '.join(map(str, write(winners, target, note)))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
