"""Flash attention and its gradients against the plain one in float64: every layout of sequences, lengths from 0 on,
dropout against a formula with the same mask, bits and refusals."""

import copy
import itertools
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import DTYPES, assert_accurate, bytes_kept
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from xlmr import eager
from xlmr.kernels import attention as kernel
from xlmr.kernels._dropout import LEVELS, draw_seed, keep_levels, keeps
from xlmr.kernels._launch import config
from xlmr.kernels.attention import CONFIGS, activation_bytes, attention, attention_bwd, attention_fwd, cost
from xlmr.varlen import Sequences, plan

CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
RAGGED = (37, 0, 1, 70, 64)
SHORTER = (37, 0, 1, 70)


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


def assert_as_eager(
    q: Tensor, k: Tensor, v: Tensor, s: Sequences, causal: bool = False, scale: float = 0.2, scores: float = 0.0
) -> Tensor:
    """Accurate by the rule; scores that are large are fp32 numbers far apart, which moves p and its row by as much."""
    s = on(q.device, s)
    out = attention(q, k, v, s, scale, causal)
    truth = eager.attention(q.double(), k.double(), v.double(), s, scale, causal)
    rounding = {"dtype": torch.float32, "scale": scores, "ulps": 1} if scores else {}
    assert_accurate(out, eager.attention(q, k, v, s, scale, causal), truth, **rounding)
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


