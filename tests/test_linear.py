"""Linear layers, with GELU and as the fused QKV projection, against eager in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from numerics import DTYPES, assert_accurate, bytes_kept, needs_gpu
from torch import Tensor

from xlmr import eager
from xlmr.kernels import _launch
from xlmr.kernels import _products as products
from xlmr.kernels import linear as kernel
from xlmr.kernels._launch import config

INTERPRETED = not torch.cuda.is_available()
needs_descriptors = pytest.mark.skipif(
    INTERPRETED and triton.__version__ < "3.7", reason="its interpreter starts no range at a program's number"
)
DESCRIPTORS = [False, pytest.param(True, marks=needs_descriptors)]


def inputs(T: int, N: int, K: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """x [T, K], three weights [N, K] and three biases [N], of which results are about 1 and every element matters."""
    x, w, b = torch.randn(T, K), torch.randn(3, N, K) / max(K, 1) ** 0.5, torch.randn(3, N)
    return tuple(t.to(device, dtype) for t in (x, *w, *b))


def linear(ops: Any, x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, bq: Tensor, bk: Tensor, bv: Tensor) -> Tensor:
    return ops.linear(x, wq, bq)


def no_bias(ops: Any, x: Tensor, wq: Tensor, *_: Tensor) -> Tensor:
    return ops.linear(x, wq, None)


def gelu(ops: Any, x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, bq: Tensor, bk: Tensor, bv: Tensor) -> Tensor:
    return ops.linear_act(x, wq, bq)


def gelu_no_bias(ops: Any, x: Tensor, wq: Tensor, *_: Tensor) -> Tensor:
    return ops.linear_act(x, wq, None, "gelu")


def qkv(ops: Any, *given: Tensor) -> Tensor:
    return torch.stack(ops.qkv_projection(*given), 1)


def qkv_some_biases(ops: Any, x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, *biases: Tensor) -> Tensor:
    return torch.stack(ops.qkv_projection(x, wq, wk, wv, biases[0], None, biases[2]), 1)


Operation = Callable[..., Tensor]
OPERATIONS = pytest.mark.parametrize("operation", [linear, no_bias, gelu, gelu_no_bias, qkv, qkv_some_biases])
EPILOGUES = pytest.mark.parametrize("operation", [linear, gelu, qkv])


def assert_matches(operation: Operation, ours: Tensor, given: tuple[Tensor, ...]) -> None:
    assert_accurate(ours, operation(eager, *given), operation(eager, *map(Tensor.double, given)))


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets how the kernel is launched, whatever the device: by descriptors or pointers, and with which tiles."""
    launch = kernel.linear_fwd

    def choose(descriptors: bool, tuned: Any = None) -> None:
        def overruled(*args: Any, **kwargs: Any) -> Tensor:
            return launch(*args, **kwargs, tuned=tuned, descriptors=descriptors)

        monkeypatch.setattr(kernel, "linear_fwd", overruled)
        monkeypatch.setattr(_launch, "REMEMBERS", False)
        monkeypatch.setattr(kernel, "processors", lambda device: 2)
        monkeypatch.setattr(kernel, "GROUP_M", 2)

    return choose


@OPERATIONS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 96])
@pytest.mark.parametrize("T", [0, 1, 37, 257])
def test_accuracy(
    T: int, width: int, dtype: torch.dtype, operation: Operation, device: torch.device, poisoned: None
) -> None:
    given = inputs(T, width, width, dtype, device)
    assert_matches(operation, operation(kernel, *given), given)


@EPILOGUES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "N", "K"), [(37, 3, 769), (37, 769, 24), (5, 1, 1), (4, 40, 0)])
def test_any_width(
    T: int, N: int, K: int, dtype: torch.dtype, operation: Operation, device: torch.device, poisoned: None
) -> None:
    given = inputs(T, N, K, dtype, device)
    assert_matches(operation, operation(kernel, *given), given)


@EPILOGUES
@pytest.mark.parametrize("descriptors", DESCRIPTORS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("BLOCK_M", "BLOCK_N"), [(64, 16), (128, 256)])
def test_tiles(
    BLOCK_M: int,
    BLOCK_N: int,
    dtype: torch.dtype,
    descriptors: bool,
    operation: Operation,
    device: torch.device,
    path: Callable[..., None],
    poisoned: None,
) -> None:
    """The narrowest tile and the widest, finished in two halves, at edges in every direction; two groups of row tiles.
    With descriptors two programs share the tiles of a persistent grid."""
    given = inputs(2 * BLOCK_M + 3, 40, 104, dtype, device)
    path(descriptors, config(8 if BLOCK_N > 16 else 4, 3, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N))
    assert_matches(operation, operation(kernel, *given), given)


