"""Where the time of a forward pass and of a training step goes: `python -m bench.profile`.

Every operation of the seam stands in a range (xlmr.ops.traced), so that torch.profiler's trace tells how long each took
(on a GPU: the kernels launched in it), and `cost()` what it should take at the roofs measured in the same run. Writes
into a folder for each step below --out: trace.json (open it in chrome://tracing or ui.perfetto.dev), operations.json,
operations.svg, and on a GPU kernels.svg and a profile of Triton's Proton.
"""

import argparse
import bisect
import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import xlmr
from xlmr.kernels import attention, embedding, layer_norm, linear, vocab_softmax
from xlmr.ops import COMPUTED, Ops, traced

from . import harness, plots
from .command import exit_with
from .shapes import BASE, DTYPES, batch, lengths

STEPS = 5
TITLES = {"forward": "Forward pass", "training": "Training step"}
COLUMNS = ("operation", "calls", "ms", "share", "gflops", "gbytes", "fraction_of_roof")
KERNEL_COLUMNS = ("kernel", "operation", "calls", "ms", "share", "fraction_of_roof")
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")  # the trace's categories of what runs there
# What the host's ranges are called: category, prefix, what stands for the prefix in a table.
RANGES = ("user_annotation", "xlmr.", ""), ("cpu_op", "autograd::engine::evaluate_function: ", "backward, ")
STEP, ELSE = "step", "everything else"
# Whose gradients the kernels' nodes of the graph compute.
NODES = {
    "AttentionBackward": ("attention",),
    "EmbedBackward": ("embed",),
    "LayerNormBackward": ("add_layer_norm", "gelu_layer_norm"),
    "LinearBackward": ("qkv_projection", "linear", "linear_act"),
    "VocabCrossEntropyBackward": ("vocab_cross_entropy",),
}

Event = Mapping[str, Any]  # of a Chrome trace
Rows = list[dict[str, Any]]
Totals = dict[str, list[int]]  # by operation: calls, flops, bytes


def costs(name: str, args: tuple[Any, ...], out: Any, backward: bool) -> tuple[int, int]:
    """(flops, bytes) of one call of an operation of the seam, or of its gradients."""
    first = args[0]
    if name == "attention":
        q, _, _, sequences = args[:4]
        lens = sequences.q_lens.tolist(), sequences.k_lens.tolist()
        return attention.cost(*lens, q.shape[1], q.shape[2], q.element_size(), backward=backward)
    if name == "embed":
        return embedding.cost(len(first), args[3].shape[1], args[3].element_size(), backward=backward)
    if name in ("add_layer_norm", "gelu_layer_norm"):
        return layer_norm.cost(*first.shape, first.element_size(), name == "add_layer_norm", backward)
    if name in ("vocab_cross_entropy", "vocab_topk"):
        rows = int((args[3] != -100).sum()) if name == "vocab_cross_entropy" else len(first)
        k = 0 if name == "vocab_cross_entropy" else args[3]
        return vocab_softmax.cost(rows, first.shape[1], len(args[1]), first.element_size(), k, backward)
    columns = sum(o.shape[1] for o in (out if isinstance(out, tuple) else (out,)))
    gelu = name == "linear_act"
    return linear.cost(len(first), columns, first.shape[1], first.element_size(), backward, gelu)