def gradients(out: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of `inputs`, for an upstream gradient that is the same in every dtype."""
    torch.manual_seed(1)
    return torch.autograd.grad(out, inputs, torch.randn(out.shape).half().to(out))


def assert_gradients_as_eager(tensors: tuple[Tensor, ...], s: Sequences, causal: bool, scale: float = 0.2) -> None:
    s = on(tensors[0].device, s)
    found = []
    for function, dtype in ((attention, None), (eager.attention, None), (eager.attention, torch.float64)):
        leaves = tuple(t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors)
        q, k, v = leaves[0].unbind(1) if len(leaves) == 1 else leaves
        found.append(gradients(function(q, k, v, s, scale, causal), leaves))
    largest = max(1.0, *(truth.abs().max().item() for truth in found[2]))  # one that is 0 is a difference of others
    for ours, reference, truth in zip(*found, strict=True):
        assert_accurate(ours, reference, truth, scale=largest)


@CAUSAL
@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [
        *itertools.product([8, 64, 80], [torch.float32]),
        *itertools.product([24, 128], [torch.float16, torch.bfloat16]),
    ],
)
def test_gradients_of_the_qkv_buffer(
    head_dim: int, dtype: torch.dtype, causal: bool, device: torch.device, poisoned: None
) -> None:
    buffer = torch.randn(sum(SHORTER), 3, 2, head_dim).to(device, dtype)
    assert_gradients_as_eager((buffer,), packed(*SHORTER), causal)


@CAUSAL
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_layouts(layout: str, causal: bool, device: torch.device, poisoned: None) -> None:
    """Keys that no sequence owns hold NaN and get zeros, as do queries and keys that see none."""
    s = LAYOUTS[layout]
    q, (_, k, v) = torch.randn(int(s.q_lens.sum()), 1, 24, device=device), qkv(240, 24, torch.float32, device, heads=1)
    unseen = torch.ones(240, dtype=torch.bool)
    for start, length in zip(s.k_starts.tolist(), s.k_lens.tolist(), strict=True):
        unseen[start : start + length] = False
    k[unseen], v[unseen] = float("nan"), float("nan")
    assert_gradients_as_eager((q, k, v), s, causal)


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
    torch.testing.assert_close(lse.double() * math.log(2), truth, atol=1e-5, rtol=1e-5)
    unseeing = lse.isinf().T
    assert unseeing.any()
    assert (out[unseeing] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_far_from_zero(dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = qkv(70, 24, dtype, device)
    assert_as_eager(q, k, v + 1000, packed(70))
    assert_as_eager(q + 10, k + 1000, v, packed(70), scale=1.0, scores=24 * 10 * 1000)
    assert_gradients_as_eager((q, k, v + 1000), packed(70), False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_do_not_overflow(dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = qkv(70, 24, dtype, device)
    out = assert_as_eager(q * 100, k * 100, v, packed(70), scale=1.0)  # scores to ±100,000
    assert out.isfinite().all()
    leaves = [t.detach().requires_grad_() for t in (q * 100, k * 100, v)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    found = gradients(attention(*leaves, on(device, packed(70)), 1.0, True), tuple(leaves))
    truth = gradients(eager.attention(*wide, on(device, packed(70)), 1.0, True), tuple(wide))
    for ours, expected in zip(found, truth, strict=True):  # p is as exact as scores and lse: rounded to 2⁻⁷ here
        assert (ours.double() - expected).abs().max() <= 2**-5 * truth[2].abs().max()


@pytest.mark.parametrize(("head_dim", "lengths"), [(32, (9, 9, 11, 10, 9, 9)), (64, (70, 37, 64))])
def test_gradients_of_peaked_probabilities(head_dim: int, lengths: tuple[int, ...], device: torch.device) -> None:
    """Backward's scores are rounded as forward's: what a large one has lost cancels in its normaliser."""
    tensors = tuple(torch.randn(sum(lengths), 4, head_dim, device=device) * size for size in (3, 3, 1))
    assert_gradients_as_eager(tensors, packed(*lengths), False, scale=head_dim**-0.5)


@CAUSAL
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # in rows that are dropped
def test_what_stands_beyond_the_last_key_reaches_no_gradient(causal: bool, device: torch.device) -> None:
    """Beyond it a score is 0 and here, where all real ones are far below, its probability is infinite."""
    q, k, v = (torch.randn(sum(SHORTER), 2, 16) / 8 + shift for shift in (8.0, -8.0, 0.0))
    assert_gradients_as_eager((q.to(device), k.to(device), v.to(device)), packed(*SHORTER), causal, scale=0.25)


def test_any_strides(device: torch.device) -> None:
    q, k, v = (torch.randn(2, 40, 24, device=device).transpose(0, 1) for _ in range(3))  # [H, T, D] in memory
    s = on(device, packed(40))
    assert torch.equal(attention(q, k, v, s, 0.2), attention(q.contiguous(), k.contiguous(), v.contiguous(), s, 0.2))
    assert_as_eager(q, k[:, :1].expand(40, 2, 24), v[:, 1:].expand(40, 2, 24), s)  # one head's keys for both
    assert_as_eager(q, k[3:], v[:37], spans([40], [0], [37]))


def test_any_upstream_gradient(device: torch.device) -> None:
    s = on(device, packed(40, 30))
    tensors = tuple(t.contiguous().requires_grad_() for t in qkv(70, 24, torch.float32, device))
    dense = torch.randn(70, 2, 24, device=device)
    for dout in (dense.transpose(0, 2).contiguous().transpose(0, 2), dense[:, :1].expand(70, 2, 24),
                 dense.sum().expand(70, 2, 24)):  # fmt: skip
        strided = torch.autograd.grad(attention(*tensors, s, 0.2), tensors, dout)
        contiguous = torch.autograd.grad(attention(*tensors, s, 0.2), tensors, dout.contiguous())
        assert all(map(torch.equal, strided, contiguous))
    broken = dense.clone()
    broken[50, 0, 3] = float("nan")
    found = torch.autograd.grad(attention(*tensors, s, 0.2), tensors, broken)
    sound = torch.autograd.grad(attention(*tensors, s, 0.2), tensors, dense)
    for ours, expected in zip(found, sound, strict=True):
        assert torch.equal(ours[:40], expected[:40])
        assert torch.equal(ours[40:, 1], expected[40:, 1])
        assert ours[40:, 0].isnan().any()  # passed through


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=3))[1:])
def test_only_the_gradients_that_are_asked_for(needed: tuple[bool, ...], device: torch.device, poisoned: None) -> None:
    q, k, v = qkv(40, 24, torch.float32, device)
    s, dout = on(device, packed(33, 7)), torch.randn(40, 2, 24, device=device)
    out, lse = attention_fwd(q, k, v, s, 0.2)
    every = attention_bwd(dout, q, k, v, out, lse, s, 0.2)
    some = attention_bwd(dout, q, k, v, out, lse, s, 0.2, needed=needed)
    assert [t is not None for t in some] == list(needed)
    assert all(torch.equal(mine, full) for mine, full in zip(some, every, strict=True) if mine is not None)


def test_what_is_kept_for_backward(device: torch.device) -> None:
    tensors = [t.contiguous().requires_grad_() for t in qkv(40, 24, torch.float16, device, heads=3)]
    call = partial(attention, *tensors, on(device, packed(33, 7)), 0.2)
    activations = 40 * activation_bytes(heads=3, head_dim=24, itemsize=2)
    assert bytes_kept(call) == activations
    assert bytes_kept(partial(call, dropout_p=0.5)) == activations + 8  # the seed


def test_a_second_backward_is_refused(device: torch.device) -> None:
    tensors = [t.contiguous().requires_grad_() for t in qkv(40, 24, torch.float16, device, heads=3)]
    out = attention(*tensors, on(device, packed(33, 7)), 0.2)
    first = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first[0].sum().backward()


def test_autocast(device: torch.device) -> None:
    q, k, v = (t.contiguous().requires_grad_() for t in qkv(20, 24, torch.float32, device))
    s = on(device, packed(20))
    with torch.autocast(device.type, torch.float16):
        out = attention(q, k.half(), v, s, 0.2)
    assert torch.equal(out, attention(q.half(), k.half(), v.half(), s, 0.2))
    assert [g.dtype for g in torch.autograd.grad(out.sum(), (q, k, v))] == [torch.float32] * 3


@triton.jit
def _kept_kernel(seed_ptr, out_ptr, levels, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows 0 … ROWS and columns 0 … BLOCK of the mask."""
    places = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out_ptr + places, keeps(seed_ptr, tl.arange(0, ROWS), 0, levels, BLOCK).to(tl.int8))