@pytest.mark.parametrize("descriptors", DESCRIPTORS)
def test_the_projections_columns_do_not_run_into_each_other(
    descriptors: bool, device: torch.device, path: Callable[..., None], poisoned: None
) -> None:
    """N is no multiple of the column tile: the tile at the edge of q must not write k's first columns, nor v's end."""
    given = inputs(70, 72, 16, torch.float16, device)
    path(descriptors)
    q, k, v = kernel.qkv_projection(*given)
    assert q.data_ptr() + 72 * 2 == k.data_ptr()
    assert k.data_ptr() + 72 * 2 == v.data_ptr()
    assert q.shape == (70, 72)
    assert q.stride() == k.stride() == v.stride() == (3 * 72, 1)
    for ours, w, b in zip((q, k, v), given[1:4], given[4:], strict=True):
        assert torch.equal(ours, kernel.linear(given[0], w, b))


@EPILOGUES
def test_strided_rows(operation: Operation, device: torch.device) -> None:
    wide, *parameters = inputs(40, 32, 32, torch.float32, device)
    wide = torch.randn(40, 3 * 32, device=device)
    for x in (wide[:, 32:64], wide[::3, :32], wide[7:8, 64:], wide[:1, :32].expand(40, 32), wide[3, :32].view(1, 32)):
        assert torch.equal(operation(kernel, x, *parameters), operation(kernel, x.contiguous(), *parameters))
    weights = torch.randn(3, 32, 50, device=device)
    views, copies = ([f(w[:, 5:37]) for w in weights] for f in (lambda w: w, Tensor.contiguous))
    assert torch.equal(
        operation(kernel, wide[:, :32], *views, *parameters[3:]),
        operation(kernel, wide[:, :32], *copies, *parameters[3:]),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "operation"), [(48, gelu), (48, qkv), (75, linear)])
def test_a_row_does_not_know_its_neighbours(
    width: int, dtype: torch.dtype, operation: Operation, device: torch.device, ordered_dot: None
) -> None:
    """Bit for bit: alone, in any batch, at any place in it, beside rows that are NaN; and at an odd address."""
    T = 130
    x, *parameters = inputs(T, width, width, dtype, device)
    whole = operation(kernel, x, *parameters)
    for rows in (slice(77, 78), slice(3, T), slice(0, T, 5), slice(20, 84)):
        assert torch.equal(operation(kernel, x[rows], *parameters), whole[rows])
    order = torch.randperm(T, device=device)
    assert torch.equal(operation(kernel, x[order], *parameters), whole[order])
    shifted = torch.empty(T * width + 1, dtype=dtype, device=device)[1:].view(T, width).copy_(x)
    assert torch.equal(operation(kernel, shifted, *parameters), whole)
    x[4] = float("nan")
    changed = operation(kernel, x, *parameters)
    others = torch.arange(T, device=device) != 4
    assert changed[4].isnan().all()
    assert torch.equal(changed[others], whole[others])


@pytest.mark.parametrize("descriptors", DESCRIPTORS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_and_descriptors_do_not_change_a_bit(
    dtype: torch.dtype, descriptors: bool, device: torch.device, path: Callable[..., None], ordered_dot: None
) -> None:
    """Every configuration of the device's table, and in the interpreter the tiles of every target."""
    given = inputs(100, 72, 136, dtype, device)
    usual = gelu(kernel, *given)
    tables = kernel.CONFIGS.values() if INTERPRETED else [kernel.CONFIGS[kernel.target(device)]]
    found = {tuned.tiles: tuned for table in tables for key, tuned in table.items() if key[0] == dtype.itemsize}
    for tuned in found.values():
        path(descriptors, tuned)
        assert torch.equal(gelu(kernel, *given), usual), tuned


@pytest.mark.cuda
@needs_gpu
@EPILOGUES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [768, 3072, 769])
def test_no_load_changes_a_bit(width: int, dtype: torch.dtype, operation: Operation, device: torch.device) -> None:
    """One row in batches of every load, at the model's widths."""
    x, *parameters = inputs(12000, 768, width, dtype, device)
    alone = operation(kernel, x[:1], *parameters)
    for T in (2, 64, 65, 1000, 4000, 12000):
        assert torch.equal(operation(kernel, x[:T], *parameters)[:1], alone), T


