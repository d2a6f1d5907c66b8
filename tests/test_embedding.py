"""Gather + sum + LayerNorm against eager in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import DTYPES, assert_accurate, bytes_kept
from test_dropout import dropout_factors
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from xlmr import eager
from xlmr.kernels import embedding
from xlmr.kernels._dropout import draw_seed
from xlmr.kernels._norm import MAX_BLOCK_N

WORDS, TYPES, POSITIONS = 300, 2, 50


def inputs(T: int, N: int, dtype: torch.dtype, device: torch.device, mean: float = 0.0) -> dict[str, Any]:
    """embed's arguments; the rows' means are `mean`."""
    sizes = {"input_ids": WORDS, "token_type_ids": TYPES, "position_ids": POSITIONS}
    ids = {name: torch.randint(rows, (T,)).to(device) for name, rows in sizes.items()}
    word, token_type, position = (torch.randn(rows, N) for rows in sizes.values())
    tables = {"word": mean + word, "token_type": token_type, "position": position}
    affine = {"weight": 1 + 0.3 * torch.randn(N), "bias": torch.randn(N)}
    return ids | {name: t.to(device, dtype) for name, t in (tables | affine).items()} | {"eps": 1e-5, "padding_idx": 1}


def double(given: dict[str, Any]) -> dict[str, Any]:
    """The same in float64, ids as they are."""
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()}


def rows(given: dict[str, Any], which: Any) -> dict[str, Any]:
    """The tokens `which` of a batch."""
    return given | {name: given[name][which] for name in ("input_ids", "token_type_ids", "position_ids")}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [8, 96, 769])
@pytest.mark.parametrize("T", [0, 1, 37, 257])
def test_accuracy(T: int, N: int, dtype: torch.dtype, device: torch.device, poisoned: None) -> None:
    given = inputs(T, N, dtype, device)
    assert_accurate(embedding.embed(**given), eager.embed(**given), eager.embed(**double(given)))


@pytest.mark.parametrize("N", [96, MAX_BLOCK_N + 777])
def test_wide_rows_and_means_of_1000(N: int, device: torch.device, poisoned: None) -> None:
    given = inputs(5, N, torch.float32, device, mean=1000.0)
    truth = eager.embed(**double(given))
    error = (embedding.embed(**given).double() - truth).abs().max().item()
    assert error < 1e-3, f"max error {error:.1e} on values of up to {truth.abs().max().item():.1f}"


def test_eps(device: torch.device) -> None:
    given = inputs(5, 96, torch.float32, device) | {"eps": 1.0}
    torch.testing.assert_close(embedding.embed(**given).double(), eager.embed(**double(given)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_any_integer_type_and_stride_and_tables_of_any_row_stride(
    dtype: torch.dtype, device: torch.device
) -> None:
    given = inputs(37, 96, torch.float32, device) | {"token_type_ids": torch.ones(37, dtype=torch.int64, device=device)}
    expected = embedding.embed(**given)
    wide = torch.cat([given["word"], given["word"]], dim=1)
    strided = torch.stack([given["input_ids"]] * 3, dim=1).to(dtype)[:, 1]
    ones = torch.ones(1, dtype=dtype, device=device).expand(37)
    positions = given["position_ids"].to(dtype)
    given |= {"input_ids": strided, "token_type_ids": ones, "position_ids": positions, "word": wide[:, 96:]}
    assert torch.equal(embedding.embed(**given), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [24, 769])
def test_a_token_does_not_know_its_neighbours(N: int, dtype: torch.dtype, device: torch.device) -> None:
    """Bit for bit: alone, in any batch, at any place in it."""
    given = inputs(37, N, dtype, device, mean=3.0)
    whole = embedding.embed(**given)
    order = torch.randperm(37, device=device)
    for which in (slice(0, 1), slice(5, 6), slice(3, 37), slice(0, 37, 5), order):
        assert torch.equal(embedding.embed(**rows(given, which)), whole[which])


def test_every_row_of_every_table_is_reached(device: torch.device) -> None:
    """The first and the last row of each; one id more is refused on a CPU and gives NaN on a GPU."""
    given = inputs(2, 96, torch.float32, device)
    for name, size in (("input_ids", WORDS), ("token_type_ids", TYPES), ("position_ids", POSITIONS)):
        ends = given | {name: torch.tensor([0, size - 1], device=device)}
        torch.testing.assert_close(embedding.embed(**ends), eager.embed(**ends))
        for wrong in (-1, size):
            beyond = given | {name: torch.tensor([0, wrong], device=device)}
            if device.type == "cpu":
                with pytest.raises(IndexError, match=f"{name} go from .* allowed are 0 to {size - 1}"):
                    embedding.embed(**beyond)
            else:
                assert embedding.embed(**beyond).isnan().all(dim=1).tolist() == [False, True]


def test_an_id_outside_its_table_reads_nothing(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "_check_ids", lambda *_: None)  # as on a GPU
    given = inputs(3, 96, torch.float32, device)
    given["input_ids"] = torch.tensor([5, 2**40, -1], device=device)
    y = embedding.embed(**given)
    assert y.isnan().all(dim=1).tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda: {"input_ids": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, r"input_ids is \(2, 2\)"),
        (lambda: {"position_ids": torch.zeros(5, dtype=torch.int64)}, ValueError, r"position_ids is \(5,\), expected"),
        (lambda: {"token_type_ids": torch.zeros(4)}, TypeError, "token_type_ids is torch.float32"),
        (lambda: {"input_ids": torch.zeros(4, dtype=torch.int64, device="meta")}, ValueError, "is on meta"),
        (lambda: {"word": torch.zeros(9, 7)}, ValueError, r"word is \(9, 7\), expected \[rows, 8\]"),
        (lambda: {"position": torch.zeros(8, 9).t()}, ValueError, "contiguous last dimension"),
        (lambda: {"token_type": torch.zeros(9, 8).int()}, TypeError, "token_type is torch.int32"),
        (lambda: {"bias": torch.zeros(16)[::2]}, ValueError, "bias is .* expected a contiguous"),
        (lambda: {"dropout_p": -0.1}, ValueError, "dropout rate is -0.1"),
    ],
)
def test_refusals(change: Callable[[], dict], error: type[Exception], message: str, device: torch.device) -> None:
    given = inputs(4, 8, torch.float32, device)
    with torch.device(device), pytest.raises(error, match=message):
        embedding.embed(**given | change())


PARAMETERS = ("word", "token_type", "position", "weight", "bias")


def leaves(given: dict[str, Any], wanted: tuple[str, ...] = PARAMETERS, dtype: torch.dtype | None = None) -> Any:
    """The arguments again, with parameters of their own, of which `wanted` require gradients."""
    fresh = {name: given[name].detach().to(dtype or given[name].dtype, copy=True) for name in PARAMETERS}
    return given | {name: t.requires_grad_(name in wanted) for name, t in fresh.items()}


def gradients(y: Tensor, given: dict[str, Any], dy: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, [given[name] for name in PARAMETERS if given[name].requires_grad], dy.to(y.dtype))


def assert_gradients(given: dict[str, Any], dy: Tensor) -> None:
    """Against eager in the same dtype and in float64."""
    ours, reference, truth = (
        gradients(ops.embed(**tensors), tensors, dy)
        for ops, tensors in (
            (embedding, leaves(given)),
            (eager, leaves(given)),
            (eager, leaves(given, dtype=torch.float64)),
        )
    )
    for triple in zip(ours, reference, truth, strict=True):
        assert_accurate(*triple)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "N"), [(0, 8), (1, 8), (37, 769), (101, 96)])
def test_gradients(T: int, N: int, dtype: torch.dtype, device: torch.device, poisoned: None) -> None:
    """Ids from few rows, so that some span many pieces, some share one and some are absent; padding among them."""
    given = inputs(T, N, dtype, device)
    given["input_ids"] = torch.where(given["input_ids"] < 200, given["input_ids"] % 3, given["input_ids"])
    assert_gradients(given, torch.randn(T, N, device=device))


@pytest.mark.parametrize("N", [1100, 10000])
def test_gradients_of_rows_wider_than_a_block(N: int, device: torch.device, poisoned: None) -> None:
    assert_gradients(inputs(2, N, torch.float32, device, mean=3.0), torch.randn(2, N, device=device))


SEGMENTS = {
    "one id": [7] * 27,
    "one id in full pieces": [7] * 24,
    "two ids that meet at a piece's end": [3] * 8 + [9] * 19,
    "an id that ends and one that begins in a piece": [2] * 12 + [4] * 12,
    "a piece of which each end goes on": [0] * 9 + [5] * 4 + [6] * 20,
    "all different": list(range(19)),
    "the padding alone": [1] * 17,
    "padding between": [0] * 5 + [1] * 20 + [2] * 9,
}


@pytest.mark.parametrize("ids", SEGMENTS.values(), ids=SEGMENTS)
def test_segments_of_sorted_ids(ids: list[int], device: torch.device, poisoned: None) -> None:
    """Sums of small integers: exact, whatever the order; the padding's row and those of no token are zero."""
    shuffled = torch.tensor(ids, device=device)[torch.randperm(len(ids))]
    dh = torch.randint(-9, 9, (len(ids), 24), device=device).float()
    expected = torch.zeros(30, 24, device=device).index_add(0, shuffled, dh)
    table = torch.empty(30, 24, device=device)
    assert torch.equal(embedding._table_gradient(dh, shuffled, table, None), expected)
    expected[1] = 0
    assert torch.equal(embedding._table_gradient(dh, shuffled.int(), table, 1), expected)
    assert torch.equal(embedding._table_gradient(dh, shuffled, table, -29), expected)