def plain_dropout(
    q: Tensor, k: Tensor, v: Tensor, s: Sequences, scale: float, causal: bool, p: float, seed: Tensor
) -> Tensor:
    """softmax, what the seed drops of it, times v: for every sequence and head by itself."""
    levels, (rows, heads, _) = keep_levels(p), q.shape
    mask = torch.empty(512, 128, dtype=torch.int8, device=q.device)
    _kept_kernel[(1,)](seed, mask, levels, ROWS=512, BLOCK=128, enable_fp_fusion=True)
    mask = mask[: rows * heads].view(rows, heads, 128).transpose(0, 1).to(q) * (LEVELS / max(levels, 1))
    outs = []
    for q_start, q_len, k_start, k_len in torch.stack([s.q_starts, s.q_lens, s.k_starts, s.k_lens], 1).tolist():
        queries, keys = slice(q_start, q_start + q_len), slice(k_start, k_start + k_len)
        scores = torch.einsum("qhd,khd->hqk", q[queries], k[keys]) * scale
        if causal:
            sees = torch.ones(q_len, k_len, dtype=torch.bool, device=q.device).tril(k_len - q_len)
            scores = scores.masked_fill(~sees, float("-inf"))
        weights = scores.softmax(-1) * mask[:, queries, :k_len]
        outs.append(torch.einsum("hqk,khd->qhd", weights, v[keys]))
    return torch.cat(outs)


