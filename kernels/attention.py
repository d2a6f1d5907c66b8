"""Flash attention.   s = q·kᵀ·scale,   p = softmax(s),   o = (p ∘ z)·v,   lse = log₂ Σ exp(s)   within each sequence

z is 1 or, with dropout, 1 / (rate of keeping) where a probability is kept and 0 elsewhere. Backward, with p recomputed
as 2^(s·log₂e − lse):   delta = rowsum(do ∘ o),   dp = (do·vᵀ) ∘ z,   ds = p ∘ (dp − delta),
                        dq = ds·k·scale,   dk = dsᵀ·q·scale,   dv = (p ∘ z)ᵀ·do

Shapes  q, o: [Tq, H, D]   k, v: [Tk, H, D]   lse, delta: [H, Tq] fp32   starts, lengths: [B] int32
Twin    xlmr.eager.attention
Source  Dao et al., 2022 and 2023 (FlashAttention 1, 2); Milakov & Gimelshein, 2018 (running maximum and sum)

One program computes BLOCK_M query rows of one head of one sequence: it walks over the sequence's keys in tiles of
BLOCK_N and keeps every row's maximum, sum and output in registers, in fp32 and base 2. Where the queries and keys of a
sequence lie is data: packed and padded batches, cross attention, key/value caches and one query a text are one kernel.
Backward is two more: one walks as forward does, for delta and dq; in the other a program has BLOCK_N keys, walks over
the queries that see them and keeps dk and dv. Nothing is added across programs, so gradients agree bit for bit.

A row's bits depend on its own sequence alone: BLOCK_N is one constant for each head_dim and dtype, a tile that a row
does not see leaves its state as it is, and what varies with the load (BLOCK_M, warps) keeps the order of its sums.

Dropout's mask is that of _dropout.keeps at row (query's row in q)·H + head and column (key's place in its sequence),
so all three kernels meet the same one, whatever their tiles.

Prediction for an H200 (nothing is measured yet), bf16, D = 64, bidirectional: the exponential is the roof. A score
costs 256 flops on the tensor cores (990 TFLOP/s) and one exp2 (16 a clock and SM: 132 · 16 · 1.75 GHz = 3.7 T/s), which
alone bounds it at 946 TFLOP/s; one after the other, the two allow 480. The fp32 work of a score (maximum, scale, sum,
cast) is partly hidden by an SM's second program: 70 % of 480, 340 TFLOP/s, at 512 keys, and 80 %, 380, from 2,048 on.
One query a text reads K and V once: 75 % of 4.3 TB/s. Backward computes 896 flops and two exp2 a score, of which 640
flops count: 440 TFLOP/s one after the other. That of dk and dv has registers for one program an SM, so less is hidden:
55 %, 240 TFLOP/s, at 512 keys, and 65 %, 285, from 2,048 on. Dropout adds some 14 integer operations a score to each of
the three kernels, at half the rate of fp32's: a third more time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._dropout import LEVELS, draw_seed, keep_levels, keeps
from ._launch import (
    Config,
    Kind,
    Launch,
    Table,
    autocast,
    check,
    check_kinds,
    config,
    input_precision,
    kinds,
    opaque,
    pick,
    refuse_gradients,
    remembered,
    wants_gradients,
)
from ._loops import bound

LOG2_E = tl.constexpr(1.4426950408889634)
HEAD_DIMS = range(8, 129)
APART = 2**23  # rows of q, k and v begin fewer elements apart: a tile's 256 at most are counted in 32 bits


def cost(
    q_lens: Sequence[int],
    k_lens: Sequence[int],
    heads: int,
    head_dim: int,
    itemsize: int,
    causal: bool = False,
    backward: bool = False,
) -> tuple[int, int]:
    """(flops, bytes) of forward: two products for each visible pair of query and key; q, k, v, o, lse through memory
    once. Of backward: five products (seven are computed: two kernels need the scores), and four gradients as well."""
    pairs = 0
    for queries, keys in zip(q_lens, k_lens, strict=True):
        seeing = min(queries, keys)  # causal: so many queries see a key, the last one all, each earlier one a key less
        pairs += seeing * keys - seeing * (seeing - 1) // 2 if causal else queries * keys
    products, tensors = (5, 4) if backward else (2, 2)
    rows = tensors * (sum(q_lens) + sum(k_lens))
    return 2 * products * pairs * heads * head_dim, heads * (rows * head_dim * itemsize + 4 * sum(q_lens))


def activation_bytes(heads: int, head_dim: int, itemsize: int) -> int:
    """Bytes a token kept for backward: q, k, v, o and lse. Dropout keeps its seed, 8 bytes a call."""
    return heads * (4 * head_dim * itemsize + 4)


# The average number of queries a sequence up to which a batch counts as short.
SHORT = 128

# (head_dim up to, bytes of an element, load). Not measured yet: chosen by compiling with Triton 3.6 and 3.9, without
# spills. The short and the long load of a head_dim and dtype have one BLOCK_N and spread a row over lanes alike, so
# their bits agree; where a second tile would not, or spills, one serves both. A single query takes a whole tile too:
# the idle rows cost less time than reading K and V. Dropout's random numbers need registers: often a smaller tile.
# In fp32 the portable tiles of all three kernels are alike: the interpreter's products are rounded by their shape.
CONFIGS: Table = {
    "portable": {
        (64, 2, "short"): config(4, 2, BLOCK_M=64, BLOCK_N=32),
        (64, 2, "long"): config(4, 2, BLOCK_M=64, BLOCK_N=32),
        (64, 2, "dropout"): config(8, 2, BLOCK_M=64, BLOCK_N=32),
        (128, 2, "short"): config(4, 2, BLOCK_M=64, BLOCK_N=32),
        (128, 2, "long"): config(4, 2, BLOCK_M=64, BLOCK_N=32),
        (128, 2, "dropout"): config(4, 2, BLOCK_M=32, BLOCK_N=32),
        (64, 4, "short"): config(4, 2, BLOCK_M=32, BLOCK_N=32),
        (64, 4, "long"): config(4, 2, BLOCK_M=32, BLOCK_N=32),
        (64, 4, "dropout"): config(4, 2, BLOCK_M=32, BLOCK_N=32),
        (128, 4, "short"): config(4, 2, BLOCK_M=16, BLOCK_N=16),
        (128, 4, "long"): config(4, 2, BLOCK_M=16, BLOCK_N=16),
        (128, 4, "dropout"): config(4, 2, BLOCK_M=16, BLOCK_N=16),
    },
    "sm_80": {
        (64, 2, "short"): config(4, 3, BLOCK_M=64, BLOCK_N=64),
        (64, 2, "long"): config(8, 3, BLOCK_M=128, BLOCK_N=64),
        (64, 2, "dropout"): config(4, 3, BLOCK_M=64, BLOCK_N=32),
        (128, 2, "short"): config(8, 3, BLOCK_M=128, BLOCK_N=32),
        (128, 2, "long"): config(8, 3, BLOCK_M=128, BLOCK_N=32),
        (128, 2, "dropout"): config(4, 2, BLOCK_M=64, BLOCK_N=32),
        (64, 4, "short"): config(4, 2, BLOCK_M=32, BLOCK_N=32),
        (64, 4, "long"): config(4, 2, BLOCK_M=32, BLOCK_N=32),
        (64, 4, "dropout"): config(4, 2, BLOCK_M=32, BLOCK_N=32),
        (128, 4, "short"): config(4, 2, BLOCK_M=16, BLOCK_N=32),
        (128, 4, "long"): config(4, 2, BLOCK_M=16, BLOCK_N=32),
        (128, 4, "dropout"): config(4, 2, BLOCK_M=16, BLOCK_N=32),
    },
    "sm_90": {
        (64, 2, "short"): config(4, 3, BLOCK_M=64, BLOCK_N=64),
        (64, 2, "long"): config(8, 3, BLOCK_M=128, BLOCK_N=64),
        (64, 2, "dropout"): config(8, 3, BLOCK_M=128, BLOCK_N=64),
        (128, 2, "short"): config(4, 2, BLOCK_M=64, BLOCK_N=64),
        (128, 2, "long"): config(8, 2, BLOCK_M=128, BLOCK_N=64),
        (128, 2, "dropout"): config(8, 2, BLOCK_M=128, BLOCK_N=64),
        (64, 4, "short"): config(4, 2, BLOCK_M=64, BLOCK_N=32),
        (64, 4, "long"): config(8, 2, BLOCK_M=128, BLOCK_N=32),
        (64, 4, "dropout"): config(8, 2, BLOCK_M=128, BLOCK_N=32),
        (128, 4, "short"): config(4, 2, BLOCK_M=16, BLOCK_N=32),
        (128, 4, "long"): config(4, 2, BLOCK_M=16, BLOCK_N=32),
        (128, 4, "dropout"): config(4, 2, BLOCK_M=16, BLOCK_N=32),
    },
    "sm_100": {
        (64, 2, "short"): config(4, 2, BLOCK_M=64, BLOCK_N=128),
        (64, 2, "long"): config(8, 2, BLOCK_M=128, BLOCK_N=128),
        (64, 2, "dropout"): config(8, 2, BLOCK_M=128, BLOCK_N=64),
        (128, 2, "short"): config(4, 2, BLOCK_M=64, BLOCK_N=64),
        (128, 2, "long"): config(8, 2, BLOCK_M=128, BLOCK_N=64),
        (128, 2, "dropout"): config(8, 2, BLOCK_M=128, BLOCK_N=32),
        (64, 4, "short"): config(8, 2, BLOCK_M=64, BLOCK_N=32),
        (64, 4, "long"): config(8, 2, BLOCK_M=64, BLOCK_N=32),
        (64, 4, "dropout"): config(8, 2, BLOCK_M=64, BLOCK_N=32),
        (128, 4, "short"): config(4, 2, BLOCK_M=16, BLOCK_N=32),
        (128, 4, "long"): config(4, 2, BLOCK_M=16, BLOCK_N=32),
        (128, 4, "dropout"): config(4, 2, BLOCK_M=16, BLOCK_N=32),
    },
    "gfx942": {
        (64, 2, "short"): config(2, 2, BLOCK_M=64, BLOCK_N=32),
        (64, 2, "long"): config(4, 2, BLOCK_M=128, BLOCK_N=32),
        (64, 2, "dropout"): config(4, 2, BLOCK_M=128, BLOCK_N=32),
        (128, 2, "short"): config(2, 2, BLOCK_M=64, BLOCK_N=32),
        (128, 2, "long"): config(4, 2, BLOCK_M=128, BLOCK_N=32),
        (128, 2, "dropout"): config(4, 2, BLOCK_M=128, BLOCK_N=32),
        (64, 4, "short"): config(2, 2, BLOCK_M=64, BLOCK_N=32),
        (64, 4, "long"): config(4, 2, BLOCK_M=128, BLOCK_N=32),
        (64, 4, "dropout"): config(4, 2, BLOCK_M=128, BLOCK_N=32),
        (128, 4, "short"): config(4, 2, BLOCK_M=128, BLOCK_N=32),
        (128, 4, "long"): config(4, 2, BLOCK_M=128, BLOCK_N=32),
        (128, 4, "dropout"): config(4, 2, BLOCK_M=128, BLOCK_N=32),
    },
}

# (gradient, head_dim up to, bytes of an element). Chosen alike, for the kernels with dropout: models train with it.
BACKWARD_CONFIGS: Table = {
    "portable": {
        ("dq", 64, 2): config(8, 2, BLOCK_M=64, BLOCK_N=32),
        ("dq", 128, 2): config(8, 2, BLOCK_M=64, BLOCK_N=32),
        ("dq", 64, 4): config(8, 2, BLOCK_M=32, BLOCK_N=32),
        ("dq", 128, 4): config(8, 2, BLOCK_M=16, BLOCK_N=16),
        ("dkv", 64, 2): config(4, 2, BLOCK_M=32, BLOCK_N=32),
        ("dkv", 128, 2): config(4, 2, BLOCK_M=16, BLOCK_N=32),
        ("dkv", 64, 4): config(8, 2, BLOCK_M=32, BLOCK_N=32),
        ("dkv", 128, 4): config(8, 2, BLOCK_M=16, BLOCK_N=16),
    },
    "sm_80": {
        ("dq", 64, 2): config(8, 3, BLOCK_M=64, BLOCK_N=32),
        ("dq", 128, 2): config(8, 2, BLOCK_M=64, BLOCK_N=32),
        ("dq", 64, 4): config(8, 2, BLOCK_M=32, BLOCK_N=32),
        ("dq", 128, 4): config(8, 2, BLOCK_M=16, BLOCK_N=16),
        ("dkv", 64, 2): config(4, 2, BLOCK_M=32, BLOCK_N=32),
        ("dkv", 128, 2): config(8, 2, BLOCK_M=32, BLOCK_N=64),
        ("dkv", 64, 4): config(8, 2, BLOCK_M=32, BLOCK_N=32),
        ("dkv", 128, 4): config(8, 2, BLOCK_M=16, BLOCK_N=16),
    },
    "sm_90": {
        ("dq", 64, 2): config(8, 3, BLOCK_M=128, BLOCK_N=64),
        ("dq", 128, 2): config(8, 2, BLOCK_M=128, BLOCK_N=32),
        ("dq", 64, 4): config(8, 2, BLOCK_M=128, BLOCK_N=32),
        ("dq", 128, 4): config(8, 2, BLOCK_M=16, BLOCK_N=16),
        ("dkv", 64, 2): config(8, 3, BLOCK_M=64, BLOCK_N=128),
        ("dkv", 128, 2): config(8, 2, BLOCK_M=16, BLOCK_N=128),
        ("dkv", 64, 4): config(8, 2, BLOCK_M=32, BLOCK_N=32),
        ("dkv", 128, 4): config(8, 2, BLOCK_M=16, BLOCK_N=16),
    },
    "sm_100": {
        ("dq", 64, 2): config(8, 2, BLOCK_M=128, BLOCK_N=64),
        ("dq", 128, 2): config(8, 2, BLOCK_M=64, BLOCK_N=32),
        ("dq", 64, 4): config(8, 2, BLOCK_M=64, BLOCK_N=32),
        ("dq", 128, 4): config(8, 2, BLOCK_M=16, BLOCK_N=16),
        ("dkv", 64, 2): config(8, 2, BLOCK_M=64, BLOCK_N=128),
        ("dkv", 128, 2): config(8, 2, BLOCK_M=32, BLOCK_N=64),
        ("dkv", 64, 4): config(8, 2, BLOCK_M=32, BLOCK_N=32),
        ("dkv", 128, 4): config(8, 2, BLOCK_M=16, BLOCK_N=16),
    },
    "gfx942": {
        ("dq", 64, 2): config(4, 2, BLOCK_M=128, BLOCK_N=32),
        ("dq", 128, 2): config(4, 2, BLOCK_M=128, BLOCK_N=32),
        ("dq", 64, 4): config(4, 2, BLOCK_M=64, BLOCK_N=32),
        ("dq", 128, 4): config(4, 1, BLOCK_M=32, BLOCK_N=16),
        ("dkv", 64, 2): config(4, 2, BLOCK_M=32, BLOCK_N=128),
        ("dkv", 128, 2): config(4, 1, BLOCK_M=32, BLOCK_N=64),
        ("dkv", 64, 4): config(4, 1, BLOCK_M=32, BLOCK_N=64),
        ("dkv", 128, 4): config(4, 1, BLOCK_M=16, BLOCK_N=32),
    },
}


@triton.jit
def _visible(m, first, q_len, k_len, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Row m sees its first visible[m] keys; all rows of the block see the first `full`, and none more than `end`, which
    is at least 1: ptxas lets a wgmma run on by itself only where it knows that the loop is entered."""
    if CAUSAL:
        hidden = k_len - q_len + 1
        visible = tl.minimum(m + hidden, k_len)
        common = tl.minimum(tl.maximum(first + hidden, 0), k_len)
        end = tl.minimum(first + BLOCK_M - 1 + hidden, k_len)
    else:
        visible = tl.zeros((BLOCK_M,), tl.int32) + k_len
        common = k_len
        end = k_len
    return visible, common // BLOCK_N * BLOCK_N, bound(tl.maximum(end, 1))


