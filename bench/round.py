"""All that this machine can measure, in one command: `python -m bench.round --out DIR --minutes 9`.

The parts run one after the other in processes of their own, the most telling first, each with its share of the time
that is left; what a part measured is on disk when it ends, and a part that is done is not run again: a round that was
interrupted, or ran out of time, goes on. At the end DIR/report.html shows everything, pictures included, in one file.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from . import harness, report
from .command import exit_with

# Those that take longest last; their weights on a CPU: the seconds that each takes on two cores.
KERNELS = {"attention": 35, "layer_norm": 15, "embedding": 15, "linear": 50, "vocab_softmax": 75}
LEAST_SECONDS = 10  # a part gets no less; where less is left, it is left for another time


@dataclass(frozen=True)
class Part:
    """A part of a round: its command, its weight when the time left is divided among the parts left, and whether the
    command is told, as --minutes, to begin nothing new after nine tenths of its time. What a part does not need is the
    others'."""

    name: str
    command: tuple[str, ...]
    weight: float
    timed: bool = False


def parts(out: Path, gpu: bool, tune: bool = False) -> list[Part]:
    """In the order in which they run; `tune` is for a GPU."""
    python = (sys.executable, "-m")
    csv, seconds = str(out / "kernels.csv"), "0.3" if gpu else "0.1"
    found = []
    if gpu:
        found.append(Part("tests on the GPU", (*python, "bench.gpu_tests", "--out", str(out / "logs")), 300))
    if gpu and tune:  # what follows is measured with what it found
        tuning = (*python, "bench.tune", "--write", "--out", str(out / "tune.json"))
        found.append(Part("tuning", tuning, 350, timed=True))
    models = (*python, "bench.bench_model", "--rounds", "5", "--resume", "--out", str(out / "models.json"))
    found.append(Part("models", models, 150 if gpu else 320, timed=True))
    training = (*python, "bench.bench_model", "--train", "--out", str(out / "training.json"))
    found.append(Part("training", (*training, *(() if gpu else ("--layers", "4", "--vocab", "50002"))), 55))
    for kernel, weight in KERNELS.items():
        command = (*python, f"bench.bench_{kernel}", "--out", csv, "--seconds", seconds)
        found.append(Part(f"kernel {kernel}", command, 35 if gpu else weight))
    profile = (*python, "bench.profile", "--out", str(out / "profile"), "--layers", "12" if gpu else "4")
    found.append(Part("profile", (*profile, "--profiler", "torch"), 30))
    if gpu:
        found.append(Part("profile with Proton", (*profile, "--profiler", "proton"), 30))
    return found


def run(part: Part, out: Path, seconds: float) -> str:
    """Runs a part, its messages into DIR/logs; "done", "out of time" or "failed (exit …)"."""
    log = out / "logs" / f"{part.name.replace(' ', '-')}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [*part.command, *(["--minutes", str(0.9 * seconds / 60)] if part.timed else [])]
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return "out of time"
        finally:  # whatever it started would disturb the parts that follow
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return {0: "done", harness.UNFINISHED: "out of time"}.get(code, f"failed (exit {code}), see {log}")


def measure(todo: Sequence[Part], out: Path, minutes: float) -> dict[str, str]:
    """Runs the parts that have not been done; returns what became of each, as kept in DIR/state.json."""
    state_file = out / "state.json"
    state: dict[str, str] = json.loads(state_file.read_text(encoding="utf-8")) if state_file.exists() else {}
    end = time.monotonic() + 60 * minutes
    left = [part for part in todo if state.get(part.name) != "done"]
    for i, part in enumerate(bar := tqdm(left, unit="part")):
        bar.set_description(part.name)
        rest = end - time.monotonic()
        share = rest * part.weight / sum(other.weight for other in left[i:])
        seconds = min(rest, max(share, LEAST_SECONDS))
        state[part.name] = run(part, out, seconds) if seconds >= LEAST_SECONDS else "out of time"
        harness.write(state_file, state)
    return {part.name: state[part.name] for part in todo}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.round", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory to write into, or to go on with")
    parser.add_argument("--minutes", type=float, default=9, help="time for all parts together (default 9)")
    parser.add_argument("--tune", action="store_true", help="first tune the kernels' tables, and write them back")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    if args.tune and not gpu:
        parser.error("--tune measures on a GPU, and PyTorch sees none (torch.cuda.is_available() is False)")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that a part ends with the round
    harness.write(args.out / "environment.json", harness.environment())
    state = measure(parts(args.out, gpu, args.tune), args.out, args.minutes)
    print(harness.table([{"part": name, "result": found} for name, found in state.items()], ["part", "result"]))
    print(report.write(args.out, state))
    return 0 if all(not found.startswith("failed") for found in state.values()) else 1


if __name__ == "__main__":
    exit_with(main)
