"""Residual add + LayerNorm and GELU + LayerNorm against eager in float64."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numerics import DTYPES, assert_accurate, bytes_kept
from test_dropout import dropout_factors
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from xlmr import eager
from xlmr.kernels import layer_norm
from xlmr.kernels._dropout import draw_seed
from xlmr.kernels._norm import MAX_BLOCK_N, sum_partials

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
    given = inputs(3, MAX_BLOCK_N + 777, dtype, device, mean=3.0)
    assert_accurate(
        operation(layer_norm, *given), operation(eager, *given), operation(eager, *map(Tensor.double, given))
    )


@OPERATIONS
@pytest.mark.parametrize("N", [96, MAX_BLOCK_N + 777])
def test_row_means_of_1000(N: int, operation: Operation, device: torch.device) -> None:
    """mean(h²) − mean(h)² would lose every digit of a variance of 1 beside 10⁶; a mean of N terms keeps half an ulp of
    1000 (3e-5) in each h and about as much in μ."""
    given = inputs(19, N, torch.float32, device, mean=1000.0)
    truth = operation(eager, *map(Tensor.double, given))
    error = (operation(layer_norm, *given).double() - truth).abs().max().item()
    assert error < 1e-3, f"max error {error:.1e} on values of up to {truth.abs().max().item():.1f}"


@pytest.mark.parametrize("N", [96, MAX_BLOCK_N + 777])
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
    for table in (*layer_norm.CONFIGS.values(), *layer_norm.BACKWARD_CONFIGS.values()):
        assert all(N in ("wide", dict(config.tiles)["BLOCK_N"]) for N, config in table.items())
    widths = {1: 128, 128: 128, 129: 256, 769: 1024, 1024: 1024, 4096: 4096, 4097: "wide"}
    assert {N: layer_norm.bucket(N) for N in widths} == widths


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
        (lambda: {"bias": torch.zeros(8).int()}, TypeError, "bias is torch.int32"),
        (lambda: {"x": torch.zeros(4, 8).double()}, TypeError, "x is torch.float64"),
        (lambda: {"dropout_p": 1.5}, ValueError, "dropout rate is 1.5"),
        (lambda: {"x": torch.zeros(4, 8, device="meta")}, RuntimeError, "need a GPU"),
    ],
)
def test_refusals(change: Callable[[], dict], error: type[Exception], message: str, device: torch.device) -> None:
    with torch.device(device):
        x, residual, weight, bias = torch.zeros(4, 8), torch.zeros(4, 8), torch.zeros(8), torch.zeros(8)
        given = {"x": x, "residual": residual, "weight": weight, "bias": bias, **change()}
    with pytest.raises(error, match=message):
        layer_norm.add_layer_norm(**given, eps=EPS)


def leaves(given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.detach().clone().requires_grad_() for t in given)


def gradients(y: Tensor, given: tuple[Tensor, ...], dy: Tensor) -> tuple[Tensor, ...]:
    """Of every tensor that y depends on."""
    found = torch.autograd.grad(y, given, dy.to(y.dtype), allow_unused=True)
    return tuple(g for g in found if g is not None)


def assert_gradients(operation: Operation, given: tuple[Tensor, ...], dy: Tensor, eps: float = EPS) -> None:
    """Against eager in the same dtype and in float64."""
    ours, reference, truth = (
        gradients(operation(ops, *tensors, eps), tensors, dy)
        for ops, tensors in (
            (layer_norm, leaves(given)),
            (eager, leaves(given)),
            (eager, leaves(tuple(t.double() for t in given))),
        )
    )
    for triple in zip(ours, reference, truth, strict=True):
        assert_accurate(*triple)


@OPERATIONS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "N"), [(0, 8), (1, 8), (257, 96), (37, 769)])
def test_gradients(
    T: int, N: int, dtype: torch.dtype, operation: Operation, device: torch.device, poisoned: None
) -> None:
    assert_gradients(operation, inputs(T, N, dtype, device), torch.randn(T, N, device=device))


@OPERATIONS
def test_gradients_of_rows_wider_than_a_block(operation: Operation, device: torch.device, poisoned: None) -> None:
    assert_gradients(operation, inputs(2, 10000, torch.float16, device, mean=3.0), torch.randn(2, 10000, device=device))


@OPERATIONS
@pytest.mark.parametrize("N", [96, 769])
def test_gradients_at_row_means_of_1000(N: int, operation: Operation, device: torch.device) -> None:
    given = inputs(5, N, torch.float32, device, mean=1000.0)
    assert_gradients(operation, given, torch.randn(5, N, device=device))


def test_gelu_is_differentiated_exactly(device: torch.device) -> None:
    """Where Φ and φ matter: a LayerNorm of eps = 1 over values from −6 to 6."""
    x, _, weight, bias = inputs(64, 8, torch.float32, device)
    x = torch.linspace(-6, 6, 512, device=device).view(64, 8)
    assert_gradients(gelu, (x, x, weight, bias), torch.randn(64, 8, device=device), eps=1.0)


@OPERATIONS
def test_any_layout_of_dy(operation: Operation, device: torch.device) -> None:
    """As .sum() and slices hand it back: expanded, transposed, every other row of something."""
    given = leaves(inputs(9, 96, torch.float32, device))
    expanded = torch.randn(1, 96, device=device).expand(9, 96), torch.randn((), device=device).expand(9, 96)
    strided = torch.randn(96, 9, device=device).t(), torch.randn(18, 200, device=device)[::2, 50:146]
    for dy in (*expanded, *strided):
        found, expected = (gradients(operation(layer_norm, *given), given, d) for d in (dy, dy.contiguous()))
        assert all(map(torch.equal, found, expected))


@OPERATIONS
@pytest.mark.parametrize(("T", "N"), [(21, 96), (1, MAX_BLOCK_N + 777)])
def test_only_what_is_asked_for(
    T: int, N: int, operation: Operation, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tensor alone gets the gradient that it gets among all, and nothing else is even allocated."""
    given, dy = inputs(T, N, torch.float32, device), torch.randn(T, N, device=device)
    used = [0, 1, 2, 3] if operation is add else [0, 2, 3]
    tensors = leaves(given)
    together = gradients(operation(layer_norm, *tensors), tensors, dy)
    for place, expected in zip(used, together, strict=True):
        alone = [t.clone() for t in given]
        y = operation(layer_norm, *alone[:place], alone[place].requires_grad_(), *alone[place + 1 :])
        allocated, empty = [], torch.empty
        monkeypatch.setattr(torch, "empty", lambda *a, **k: allocated.append(empty(*a, **k)) or allocated[-1])  # noqa: B023
        assert torch.equal(torch.autograd.grad(y, alone[place], dy)[0], expected)
        monkeypatch.undo()
        assert len(allocated) == 1, "dx, or the partial sums of dw or of db"


