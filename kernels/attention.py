"""Flash attention, forward.   o = softmax(q·kᵀ·scale)·v   and   lse = log Σ exp(q·kᵀ·scale)   within each sequence

Shapes  q, o: [Tq, H, D]   k, v: [Tk, H, D]   lse: [H, Tq] fp32   starts, lengths: [B] int32
Twin    xlmr.eager.attention
Source  Dao et al., 2022 and 2023 (FlashAttention 1, 2); Milakov & Gimelshein, 2018 (running maximum and sum)

One program computes BLOCK_M query rows of one head of one sequence: it walks over the sequence's keys in tiles of
BLOCK_N and keeps every row's maximum, sum and output in registers, in fp32 and base 2. Where the queries and keys of a
sequence lie is data: packed and padded batches, cross attention, key/value caches and one query a text are one kernel.

A row's bits depend on its own sequence alone: BLOCK_N is one constant for each head_dim and dtype, a tile that a row
does not see leaves its state as it is, and what varies with the load (BLOCK_M, warps) keeps the order of its sums.

Prediction for an H200 (nothing is measured yet), bf16, D = 64, bidirectional: the exponential is the roof. A score
costs 256 flops on the tensor cores (990 TFLOP/s) and one exp2 (16 a clock and SM: 132 · 16 · 1.75 GHz = 3.7 T/s), which
alone bounds it at 946 TFLOP/s; one after the other, the two allow 480. The fp32 work of a score (maximum, scale, sum,
cast) is partly hidden by an SM's second program: 70 % of 480, 340 TFLOP/s, at 512 keys, and 80 %, 380, from 2,048 on.
One query a text reads K and V once: 75 % of 4.3 TB/s.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Table, check, config, input_precision, opaque, pick, require

LOG2_E = tl.constexpr(1.4426950408889634)
HEAD_DIMS = range(8, 129)


def cost(
    q_lens: Sequence[int], k_lens: Sequence[int], heads: int, head_dim: int, itemsize: int, causal: bool = False
) -> tuple[int, int]:
    """(flops, bytes): two products for each visible pair of query and key; q, k, v, o and lse through memory once."""
    pairs = 0
    for queries, keys in zip(q_lens, k_lens, strict=True):
        seeing = min(queries, keys)  # causal: so many queries see a key, the last one all, each earlier one a key less
        pairs += seeing * keys - seeing * (seeing - 1) // 2 if causal else queries * keys
    rows = 2 * sum(q_lens) + 2 * sum(k_lens)
    return 4 * pairs * heads * head_dim, heads * (rows * head_dim * itemsize + 4 * sum(q_lens))


# The average number of queries a sequence up to which a batch counts as short.
SHORT = 128

# (head_dim up to, bytes of an element, short). Not measured yet: chosen by compiling with Triton 3.9, without spills
# (3.6 spills up to 136 bytes in fp32). Both loads of a head_dim and dtype have one BLOCK_N and spread a row over lanes
# alike, so their bits agree; where a second tile would not, or spills, one serves both. A single query takes a whole
# tile too: the idle rows cost less time than reading K and V, and a tile of 16 rows would spread a row over four warps.
CONFIGS: Table = {
    "portable": {
        (64, 2, True): config(4, 2, BLOCK_M=64, BLOCK_N=32),
        (64, 2, False): config(4, 2, BLOCK_M=64, BLOCK_N=32),
        (128, 2, True): config(4, 2, BLOCK_M=64, BLOCK_N=32),
        (128, 2, False): config(4, 2, BLOCK_M=64, BLOCK_N=32),
        (64, 4, True): config(4, 2, BLOCK_M=32, BLOCK_N=32),
        (64, 4, False): config(4, 2, BLOCK_M=32, BLOCK_N=32),
        (128, 4, True): config(8, 2, BLOCK_M=32, BLOCK_N=32),
        (128, 4, False): config(8, 2, BLOCK_M=32, BLOCK_N=32),
    },
    "sm_80": {
        (64, 2, True): config(4, 3, BLOCK_M=64, BLOCK_N=64),
        (64, 2, False): config(8, 3, BLOCK_M=128, BLOCK_N=64),
        (128, 2, True): config(8, 3, BLOCK_M=128, BLOCK_N=32),
        (128, 2, False): config(8, 3, BLOCK_M=128, BLOCK_N=32),
        (64, 4, True): config(4, 2, BLOCK_M=32, BLOCK_N=32),
        (64, 4, False): config(4, 2, BLOCK_M=32, BLOCK_N=32),
        (128, 4, True): config(8, 2, BLOCK_M=32, BLOCK_N=32),
        (128, 4, False): config(8, 2, BLOCK_M=32, BLOCK_N=32),
    },
    "sm_90": {
        (64, 2, True): config(4, 3, BLOCK_M=64, BLOCK_N=64),
        (64, 2, False): config(8, 3, BLOCK_M=128, BLOCK_N=64),
        (128, 2, True): config(4, 2, BLOCK_M=64, BLOCK_N=64),
        (128, 2, False): config(8, 2, BLOCK_M=128, BLOCK_N=64),
        (64, 4, True): config(4, 2, BLOCK_M=64, BLOCK_N=32),
        (64, 4, False): config(8, 2, BLOCK_M=128, BLOCK_N=32),
        (128, 4, True): config(8, 2, BLOCK_M=128, BLOCK_N=16),
        (128, 4, False): config(8, 2, BLOCK_M=128, BLOCK_N=16),
    },
    "sm_100": {
        (64, 2, True): config(4, 2, BLOCK_M=64, BLOCK_N=128),
        (64, 2, False): config(8, 2, BLOCK_M=128, BLOCK_N=128),
        (128, 2, True): config(4, 2, BLOCK_M=64, BLOCK_N=64),
        (128, 2, False): config(8, 2, BLOCK_M=128, BLOCK_N=64),
        (64, 4, True): config(8, 2, BLOCK_M=128, BLOCK_N=32),
        (64, 4, False): config(8, 2, BLOCK_M=128, BLOCK_N=32),
        (128, 4, True): config(8, 2, BLOCK_M=32, BLOCK_N=32),
        (128, 4, False): config(8, 2, BLOCK_M=32, BLOCK_N=32),
    },
    "gfx942": {
        (64, 2, True): config(2, 2, BLOCK_M=64, BLOCK_N=32),
        (64, 2, False): config(4, 2, BLOCK_M=128, BLOCK_N=32),
        (128, 2, True): config(2, 2, BLOCK_M=64, BLOCK_N=32),
        (128, 2, False): config(4, 2, BLOCK_M=128, BLOCK_N=32),
        (64, 4, True): config(2, 2, BLOCK_M=64, BLOCK_N=32),
        (64, 4, False): config(4, 2, BLOCK_M=128, BLOCK_N=32),
        (128, 4, True): config(4, 2, BLOCK_M=128, BLOCK_N=32),
        (128, 4, False): config(4, 2, BLOCK_M=128, BLOCK_N=32),
    },
}


@triton.jit
def _load_tile(
    ptr, stride, start, count,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rows start … start + BLOCK of a matrix [count, HEAD_DIM] → [BLOCK, BLOCK_D], zeros outside; MASKED: rows end."""
    n, d = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_D)[None, :]
    ptrs = ptr + tl.cast(start, tl.int64) * stride + (n * stride + d)
    if MASKED:
        tile = tl.load(ptrs, mask=(start + n < count) & (d < HEAD_DIM), other=0.0)
    elif HEAD_DIM < BLOCK_D:
        tile = tl.load(ptrs, mask=d < HEAD_DIM, other=0.0)
    else:
        tile = tl.load(ptrs)
    return tile


