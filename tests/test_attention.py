"""Flash attention against the plain one in float64: every layout of sequences, lengths from 0 on, bits and refusals."""

import copy
import itertools
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.numerics import assert_accurate
from xlmr import eager
from xlmr.kernels import attention as kernel
from xlmr.kernels._launch import config
from xlmr.kernels.attention import CONFIGS, attention, attention_fwd, cost
from xlmr.varlen import Sequences

DTYPES = [torch.float32, torch.float16, *[torch.bfloat16] * torch.cuda.is_available()]  # interpreted dots have no bf16
CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
RAGGED = (37, 0, 1, 70, 64, 129)


def packed(*lengths: int) -> Sequences:
    return Sequences.packed(torch.tensor([0, *itertools.accumulate(lengths)]), max(lengths))


def spans(queries: list[int], k_starts: list[int], keys: list[int]) -> Sequences:
    """Adjacent queries of these lengths, and keys that lie anywhere."""
    q_starts = [0, *itertools.accumulate(queries)][:-1]
    rows = (torch.tensor(row, dtype=torch.int32) for row in (q_starts, queries, k_starts, keys))
    return Sequences(*rows, max(queries), max(keys))


def on(device: torch.device, s: Sequences) -> Sequences:
    names = ("q_starts", "q_lens", "k_starts", "k_lens")
    return replace(s, **{name: getattr(s, name).to(device) for name in names})


def qkv(rows: int, head_dim: int, dtype: torch.dtype, device: torch.device, heads: int = 2) -> tuple[Tensor, ...]:
    """Views of one buffer [T, 3, H, D], as the projection writes it."""
    return torch.randn(rows, 3, heads, head_dim).to(device, dtype).unbind(1)


def assert_as_eager(q: Tensor, k: Tensor, v: Tensor, s: Sequences, causal: bool = False, scale: float = 0.2) -> Tensor:
    s = on(q.device, s)
    out = attention(q, k, v, s, scale, causal)
    truth = eager.attention(q.double(), k.double(), v.double(), s, scale, causal)
    assert_accurate(out, eager.attention(q, k, v, s, scale, causal), truth)
    assert out.is_contiguous()
    return out


@CAUSAL
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 24, 64, 80, 128])
def test_ragged_texts(head_dim: int, dtype: torch.dtype, causal: bool, device: torch.device, poisoned: None) -> None:
    assert_as_eager(*qkv(sum(RAGGED), head_dim, dtype, device), packed(*RAGGED), causal)


LAYOUTS = {
    "padding": spans([50, 50, 50], [0, 53, 149], [50, 41, 1]),  # masked on the right, on both sides, but for one
    "cross attention": spans([7, 3, 90], [0, 66, 66], [66, 0, 50]),
    "key/value cache": spans([1, 5, 64], [0, 100, 130], [70, 5, 101]),
    "a key more than queries": spans([70, 130], [0, 71], [71, 131]),  # causal: the last tile holds one key
    "more queries than keys": spans([70, 3, 130], [0, 5, 6], [5, 1, 66]),
    "first rows": packed(64, 1, 70).with_queries(torch.tensor([0, 64, 65])),
    "some rows": packed(64, 1, 70).with_queries(torch.tensor([0, 5, 70, 71, 72, 134])),
}


@CAUSAL
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype, causal: bool, device: torch.device, poisoned: None) -> None:
    s = LAYOUTS[layout]
    q, (_, k, v) = torch.randn(int(s.q_lens.sum()), 2, 24), qkv(240, 24, dtype, device)
    seen = torch.zeros(240, dtype=torch.bool)
    for start, length in zip(s.k_starts.tolist(), s.k_lens.tolist(), strict=True):
        seen[start : start + length] = True
    k[~seen], v[~seen] = float("nan"), float("nan")
    assert_as_eager(q.to(device, dtype), k, v, s, causal)


