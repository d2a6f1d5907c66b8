"""Embedding lookup, sum and LayerNorm against torch: `python -m bench.bench_embedding`."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xlmr.kernels.embedding import cost

from . import sweep
from .command import exit_with
from .harness import Case

WORDS = 250002 if sweep.GPU else 8192  # a gradient of 250,002 rows takes a CPU longer than all the rest
POSITIONS, EPS, PADDING = 514, 1e-5, 1


def torch_embed(
    words: Tensor, types: Tensor, positions: Tensor, word: Tensor, token_type: Tensor, position: Tensor,
    weight: Tensor, bias: Tensor, eps: float, padding_idx: int,
) -> Tensor:  # fmt: skip
    x = F.embedding(words, word, padding_idx) + F.embedding(types, token_type)
    return F.layer_norm(x + F.embedding(positions, position, padding_idx), weight.shape, weight, bias, eps)


def case(dtype: str, point: sweep.Point) -> Case:
    T, N = point.T, point.N
    randn = sweep.tensors(dtype)

    def inputs() -> tuple[Any, ...]:
        words = torch.randint(2, WORDS, (T,), device=sweep.DEVICE)
        positions = torch.arange(T, device=sweep.DEVICE) % 512 + 2
        tables = randn(WORDS, N), randn(1, N), randn(POSITIONS, N)
        return words, torch.zeros_like(words), positions, *tables, randn(N), randn(N), EPS, PADDING

    def costs(backward: bool) -> tuple[int, int]:
        return cost(T, N, sweep.DTYPES[dtype].itemsize, backward=backward)

    return Case(
        "embedding", "embed", *point.x, inputs, sweep.providers("embed", {"torch": torch_embed}), costs,
        wanted=(3, 4, 5, 6, 7), settings={"dtype": dtype, **point.rest, "V": WORDS},
    )  # fmt: skip


def cases(dtype: str) -> Iterable[Case]:
    return (case(dtype, point) for point in sweep.points())


if __name__ == "__main__":
    exit_with(sweep.main, "bench_embedding", __doc__, cases)
