"""The studies under bench/studies/: `python -m bench.study NAME` measures one anew, its picture and its figures.

A study's page, NAME.md, has a question, a method, a picture and a finding; what it was measured on stands in NAME.json.
"""

import argparse
import copy
import functools
import itertools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import xlmr
from xlmr.kernels import _launch
from xlmr.ops import EAGER, Ops, triton

from . import bench_attention, bench_vocab_softmax, forward, harness, plots, providers, shapes, sweep
from .command import exit_with
from .shapes import BASE, PAIR, lengths

HERE = Path(__file__).parent / "studies"
GPU = torch.cuda.is_available()
DTYPE = "bf16" if GPU else "fp32"


@torch.inference_mode()
def packing() -> dict[str, Any]:
    """(a) Milliseconds of one batch over the share of real tokens in it; on a GPU in bf16, on the kernels too."""
    texts, dtype, size = (256, "bf16", BASE) if GPU else (16, "fp32", {**BASE, "num_hidden_layers": 4})
    names = (*PAIR, "xlmr triton") if GPU else PAIR
    times: dict[str, dict[float, float]] = {name: {} for name in names}
    with mock.patch.dict(shapes.SIZES, study=size):
        for fill in (0.2, 0.4, 0.6, 0.8, 1.0):
            lens = tuple(lengths(texts, 128, fill)) if fill < 1 else (128,) * texts
            given = providers.prepare(shapes.Case("packing", lens, dtype, "study", "study"))
            calls, _ = forward.checked(given, names, forward.Found())
            for name, seconds in harness.interleaved(calls, rounds=5).items():
                times[name][1 - given.case.padding] = harness.quantiles(seconds)["median_ms"]
    title = f"XLM-R-base, {size['num_hidden_layers']} layers, {texts} texts of up to 128 tokens, {dtype}"
    plots.lines(times, HERE / "packing.svg", title, "real tokens / positions", "ms")
    return {"milliseconds": times}


def vocabulary() -> dict[str, Any]:
    """(c) Time and memory of the loss over 250,002 words, forward and backward, with logits in memory and without."""
    rows = (256, 1024, 4096, 8192) if GPU else (64, 256, 1024)
    times: dict[str, dict[float, float]] = {}
    memory: dict[str, dict[float, float]] = {}
    for T in rows:
        point = sweep.Point("T", "labelled rows", T, BASE["hidden_size"])
        case = bench_vocab_softmax.case("vocab_cross_entropy", DTYPE, point, BASE["vocab_size"])
        ways = {"xlmr eager": case.providers["xlmr eager"], "torch, logits in memory": case.providers["torch"]}
        ways |= {"xlmr triton": case.providers["xlmr triton"]} if GPU else {}
        agreeing(case, ways)
        calls = {name: harness.timed(way, case, "full") for name, way in ways.items()}
        for name, seconds in harness.interleaved(calls, rounds=20 if GPU else 3, warm_up=1).items():
            times.setdefault(name, {})[case.x_value] = harness.quantiles(seconds)["median_ms"]
            memory.setdefault(name, {})[case.x_value] = harness.peak_of(calls[name]) / 2**20
    title = f"Loss over 250,002 words, forward + backward, {DTYPE}"
    plots.lines(times, HERE / "vocabulary-time.svg", f"{title}: time", "labelled rows", "ms", log="xy")
    plots.lines(
        memory, HERE / "vocabulary-memory.svg", f"{title}: memory", "labelled rows", "MiB at the peak", log="xy"
    )
    return {"dtype": DTYPE, "milliseconds": times, "mebibytes": memory}


def agreeing(case: harness.Case, ways: Mapping[str, Callable[..., Any]]) -> None:
    """RuntimeError if one of them is wrong by the rule of the tests."""
    for name, way in ways.items():
        if not (check := harness.check(case, way, "full" if case.wanted else "forward")).right:
            raise RuntimeError(f"{case.shape}: {name} is wrong by {check.error:.2e}; nothing was measured")


