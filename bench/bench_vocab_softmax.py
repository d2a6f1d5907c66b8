"""The softmax over the vocabulary, cross entropy and top words, against torch with logits in memory, Liger and CCE:
`python -m bench.bench_vocab_softmax`."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xlmr.kernels.vocab_softmax import cost

from . import sweep
from .command import exit_with
from .harness import Case

WORDS, FEW, TOP = 250002, 8192, 5
# Points and words: a CPU sweeps over a vocabulary of a few chunks, and passes once through all words, which takes long.
SHAPES = (
    [(point, WORDS) for point in sweep.points((64, 1024, 4096), 1024)]
    if sweep.GPU
    else [(point, FEW) for point in sweep.points((32, 128, 512), 64)] + [(sweep.over_tokens(32), WORDS)]
)


def torch_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight, bias).float(), labels)


def torch_topk(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return torch.log_softmax(F.linear(x, weight, bias).float(), dim=-1).topk(k)


def liger_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, x, labels, bias)


def cut_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x, weight, labels, bias=bias)


LOSSES: dict[str, Callable[..., Any]] = {"torch": torch_cross_entropy}
if sweep.GPU and sweep.installed("liger_kernel"):
    LOSSES["liger"] = liger_cross_entropy
if sweep.GPU and sweep.installed("cut_cross_entropy"):
    LOSSES["cut cross entropy"] = cut_cross_entropy


def case(operation: str, dtype: str, point: sweep.Point, words: int) -> Case:
    T, N, loss = point.T, point.N, operation == "vocab_cross_entropy"
    randn = sweep.tensors(dtype)

    def inputs() -> tuple[Any, ...]:
        last = torch.randint(words, (T,), device=sweep.DEVICE) if loss else TOP
        return randn(T, N), randn(words, N) / N**0.5, randn(words), last

    def costs(backward: bool) -> tuple[int, int]:
        return cost(T, N, words, sweep.DTYPES[dtype].itemsize, 0 if loss else TOP, backward)

    ways = LOSSES if loss else {"torch": torch_topk}
    return Case(
        "vocab_softmax", operation, *point.x, inputs, sweep.providers(operation, ways), costs,
        wanted=(0, 1, 2) if loss else (), settings={"dtype": dtype, **point.rest, "V": words},
    )  # fmt: skip


def cases(dtype: str) -> Iterable[Case]:
    return (case(name, dtype, *shape) for name in ("vocab_cross_entropy", "vocab_topk") for shape in SHAPES)


if __name__ == "__main__":
    exit_with(sweep.main, "bench_vocab_softmax", __doc__, cases)