def test_an_id_that_spans_many_pieces(device: torch.device) -> None:
    """More than the second kernel adds at once."""
    T = embedding.CHUNK * (dict(embedding.SPANS.tiles)["BLOCK_P"] + 3)
    ids, dh = torch.zeros(T, dtype=torch.int64, device=device), torch.ones(T, 8, device=device)
    assert embedding._table_gradient(dh, ids, torch.empty(1, 8, device=device), None).unique().tolist() == [T]


def test_an_id_outside_its_table_writes_nothing(device: torch.device) -> None:
    """As on a GPU, where no launcher has looked at the ids."""
    ids = torch.tensor([-1, -1, 4, 5, 5, 5, 5, 5, 5, 5, 5, 2**40], device=device)
    memory = torch.zeros(9, 8, device=device)
    gradient = embedding._table_gradient(torch.ones(12, 8, device=device), ids, memory[:5], None)
    assert gradient[:, 0].tolist() == [0, 0, 0, 0, 1]


def test_any_layout_of_dy(device: torch.device) -> None:
    given = leaves(inputs(9, 96, torch.float32, device))
    for dy in (torch.randn(1, 96, device=device).expand(9, 96), torch.randn(96, 9, device=device).t()):
        found, expected = (gradients(embedding.embed(**given), given, d) for d in (dy, dy.contiguous()))
        assert all(map(torch.equal, found, expected))


