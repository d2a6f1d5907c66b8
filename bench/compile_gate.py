"""The compile gate: every Triton kernel with every configuration of every target's table, compiled with no GPU present.

`python -m bench.compile_gate [--target sm_90 …] [--json]` runs the kernels' public functions, and backward, on CPU
tensors at XLM-R's shapes while a driver that only names a target is active. What is compiled is therefore what they
launch: their own choice of configuration, Triton's own specialisation. Nothing is executed. Every target is compiled
with its own table, NVIDIA's least also with the "portable" one. Exit status 1 where
- shared memory is more than the target has, or a stack or a spilled vector register is left;
- a dot runs without its tensor-core instruction: mma.sync (sm_80), wgmma (sm_90) and tcgen05.mma (sm_100) from 64 rows
  a tile on and mma.sync below, v_mfma (gfx942). Dots of fp32 operands in "ieee" precision have none;
- a kernel's wgmmas wait for one another, which ptxas remarks on: a loop that may be empty is enough for that;
- a kernel or an entry of a table is reached by no case, or something does not compile.
A public function that raises, or a shape without an entry in a table, ends it with the traceback.

fp32 is compiled in the kernels' default precision. Results are kept by a hash of the kernel's source, its
specialisation, its options and Triton's version.
"""

import os

os.environ["TRITON_INTERPRET"] = "0"  # read when a kernel is defined: here it is to be compiled

import argparse
import ast
import contextlib
import functools
import hashlib
import importlib
import inspect
import io
import itertools
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from xlmr.kernels import _launch, _norm, _products

from . import compile_cases, harness
from .command import exit_with
from .compile_cases import Case

INSTRUCTIONS = {
    "mma.sync": r"\bmma\.sync",
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05.mma": r"\btcgen05\.mma\b",
    "v_mfma": r"\bv_mfma",
}


@dataclass(frozen=True)
class Target:
    gpu: GPUTarget
    shared: int  # bytes of shared memory (LDS) a program may have
    processors: int
    small_dot: str  # the tensor-core instruction of tiles below 64 rows
    dot: str  # and from 64 rows on


TARGETS = {
    # 163 KiB there, but its table serves sm_86 and sm_89 as well
    "sm_80": Target(GPUTarget("cuda", 80, 32), 99 << 10, 108, "mma.sync", "mma.sync"),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 << 10, 132, "mma.sync", "wgmma"),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 << 10, 148, "mma.sync", "tcgen05.mma"),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 << 10, 304, "v_mfma", "v_mfma"),
}
PORTABLE_ON = "sm_80"  # what serves NVIDIA's targets without a table must fit the least of them; AMD's all have one
SHARED = (_norm, _products)  # whose kernels and tables several others use


@dataclass(frozen=True)
class Dot:
    rows: int
    exempt: bool  # fp32 operands in "ieee" precision: no tensor core


@dataclass
class Measured:
    """What one compiled kernel needs."""

    registers: int = 0
    spilled: int = 0  # vector registers (AMD)
    stack: int = 0  # bytes a thread
    shared: int = 0  # bytes a program
    instructions: dict[str, int] = field(default_factory=dict)
    dots: list[Dot] = field(default_factory=list)
    plain_dots: int = 0  # without a tensor core
    serialised: bool = False  # each wgmma waits for the one before
    error: str = ""

    def problems(self, target: Target) -> list[str]:
        if self.error:
            return [self.error]
        found = []
        if self.shared > target.shared:
            found.append(f"{self.shared / 1024:.0f} KiB of shared memory, {target.shared >> 10} are there")
        if self.stack:
            found.append(f"a stack of {self.stack} bytes a thread")
        if self.spilled:
            found.append(f"{self.spilled} spilled vector registers")
        wanted = {target.dot if dot.rows >= 64 else target.small_dot for dot in self.dots if not dot.exempt}
        found += [f"a dot without {name}" for name in sorted(wanted - self.instructions.keys())]
        if wanted:
            found += [f"a dot on {name}" for name in sorted(self.instructions.keys() - wanted)]
        if self.plain_dots and not any(dot.exempt for dot in self.dots):
            found.append("a dot without tensor cores")
        if self.serialised:
            found.append("wgmma one after the other (ptxas' remark C7515)")
        return found


