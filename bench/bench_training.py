"""A training step of XLMRobertaForMaskedLM against transformers (sdpa), interleaved, correctness first.

`python -m bench.bench_model --train` measures base shapes with random weights, 8 texts (32 on a GPU) of up to 128
tokens at about 40 % fill, 15 % of the tokens masked, dropout 0.1, in fp32 and under bf16 autocast. A step is forward,
backward and a fused AdamW step; transformers' loss comes with its logits, ours without. Peak memory is what a step adds
to a process that holds the model and the optimizer's state. Writes bench/results/train_cpu.json or train_gpu.json after
each dtype and prints the table.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import xlmr

from . import harness
from .providers import device
from .shapes import BASE, DTYPES, PAIR, batch, lengths

MASKED = 0.15
COLUMNS = ["case", "dtype", "provider", "median_ms", "q20_ms", "q80_ms", "ratio", "difference", "peak_mib"]
LIMITS = {"fp32": 1e-4, "bf16": 0.05}  # on the relative difference of gradients, after twelve layers and back


def model(provider: str, settings: dict[str, Any]) -> Any:
    """ForMaskedLM of `provider` in fp32 with random weights that depend on the seed alone."""
    torch.manual_seed(0)
    reference = transformers.XLMRobertaForMaskedLM(transformers.XLMRobertaConfig(**settings)).to(device())
    if provider == "transformers sdpa":
        return reference
    with torch.device("meta"):
        ours = xlmr.XLMRobertaForMaskedLM(xlmr.XLMRobertaConfig(**settings), backend=provider.removeprefix("xlmr "))
    ours.load_state_dict(reference.state_dict(), assign=True)
    ours.tie_weights()
    return ours


def labelled(lens: list[int], settings: dict[str, Any]) -> dict[str, Tensor]:
    """Random ids [B, S], their mask, and labels at some of the tokens."""
    ids, mask = batch(lens)
    ids = torch.where(mask.bool(), ids % (settings["vocab_size"] - 4) + 4, 1)
    drawn = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < MASKED
    given = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(~(drawn & mask.bool()), -100)}
    return {name: tensor.to(device()) for name, tensor in given.items()}


def loss(model: Any, given: dict[str, Tensor], dtype: str) -> Tensor:
    """As each is meant to be called for the loss alone."""
    extra = {"return_logits": False} if isinstance(model, xlmr.XLMRobertaForMaskedLM) else {}
    with torch.autocast(device().type, torch.bfloat16, enabled=dtype == "bf16"):
        return model(**given, **extra).loss


def stepper(model: Any, dtype: str) -> Callable[[dict[str, Tensor]], None]:
    """Forward, backward, AdamW."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-5, fused=True)

    def step(given: dict[str, Tensor]) -> None:
        loss(model, given, dtype).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def gradients(model: Any, given: dict[str, Tensor], dtype: str) -> tuple[Tensor, ...]:
    """The tied embedding's and the lowest layer's query's. Without dropout, whose draws are not the same."""
    wanted = (model.lm_head.decoder.weight, model.roberta.encoder.layer[0].attention.self.query.weight)
    return torch.autograd.grad(loss(model.eval(), given, dtype), wanted)


def difference(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The larger relative difference (Frobenius) of two gradients."""
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True))


def measure(dtype: str, lens: list[int], settings: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    """All providers on one batch; the ratio is transformers' time over theirs."""
    given = labelled(lens, settings)
    models = {provider: model(provider, settings) for provider in providers()}
    expected = gradients(models[PAIR[0]], given, dtype)
    apart = {provider: difference(gradients(m, given, dtype), expected) for provider, m in models.items()}
    for provider, found in apart.items():
        if not found < LIMITS[dtype]:
            raise SystemExit(
                f"{provider} {dtype}: gradients differ by {found}, more than {LIMITS[dtype]}; nothing was measured"
            )
    steps = {provider: stepper(m, dtype) for provider, m in models.items()}
    calls = {provider: (lambda step=step: step(given)) for provider, step in steps.items()}
    times = {p: harness.quantiles(t) for p, t in harness.interleaved(calls, rounds, warm_up=1).items()}
    base = times[PAIR[0]]["median_ms"]
    case = f"step, {len(lens)} texts, {sum(lens) / (len(lens) * max(lens)):.0%} fill"
    if settings != BASE:
        case += f", {settings['num_hidden_layers']} layers, {settings['vocab_size']:,} words"
    return [
        {"case": case, "dtype": dtype, "provider": p, **t, "ratio": base / t["median_ms"], "difference": apart[p],
         "peak_mib": peak_memory(p, dtype, lens, settings)}
        for p, t in times.items()
    ]  # fmt: skip


def providers() -> tuple[str, ...]:
    return (*PAIR, "xlmr triton") if torch.cuda.is_available() else PAIR


def peak_memory(*task: Any) -> float:
    """MiB that one step adds, in a process of its own; `task` as in _measure_peak."""
    command = [sys.executable, "-m", "bench.bench_training", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    return float(done.stdout)


def _measure_peak(provider: str, dtype: str, lens: list[int], settings: dict[str, Any]) -> float:
    step = stepper(model(provider, settings), dtype)
    given = labelled(lens, settings)
    step(labelled([8, 8], settings))  # the optimizer's state; libraries allocate for good at the first call
    return harness.peak_of(lambda: step(given)) / 2**20


def main(args: argparse.Namespace) -> int:
    """Runs `python -m bench.bench_model --train`."""
    settings = {**BASE, "num_hidden_layers": args.layers, "vocab_size": args.vocab}
    name = f"train_{device().type.replace('cuda', 'gpu')}"
    if settings != BASE and not args.out:
        raise SystemExit(f"a smaller model is not what {name}.json is for: say --out FILE.json")
    mixed = lengths(32 if torch.cuda.is_available() else 8, 128, 0.4)
    rows: list[dict[str, Any]] = []
    results = {"environment": harness.environment(), "lengths": mixed, "settings": settings, "rows": rows}
    for dtype in DTYPES:
        harness.log(f"{dtype}: training steps")
        rows += measure(dtype, mixed, settings, max(3, args.rounds // 3))
        path = harness.write(args.out or name, results)
    print(json.dumps(results) if args.json else harness.table(rows, COLUMNS))
    harness.log(f"written to {path}")
    return 0


def part(argv: list[str] | None = None) -> None:
    """What peak_memory starts: prints one peak."""
    parser = argparse.ArgumentParser(prog="python -m bench.bench_training", description=__doc__)
    parser.add_argument("task", type=json.loads, help="whose peak memory to print: what peak_memory asks of a process")
    print(_measure_peak(*parser.parse_args(argv).task))


if __name__ == "__main__":
    part()
