"""Texts to vectors and scores on the CPU, against the libraries people use, on one checkpoint in one dtype.

`python -m bench.bench_encode` generates checkpoints with random weights, of the shapes of multilingual-e5-small (or of
XLM-R-base: `--model base`), and measures, interleaved: 2,000 texts of log-normal lengths against sentence-transformers;
the ranking of 100 passages against its CrossEncoder, each also with our encoder in it ("patched"), and with its weights
packed; bge-m3's three kinds of vectors of 500 texts against FlagEmbedding's way (its steps on transformers' model,
without the trial run of the longest batch that it begins with); and the time from `import xlmr` in a new process to the
first vector of the demo checkpoint. The results of the first round are compared: where they differ, nothing is
reported. Writes bench/results/encode_MODEL_cpu.json and prints the table.
"""

import argparse
import importlib.metadata
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from sentence_transformers import CrossEncoder, SentenceTransformer

import xlmr
from xlmr.demo import CHECKPOINT, HELD_OUT

from . import harness
from .command import exit_with
from .shapes import BASE, DTYPES

MODELS = {
    "small": {**BASE, "hidden_size": 384, "intermediate_size": 1536},
    "base": BASE,
    "tiny": {**BASE, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
}
LIMITS = {"fp32": 1e-3, "bf16": 0.5}  # on `error`; the results in another order would give about 1.4
COLUMNS = ["case", "dtype", "provider", "median_ms", "q20_ms", "q80_ms", "texts_per_s", "ratio", "error"]
BATCH_SIZE = 32  # sentence-transformers' own default
FLAG_BATCH_SIZE = 256  # FlagEmbedding's
MODULES = ("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")
FIRST_VECTOR = """
import time
start = time.perf_counter()
import xlmr
from xlmr.demo import CHECKPOINT
xlmr.load(CHECKPOINT).encode("The first vector.")
print(time.perf_counter() - start)
"""

Call = Callable[[], Any]
Case = tuple[dict[str, Call], Callable[[list[Any]], float]]  # the providers, the reference first; their results' error


def error(a: Any, b: Any) -> float:
    """The mean difference of two arrays of results, as a part of how much the results of the texts differ in a."""
    a, b = (np.asarray(x, dtype=np.float64) for x in (a, b))
    return float(np.abs(a - b).mean() / np.abs(a - a.mean(0)).mean())


def worst_error(results: list[Any]) -> float:
    """Of each provider's results against the first's."""
    want, *found = results
    return max(error(want, result) for result in found)


def texts(count: int, seed: int = 0) -> list[str]:
    """Words of the demo's held-out sentences, four tokens each in its small vocabulary; log-normal lengths: half of the
    texts are below 55 tokens, a twentieth above 200, as sentences and short passages are."""
    words = HELD_OUT.read_text(encoding="utf-8").split()
    draw = random.Random(seed)
    lengths = (draw.lognormvariate(2.6, 0.8) for _ in range(count))
    return [" ".join(draw.choices(words, k=max(1, round(length)))) for length in lengths]


def write_checkpoint(directory: Path, shape: dict[str, Any], dtype: str, *, pairs: bool) -> None:
    """Random weights of `shape`, the demo's tokenizer, and around them a bge-m3, or a cross-encoder."""
    torch.manual_seed(0)
    config = transformers.XLMRobertaConfig(**shape, num_labels=1, initializer_range=0.05)
    if pairs:
        model = transformers.XLMRobertaForSequenceClassification(config)
    else:
        model = transformers.XLMRobertaModel(config, add_pooling_layer=False)
    model.to(DTYPES[dtype]).save_pretrained(directory)
    xlmr.XLMRobertaTokenizer.from_pretrained(CHECKPOINT, model_max_length=512).save_pretrained(directory)
    if pairs:
        return
    for _, folder in MODULES[1:]:
        (directory / folder).mkdir()
    kinds = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(MODULES)
    ]
    pooling = {"word_embedding_dimension": shape["hidden_size"], "pooling_mode_cls_token": True}
    for name, content in (
        ("modules.json", kinds),
        ("1_Pooling/config.json", {**pooling, "pooling_mode_mean_tokens": False}),
        ("sentence_bert_config.json", {"max_seq_length": 512, "do_lower_case": False}),
    ):
        (directory / name).write_text(json.dumps(content), encoding="utf-8")
    for name, outputs in (("sparse", 1), ("colbert", shape["hidden_size"])):
        torch.save(torch.nn.Linear(shape["hidden_size"], outputs).state_dict(), directory / f"{name}_linear.pt")