@dataclass
class Job:
    """One compilation: a kernel with all that Triton specialises it for, and which tables and cases lead to it."""

    source: ASTSource
    target: str
    options: dict[str, Any]
    tables: set[str] = field(default_factory=set)
    cases: list[str] = field(default_factory=list)

    @functools.cached_property
    def key(self) -> str:
        options = sorted((name, str(value)) for name, value in self.options.items())
        signature = list(self.source.signature.items())
        parts = (triton.__version__, _measurement(), self.target, self.source.hash(), signature, options)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def row(self, measured: Measured) -> dict[str, Any]:
        names, types = self.source.fn.arg_names, self.source.signature
        tiles = {names[path[0]]: value for path, value in self.source.constants.items() if len(path) == 1}
        pointers = [str(kind) for kind in types.values() if str(kind).startswith(("*", "tensordesc<"))]
        floats = [kind for pointer in pointers for kind in ("bf16", "fp16", "fp32") if kind in pointer]
        return {
            "kernel": f"{self.source.fn.__module__.rpartition('.')[2]}.{self.source.fn.__name__}",
            "for": " ".join(sorted({case.split()[0] for case in self.cases})),
            "target": self.target,
            "tables": " ".join(sorted(self.tables)),
            "dtype": floats[0] if floats else "int",
            "configuration": " ".join(
                [f"{name}={value}" for name, value in tiles.items() if name.isupper() and value is not None]
                + [f"warps={self.options['num_warps']}", f"stages={self.options['num_stages']}"]
            ),
            "descriptors": sum(pointer.startswith("tensordesc") for pointer in pointers),
            "registers": measured.registers,
            "spilled": measured.spilled,
            "stack": measured.stack,
            "shared_kib": round(measured.shared / 1024, 1),
            "tensor_cores": " ".join(f"{count} {name}" for name, count in measured.instructions.items()) or "-",
            "cases": self.cases,
            "problems": measured.problems(TARGETS[self.target]),
        }


# ---- What is launched ----


class Driver:
    """All that Triton asks of a driver before it compiles."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target].gpu

    def get_current_device(self) -> str:
        return self.target  # JITFunction keeps one set of kernels a device

    def get_current_stream(self, device: str) -> int:
        return 0


class Recorder:
    """Runs cases for one target after the other and keeps every kernel they would have launched."""

    def __init__(self, modules: Sequence[ModuleType]) -> None:
        self.modules = modules
        self.jobs: dict[str, Job] = {}
        self.entries: set[tuple[int, str, object]] = set()  # id of the table, its key, bucket

    def run(self, cases: Iterable[Case], target: str, table: str) -> None:
        """Runs `cases` as on `target`, with configurations from the table of that name."""
        for name, call in cases:
            with self._pretending(target, table, name), torch.no_grad():
                call()

    @contextlib.contextmanager
    def _pretending(self, target: str, table: str, case: str) -> Iterator[None]:
        def record(
            kernel: JITFunction,
            key: str,
            signature: Any,
            device: str,
            constants: Any,
            options: Any,
            attributes: Any,
            *_: Any,
        ) -> None:
            job = Job(ASTSource(kernel, signature, constants, attributes), target, dict(vars(options)))
            job = self.jobs.setdefault(job.key, job)
            job.tables.add(table)
            job.cases.append(case)

        def pick(configurations: _launch.Table, device: torch.device, bucket: object) -> _launch.Config:
            key = table if table in configurations else "portable"
            self.entries.add((id(configurations), key, bucket))
            return configurations[key][bucket]

        pretended = {
            "unsupported": lambda device: None,
            "target": lambda device: target,
            "processors": lambda device: TARGETS[target].processors,
            "pick": pick,
        }
        active = triton.runtime.driver._active
        triton.runtime.driver.set_active(Driver(target))
        with contextlib.ExitStack() as stack:
            stack.callback(triton.runtime.driver.set_active, active)
            stack.enter_context(mock.patch.object(JITFunction, "_do_compile", record))
            stack.enter_context(mock.patch.object(torch, "empty", _allocated))
            stack.enter_context(mock.patch.object(_launch, "REMEMBERS", False))
            for module, (name, value) in itertools.product({_launch, *SHARED, *self.modules}, pretended.items()):
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, value))
            yield

    def uncovered(self, runs: Sequence[tuple[str, str]]) -> list[str]:
        """The kernels, and the entries that the tables have for `runs` (target, table), that no case reached."""
        reached = _with_helpers({job.source.fn for job in self.jobs.values()})
        found = []
        for module in self.modules:
            file = module.__name__.rpartition(".")[2]
            for name, value in vars(module).items():
                if isinstance(value, JITFunction) and value.__module__ == module.__name__ and value not in reached:
                    found.append(f"not covered: {file}.{name} is launched by no case")
                if isinstance(value, Mapping) and "portable" in value:
                    found += [
                        f"not covered: {file}.{name}[{key!r}][{bucket!r}] is chosen by no case"
                        for key in dict.fromkeys(table if table in value else "portable" for _, table in runs)
                        for bucket in value[key]
                        if (id(value), key, bucket) not in self.entries
                    ]
                    unknown = value.keys() - {"portable", *TARGETS}
                    found += [f"{file}.{name}[{key!r}] is for a target this gate does not know" for key in unknown]
        return found


def _allocated(*size: Any, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
    """As torch.empty; integers are 0, for they may be indices that no kernel wrote."""
    return _empty(*size, dtype=dtype) if dtype.is_floating_point else torch.zeros(*size, dtype=dtype)


_empty = torch.empty


def _with_helpers(kernels: set[JITFunction]) -> set[JITFunction]:
    """The kernels, and the @triton.jit functions that they call."""
    reached: set[JITFunction] = set()
    waiting = list(kernels)
    while waiting:
        function = waiting.pop()
        if function not in reached:
            reached.add(function)
            names = {node.id for node in ast.walk(function.parse()) if isinstance(node, ast.Name)}
            called = (function.fn.__globals__.get(name) for name in names)
            waiting += [value for value in called if isinstance(value, JITFunction)]
    return reached


def _one_line(error: Exception) -> str:
    """The last line of its first cause: Triton puts excerpts of the source before the reason."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else ""