def test_gelu_is_the_exact_one_and_rounded_once(device: torch.device) -> None:
    """fp16 sums of 2¹¹ + ¼ (no fp16 number): rounded before GELU or bias they would lose what the bias leaves; the tanh
    form is off by 4e-4 at −2.5."""
    x = torch.tensor([[2048.0, 0.25, 1.0]], device=device).half()
    weight = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, -2.5]], device=device).half()
    bias = torch.tensor([-2048.0, 0.0], device=device).half()
    truth = torch.nn.functional.gelu(torch.tensor([[0.25, -2.5]], dtype=torch.float64))
    torch.testing.assert_close(kernel.linear_act(x, weight, bias).cpu().double(), truth, atol=2e-5, rtol=5e-4)


@pytest.mark.cuda
@needs_gpu
def test_offsets_beyond_2_31(device: torch.device) -> None:
    """Rows of x that lie 2³⁰ elements apart; a y of more than 2³¹ elements."""
    apart, weight = 2**30 + 16, torch.randn(8, 16, device=device).half()
    x = torch.empty(2 * apart + 16, dtype=torch.float16, device=device).as_strided((3, 16), (apart, 1))
    x.copy_(torch.randn(3, 16))
    expected = kernel.linear(x.contiguous(), weight, None)
    assert torch.equal(kernel.linear(x, weight, None), expected)
    rows = 2**31 // 8 + 3
    many = x[:1].expand(rows, 16)
    assert torch.equal(kernel.linear(many, weight, None)[-5:], expected[:1].expand(5, 8))


def test_one_constant_for_each_dtype_fixes_the_order_of_a_sum() -> None:
    loads = ["unaligned", "text", *kernel.OUTPUTS, "large"]
    for name, table in kernel.CONFIGS.items():
        assert set(table) == {(itemsize, load) for itemsize in kernel.BLOCK_K for load in loads}
        for tuned in table.values():
            tiles = dict(tuned.tiles)
            assert tiles.keys() == {"BLOCK_M", "BLOCK_N"}
            assert tiles["BLOCK_M"] >= 64, "below, sm_90 and sm_100 change the tensor-core instruction"
            assert tiles["BLOCK_N"] >= (32 if name == "gfx942" else 16), "below, gfx942 changes the MFMA's depth"


@pytest.mark.parametrize(
    ("shape", "load"),
    [
        ((1, 768), "text"), ((64, 4096), "text"), ((65, 768), "small"), ((512, 3 * 768), "medium"),
        ((2048, 3072), "medium"), ((65536, 768), "large"), ((65536, 768, 2, False), "unaligned"),
    ],
)  # fmt: skip
def test_loads(shape: tuple, load: str) -> None:
    assert kernel.bucket(*(*shape, 2)[: max(3, len(shape))])[1] == load


def zeros(*shape: int, **kwargs: Any) -> Tensor:
    return torch.zeros(*shape, **kwargs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda: {"x": zeros(4, 8, 2)}, ValueError, r"x is \(4, 8, 2\), expected \[T, K\]"),
        (lambda: {"x": zeros(4, 9)}, ValueError, r"wq is \(6, 8\), expected \[N, 9\]"),
        (lambda: {"wk": zeros(5, 8)}, ValueError, r"wk is \(5, 8\), expected \[N, 8\], the same N for all"),
        (lambda: {"wq": zeros(6)}, ValueError, r"wq is \(6,\), expected \[N, 8\]"),
        (lambda: {"wv": zeros(6, 16)[:, :8]}, ValueError, "rows of wv are 16 elements apart, of the first 8"),
        (lambda: {"x": zeros(8, 4).t()}, ValueError, "last dimension of x must be contiguous"),
        (lambda: {f"w{i}": zeros(8, 6).t() for i in "qkv"}, ValueError, "last dimension of wq must be contiguous"),
        (lambda: {"bk": zeros(7)}, ValueError, r"bk is \(7,\), expected a contiguous \[6\]"),
        (lambda: {"bv": zeros(12)[::2]}, ValueError, "bv is .* expected a contiguous"),
        (lambda: {"bq": zeros(6).half()}, TypeError, "bq is torch.float16"),
        (lambda: {"x": zeros(4, 8).double()}, TypeError, "x is torch.float64"),
        (lambda: {"x": zeros(4, 8, device="meta")}, RuntimeError, "need a GPU"),
    ],
)
def test_refusals(change: Callable[[], dict], error: type[Exception], message: str, device: torch.device) -> None:
    with torch.device(device):
        given = {"x": zeros(4, 8), **{f"w{i}": zeros(6, 8) for i in "qkv"}, **{f"b{i}": zeros(6) for i in "qkv"}}
        given |= change()
    with pytest.raises(error, match=message):
        kernel.qkv_projection(**given)


