"""Top-k and cross entropy over the vocabulary against eager in float64."""

import weakref
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from numerics import DTYPES, assert_accurate, bytes_kept
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from xlmr import eager
from xlmr.kernels import vocab_softmax
from xlmr.kernels.vocab_softmax import MAX_K, vocab_cross_entropy, vocab_topk

WORDS = vocab_softmax.WORDS
CHUNK = 128  # in these tests: a multiple of every BLOCK_V, so that few words make several
LAUNCHED_CHUNK = vocab_softmax.CHUNK


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocab_softmax, "CHUNK", CHUNK)
    monkeypatch.setattr(vocab_softmax, "ROWS", 1)
    for module in (vocab_softmax, eager):
        monkeypatch.setattr(module, "WORDS", {"chunked": 64, "recompute": 24})


def head(T: int, N: int, V: int, dtype: torch.dtype, device: torch.device, mean: float = 0.0) -> tuple[Tensor, ...]:
    """x, weight, bias; logits of deviation about 1 and row mean `mean`."""
    x, weight, bias = torch.randn(T, N), torch.randn(V, N) / N**0.5, mean + torch.randn(V)
    return tuple(t.to(device, dtype) for t in (x, weight, bias))


def exact(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Multiples of ¼, whose products sum without rounding: under the interpreter the BLAS behind a dot changes its
    order with the place in a tile."""
    return tuple((t * 4).round() / 4 for t in tensors)


def double(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.double() for t in tensors)


def assert_best(ours: tuple[Tensor, Tensor], given: tuple[Tensor, ...], k: int, targets: Tensor | None = None) -> None:
    """Log-probabilities as accurate as eager's, in order, of the words they are said to be of; no word twice."""
    log_probs, words = ours
    truth, _ = eager.vocab_topk(*double(*given), k, targets)
    assert_accurate(log_probs, eager.vocab_topk(*given, k, targets)[0], truth, dtype=given[0].dtype)
    assert words.dtype == torch.int64
    assert words.shape == truth.shape
    assert (log_probs.diff(dim=1) <= 0).all()
    assert all(len(set(row)) == k for row in words.tolist())
    everything = torch.log_softmax(eager.linear(*double(*given)), dim=-1)
    tolerance = 1e-5 if given[0].dtype == torch.float32 else 1e-4  # products of half precision are exact in fp32
    torch.testing.assert_close(everything.gather(1, words), log_probs.double(), atol=tolerance, rtol=tolerance)
    if targets is not None:
        assert set(words.flatten().tolist()) <= set(targets.tolist())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "N", "V", "k"),
    [(0, 96, 70, 5), (1, 769, 70, 5), (37, 8, 130, 1), (13, 96, 70, 5), (257, 96, 70, 1), (2, 8, 40, 40)],
)
def test_topk(T: int, N: int, V: int, k: int, dtype: torch.dtype, device: torch.device, poisoned: None) -> None:
    given = head(T, N, V, dtype, device)
    assert_best(vocab_topk(*given, k), given, k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_topk_over_several_chunks_and_rounds(dtype: torch.dtype, device: torch.device, poisoned: None) -> None:
    """More words than a chunk, and more wanted than a program keeps; the best words stand in different chunks."""
    given = head(3, 8, 2 * CHUNK + 5, dtype, device)
    for place in (0, CHUNK - 1, CHUNK, 2 * CHUNK + 4):
        given[2][place] += 6
    assert_best(vocab_topk(*given, 6), given, 6)
    few = head(3, 8, MAX_K + 9, dtype, device)
    assert_best(vocab_topk(*few, MAX_K + 3), few, MAX_K + 3)


@pytest.mark.parametrize("k", [1, 5])
def test_targets_compete_under_the_whole_softmax(k: int, device: torch.device, poisoned: None) -> None:
    given = head(5, 24, 130, torch.float32, device)
    targets = torch.randperm(130, device=device)[:40]
    assert_best(vocab_topk(*given, k, targets), given, k, targets)
    ours, twin = (topk(*given, k, targets.int()) for topk in (vocab_topk, eager.vocab_topk))
    torch.testing.assert_close(ours, twin)  # ids int64 whatever the targets are


def test_without_a_bias_and_with_strided_rows(device: torch.device, poisoned: None) -> None:
    x, weight, _ = head(9, 48, 70, torch.float32, device)
    x, weight = x[:, 8:32], weight[:, 24:]
    assert_best(vocab_topk(x, weight, None, 5), (x, weight, None), 5)
    labels = torch.arange(9, device=device)
    loss = vocab_cross_entropy(x, weight, None, labels)
    assert_accurate(loss, eager.vocab_cross_entropy(x, weight, None, labels),
                    eager.vocab_cross_entropy(*double(x, weight, None), labels))  # fmt: skip


def test_ties_go_to_the_lower_id(device: torch.device) -> None:
    """Equal logits within a tile, across tiles, chunks and rounds; with targets the earlier of them."""
    V = CHUNK + 70
    x, weight = torch.ones(2, 8, device=device), torch.zeros(V, 8, device=device)
    bias = torch.zeros(V, device=device)
    bias[[7, 3, 90, CHUNK + 1]] = 2.0
    k = MAX_K + 8
    expected = [3, 7, 90, CHUNK + 1, *(i for i in range(k) if i not in (3, 7))][:k]
    assert vocab_topk(x, weight, bias, k)[1].tolist() == [expected] * 2
    targets = torch.tensor([9, 90, 4, 3, 4], device=device)
    assert vocab_topk(x, weight, bias, 5, targets)[1].tolist() == [[90, 3, 9, 4, 4]] * 2


def test_extreme_logits(device: torch.device) -> None:
    """Row means of ±1000 cost the log-probabilities nothing; a word of logit −inf has probability 0 and stays out."""
    for mean in (1000.0, -1000.0):
        given = head(5, 24, 130, torch.float32, device, mean)
        truth = eager.vocab_topk(*double(*given), 5)[0]
        torch.testing.assert_close(vocab_topk(*given, 5)[0].double(), truth, atol=2e-4, rtol=0)  # an ulp of 1000: 6e-5
    x, weight, bias = head(5, 24, 130, torch.float32, device)
    bias[:70] = float("-inf")
    assert_best(vocab_topk(x, weight, bias, 30), (x, weight, bias), 30)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of the NaN
def test_a_row_of_nan_is_nan_and_names_words_that_exist(device: torch.device) -> None:
    x, weight, bias = head(5, 24, 130, torch.float32, device)
    x[2] = float("nan")
    log_probs, words = vocab_topk(x, weight, bias, 3)
    assert log_probs.isnan().any(1).tolist() == [False, False, True, False, False]
    assert ((words >= 0) & (words < 130)).all()


SETTINGS: list[dict[str, Any]] = [
    {},
    {"reduction": "none", "label_smoothing": 0.1, "z_loss": 0.01, "backward": "recompute"},
    {"reduction": "sum", "z_loss": 0.1},
    {"label_smoothing": 0.3, "ignore_index": 3},
]


def losses_and_gradients(ops: Any, given: tuple[Tensor, ...], labels: Tensor, **settings: Any) -> tuple[Tensor, ...]:
    given = tuple(t.detach().requires_grad_() for t in given)
    loss = ops.vocab_cross_entropy(*given, labels, **settings)
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1)).to(loss)
    return loss.detach(), *torch.autograd.grad(loss, given, upstream)