class FlagWay:
    """What BGEM3FlagModel.encode does: sorted, padded batches, heads on the padded rows, a loop over tokens."""

    def __init__(self, directory: Path, dtype: torch.dtype):
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        self.model = transformers.XLMRobertaModel.from_pretrained(directory, add_pooling_layer=False)
        names = ("sparse", "colbert")
        heads = (torch.load(directory / f"{name}_linear.pt", weights_only=True) for name in names)
        self.sparse, self.colbert = ({name: t.to(dtype) for name, t in head.items()} for head in heads)
        self.unused = {0, 1, 2, 3}

    @torch.no_grad()
    def encode(self, texts: list[str]) -> dict[str, Any]:
        rows = self.tokenizer(texts, truncation=True, max_length=512)["input_ids"]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        dense, lexical, colbert = ([None] * len(rows) for _ in range(3))
        for start in range(0, len(rows), FLAG_BATCH_SIZE):
            places = order[start : start + FLAG_BATCH_SIZE]
            batch = self.tokenizer.pad({"input_ids": [rows[i] for i in places]}, return_tensors="pt")
            hidden = self.model(**batch).last_hidden_state
            vectors = F.linear(hidden[:, 1:], self.colbert["weight"], self.colbert["bias"])
            vectors = F.normalize(vectors * batch["attention_mask"][:, 1:, None], dim=-1).float().numpy()
            weights = F.linear(hidden, self.sparse["weight"], self.sparse["bias"]).relu().squeeze(-1).float().numpy()
            pooled = F.normalize(hidden[:, 0], dim=-1).float().numpy()
            for n, place in enumerate(places):
                dense[place], lexical[place] = pooled[n], self.lexical(batch["input_ids"][n].tolist(), weights[n])
                colbert[place] = vectors[n][: len(rows[place]) - 1]
        return {"dense_vecs": np.stack(dense), "lexical_weights": lexical, "colbert_vecs": colbert}

    def lexical(self, ids: list[int], weights: Any) -> dict[str, float]:
        found: dict[str, float] = {}
        for token, weight in zip(ids, weights, strict=True):
            if token not in self.unused and weight > found.get(str(token), 0):
                found[str(token)] = weight
        return found


def patched(library: Callable[..., Any], directory: Path) -> dict[str, Any]:
    """The library's own class with our encoder in it, as `xlmr.patch_transformers()` and, with packed weights,
    `xlmr.patch_transformers(backend="prepacked")` have it."""
    backends = {"patched": "auto", "patched, weights packed": "prepacked"}
    return {name: xlmr.accelerate(library(str(directory), device="cpu"), backend=b) for name, b in backends.items()}


def encode(directory: Path, dtype: str, count: int, batch_tokens: int | None) -> Case:
    corpus = texts(count)
    theirs, ours = SentenceTransformer(str(directory), device="cpu"), xlmr.load(directory, device="cpu")
    both = patched(SentenceTransformer, directory)
    options = {"batch_size": BATCH_SIZE, "normalize_embeddings": True}
    assert theirs[0].auto_model.dtype == ours.model.dtype == DTYPES[dtype]
    calls = {
        "sentence-transformers": lambda: theirs.encode(corpus, **options),
        **{f"sentence-transformers, {name}": partial(m.encode, corpus, **options) for name, m in both.items()},
        "xlmr": lambda: ours.encode(corpus, normalize=True, batch_tokens=batch_tokens),
    }
    return calls, worst_error


def rerank(directory: Path, dtype: str, count: int, batch_tokens: int | None) -> Case:
    query, passages = "Which of these passages answers the question?", texts(count, seed=1)
    theirs, ours = CrossEncoder(str(directory), device="cpu"), xlmr.load(directory, device="cpu")
    both = patched(CrossEncoder, directory)
    assert theirs.model.dtype == ours.model.dtype == DTYPES[dtype]
    pairs, options = [(query, passage) for passage in passages], {"truncation": "longest_first", "normalize": True}
    calls = {
        "CrossEncoder": lambda: theirs.predict(pairs, batch_size=BATCH_SIZE),
        **{f"CrossEncoder, {name}": partial(m.predict, pairs, batch_size=BATCH_SIZE) for name, m in both.items()},
        "xlmr": lambda: ours.rerank(query, passages, batch_tokens=batch_tokens, **options),
    }
    return calls, worst_error