def counted(ops: Ops, totals: Totals) -> Ops:
    """`ops`, whose every call adds one call, its flops and its bytes to `totals` under its name, and those of its
    gradients under the name of the kernels' node of backward."""
    nodes = {name: f"backward, {node}" for node, names in NODES.items() for name in names}

    def count(name: str) -> Callable[..., Any]:
        operation = getattr(ops, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            out = operation(*args, **kwargs)
            for key, backward in ((name, False), (nodes.get(name), True)):
                if key is not None:
                    added = (1, *costs(name, args, out, backward))
                    totals[key] = [a + b for a, b in zip(totals.get(key, (0, 0, 0)), added, strict=True)]
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


def record(run: Callable[[], Any], path: Path) -> list[dict[str, Any]]:
    """The events of torch.profiler's trace of STEPS steps, which `path` keeps."""
    gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:  # without, some versions warn of cycles
        for _ in range(STEPS):
            with torch.profiler.record_function(STEP):
                run()
            if gpu:
                torch.cuda.synchronize()
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    return json.loads(path.read_text(encoding="utf-8"))["traceEvents"]


def ranges(events: Iterable[Event]) -> dict[Any, list[tuple[float, float, str]]]:
    """Of each of the host's threads the ranges that are an operation, or a node of backward, in order: their begin and
    end in microseconds, and its name."""
    found: dict[Any, list[tuple[float, float, str]]] = defaultdict(list)
    for event in events:
        for category, prefix, kind in RANGES:  # of the host: a range's shadow on the GPU's time line has gaps
            if event.get("cat") == category and event["name"].startswith(prefix):
                begin, name = event["ts"], kind + event["name"].removeprefix(prefix)
                found[event["pid"], event["tid"]].append((begin, begin + event["dur"], name))
    return {thread: sorted(own) for thread, own in found.items()}


def kernels(events: Sequence[Event]) -> dict[tuple[str, str], list[float]]:
    """Milliseconds of each run of each kernel, by the operation in whose range the host launched it, and its name. The
    profiler's own sums leave out what no operation of torch launches, as Triton's kernels."""
    own, found = ranges(events), defaultdict(list)
    known = [event for event in events if "correlation" in event.get("args", ())]
    launches = {event["args"]["correlation"]: event for event in known if event["cat"] not in ON_GPU}
    for event in known:
        if event["cat"] in ON_GPU:
            launch = launches.get(event["args"]["correlation"])
            found[_within(own, launch), event["name"]].append(event["dur"] / 1e3)
    return found


def _within(own: Mapping[Any, list[tuple[float, float, str]]], launch: Event | None) -> str:
    """The operation in whose range something was launched."""
    if launch is None:
        return ELSE
    thread = own.get((launch["pid"], launch["tid"]), [])
    at = bisect.bisect(thread, (launch["ts"], float("inf"))) - 1
    return thread[at][2] if at >= 0 and launch["ts"] <= thread[at][1] else ELSE


def on_the_host(events: Iterable[Event]) -> dict[str, float]:
    """Milliseconds a step that each operation's ranges last."""
    found: dict[str, float] = defaultdict(float)
    for begin, end, name in itertools.chain.from_iterable(ranges(events).values()):
        found[name] += (end - begin) / 1e3 / STEPS
    return found


def on_the_gpu(found: Mapping[tuple[str, str], list[float]]) -> dict[str, float]:
    """Milliseconds a step that each operation's kernels take."""
    totals: dict[str, float] = defaultdict(float)
    for (name, _), times in found.items():
        totals[name] += sum(times) / STEPS
    totals.pop(ELSE, None)
    return totals


def lasted(events: Iterable[Event]) -> float:
    """Milliseconds of a step, to the host."""
    own = [event["dur"] for event in events if (event.get("cat"), event["name"]) == ("user_annotation", STEP)]
    return sum(own) / 1e3 / STEPS


def operation_rows(times: Mapping[str, float], totals: Totals, least: Mapping[str, float], whole: float) -> Rows:
    """A row an operation and a kind of node of backward, and the rest, from their milliseconds a step; the step takes
    `whole`, an operation `least` at the roofs."""
    rows: Rows = []
    for name, ms in times.items():
        row = {"operation": name, "ms": ms, "share": ms / whole}
        if name in totals:
            calls, flops, size = totals[name]
            row |= {"calls": calls, "gflops": flops / 1e9, "gbytes": size / 1e9, "fraction_of_roof": least[name] / ms}
        rows.append(row)
    rest = whole - sum(times.values())
    return ranked([*rows, {"operation": ELSE, "ms": rest, "share": rest / whole}])


def kernel_rows(found: Mapping[tuple[str, str], list[float]], least: Mapping[str, float], whole: float) -> Rows:
    """A row a kernel of an operation, from `kernels`. The longest of an operation is held against what that takes at
    least."""
    longest: dict[str, float] = defaultdict(float)
    for (name, _), times in found.items():
        longest[name] = max(longest[name], sum(times))
    rows: Rows = []
    for (name, kernel), times in found.items():
        ms = sum(times) / STEPS
        row = {"kernel": kernel, "operation": name, "calls": len(times) // STEPS, "ms": ms, "share": ms / whole}
        if name in least and sum(times) == longest[name]:
            row["fraction_of_roof"] = least[name] / ms
        rows.append(row)
    return ranked(rows)


def ranked(rows: Rows) -> Rows:
    return sorted(rows, key=lambda row: row["ms"], reverse=True)


def measured(model: Any, run: Callable[[], Any], out: Path) -> dict[str, Rows]:
    """The "rows" of a step's operations, and the "kernels" of a GPU. Writes the trace."""
    plain = model.ops
    totals: Totals = {}
    model.ops = counted(plain, totals)
    run()  # counts, and warms up
    model.ops = traced(plain)
    run()
    events = record(run, out / "trace.json")
    model.ops = plain
    peak, bandwidth = harness.roofs(model.dtype)
    least = {name: 1e3 * max(flops / peak, size / bandwidth) for name, (_, flops, size) in totals.items()}
    found, times, whole = kernels(events), on_the_host(events), lasted(events)
    if torch.cuda.is_available():
        times = on_the_gpu(found)
        whole = harness.quantiles(harness.interleaved({STEP: run}, STEPS)[STEP])["median_ms"]  # nothing slows the host
    return {"rows": operation_rows(times, totals, least, whole), "kernels": kernel_rows(found, least, whole)}


def nvtx(model: Any, run: Callable[[], Any], title: str, out: Path) -> None:
    """A step in its ranges and nothing else, for a profiler around this process: Nsight's."""
    plain, model.ops = model.ops, traced(model.ops)
    run()
    model.ops = plain


def proton(model: Any, run: Callable[[], Any], title: str, out: Path) -> None:
    """A few steps under Triton's profiler, which writes proton.hatchet."""
    import triton.profiler

    plain, model.ops = model.ops, traced(model.ops)
    run()
    out.mkdir(parents=True, exist_ok=True)
    triton.profiler.start(str(out / "proton"), hook="triton")
    for _ in range(STEPS):
        run()
    torch.cuda.synchronize()
    triton.profiler.finalize()
    model.ops = plain


def profiled(model: Any, run: Callable[[], Any], title: str, out: Path) -> dict[str, Any]:
    """A step under torch.profiler: its files, and what operations.json holds."""
    results = {"environment": harness.environment(), "title": title, **measured(model, run, out)}
    harness.write(out / "operations.json", results)
    for kind, file in (("rows", "operations.svg"), ("kernels", "kernels.svg")):
        shown: dict[str, float] = defaultdict(float)
        for row in results[kind]:
            if row["share"] >= 0.005:
                shown[", ".join([*([row["kernel"][:40]] if "kernel" in row else []), row["operation"]])] += row["ms"]
        if shown:
            plots.bars(shown, out / file, title, "ms")
    return results


# In this order: torch's profiler does not give CUPTI back, which Proton needs.
PROFILERS: dict[str, Callable[..., dict[str, Any] | None]] = {"proton": proton, "nvtx": nvtx, "torch": profiled}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=__doc__)
    parser.add_argument("--step", nargs="+", choices=TITLES, default=list(TITLES), help="default: both")
    ways = "default: torch, on a GPU proton too; nvtx: ranges alone, for Nsight around this"
    parser.add_argument("--profiler", nargs="+", choices=PROFILERS, help=ways)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--layers", type=int, default=BASE["num_hidden_layers"])
    parser.add_argument(
        "--out", type=Path, default=Path("profile"), help="directory to write into (default %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    chosen = args.profiler or (("proton", "torch") if gpu else ("torch",))
    if "proton" in chosen and not gpu:
        raise SystemExit("Proton profiles kernels on a GPU and PyTorch sees none: leave it out")
    torch.manual_seed(0)
    config = xlmr.XLMRobertaConfig(**{**BASE, "num_hidden_layers": args.layers})
    model = xlmr.XLMRobertaForMaskedLM(config).to(device="cuda" if gpu else "cpu", dtype=DTYPES[args.dtype])
    results = []
    for profiler, name in itertools.product((each for each in PROFILERS if each in chosen), args.step):
        title = f"{TITLES[name]}, {args.layers} layers, {args.dtype}, {harness.device_name()}"
        run = step(model.train(name == "training"), name == "training", lengths(32, 128, 0.4))
        if found := PROFILERS[profiler](model, run, title, args.out / name):
            results.append(found)
    for found in [] if args.json else results:
        for kind, columns in (("rows", COLUMNS), ("kernels", KERNEL_COLUMNS)):
            if shown := [row for row in found[kind] if row["share"] >= 0.001]:
                print(f"{found['title']}\n{harness.table(shown, columns)}\n")
    if args.json:
        print(json.dumps(results))
    harness.log(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    exit_with(main)