def test_another_activation_is_refused_as_by_the_twin(device: torch.device) -> None:
    given = inputs(2, 4, 8, torch.float32, device)
    messages = []
    for ops in (kernel, eager):
        with pytest.raises(ValueError, match="'gelu' only, not 'relu'") as refusal:
            ops.linear_act(given[0], given[1], given[4], act="relu")
        messages.append(str(refusal.value))
    assert messages[0] == messages[1]


def test_cost() -> None:
    product, forward = 2 * 10 * 8 * 4, 40 + 32 + 8 + 80
    assert kernel.cost(10, 8, 4, 2) == (product, forward * 2)
    assert kernel.cost(10, 8, 4, 2, backward=True) == (2 * product, (2 * 40 + 2 * 32 + 8 + 80) * 2)
    assert kernel.cost(10, 8, 4, 2, backward=True, gelu=True)[0] == 3 * product


@EPILOGUES
def test_activation_bytes(operation: Operation, device: torch.device) -> None:
    given = [t.requires_grad_() for t in inputs(20, 16, 24, torch.float16, device)]
    assert bytes_kept(lambda: operation(kernel, *given), given[1:]) == 20 * kernel.activation_bytes(24, 2)


# Gradients


def gradients(operation: Operation, ops: Any, given: tuple[Tensor, ...], dy: Tensor, wanted: Any = range(7)) -> Any:
    """Of the inputs `wanted`, None for one that the operation does not use."""
    given = tuple(t.detach().requires_grad_(i in wanted) for i, t in enumerate(given))
    out = operation(ops, *given)
    return torch.autograd.grad(out, [given[i] for i in wanted], dy.to(out.dtype), allow_unused=True)


def assert_gradients(operation: Operation, given: tuple[Tensor, ...], dy: Tensor) -> None:
    ours = gradients(operation, kernel, given, dy)
    twin = gradients(operation, eager, given, dy)
    exact = gradients(operation, eager, tuple(map(Tensor.double, given)), dy)
    assert [g is None for g in ours] == [g is None for g in exact]
    for ours_, twin_, exact_ in zip(ours, twin, exact, strict=True):
        if exact_ is not None:
            assert_accurate(ours_, twin_, exact_)


def upstream(operation: Operation, given: tuple[Tensor, ...]) -> Tensor:
    return torch.randn_like(operation(eager, *given))


@OPERATIONS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "N", "K"), [(0, 8, 8), (1, 8, 9), (37, 24, 40), (150, 97, 17)])
def test_gradients(
    T: int, N: int, K: int, dtype: torch.dtype, operation: Operation, device: torch.device, poisoned: None
) -> None:
    given = inputs(T, N, K, dtype, device)
    assert_gradients(operation, given, upstream(operation, given))


@EPILOGUES
def test_gradients_split_along_the_rows_are_the_same_each_time(
    operation: Operation, device: torch.device, monkeypatch: pytest.MonkeyPatch, poisoned: None
) -> None:
    monkeypatch.setattr(products, "processors", lambda device: 64)
    given = inputs(300, 24, 40, torch.float32, device)
    dy = upstream(operation, given)
    assert_gradients(operation, given, dy)
    first, second = (gradients(operation, kernel, given, dy) for _ in range(2))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_of_rows_far_apart(device: torch.device) -> None:
    """A step along the rows of x is 2³¹ elements; of its 4 GB only the rows are ever touched."""
    apart = 2**25 + 16
    x = torch.empty(64 * apart + 16, dtype=torch.float16, device=device).as_strided((65, 16), (apart, 1))
    x.copy_(torch.randn(65, 16))
    dy = torch.randn(65, 16, device=device).half()
    assert torch.equal(products.product_dw([dy], x), products.product_dw([dy], x.contiguous()))


