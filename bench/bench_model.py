"""Whole models against transformers (sdpa), in one process, interleaved, equal weights, correctness first.

`python -m bench.bench_model --cpu` measures XLM-R-base shapes with random weights: a batch of 32 texts at about 40 %
fill, one text of 32 tokens, peak memory of one forward in a process of its own, and the tokenizers. Writes
bench/results/model_cpu.json and prints the table. `--train` measures training steps: see bench_training.py.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import xlmr
from xlmr.demo import CHECKPOINT, HELD_OUT

from . import harness

BASE: dict[str, Any] = {
    "vocab_size": 250002, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
}  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PROVIDERS = ("transformers sdpa", "xlmr eager")
COLUMNS = ["case", "dtype", "provider", "median_ms", "q20_ms", "q80_ms", "ratio", "max_difference", "peak_mb"]


def lengths(texts: int, longest: int, fill: float, seed: int = 0) -> list[int]:
    """Log-normal lengths up to `longest`, the first exactly that, scaled to fill about `fill` of the padded batch."""
    draw = random.Random(seed)
    raw = [draw.lognormvariate(0.0, 0.55) for _ in range(texts - 1)]
    low, high = 0.0, float(longest)
    for _ in range(40):  # bisection on the scale
        scale = (low + high) / 2
        found = [longest, *(min(longest, max(4, round(x * scale))) for x in raw)]
        low, high = (scale, high) if sum(found) < fill * texts * longest else (low, scale)
    return found


def batch(lens: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random ids [B, S] with pads to the right, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(max(lens)) < torch.tensor(lens)[:, None]).long()
    ids = torch.randint(4, BASE["vocab_size"] - 2, mask.shape, generator=generator)
    return ids.masked_fill(mask == 0, 1), mask


def model(provider: str, dtype: torch.dtype, layers: int = BASE["num_hidden_layers"]) -> Any:
    """The base model of `provider`, of so many layers, with random weights that depend on the seed alone."""
    torch.manual_seed(0)
    settings = {**BASE, "num_hidden_layers": layers}
    reference = transformers.XLMRobertaModel(transformers.XLMRobertaConfig(**settings), add_pooling_layer=False)
    reference = reference.eval().to(dtype)
    if provider == "transformers sdpa":
        return reference
    with torch.device("meta"):
        ours = xlmr.XLMRobertaModel(xlmr.XLMRobertaConfig(**settings), add_pooling_layer=False, backend="eager")
    ours.load_state_dict(reference.state_dict(), assign=True)
    return ours.eval()


@torch.inference_mode()
def latency(name: str, lens: list[int], dtype: str, rounds: int) -> list[dict[str, Any]]:
    """Both providers on one batch; the ratio is transformers' time over ours."""
    ids, mask = batch(lens)
    models = {provider: model(provider, DTYPES[dtype]) for provider in PROVIDERS}
    outputs = {provider: m(ids, attention_mask=mask).last_hidden_state for provider, m in models.items()}
    real = mask.bool()
    difference = (outputs[PROVIDERS[0]][real] - outputs[PROVIDERS[1]][real]).abs().max().item()
    limit = {"fp32": 1e-4, "bf16": 0.25}[dtype]  # on outputs of unit variance, after twelve layers
    if not difference < limit:
        raise SystemExit(f"{name} {dtype}: outputs differ by {difference}, more than {limit}; nothing was measured")
    calls = {provider: (lambda m=m: m(ids, attention_mask=mask)) for provider, m in models.items()}
    times = {provider: harness.quantiles(t) for provider, t in harness.interleaved(calls, rounds).items()}
    base = times[PROVIDERS[0]]["median_ms"]
    return [
        {"case": name, "dtype": dtype, "provider": p, **t, "ratio": base / t["median_ms"], "max_difference": difference}
        for p, t in times.items()
    ]


def peak_memory(provider: str, dtype: str, lens: list[int]) -> float:
    """MB that one forward adds to the resident set of a process that holds the model (Linux)."""
    command = [sys.executable, "-m", "bench.bench_model", "--peak-of", provider, dtype, json.dumps(lens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    return float(done.stdout)


@torch.inference_mode()
def _measure_peak(provider: str, dtype: str, lens: list[int]) -> float:
    ids, mask = batch(lens)
    measured = model(provider, DTYPES[dtype])
    measured(ids[:1, :8])  # libraries allocate for good at the first call
    return harness.peak_of(lambda: measured(ids, attention_mask=mask)) / 2**20


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
        {
            "case": f"tokenize 10,000 ({same:.1%} equal)",
            "dtype": "",
            "provider": name,
            **t,
            "ratio": base / t["median_ms"],
        }
        for name, t in times.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_model", description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="measure on the CPU (all that this version measures)")
    parser.add_argument("--train", action="store_true", help="measure training steps instead (bench_training.py)")
    parser.add_argument("--layers", type=int, default=BASE["num_hidden_layers"], help="with --train: a smaller model")
    parser.add_argument("--vocab", type=int, default=BASE["vocab_size"], help="with --train: a smaller vocabulary")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved runs of each candidate (default 9)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--peak-of", nargs=3, metavar=("PROVIDER", "DTYPE", "LENGTHS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        provider, dtype, lens = args.peak_of
        print(_measure_peak(provider, dtype, json.loads(lens)))
        return 0
    if args.train:
        from . import bench_training

        return bench_training.main(args)
    mixed = lengths(32, 128, 0.4)
    fill = sum(mixed) / (len(mixed) * max(mixed))
    rows = []
    for dtype in DTYPES:
        harness.log(f"{dtype}: 32 texts up to 128 tokens, {fill:.0%} fill")
        measured = latency(f"32 texts, {fill:.0%} fill", mixed, dtype, args.rounds)
        for row in measured:
            row["peak_mb"] = peak_memory(row["provider"], dtype, mixed)
        harness.log(f"{dtype}: one text of 32 tokens")
        rows += measured + latency("1 text of 32", [32], dtype, 5 * args.rounds)
    harness.log("tokenizers")
    rows += tokenizing(max(3, args.rounds // 2))
    results = {"environment": harness.environment(), "lengths": mixed, "rows": rows}
    path = harness.write("model_cpu", results)
    print(json.dumps(results) if args.json else harness.table(rows, COLUMNS))
    harness.log(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
