"""Residual add + LayerNorm, and GELU + LayerNorm, against torch and Liger: `python -m bench.bench_layer_norm`."""

from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from xlmr.kernels.layer_norm import cost

from . import sweep
from .command import exit_with
from .harness import Case

EPS = 1e-5


def torch_add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x + residual, weight.shape, weight, bias, eps)


def torch_gelu_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(F.gelu(x), weight.shape, weight, bias, eps)


def liger_add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return LigerLayerNormFunction.apply(x + residual, weight, bias, eps)


WAYS = {"add_layer_norm": {"torch": torch_add_layer_norm}, "gelu_layer_norm": {"torch": torch_gelu_layer_norm}}
if sweep.GPU and sweep.installed("liger_kernel"):
    WAYS["add_layer_norm"]["liger"] = liger_add_layer_norm


def case(operation: str, dtype: str, point: sweep.Point) -> Case:
    T, N, rows = point.T, point.N, 2 if operation == "add_layer_norm" else 1
    randn = sweep.tensors(dtype)

    def inputs() -> tuple[Any, ...]:
        return *(randn(T, N) for _ in range(rows)), randn(N), randn(N), EPS

    def costs(backward: bool) -> tuple[int, int]:
        return cost(T, N, sweep.DTYPES[dtype].itemsize, rows == 2, backward)

    return Case(
        "layer_norm", operation, *point.x, inputs, sweep.providers(operation, WAYS[operation]), costs,
        wanted=tuple(range(rows + 2)), settings={"dtype": dtype, **point.rest},
    )  # fmt: skip


def cases(dtype: str) -> Iterable[Case]:
    return (case(operation, dtype, point) for operation in WAYS for point in sweep.points())


if __name__ == "__main__":
    exit_with(sweep.main, "bench_layer_norm", __doc__, cases)