@pytest.mark.parametrize(("T", "tiles", "parts"), [(16384, 144, 3), (16384, 256, 1), (1024, 144, 1), (8192, 36, 3)])
def test_no_wave_of_programs_is_nearly_empty(T: int, tiles: int, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "processors", lambda device: 132)
    found, length = products.split_rows(T, tiles, torch.device("cpu"))
    assert found == parts
    assert (parts - 1) * length < T <= parts * length


@EPILOGUES
def test_upstream_gradients_at_any_strides(operation: Operation, device: torch.device) -> None:
    given = inputs(20, 16, 24, torch.float32, device)
    dy = upstream(operation, given)
    for view in (
        dy[:1].expand_as(dy),
        dy.new_ones(()).expand_as(dy),
        dy.transpose(0, -1).contiguous().transpose(0, -1),
    ):
        assert_gradients(operation, given, view)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # NumPy's, in the interpreter
def test_a_gradient_that_is_not_finite_is_passed_on(device: torch.device) -> None:
    given = inputs(20, 16, 24, torch.float32, device)
    dy = torch.randn(20, 16, device=device)
    dy[3, 5] = float("inf")
    dx, dw, *_, db, _, _ = gradients(linear, kernel, given, dy)
    assert not dx[3].isfinite().any()
    assert dx[:3].isfinite().all()
    assert not dw[5].isfinite().any()
    assert db[5] == float("inf")


def test_nothing_is_computed_that_nobody_asked_for(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    for module, name in ((products, "_dx_kernel"), (products, "_dw_kernel"), (kernel, "_linear_dz_kernel")):
        jitted = getattr(module, name)

        class Watched:
            def __getitem__(self, grid: Any, name: str = name, jitted: Any = jitted) -> Any:
                launched.append((name, grid))
                return jitted[grid]

        monkeypatch.setattr(module, name, Watched())
    given = inputs(20, 16, 24, torch.float32, device)
    dy = torch.randn(20, 3, 16, device=device)
    every = gradients(qkv, kernel, given, dy)
    for wanted, expected in (
        ([0], {"_dx_kernel"}), ([1, 3], {"_dw_kernel"}), ([5], {"_linear_dz_kernel"}),
        ([0, 2, 4], {"_dx_kernel", "_dw_kernel", "_linear_dz_kernel"}),
    ):  # fmt: skip
        launched.clear()
        found = gradients(qkv, kernel, given, dy, wanted)
        assert {name for name, _ in launched} == expected
        assert all(torch.equal(found[i], every[j]) for i, j in enumerate(wanted))
        for name, grid in launched:
            if name == "_dw_kernel":
                assert grid[1] == len([i for i in wanted if i in (1, 2, 3)])


def test_an_output_that_nobody_used_and_a_second_backward(device: torch.device) -> None:
    given = [t.requires_grad_() for t in inputs(20, 16, 24, torch.float32, device)]
    _, k, _ = kernel.qkv_projection(*given)
    k.square().sum().backward()
    assert given[2].grad.abs().max() > 0
    assert not given[1].grad.any()
    with pytest.raises(RuntimeError, match="second time"):
        k.square().sum().backward()
    x, w = (t.requires_grad_() for t in inputs(4, 8, 8, torch.float32, device)[:2])
    (dx,) = torch.autograd.grad(kernel.linear(x, w, None).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@EPILOGUES
def test_autocast(operation: Operation, device: torch.device) -> None:
    given = inputs(20, 16, 24, torch.float32, device)
    half = tuple(t.half() for t in given)
    dy = upstream(operation, given).half()
    with torch.autocast(device.type, torch.float16):
        out = operation(kernel, *given)
        ours = gradients(operation, kernel, given, dy)
    assert torch.equal(out, operation(kernel, *half))
    for mine, theirs in zip(ours, gradients(operation, kernel, half, dy), strict=True):
        assert mine is theirs is None or (mine.dtype == torch.float32 and torch.equal(mine, theirs.float()))


def test_every_load_has_a_configuration_for_backward() -> None:
    loads = {(itemsize, load) for itemsize in kernel.BLOCK_K for load in ("dx", "dw", "unaligned")}
    assert all(set(table) == loads for table in products.CONFIGS.values())
