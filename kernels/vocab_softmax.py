"""The softmax over the vocabulary: top-k log-probabilities and cross entropy. The logits never reach memory.

z = x·wᵀ + b    lse = log Σ_v exp(z_v)    log p_v = z_v − lse    loss = mean of lse − z_label over the labelled rows

Shapes  x: [T, N], rows at any stride   w: [V, N]   b: [V] or None   log p, words: [T, k]
        partial maxima and sums: [T, C] fp32, partial candidates: [T, C, k], with C = ⌈V / CHUNK⌉
Twins   xlmr.eager.vocab_topk, xlmr.eager.vocab_cross_entropy

A program multiplies BLOCK_M rows with one chunk of the vocabulary, tile after tile, and keeps of each row the maximum
m, Σ exp(z − m) and the k best words; a second kernel joins a row's C chunks. Equal logits: the lower id comes first
(with targets: the earlier of them). More than MAX_K words take another pass over w for each MAX_K: what comes after the
last word found competes. A logit of −inf is no candidate. No locks, no atomics; tiles, chunks and their sums go in
one order whatever T is, and BLOCK_V, BLOCK_K and the columns of a warp are one constant for each target and dtype.

Memory: 8 + 8 k bytes a row and chunk: 0.6 % of the fp32 logits at k = 5, 0.9 % at k = 8, 0.1 % for the loss.

Prediction for an H200, bf16, V = 250,002. Up to 64 rows (fill-mask) the weights' stream is the roof: 384 MB (N = 768)
or 512 MB (1024) at 4.3 TB/s are 89 and 119 µs; 80 % of it, since 123 chunks keep 123 of 132 processors at work, with
64 KB and more in flight on each. From about 1,000 rows the tensor cores are (790 TFLOP/s): the loss at 50–55 %, since
loads go through pointers and each tile drains the pipeline before 16,384 exponentials (1,000 cycles, a third of its
product); the top 5 at 35–45 %: a search for a word costs a quarter of a tile's product, and 128 rows need about three.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Table, check, config, input_precision, opaque, pick, require


def cost(T: int, N: int, V: int, itemsize: int, k: int = 0) -> tuple[int, int]:
    """Floating-point operations and bytes moved of one forward over T rows; k = 0: the loss (T labelled rows)."""
    partials = T * triton.cdiv(V, CHUNK) * (8 + 8 * k)
    return 2 * T * N * V, (T * N + V * N + V) * itemsize + 2 * partials + 12 * T * max(k, 1)


CHUNK = 2048  # words a program: 123 chunks of 250,002 words
MAX_K = 16  # candidates that a program keeps of a row
FEW = 64  # rows up to which the weights' stream, not the product, is the cost
BLOCK_K = {2: 64, 4: 32}  # elements of N a step, by the bytes of an element: 128 bytes

# (bytes of an element, load). BLOCK_V is the same for both loads: a row's sum has one order.
# Not measured yet: chosen by compiling for each target (no spills up to 16 candidates, with targets and a second pass).
CONFIGS: Table = {
    "portable": {
        (2, "few"): config(4, 2, BLOCK_M=64, BLOCK_V=64),
        (2, "many"): config(4, 2, BLOCK_M=64, BLOCK_V=64),
        (4, "few"): config(4, 3, BLOCK_M=64, BLOCK_V=64),
        (4, "many"): config(4, 3, BLOCK_M=64, BLOCK_V=64),
    },
    "sm_80": {
        (2, "few"): config(8, 4, BLOCK_M=64, BLOCK_V=128),
        (2, "many"): config(8, 3, BLOCK_M=64, BLOCK_V=128),
        (4, "few"): config(4, 4, BLOCK_M=64, BLOCK_V=64),
        (4, "many"): config(8, 3, BLOCK_M=128, BLOCK_V=64),
    },
    "sm_90": {
        (2, "few"): config(4, 6, BLOCK_M=64, BLOCK_V=128),
        (2, "many"): config(8, 3, BLOCK_M=128, BLOCK_V=128),
        (4, "few"): config(4, 6, BLOCK_M=64, BLOCK_V=64),
        (4, "many"): config(8, 3, BLOCK_M=128, BLOCK_V=64),
    },
    "sm_100": {  # one tile: there a sum's order over the columns goes with BLOCK_M
        (2, "few"): config(8, 4, BLOCK_M=128, BLOCK_V=64),
        (2, "many"): config(8, 4, BLOCK_M=128, BLOCK_V=64),
        (4, "few"): config(8, 3, BLOCK_M=128, BLOCK_V=64),
        (4, "many"): config(8, 3, BLOCK_M=128, BLOCK_V=64),
    },
    "gfx942": {
        (2, "few"): config(4, 2, BLOCK_M=64, BLOCK_V=128),
        (2, "many"): config(8, 2, BLOCK_M=128, BLOCK_V=128),
        (4, "few"): config(4, 2, BLOCK_M=64, BLOCK_V=64),
        (4, "many"): config(8, 2, BLOCK_M=128, BLOCK_V=64),
    },
}

LOG2E = tl.constexpr(1.4426950408889634)
NONE = tl.constexpr(2**31 - 1)  # the word of an empty place: higher than any


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
    x_ptr,
    w_ptr,
    b_ptr,  # or None
    rows_ptr,  # None: the rows of x; else which of them, the first *count_ptr
    count_ptr,
    targets_ptr,  # None: the rows of w; else which of them
    after_z_ptr,  # None: all compete; else what comes after this logit and column
    after_column_ptr,
    max_ptr,  # None: no softmax; else [T, C]
    sum_ptr,
    z_ptr,  # [T, C, k] where SLOTS > 0
    column_ptr,
    stride_xm,
    stride_wn,
    T,
    V,
    table_rows,
    k,
    N: tl.constexpr,
    SLOTS: tl.constexpr,  # a power of two that holds k; 0: no candidates
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    count = T
    if count_ptr is not None:
        count = tl.load(count_ptr)
    if tl.program_id(0) * BLOCK_M >= count:
        return
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = m < count
    x_rows = tl.minimum(m, count - 1)  # beyond the end: a row that is there, for loads without a mask
    if rows_ptr is not None:
        x_rows = tl.load(rows_ptr + x_rows).to(tl.int64)
    after_z, after_column = None, None
    if after_z_ptr is not None:
        after_z = tl.load(after_z_ptr + m, mask=exists, other=0.0)
        after_column = tl.load(after_column_ptr + m, mask=exists, other=0)

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    if SLOTS > 0:
        slots = tl.arange(0, SLOTS)[None, :] + tl.zeros([BLOCK_M, 1], tl.int32)
        best_z = tl.where(slots < k, float("-inf"), float("inf"))  # the places beyond k are never the worst
        best_columns = NONE - slots

    start = tl.program_id(1) * CHUNK
    end = tl.minimum(start + CHUNK, V)
    while start < end:
        columns = start + tl.arange(0, BLOCK_V)
        real = columns < V
        words = columns
        w_rows = tl.minimum(columns, V - 1).to(tl.int64)  # beyond the end: a word that is there
        if targets_ptr is not None:
            words = tl.load(targets_ptr + columns, mask=real, other=-1).to(tl.int64)
            real = (words >= 0) & (words < table_rows)
            w_rows = tl.where(real, words, 0)
        z = _products(x_ptr, w_ptr, x_rows * stride_xm, w_rows * stride_wn, N, BLOCK_K, PRECISION)
        if b_ptr is not None:
            z += tl.load(b_ptr + words, mask=real, other=float("-inf")).to(tl.float32)[None, :]
        else:
            z += tl.where(real, 0.0, float("-inf"))[None, :]
        if max_ptr is not None:
            new_max = tl.maximum(row_max, tl.max(z, axis=1))
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            row_sum *= tl.exp2((row_max - shift) * LOG2E)
            row_sum += tl.sum(tl.exp2((z - shift[:, None]) * LOG2E), axis=1)
            row_max = new_max
        if SLOTS > 0:
            if after_z_ptr is not None:
                tied_later = (z == after_z[:, None]) & (columns[None, :] > after_column[:, None])
                z = tl.where((z < after_z[:, None]) | tied_later, z, float("-inf"))
            best_z, best_columns = _keep_best(z, columns, best_z, best_columns)
        start += BLOCK_V

    partial = m * tl.num_programs(1) + tl.program_id(1)
    if max_ptr is not None:
        tl.store(max_ptr + partial, row_max, mask=exists)
        tl.store(sum_ptr + partial, row_sum, mask=exists)
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
    return top, tl.log(tl.sum(sums * tl.exp2((maxima - top) * LOG2E), axis=0))


@triton.jit
def _vocab_topk_kernel(
    max_ptr,
    sum_ptr,
    z_ptr,
    column_ptr,
    log_prob_ptr,
    best_ptr,
    last_z_ptr,
    stride_om,
    chunks,
    last_column,
    CANDIDATES: tl.constexpr,
    K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
):
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


@triton.jit
def _vocab_loss_kernel(
    x_ptr,
    w_ptr,
    b_ptr,
    rows_ptr,
    count_ptr,
    labels_ptr,
    max_ptr,
    sum_ptr,
    loss_ptr,
    stride_xm,
    stride_wn,
    V,
    chunks,
    N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One labelled row a program: m + log Σ exp(z − m) − z_label; 0 beyond the last. NaN for a label outside [0, V)."""
    place = tl.program_id(0).to(tl.int64)
    if place >= tl.load(count_ptr):
        tl.store(loss_ptr + place, 0.0)
        return
    row = tl.load(rows_ptr + place)
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
    top, log_sum = _join(max_ptr, sum_ptr, place, chunks, BLOCK_C)
    tl.store(loss_ptr + place, tl.where(exists, log_sum - (z - top), float("nan")))


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
    require(x.dim() == 2 and x.shape[1] > 0, f"{operation}: x is {tuple(x.shape)}, expected [T, N] with N ≥ 1")
    N, V = x.shape[1], len(weight)
    fits = weight.shape == (V, N) and 0 < V < 2**31 - MAX_K
    require(fits, f"{operation}: weight is {tuple(weight.shape)}, expected [V, {N}] with V ≥ 1")
    for name, matrix in (("x", x), ("weight", weight)):
        require(N == 1 or matrix.stride(1) == 1, f"{operation}: the last dimension of {name} must be contiguous")
    if bias is not None:
        fits = bias.shape == (V,) and bias.is_contiguous()
        require(fits, f"{operation}: bias is {tuple(bias.shape)}, expected a contiguous [{V}]")
    return Head(x, weight, bias)