def traffic() -> dict[str, Any]:
    """(e) Bytes that one layer's row operations move, fused and one by one, for T rows of XLM-R-base in bf16."""
    from xlmr.kernels import embedding, layer_norm, linear

    T, N, size = 16384, BASE["hidden_size"], 2
    row = T * N * size
    fused = {
        "add + LayerNorm": layer_norm.cost(T, N, size)[1],
        "GELU + LayerNorm": layer_norm.cost(T, N, size, residual=False)[1],
        "embeddings": embedding.cost(T, N, size)[1],
        "linear + GELU (4N)": linear.cost(T, 4 * N, N, size)[1],
        "QKV projection": linear.cost(T, 3 * N, N, size)[1],
    }
    apart = {  # what each further operation reads and writes again
        "add + LayerNorm": fused["add + LayerNorm"] + 2 * row,
        "GELU + LayerNorm": fused["GELU + LayerNorm"] + 2 * row,
        "embeddings": fused["embeddings"] + (3 + 2 * 3 + 1) * row,  # gathers, sums of two, LayerNorm
        "linear + GELU (4N)": fused["linear + GELU (4N)"] + 2 * 4 * row,
        "QKV projection": fused["QKV projection"] + 2 * row,
    }
    saved = {name: apart[name] / fused[name] for name in fused}
    plots.bars(saved, HERE / "traffic.svg", "Bytes one by one over bytes fused (T = 16,384, N = 768, bf16)", "times")
    return {"fused_mb": {k: v / 1e6 for k, v in fused.items()}, "apart_mb": {k: v / 1e6 for k, v in apart.items()}}


@torch.no_grad()
def error() -> dict[str, Any]:
    """(f) The largest error of a model's hidden states against float64, by dtype and path, over the layers."""
    torch.manual_seed(0)
    small = {
        "vocab_size": 5000,
        "num_hidden_layers": 6,
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_attention_heads": 3,
    }
    config = xlmr.XLMRobertaConfig(**{**BASE, **small})
    plain = xlmr.XLMRobertaModel(config, add_pooling_layer=False, backend="eager").eval()
    ids = torch.randint(4, 5000, (2, 24))
    exact = _states(plain, EAGER, torch.float64, ids)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    paths = {"eager": EAGER} | ({"triton": triton()} if GPU or interpreted else {})
    errors: dict[str, dict[float, float]] = {}
    for path, ops in paths.items():
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            if path == "triton" and dtype == torch.bfloat16 and not GPU:
                continue  # the interpreter multiplies the raw bits of bf16
            states = _states(plain, ops, dtype, ids)
            name = f"{path}, {str(dtype).removeprefix('torch.')}"
            errors[name] = {
                i: (a.double() - b).abs().max().item() for i, (a, b) in enumerate(zip(states, exact, strict=True))
            }
    plots.lines(
        errors,
        HERE / "error.svg",
        "Largest error of hidden states against float64 (192 units)",
        "after layer",
        "absolute error",
        log="y",
    )
    return {"largest_error": errors}


