"""Measuring side by side: correctness first, interleaved calls, medians and quantiles, the environment beside them."""

import csv
import functools
import importlib.metadata
import json
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xlmr import eager
from xlmr.ops import Check, compare

RESULTS = Path(__file__).parent / "results"
MODES = ("forward", "backward", "full")
LEAD = 1_000_000  # cycles, about half a millisecond: a kernel's call, and its backward, are launched in less
UNFINISHED = 75  # the exit status of a command that ran out of time: EX_TEMPFAIL
OURS = "xlmr"  # how the names of this package's providers begin
# Liger-Kernel's columns, with our version for theirs, then what else a figure needs to be read.
COLUMNS = (
    "kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "metric_unit", "gpu_name",
    "x_name", "x_label", "x_value", "y_value_50", "y_value_20", "y_value_80", "extra_benchmark_config_str",
    "timestamp", "xlmr_version", "gflops", "gbytes", "roof", "fraction_of_roof", "error", "bound",
    "commit", "torch", "triton", "driver", "clocks",
)  # fmt: skip

# What tables show, of COLUMNS and of what bench_model measures.
KERNEL_COLUMNS = (
    "kernel_name", "kernel_operation_mode", "extra_benchmark_config_str", "x_name", "x_value", "kernel_provider",
    "y_value_50", "y_value_20", "y_value_80", "roof", "fraction_of_roof",
)  # fmt: skip
MODEL_COLUMNS = (
    "case", "dtype", "provider", "median_ms", "q20_ms", "q80_ms", "ratio", "max_difference", "peak_mib",
    "tokens_per_s", "padding", "mfu", "host_share", "cold_s",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Case:
    """One point of a sweep. `inputs` are made anew from a generator; every provider is called with them and returns one
    tensor or a tuple; the first provider, xlmr's eager twin, is the judge when its inputs are float64. `wanted` are the
    positions of the inputs that get gradients; `cost(backward)` is (flops, bytes) at least."""

    kernel: str
    operation: str
    x_name: str
    x_label: str
    x_value: int
    inputs: Callable[[], tuple[Any, ...]]
    providers: dict[str, Callable[..., Any]]
    cost: Callable[[bool], tuple[int, int]]
    wanted: tuple[int, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> str:
        """What the cases of one group share."""
        return ", ".join(f"{k}={v}" for k, v in {**self.settings, self.x_name: self.x_value}.items())


def environment() -> dict[str, Any]:
    """What the figures were measured on and with."""
    packages = ("torch", "triton", "transformers", "tokenizers", "sentencepiece")
    driver, clocks = _nvidia("driver_version"), _nvidia("clocks.sm,clocks.mem")
    return {
        "date": date.today().isoformat(),
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "driver": driver,
        "clocks": clocks,
    }


def interleaved(
    candidates: dict[str, Callable[[], Any]], rounds: int, warm_up: int = 2, lead: int = 0
) -> dict[str, list[float]]:
    """Seconds of `rounds` calls of each candidate, in turn, so that a disturbance meets them all: by CUDA events where
    there is a GPU, by the wall clock elsewhere. `lead`: cycles of the GPU by which the host is ahead of a call, so that
    launching does not count."""
    for _ in range(warm_up):
        for call in candidates.values():
            call()
    clock = functools.partial(_cuda_clock, lead=lead) if torch.cuda.is_available() else _wall_clock
    readings: dict[str, list[Callable[[], float]]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            readings[name].append(clock(call))
    return {name: [read() for read in reads] for name, reads in readings.items()}


def _wall_clock(call: Callable[[], Any]) -> Callable[[], float]:
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    return lambda: seconds


def _cuda_clock(call: Callable[[], Any], lead: int = 0) -> Callable[[], float]:
    """Read after all rounds, so that no synchronisation stands between the calls."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if lead:
        torch.cuda._sleep(lead)
    start.record()
    call()
    end.record()

    def read() -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return read


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Median and the 20 % and 80 % quantiles, in milliseconds."""
    cut = statistics.quantiles(seconds * 2 if len(seconds) == 1 else seconds, n=5, method="inclusive")
    return {"median_ms": 1e3 * statistics.median(seconds), "q20_ms": 1e3 * cut[0], "q80_ms": 1e3 * cut[3]}


def measure(case: Case, modes: Sequence[str] = MODES, seconds: float = 1.0) -> Iterator[dict[str, Any]]:
    """Rows of COLUMNS: every provider of a case in every mode that gradients allow. A provider that is wrong, by the
    rule of the tests, is reported and not timed; one that cannot run says why. Of this package's own either is an
    error: RuntimeError."""
    dtype = next(t.dtype for t in _inputs(case) if isinstance(t, Tensor) and t.is_floating_point())
    for mode in modes if case.wanted else ("forward",):
        calls, checks = {}, {}
        for name, provider in case.providers.items():
            try:
                checks[name] = check(case, provider, mode)
            except Exception as error:  # what this machine lacks makes others fail in many ways
                if name.startswith(OURS) and not isinstance(error, torch.OutOfMemoryError):
                    raise
                log(f"{case.kernel} {case.shape}: {name} cannot run: {reason(error)}")
                continue
            if not checks[name].right:
                message = f"{case.kernel} {case.shape}: {name} is wrong by {checks[name].error:.2e}; not measured"
                if name.startswith(OURS):
                    raise RuntimeError(message)
                log(message)
                continue
            calls[name] = timed(provider, case, mode)
        rounds, warm_up = _rounds(calls, seconds)
        for name, times in interleaved(calls, rounds, warm_up, lead=LEAD).items():
            yield _row(case, mode, name, quantiles(times), checks[name], roofs(dtype))


def reason(error: Exception) -> str:
    """The first line of what it says."""
    return str(error).partition("\n")[0] or type(error).__name__


def _row(
    case: Case, mode: str, provider: str, found: dict[str, float], check: Check, roof: tuple[float, float]
) -> dict[str, Any]:
    passes = {"forward": (False,), "backward": (True,), "full": (False, True)}[mode]
    flops, size = (sum(part) for part in zip(*map(case.cost, passes), strict=True))
    compute, memory = flops / roof[0], size / roof[1]
    return {
        "kernel_name": case.operation,
        "kernel_provider": provider,
        "kernel_operation_mode": mode,
        "metric_name": "speed",
        "metric_unit": "ms",
        "gpu_name": device_name(),
        "x_name": case.x_name,
        "x_label": case.x_label,
        "x_value": case.x_value,
        "y_value_50": found["median_ms"],
        "y_value_20": found["q20_ms"],
        "y_value_80": found["q80_ms"],
        "extra_benchmark_config_str": json.dumps(case.settings),
        "timestamp": time.strftime("%Y-%m-%d %H:%M:%S"),
        "xlmr_version": _version("xlmr"),
        "gflops": flops / 1e9,
        "gbytes": size / 1e9,
        "roof": "compute" if compute > memory else "bandwidth",
        "fraction_of_roof": 1e3 * max(compute, memory) / found["median_ms"],
        "error": check.error,
        "bound": check.bound,
        **_stamp(),
    }


def check(case: Case, provider: Callable[..., Any], mode: str) -> Check:
    """Whether a provider is right by the rule of the tests: at most twice as far from float64 as the eager twin."""
    return _check(case, provider, mode != "forward")


@functools.lru_cache(maxsize=64)  # the same for "backward" and "full"
def _check(case: Case, provider: Callable[..., Any], backward: bool) -> Check:
    found = _results(provider, _inputs(case), case.wanted, backward)
    return compare(case.operation, found, *_judged(case, backward))


@functools.lru_cache(maxsize=1)  # the same for every provider
def _judged(case: Case, backward: bool) -> tuple[Any, Any]:
    """What the eager twin computes, in the case's dtype and in float64."""
    judge, inputs = next(iter(case.providers.values())), _inputs(case)
    return tuple(_results(judge, given, case.wanted, backward) for given in (inputs, _double(inputs)))


def _made(case: Case) -> tuple[Any, ...]:
    """New inputs, always the same."""
    torch.manual_seed(0)
    made = case.inputs()
    return tuple(t.requires_grad_(True) if i in case.wanted else t for i, t in enumerate(made))


_inputs = functools.lru_cache(maxsize=1)(_made)  # a large weight takes longer to draw than to multiply with


def _double(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        t.detach().double().requires_grad_(t.requires_grad) if isinstance(t, Tensor) and t.is_floating_point() else t
        for t in inputs
    )


def _upstream(out: Any) -> list[Tensor]:
    """Random gradients, the same for every provider and dtype."""
    outputs = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator(outputs[0].device).manual_seed(1)  # a CPU would draw those of a GPU's cases for seconds
    return [torch.randn(o.shape, generator=generator, device=o.device).to(o) for o in outputs]


def _results(provider: Callable[..., Any], inputs: tuple[Any, ...], wanted: tuple[int, ...], backward: bool) -> Any:
    """What a provider computes: its outputs, or their gradients."""
    if not backward:
        with torch.no_grad():
            return provider(*inputs)
    out = provider(*inputs)
    return torch.autograd.grad(out, [inputs[i] for i in wanted], _upstream(out))


def timed(provider: Callable[..., Any], case: Case, mode: str) -> Callable[[], Any]:
    """A call of `provider`, each on the next of several copies of the inputs: so many that none is in a GPU's cache."""
    size = sum(t.nbytes for t in _inputs(case) if isinstance(t, Tensor))
    count = min(32, 1 + 4 * _cache_bytes() // max(size, 1))
    copies = [_inputs(case), *(_made(case) for _ in range(count - 1))]
    turn = iter(range(1 << 62))

    def arguments() -> tuple[Any, ...]:
        return copies[next(turn) % count]

    if mode == "forward":
        return torch.no_grad()(lambda: provider(*arguments()))
    gradients = _upstream(provider(*copies[0]))
    if mode == "full":

        def full() -> Any:
            given = arguments()
            return torch.autograd.grad(provider(*given), [given[i] for i in case.wanted], gradients)

        return full
    graphs = [(provider(*given), [given[i] for i in case.wanted]) for given in copies]

    def backward() -> Any:
        out, given = graphs[next(turn) % count]
        return torch.autograd.grad(out, given, gradients, retain_graph=True)

    return backward


def _rounds(calls: dict[str, Callable[[], Any]], seconds: float) -> tuple[int, int]:
    """So many rounds that they take about `seconds`, at least five; and how many before: where one takes that long, the
    two of this trial have warmed up enough."""
    once = sum(t[-1] for t in interleaved(calls, 1, warm_up=1).values())
    return max(5, min(200, int(seconds / max(once, 1e-6)))), 2 if once < seconds else 0


@functools.cache
def roofs(dtype: torch.dtype) -> tuple[float, float]:
    """What measured_roofs found the first time."""
    return measured_roofs(dtype)


def measured_roofs(dtype: torch.dtype, rounds: int = 10) -> tuple[float, float]:
    """(flop/s, bytes/s) of this machine, measured: the faster of torch's and our eager product of two large matrices,
    and a copy, each at its best."""
    gpu = torch.cuda.is_available()
    device, n = ("cuda", 8192) if gpu else ("cpu", 2048)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    source = torch.empty((1 << 30) if gpu else (1 << 27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ways = {"mm": lambda: a @ b, "linear": lambda: eager.linear(a, b, None), "copy": lambda: target.copy_(source)}
    times = {name: min(seconds) for name, seconds in interleaved(ways, rounds).items()}
    return 2 * n**3 / min(times["mm"], times["linear"]), 2 * source.numel() / times["copy"]


def peak_of(call: Callable[[], Any]) -> int:
    """Bytes that one call adds at its peak: of the GPU's memory, or of the process's resident set (Linux)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    call()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) << 10


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU: {_cpu()}"


def append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Adds rows to a CSV file of COLUMNS."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def table(rows: list[dict[str, Any]], columns: Sequence[str]) -> str:
    """Rows as aligned text; numbers with three digits that count."""
    cells = [list(columns), *([text(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def write(name: str | Path, results: dict[str, Any]) -> Path:
    """Writes bench/results/<name>.json, or the file of that path; never half, for a round may end this process."""
    path = name if isinstance(name, Path) else RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return unfinished.replace(path)


def log(message: str) -> None:
    """To stderr: standard output is for data."""
    print(message, file=sys.stderr, flush=True)


def text(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if value >= 1e3 else f"{value:.3g}"


@functools.cache
def _stamp() -> dict[str, Any]:
    found = environment()
    return {name: found[name] for name in ("commit", "torch", "triton", "driver", "clocks")}


def _cache_bytes() -> int:
    """The L2 of the GPU; on a CPU inputs are used as they are, for a model's rows come from its cache too."""
    return torch.cuda.get_device_properties(0).L2_cache_size if torch.cuda.is_available() else 0


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())


def _nvidia(fields: str) -> str | None:
    """A GPU's facts from nvidia-smi; None where there is none."""
    if not torch.cuda.is_available() or torch.version.hip:
        return None
    return _said("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")


def _commit() -> str | None:
    return _said("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")


def _said(*command: str) -> str | None:
    """What a command prints; None where it prints nothing, or is not there."""
    if shutil.which(command[0]) is None:
        return None
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