def _check_ids(operation: str, name: str, ids: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    require(ids.shape == shape, f"{operation}: {name} is {tuple(ids.shape)}, expected {list(shape)}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{operation}: {name} is {ids.dtype}, allowed are torch.int32 and torch.int64")
    require(ids.device == device, f"{operation}: {name} is on {ids.device}, x on {device}")


def _check_range(operation: str, name: str, ids: Tensor, V: int) -> None:
    """IndexError for an id outside [0, V), where asking needs no synchronisation."""
    if ids.device.type == "cpu" and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < V:
        raise IndexError(f"{operation}: {name} go from {int(ids.min())} to {int(ids.max())}, words from 0 to {V - 1}")


@opaque
def vocab_partials_fwd(
    head: Head,
    softmax: tuple[Tensor, Tensor] | None = None,
    candidates: tuple[Tensor, Tensor] | None = None,
    rows: tuple[Tensor, Tensor] | None = None,
    targets: Tensor | None = None,
    after: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Fills what each chunk of the vocabulary says of each row: maxima and sums [T, C], candidates [T, C, k].

    `rows`: only those of x, and how many (on the device); `targets`: only those words; `after`: only candidates that
    come after this logit and column.
    """
    x, weight, _ = head
    (T, N), itemsize = x.shape, x.element_size()
    words = len(weight if targets is None else targets)
    k = candidates[0].shape[2] if candidates else 0
    tuned = pick(CONFIGS, x.device, (itemsize, "few" if T <= FEW else "many")).meta
    nothing = None, None
    _vocab_partials_kernel[(triton.cdiv(T, tuned["BLOCK_M"]), triton.cdiv(words, CHUNK))](
        *head,
        *(rows or nothing),
        targets,
        *(after or nothing),
        *(softmax or nothing),
        *(candidates or nothing),
        *head.strides,
        T,
        words,
        len(weight),
        k,
        N=N,
        SLOTS=triton.next_power_of_2(k) if k else 0,
        CHUNK=CHUNK,
        PRECISION=input_precision(x.dtype, x.device),
        BLOCK_K=BLOCK_K[itemsize],
        **tuned,
    )


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
            BLOCK=min(triton.next_power_of_2(candidates), 1024), num_warps=4,
        )  # fmt: skip
        after = last, columns[:, first + shape[2] - 1].contiguous()
    return log_probs, columns


@opaque
def vocab_cross_entropy_fwd(head: Head, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(losses fp32 [T], the labelled rows' first, in order, then zeros; how many they are, int32)."""
    T, N = head.x.shape
    count = (labels != -100).sum(dtype=torch.int32)
    losses = torch.empty(T, dtype=torch.float32, device=head.x.device)
    if T:
        rows = torch.argsort((labels == -100).to(torch.uint8), stable=True)  # no synchronisation, unlike nonzero
        softmax = tuple(torch.empty((2, T, head.chunks), dtype=torch.float32, device=head.x.device))
        vocab_partials_fwd(head, softmax, rows=(rows, count))
        _vocab_loss_kernel[(T,)](
            *head, rows, count, labels, *softmax, losses, *head.strides, len(head.weight), head.chunks, N=N,
            BLOCK_C=triton.next_power_of_2(head.chunks), BLOCK_N=min(triton.next_power_of_2(N), 1024), num_warps=4,
        )  # fmt: skip
    return losses, count


def vocab_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """Mean cross entropy of softmax(x · weightᵀ + bias) against `labels` [T] over the rows whose label is not −100.

    x [T, N], weight [V, N] → a scalar in fp32; NaN, as in torch, where every label is −100. Only the labelled rows are
    multiplied, with no synchronisation. A label that is no word raises IndexError on a CPU and gives NaN on a GPU.
    """
    operation = "vocab_cross_entropy"
    head = _head(operation, x, weight, bias)
    _check_ids(operation, "labels", labels, x.shape[:1], x.device)
    if labels.device.type == "cpu":
        _check_range(operation, "labels other than −100", labels[labels != -100], len(weight))
    losses, count = vocab_cross_entropy_fwd(head, labels.contiguous())
    return losses.sum() / count


def vocab_topk(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int, targets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k most probable words of softmax(x · weightᵀ + bias) and their log-probabilities, best first.

    x [T, N], weight [V, N] → log-probabilities fp32 [T, k] and word ids int64 [T, k]; of equals the lower id first.
    With `targets` [M] only those words compete (the earlier of equals first; one named twice counts twice), while the
    softmax stays that of the whole vocabulary. A target that is no word raises IndexError on a CPU; on a GPU it loses.
    """
    head = _head("vocab_topk", x, weight, bias)
    if targets is not None:
        _check_ids("vocab_topk", "targets", targets, (targets.numel(),), x.device)
        _check_range("vocab_topk", "targets", targets, len(weight))
        targets = targets.contiguous()
    words = len(weight if targets is None else targets)
    require(0 <= k <= words, f"vocab_topk: k is {k}, expected 0 to {words}, the words that compete")
    log_probs, columns = vocab_topk_fwd(head, k, targets)
    return log_probs, columns if targets is None else targets[columns].long()