def test_only_what_is_asked_for(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each parameter alone gets the gradient that it gets among all; a frozen table costs no sorting and no sums."""
    given, dy = inputs(2, 96, torch.float32, device), torch.randn(2, 96, device=device)
    tensors = leaves(given)
    together = dict(zip(PARAMETERS, gradients(embedding.embed(**tensors), tensors, dy), strict=True))
    summed, table_gradient = [], embedding._table_gradient
    monkeypatch.setattr(embedding, "_table_gradient", lambda *a: summed.append(a[2]) or table_gradient(*a))
    for name, expected in together.items():
        tensors = leaves(given, (name,))
        (found,) = gradients(embedding.embed(**tensors), tensors, dy)
        assert torch.equal(found, expected)
        assert [t.data_ptr() for t in summed] == [tensors[name].data_ptr()] * (name in PARAMETERS[:3])
        summed.clear()


def test_gradients_are_the_same_at_every_run(device: torch.device) -> None:
    given, dy = leaves(inputs(70, 96, torch.float32, device)), torch.randn(70, 96, device=device)
    first, again = (gradients(embedding.embed(**given), given, dy) for _ in range(2))
    assert all(map(torch.equal, first, again))


def test_a_gradient_that_is_not_finite_stays_in_its_rows(device: torch.device) -> None:
    given, dy = leaves(inputs(12, 24, torch.float32, device)), torch.randn(12, 24, device=device)
    given["input_ids"] = torch.arange(12, device=device) + 5
    dy[2, 7] = float("nan")
    word, *_, db = gradients(embedding.embed(**given), given, dy)
    assert word.isnan().any(1).nonzero().tolist() == [[7]]
    assert db.isnan().nonzero().tolist() == [[7]]


def test_mixed_dtypes(device: torch.device) -> None:
    """Tables in 16 bits, the LayerNorm in 32: y and dy in 32, each gradient in its parameter's dtype."""
    given = inputs(19, 96, torch.float32, device)
    given = leaves(given | {name: given[name].half() for name in PARAMETERS[:3]})
    y, dy = embedding.embed(**given), torch.randn(19, 96, device=device)
    exact = leaves(given, dtype=torch.float64)
    truth = eager.embed(**exact)
    assert_accurate(y, truth.float(), truth)
    for name, found, expected in zip(PARAMETERS, gradients(y, given, dy), gradients(truth, exact, dy), strict=True):
        assert_accurate(found, expected.to(given[name].dtype), expected)


def test_what_is_kept(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """activation_bytes a token, and parameters; without gradients not even mean and rstd are computed."""
    given = leaves(inputs(19, 96, torch.float16, device))
    kept = bytes_kept(lambda: embedding.embed(**given), [given[name] for name in PARAMETERS])
    assert kept == 19 * embedding.activation_bytes()
    launched, launch = [], embedding.embed_fwd
    monkeypatch.setattr(embedding, "embed_fwd", lambda *a, **k: launched.append(launch(*a, **k)) or launched[-1])
    with torch.no_grad():
        assert not embedding.embed(**given).requires_grad
    assert launched[0][1:] == (None, None)


@pytest.mark.parametrize(
    ("T", "N", "p", "dtype"),
    [
        (21, 96, 0.1, torch.float32),
        (21, 96, 0.1, torch.float16),
        (4, 24, 1.0, torch.float32),
        (1, MAX_BLOCK_N + 777, 0.5, torch.float32),
    ],
)
def test_dropout(T: int, N: int, p: float, dtype: torch.dtype, device: torch.device, poisoned: None) -> None:
    """Against eager and the mask that the seed gives; dropout_p = 1 leaves zeros."""
    given, dy = leaves(inputs(T, N, dtype, device)), torch.randn(T, N, device=device)
    torch.manual_seed(5)
    y = embedding.embed(**given, dropout_p=p)
    found = y.detach(), *gradients(y, given, dy)
    torch.manual_seed(5)
    factors = dropout_factors(draw_seed(device), T, N, p)
    assert torch.equal(y == 0, factors == 0)
    reference, truth = [], []
    for results, kind in ((reference, dtype), (truth, torch.float64)):
        exact = leaves(given, dtype=kind)
        y = eager.embed(**exact) * factors.to(kind)
        results += y.detach(), *gradients(y, exact, dy)
    for triple in zip(found, reference, truth, strict=True):
        assert_accurate(*triple)


def test_dropout_replays(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """After torch.manual_seed and in an activation checkpoint; else each call draws anew, and without dropout none."""
    given, dy = leaves(inputs(9, 96, torch.float32, device)), torch.randn(9, 96, device=device)

    def run(given: dict[str, Any]) -> Tensor:
        return embedding.embed(**given, dropout_p=0.3)

    torch.manual_seed(7)
    first, second = run(given), run(given)
    torch.manual_seed(7)
    recomputed = checkpoint(run, given, use_reentrant=False)  # of the devices of its arguments it keeps the generators
    assert torch.equal(recomputed, first)
    assert not torch.equal(first, second)
    assert all(map(torch.equal, gradients(recomputed, given, dy), gradients(first, given, dy)))
    monkeypatch.setattr(embedding, "draw_seed", lambda device: pytest.fail("a seed was drawn"))
    embedding.embed(**given)


def test_cost() -> None:
    """Bytes: two rows read and one written a token, a type, w and b once, three ids; backward: dy, two rows, dh written
    and three times read, ids, sorted ids and orders, mean and rstd, w and the gradients of w and b."""
    assert embedding.cost(10, 8, 2)[1] == (3 * 80 + 24) * 2 + 3 * 10 * 8
    assert embedding.cost(10, 8, 2, backward=True)[1] == (7 * 80 + 32) * 2 + 9 * 10 * 8 + 80