@triton.jit
def _attend(
    state, q, k_ptr, stride_kn, v_ptr, stride_vn, start, k_len, visible, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The rows' (output, maximum, sum) once the keys start … start + BLOCK_N have been added."""
    acc, maximum, total = state
    k = _load_tile(k_ptr, stride_kn, start, k_len, HEAD_DIM, BLOCK_N, BLOCK_D, MASKED)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        scores = tl.where((start + tl.arange(0, BLOCK_N))[None, :] < visible[:, None], scores, float("-inf"))
    new = tl.maximum(maximum, tl.max(scores, 1) * scale_log2)
    shift = new
    if MASKED:
        shift = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen no key: −inf − −inf is NaN
    p = tl.math.exp2(scores * scale_log2 - shift[:, None])
    rescale = tl.math.exp2(maximum - shift)
    v = _load_tile(v_ptr, stride_vn, start, k_len, HEAD_DIM, BLOCK_N, BLOCK_D, MASKED)
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
    return acc, new, total * rescale + tl.sum(p, 1)


@triton.jit(do_not_specialize=["heads", "rows"])
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, blocks_ptr, q_starts_ptr, q_lens_ptr, k_starts_ptr, k_lens_ptr,
    scale_log2, heads, rows, stride_qm, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_om, stride_oh,
    HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Heads vary fastest: what runs at one time is every head of a few neighbouring blocks. Together they read whole
    # rows of the QKV buffer, so DRAM pages are used in full, and the blocks of one text share its K and V in L2.
    head = (tl.program_id(0) % heads).to(tl.int64)
    block = tl.program_id(0) // heads
    sequence = tl.load(blocks_ptr + 2 * block)
    if sequence < 0:
        return
    first = tl.load(blocks_ptr + 2 * block + 1)
    q_len, k_len = tl.load(q_lens_ptr + sequence), tl.load(k_lens_ptr + sequence)
    q_start = tl.load(q_starts_ptr + sequence).to(tl.int64)
    k_start = tl.load(k_starts_ptr + sequence).to(tl.int64)
    q_ptr += q_start * stride_qm + head * stride_qh
    k_ptr += k_start * stride_kn + head * stride_kh
    v_ptr += k_start * stride_vn + head * stride_vh

    # Row m sees its first visible[m] keys; every row of the block sees `common`, and none more than `end`.
    m = first + tl.arange(0, BLOCK_M)
    if CAUSAL:
        hidden = k_len - q_len + 1
        visible = tl.minimum(m + hidden, k_len)
        common = tl.minimum(tl.maximum(first + hidden, 0), k_len)
        end = tl.minimum(first + BLOCK_M - 1 + hidden, k_len)
    else:
        visible = tl.zeros((BLOCK_M,), tl.int32) + k_len
        common = k_len
        end = k_len
    full = common // BLOCK_N * BLOCK_N

    q = _load_tile(q_ptr, stride_qm, first, q_len, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    state = (tl.zeros((BLOCK_M, BLOCK_D), tl.float32), maximum, tl.zeros((BLOCK_M,), tl.float32))
    for start in range(0, full, BLOCK_N):
        state = _attend(
            state, q, k_ptr, stride_kn, v_ptr, stride_vn, start, k_len, visible, scale_log2,
            HEAD_DIM, BLOCK_N, BLOCK_D, False, PRECISION,
        )  # fmt: skip
    for start in range(full, end, BLOCK_N):
        state = _attend(
            state, q, k_ptr, stride_kn, v_ptr, stride_vn, start, k_len, visible, scale_log2,
            HEAD_DIM, BLOCK_N, BLOCK_D, True, PRECISION,
        )  # fmt: skip

    acc, maximum, total = state
    total = tl.where(total == 0, 1.0, total)  # no key seen: o = 0, lse = −inf
    inside = m < q_len
    d = tl.arange(0, BLOCK_D)[None, :]
    row = q_start + m
    out_ptrs = out_ptr + row[:, None] * stride_om + head * stride_oh + d
    tl.store(out_ptrs, acc / total[:, None], mask=inside[:, None] & (d < HEAD_DIM))
    lse = (maximum + tl.math.log2(total)) / LOG2_E
    tl.store(lse_ptr + head * rows + row, lse, mask=inside)


@opaque
def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, sequences: Any, softmax_scale: float, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """(o [Tq, H, D] contiguous, lse [H, Tq] fp32) of q [Tq, H, D], k and v [Tk, H, D], read through their strides."""
    check("attention", q=q, k=k, v=v)
    _check_arguments(q, k, v, sequences, softmax_scale)
    rows, heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(heads, rows, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    width = 64 if head_dim <= 64 else 128
    chosen = pick(CONFIGS, q.device, (width, q.element_size(), rows <= SHORT * sequences.q_lens.numel()))
    blocks = sequences.blocks(dict(chosen.tiles)["BLOCK_M"], rows)
    _attention_fwd_kernel[(len(blocks) * heads,)](
        q, k, v, out, lse, blocks,
        *(t.contiguous() for t in (sequences.q_starts, sequences.q_lens, sequences.k_starts, sequences.k_lens)),
        softmax_scale * LOG2_E.value, heads, rows,
        *(t.stride(dim) for t in (q, k, v, out) for dim in (0, 1)),
        HEAD_DIM=head_dim, CAUSAL=causal, PRECISION=input_precision(q.dtype, q.device),
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        **chosen.meta,
    )  # fmt: skip
    return out, lse


def _check_arguments(q: Tensor, k: Tensor, v: Tensor, sequences: Any, softmax_scale: float) -> None:
    shapes = ", ".join(str(list(t.shape)) for t in (q, k, v))
    require(
        q.dim() == 3 and k.dim() == 3 and k.shape == v.shape and q.shape[1:] == k.shape[1:],
        f"attention: q, k, v are {shapes}; allowed are [Tq, H, D], [Tk, H, D], [Tk, H, D]",
    )
    require(
        q.shape[2] in HEAD_DIMS,
        f"attention: head_dim is {q.shape[2]}, allowed are {HEAD_DIMS[0]} to {HEAD_DIMS[-1]}; use backend='eager'",
    )
    strides = ", ".join(str(t.stride()) for t in (q, k, v))
    require(
        all(t.stride(2) == 1 or t.numel() == 0 for t in (q, k, v)),
        f"attention: q, k, v have strides {strides}; the last dimension must be contiguous",
    )
    require(
        0 < softmax_scale < float("inf"), f"attention: softmax_scale is {softmax_scale}; it must be positive and finite"
    )
    spans = (sequences.q_starts, sequences.q_lens, sequences.k_starts, sequences.k_lens)
    require(
        all(t.dtype == torch.int32 and t.dim() == 1 and t.shape == spans[0].shape for t in spans)
        and (spans[0].numel() > 0 or q.shape[0] == 0),
        "attention: the starts and lengths of the sequences must be int32 [B], B ≥ 1 where q has rows; got "
        + ", ".join(f"{t.dtype} {list(t.shape)}" for t in spans),
    )
    require(
        all(t.device == q.device for t in spans),
        f"attention: the sequences are on {spans[0].device}, q is on {q.device}",
    )
    if q.device.type == "cpu":  # elsewhere reading them would wait for the device
        _check_values(sequences, q.shape[0], k.shape[0])


def _check_values(sequences: Any, rows: int, keys: int) -> None:
    q_starts, q_lens = sequences.q_starts.tolist(), sequences.q_lens.tolist()
    ends = [start + length for start, length in zip(q_starts, q_lens, strict=True)]
    require(
        min(q_lens, default=0) >= 0 and [0, *ends] == [*q_starts, rows],
        f"attention: q_starts {q_starts} and q_lens {q_lens} must cut the {rows} rows of q into adjacent sequences",
    )
    k_starts, k_lens = sequences.k_starts.tolist(), sequences.k_lens.tolist()
    require(
        all(length >= 0 and 0 <= start <= keys - length for start, length in zip(k_starts, k_lens, strict=True)),
        f"attention: k_starts {k_starts} and k_lens {k_lens} leave the {keys} rows of k and v",
    )


def attention(
    q: Tensor, k: Tensor, v: Tensor, sequences: Any, softmax_scale: float, causal: bool = False, dropout_p: float = 0.0
) -> Tensor:
    """softmax(q · kᵀ · softmax_scale) · v within each sequence; q [Tq, H, D], k and v [Tk, H, D] → [Tq, H, D].

    As xlmr.eager.attention, for head_dim 8 to 128, softmax_scale > 0 and no dropout. `sequences` offers int32 [B]
    q_starts, q_lens, k_starts, k_lens and blocks(block_m, rows), as xlmr.varlen.Sequences does.
    """
    if dropout_p > 0:
        raise RuntimeError(
            f"attention: dropout_p is {dropout_p} and the Triton kernels have no dropout yet; call model.eval(), or "
            "use backend='eager'"
        )
    return attention_fwd(q, k, v, sequences, softmax_scale, causal)[0]
