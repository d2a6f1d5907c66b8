"""Gather + sum + LayerNorm against eager in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.numerics import assert_accurate
from xlmr import eager
from xlmr.kernels import embedding

DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # no dot: the interpreter can do bf16 here
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


@pytest.mark.parametrize("N", [96, embedding.MAX_BLOCK_N + 777])
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
                with pytest.raises(IndexError, match=f"{name} go from .* the table has rows 0 to {size - 1}"):
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
        (lambda: {"token_type": torch.zeros(9, 8).half()}, TypeError, "token_type is torch.float16"),
        (lambda: {"bias": torch.zeros(16)[::2]}, ValueError, "bias is .* expected a contiguous"),
        (lambda: {"word": torch.zeros(9, 8, requires_grad=True)}, RuntimeError, "has no gradients"),
        (lambda: {"dropout_p": 0.1}, RuntimeError, "no dropout"),
    ],
)
def test_refusals(change: Callable[[], dict], error: type[Exception], message: str, device: torch.device) -> None:
    given = inputs(4, 8, torch.float32, device)
    with torch.device(device), pytest.raises(error, match=message):
        embedding.embed(**given | change())


def test_cost() -> None:
    """Bytes: three rows read and one written a token, w and b once, three ids."""
    assert embedding.cost(10, 8, 2)[1] == (4 * 80 + 16) * 2 + 3 * 10 * 8
