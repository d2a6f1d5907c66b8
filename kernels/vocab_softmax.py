"""The softmax over the vocabulary: top-k log-probabilities and cross entropy. The logits never reach memory.

z = x·wᵀ + b    lse = log Σ_v exp(z_v)    log p_v = z_v − lse    loss = lse − (1 − ε)·z_label − ε·mean(z) + λ·lse²
with label smoothing ε and z-loss λ (Chowdhery et al., 2022). Backward, for an upstream g:
dz_v = g·(p_v·(1 + 2λ·lse) − (1 − ε)·[v = label] − ε / V)    dx = dz·w    dw = dzᵀ·x    db = Σ dz over the rows

Shapes  x: [T, N], rows at any stride   w: [V, N]   b: [V] or None   log p, words: [T, k]
        partial maxima and sums: [T, C] fp32, partial candidates: [T, C, k], with C = ⌈V / CHUNK⌉
Twins   xlmr.eager.vocab_topk, xlmr.eager.vocab_cross_entropy

A program multiplies BLOCK_M rows with one chunk of the vocabulary, tile after tile, and keeps of each row the maximum
m, Σ exp(z − m) and the k best words; a second kernel joins a row's C chunks. Equal logits: the lower id comes first
(with targets: the earlier of them). More than MAX_K words take another pass over w for each MAX_K: what comes after the
last word found competes. A logit of −inf is no candidate. No locks, no atomics; tiles, chunks and their sums go in
one order whatever T is, and BLOCK_V, BLOCK_K and the columns of a warp are one constant for each target and dtype.

Memory: 8 + 8 k bytes a row and chunk: 0.6 % of the fp32 logits at k = 5, 0.9 % at k = 8, 0.1 % for the loss.

Backward computes z again, some words at a time: their dz stands in memory, rounded to the dtype of x, until the three
gradients have taken it up. Of 2,048 words ("chunked") it is 0.4 % of the fp32 logits in bf16, and the products are as
large as a layer's; of 256 ("recompute") a twentieth of a percent. Fewer than 8,192 rows take more words at a time: the
same 32 or 4 MB. Kept from forward: x, labels and lse, 4 bytes a row.

Prediction for an H200 (nothing is measured yet), bf16, V = 250,002. Up to 64 rows (fill-mask) the weights' stream is
the roof: 384 MB (N = 768) or 512 MB (1024) at 4.3 TB/s are 89 and 119 µs; 85 % of it, with the second kernel's 3 µs:
the stream needs 33 KB in flight on each processor (1 µs of it), where 131 of 132 have 64 KB and more. From about 1,000
rows the tensor cores are (790 TFLOP/s). The loss: a tile of 256×128 takes 12,300 cycles of wgmma at N = 768, then 2,800
for its maxima and exponentials (32,768 at 16 a cycle are 2,048), during which only the next tile's loads go on. That is
81 % (85 % at N = 1024) of the 640–700 TFLOP/s that linear.py expects of long products: 520–590 TFLOP/s, 66–75 %. The
top 5: 35–45 %, since a search for a word costs a quarter of a tile's product, and 128 rows need about three.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._launch import (
    Table,
    autocast,
    check,
    check_ids,
    check_range,
    config,
    input_precision,
    opaque,
    pick,
    wants_gradients,
)
from ._loops import bound
from ._products import BLOCK_K, product_dw, product_dx, sum_splits


def cost(T: int, N: int, V: int, itemsize: int, k: int = 0, backward: bool = False) -> tuple[int, int]:
    """Floating-point operations and bytes moved over T rows; k = 0: the loss (T labelled rows). Its backward computes z
    again, moves dz of every word three times, and the sum in dx, in fp32, twice a chunk."""
    if backward:
        chunks = triton.cdiv(V, words_at_once(T, "chunked"))
        return 8 * T * N * V, (2 * T * N + 2 * V * N + 2 * V + 3 * T * V) * itemsize + 8 * T * N * chunks
    partials = T * triton.cdiv(V, CHUNK) * (8 + 8 * k)
    return 2 * T * N * V, (T * N + V * N + V) * itemsize + 2 * partials + 12 * T * max(k, 1)


def activation_bytes(N: int, itemsize: int) -> int:
    """Bytes a labelled row kept for the loss's backward: x, its label, lse."""
    return N * itemsize + 8 + 4


