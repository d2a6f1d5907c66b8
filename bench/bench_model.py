"""Whole models with equal weights, interleaved, correctness first: `python -m bench.bench_model`.

XLM-R-base and -large shapes with random weights: 32 texts at about 40 % fill and one text of 32 tokens first, the
tokenizers, then single texts, fixed lengths from 32 to 8,192 tokens, real mixes of lengths, and every head
(shapes.py); each against transformers in its ways (providers.py). What a machine lacks, or would take too long for, is
listed with the reason. Writes bench/results/model_cpu.json or model_gpu.json after every case and prints the table.
`--cpu` leaves a GPU out, `--train` measures training steps: see bench_training.py. From texts to vectors:
bench_encode.py.

Exit 1 where a provider of ours was wrong, 75 where something is left for another time (--resume).

tokens_per_s counts real tokens; mfu is what these have to compute over what the machine's matrix product, at the best
measured in the same run, computes in that time; host_share is the share of a call after which it returns (on a GPU);
cold_s is import, load and first call in a process of its own.
"""

import argparse
import functools
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

import xlmr
from xlmr.demo import CHECKPOINT, HELD_OUT

from . import harness, providers
from .command import exit_with
from .forward import ROOFS, ROOT, Found, Wrong, add_utilisation, measure, peak_memory
from .providers import PROVIDERS
from .shapes import BASE, cases, lengths

TOKENIZING, RUNTIMES = "tokenize 10,000", "other runtimes"
Job = tuple[str, Callable[[], Found]]


def sentences(count: int) -> list[str]:
    """Mixed sentences: words of the demo's held-out sentences in twelve languages, shuffled, 3 to 40 of them each."""
    words = HELD_OUT.read_text(encoding="utf-8").split()
    draw = random.Random(0)
    return [" ".join(draw.choices(words, k=draw.randint(3, 40))) for _ in range(count)]


def tokenizing(rounds: int) -> list[dict[str, Any]]:
    """10,000 sentences to ids: transformers' fast tokenizer and ours, on the demo's vocabulary."""
    texts = sentences(10_000)
    ours = xlmr.XLMRobertaTokenizer.from_pretrained(CHECKPOINT)
    theirs = transformers.AutoTokenizer.from_pretrained(CHECKPOINT)
    calls = {"transformers fast": lambda: theirs(texts)["input_ids"], "xlmr": lambda: ours(texts)["input_ids"]}
    same = sum(a == b for a, b in zip(*(call() for call in calls.values()), strict=True)) / len(texts)
    times = {name: harness.quantiles(t) for name, t in harness.interleaved(calls, rounds).items()}
    base = times["transformers fast"]["median_ms"]
    return [
        {"case": f"{TOKENIZING} ({same:.1%} equal)", "dtype": "", "provider": p, **t, "ratio": base / t["median_ms"]}
        for p, t in times.items()
    ]


def runtimes(rounds: int) -> Found:
    """ONNX Runtime and CTranslate2 on a CPU, by bench_peers, in a process whose malloc suits them."""
    found = Found()
    needed = {"onnx runtime": ("onnxruntime", "onnxscript"), "ctranslate2": ("ctranslate2",)}
    for provider, packages in needed.items():
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if missing:
            found.leave_out(RUNTIMES, f"{', '.join(missing)} not installed", provider)
    if len(found.not_run) < len(needed):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "peers.json"
            command = [sys.executable, "-m", "bench.bench_peers", "--rounds", str(rounds), "--out", str(out)]
            if subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode:
                raise Wrong("bench_peers stopped, for the reason above")
            rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
        found.rows = [{**row, "case": f"{RUNTIMES}: {row['case']}"} for row in rows]
    return found