def some_labels(T: int, V: int, device: torch.device) -> Tensor:
    labels = torch.randint(V, (T,), device=device)
    labels[1::2] = -100
    labels[:1] = V - 1
    return labels


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "N", "V"), [(0, 8, 40), (1, 96, 70), (37, 8, 130), (3, 769, CHUNK + 5)])
def test_cross_entropy_and_its_gradients(
    T: int, N: int, V: int, dtype: torch.dtype, settings: dict[str, Any], device: torch.device, poisoned: None
) -> None:
    given, labels = head(T, N, V, dtype, device), some_labels(T, V, device)
    if settings.get("ignore_index"):
        labels = labels.clamp(min=3)
    ours = losses_and_gradients(vocab_softmax, given, labels, **settings)
    twin = losses_and_gradients(eager, given, labels, **settings)
    for mine, theirs, exact in zip(
        ours, twin, losses_and_gradients(eager, double(*given), labels, **settings), strict=True
    ):
        if T:
            assert_accurate(mine, theirs, exact, dtype=dtype)
        else:
            assert torch.equal(mine.isnan(), exact.isnan())
    again = losses_and_gradients(vocab_softmax, given, labels.int(), **settings)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(ours, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, vocab_softmax.SOME + 2])
def test_chunks_as_they_are_launched(
    T: int, dtype: torch.dtype, device: torch.device, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many tiles, then a part of one; steps that N does not fill; one row, and two more than a tile of some."""
    monkeypatch.setattr(vocab_softmax, "CHUNK", LAUNCHED_CHUNK)
    V = LAUNCHED_CHUNK + 70
    given = head(T, 72, V, dtype, device)
    labels = torch.randint(V, (T,), device=device)
    labels[0] = V - 1
    for settings in ({"reduction": "none"}, {"reduction": "none", "label_smoothing": 0.2}):
        ours, twin, truth = (
            ops.vocab_cross_entropy(*operands, labels, **settings)
            for ops, operands in ((vocab_softmax, given), (eager, given), (eager, double(*given)))
        )
        assert_accurate(ours, twin, truth, dtype=dtype)
    given[2][[0, LAUNCHED_CHUNK - 1, LAUNCHED_CHUNK, V - 1]] += 8
    assert_best(vocab_topk(*given, 5), given, 5)


@pytest.mark.parametrize("settings", SETTINGS)
def test_eager_is_torchs_cross_entropy(settings: dict[str, Any]) -> None:
    """In float64, logits in memory and the whole graph torch's own; z-loss written out."""
    given = double(*head(11, 6, 131, torch.float32, torch.device("cpu")))
    labels = some_labels(11, 131, torch.device("cpu")).clamp(min=settings.get("ignore_index", -100))
    known = {k: v for k, v in settings.items() if k not in ("z_loss", "backward")}

    class Torch:
        @staticmethod
        def vocab_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, **_: Any) -> Tensor:
            logits = torch.nn.functional.linear(x, weight, bias)
            labelled = labels != settings.get("ignore_index", -100)
            squares = torch.where(labelled, logits.logsumexp(1) ** 2, 0.0)
            reduce = {"none": lambda t: t, "sum": torch.sum, "mean": lambda t: t.sum() / labelled.sum()}
            extra = settings.get("z_loss", 0.0) * reduce[settings.get("reduction", "mean")](squares)
            return torch.nn.functional.cross_entropy(logits, labels, **known) + extra

    for ours, theirs in zip(
        losses_and_gradients(eager, given, labels, **settings), losses_and_gradients(Torch, given, labels), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("ops", [vocab_softmax, eager])
def test_gradients_of_what_was_asked_for_only(ops: Any, device: torch.device) -> None:
    given, labels = head(9, 24, 130, torch.float32, device), some_labels(9, 130, device)
    _, *every = losses_and_gradients(ops, given, labels)
    for wanted in ([0], [1], [2], [0, 2]):
        leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(given)]
        upstream = torch.randn((), generator=torch.Generator().manual_seed(1)).to(device)
        ops.vocab_cross_entropy(*leaves, labels).backward(upstream)
        for i, leaf in enumerate(leaves):
            assert leaf.grad is None if i not in wanted else torch.equal(leaf.grad, every[i])
        assert (leaves[0].grad is None) or not leaves[0].grad[labels == -100].any()


