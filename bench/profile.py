"""Where the time of a forward pass or a training step goes: `python -m bench.profile [--train]`.

Every operation of the seam stands in a range (xlmr.ops.traced), so that torch.profiler tells how long each took, and
`cost()` what it should take at the roofs measured in the same run. Writes into --out: trace.json (open it in
chrome://tracing or ui.perfetto.dev), operations.json, and operations.svg. On a GPU the kernels are listed as well, and
--proton writes a profile of Triton's Proton beside them.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import xlmr
from xlmr.kernels import attention, embedding, layer_norm, linear, vocab_softmax
from xlmr.ops import COMPUTED, Ops, traced

from . import harness, plots
from .shapes import BASE, DTYPES, batch, lengths

STEPS = 5
COLUMNS = ("operation", "calls", "ms", "share", "gflops", "gbytes", "fraction_of_roof")


def costs(name: str, args: tuple[Any, ...], out: Any) -> tuple[int, int]:
    """(flops, bytes) of one call of an operation of the seam, forward."""
    first = args[0]
    if name == "attention":
        q, _, _, sequences = args[:4]
        lens = sequences.q_lens.tolist(), sequences.k_lens.tolist()
        return attention.cost(*lens, q.shape[1], q.shape[2], q.element_size())
    if name == "embed":
        return embedding.cost(len(first), args[3].shape[1], args[3].element_size())
    if name in ("add_layer_norm", "gelu_layer_norm"):
        return layer_norm.cost(*first.shape, first.element_size(), name == "add_layer_norm")
    if name in ("vocab_cross_entropy", "vocab_topk"):
        rows = int((args[3] != -100).sum()) if name == "vocab_cross_entropy" else len(first)
        k = 0 if name == "vocab_cross_entropy" else args[3]
        return vocab_softmax.cost(rows, first.shape[1], len(args[1]), first.element_size(), k)
    columns = sum(o.shape[1] for o in (out if isinstance(out, tuple) else (out,)))
    return linear.cost(len(first), columns, first.shape[1], first.element_size())


def counted(ops: Ops, totals: dict[str, list[int]]) -> Ops:
    """`ops`, whose every call adds one call, its flops and its bytes to `totals` under its name."""

    def count(name: str) -> Callable[..., Any]:
        operation = getattr(ops, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            out = operation(*args, **kwargs)
            for i, amount in enumerate((1, *costs(name, args, out))):
                totals[name][i] += amount
            return out

        return call

    return replace(ops, **{name: count(name) for name in COMPUTED})


def step(model: Any, train: bool, lens: list[int]) -> Callable[[], Any]:
    """One forward, or forward and backward of the masked-language-model loss at 15 % of the tokens."""
    ids, mask = (t.to(model.device) for t in batch(lens))
    if not train:
        return torch.inference_mode()(lambda: model.roberta(ids, attention_mask=mask))
    chosen = (torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.15).to(ids.device) & mask.bool()
    labels = ids.masked_fill(~chosen, -100)
    return lambda: model(ids, attention_mask=mask, labels=labels, return_logits=False).loss.backward()


def operations(model: Any, run: Callable[[], Any], dtype: torch.dtype, out: Path) -> list[dict[str, Any]]:
    """A row an operation, and a row a kind of node of the backward pass: calls, milliseconds and cost a step, share of
    the step. Writes the trace."""
    plain = model.ops
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    model.ops = counted(plain, totals)
    run()  # counts, and warms up
    model.ops = traced(plain)
    run()
    gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            with torch.profiler.record_function("step"):
                run()
            if gpu:
                torch.cuda.synchronize()
    model.ops = plain
    out.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(out / "trace.json"))
    events = of_the_host(profiler.key_averages())

    def milliseconds(name: str) -> float:
        event = events[name]
        return (event.device_time_total if gpu else event.cpu_time_total) / STEPS / 1e3

    peak, bandwidth = harness.roofs(dtype)
    # On a GPU backward runs in a thread of its own: it is in no range of this one.
    times = harness.interleaved({"step": run}, STEPS) if gpu else {}
    whole = harness.quantiles(times["step"])["median_ms"] if gpu else milliseconds("step")
    rows = []
    for name, (calls, flops, size) in totals.items():
        ms = milliseconds(f"xlmr.{name}")
        rows.append({
            "operation": name, "calls": calls, "ms": ms, "share": ms / whole, "gflops": flops / 1e9,
            "gbytes": size / 1e9, "fraction_of_roof": 1e3 * max(flops / peak, size / bandwidth) / ms,
        })  # fmt: skip
    backward = "autograd::engine::evaluate_function: "
    for name in (key for key in events if key.startswith(backward)):
        ms = milliseconds(name)
        rows.append({"operation": f"backward, {name[len(backward) :]}", "ms": ms, "share": ms / whole})
    rest = whole - sum(row["ms"] for row in rows)
    rows.append({"operation": "everything else", "ms": rest, "share": rest / whole})
    return sorted(rows, key=lambda row: row["ms"], reverse=True)


def of_the_host(events: Iterable[Any]) -> dict[str, Any]:
    """The ranges by name, each with the time of the kernels launched in it; not their shadows of the same name on the
    GPU's own time line, which go from the first kernel to the last."""
    return {event.key: event for event in events if event.device_type == DeviceType.CPU}


def proton(model: Any, run: Callable[[], Any], path: Path) -> None:
    """A few steps under Triton's profiler; before torch's begins, for each wants CUPTI to itself."""
    import triton.profiler

    plain, model.ops = model.ops, traced(model.ops)
    run()
    path.parent.mkdir(parents=True, exist_ok=True)
    triton.profiler.start(str(path), hook="triton")
    for _ in range(STEPS):
        run()
    torch.cuda.synchronize()
    triton.profiler.finalize()
    model.ops = plain


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=__doc__)
    parser.add_argument("--train", action="store_true", help="a training step instead of a forward pass")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--layers", type=int, default=BASE["num_hidden_layers"])
    parser.add_argument("--out", type=Path, default=Path("profile"), help="directory to write into")
    parser.add_argument("--proton", action="store_true", help="also with Triton's Proton (needs a GPU)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    if args.proton and not gpu:
        raise SystemExit("--proton profiles kernels on a GPU and PyTorch sees none: leave it out")
    torch.manual_seed(0)
    config = xlmr.XLMRobertaConfig(**{**BASE, "num_hidden_layers": args.layers})
    model = xlmr.XLMRobertaForMaskedLM(config).to(device="cuda" if gpu else "cpu", dtype=DTYPES[args.dtype])
    model.train(args.train)
    run = step(model, args.train, lengths(32, 128, 0.4))
    if args.proton:
        proton(model, run, args.out / "proton")
    rows = operations(model, run, DTYPES[args.dtype], args.out)
    results = {"environment": harness.environment(), "train": args.train, "dtype": args.dtype, "rows": rows}
    (args.out / "operations.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    what = f"{'Training step' if args.train else 'Forward pass'}, {args.dtype}, {harness.device_name()}"
    plots.bars(
        {row["operation"]: row["ms"] for row in rows if row["share"] >= 0.005}, args.out / "operations.svg", what, "ms"
    )
    print(json.dumps(results) if args.json else harness.table([r for r in rows if r["share"] >= 0.001], COLUMNS))
    harness.log(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