CHUNK = 1920  # words a program: 131 chunks of 250,002 words, for the 132 processors of an H200
WORDS = {"chunked": 2048, "recompute": 256}  # whose dz stands in memory at a time, of ROWS or more rows
ROWS = 8192
MAX_K = 16  # candidates that a program keeps of a row
FEW = 64  # rows up to which the weights' stream, not the product, is the cost
SOME = 128  # rows up to which a tile of more would be idle in half of its rows

# (bytes of an element, load). BLOCK_V is the same for all loads: a row's sum has one order. Tiles of 256 rows on sm_90
# read a quarter less through L2 than those of 128: 48 bytes a cycle of wgmma for each processor, not 64.
# Not measured yet: chosen by compiling for each target (no spills up to 16 candidates, with targets and a second pass).
CONFIGS: Table = {
    "portable": {
        (2, "few"): config(8, 2, BLOCK_M=64, BLOCK_V=128),
        (2, "some"): config(8, 2, BLOCK_M=64, BLOCK_V=128),
        (2, "many"): config(8, 2, BLOCK_M=64, BLOCK_V=128),
        (4, "few"): config(8, 3, BLOCK_M=64, BLOCK_V=64),
        (4, "some"): config(8, 3, BLOCK_M=64, BLOCK_V=64),
        (4, "many"): config(8, 3, BLOCK_M=64, BLOCK_V=64),
    },
    "sm_80": {
        (2, "few"): config(8, 4, BLOCK_M=64, BLOCK_V=128),
        (2, "some"): config(8, 2, BLOCK_M=64, BLOCK_V=128),
        (2, "many"): config(8, 2, BLOCK_M=64, BLOCK_V=128),
        (4, "few"): config(8, 3, BLOCK_M=128, BLOCK_V=64),  # four warps and 64 rows spill with five candidates
        (4, "some"): config(8, 3, BLOCK_M=128, BLOCK_V=64),
        (4, "many"): config(8, 3, BLOCK_M=128, BLOCK_V=64),
    },
    "sm_90": {
        (2, "few"): config(4, 6, BLOCK_M=64, BLOCK_V=128),
        (2, "some"): config(8, 3, BLOCK_M=128, BLOCK_V=128),
        (2, "many"): config(8, 4, BLOCK_M=256, BLOCK_V=128),
        (4, "few"): config(4, 6, BLOCK_M=64, BLOCK_V=64),
        (4, "some"): config(8, 3, BLOCK_M=128, BLOCK_V=64),
        (4, "many"): config(8, 3, BLOCK_M=128, BLOCK_V=64),
    },
    "sm_100": {  # one tile: there a sum's order over the columns goes with BLOCK_M
        (2, "few"): config(8, 4, BLOCK_M=128, BLOCK_V=64),
        (2, "some"): config(8, 4, BLOCK_M=128, BLOCK_V=64),
        (2, "many"): config(8, 4, BLOCK_M=128, BLOCK_V=64),
        (4, "few"): config(8, 3, BLOCK_M=128, BLOCK_V=64),
        (4, "some"): config(8, 3, BLOCK_M=128, BLOCK_V=64),
        (4, "many"): config(8, 3, BLOCK_M=128, BLOCK_V=64),
    },
    "gfx942": {
        (2, "few"): config(4, 2, BLOCK_M=64, BLOCK_V=128),
        (2, "some"): config(8, 2, BLOCK_M=128, BLOCK_V=128),
        (2, "many"): config(8, 2, BLOCK_M=128, BLOCK_V=128),
        (4, "few"): config(4, 2, BLOCK_M=64, BLOCK_V=64),
        (4, "some"): config(8, 2, BLOCK_M=128, BLOCK_V=64),
        (4, "many"): config(8, 2, BLOCK_M=128, BLOCK_V=64),
    },
}

# By the bytes of an element: the tiles of dz, whose order of sums nothing promises. Not measured yet, chosen as above.
DZ_CONFIGS: Table = {
    "portable": {itemsize: config(8, 3, BLOCK_M=64, BLOCK_V=64) for itemsize in (2, 4)},
    "sm_80": {2: config(8, 3, BLOCK_M=64, BLOCK_V=128), 4: config(8, 3, BLOCK_M=128, BLOCK_V=64)},
    "sm_90": {2: config(8, 4, BLOCK_M=128, BLOCK_V=64), 4: config(8, 3, BLOCK_M=128, BLOCK_V=64)},
    "sm_100": {2: config(8, 4, BLOCK_M=128, BLOCK_V=64), 4: config(8, 3, BLOCK_M=128, BLOCK_V=64)},
    "gfx942": {2: config(8, 2, BLOCK_M=128, BLOCK_V=128), 4: config(8, 2, BLOCK_M=128, BLOCK_V=64)},
}