def three_heads(directory: Path, dtype: str, count: int, batch_tokens: int | None) -> Case:
    corpus = texts(count, seed=2)
    theirs, ours = FlagWay(directory, DTYPES[dtype]), xlmr.load(directory, device="cpu")
    options = {"return_sparse": True, "return_colbert_vecs": True, "normalize": True, "batch_tokens": batch_tokens}
    calls = {"FlagEmbedding's way": lambda: theirs.encode(corpus), "xlmr": lambda: ours.encode(corpus, **options)}

    def worst(results: list[Any]) -> float:
        a, b = results
        tokens = [
            (x, y, token) for x, y in zip(*(r["lexical_weights"] for r in (a, b)), strict=True) for token in x | y
        ]
        return max(
            error(a["dense_vecs"], b["dense_vecs"]),
            error(np.concatenate(a["colbert_vecs"]), np.concatenate(b["colbert_vecs"])),
            error([x.get(token, 0) for x, _, token in tokens], [y.get(token, 0) for _, y, token in tokens]),
        )

    return calls, worst


def measured(case: str, dtype: str, prepared: Case, count: int, rounds: int) -> list[dict[str, Any]]:
    """A row a provider; the ratio is the reference's time over the provider's."""
    calls, compare = prepared
    results: dict[str, Any] = {}
    keeping = {name: (lambda name=name, call=call: results.update({name: call()})) for name, call in calls.items()}
    found = harness.interleaved(keeping, 1, warm_up=0)
    worst = compare([results[name] for name in calls])
    if not worst < LIMITS[dtype]:
        raise SystemExit(
            f"{case} {dtype}: the results differ, error {worst:.3g} > {LIMITS[dtype]}: nothing is reported"
        )
    for name, seconds in harness.interleaved(calls, rounds - 1, warm_up=0).items():
        found[name] += seconds
    times = {name: harness.quantiles(seconds) for name, seconds in found.items()}
    base = next(iter(times.values()))["median_ms"]
    return [
        {"case": case, "dtype": dtype, "provider": provider, **t, "texts_per_s": 1e3 * count / t["median_ms"],
         "ratio": base / t["median_ms"], "error": worst}
        for provider, t in times.items()
    ]  # fmt: skip


def first_vector(rounds: int) -> dict[str, Any]:
    """From `import xlmr` in a new process to the first vector."""
    command = [sys.executable, "-c", FIRST_VECTOR]
    done = (
        subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True)
        for _ in range(rounds)
    )
    times = harness.quantiles([float(process.stdout) for process in done])
    return {"case": "import to first vector", "dtype": "", "provider": "xlmr", **times}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_encode", description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="small", help="whose shapes (default small)")
    parser.add_argument("--texts", type=int, default=2000, help="texts to encode (default 2,000)")
    parser.add_argument("--passages", type=int, default=100, help="passages to rank (default 100)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved runs of each candidate (default 3)")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="only this one, or these")
    parser.add_argument("--batch-tokens", type=int, help="xlmr's tokens at once (default: its own)")
    parser.add_argument("--out", type=Path, help="JSON file to write (default: in bench/results)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    cases = {
        f"rerank {args.passages:,} passages": (rerank, args.passages, True),
        f"three heads, {args.texts // 4:,} texts": (three_heads, args.texts // 4, False),
        f"encode {args.texts:,} texts": (encode, args.texts, False),
    }
    rows = [first_vector(max(3, args.rounds))]
    for dtype in args.dtype or DTYPES:
        for case, (prepare, count, pairs) in cases.items():
            harness.log(f"{dtype}: {case}")
            with tempfile.TemporaryDirectory() as folder:
                write_checkpoint(Path(folder), MODELS[args.model], dtype, pairs=pairs)
                prepared = prepare(Path(folder), dtype, count, args.batch_tokens)
                rows += measured(case, dtype, prepared, count, args.rounds)
            harness.log(harness.table(rows[-len(prepared[0]) :], COLUMNS))
    versions = {"sentence-transformers": importlib.metadata.version("sentence-transformers")}
    results = {"environment": {**harness.environment(), **versions}, "model": MODELS[args.model], "rows": rows}
    print(json.dumps(results) if args.json else harness.table(rows, COLUMNS))
    harness.log(f"written to {harness.write(args.out or f'encode_{args.model}_cpu', results)}")
    return 0


if __name__ == "__main__":
    exit_with(main)
