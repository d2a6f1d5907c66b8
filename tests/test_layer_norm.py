"""Residual add + LayerNorm and GELU + LayerNorm against eager in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.numerics import assert_accurate
from xlmr import eager
from xlmr.kernels import layer_norm

DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # no dot: the interpreter can do bf16 here
EPS = 1e-5


def inputs(T: int, N: int, dtype: torch.dtype, device: torch.device, mean: float = 0.0) -> tuple[Tensor, ...]:
    """x, residual, weight, bias; the rows' means are `mean`."""
    x, residual = mean + torch.randn(T, N), torch.randn(T, N)
    return tuple(t.to(device, dtype) for t in (x, residual, 1 + 0.3 * torch.randn(N), torch.randn(N)))


def add(ops, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = EPS) -> Tensor:
    return ops.add_layer_norm(x, residual, weight, bias, eps)


def gelu(ops, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = EPS) -> Tensor:
    return ops.gelu_layer_norm(x, weight, bias, eps)


OPERATIONS = pytest.mark.parametrize("operation", [add, gelu])
Operation = Callable[..., Tensor]


@OPERATIONS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [8, 96, 769])
@pytest.mark.parametrize("T", [0, 1, 37, 257])
def test_accuracy(
    T: int, N: int, dtype: torch.dtype, operation: Operation, device: torch.device, poisoned: None
) -> None:
    given = inputs(T, N, dtype, device)
    assert_accurate(
        operation(layer_norm, *given), operation(eager, *given), operation(eager, *map(Tensor.double, given))
    )


@OPERATIONS
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_wider_than_a_block(
    dtype: torch.dtype, operation: Operation, device: torch.device, poisoned: None
) -> None:
    given = inputs(3, layer_norm.MAX_BLOCK_N + 777, dtype, device, mean=3.0)
    assert_accurate(
        operation(layer_norm, *given), operation(eager, *given), operation(eager, *map(Tensor.double, given))
    )


@OPERATIONS
@pytest.mark.parametrize("N", [96, layer_norm.MAX_BLOCK_N + 777])
def test_row_means_of_1000(N: int, operation: Operation, device: torch.device) -> None:
    """mean(h²) − mean(h)² would lose every digit of a variance of 1 beside 10⁶; a mean of N terms keeps half an ulp of
    1000 (3e-5) in each h and about as much in μ."""
    given = inputs(19, N, torch.float32, device, mean=1000.0)
    truth = operation(eager, *map(Tensor.double, given))
    error = (operation(layer_norm, *given).double() - truth).abs().max().item()
    assert error < 1e-3, f"max error {error:.1e} on values of up to {truth.abs().max().item():.1f}"


@pytest.mark.parametrize("N", [96, layer_norm.MAX_BLOCK_N + 777])
def test_mean_and_rstd_are_kept(N: int, device: torch.device, poisoned: None) -> None:
    x, residual, weight, bias = inputs(9, N, torch.float16, device)
    _, mean, rstd = layer_norm.layer_norm_fwd("add_layer_norm", x, residual, weight, bias, EPS)
    h = x.double() + residual.double()
    assert mean.dtype == rstd.dtype == torch.float32
    torch.testing.assert_close(mean.double(), h.mean(1), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(rstd.double(), (h.var(1, correction=0) + EPS).rsqrt(), atol=0, rtol=1e-5)


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1.0])
def test_eps_and_constant_rows(eps: float, device: torch.device) -> None:
    """A constant row has no variance: it gives the bias, whatever eps; elsewhere eps of 1 matters."""
    x, residual, weight, bias = inputs(5, 96, torch.float32, device)
    x[2], residual[2] = 0.5, 0.25
    ours = add(layer_norm, x, residual, weight, bias, eps)
    truth = add(eager, *map(Tensor.double, (x, residual, weight, bias)), eps)
    torch.testing.assert_close(ours.double(), truth, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[2], bias)