def jobs(rounds: int, chosen: Iterable[str] | None) -> list[Job]:
    """All that can be measured here, by title, the most telling first."""
    gpu = torch.cuda.is_available()
    found: list[Job] = [(case.title, functools.partial(measure, case, rounds, chosen)) for case in cases(gpu)]
    found.insert(2, (TOKENIZING, lambda: Found(tokenizing(max(9, rounds)))))  # after the headline of one dtype
    return found if gpu else [*found, (RUNTIMES, lambda: runtimes(max(3, rounds // 2)))]


def run(todo: Iterable[Job], path: Path, minutes: float, resume: bool = False) -> tuple[dict[str, Any], bool]:
    """Runs the jobs till the time is over, writing to `path` after each; whether every provider was right. `resume`:
    those that `path` has done are kept."""
    results = begun(path if resume else None)
    rows, not_run, right = results["rows"], results["not_run"], True
    end = time.monotonic() + 60 * minutes
    for title, job in todo:
        if title in results["done"]:
            continue
        harness.log(title)
        found = Found()
        if time.monotonic() >= end:
            found.leave_out(title, f"the {minutes:g} minutes were over", "all")
        else:
            results["done"].append(title)
            try:
                found = job()
            except Wrong as error:
                right = False
                results["done"].remove(title)
                found.leave_out(title, f"WRONG: {error}", "all")
            except torch.OutOfMemoryError:  # of the judge; another provider's is noted where it is called
                found.leave_out(title, "transformers (sdpa), the judge, has not enough memory", "all")
        rows += found.rows
        add_utilisation(rows)
        not_run += found.not_run
        harness.write(path, results)
    return results, right


def begun(path: Path | None) -> dict[str, Any]:
    """What the file has, if the same was measured with the same; else nothing yet."""
    environment = harness.environment()
    nothing = {"environment": environment, "lengths": lengths(32, 128, 0.4), "roofs": ROOFS, "rows": [], "not_run": [],
               "done": []}  # fmt: skip
    if path is None or not path.exists():
        return nothing
    found = json.loads(path.read_text(encoding="utf-8"))
    differs = [name for name in environment if found["environment"].get(name) != environment[name]]
    if "done" not in found or {*differs} - {"date", "clocks"}:
        harness.log(f"{path} is begun anew: it was measured with another {', '.join(differs) or 'bench_model'}")
        return nothing
    ROOFS.update(found["roofs"])
    not_run = [each for each in found["not_run"] if each["case"] in found["done"]]
    return {**nothing, "rows": found["rows"], "not_run": not_run, "done": found["done"]}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_model", description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="measure on the CPU even where there is a GPU")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no case after so many minutes")
    parser.add_argument("--cases", type=re.compile, default="", help="only cases whose title this expression finds")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, metavar="PROVIDER",
                        help=f"only these, in every case: {', '.join(PROVIDERS)}")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="print the titles of the cases and measure nothing")
    parser.add_argument("--train", action="store_true", help="measure training steps instead (bench_training.py)")
    parser.add_argument("--layers", type=int, default=BASE["num_hidden_layers"], help="with --train: a smaller model")
    parser.add_argument("--vocab", type=int, default=BASE["vocab_size"], help="with --train: a smaller vocabulary")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved runs of each provider (default 9; five "
                        "times as many of one text, and on a GPU; fewer of long ones)")  # fmt: skip
    parser.add_argument("--out", type=Path, help="JSON file to write (default: in bench/results)")
    parser.add_argument("--resume", action="store_true", help="go on with that file: what it has is not measured again")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--peak-of", nargs=3, metavar=("PROVIDER", "CASE", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cpu:
        os.environ.update(CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")
    if args.peak_of:
        provider, *key = args.peak_of
        print(peak_memory(provider, next(case for case in cases(gpu=False) if [case.name, case.dtype] == key)))
        return 0
    if args.train:
        from . import bench_training

        return bench_training.main(args)
    todo = [(title, job) for title, job in jobs(args.rounds, args.providers) if re.search(args.cases, title)]
    if args.list:
        print("\n".join(title for title, _ in todo))
        return 0
    if not todo:
        raise SystemExit(f"--cases {args.cases.pattern!r} finds no title: --list shows them")
    path = args.out or harness.RESULTS / f"model_{providers.device().type.replace('cuda', 'gpu')}.json"
    results, right = run(todo, path, args.minutes, args.resume)
    print(json.dumps(results) if args.json else harness.table(results["rows"], harness.MODEL_COLUMNS))
    harness.log(f"written to {path}")
    left = {title for title, _ in todo} - {*results["done"]}
    return 1 if not right else harness.UNFINISHED if left else 0


if __name__ == "__main__":
    exit_with(main)