# ---- What comes out ----


def compiled(job: Job, launched: bool = False) -> Measured:
    """Compiles; Triton's own cache keeps only what is to be `launched` next."""
    with contextlib.ExitStack() as stack:
        if not launched:
            directory = stack.enter_context(tempfile.TemporaryDirectory())
            stack.enter_context(mock.patch.dict(os.environ, TRITON_CACHE_DIR=directory))
        try:
            stack.enter_context(mock.patch.dict(os.environ, TRITON_DUMP_PTXAS_LOG="1"))
            log = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            kernel = triton.compile(job.source, target=TARGETS[job.target].gpu, options=job.options)
        except Exception as error:  # a compiler fails in many ways; the other kernels are still of interest
            return Measured(error=f"does not compile: {type(error).__name__}: {_one_line(error)}")
        return replace(measured(kernel.asm, kernel.metadata.shared), serialised="(C7515)" in log.getvalue())


def measured(asm: Mapping[str, Any], shared: int) -> Measured:
    text = asm["amdgcn"] if "amdgcn" in asm else asm["ptx"]
    counts = {name: len(re.findall(pattern, text)) for name, pattern in INSTRUCTIONS.items()}
    resources = _amd_resources(text) if "amdgcn" in asm else _nvidia_resources(asm["cubin"])
    return Measured(
        shared=shared,
        instructions={name: count for name, count in counts.items() if count},
        dots=dots(asm["ttir"]),
        plain_dots=len(re.findall(r"tt\.dot .*-> tensor<[^>]*#blocked", asm["ttgir"])),
        **resources,
    )


def dots(ttir: str) -> list[Dot]:
    pattern = r"tt\.dot (.*?): tensor<\S*x(\w+)> \* tensor<.*?> -> tensor<(\d+)x"
    return [
        Dot(int(rows), operand == "f32" and ("inputPrecision" not in arguments or "ieee" in arguments))
        for arguments, operand, rows in re.findall(pattern, ttir)
    ]


@functools.cache
def _measurement() -> str:
    """The code that results in the cache depend on."""
    code = "".join(map(inspect.getsource, (compiled, measured, dots, _nvidia_resources, _amd_resources)))
    return code + repr(INSTRUCTIONS)


def _nvidia_resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "stack": found["STACK"] + found["LOCAL"]}