@triton.jit
def _load_tile(ptr, stride, start, count, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows start … start + BLOCK of a matrix [count, HEAD_DIM] → [BLOCK, BLOCK_D], zeros outside."""
    n, d = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_D)[None, :]
    ptrs = ptr + tl.cast(start, tl.int64) * stride + (n * stride + d)
    return tl.load(ptrs, mask=(start + n < count) & (d < HEAD_DIM), other=0.0)


@triton.jit
def _store_tile(ptr, tile, row, inside, head, heads, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The tile [BLOCK, BLOCK_D] to the rows `row` of one head of a contiguous [T, H, HEAD_DIM]."""
    d = tl.arange(0, BLOCK_D)[None, :]
    ptrs = ptr + (row[:, None] * heads + head) * HEAD_DIM + d
    tl.store(ptrs, tile, mask=inside[:, None] & (d < HEAD_DIM))


@triton.jit
def _attend(
    state, q, k_ptr, stride_kn, v_ptr, stride_vn, start, full, k_len, visible, scale_log2, seed_ptr, rows, levels,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The rows' (output, maximum, sum) once the keys start … start + BLOCK_N have been added."""
    acc, maximum, total = state
    k = _load_tile(k_ptr, stride_kn, start, k_len, HEAD_DIM, BLOCK_N, BLOCK_D)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if start >= full:
        scores = tl.where((start + tl.arange(0, BLOCK_N))[None, :] < visible[:, None], scores, float("-inf"))
    new = tl.maximum(maximum, tl.max(scores, 1) * scale_log2)
    shift = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen no key: −inf − −inf is NaN
    p = tl.math.exp2(scores * scale_log2 - shift[:, None])
    rescale = tl.math.exp2(maximum - shift)
    total = total * rescale + tl.sum(p, 1)
    if seed_ptr is not None:
        p = tl.where(keeps(seed_ptr, rows, start, levels, BLOCK_N), p, 0.0)
    v = _load_tile(v_ptr, stride_vn, start, k_len, HEAD_DIM, BLOCK_N, BLOCK_D)
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
    return acc, new, total


@triton.jit(do_not_specialize=["levels", "heads", "rows"])
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, blocks_ptr, begins_ptr, q_starts_ptr, q_lens_ptr, k_starts_ptr, k_lens_ptr,
    seed_ptr, levels, kept, scale_log2, heads, rows,
    stride_qm, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh,
    HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Heads vary fastest: what runs at one time is every head of a few neighbouring blocks. Together they read whole
    # rows of the QKV buffer, so DRAM pages are used in full, and the blocks of one text share its K and V in L2.
    # (No function shared by the kernels: torch.compile would take what it is given, such as begins_ptr, for written.)
    head = (tl.program_id(0) % heads).to(tl.int64)
    block = tl.program_id(0) // heads
    sequence = tl.load(blocks_ptr + block)
    first = (block - tl.load(begins_ptr + sequence)) * BLOCK_M
    q_start, q_len = tl.load(q_starts_ptr + sequence).to(tl.int64), tl.load(q_lens_ptr + sequence)
    if first >= q_len:
        return
    k_start, k_len = tl.load(k_starts_ptr + sequence).to(tl.int64), tl.load(k_lens_ptr + sequence)
    q_ptr += q_start * stride_qm + head * stride_qh
    k_ptr += k_start * stride_kn + head * stride_kh
    v_ptr += k_start * stride_vn + head * stride_vh

    m = first + tl.arange(0, BLOCK_M)
    row = q_start + m
    visible, full, end = _visible(m, first, q_len, k_len, CAUSAL, BLOCK_M, BLOCK_N)
    q = _load_tile(q_ptr, stride_qm, first, q_len, HEAD_DIM, BLOCK_M, BLOCK_D)
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    state = (tl.zeros((BLOCK_M, BLOCK_D), tl.float32), maximum, tl.zeros((BLOCK_M,), tl.float32))
    for start in range(0, end, BLOCK_N):
        state = _attend(
            state, q, k_ptr, stride_kn, v_ptr, stride_vn, start, full, k_len, visible, scale_log2,
            seed_ptr, row * heads + head, levels, HEAD_DIM, BLOCK_N, BLOCK_D, PRECISION,
        )  # fmt: skip

    acc, maximum, total = state
    total = tl.where(total == 0, 1.0, total)  # no key seen: o = 0, lse = −inf
    inside = m < q_len
    factor = 1.0 / total  # a division takes four instructions: one a row, not one an element
    if seed_ptr is not None:
        factor *= kept
    _store_tile(out_ptr, acc * factor[:, None], row, inside, head, heads, HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + head * rows + row, maximum + tl.math.log2(total), mask=inside)


@triton.jit
def _load_lse(ptr, inside, BLIND: tl.constexpr):
    """The rows' lse, 0 outside, where q, do and delta are 0 and so are all gradients. BLIND: some rows see no key; +inf
    makes each of their p = exp2(s − lse) zero."""
    lse = tl.load(ptr, mask=inside, other=0.0)
    if BLIND:
        lse = tl.where(lse == float("-inf"), float("inf"), lse)
    return lse


@triton.jit
def _add_dq(
    dq, q, dout, lse, delta, k_ptr, stride_kn, v_ptr, stride_vn, start, full, k_len, visible, scale_log2,
    seed_ptr, rows, levels, kept,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The rows' dq / softmax_scale once the keys start … start + BLOCK_N have been added."""
    k = _load_tile(k_ptr, stride_kn, start, k_len, HEAD_DIM, BLOCK_N, BLOCK_D)
    v = _load_tile(v_ptr, stride_vn, start, k_len, HEAD_DIM, BLOCK_N, BLOCK_D)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if start >= full:
        scores = tl.where((start + tl.arange(0, BLOCK_N))[None, :] < visible[:, None], scores, float("-inf"))
    p = tl.math.exp2(scores * scale_log2 - lse[:, None])
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    if seed_ptr is not None:
        dp = tl.where(keeps(seed_ptr, rows, start, levels, BLOCK_N), dp * kept, 0.0)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["levels", "heads", "rows"])
def _attention_bwd_dq_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, delta_ptr, dq_ptr,
    blocks_ptr, begins_ptr, q_starts_ptr, q_lens_ptr, k_starts_ptr, k_lens_ptr,
    seed_ptr, levels, kept, scale_log2, heads, rows,
    stride_gm, stride_gh, stride_qm, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh,
    HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """delta and, unless dq_ptr is None, dq of one block of queries."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    block = tl.program_id(0) // heads
    sequence = tl.load(blocks_ptr + block)
    first = (block - tl.load(begins_ptr + sequence)) * BLOCK_M
    q_start, q_len = tl.load(q_starts_ptr + sequence).to(tl.int64), tl.load(q_lens_ptr + sequence)
    if first >= q_len:
        return
    k_start, k_len = tl.load(k_starts_ptr + sequence).to(tl.int64), tl.load(k_lens_ptr + sequence)
    m = first + tl.arange(0, BLOCK_M)
    row = q_start + m
    inside = m < q_len
    dout_ptr += q_start * stride_gm + head * stride_gh
    out_ptr += (q_start * heads + head) * HEAD_DIM
    dout = _load_tile(dout_ptr, stride_gm, first, q_len, HEAD_DIM, BLOCK_M, BLOCK_D)
    out = _load_tile(out_ptr, heads * HEAD_DIM, first, q_len, HEAD_DIM, BLOCK_M, BLOCK_D)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + head * rows + row, delta, mask=inside)

    if dq_ptr is not None:
        q_ptr += q_start * stride_qm + head * stride_qh
        k_ptr += k_start * stride_kn + head * stride_kh
        v_ptr += k_start * stride_vn + head * stride_vh
        visible, full, end = _visible(m, first, q_len, k_len, CAUSAL, BLOCK_M, BLOCK_N)
        q = _load_tile(q_ptr, stride_qm, first, q_len, HEAD_DIM, BLOCK_M, BLOCK_D)
        lse = _load_lse(lse_ptr + head * rows + row, inside, True)
        dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for start in range(0, end, BLOCK_N):
            dq = _add_dq(
                dq, q, dout, lse, delta, k_ptr, stride_kn, v_ptr, stride_vn, start, full, k_len, visible, scale_log2,
                seed_ptr, row * heads + head, levels, kept, HEAD_DIM, BLOCK_N, BLOCK_D, PRECISION,
            )  # fmt: skip
        _store_tile(dq_ptr, dq * (scale_log2 / LOG2_E), row, inside, head, heads, HEAD_DIM, BLOCK_D)


@triton.jit
def _add_dkv(
    dk, dv, k, v, q_ptr, stride_qm, dout_ptr, stride_gm, lse_ptr, delta_ptr, start, full, q_len, since, scale_log2,
    seed_ptr, row, heads, head, column, levels, kept,
    HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The keys' dk / softmax_scale and dv / kept once the queries start … start + BLOCK_M have been added. Scores lie
    transposed, [BLOCK_N, BLOCK_M]: p and ds are left factors as they are. A row is one key's: what stands in those
    beyond the last key reaches no other and is not stored, so they need no mask."""
    m = start + tl.arange(0, BLOCK_M)
    q = _load_tile(q_ptr, stride_qm, start, q_len, HEAD_DIM, BLOCK_M, BLOCK_D)
    dout = _load_tile(dout_ptr, stride_gm, start, q_len, HEAD_DIM, BLOCK_M, BLOCK_D)
    lse = _load_lse(lse_ptr + m, m < q_len, CAUSAL)  # else every query sees this block's keys
    if q.dtype == tl.float32:  # rounded as forward's, or the probabilities would not add up to 1 under its lse
        scores = tl.trans(tl.dot(q, tl.trans(k), input_precision=PRECISION))
    else:
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    if CAUSAL and start < full:
        scores = tl.where(m[None, :] >= since[:, None], scores, float("-inf"))
    p = tl.math.exp2(scores * scale_log2 - lse[None, :])
    if seed_ptr is not None:
        kept_here = tl.trans(keeps(seed_ptr, (row + m) * heads + head, column, levels, BLOCK_N))
    if DV:
        dropped = p
        if seed_ptr is not None:
            dropped = tl.where(kept_here, p, 0.0)
        dv = tl.dot(dropped.to(dout.dtype), dout, dv, input_precision=PRECISION)
    if DK:
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        if seed_ptr is not None:
            dp = tl.where(kept_here, dp * kept, 0.0)
        delta = tl.load(delta_ptr + m, mask=m < q_len, other=0.0)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["levels", "heads", "rows"])
def _attention_bwd_dkv_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    blocks_ptr, begins_ptr, q_starts_ptr, q_lens_ptr, k_starts_ptr, k_lens_ptr,
    seed_ptr, levels, kept, scale_log2, heads, rows,
    stride_gm, stride_gh, stride_qm, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh,
    HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk and dv, but for the one whose pointer is None, of one block of keys."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    block = tl.program_id(0) // heads
    sequence = tl.load(blocks_ptr + block)
    first = (block - tl.load(begins_ptr + sequence)) * BLOCK_N
    k_start, k_len = tl.load(k_starts_ptr + sequence).to(tl.int64), tl.load(k_lens_ptr + sequence)
    if first >= k_len:
        return
    q_start, q_len = tl.load(q_starts_ptr + sequence).to(tl.int64), tl.load(q_lens_ptr + sequence)
    q_ptr += q_start * stride_qm + head * stride_qh
    k_ptr += k_start * stride_kn + head * stride_kh
    v_ptr += k_start * stride_vn + head * stride_vh
    dout_ptr += q_start * stride_gm + head * stride_gh
    lse_ptr += head * rows + q_start
    delta_ptr += head * rows + q_start

    # Key n is seen by the queries from since[n] on: by none before `begin`, by all from `full` on.
    n = first + tl.arange(0, BLOCK_N)
    since = tl.zeros((BLOCK_N,), tl.int32)
    begin = 0
    full = 0
    if CAUSAL:
        since = n + q_len - k_len
        begin = tl.minimum(tl.maximum(first + q_len - k_len, 0), q_len)
        full = first + BLOCK_N - 1 + q_len - k_len

    k = _load_tile(k_ptr, stride_kn, first, k_len, HEAD_DIM, BLOCK_N, BLOCK_D)
    v = _load_tile(v_ptr, stride_vn, first, k_len, HEAD_DIM, BLOCK_N, BLOCK_D)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for done in range(0, bound(tl.maximum(q_len - begin, 1)), BLOCK_M):  # entered once at least, see _visible
        dk, dv = _add_dkv(
            dk, dv, k, v, q_ptr, stride_qm, dout_ptr, stride_gm, lse_ptr, delta_ptr, begin + done, full, q_len, since,
            scale_log2, seed_ptr, q_start, heads, head, first, levels, kept,
            HEAD_DIM, CAUSAL, BLOCK_M, BLOCK_N, BLOCK_D, dk_ptr is not None, dv_ptr is not None, PRECISION,
        )  # fmt: skip
    if dk_ptr is not None:
        _store_tile(dk_ptr, dk * (scale_log2 / LOG2_E), k_start + n, n < k_len, head, heads, HEAD_DIM, BLOCK_D)
    if dv_ptr is not None:
        if seed_ptr is not None:
            dv *= kept
        _store_tile(dv_ptr, dv, k_start + n, n < k_len, head, heads, HEAD_DIM, BLOCK_D)


@opaque
def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: Any,
    softmax_scale: float,
    causal: bool = False,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(o [Tq, H, D] contiguous, lse [H, Tq] fp32, base 2) of q [Tq, H, D], k and v [Tk, H, D], read through strides.

    `seed` (int64 [1]) is for dropout_p > 0; without one nothing is dropped.
    """
    spans = sequences.q_starts, sequences.q_lens, sequences.k_starts, sequences.k_lens
    plan = _plan(softmax_scale, *kinds(q, k, v, *spans))
    refuse_gradients("attention", q, k, v)
    sequences.check(len(q), len(k))
    rows, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, rows), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    chosen, blocks = _programs("out", q, k, sequences, seed)
    launch = _launch(plan, chosen, len(blocks[0]), causal, seed is not None, input_precision(q.dtype, q.device))
    launch(q, k, v, out, lse, *_common(blocks, sequences, seed, dropout_p, softmax_scale, q), *plan.strides)
    return out, lse


@dataclass(frozen=True, eq=False)
class _Plan:
    """What the kinds of q, k and v decide."""

    heads: int
    head_dim: int
    strides: tuple[int, ...]  # of rows and heads of q, of k, of v


@remembered
def _plan(softmax_scale: float, q: Kind, k: Kind, v: Kind, *spans: Kind) -> _Plan:
    check_kinds("attention", q=q, k=k, v=v)
    _check_arguments(softmax_scale, q, k, v, spans)
    return _Plan(*q.shape[1:], tuple(t.stride[dim] for t in (q, k, v) for dim in (0, 1)))


@remembered
def _launch(plan: _Plan, chosen: Config, blocks: int, causal: bool, dropout: bool, precision: str) -> Launch:
    """`dropout`, whether there is a seed, chooses another compiled kernel."""
    constants = _constants(plan.head_dim, precision)
    return Launch(_attention_fwd_kernel, blocks * plan.heads, CAUSAL=causal, **constants, **chosen.meta)


@opaque
def attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sequences: Any,
    softmax_scale: float,
    causal: bool = False,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    needed: Sequence[bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dq [Tq, H, D], dk and dv [Tk, H, D]), contiguous, None where not `needed`, of do [Tq, H, D] (any strides).

    `out` and `lse` are what attention_fwd returned for the other arguments. Keys that no sequence owns get zeros;
    Sequences.check refuses keys that two share.
    """
    check("attention", dout=dout, q=q, k=k, v=v, out=out)
    rows, heads, _ = q.shape
    sequences.check(rows, len(k), disjoint=needed[1] or needed[2])
    dout = dout if dout.stride(2) == 1 and dout.stride(0) < APART else dout.contiguous()
    delta = torch.empty_like(lse)
    dq = torch.empty_like(out) if needed[0] else None
    whole = sequences.k_starts is sequences.q_starts and sequences.k_lens is sequences.q_lens  # no key without sequence
    new = torch.empty if whole and rows == len(k) else torch.zeros
    dk, dv = (new(k.shape, dtype=k.dtype, device=k.device) if need else None for need in needed[1:])
    if out.numel() == 0:
        return dq, dk, dv
    strides = [t.stride(dim) for t in (dout, q, k, v) for dim in (0, 1)]
    constants = {"CAUSAL": causal, **_constants(q.shape[2], input_precision(q.dtype, q.device))}

    if needed[0] or needed[1]:
        chosen, blocks = _programs("dq", q, k, sequences, seed)
        _attention_bwd_dq_kernel[(len(blocks[0]) * heads,)](
            dout, q, k, v, out, lse, delta, dq,
            *_common(blocks, sequences, seed, dropout_p, softmax_scale, q), *strides, **constants, **chosen.meta,
        )  # fmt: skip
    if (needed[1] or needed[2]) and len(k) > 0:
        chosen, blocks = _programs("dkv", q, k, sequences, seed)
        _attention_bwd_dkv_kernel[(len(blocks[0]) * heads,)](
            dout, q, k, v, lse, delta, dk, dv,
            *_common(blocks, sequences, seed, dropout_p, softmax_scale, q), *strides, **constants, **chosen.meta,
        )  # fmt: skip
    return dq, dk, dv


def _programs(result: str, q: Tensor, k: Tensor, sequences: Any, seed: Tensor | None) -> tuple[Config, Any]:
    """Of the kernel that computes `result` ("out", "dq" or "dkv"): its configuration, and what Sequences.blocks says of
    the block of rows of each program."""
    key = 64 if q.shape[2] <= 64 else 128, q.element_size()
    if result == "dkv":
        chosen = pick(BACKWARD_CONFIGS, q.device, ("dkv", *key))
        return chosen, sequences.blocks(chosen.meta["BLOCK_N"], len(k), keys=True)
    if result == "dq":
        chosen = pick(BACKWARD_CONFIGS, q.device, ("dq", *key))
    else:
        load = "short" if len(q) <= SHORT * sequences.q_lens.numel() else "long"
        chosen = pick(CONFIGS, q.device, (*key, load if seed is None else "dropout"))
    return chosen, sequences.blocks(chosen.meta["BLOCK_M"], len(q))


def _common(
    blocks: Any, sequences: Any, seed: Tensor | None, dropout_p: float, softmax_scale: float, q: Tensor
) -> tuple[Any, ...]:
    """The arguments of every kernel, from blocks_ptr to rows."""
    spans = (sequences.q_starts, sequences.q_lens, sequences.k_starts, sequences.k_lens)
    levels = keep_levels(dropout_p)
    kept = LEVELS / max(levels, 1)  # where nothing is kept, nothing is multiplied
    rows, heads, _ = q.shape
    return *blocks, *(t.contiguous() for t in spans), seed, levels, kept, softmax_scale * LOG2_E.value, heads, rows


def _constants(head_dim: int, precision: str) -> dict[str, Any]:
    return {"HEAD_DIM": head_dim, "PRECISION": precision, "BLOCK_D": max(16, triton.next_power_of_2(head_dim))}


def _check_arguments(softmax_scale: float, q: Kind, k: Kind, v: Kind, spans: Sequence[Kind]) -> None:
    if not (len(q.shape) == len(k.shape) == 3 and k.shape == v.shape and q.shape[1:] == k.shape[1:]):
        shapes = ", ".join(str(list(t.shape)) for t in (q, k, v))
        raise ValueError(f"attention: q, k, v are {shapes}; allowed are [Tq, H, D], [Tk, H, D], [Tk, H, D]")
    if q.shape[2] not in HEAD_DIMS:
        raise ValueError(
            f"attention: head_dim is {q.shape[2]}, allowed are {HEAD_DIMS[0]} to {HEAD_DIMS[-1]}; use backend='eager'"
        )
    if not all(t.stride[2] == 1 or 0 in t.shape for t in (q, k, v)):
        strides = ", ".join(str(t.stride) for t in (q, k, v))
        raise ValueError(f"attention: q, k, v have strides {strides}; the last dimension must be contiguous")
    if any(t.shape[0] > 1 and t.stride[0] >= APART for t in (q, k, v)):
        strides = ", ".join(str(t.stride[0]) for t in (q, k, v))
        raise ValueError(
            f"attention: rows of q, k, v are {strides} elements apart, allowed are less than {APART}: make them dense"
        )
    if not 0 < softmax_scale < float("inf"):
        raise ValueError(f"attention: softmax_scale is {softmax_scale}; it must be positive and finite")
    if not (
        all(t.dtype == torch.int32 and len(t.shape) == 1 and t.shape == spans[0].shape for t in spans)
        and (0 not in spans[0].shape or q.shape[0] == 0)
    ):
        raise ValueError(
            "attention: the starts and lengths of the sequences must be int32 [B], B ≥ 1 where q has rows; got "
            + ", ".join(f"{t.dtype} {list(t.shape)}" for t in spans)
        )
    if not all(t.device == q.device for t in spans):
        raise ValueError(f"attention: the sequences are on {spans[0].device}, q is on {q.device}")


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sequences: Any, softmax_scale: float, causal: bool,
        dropout_p: float, seed: Tensor | None,
    ) -> Tensor:  # fmt: skip
        out, lse = attention_fwd(q, k, v, sequences, softmax_scale, causal, dropout_p, seed)
        ctx.save_for_backward(q, k, v, out, lse, seed)
        ctx.arguments = sequences, softmax_scale, causal, dropout_p
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, seed = ctx.saved_tensors
        gradients = attention_bwd(dout, *tensors, *ctx.arguments, seed, ctx.needs_input_grad[:3])
        return *gradients, None, None, None, None, None


