"""What a configuration may be changed to: its neighbours, within what the kernels promise and the compile gate allows.

The promises stand in the kernels' docstrings. Forward of linear, attention without dropout and the vocabulary: a row
has the same bits at every load. Their steps along a sum stay as they are (BLOCK_K stands in no table; BLOCK_N of
attention, BLOCK_V), linear's least tiles keep to one tensor-core instruction, and `same_bits` asks for the very bits of
the present entry. All else has one entry for all loads (dropout; the rows of LayerNorm, whose BLOCK_N is the bucket) or
promises only the same bits at every run (gradients): its tiles are free.
"""

import contextlib
import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from xlmr.kernels import _launch
from xlmr.kernels._launch import Config

from . import compile_cases
from .tables import Entry


def limits(entry: Entry) -> dict[str, tuple[int, int]]:
    """The least and the most of all that may vary: tiles, num_warps and num_stages."""
    launch = {"num_warps": (1, 16), "num_stages": (1, 8)}
    match entry.file, entry.table, entry.parts[-1]:
        case "linear", _, _:  # below, other tensor-core instructions, which sum in another order
            return {"BLOCK_M": (64, 256), "BLOCK_N": (32 if entry.target.startswith("gfx") else 16, 256), **launch}
        case "attention", "CONFIGS", "short" | "long":
            return {"BLOCK_M": (16, 256), **launch}
        case "vocab_softmax", "CONFIGS", _:
            return {"BLOCK_M": (16, 256), **launch}
        case "vocab_softmax", _, _:
            return {"BLOCK_M": (16, 256), "BLOCK_V": (16, 256), **launch}
        case "layer_norm" | "embedding", _, bucket:  # no stages: what they load depends on no earlier step
            wide = {"BLOCK_N": (256, 4096)} if bucket == "wide" else {}
            return {"BLOCK_T": (1, 32), **wide, "num_warps": (1, 16)}
    return {"BLOCK_M": (16, 256), "BLOCK_N": (16, 256), **launch}


def same_bits(entry: Entry) -> bool:
    """Whether a row has the same bits at every load."""
    promised = entry.file in ("attention", "linear", "vocab_softmax") and entry.table == "CONFIGS"
    return promised and entry.parts[-1] != "dropout"


def neighbours(present: Config, limits: Mapping[str, tuple[int, int]]) -> list[Config]:
    """The configurations one step away, within the limits."""
    at = {**dict(present.tiles), "num_warps": present.num_warps, "num_stages": present.num_stages}
    scaled = [name for name in limits if name != "num_stages"]
    steps: list[tuple[str, ...]] = [(name,) for name in scaled]
    steps += [(name, "num_warps") for name in scaled if name != "num_warps"]  # as much for each warp as before
    moves = [{name: at[name] * 2 for name in step} for step in steps]
    moves += [{name: at[name] // 2 for name in step} for step in steps]
    if "num_stages" in limits:
        moves += [{"num_stages": present.num_stages + 1}, {"num_stages": present.num_stages - 1}]
    return [
        _launch.config(**{**at, **move})
        for move in moves
        if all(limits[name][0] <= value <= limits[name][1] for name, value in move.items())
    ]


@contextlib.contextmanager
def standing(entry: Entry, config: Config) -> Iterator[None]:
    """Has `config` in the entry's place."""
    with mock.patch.dict(entry.configs, {entry.bucket: config}):
        yield


class Gate:
    """What the compile gate says of a configuration, in all of its cases that take the entry."""

    def __init__(self, target: str, cache: Path, processes: int) -> None:
        self.gate = importlib.import_module("bench.compile_gate")  # late: it decides that kernels are compiled
        if target not in self.gate.TARGETS:
            raise ValueError(f"the compile gate knows {', '.join(self.gate.TARGETS)}, not {target}")
        self.target, self.cache, self.processes = target, cache, processes
        kernels = {name: importlib.import_module(f"xlmr.kernels.{name}") for name in compile_cases.KERNELS}
        self.modules = [*kernels.values(), *self.gate.SHARED]
        self.cases = compile_cases.cases(kernels)
        self.present = self._recorded(self.cases).jobs
        self.entries = [self._recorded([case]).entries for case in self.cases]

    def fitting(self, entry: Entry, candidates: Sequence[Config]) -> list[Config]:
        """The candidates without a problem."""
        place = id(vars(entry.module)[entry.table]), entry.key, entry.bucket
        cases = [case for case, reached in zip(self.cases, self.entries, strict=True) if place in reached]
        new = {}
        for config in candidates:
            with standing(entry, config):
                jobs = self._recorded(cases).jobs
            new[config] = {key: job for key, job in jobs.items() if key not in self.present}
        every = {key: job for jobs in new.values() for key, job in jobs.items()}
        results = self.gate._results(list(every.values()), self.cache, self.processes, launched=True)
        limits = self.gate.TARGETS[self.target]
        sound = {key for key, found in zip(every, results, strict=True) if not found.problems(limits)}
        return [config for config, jobs in new.items() if jobs.keys() <= sound]

    def _recorded(self, cases: Iterable[Any]) -> Any:
        recorder = self.gate.Recorder(self.modules)
        recorder.run(cases, self.target, self.target)
        return recorder