@CAUSAL
@pytest.mark.parametrize(
    ("p", "dtype", "s"),
    [
        (0.3, torch.float32, packed(37, 0, 1, 70)),
        (0.3, torch.float16, packed(37, 0, 1, 70)),
        (0.1, torch.float32, spans([7, 3, 60], [0, 66, 70], [66, 3, 101])),
        (1.0, torch.float32, packed(5, 40)),
    ],
    ids=["packed", "half", "cross", "all"],
)
def test_dropout_is_the_formula_with_the_same_mask(
    p: float, dtype: torch.dtype, s: Sequences, causal: bool, device: torch.device, poisoned: None
) -> None:
    s = on(device, s)
    rows = int(s.q_lens.sum())
    q, (_, k, v) = torch.randn(rows, 2, 24).to(device, dtype), qkv(180, 24, dtype, device)
    k, v = (k[:rows], v[:rows]) if s.k_lens is s.q_lens else (k, v)
    torch.manual_seed(3)
    seed = draw_seed(device)
    found = []
    for function, precision in ((attention, dtype), (plain_dropout, dtype), (plain_dropout, torch.float64)):
        leaves = tuple(t.detach().to(precision).requires_grad_() for t in (q, k, v))
        torch.manual_seed(3)  # one call draws one seed
        out = function(*leaves, s, 0.2, causal, p, *[seed] * (function is plain_dropout))
        found.append((out.detach(), *gradients(out, leaves)))
    for ours, reference, truth in zip(*found, strict=True):
        assert_accurate(ours, reference, truth)
        assert p < 1 or (ours == 0).all()


def test_dropout_keeps_the_expectation_and_replays(device: torch.device) -> None:
    zeros, ones = torch.zeros(128, 2, 24, device=device), torch.ones(128, 2, 24, device=device)
    s = on(device, packed(128))
    torch.manual_seed(3)
    out, other = (attention(zeros, zeros, ones, s, 0.2, dropout_p=0.25)[:, :, 0] for _ in range(2))
    kept = out * 0.75  # the share of a row's 128 keys
    assert abs(kept.mean() - 0.75) < 4 * (0.25 * 0.75 / 128 / 256) ** 0.5
    assert 0.8 < kept.std() / (0.25 * 0.75 / 128) ** 0.5 < 1.2
    assert abs(torch.corrcoef(torch.stack([out[:, 0], out[:, 1]]))[0, 1]) < 0.35  # heads have masks of their own
    assert not torch.equal(out, other)
    torch.manual_seed(3)
    assert torch.equal(attention(zeros, zeros, ones, s, 0.2, dropout_p=0.25)[:, :, 0], out)
    state = torch.get_rng_state()
    attention(zeros[:9], zeros[:9], ones[:9], on(device, packed(9)), 0.2)
    assert torch.equal(torch.get_rng_state(), state), "without dropout no seed is drawn"


def test_activation_checkpointing_replays_dropout(device: torch.device) -> None:
    tensors = tuple(t.contiguous().requires_grad_() for t in qkv(40, 24, torch.float32, device))
    arguments = on(device, packed(33, 7)), 0.2, True, 0.4
    torch.manual_seed(3)
    plain = gradients(attention(*tensors, *arguments), tensors)
    for reentrant in (False, True):
        torch.manual_seed(3)
        out = checkpoint(attention, *tensors, *arguments, use_reentrant=reentrant)
        leaves = [t.grad for t in tensors]
        torch.manual_seed(1)
        torch.autograd.backward(out, torch.randn(out.shape).half().to(out))
        assert leaves == [None] * 3
        assert all(torch.equal(t.grad, expected) for t, expected in zip(tensors, plain, strict=True))
        for t in tensors:
            t.grad = None


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
            blocks = {dict(table[width, size, load].tiles)["BLOCK_N"] for load in ("short", "long")}
            assert len(blocks) == 1, f"{target}, head_dim {width}, {size} bytes: {blocks}"