def attention(
    q: Tensor, k: Tensor, v: Tensor, sequences: Any, softmax_scale: float, causal: bool = False, dropout_p: float = 0.0
) -> Tensor:
    """softmax(q · kᵀ · softmax_scale) · v within each sequence; q [Tq, H, D], k and v [Tk, H, D] → [Tq, H, D].

    As xlmr.eager.attention, for head_dim 8 to 128 and softmax_scale > 0; differentiable once in q, k and v, where no
    two sequences share keys. `sequences` offers int32 [B] q_starts, q_lens, k_starts, k_lens, and what
    xlmr.varlen.Sequences does: blocks(block, rows, keys=False) and check(rows, keys, disjoint=False). ValueError for a
    dropout_p outside [0, 1].
    """
    q, k, v = autocast(q, k, v)
    keep_levels(dropout_p)
    seed = draw_seed(q.device) if dropout_p > 0 else None
    arguments = sequences, softmax_scale, causal, dropout_p, seed
    if wants_gradients(q, k, v):
        for result in ("out", "dq", "dkv"):  # kept in `sequences`: torch.compile lets no autograd.Function do that
            _programs(result, q, k, sequences, seed)
        return Attention.apply(q, k, v, *arguments)
    return attention_fwd(q, k, v, *arguments)[0]