ROW = config(4, 1)  # of the kernels that finish one row a program

LOG2_E = tl.constexpr(1.4426950408889634)
NONE = tl.constexpr(2**31 - 1)  # the word of an empty place: higher than any


def load(T: int, k: int) -> str:
    """That of CONFIGS: by rows, and with k candidates, which take the registers of a tile of many, never "many"."""
    return "few" if T <= FEW else "some" if k or T <= SOME else "many"


def words_at_once(T: int, backward: str) -> int:
    """Whose dz stands in memory at a time: of fewer than ROWS rows so many more that it is as large as theirs, for then
    launches, four for each chunk, are what takes the time."""
    return WORDS[backward] * max(1, ROWS // max(T, 1))


@triton.jit
def _products(x_ptr, w_ptr, x_rows, w_rows, N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    """One tile of x·wᵀ in fp32, of the rows that start at these offsets."""
    steps = tl.arange(0, BLOCK_K)
    x_tile = x_ptr + x_rows[:, None] + steps[None, :]
    w_tile = w_ptr + w_rows[None, :] + steps[:, None]
    z = tl.zeros([x_rows.shape[0], w_rows.shape[0]], tl.float32)
    for k in range(0, N, BLOCK_K):
        if N % BLOCK_K == 0:
            x = tl.load(x_tile + k)
            w = tl.load(w_tile + k)
        else:
            x = tl.load(x_tile + k, mask=(k + steps < N)[None, :], other=0.0)
            w = tl.load(w_tile + k, mask=(k + steps < N)[:, None], other=0.0)
        z = tl.dot(x, w, z, input_precision=PRECISION)
    return z


@triton.jit
def _biases(b_ptr, words, real):
    """Those of the words in fp32, 0 where there are none, and −∞ for what is no word."""
    if b_ptr is not None:
        biases = tl.load(b_ptr + words, mask=real, other=float("-inf")).to(tl.float32)
    else:
        biases = tl.where(real, 0.0, float("-inf"))
    return biases


@triton.jit
def _logits(
    x_ptr, w_ptr, b_ptr, targets_ptr, x_rows, columns, stride_wn, V, table_rows,
    N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of z, −∞ where a column names no word, and which columns do: words themselves, or places in targets."""
    real = columns < V
    words = columns
    w_rows = tl.minimum(columns, V - 1).to(tl.int64)  # beyond the end: a word that is there
    if targets_ptr is not None:
        words = tl.load(targets_ptr + columns, mask=real, other=-1).to(tl.int64)
        real = (words >= 0) & (words < table_rows)
        w_rows = tl.where(real, words, 0)
    z = _products(x_ptr, w_ptr, x_rows, w_rows * stride_wn, N, BLOCK_K, PRECISION)
    z += _biases(b_ptr, words, real)[None, :]
    return z, real


@triton.jit
def _keep_best(z, columns, best_z, best_columns):
    """The best of `best_z` and the tile z, whose columns are all higher: as long as a row has a better one, take it."""
    worst = tl.min(best_z, axis=1)
    found = tl.max(z, axis=1)
    while tl.max((found > worst).to(tl.int32), axis=0) > 0:
        column = tl.min(tl.where(z == found[:, None], columns[None, :], NONE), axis=1)
        evicted = tl.max(tl.where(best_z == worst[:, None], best_columns, -1), axis=1)
        place = (found > worst)[:, None] & (best_columns == evicted[:, None])
        best_z = tl.where(place, found[:, None], best_z)
        best_columns = tl.where(place, column[:, None], best_columns)
        worst = tl.min(best_z, axis=1)
        z = tl.where(columns[None, :] == column[:, None], float("-inf"), z)
        found = tl.max(z, axis=1)
    return best_z, best_columns


@triton.jit(do_not_specialize=["T", "V", "table_rows", "k"])
def _vocab_partials_kernel(
    x_ptr, w_ptr,
    b_ptr,  # or None
    targets_ptr,  # None: the rows of w; else which of them
    after_z_ptr, after_column_ptr,  # None: all compete; else what comes after this logit and column
    max_ptr, sum_ptr,  # None: no softmax; else [T, C]
    total_ptr,  # None, or [T, C]: Σ z
    z_ptr, column_ptr,  # [T, C, k] where SLOTS > 0
    stride_xm, stride_wn, T, V, table_rows, k,
    N: tl.constexpr,
    SLOTS: tl.constexpr,  # a power of two that holds k; 0: no candidates
    CHUNK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = m < T
    x_rows = tl.minimum(m, T - 1)  # beyond the end: a row that is there, for loads without a mask
    after_z, after_column = None, None
    if after_z_ptr is not None:
        after_z = tl.load(after_z_ptr + m, mask=exists, other=0.0)
        after_column = tl.load(after_column_ptr + m, mask=exists, other=0)

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_total = tl.zeros([BLOCK_M], tl.float32)
    if SLOTS > 0:
        slots = tl.arange(0, SLOTS)[None, :] + tl.zeros([BLOCK_M, 1], tl.int32)
        best_z = tl.where(slots < k, float("-inf"), float("inf"))  # the places beyond k are never the worst
        best_columns = NONE - slots

    start = tl.program_id(1) * CHUNK
    end = tl.minimum(start + CHUNK, V)
    # Flattened, one loop over all steps of all tiles: the next tile's loads fly during this one's exponentials. Triton
    # 3.6 cannot flatten around a `while`, which candidates need.
    for first in tl.range(bound(start), bound(end), BLOCK_V, flatten=SLOTS == 0):
        columns = first + tl.arange(0, BLOCK_V)
        z, real = _logits(
            x_ptr, w_ptr, b_ptr, targets_ptr, x_rows * stride_xm, columns, stride_wn, V, table_rows,
            N, BLOCK_K, PRECISION,
        )  # fmt: skip
        if max_ptr is not None:
            new_max = tl.maximum(row_max, tl.max(z, axis=1))
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            row_sum *= tl.math.exp2((row_max - shift) * LOG2_E)
            row_sum += tl.sum(tl.math.exp2((z - shift[:, None]) * LOG2_E), axis=1)
            row_max = new_max
        if total_ptr is not None:
            row_total += tl.sum(tl.where(real[None, :], z, 0.0), axis=1)
        if SLOTS > 0:
            if after_z_ptr is not None:
                tied_later = (z == after_z[:, None]) & (columns[None, :] > after_column[:, None])
                z = tl.where((z < after_z[:, None]) | tied_later, z, float("-inf"))
            best_z, best_columns = _keep_best(z, columns, best_z, best_columns)

    partial = m * tl.num_programs(1) + tl.program_id(1)
    if max_ptr is not None:
        tl.store(max_ptr + partial, row_max, mask=exists)
        tl.store(sum_ptr + partial, row_sum, mask=exists)
    if total_ptr is not None:
        tl.store(total_ptr + partial, row_total, mask=exists)
    if SLOTS > 0:
        places = partial[:, None] * k + slots
        kept = exists[:, None] & (slots < k)
        tl.store(z_ptr + places, best_z, mask=kept)
        tl.store(column_ptr + places, best_columns, mask=kept)


@triton.jit
def _join(max_ptr, sum_ptr, row, chunks, BLOCK_C: tl.constexpr):
    """A row's maximum m and log Σ exp(z − m)."""
    chunk = tl.arange(0, BLOCK_C)
    maxima = tl.load(max_ptr + row * chunks + chunk, mask=chunk < chunks, other=float("-inf"))
    sums = tl.load(sum_ptr + row * chunks + chunk, mask=chunk < chunks, other=0.0)
    top = tl.max(maxima, axis=0)
    return top, tl.log(tl.sum(sums * tl.math.exp2((maxima - top) * LOG2_E), axis=0))


@triton.jit
def _vocab_topk_kernel(
    max_ptr, sum_ptr, z_ptr, column_ptr, log_prob_ptr, best_ptr, last_z_ptr, stride_om, chunks, last_column,
    CANDIDATES: tl.constexpr, K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program. The next best is the best of what comes after the last: higher id, or lower logit."""
    row = tl.program_id(0).to(tl.int64)
    top, log_sum = _join(max_ptr, sum_ptr, row, chunks, BLOCK_C)
    last_z = tl.full([], float("inf"), tl.float32)
    last = tl.full([], -1, tl.int32)
    for i in range(0, K):
        best_z = tl.full([BLOCK], float("-inf"), tl.float32)
        best = tl.full([BLOCK], NONE, tl.int32)
        for start in range(0, CANDIDATES, BLOCK):
            place = start + tl.arange(0, BLOCK)
            z = tl.load(z_ptr + row * CANDIDATES + place, mask=place < CANDIDATES, other=float("-inf"))
            column = tl.load(column_ptr + row * CANDIDATES + place, mask=place < CANDIDATES, other=NONE)
            later = (z < last_z) | ((z == last_z) & (column > last))
            better = later & ((z > best_z) | ((z == best_z) & (column < best)))
            best_z = tl.where(better, z, best_z)
            best = tl.where(better, column, best)
        last_z = tl.max(best_z, axis=0)
        last = tl.min(tl.where(best_z == last_z, best, NONE), axis=0)
        tl.store(log_prob_ptr + row * stride_om + i, (last_z - top) - log_sum)
        tl.store(best_ptr + row * stride_om + i, tl.minimum(last, last_column))  # of NaN too an id that exists
    tl.store(last_z_ptr + row, last_z)


@triton.jit(do_not_specialize=["V", "smoothing", "z_loss"])
def _vocab_loss_kernel(
    x_ptr, w_ptr, b_ptr, labels_ptr, max_ptr, sum_ptr,
    total_ptr,  # None: no label smoothing
    loss_ptr, lse_ptr, stride_xm, stride_wn, V, chunks, smoothing, z_loss,
    N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The loss and lse of one row a program. NaN for a label outside [0, V)."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row).to(tl.int64)
    exists = (label >= 0) & (label < V)
    label = tl.where(exists, label, 0)
    products = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        x = tl.load(x_ptr + row * stride_xm + n, mask=n < N, other=0.0).to(tl.float32)
        products += x * tl.load(w_ptr + label * stride_wn + n, mask=n < N, other=0.0).to(tl.float32)
    z = tl.sum(products, axis=0)
    if b_ptr is not None:
        z += tl.load(b_ptr + label).to(tl.float32)
    top, log_sum = _join(max_ptr, sum_ptr, row, chunks, BLOCK_C)
    loss = log_sum - (z - top)
    if total_ptr is not None:
        chunk = tl.arange(0, BLOCK_C)
        mean = tl.sum(tl.load(total_ptr + row * chunks + chunk, mask=chunk < chunks, other=0.0), axis=0) / V
        loss += smoothing * (z - mean)
    lse = top + log_sum
    tl.store(loss_ptr + row, tl.where(exists, loss + z_loss * lse * lse, float("nan")))
    tl.store(lse_ptr + row, lse)


@triton.jit(do_not_specialize=["T", "V", "first", "smoothing", "z_loss"])
def _vocab_dz_kernel(
    x_ptr,
    w_ptr, b_ptr,  # from word `first` on, as is db
    labels_ptr, lse_ptr, g_ptr,
    dz_ptr,  # [T, words]
    db_ptr,  # None, or [row tiles, words]
    stride_xm, stride_wn, T, V, words, first, smoothing, z_loss,
    N: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of dz, and its sums over the rows."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    rows, real = tl.minimum(m, T - 1), columns < words  # beyond the ends: what is there, for loads without a mask
    w_rows = tl.minimum(columns, words - 1).to(tl.int64)
    z = _products(x_ptr, w_ptr, rows * stride_xm, w_rows * stride_wn, N, BLOCK_K, PRECISION)
    if b_ptr is not None:
        z += tl.load(b_ptr + w_rows).to(tl.float32)[None, :]
    lse, label = tl.load(lse_ptr + rows), tl.load(labels_ptr + rows)
    dz = tl.math.exp2((z - lse[:, None]) * LOG2_E) * (1.0 + 2.0 * z_loss * lse)[:, None] - smoothing / V
    dz -= tl.where(label[:, None] == (first + columns)[None, :], 1.0 - smoothing, 0.0)
    mask = (m < T)[:, None] & real[None, :]
    dz = tl.where(mask, dz * tl.load(g_ptr + rows)[:, None], 0.0)
    tl.store(dz_ptr + m[:, None] * words + columns[None, :], dz.to(dz_ptr.dtype.element_ty), mask=mask)
    if db_ptr is not None:
        tl.store(db_ptr + tl.program_id(0).to(tl.int64) * words + columns, tl.sum(dz, axis=0), mask=real)


class Head(NamedTuple):
    """The product's arguments, checked."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None

    @property
    def chunks(self) -> int:
        return triton.cdiv(len(self.weight), CHUNK)

    @property
    def strides(self) -> tuple[int, int]:
        """Rows of x and of weight; of a single row any stride would do."""
        N = self.x.shape[1]
        return tuple(t.stride(0) if len(t) > 1 else N for t in (self.x, self.weight))


def _head(operation: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Head:
    check(operation, x=x, weight=weight, bias=bias)
    if not (x.dim() == 2 and x.shape[1] > 0):
        raise ValueError(f"{operation}: x is {tuple(x.shape)}, expected [T, N] with N ≥ 1")
    N, V = x.shape[1], len(weight)
    fits = weight.shape == (V, N) and 0 < V < 2**31 - MAX_K
    if not fits:
        raise ValueError(f"{operation}: weight is {tuple(weight.shape)}, expected [V, {N}] with V ≥ 1")
    for name, matrix in (("x", x), ("weight", weight)):
        if not (N == 1 or matrix.stride(1) == 1):
            raise ValueError(f"{operation}: the last dimension of {name} must be contiguous")
    if bias is not None:
        fits = bias.shape == (V,) and bias.is_contiguous()
        if not fits:
            raise ValueError(f"{operation}: bias is {tuple(bias.shape)}, expected a contiguous [{V}]")
    return Head(x, weight, bias)


def check_loss(reduction: str, label_smoothing: float, z_loss: float) -> None:
    """ValueError for settings that cross entropy does not know."""
    known = "mean", "sum", "none"
    if reduction not in known:
        raise ValueError(f"reduction is {reduction!r}: allowed are {', '.join(map(repr, known))}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}: allowed is 0 to 1")
    if not z_loss >= 0.0:
        raise ValueError(f"z_loss is {z_loss}: at least 0 is needed")


@opaque
def vocab_partials_fwd(
    head: Head,
    softmax: tuple[Tensor, Tensor] | None = None,
    candidates: tuple[Tensor, Tensor] | None = None,
    totals: Tensor | None = None,
    targets: Tensor | None = None,
    after: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Fills what each chunk of the vocabulary says of each row: maxima and sums [T, C], candidates [T, C, k].

    `totals`: Σ z too, [T, C]; `targets`: only those words; `after`: only candidates that come after this logit and
    column.
    """
    x, weight, _ = head
    (T, N), itemsize = x.shape, x.element_size()
    words = len(weight if targets is None else targets)
    k = candidates[0].shape[2] if candidates else 0
    tuned = pick(CONFIGS, x.device, (itemsize, load(T, k))).meta
    nothing = None, None
    _vocab_partials_kernel[(triton.cdiv(T, tuned["BLOCK_M"]), triton.cdiv(words, CHUNK))](
        *head, targets, *(after or nothing), *(softmax or nothing), totals, *(candidates or nothing), *head.strides,
        T, words, len(weight), k, N=N, SLOTS=triton.next_power_of_2(k) if k else 0, CHUNK=CHUNK,
        PRECISION=input_precision(x.dtype, x.device), BLOCK_K=BLOCK_K[itemsize], **tuned,
    )  # fmt: skip


@opaque
def vocab_topk_fwd(head: Head, k: int, targets: Tensor | None) -> tuple[Tensor, Tensor]:
    """(log-probabilities, columns) [T, k]; a column is a word, or with targets a place among them."""
    T, device = len(head.x), head.x.device
    words = len(head.weight if targets is None else targets)
    log_probs = torch.empty((T, k), dtype=torch.float32, device=device)
    columns = torch.empty((T, k), dtype=torch.int64, device=device)
    if T == 0:
        return log_probs, columns
    maxima, sums = softmax = tuple(torch.empty((2, T, head.chunks), dtype=torch.float32, device=device))
    if targets is not None:
        vocab_partials_fwd(head, softmax)
    after = None
    for first in range(0, k, MAX_K):
        shape = (T, triton.cdiv(words, CHUNK), min(MAX_K, k - first))
        z = torch.empty(shape, dtype=torch.float32, device=device)
        z_columns = torch.empty(shape, dtype=torch.int32, device=device)
        whole = targets is None and first == 0
        vocab_partials_fwd(head, softmax if whole else None, (z, z_columns), targets=targets, after=after)
        last = torch.empty(T, dtype=torch.float32, device=device)
        candidates = shape[1] * shape[2]
        _vocab_topk_kernel[(T,)](
            maxima, sums, z, z_columns, log_probs[:, first:], columns[:, first:], last, k, head.chunks, words - 1,
            CANDIDATES=candidates, K=shape[2], BLOCK_C=triton.next_power_of_2(head.chunks),
            BLOCK=min(triton.next_power_of_2(candidates), 1024), **ROW.meta,
        )  # fmt: skip
        after = last, columns[:, first + shape[2] - 1].contiguous()
    return log_probs, columns


@opaque
def vocab_cross_entropy_fwd(head: Head, labels: Tensor, smoothing: float, z_loss: float) -> tuple[Tensor, Tensor]:
    """(losses, lse) fp32 [T] of rows that all have a label."""
    T, N = head.x.shape
    losses, lse = torch.empty((2, T), dtype=torch.float32, device=head.x.device)
    if T:
        *softmax, totals = torch.empty((3, T, head.chunks), dtype=torch.float32, device=head.x.device)
        totals = totals if smoothing else None
        vocab_partials_fwd(head, tuple(softmax), totals=totals)
        _vocab_loss_kernel[(T,)](
            *head, labels, *softmax, totals, losses, lse, *head.strides, len(head.weight), head.chunks, smoothing,
            z_loss, N=N, BLOCK_C=triton.next_power_of_2(head.chunks), BLOCK_N=min(triton.next_power_of_2(N), 1024),
            **ROW.meta,
        )  # fmt: skip
    return losses, lse


@opaque
def vocab_cross_entropy_bwd(
    g: Tensor, head: Head, labels: Tensor, lse: Tensor, smoothing: float, z_loss: float, words: int, wanted: Any
) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight and bias for those of the losses, g [T]; None where not `wanted`. The dz of so many
    `words` stands in memory at a time."""
    (x, weight, bias), (of_x, of_weight, of_bias) = head, wanted
    dx = torch.zeros(x.shape, dtype=torch.float32, device=x.device) if of_x else None  # summed over the chunks
    dw = torch.empty(weight.shape, dtype=x.dtype, device=x.device) if of_weight else None
    db = torch.empty(weight.shape[:1], dtype=x.dtype, device=x.device) if of_bias else None
    for first in range(0, len(weight), words):
        chunk = slice(first, first + words)
        part = Head(x, weight[chunk], None if bias is None else bias[chunk])
        dz, sums = _dz(g, part, labels, lse, smoothing, z_loss, first, len(weight), of_bias)
        if dx is not None:
            product_dx([dz], [part.weight], out=dx)
        if dw is not None:
            dw[chunk] = product_dw([dz], x)[0]
        if db is not None:
            db[chunk] = sum_splits(sums, x.dtype)
        del dz, sums  # before the next are made
    return None if dx is None else dx.to(x.dtype), dw, db


def _dz(
    g: Tensor, part: Head, labels: Tensor, lse: Tensor, smoothing: float, z_loss: float, first: int, V: int, sums: bool
) -> tuple[Tensor, Tensor | None]:
    """dz [T, words] of the words from `first` on, and where wanted its sums over tiles of rows, fp32 [tiles, words]."""
    (T, N), words, itemsize = part.x.shape, len(part.weight), part.x.element_size()
    tuned = pick(DZ_CONFIGS, part.x.device, itemsize).meta
    tiles = triton.cdiv(max(T, 1), tuned["BLOCK_M"])
    dz = torch.empty((T, words), dtype=part.x.dtype, device=part.x.device)
    partials = torch.zeros((tiles, words), dtype=torch.float32, device=part.x.device) if sums else None
    if T:
        _vocab_dz_kernel[(tiles, triton.cdiv(words, tuned["BLOCK_V"]))](
            *part, labels, lse, g, dz, partials, *part.strides, T, V, words, first, smoothing, z_loss, N=N,
            PRECISION=input_precision(part.x.dtype, part.x.device), BLOCK_K=BLOCK_K[itemsize], **tuned,
        )  # fmt: skip
    return dz, partials


def _losses(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int, smoothing: float, z_loss: float
) -> tuple[Tensor, ...]:
    """The losses of all rows, and of those that have a label x, labels, lse, and which rows they are."""
    operation = "vocab_cross_entropy"
    T = len(_head(operation, x, weight, bias).x)
    check_ids(operation, "labels", labels, (T,), x.device)
    rows = (labels != ignore_index).nonzero().squeeze(1)  # one host read: how many
    x, labels = (x, labels.contiguous()) if len(rows) == T else (x[rows], labels[rows])
    check_range(operation, f"labels other than {ignore_index}", labels, len(weight))
    some, lse = vocab_cross_entropy_fwd(Head(x, weight, bias), labels, smoothing, z_loss)
    losses = some if len(rows) == T else some.new_zeros(T).index_copy_(0, rows, some)
    return losses, x, labels, lse, rows


class VocabCrossEntropy(torch.autograd.Function):
    """The losses fp32 [T] of all rows, 0 where there is no label; only the labelled ones are multiplied."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int, smoothing: float,
        z_loss: float, backward: str,
    ) -> Tensor:  # fmt: skip
        losses, *kept = _losses(x, weight, bias, labels, ignore_index, smoothing, z_loss)
        ctx.save_for_backward(weight, bias, *kept)
        ctx.settings, ctx.mode, ctx.T = (smoothing, z_loss), backward, len(losses)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
        weight, bias, x, labels, lse, rows = ctx.saved_tensors
        g, words = dlosses[rows].float(), words_at_once(len(x), ctx.mode)
        dx, dw, db = vocab_cross_entropy_bwd(
            g, Head(x, weight, bias), labels, lse, *ctx.settings, words, ctx.needs_input_grad[:3]
        )
        if dx is not None and len(rows) < ctx.T:
            dx = dx.new_zeros(ctx.T, dx.shape[1]).index_copy_(0, rows, dx)
        return dx, dw, db, None, None, None, None, None


def vocab_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    backward: str = "chunked",
) -> Tensor:
    """Cross entropy of softmax(x · weightᵀ + bias) against `labels` [T], int32 or int64, as xlmr.eager's twin.

    x [T, N], weight [V, N] → fp32, a scalar or with reduction="none" [T]. Only the rows whose label is not
    `ignore_index` are multiplied; their number is read by the host once. A label that is no word raises IndexError on a
    CPU and gives NaN on a GPU. `backward`: "chunked" for speed, "recompute" for the least memory (see WORDS).
    """
    check_loss(reduction, label_smoothing, z_loss)
    if backward not in WORDS:
        raise ValueError(f"backward is {backward!r}: allowed are {', '.join(map(repr, WORDS))}")
    x, weight, bias = autocast(x, weight, bias)
    arguments = x, weight, bias, labels, ignore_index, label_smoothing, z_loss
    if wants_gradients(x, weight, bias):
        losses = VocabCrossEntropy.apply(*arguments, backward)
    else:
        losses = _losses(*arguments)[0]
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / (labels != ignore_index).sum()


def vocab_topk(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int, targets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k most probable words of softmax(x · weightᵀ + bias) and their log-probabilities, best first.

    x [T, N], weight [V, N] → log-probabilities fp32 [T, k] and word ids int64 [T, k]; of equals the lower id first.
    With `targets` [M] only those words compete (the earlier of equals first; one named twice counts twice), while the
    softmax stays that of the whole vocabulary. A target that is no word raises IndexError on a CPU; on a GPU it loses.
    """
    x, weight, bias = autocast(x, weight, bias)
    head = _head("vocab_topk", x, weight, bias)
    if targets is not None:
        check_ids("vocab_topk", "targets", targets, (targets.numel(),), x.device)
        check_range("vocab_topk", "targets", targets, len(weight))
        targets = targets.contiguous()
    words = len(weight if targets is None else targets)
    if not 0 <= k <= words:
        raise ValueError(f"vocab_topk: k is {k}, expected 0 to {words}, the words that compete")
    log_probs, columns = vocab_topk_fwd(head, k, targets)
    return log_probs, columns if targets is None else targets[columns].long()