@OPERATIONS
def test_strided_rows(operation: Operation, device: torch.device) -> None:
    x, residual, weight, bias = inputs(7, 3 * 96, torch.float32, device)
    weight, bias = weight[:96], bias[:96]
    views = x[:, 96:192], residual[::2, :96].repeat_interleave(2, 0)[:7]
    expected = operation(layer_norm, *(v.contiguous() for v in views), weight, bias)
    assert torch.equal(operation(layer_norm, *views, weight, bias), expected)
    assert torch.equal(operation(layer_norm, x[:1, :96].expand(7, 96), views[1], weight, bias)[:1],
                       operation(layer_norm, x[:1, :96], views[1][:1], weight, bias))  # fmt: skip


@OPERATIONS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [24, 96, 769])
def test_a_row_does_not_know_its_neighbours(
    N: int, dtype: torch.dtype, operation: Operation, device: torch.device
) -> None:
    """Bit for bit: alone, in any batch, at any place in it, beside rows that are huge or NaN."""
    x, residual, weight, bias = inputs(37, N, dtype, device, mean=3.0)
    whole = operation(layer_norm, x, residual, weight, bias)
    for rows in (slice(0, 1), slice(5, 6), slice(3, 37), slice(0, 37, 5), slice(20, 33)):
        assert torch.equal(operation(layer_norm, x[rows], residual[rows], weight, bias), whole[rows])
    order = torch.randperm(37, device=device)
    assert torch.equal(operation(layer_norm, x[order], residual[order], weight, bias), whole[order])
    x[4] = float("nan")
    changed = operation(layer_norm, x, residual, weight, bias)
    others = torch.arange(37, device=device) != 4
    assert changed[4].isnan().all()
    assert torch.equal(changed[others], whole[others])


def test_the_tile_depends_on_the_width_alone() -> None:
    for table in layer_norm.CONFIGS.values():
        assert all(dict(config.tiles)["BLOCK_N"] == N for N, config in table.items())
    assert [layer_norm.bucket(N) for N in (1, 128, 129, 769, 1024, 8192, 9000)] == [
        128,
        128,
        256,
        1024,
        1024,
        8192,
        8192,
    ]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda: {"x": torch.zeros(4, 8, 2)}, ValueError, r"x is \(4, 8, 2\), expected \[T, N\]"),
        (lambda: {"x": torch.zeros(4, 0)}, ValueError, "N ≥ 1"),
        (lambda: {"residual": torch.zeros(3, 8)}, ValueError, r"residual is \(3, 8\), x is \(4, 8\)"),
        (lambda: {"x": torch.zeros(8, 4).t()}, ValueError, "last dimension of x must be contiguous"),
        (lambda: {"residual": torch.zeros(8, 4).t()}, ValueError, "last dimension of residual must be contiguous"),
        (lambda: {"weight": torch.zeros(9)}, ValueError, r"weight is \(9,\), expected a contiguous \[8\]"),
        (lambda: {"bias": torch.zeros(16)[::2]}, ValueError, "bias is .* expected a contiguous"),
        (lambda: {"bias": torch.zeros(8).half()}, TypeError, "bias is torch.float16"),
        (lambda: {"x": torch.zeros(4, 8).double()}, TypeError, "x is torch.float64"),
        (lambda: {"weight": torch.zeros(8, requires_grad=True)}, RuntimeError, "has no gradients"),
        (lambda: {"dropout_p": 0.1}, RuntimeError, "no dropout"),
        (lambda: {"x": torch.zeros(4, 8, device="meta")}, RuntimeError, "need a GPU"),
    ],
)
def test_refusals(change: Callable[[], dict], error: type[Exception], message: str, device: torch.device) -> None:
    with torch.device(device):
        x, residual, weight, bias = torch.zeros(4, 8), torch.zeros(4, 8), torch.zeros(8), torch.zeros(8)
        given = {"x": x, "residual": residual, "weight": weight, "bias": bias, **change()}
    with pytest.raises(error, match=message):
        layer_norm.add_layer_norm(**given, eps=EPS)


def test_cost() -> None:
    """Bytes: every [T, N] tensor, w and b once, mean and rstd."""
    assert layer_norm.cost(10, 8, 2)[1] == (3 * 80 + 16) * 2 + 80
    assert layer_norm.cost(10, 8, 4, residual=False)[1] == (2 * 80 + 16) * 4 + 80