def _states(model: xlmr.XLMRobertaModel, ops: Ops, dtype: torch.dtype, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    device = "cuda" if GPU else "cpu"
    own = copy.deepcopy(model).to(device, dtype)
    own.ops = ops
    return tuple(state.cpu() for state in own(ids.to(device), output_hidden_states=True).hidden_states)


def tiles() -> dict[str, Any]:
    """(b) Attention at 64 units a head, bf16: the time of every tile that fits, for texts of equal length. bench.tune
    varies one entry of a table at a time and so leaves BLOCK_N, which all loads share: this is where it is chosen."""
    needs_gpu("tiles")
    times: dict[str, dict[float, float]] = {}
    for longest in bench_attention.LENGTHS:
        case = bench_attention.case("bf16", longest, mixed=False)
        ways = {name: functools.partial(_with_tile, config) for name, config in _tiles().items()}
        calls = {name: harness.timed(way, case, "forward") for name, way in right(case, ways).items()}
        for name, seconds in harness.interleaved(calls, rounds=50, lead=harness.LEAD).items():
            times.setdefault(name, {})[longest] = harness.quantiles(seconds)["median_ms"]
    everywhere = [name for name, own in times.items() if len(own) == len(bench_attention.LENGTHS)]
    best = sorted(everywhere, key=lambda name: sum(times[name].values()))[:8]
    drawn = {name: times[name] for name in best}
    plots.lines(drawn, HERE / "tiles.svg", "Attention forward, d = 64, bf16: the best", "length", "ms", log="xy")
    return {"milliseconds": times}


def _tiles() -> dict[str, Any]:
    """Configurations of attention forward by name."""
    sizes = itertools.product((64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4))
    return {
        f"{m} × {n}, {warps} warps, {stages} stages": _launch.config(warps, stages, BLOCK_M=m, BLOCK_N=n)
        for m, n, warps, stages in sizes
        if m <= 16 * warps * 2  # at most two tensor-core rows a warp: beyond, the registers spill
    }


def right(case: harness.Case, ways: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Those that this GPU has the shared memory and registers for, and that compute what they should."""
    found = {}
    for name, way in ways.items():
        try:
            check = harness.check(case, way, "forward")
        except Exception as error:  # compilers and drivers refuse in many ways
            harness.log(f"  {name} does not run: {type(error).__name__}")
            continue
        if check.right:
            found[name] = way
        else:
            harness.log(f"  {name} is wrong by {check.error:.2e}; not measured")
    return found


def _with_tile(config: Any, *inputs: Any) -> torch.Tensor:
    from xlmr.kernels import attention

    with mock.patch.object(attention, "pick", return_value=config):
        return attention.attention(*inputs)


@torch.inference_mode()
def launches() -> dict[str, Any]:
    """(d) One text of 32 tokens through the base model in bf16: eager, on the kernels, and as one CUDA graph."""
    needs_gpu("launches")
    given = providers.prepare(shapes.Case("1 text of 32", (32,), "bf16", "study"))
    names = (*PAIR, "xlmr triton", providers.GRAPH)
    calls, _ = forward.checked(given, names, forward.Found())
    times = harness.interleaved(calls, rounds=50)
    milliseconds = {name: harness.quantiles(seconds)["median_ms"] for name, seconds in times.items()}
    plots.bars(milliseconds, HERE / "launches.svg", "XLM-R-base, one text of 32 tokens, bf16", "ms")
    return {"milliseconds": milliseconds}


@torch.inference_mode()
def host() -> dict[str, Any]:
    """(d) What the host does of one text's forward pass through twelve layers, which are narrow so that a CPU computes
    next to nothing; the kernels are started by a driver that starts nothing."""
    from transformers import XLMRobertaConfig, XLMRobertaModel

    from .host_time import silent_gpu

    size = {**BASE, "vocab_size": 200, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    ids, config = torch.arange(4, 12)[None], xlmr.XLMRobertaConfig(**size)
    theirs = XLMRobertaModel(XLMRobertaConfig(**size)).eval()
    eager = xlmr.XLMRobertaModel(config, backend="eager").eval()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with silent_gpu():
        ours = xlmr.XLMRobertaModel(config, backend="triton").eval().bfloat16()
        calls = {
            "transformers": lambda: theirs(ids),
            "xlmr eager": lambda: eager(ids),
            "xlmr triton": lambda: ours(ids),
            "xlmr triton, planned anew": mock.patch.object(_launch, "REMEMBERS", False)(lambda: ours(ids)),
        }
        times = harness.interleaved(calls, rounds=100, warm_up=5)
    torch.set_num_threads(threads)
    milliseconds = {name: harness.quantiles(seconds)["median_ms"] for name, seconds in times.items()}
    plots.bars(milliseconds, HERE / "host.svg", "The host's part of a forward pass, 12 layers, one text", "ms")
    return {"milliseconds": milliseconds}


def needs_gpu(name: str) -> None:
    if not GPU:
        raise SystemExit(f"the study {name!r} measures kernels on a GPU, and PyTorch sees none here")


STUDIES = {
    "packing": packing,
    "vocabulary": vocabulary,
    "traffic": traffic,
    "error": error,
    "tiles": tiles,
    "launches": launches,
    "host": host,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.study", description=__doc__)
    parser.add_argument("name", choices=STUDIES)
    args = parser.parse_args()
    results = {"environment": harness.environment(), **STUDIES[args.name]()}
    print(harness.write(HERE / f"{args.name}.json", results).read_text(encoding="utf-8"), end="")
    return 0


if __name__ == "__main__":
    exit_with(main)