class Allocated(TorchDispatchMode):
    """The most bytes that tensors of numbers have had at a time, of those that torch's operations gave."""

    live = peak = 0

    def __init__(self) -> None:
        super().__init__()
        self.holders: Counter[int] = Counter()  # of a storage: tensors, of which some are views

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():  # the interpreter copies bytes
                storage = tensor.untyped_storage()
                self.hold(storage.data_ptr(), storage.nbytes(), 1)
                weakref.finalize(tensor, self.hold, storage.data_ptr(), storage.nbytes(), -1)
        return out

    def hold(self, storage: int, size: int, change: int) -> None:
        before = self.holders[storage] > 0
        self.holders[storage] += change
        self.live += size * ((self.holders[storage] > 0) - before)
        self.peak = max(self.peak, self.live)


@pytest.mark.parametrize(
    ("ops", "backward", "dtype"),
    [
        (vocab_softmax, "chunked", torch.float32),
        (eager, "chunked", torch.float32),
        (eager, "chunked", torch.float16),
        (eager, "recompute", torch.float32),
    ],
)
def test_logits_never_stand_in_memory(
    ops: Any, backward: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lives at a time, beside the operands, their gradients and numbers by the row, is a hundredth of the fp32
    logits: of 8,192 rows and 250,002 words, and here with the same shares of both."""
    T, N, V = 48, 2, 8192
    monkeypatch.setattr(ops, "WORDS", {name: count * V // 250_002 for name, count in WORDS.items()})
    monkeypatch.setattr(eager, "LOGITS", eager.LOGITS * T // 8192 * V // 250_002)
    monkeypatch.setattr(vocab_softmax, "CHUNK", LAUNCHED_CHUNK)
    given, labels = head(T, N, V, dtype, device), torch.randint(V, (T,), device=device)
    with Allocated() as allocated:
        losses_and_gradients(ops, given, labels, backward=backward)
    parameters, rows = 2 * (T * N + V * N + V) * dtype.itemsize, 12 * T * 4
    assert allocated.peak >= parameters + T * ops.WORDS["recompute"] * 4
    assert allocated.peak <= parameters + rows + 0.01 * T * V * 4
    assert {name: 100 * count / 250_002 for name, count in WORDS.items()} == {
        "chunked": pytest.approx(0.82, abs=0.01), "recompute": pytest.approx(0.10, abs=0.01),
    }  # fmt: skip


def test_few_rows_take_more_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for mode, megabytes in (("chunked", 32), ("recompute", 4)):
        sizes = {T: 2 * T * vocab_softmax.words_at_once(T, mode) / 2**20 for T in (0, 1, 1229, 8192, 65536)}
        assert sizes[0] == 0
        assert 0.75 * megabytes < sizes[1229] <= sizes[1] == sizes[8192] == megabytes
        assert sizes[65536] == 8 * megabytes


def test_autocast(device: torch.device) -> None:
    given, labels = head(9, 24, 130, torch.float32, device), some_labels(9, 130, device)
    half = tuple(t.half() for t in given)
    for ops in (vocab_softmax, eager):
        with torch.autocast(device.type, torch.float16):
            loss, *gradients = losses_and_gradients(ops, given, labels)
        expected, *halves = losses_and_gradients(ops, half, labels)
        torch.testing.assert_close(loss, expected)
        for mine, theirs in zip(gradients, halves, strict=True):
            assert mine.dtype == torch.float32
            torch.testing.assert_close(mine, theirs.float(), atol=2e-3, rtol=2e-3)


def test_what_is_kept_for_backward(device: torch.device) -> None:
    given = [t.requires_grad_() for t in head(8, 24, 130, torch.float16, device)]
    labels = torch.arange(8, device=device)
    kept = bytes_kept(lambda: vocab_cross_entropy(*given, labels, reduction="none"), given[1:])
    assert kept == 8 * vocab_softmax.activation_bytes(24, 2) + 8 * 8  # and the numbers of the labelled rows


def test_a_gradient_that_is_not_finite_is_passed_on(device: torch.device) -> None:
    for ops in (vocab_softmax, eager):
        x, weight, bias = (t.requires_grad_() for t in head(5, 24, 130, torch.float32, device))
        losses = ops.vocab_cross_entropy(x, weight, bias, torch.arange(5, device=device), reduction="none")
        upstream = torch.ones_like(losses)
        upstream[2] = float("nan")
        losses.backward(upstream)
        assert x.grad.isnan().all(1).tolist() == [False, False, True, False, False]
        assert weight.grad.isnan().all()
        with pytest.raises(RuntimeError, match="second time"):
            losses.backward(upstream)


def test_cross_entropy_of_no_label_is_nan(device: torch.device, poisoned: None) -> None:
    for T in (0, 3):
        given = head(T, 8, 70, torch.float32, device)
        loss = vocab_cross_entropy(*given, torch.full((T,), -100, device=device))
        assert loss.isnan()
        assert loss.shape == ()
        assert vocab_cross_entropy(*given, torch.full((T,), -100, device=device), reduction="sum") == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_know_its_neighbours(dtype: torch.dtype, device: torch.device) -> None:
    """Bit for bit: alone, in any batch, at any place; few rows, some and many have tiles of their own."""
    T = 20 if device.type == "cpu" else 200
    x, weight, bias = exact(*head(T, 24, CHUNK + 70, dtype, device))
    targets = torch.arange(0, 198, 13, device=device)
    labels = torch.arange(T, device=device) % 198

    def all_of(rows: Any) -> list[Tensor]:
        losses = vocab_cross_entropy(x[rows], weight, bias, labels[rows], reduction="none", label_smoothing=0.1)
        return [*vocab_topk(x[rows], weight, bias, 3), *vocab_topk(x[rows], weight, bias, 3, targets), losses]

    whole = all_of(slice(None))
    for rows in (slice(5, 6), slice(3, 12), slice(7, 7 + T // 2), torch.randperm(T, device=device)):
        for part, everything in zip(all_of(rows), whole, strict=True):
            assert torch.equal(part, everything[rows])
    labels[::3] = -100  # the loss of a row is the same beside rows without a label
    assert torch.equal(all_of(slice(None))[-1], torch.where(labels == -100, 0.0, whole[-1]))


def test_targets_and_the_whole_vocabulary_agree_bit_for_bit(device: torch.device) -> None:
    x, weight, bias = exact(*head(2, 24, 40, torch.float32, device))
    bias += torch.linspace(0, 0.1, 40, device=device)  # no ties
    log_probs, words = vocab_topk(x, weight, bias, 40)
    targets = torch.randperm(40, device=device)
    chosen, ids = vocab_topk(x, weight, bias, 40, targets)
    assert torch.equal(words, ids)
    assert torch.equal(log_probs, chosen)


def test_tiles_that_decide_a_rows_bits_are_one_constant() -> None:
    for table in vocab_softmax.CONFIGS.values():
        for itemsize in (2, 4):
            (width,) = {dict(table[itemsize, load].tiles)["BLOCK_V"] for load in ("few", "some", "many")}
            assert LAUNCHED_CHUNK % width == CHUNK % width == 0


def test_memory_stays_under_a_hundredth_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocab_softmax, "CHUNK", LAUNCHED_CHUNK)
    T, V, N, k = 1024, 250_002, 768, 8
    moved = vocab_softmax.cost(T, N, V, 2, k)[1] - (T * N + V * N + V) * 2 - 12 * T * k
    assert moved / 2 < 0.01 * T * V * 4  # written once, read once


IDS = torch.int64
IDS_OF_4 = torch.arange(4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda: {"x": torch.zeros(8)}, ValueError, r"x is \(8,\), expected \[T, N\]"),
        (lambda: {"x": torch.zeros(8, 4).t()}, ValueError, "last dimension of x must be contiguous"),
        (lambda: {"weight": torch.zeros(9, 7)}, ValueError, r"weight is \(9, 7\), expected \[V, 8\]"),
        (lambda: {"weight": torch.zeros(8, 9).t()}, ValueError, "last dimension of weight must be contiguous"),
        (lambda: {"bias": torch.zeros(8)}, ValueError, r"bias is \(8,\), expected a contiguous \[9\]"),
        (lambda: {"bias": torch.zeros(9).half()}, TypeError, "bias is torch.float16"),
        (lambda: {"weight": torch.zeros(9, 8, requires_grad=True)}, RuntimeError, "has no gradients"),
        (lambda: {"labels": IDS_OF_4, "reduction": "max"}, ValueError, "reduction is 'max': allowed are 'mean', 'sum'"),
        (lambda: {"labels": IDS_OF_4, "label_smoothing": 1.5}, ValueError, "label_smoothing is 1.5"),
        (lambda: {"labels": IDS_OF_4, "z_loss": -1.0}, ValueError, "z_loss -1.0|z_loss is -1.0"),
        (lambda: {"labels": IDS_OF_4, "backward": "x"}, ValueError, "backward is 'x': allowed are 'chunked'"),
        (lambda: {"k": 10}, ValueError, "k is 10, expected 0 to 9"),
        (lambda: {"k": -1}, ValueError, "k is -1, expected 0 to 9"),
        (lambda: {"k": 3, "targets": torch.zeros(2, dtype=IDS)}, ValueError, "k is 3, expected 0 to 2"),
        (lambda: {"targets": torch.zeros(2)}, TypeError, "targets is torch.float32"),
        (lambda: {"targets": torch.zeros(2, 2, dtype=IDS)}, ValueError, r"targets is \(2, 2\)"),
        (lambda: {"labels": torch.zeros(3, dtype=IDS)}, ValueError, r"labels is \(3,\), expected \[4\]"),
        (lambda: {"labels": torch.zeros(4)}, TypeError, "labels is torch.float32"),
    ],
)
def test_refusals(change: Callable[[], dict], error: type[Exception], message: str, device: torch.device) -> None:
    x, weight, bias = head(4, 8, 9, torch.float32, device)
    with torch.device(device):
        given = {"x": x, "weight": weight, "bias": bias, **change()}
    operation = vocab_cross_entropy if "labels" in given else partial(vocab_topk, k=2)
    with pytest.raises(error, match=message):
        operation(**given)


@pytest.mark.parametrize("wrong", [-1, 9])
def test_ids_outside_the_vocabulary(wrong: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused where asking costs nothing; else nothing outside is read: the loss is NaN, the target never wins."""
    given = head(4, 8, 9, torch.float32, device)
    targets, labels = torch.tensor([wrong, 5], device=device), torch.tensor([1, wrong, 2, 3], device=device)
    if device.type == "cpu":
        with pytest.raises(IndexError, match="targets go from"):
            vocab_topk(*given, 1, targets)
        with pytest.raises(IndexError, match="labels other than -100 go from"):
            vocab_cross_entropy(*given, labels)
    monkeypatch.setattr(vocab_softmax, "check_range", lambda *_: None)  # as on a GPU
    assert vocab_topk(*given, 1, targets)[1].eq(5).all()
    assert vocab_cross_entropy(*given, labels).isnan()
