"""One case of bench_model: who runs and is right, how long it takes, and what else a figure needs to be read."""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import harness, providers
from .providers import GRAPH, JUDGE, PROVIDERS, Call, NotHere
from .shapes import DTYPES, Case

ROOT = Path(__file__).parent.parent
# Of the largest and of the root mean square difference, in standard deviations of the output.
LIMITS = {"fp32": (1e-3, 1e-4), "bf16": (0.5, 0.05)}
LONGEST_CALL = 10.0  # seconds that one call may take
CASE_SECONDS = 12.0  # that the measured calls of one case may take, if three of each provider take less

ROOFS: dict[str, float] = {}  # flop/s of the machine's matrix product by dtype, the best measured in this run


class Wrong(Exception):
    """A provider's output is not the judge's: nothing of the case is measured."""


@dataclass
class Found:
    """Rows of MODEL_COLUMNS, and who was not run: case, provider, reason."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    not_run: list[dict[str, str]] = field(default_factory=list)

    def leave_out(self, case: str, reason: str, *names: str) -> None:
        """Notes and says that these providers are not run."""
        harness.log(f"  not run: {'; '.join(names)}: {reason}")
        self.not_run += [{"case": case, "provider": name, "reason": reason} for name in names]


@torch.inference_mode()
def measure(case: Case, rounds: int, chosen: Iterable[str] | None = None) -> Found:
    """A row of MODEL_COLUMNS for each provider of a case; the ratio is the time of transformers (sdpa) over its own."""
    found, seconds = Found(), predicted(case)
    if seconds > LONGEST_CALL:
        found.leave_out(case.title, f"a call would take about {seconds:.0f} s", "all")
        return found
    given = providers.prepare(case)
    calls, differences = checked(given, wanted(case, chosen, found), found)
    if not calls:
        return found
    times = timed(calls, rounds * (5 if len(case.lens) == 1 or torch.cuda.is_available() else 1))
    base = times.get(JUDGE, {}).get("median_ms")
    for name, t in times.items():
        row = {"case": case.name, "dtype": case.dtype, "provider": name, **t, "max_difference": differences[name]}
        row |= {"ratio": base / t["median_ms"]} if base else {}
        found.rows.append(row | facts(case, t["median_ms"] / 1e3) | resources(case, name, calls[name]))
    if case.group == "headline" and len(case.lens) > 1:
        add_cold_starts(given, found.rows)
    return found


def roof(dtype: str) -> float:
    """Measured anew before every case: one that somebody disturbed would flatter every model."""
    ROOFS[dtype] = max(ROOFS.get(dtype, 0.0), harness.measured_roofs(DTYPES[dtype], rounds=3)[0])
    return ROOFS[dtype]


def add_utilisation(rows: Iterable[dict[str, Any]]) -> None:
    """mfu: what the real tokens have to compute over what the best roof so far would compute in the row's time."""
    for row in rows:
        if "gflops" in row:
            row["mfu"] = row["gflops"] * 1e9 / (row["median_ms"] / 1e3) / ROOFS[row["dtype"]]


def predicted(case: Case) -> float:
    """Seconds of a call on a CPU: the padded batch's products with weights at half the machine's rate, its attention at
    a tenth, as torch's has been seen to run. On a GPU all calls are short."""
    rate = roof(case.dtype)
    products, scores = case.work([max(case.lens)] * len(case.lens))
    return 0.0 if torch.cuda.is_available() else (2 * products + 10 * scores) / rate


def wanted(case: Case, chosen: Iterable[str] | None, found: Found) -> list[str]:
    """The providers to measure: those asked for, or the case's own."""
    if chosen is not None:
        return [name for name in PROVIDERS if name in set(chosen)]
    if case.providers is None:
        return list(PROVIDERS)
    others = [name for name in PROVIDERS if name not in case.providers]
    found.leave_out(case.title, "not in this case by default, to save time: see --providers", "; ".join(others))
    return list(case.providers)