def described(s: Sequences, size: int, rows: int, keys: bool = False) -> list[tuple[int, int]]:
    """Of each block that is not empty its sequence and its first row there, as the kernels read them."""
    of, begins = s.blocks(size, rows, keys)
    assert (of.dtype, begins.dtype, len(of)) == (torch.int32, torch.int32, rows // size + s.q_lens.numel())
    lens = (s.k_lens if keys else s.q_lens).tolist()
    firsts = [(i - int(begins[b])) * size for i, b in enumerate(of.tolist())]
    return [(b, first) for b, first in zip(of.tolist(), firsts, strict=True) if first < lens[b]]


@given(lengths=st.lists(st.integers(0, 70), min_size=1, max_size=6), block_m=st.sampled_from([1, 16, 64]))
@settings(max_examples=50)
def test_blocks_cover_every_row_once(lengths: list[int], block_m: int) -> None:
    expected = [(b, first) for b, length in enumerate(lengths) for first in range(0, length, block_m)]
    assert described(packed(*lengths), block_m, sum(lengths)) == expected


def test_blocks_are_computed_once_and_travel() -> None:
    s = packed(*RAGGED)
    blocks = s.blocks(64, sum(RAGGED))
    assert s.blocks(64, sum(RAGGED)) is blocks
    assert s.blocks(16, sum(RAGGED)) is not blocks
    keys = spans([5, 1], [0, 70], [64, 65])  # blocks of keys: theirs, in spite of the gap
    assert described(keys, 64, 140, keys=True) == [(0, 0), (1, 0), (1, 64)]
    assert described(keys, 64, 6) == [(0, 0), (1, 0)]
    for other in (pickle.loads(pickle.dumps(s)), copy.deepcopy(s)):
        assert all(map(torch.equal, other.blocks(64, sum(RAGGED)), blocks))
    first = s.with_queries(s.q_starts.long().unique())
    assert described(first, 64, 4) == [(0, 0), (2, 0), (3, 0), (4, 0)]  # its queries are others


@pytest.mark.parametrize("lengths", [(0,), (0, 0)])
def test_no_rows(lengths: tuple[int, ...], device: torch.device) -> None:
    tensors = tuple(t.requires_grad_() for t in qkv(0, 24, torch.float32, device))
    out = attention(*tensors, on(device, packed(*lengths)), 0.2)
    assert [t.shape for t in (out, *gradients(out, tensors))] == [(0, 2, 24)] * 4


@CAUSAL
def test_cost_counts_what_is_seen(causal: bool) -> None:
    q_lens, k_lens = [5, 3, 0, 4, 1], [5, 7, 2, 2, 0]
    seen = [torch.ones(m, n).tril(n - m) if causal else torch.ones(m, n) for m, n in zip(q_lens, k_lens, strict=True)]
    flops = int(sum(pairs.sum() for pairs in seen)) * 2 * 2 * 24 * 3
    moved = 2 * (2 * sum(q_lens) + 2 * sum(k_lens)) * 24 * 3 + 4 * sum(q_lens) * 3
    assert cost(q_lens, k_lens, heads=3, head_dim=24, itemsize=2, causal=causal) == (flops, moved)
    moved = 2 * (4 * sum(q_lens) + 4 * sum(k_lens)) * 24 * 3 + 4 * sum(q_lens) * 3
    assert cost(q_lens, k_lens, 3, 24, 2, causal, backward=True) == (flops * 5 // 2, moved)


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
    far = torch.empty_strided((2, 2, 24), (kernel.APART, 24, 1), device=device)
    refuse(ValueError, r"rows of q, k, v are 8388608, .* elements apart", device, q=far)
    refuse(TypeError, "k is torch.float16", device, k=good.half())
    refuse(ValueError, "k is on meta", device, k=good.to("meta"))
    for rate in (-0.1, 1.1, float("nan")):
        refuse(ValueError, "allowed is 0 to 1", device, dropout_p=rate)
    for scale in (0.0, -1.0, float("inf"), float("nan")):
        refuse(ValueError, "must be positive and finite", device, softmax_scale=scale)


def test_sequences_that_are_refused(device: torch.device) -> None:
    s = on(device, packed(4, 5))
    refuse(ValueError, r"int32 \[B\].* torch.int64", device, sequences=replace(s, k_lens=s.k_lens.long()))
    refuse(ValueError, r"int32 \[B\]", device, sequences=replace(s, q_starts=s.q_starts[:1]))
    nothing = s.q_starts[:0]
    refuse(ValueError, "B ≥ 1", device, sequences=Sequences(nothing, nothing, nothing, nothing, 0, 0))
    refuse(ValueError, "sequences are on meta", device, sequences=on(torch.device("meta"), s))


WRONG = [
    (packed(4, 4), "cut the 9 rows of q"),
    (packed(4, 6), "cut the 9 rows of q"),
    (Sequences.packed(torch.tensor([0, 6, 4, 9]), 9), "cut the 9 rows of q"),
    (Sequences.packed(torch.tensor([0, 4, 9]), 4), "adjacent sequences of 0 to 4"),
    (replace(packed(4, 5), q_starts=torch.tensor([5, 0], dtype=torch.int32)), "adjacent"),
    (replace(packed(4, 5), q_starts=torch.tensor([0, 3], dtype=torch.int32)), "adjacent"),
    (spans([10, -1], [0, 0], [1, 1]), "adjacent"),
    (spans([4, 5], [0, 5], [4, 5]), "of the 9 rows of k"),
    (spans([4, 5], [-1, 4], [4, 5]), "of the 9 rows of k"),
    (spans([4, 5], [0, 4], [4, -1]), "of the 9 rows of k"),
    (replace(spans([4, 5], [0, 4], [4, 5]), max_k=4), "0 to 4 keys each"),
    (packed(4, 5).known_to_fit(9, 9).with_queries(torch.tensor([*range(8), 9])), "cut the 9 rows"),  # one outside
]
OVERLAP = spans([4, 5], [0, 3], [4, 5]), r"k_starts \[0, 3\], k_lens \[4, 5\]"
NOT_ON_A_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a device-side assertion ends the process's CUDA")


@NOT_ON_A_GPU
@pytest.mark.parametrize("function", [attention, eager.attention])
@pytest.mark.parametrize(("sequences", "message"), WRONG)
def test_values_that_are_refused(sequences: Sequences, message: str, function: Callable[..., Tensor]) -> None:
    for _ in range(2):  # it is no better for having been seen
        with pytest.raises(ValueError, match=message):
            function(*qkv(9, 24, torch.float32, torch.device("cpu")), sequences, 0.2)


@NOT_ON_A_GPU
def test_gradients_of_shared_keys_are_refused() -> None:
    q, k, v = (t.contiguous().requires_grad_() for t in qkv(9, 24, torch.float32, torch.device("cpu")))
    sequences, message = OVERLAP
    out = attention(q, k, v, sequences, 0.2)
    with pytest.raises(ValueError, match=message):
        out.sum().backward()


@NOT_ON_A_GPU
@pytest.mark.parametrize(("sequences", "message"), [*WRONG, OVERLAP])
def test_a_gpu_asserts_values(sequences: Sequences, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without being waited for. A CPU, which stands in for one here, raises at once."""
    monkeypatch.setattr("xlmr.values.readable", lambda values: False)
    q, k, v = (t.contiguous().requires_grad_() for t in qkv(9, 24, torch.float32, torch.device("cpu")))
    with pytest.raises(RuntimeError, match=r"attention: [qk]_starts and [qk]_lens"):
        attention(q, k, v, sequences, 0.2).sum().backward()


def test_what_fits_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what `plan` makes never: each look is some ten launches on a GPU."""
    looks = []
    monkeypatch.setattr("xlmr.varlen.require", lambda right, what, **values: looks.append(what))
    s = packed(4, 5)
    for _ in range(3):
        s.check(9, 9)
    assert len(looks) == 2
    s.check(9, 9, disjoint=True)
    assert len(looks) == 5
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 1, 1]])
    for layout in (plan(3, 3, mask, device=mask.device, every_position=every) for every in (False, True)):
        rows = 9 if layout.indices is None else 7
        layout.sequences.check(rows, rows, disjoint=True)
    assert len(looks) == 5