@CAUSAL
def test_log_sum_exp(causal: bool, device: torch.device, poisoned: None) -> None:
    s = on(device, spans([70, 3, 4], [0, 5, 5], [5, 40, 0]))
    q, k, _ = qkv(77, 24, torch.float32, device)
    out, lse = attention_fwd(q, k, k, s, 0.2, causal)
    truth = torch.full((2, 77), float("-inf"), dtype=torch.float64, device=device)
    for q_start, q_len, k_start, k_len in ((0, 70, 0, 5), (70, 3, 5, 40)):
        queries, keys = q[q_start : q_start + q_len].double(), k[k_start : k_start + k_len].double()
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * 0.2
        if causal:
            sees = torch.ones(q_len, k_len, dtype=torch.bool, device=device).tril(k_len - q_len)
            scores = scores.masked_fill(~sees, float("-inf"))
        truth[:, q_start : q_start + q_len] = scores.logsumexp(-1)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), truth, atol=1e-5, rtol=1e-5)
    unseeing = lse.isinf().T
    assert unseeing.any()
    assert (out[unseeing] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_far_from_zero(dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = qkv(70, 24, dtype, device)
    assert_as_eager(q, k, v + 1000, packed(70))
    assert_as_eager(q + 10, k + 1000, v, packed(70), scale=1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_do_not_overflow(dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = qkv(70, 24, dtype, device)
    out = assert_as_eager(q * 100, k * 100, v, packed(70), scale=1.0)  # scores to ±100,000
    assert out.isfinite().all()


def test_any_strides(device: torch.device) -> None:
    q, k, v = (torch.randn(2, 40, 24, device=device).transpose(0, 1) for _ in range(3))  # [H, T, D] in memory
    s = on(device, packed(40))
    assert torch.equal(attention(q, k, v, s, 0.2), attention(q.contiguous(), k.contiguous(), v.contiguous(), s, 0.2))
    assert_as_eager(q, k[:, :1].expand(40, 2, 24), v[:, 1:].expand(40, 2, 24), s)  # one head's keys for both
    assert_as_eager(q, k[3:], v[:37], spans([40], [0], [37]))


@CAUSAL
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_on_the_own_text_alone(dtype: torch.dtype, causal: bool, device: torch.device) -> None:
    """Alone, among short texts, beside a long one (another tile on a GPU), padded with NaN, a few rows of it."""
    text = qkv(70, 24, dtype, device, heads=1)
    alone = attention(*text, on(device, packed(70)), 0.2, causal)
    for before, after in (((), (3, 1)), ((1, 0, 64), (2,)), ((200,), ())):
        left, right = (qkv(sum(lengths), 24, dtype, device, heads=1) for lengths in (before, after))
        rows = [torch.cat(parts) for parts in zip(left, text, right, strict=True)]
        out = attention(*rows, on(device, packed(*before, 70, *after)), 0.2, causal)
        assert torch.equal(out[sum(before) : sum(before) + 70], alone), f"behind {before}, before {after}"
    padded = [torch.cat([torch.full_like(t, float("nan")), t, torch.full_like(t, float("nan"))]) for t in text]
    out = attention(text[0], *padded[1:], on(device, spans([70], [70], [70])), 0.2, causal)
    assert torch.equal(out, alone)
    rows = torch.tensor([0, 5, 69], device=device)
    few = attention(text[0][rows], *text[1:], on(device, packed(70)).with_queries(rows), 0.2)
    assert torch.equal(few, attention(*text, on(device, packed(70)), 0.2)[rows])


@CAUSAL
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's tables are compared in the test above")
def test_the_tile_of_queries_changes_no_bit(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Integer scores and v = 1 leave nothing to round in the interpreter's products, whose order is the tile's."""
    q, k = torch.randint(-3, 4, (2, 70, 2, 80)).float()
    v = torch.eye(70, 80)[:, None].expand(70, 2, 80)
    outs = []
    for block_m in (16, 32, 128):
        monkeypatch.setattr(kernel, "pick", lambda *_, m=block_m: config(4, 2, BLOCK_M=m, BLOCK_N=16))
        outs.append(attention(q, k, v, packed(70), 0.1, causal))
    assert all(torch.equal(outs[0], out) for out in outs)


def test_the_load_changes_no_block_of_keys() -> None:
    for target, table in CONFIGS.items():
        for width, size in {key[:2] for key in table}:
            blocks = {dict(table[width, size, short].tiles)["BLOCK_N"] for short in (True, False)}
            assert len(blocks) == 1, f"{target}, head_dim {width}, {size} bytes: {blocks}"


@given(lengths=st.lists(st.integers(0, 70), min_size=1, max_size=6), block_m=st.sampled_from([1, 16, 64]))
@settings(max_examples=50)
def test_blocks_cover_every_row_once(lengths: list[int], block_m: int) -> None:
    s = packed(*lengths)
    blocks = s.blocks(block_m, sum(lengths))
    assert blocks.dtype == torch.int32
    assert blocks.shape == (sum(lengths) // block_m + len(lengths), 2)
    expected = [[b, first] for b, length in enumerate(lengths) for first in range(0, length, block_m)]
    assert blocks[: len(expected)].tolist() == expected
    assert (blocks[len(expected) :, 0] == -1).all()


def test_blocks_are_computed_once_and_travel() -> None:
    s = packed(*RAGGED)
    blocks = s.blocks(64, sum(RAGGED))
    assert s.blocks(64, sum(RAGGED)) is blocks
    assert s.blocks(16, sum(RAGGED)) is not blocks
    for other in (pickle.loads(pickle.dumps(s)), copy.deepcopy(s)):
        assert torch.equal(other.blocks(64, sum(RAGGED)), blocks)
    first = s.with_queries(s.q_starts.long().unique())
    assert first.blocks(64, 5).shape == (6, 2)  # its queries are others


@pytest.mark.parametrize("lengths", [(0,), (0, 0)])
def test_no_rows(lengths: tuple[int, ...], device: torch.device) -> None:
    assert attention(*qkv(0, 24, torch.float32, device), on(device, packed(*lengths)), 0.2).shape == (0, 2, 24)


@CAUSAL
def test_cost_counts_what_is_seen(causal: bool) -> None:
    q_lens, k_lens = [5, 3, 0, 4, 1], [5, 7, 2, 2, 0]
    seen = [torch.ones(m, n).tril(n - m) if causal else torch.ones(m, n) for m, n in zip(q_lens, k_lens, strict=True)]
    flops = int(sum(pairs.sum() for pairs in seen)) * 2 * 2 * 24 * 3
    moved = 2 * (2 * sum(q_lens) + 2 * sum(k_lens)) * 24 * 3 + 4 * sum(q_lens) * 3
    assert cost(q_lens, k_lens, heads=3, head_dim=24, itemsize=2, causal=causal) == (flops, moved)


def refuse(error: type[Exception], message: str, device: torch.device, **changes: object) -> None:
    q, k, v = qkv(9, 24, torch.float32, device)
    arguments = {"q": q, "k": k, "v": v, "sequences": on(device, packed(4, 5)), "softmax_scale": 0.2}
    with pytest.raises(error, match=message):
        attention(**{**arguments, **changes})


def test_refusals(device: torch.device) -> None:
    good = torch.randn(9, 2, 24, device=device)
    refuse(ValueError, r"q, k, v are \[9, 48\]", device, q=good.flatten(1))
    refuse(ValueError, r"allowed are \[Tq, H, D\]", device, k=good[:, :1])
    refuse(ValueError, "allowed are", device, v=good[:8])
    for head_dim in (7, 129):
        wrong = torch.randn(9, 2, head_dim, device=device)
        refuse(ValueError, f"head_dim is {head_dim}, allowed are 8 to 128", device, q=wrong, k=wrong, v=wrong)
    refuse(ValueError, "last dimension must be contiguous", device, k=torch.randn(9, 24, 2, device=device).mT)
    refuse(TypeError, "k is torch.float16", device, k=good.half())
    refuse(ValueError, "k is on meta", device, k=good.to("meta"))
    refuse(RuntimeError, "has no gradients", device, q=good.clone().requires_grad_())
    refuse(RuntimeError, "no dropout yet", device, dropout_p=0.1)
    for scale in (0.0, -1.0, float("inf"), float("nan")):
        refuse(ValueError, "must be positive and finite", device, softmax_scale=scale)


def test_sequences_that_are_refused(device: torch.device) -> None:
    s = on(device, packed(4, 5))
    refuse(ValueError, r"int32 \[B\].* torch.int64", device, sequences=replace(s, k_lens=s.k_lens.long()))
    refuse(ValueError, r"int32 \[B\]", device, sequences=replace(s, q_starts=s.q_starts[:1]))
    nothing = s.q_starts[:0]
    refuse(ValueError, "B ≥ 1", device, sequences=Sequences(nothing, nothing, nothing, nothing, 0, 0))
    refuse(ValueError, "sequences are on meta", device, sequences=on(torch.device("meta"), s))


@pytest.mark.skipif(torch.cuda.is_available(), reason="values are read on a CPU only")
@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        (packed(4, 4), "cut the 9 rows of q"),
        (packed(4, 6), "cut the 9 rows of q"),
        (replace(packed(4, 5), q_starts=torch.tensor([5, 0], dtype=torch.int32)), "adjacent"),
        (replace(packed(4, 5), q_starts=torch.tensor([0, 3], dtype=torch.int32)), "adjacent"),
        (spans([10, -1], [0, 0], [1, 1]), "adjacent"),
        (spans([4, 5], [0, 5], [4, 5]), "leave the 9 rows of k"),
        (spans([4, 5], [-1, 4], [4, 5]), "leave the 9 rows of k"),
        (spans([4, 5], [0, 4], [4, -1]), "leave the 9 rows of k"),
    ],
)
def test_values_that_are_refused(sequences: Sequences, message: str) -> None:
    refuse(ValueError, message, torch.device("cpu"), sequences=sequences)
