"""The tests of kernels in several processes: `python -m bench.gpu_tests` is `pytest -m cuda` in a fraction of the time.

They compile about a thousand specialisations of the kernels, each on one core, and hardly use the GPU. Exit 1 where a
test failed; what each process said is printed as it ends, and stands in --out meanwhile.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from . import harness
from .command import exit_with

ROOT = Path(__file__).parent.parent
MOST = 12  # a process has its own context on the GPU, and spends seconds on imports


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_tests", description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, default=min(MOST, len(os.sched_getaffinity(0))))
    parser.add_argument("--out", type=Path, help="directory for what the processes say (default: a temporary one)")
    parser.add_argument("pytest", nargs="*", help="further arguments of pytest, after --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = args.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        running = {
            path: start(path, i, args.processes, args.pytest) for i, path in enumerate(logs(out, args.processes))
        }
        codes = []
        for path, process in running.items():
            codes.append(process.wait())
            print(path.read_text(encoding="utf-8"), flush=True)
    failed = sum(code not in (0, 5) for code in codes)  # 5: no test is its share
    harness.log(f"{len(codes) - failed} of {len(codes)} processes had no failing test")
    return int(failed > 0)


def logs(out: Path, count: int) -> list[Path]:
    return [out / f"tests-{i}-of-{count}.txt" for i in range(count)]


def start(log: Path, number: int, count: int, arguments: list[str]) -> "subprocess.Popen[bytes]":
    """pytest on one share of the tests; a kernel that breaks the context would fail all that follow: --maxfail."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail", "10", "--tb", "short"]
    with log.open("wb") as file:
        shard = ["--shard", f"{number}/{count}", "-m", "cuda"]
        return subprocess.Popen([*command, *shard, *arguments], cwd=ROOT, stdout=file, stderr=file)


if __name__ == "__main__":
    exit_with(main)