def checked(given: providers.Setting, names: Iterable[str], found: Found) -> tuple[dict[str, Call], dict[str, float]]:
    """The calls that run here, and how far each is at most from the judge; Wrong if one is too far."""
    case, calls, differences = given.case, {}, {}
    exact = given.read(providers.padded(given.reference, given)())
    for name in names:
        try:
            call = PROVIDERS[name](given)
            out = given.read(call())
        except Exception as error:  # what this machine lacks makes others fail in many ways
            if name.startswith(harness.OURS) and not isinstance(error, NotHere | torch.OutOfMemoryError):
                raise Wrong(f"{name} failed: {error}") from error
            found.leave_out(case.title, harness.reason(error), name)
            continue
        worst, typical = apart(out, exact)
        if not (worst <= LIMITS[case.dtype][0] and typical <= LIMITS[case.dtype][1]):
            raise Wrong(f"{name} differs by {worst:.3g} (typically {typical:.3g}) standard deviations")
        calls[name], differences[name] = call, worst
    return calls, differences


def apart(out: Tensor, exact: Tensor) -> tuple[float, float]:
    """The largest and the root mean square difference, in standard deviations of `exact`; infinite for other shapes."""
    if out.shape != exact.shape:
        return float("inf"), float("inf")
    difference = (out - exact) / exact.std()
    return difference.abs().max().item(), difference.square().mean().sqrt().item()


def timed(calls: dict[str, Call], rounds: int) -> dict[str, dict[str, float]]:
    """Quantiles of each; fewer rounds where they would take long, but three, of which a trial is then the first."""
    trial = harness.interleaved(calls, 1, warm_up=0)  # the check warmed up
    once = sum(seconds[0] for seconds in trial.values())
    rounds = max(3, min(rounds, int(CASE_SECONDS / once)))
    if once < 1:
        trial, rest = {name: [] for name in calls}, harness.interleaved(calls, rounds)
    else:
        rest = harness.interleaved(calls, rounds - 1, warm_up=0)
    return {name: harness.quantiles(trial[name] + rest[name]) for name in calls}


def facts(case: Case, seconds: float) -> dict[str, Any]:
    """What follows from a call's time."""
    tokens = sum(case.lens)
    return {
        "group": case.group, "size": case.size, "longest": max(case.lens), "tokens": tokens,
        "tokens_per_s": tokens / seconds, "padding": case.padding, "gflops": case.flops() / 1e9,
    }  # fmt: skip


def resources(case: Case, provider: str, call: Call) -> dict[str, float]:
    """Memory, and how long the host is busy. On a CPU only the headline's memory, for each needs its own process."""
    if torch.cuda.is_available():
        memory = {} if provider == GRAPH else {"peak_mib": harness.peak_of(call) / 2**20}  # a graph holds its own
        return {**memory, "host_share": host_share(call)}
    if case.group != "headline" or len(case.lens) == 1:
        return {}
    return {"peak_mib": in_own_process("bench.bench_model", "--peak-of", provider, case.name, case.dtype)}


def host_share(call: Call, rounds: int = 5) -> float:
    """The share of a call's time on the GPU's clock after which the host goes on."""

    def once() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        returned = time.perf_counter()
        torch.cuda.synchronize()
        return (returned - start) / (time.perf_counter() - start)

    return statistics.median(once() for _ in range(rounds))


def add_cold_starts(given: providers.Setting, rows: list[dict[str, Any]]) -> None:
    """From import to first answer, of the providers that are nothing but a library's model."""
    with tempfile.TemporaryDirectory() as folder:
        given.reference.save_pretrained(folder)
        for row in rows:
            if row["provider"].partition(" ")[2] in ("sdpa", "eager", "prepacked", "triton"):
                try:
                    row["cold_s"] = in_own_process("bench.cold", folder, row["provider"], str(providers.device()))
                except subprocess.CalledProcessError as error:  # the rows that were measured stay
                    harness.log(f"  no cold start of {row['provider']}: {error.stderr.strip().splitlines()[-1:]}")


def in_own_process(*command: str) -> float:
    """The number that a module of this package prints."""
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout)


@torch.inference_mode()
def peak_memory(provider: str, case: Case) -> float:
    """MiB that one forward adds to the resident set of this process, which holds the model (Linux)."""
    PROVIDERS[provider](providers.prepare(replace(case, lens=(8,))))()  # libraries allocate for good at the first call
    call = PROVIDERS[provider](providers.prepare(case))
    return harness.peak_of(call) / 2**20