def test_dx_is_dresidual(device: torch.device) -> None:
    given = leaves(inputs(5, 96, torch.float32, device))
    dx, dresidual, *_ = gradients(add(layer_norm, *given), given, torch.randn(5, 96, device=device))
    assert dx.data_ptr() == dresidual.data_ptr()


@OPERATIONS
def test_gradients_are_the_same_at_every_run(operation: Operation, device: torch.device) -> None:
    """Bit for bit; and dx of a row, like y, knows nothing of its neighbours."""
    given, dy = leaves(inputs(70, 96, torch.float32, device)), torch.randn(70, 96, device=device)
    first, again = (gradients(operation(layer_norm, *given), given, dy) for _ in range(2))
    assert all(map(torch.equal, first, again))
    rows = torch.tensor([40, 3, 69], device=device)
    some = leaves((given[0][rows], given[1][rows], *given[2:]))
    assert torch.equal(gradients(operation(layer_norm, *some), some, dy[rows])[0], first[0][rows])


@OPERATIONS
@pytest.mark.parametrize("wrong", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_is_passed_on(wrong: float, operation: Operation, device: torch.device) -> None:
    given, dy = leaves(inputs(5, 96, torch.float32, device)), torch.randn(5, 96, device=device)
    dy[2, 7] = wrong
    with np.errstate(invalid="ignore"):  # the interpreter's NumPy warns of inf − inf
        dx, *_, dw, db = gradients(operation(layer_norm, *given), given, dy)
    assert (~dx.isfinite()).all(1).tolist() == [False, False, True, False, False]
    assert (~dw.isfinite()).nonzero().tolist() == (~db.isfinite()).nonzero().tolist() == [[7]]


def test_mixed_dtypes(device: torch.device) -> None:
    """As under autocast: x from a product in 16 bits, the residual stream and the parameters in 32."""
    x, residual, weight, bias = inputs(19, 96, torch.float32, device)
    given = leaves((x.half(), residual, weight, bias))
    dy, y = torch.randn(19, 96, device=device), add(layer_norm, *given)
    assert y.dtype == torch.float32
    exact = leaves(tuple(t.detach().double() for t in given))
    truth = add(eager, *exact)
    assert_accurate(y, truth.float(), truth)
    for found, expected, source in zip(gradients(y, given, dy), gradients(truth, exact, dy), given, strict=True):
        assert_accurate(found, expected.to(source.dtype), expected)
    assert gelu(layer_norm, *given).dtype == torch.float32
    assert add(layer_norm, given[0], given[0], weight.half(), bias.half()).dtype == torch.float16


@OPERATIONS
def test_autocast_changes_nothing(operation: Operation, device: torch.device) -> None:
    given = inputs(5, 96, torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        y = operation(layer_norm, *given)
    assert torch.equal(y, operation(layer_norm, *given))


@OPERATIONS
def test_what_is_kept(operation: Operation, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """activation_bytes a token, and parameters; without gradients not even mean and rstd are computed."""
    T, N = 19, 96
    given = leaves(inputs(T, N, torch.float16, device))
    kept = bytes_kept(lambda: operation(layer_norm, *given), given[2:])
    assert kept == T * layer_norm.activation_bytes(N, 2, residual=operation is add)
    launched, launch = [], layer_norm.layer_norm_fwd
    monkeypatch.setattr(layer_norm, "layer_norm_fwd", lambda *a, **k: launched.append(launch(*a, **k)) or launched[-1])
    with torch.no_grad():
        assert not operation(layer_norm, *given).requires_grad
    assert launched[0][1:] == (None, None)


def dropped(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, factors: Tensor) -> Tensor:
    """The formula, with a mask that is known."""
    return F.layer_norm(x * factors + residual, weight.shape, weight, bias, EPS)


@pytest.mark.parametrize(
    ("T", "N", "p", "dtype"),
    [
        (37, 96, 0.1, torch.float32),
        (5, 769, 0.5, torch.float16),
        (4, 24, 1.0, torch.float32),
        (1, MAX_BLOCK_N + 777, 0.1, torch.float32),
    ],
)
def test_dropout(T: int, N: int, p: float, dtype: torch.dtype, device: torch.device, poisoned: None) -> None:
    """Against the formula with the mask that the seed gives; dropout_p = 1 leaves the residual."""
    given, dy = inputs(T, N, dtype, device), torch.randn(T, N, device=device)
    torch.manual_seed(5)
    tensors = leaves(given)
    y = layer_norm.add_layer_norm(*tensors, EPS, p)
    found = y.detach(), *gradients(y, tensors, dy)
    torch.manual_seed(5)
    factors = dropout_factors(draw_seed(device), T, N, p)
    assert abs((factors == 0).double().mean() - p) <= 4 * (p * (1 - p) / (T * N)) ** 0.5
    reference, truth = [], []
    for results, kind in ((reference, dtype), (truth, torch.float64)):
        exact = leaves(tuple(t.to(kind) for t in given))
        y = dropped(*exact, factors.to(kind))
        results += y.detach(), *gradients(y, exact, dy)
    for triple in zip(found, reference, truth, strict=True):
        assert_accurate(*triple)


def test_dropout_replays(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """After torch.manual_seed and in an activation checkpoint; else each call draws anew, and without dropout none."""
    given, dy = leaves(inputs(21, 96, torch.float32, device)), torch.randn(21, 96, device=device)

    def run(*tensors: Tensor) -> Tensor:
        return layer_norm.add_layer_norm(*tensors, EPS, 0.3)

    torch.manual_seed(7)
    first, second = run(*given), run(*given)
    torch.manual_seed(7)
    recomputed = checkpoint(run, *given, use_reentrant=False)  # of the devices of its arguments it keeps the generators
    assert torch.equal(recomputed, first)
    assert not torch.equal(first, second)
    assert all(map(torch.equal, gradients(recomputed, given, dy), gradients(first, given, dy)))
    monkeypatch.setattr(layer_norm, "draw_seed", lambda device: pytest.fail("a seed was drawn"))
    add(layer_norm, *given)


def test_a_second_backward_is_refused(device: torch.device) -> None:
    x, *rest = leaves(inputs(3, 8, torch.float32, device))
    (dx,) = torch.autograd.grad(add(layer_norm, x, *rest).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_cost() -> None:
    """Bytes: every [T, N] tensor, w and b once, for backward mean, rstd and the gradients of w and b."""
    assert layer_norm.cost(10, 8, 2)[1] == (3 * 80 + 16) * 2
    assert layer_norm.cost(10, 8, 4, residual=False)[1] == (2 * 80 + 16) * 4
    assert layer_norm.cost(10, 8, 2, backward=True)[1] == (4 * 80 + 24) * 2 + 80
    assert layer_norm.cost(10, 8, 2, backward=True, dropout=True)[1] == (5 * 80 + 24) * 2 + 80
    assert layer_norm.cost(10, 8, 4, residual=False, backward=True)[1] == (3 * 80 + 24) * 4 + 80


def test_sums_of_more_programs_than_a_block(device: torch.device) -> None:
    """As many as a GPU has; the interpreter's launches have few. Integers, which add up exactly."""
    partials = torch.randint(-99, 99, (131, 70), device=device).float()
    vector = torch.empty(70, device=device)
    totals = sum_partials(partials, None, vector, vector)
    assert totals[1] is None
    torch.testing.assert_close(totals[0], partials.sum(0), rtol=0, atol=0)
