"""The encoder against other runtimes on a CPU: `python -m bench.bench_peers` (extra: peers).

XLM-R-base with random weights and the demo's vocabulary: transformers, ONNX Runtime, CTranslate2 in fp32 and int8, and
this package in fp32 and bf16. Every provider runs in one process whose malloc keeps large blocks, which CTranslate2
needs most; every output is compared with transformers' in fp32 before anything is timed. Writes peers_cpu.json.
"""

import argparse
import functools
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

import xlmr
from xlmr.demo import CHECKPOINT

from . import harness
from .command import exit_with
from .shapes import BASE, DTYPES, batch, lengths

MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
COLUMNS = ("case", "dtype", "provider", "median_ms", "q20_ms", "q80_ms", "ratio", "max_difference")
LIMITS = {"fp32": 1e-3, "bf16": 0.25, "int8": 1.5}  # of the largest difference; outputs have unit variance
Provider = Callable[[Tensor, Tensor], Any]


def checkpoint(directory: Path) -> transformers.XLMRobertaModel:
    """Writes the checkpoint that every provider reads."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(CHECKPOINT)
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    own = {"vocab_size": len(tokenizer), "position_embedding_type": "absolute"}  # CTranslate2 asks for the second
    config = transformers.XLMRobertaConfig(**{**BASE, **own})
    model = transformers.XLMRobertaModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(directory)
    return model


def ctranslate2(directory: Path, compute_type: str) -> Provider:
    import ctranslate2

    converted = directory / f"ct2-{compute_type}"
    ctranslate2.converters.TransformersConverter(str(directory)).convert(str(converted), quantization=compute_type)
    encoder = ctranslate2.Encoder(str(converted), compute_type=compute_type, intra_threads=torch.get_num_threads())

    def run(ids: Tensor, mask: Tensor) -> np.ndarray:
        texts = [row[:n] for row, n in zip(ids.tolist(), mask.sum(1).tolist(), strict=True)]
        return np.array(encoder.forward_batch(texts).last_hidden_state)

    return run


def onnxruntime(directory: Path, reference: transformers.XLMRobertaModel) -> Provider:
    import onnxruntime

    path = directory / "model.onnx"
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    ids, mask = batch([8, 6])
    given = {"input_ids": ids % reference.config.vocab_size, "attention_mask": mask}
    torch.onnx.export(
        reference, (), str(path), kwargs=given, dynamic_shapes=dict.fromkeys(given, sizes), dynamo=True, verbose=False
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda ids, mask: session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]


def torch_model(model: Any) -> Provider:
    return torch.inference_mode()(lambda ids, mask: model(ids, attention_mask=mask).last_hidden_state)


def providers(directory: Path) -> dict[tuple[str, str], Provider]:
    """By name and dtype; transformers in fp32, the judge, first."""
    reference = checkpoint(directory)
    ours = {
        (f"xlmr {way}", name): xlmr.XLMRobertaModel.from_pretrained(
            directory, dtype=DTYPES[name], backend=way, add_pooling_layer=False
        )
        for way in ("eager", "prepacked")
        for name in DTYPES
    }
    found: dict[tuple[str, str], Provider] = {("transformers sdpa", "fp32"): torch_model(reference)}
    if installed("onnx runtime", "onnxruntime", "onnxscript"):
        found["onnx runtime", "fp32"] = onnxruntime(directory, reference)
    if installed("ctranslate2", "ctranslate2"):
        for name, compute_type in (("fp32", "float32"), ("int8", "int8")):
            found["ctranslate2", name] = ctranslate2(directory, compute_type)
    return found | {key: torch_model(model) for key, model in ours.items()}


def installed(provider: str, *packages: str) -> bool:
    """Whether a provider's packages are there; says so where they are not."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        harness.log(f"not run: {provider}: {', '.join(missing)} not installed")
    return not missing


def measure(case: str, lens: list[int], ways: dict[tuple[str, str], Provider], rounds: int) -> list[dict[str, Any]]:
    """A row a provider; the ratio is transformers' time in fp32 over its own."""
    ids, mask = batch(lens)
    ids = ids % 3600
    real = mask.bool().numpy()
    (first, *_), differences = ways, {}
    exact = np.asarray(ways[first](ids, mask))
    for (name, dtype), way in ways.items():
        out = way(ids, mask)
        out = out.float().numpy() if isinstance(out, Tensor) else out
        differences[name, dtype] = float(np.abs(out - exact)[real].max())
        if not differences[name, dtype] < LIMITS[dtype]:
            raise SystemExit(f"{name} {dtype} differs by {differences[name, dtype]}: nothing was measured")
    calls = {key: functools.partial(way, ids, mask) for key, way in ways.items()}
    times = {key: harness.quantiles(seconds) for key, seconds in harness.interleaved(calls, rounds).items()}
    base = times[first]["median_ms"]
    return [
        {"case": case, "dtype": dtype, "provider": name, **t, "ratio": base / t["median_ms"],
         "max_difference": differences[name, dtype]}
        for (name, dtype), t in times.items()
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_peers", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved runs of each provider (default 5)")
    parser.add_argument("--out", type=Path, help="JSON file to write (default: in bench/results)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    args = parser.parse_args()
    if not MALLOC.items() <= os.environ.items():  # read when the process starts
        os.execve(sys.executable, [sys.executable, "-m", "bench.bench_peers", *sys.argv[1:]], {**os.environ, **MALLOC})
    mixed = lengths(32, 128, 0.4)
    with tempfile.TemporaryDirectory() as directory:
        ways = providers(Path(directory))
        rows = measure("32 texts, 40% fill", mixed, ways, args.rounds)
        rows += measure("1 text of 32", [32], ways, 5 * args.rounds)
    results = {"environment": harness.environment(), "malloc": MALLOC, "rows": rows}
    path = harness.write(args.out or "peers_cpu", results)
    print(json.dumps(results) if args.json else harness.table(rows, COLUMNS))
    harness.log(f"written to {path}")
    return 0


if __name__ == "__main__":
    exit_with(main)