def _amd_resources(amdgcn: str) -> dict[str, int]:
    found = {name: int(value) for name, value in re.findall(r"^ +(?:- )?\.(\w+): +(\d+)$", amdgcn, re.MULTILINE)}
    stack = found["private_segment_fixed_size"]
    if not stack and re.search(r"\bscratch_(load|store)", amdgcn):
        stack = 1
    return {"registers": found["vgpr_count"], "spilled": found["vgpr_spill_count"], "stack": stack}


# ---- The gate ----


def gate(
    cases: Sequence[Case], modules: Sequence[ModuleType], targets: Sequence[str], cache: Path, processes: int = 2
) -> tuple[list[dict[str, Any]], list[str]]:
    """Compiles what `cases` launch from `modules` for each target: the rows of the table, and every problem."""
    recorder = Recorder(modules)
    runs = [(target, target) for target in targets] + [(PORTABLE_ON, "portable")] * (PORTABLE_ON in targets)
    for target, table in runs:
        recorder.run(cases, target, table)
    jobs = list(recorder.jobs.values())
    rows = [job.row(result) for job, result in zip(jobs, _results(jobs, cache, processes), strict=True)]
    rows.sort(key=lambda row: [row[name] for name in ("kernel", "for", "target", "tables", "dtype", "configuration")])
    problems = recorder.uncovered(runs)
    problems += [
        f"{row['kernel']} on {row['target']} ({row['tables']}; {row['cases'][0]}; {row['configuration']}): {problem}"
        for row in rows
        for problem in row["problems"]
    ]
    return rows, problems


def _results(jobs: list[Job], cache: Path, processes: int, launched: bool = False) -> list[Measured]:
    """In the jobs' order; those that the cache does not know are compiled in parallel; `launched`: see compiled."""
    cache.mkdir(parents=True, exist_ok=True)
    missing = [job for job in jobs if not (cache / f"{job.key}.json").exists()]
    if missing:
        # Forked: a kernel cannot be pickled. A worker inherits the list and is sent indices.
        with multiprocessing.get_context("fork").Pool(processes, _inherit, [missing, launched]) as pool:
            results = pool.imap_unordered(_compile, range(len(missing)))
            for index, result in tqdm(results, total=len(missing), desc="compiling", file=sys.stderr):
                path = cache / f"{missing[index].key}.json"
                unfinished = path.with_suffix(f".{os.getpid()}")
                unfinished.write_text(json.dumps(asdict(result)), encoding="utf-8")
                unfinished.replace(path)
    return [_read(cache / f"{job.key}.json") for job in jobs]


def _read(path: Path) -> Measured:
    found = json.loads(path.read_text(encoding="utf-8"))
    return Measured(**{**found, "dots": [Dot(**dot) for dot in found["dots"]]})


_inherited: list[tuple[Job, bool]] = []


def _inherit(jobs: list[Job], launched: bool) -> None:
    _inherited[:] = [(job, launched) for job in jobs]


def _compile(index: int) -> tuple[int, Measured]:
    return index, compiled(*_inherited[index])


COLUMNS = [
    "kernel", "for", "target", "tables", "dtype", "configuration", "registers", "spilled", "stack", "shared_kib",
    "tensor_cores",
]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compile_gate", description=__doc__.split("\n")[0])
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS), help="default: all")
    files = list(compile_cases.KERNELS)
    parser.add_argument("--kernel", nargs="+", choices=files, default=files, help="files of kernels/; default: all")
    parser.add_argument("--json", action="store_true", help="the table and the problems as JSON")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/xlmr/compile_gate", metavar="DIR")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args(arguments)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9's default; unset, it warns
    kernels = {name: importlib.import_module(f"xlmr.kernels.{name}") for name in given.kernel}
    modules = [*kernels.values(), *(SHARED if len(kernels) == len(files) else ())]
    rows, problems = gate(compile_cases.cases(kernels), modules, given.target, given.cache, given.processes)
    if given.json:
        print(json.dumps({"triton": triton.__version__, "rows": rows, "problems": problems}, indent=1))
    else:
        print(harness.table(rows, COLUMNS))
        print(f"\n{len(rows)} compilations with Triton {triton.__version__}, {len(problems)} problems")
        print(*problems, sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    exit_with(main)
