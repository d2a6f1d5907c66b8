"""The GEMM and its epilogues against cuBLAS (a CPU: oneDNN, MKL) with separate ones: `python -m bench.bench_linear`.

The shapes are a layer's: the projection to queries, keys and values, the attention's output, and the feed-forward.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xlmr.kernels.linear import cost

from . import sweep
from .command import exit_with
from .harness import Case


def torch_linear_act(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias))


def torch_qkv(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    return tuple(F.linear(x, w, b) for w, b in zip(parameters[:3], parameters[3:], strict=True))


def torch_qkv_one_product(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    return F.linear(x, torch.cat(parameters[:3]), torch.cat(parameters[3:])).chunk(3, dim=-1)


# Tokens, and rows of the sweep over widths: on a CPU so many that weights of 26 million elements take no minute.
LOADS = (sweep.TOKENS, sweep.ROWS) if sweep.GPU else ((64, 256, 1024), 64)
# operation: torch's ways, and (outputs, inputs) of a layer of N hidden units
WAYS = {
    "qkv_projection": ({"torch": torch_qkv, "torch, one product": torch_qkv_one_product}, (1, 1)),
    "linear": ({"torch": F.linear}, (1, 4)),
    "linear_act": ({"torch": torch_linear_act}, (4, 1)),
}


def case(operation: str, dtype: str, point: sweep.Point) -> Case:
    ways, (out_units, in_units) = WAYS[operation]
    T, N, K = point.T, out_units * point.N, in_units * point.N
    parts = 3 if operation == "qkv_projection" else 1
    randn = sweep.tensors(dtype)

    def inputs() -> tuple[Any, ...]:
        return randn(T, K), *(randn(N, K) / K**0.5 for _ in range(parts)), *(randn(N) for _ in range(parts))

    def costs(backward: bool) -> tuple[int, int]:
        return cost(T, parts * N, K, sweep.DTYPES[dtype].itemsize, backward, operation == "linear_act")

    return Case(
        "linear", operation, *point.x, inputs, sweep.providers(operation, ways), costs,
        wanted=tuple(range(1 + 2 * parts)), settings={"dtype": dtype, **point.rest, "out": parts * N, "in": K},
    )  # fmt: skip


def cases(dtype: str) -> Iterable[Case]:
    return (case(operation, dtype, point) for operation in WAYS for point in sweep.points(*LOADS))


if __name__ == "__main__":
    exit_with(sweep.main, "bench_linear", __doc__, cases)
