"""The embeddings: gather three rows, add them, LayerNorm, dropout.

h = (word[i] + token_type[j]) + position[p]
μ = mean(h)    rstd = 1 / sqrt(mean((h − μ)²) + eps)    x̂ = (h − μ)·rstd    y = (x̂·w + b)·m
m is dropout's 0 or 1 / (1 − p), or 1 without dropout

Backward, with g = dy·m·w:   dh = rstd·(g − mean(g) − x̂·mean(g·x̂))    dw = Σ dy·m·x̂    db = Σ dy·m
                             dword[v] = Σ dh over the tokens with i = v, 0 for v = padding_idx; the other tables alike

Shapes  i, j, p: [T] int32 or int64, at any stride   tables: [rows, N]   w, b: [N]   μ, rstd: [T] fp32   y: [T, N]
        each table and vector in its own dtype; y in the promoted one
Twin    xlmr.eager.embed

h is never rounded and stays in registers. Every launch at one N has the same tile and warps: a row's reduction has one
order. An id outside its table raises IndexError where the ids are on a CPU; on a GPU, where asking would synchronise,
nothing outside the table is read or written and the token's row is NaN.

For backward μ and rstd are kept, and the ids; h is gathered again. dh is written once, in the tables' dtype. Of each
table that wants a gradient the ids are sorted and cut into pieces of CHUNK tokens. A piece adds up, in fp32, the rows
of each id in it; an id that lies within one piece is then finished, and one that spans several leaves a partial sum in
each, which a second kernel adds in the pieces' order. So a token type with T rows is as parallel as T distinct words.

Prediction for an H200 (4.3 TB/s): of forward's reads the types and positions come from the L2 (at most 514 rows, or
8,194) and so do the frequent words of a real text: between T·N and 2 T·N elements cross the memory bus. In bf16 and
T ≥ 16,384 at least 80 % of a copy's rate counted as 2 T·N: a row's address waits for its id, and ten programs an SM
hide that. Backward at T = 16,384, N = 1024: about 40 µs for dh and 20 µs a table, beside sorting the ids (30 µs a
table) and zeroing the word table's gradient (512 MB: 150 µs, which PyTorch spends too). Both run once a step, beside 12
or 24 layers.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._dropout import draw_seed, keep_factors, keep_levels
from ._launch import Table, check, check_ids, check_range, config, kind, opaque, pick, wants_gradients
from ._norm import (
    bucket,
    check_affine,
    contiguous_rows,
    load_tile,
    new_partials,
    norm_bwd,
    programs,
    row_stride,
    rows_of,
    store_affine,
    store_statistics,
    sum_partials,
)


def cost(T: int, N: int, itemsize: int, id_itemsize: int = 8, backward: bool = False) -> tuple[int, int]:
    """Floating-point operations and the least bytes moved by one forward, without gradients, or one backward.

    Word and position rows count though the L2 may serve them; of the token types one row counts, once. Backward is that
    of all gradients with dh written once and read once a table, but for the rows of the tables' gradients (as many as
    there are distinct ids), partial sums and the sorting.
    """
    if backward:
        return 23 * T * N, (7 * T * N + 4 * N) * itemsize + 9 * T * id_itemsize + 2 * T * 4
    return 10 * T * N, (3 * T * N + 3 * N) * itemsize + 3 * T * id_itemsize


def activation_bytes(id_itemsize: int = 8) -> int:
    """Bytes a token kept for backward: mean and rstd, and the three ids, which the model holds anyway."""
    return 3 * id_itemsize + 2 * 4


# By the power of two that holds N; "wide" is a loop over blocks. 16 elements a thread (32 at N = 1024): each is three
# loads. Not measured yet: chosen by compiling for sm_80, sm_90, sm_100 and gfx942 (no spills).
CONFIGS: Table = {
    "portable": {
        128: config(4, 1, BLOCK_T=8, BLOCK_N=128),
        256: config(4, 1, BLOCK_T=8, BLOCK_N=256),
        512: config(4, 1, BLOCK_T=4, BLOCK_N=512),
        1024: config(4, 1, BLOCK_T=4, BLOCK_N=1024),
        2048: config(4, 1, BLOCK_T=1, BLOCK_N=2048),
        4096: config(8, 1, BLOCK_T=1, BLOCK_N=4096),
        "wide": config(8, 1, BLOCK_T=1, BLOCK_N=4096),
    }
}
BACKWARD_CONFIGS: Table = {
    "portable": {
        128: config(4, 1, BLOCK_T=8, BLOCK_N=128),
        256: config(4, 1, BLOCK_T=8, BLOCK_N=256),
        512: config(4, 1, BLOCK_T=4, BLOCK_N=512),
        1024: config(4, 1, BLOCK_T=2, BLOCK_N=1024),
        2048: config(8, 1, BLOCK_T=1, BLOCK_N=2048),
        4096: config(8, 1, BLOCK_T=1, BLOCK_N=4096),
        "wide": config(8, 1, BLOCK_T=1, BLOCK_N=1024),
    }
}
CHUNK = 8  # sorted tokens a piece: its rows are in registers together, 64 elements a thread
PIECES = config(4, 1, CHUNK=CHUNK, BLOCK_N=1024)
SPANS = config(4, 1, CHUNK=CHUNK, BLOCK_P=64, BLOCK_N=128)


@triton.jit
def _places(layout, tokens, exists):
    """Where each token's row of each table starts, and whether every table has it. `layout`: pointers to the ids, their
    strides, the tables' numbers of rows and strides of rows, each of words, token types and positions."""
    ids, strides, rows, row_strides = layout
    words = tl.load(ids[0] + tokens * strides[0], mask=exists, other=0).to(tl.int64)
    types = tl.load(ids[1] + tokens * strides[1], mask=exists, other=0).to(tl.int64)
    positions = tl.load(ids[2] + tokens * strides[2], mask=exists, other=0).to(tl.int64)
    known = exists & (words >= 0) & (words < rows[0]) & (types >= 0) & (types < rows[1])
    known = known & (positions >= 0) & (positions < rows[2])
    places = (words * row_strides[0])[:, None], (types * row_strides[1])[:, None], (positions * row_strides[2])[:, None]
    return places, known


@triton.jit
def _hidden(tables, places, known, cols, N: tl.constexpr):
    """One tile of h in fp32, 0 where a row is unknown or has no such column."""
    mask = known[:, None] & (cols < N)[None, :]
    h = load_tile(tables[0], places[0], cols, mask) + load_tile(tables[1], places[1], cols, mask)
    return h + load_tile(tables[2], places[2], cols, mask)


@triton.jit(do_not_specialize=["T", "word_rows", "type_rows", "position_rows", "levels"])
def _embed_fwd_kernel(
    word_ids_ptr, type_ids_ptr, position_ids_ptr, word_ptr, type_ptr, position_ptr, w_ptr, b_ptr, y_ptr,
    mean_ptr, rstd_ptr,  # None: no backward will follow
    seed_ptr, levels,  # None: no dropout
    stride_word_id, stride_type_id, stride_position_id, stride_word, stride_type, stride_position,
    word_rows, type_rows, position_rows, T, eps,
    N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    ids, strides = (word_ids_ptr, type_ids_ptr, position_ids_ptr), (stride_word_id, stride_type_id, stride_position_id)
    table_rows, row_strides = (word_rows, type_rows, position_rows), (stride_word, stride_type, stride_position)
    tables, layout = (word_ptr, type_ptr, position_ptr), (ids, strides, table_rows, row_strides)
    tokens = rows_of(tl.program_id(0), BLOCK_T)
    exists = tokens < T
    places, known = _places(layout, tokens, exists)
    poison = tl.where(known, 0.0, float("nan"))  # joins the mean: a row with a wrong id is NaN
    y_rows = (tokens * N)[:, None]
    cols = tl.arange(0, BLOCK_N)
    if BLOCK_N >= N:  # the row stays in registers
        h = _hidden(tables, places, known, cols, N)
        mean = tl.sum(h, axis=1) / N + poison
        centred = tl.where((cols < N)[None, :], h - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / N + eps)
        mask, factors = exists[:, None] & (cols < N)[None, :], keep_factors(seed_ptr, tokens, 0, levels, BLOCK_N)
        store_affine(y_ptr, w_ptr, b_ptr, y_rows, cols, mask, N, centred * rstd[:, None], factors)
    else:  # three passes over the row
        total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        for start in range(0, N, BLOCK_N):
            total += _hidden(tables, places, known, start + cols, N)
        mean = tl.sum(total, axis=1) / N + poison
        total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        for start in range(0, N, BLOCK_N):
            h = _hidden(tables, places, known, start + cols, N)
            centred = tl.where((start + cols < N)[None, :], h - mean[:, None], 0.0)
            total += centred * centred
        rstd = tl.rsqrt(tl.sum(total, axis=1) / N + eps)
        for start in range(0, N, BLOCK_N):
            normal = (_hidden(tables, places, known, start + cols, N) - mean[:, None]) * rstd[:, None]
            mask = exists[:, None] & (start + cols < N)[None, :]
            factors = keep_factors(seed_ptr, tokens, start, levels, BLOCK_N)
            store_affine(y_ptr, w_ptr, b_ptr, y_rows, start + cols, mask, N, normal, factors)
    store_statistics(mean_ptr, rstd_ptr, tokens, exists, mean, rstd)


@triton.jit
def _locate(inputs, tokens, exists):
    """For norm_bwd: where the tokens' rows are."""
    _, layout, _ = inputs
    places, known = _places(layout, tokens, exists)
    return tokens, exists, places, known


@triton.jit
def _operands(inputs, located, start, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """For norm_bwd: dy·m, h and, as the tables' rows are added as they are, 1."""
    tables, _, gradient = inputs
    dy_ptr, stride_dym, seed_ptr, levels = gradient
    tokens, exists, places, known = located
    cols = start + tl.arange(0, BLOCK_N)
    h = _hidden(tables, places, known, cols, N)
    dy = load_tile(dy_ptr, (tokens * stride_dym)[:, None], cols, exists[:, None] & (cols < N)[None, :])
    return dy * keep_factors(seed_ptr, tokens, start, levels, BLOCK_N), h, 1.0


@triton.jit(do_not_specialize=["T", "word_rows", "type_rows", "position_rows", "levels"])
def _embed_bwd_kernel(
    dy_ptr, word_ids_ptr, type_ids_ptr, position_ids_ptr, word_ptr, type_ptr, position_ptr, w_ptr, mean_ptr, rstd_ptr,
    dh_ptr,  # None, as the next two: not wanted
    dw_ptr, db_ptr,  # [programs, N]
    seed_ptr, levels,  # None: no dropout
    stride_dym, stride_word_id, stride_type_id, stride_position_id, stride_word, stride_type, stride_position,
    word_rows, type_rows, position_rows, T,
    N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    ids, strides = (word_ids_ptr, type_ids_ptr, position_ids_ptr), (stride_word_id, stride_type_id, stride_position_id)
    table_rows, row_strides = (word_rows, type_rows, position_rows), (stride_word, stride_type, stride_position)
    tables, layout = (word_ptr, type_ptr, position_ptr), (ids, strides, table_rows, row_strides)
    inputs = (tables, layout, (dy_ptr, stride_dym, seed_ptr, levels))
    norm_bwd(
        _locate, _operands, inputs, w_ptr, mean_ptr, rstd_ptr, None, dh_ptr, dw_ptr, db_ptr, T, N, BLOCK_T, BLOCK_N
    )


@triton.jit(do_not_specialize=["T", "table_rows", "padding_idx"])
def _sum_pieces_kernel(
    dh_ptr,
    ids_ptr,  # sorted
    order_ptr,  # the token of each
    table_ptr,  # the gradient
    partials_ptr,  # [pieces, 2, N]: of an id that begins before this piece; of one that goes on after it
    table_rows, padding_idx, T,
    N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0).to(tl.int64)
    ids_ptr += piece * CHUNK
    count = tl.minimum(T - piece * CHUNK, CHUNK).to(tl.int32)
    places = tl.arange(0, CHUNK)
    ids = tl.load(ids_ptr + places, mask=places < count, other=-1)
    tokens = tl.load(order_ptr + piece * CHUNK + places, mask=places < count, other=0)
    before = tl.load(ids_ptr - 1, mask=piece > 0, other=-1)
    after = tl.load(ids_ptr + CHUNK, mask=(piece + 1) * CHUNK < T, other=-1)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = load_tile(dh_ptr, (tokens * N)[:, None], cols, (places < count)[:, None] & (cols < N)[None, :])
    first = 0
    while first < count:
        key = tl.load(ids_ptr + first)
        same = (ids == key) & (places < count)
        total = tl.sum(tl.where(same[:, None], rows, 0.0), axis=0)
        if (key == before) | (key == after):
            place = (2 * piece + tl.where(key == before, 0, 1)) * N + cols
            tl.store(partials_ptr + place, total, mask=cols < N)
        elif (key >= 0) & (key < table_rows) & (key != padding_idx):
            place = key.to(tl.int64) * N + cols
            tl.store(table_ptr + place, total.to(table_ptr.dtype.element_ty), mask=cols < N)
        first += tl.sum(same.to(tl.int32))


@triton.jit(do_not_specialize=["T", "table_rows", "padding_idx"])
def _sum_spans_kernel(
    ids_ptr, table_ptr, partials_ptr, table_rows, padding_idx, T,
    N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Finishes the id that begins in a piece and goes on after it."""
    piece = tl.program_id(0).to(tl.int64)
    end = (piece + 1) * CHUNK
    key = tl.load(ids_ptr + end - 1, mask=end < T, other=-1)
    after = tl.load(ids_ptr + end, mask=end < T, other=-1)
    before = tl.load(ids_ptr + end - CHUNK - 1, mask=piece > 0, other=-1)
    wanted = (key >= 0) & (key < table_rows) & (key != padding_idx)
    if wanted & (key == after) & (key != before):
        cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        total = tl.load(partials_ptr + (2 * piece + 1) * N + cols, mask=cols < N, other=0.0)
        goes_on = 1
        while goes_on == 1:
            pieces = piece + 1 + tl.arange(0, BLOCK_P)
            same = tl.load(ids_ptr + pieces * CHUNK, mask=pieces * CHUNK < T, other=-1) == key
            total += tl.sum(
                load_tile(partials_ptr, (2 * pieces * N)[:, None], cols, same[:, None] & (cols < N)), axis=0
            )
            goes_on = tl.min(same.to(tl.int32))
            piece += BLOCK_P
        tl.store(table_ptr + key.to(tl.int64) * N + cols, total.to(table_ptr.dtype.element_ty), mask=cols < N)


@opaque
def embed_fwd(
    ids: tuple[Tensor, ...],
    tables: tuple[Tensor, ...],
    weight: Tensor,
    bias: Tensor,
    eps: float,
    seed: Tensor | None = None,
    levels: int = 0,
    statistics: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y [T, N], mean [T], rstd [T]) of the LayerNorm of the sum of one row of each table; no mean and rstd without
    `statistics`. Ids and tables of words, token types and positions; with a seed `levels` of 65,536 of y's elements
    survive."""
    word, token_type, position = tables
    check("embed", mixed=True, word=word, token_type=token_type, position=position, weight=weight, bias=bias)
    T, N = ids[0].numel(), weight.numel()
    for name, table in zip(("word", "token_type", "position"), tables, strict=True):
        fits = table.dim() == 2 and table.shape[1] == N > 0 and (table.stride(1) == 1 or N == 1)
        if not fits:
            raise ValueError(
                f"embed: {name} is {tuple(table.shape)}, expected [rows, {N}] with a contiguous last dimension"
            )
    check_affine("embed", kind(weight), kind(bias), N)
    for name, given, table in zip(("input_ids", "token_type_ids", "position_ids"), ids, tables, strict=True):
        _check_ids(name, given, T, table)
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in (*tables, weight)))
    y = torch.empty((T, N), dtype=dtype, device=word.device)
    mean, rstd = torch.empty((2, T), dtype=torch.float32, device=word.device) if statistics else (None, None)
    if T:
        tuned = pick(CONFIGS, word.device, bucket(N)).meta
        tensors = *ids, *tables, weight, bias, y, mean, rstd, seed
        grid = (triton.cdiv(T, tuned["BLOCK_T"]),)
        _embed_fwd_kernel[grid](*tensors, levels, *_layout(ids, tables), T, eps, N=N, **tuned)
    return y, mean, rstd


def _layout(ids: Sequence[Tensor], tables: Sequence[Tensor]) -> list[int]:
    """Strides of the ids, strides of the tables' rows, numbers of rows."""
    strides = [given.stride(0) if len(given) > 1 else 1 for given in ids]
    return strides + [table.stride(0) for table in tables] + [len(table) for table in tables]


def _check_ids(name: str, ids: Tensor, T: int, table: Tensor) -> None:
    check_ids("embed", name, ids, (T,), table.device)
    check_range("embed", name, ids, len(table))


@opaque
def embed_bwd(
    dy: Tensor,
    ids: tuple[Tensor, ...],
    tables: tuple[Tensor, ...],
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    padding_idx: int,
    seed: Tensor | None = None,
    levels: int = 0,
    wanted: Sequence[bool] = (True, True, True, True, True),
    pad_positions: bool = True,
) -> tuple[Tensor | None, ...]:
    """The gradients of the three tables, weight and bias, each in its tensor's dtype, None where it is not `wanted`."""
    (T, N), (*of_tables, of_weight, of_bias) = dy.shape, wanted
    dy, P = contiguous_rows(dy), programs(T, dy.device)
    dtype = functools.reduce(torch.promote_types, (table.dtype for table in tables))
    dh = torch.empty((T, N), dtype=dtype, device=dy.device) if any(of_tables) else None
    dw, db = new_partials(weight, of_weight, P), new_partials(bias, of_bias, P)
    tensors = dy, *ids, *tables, weight, mean, rstd, dh, dw, db, seed
    tuned = pick(BACKWARD_CONFIGS, dy.device, bucket(N)).meta
    _embed_bwd_kernel[(P,)](*tensors, levels, row_stride(dy), *_layout(ids, tables), T, N=N, **tuned)
    gradients = [
        _table_gradient(dh, given, table, padding) if of_table else None
        for given, table, padding, of_table in zip(
            ids, tables, (padding_idx, None, padding_idx if pad_positions else None), of_tables, strict=True
        )
    ]
    return *gradients, *sum_partials(dw, db, weight, bias)


def _table_gradient(dh: Tensor, ids: Tensor, table: Tensor, padding_idx: int | None) -> Tensor:
    """Σ dh over the tokens of each id, [rows, N] as the table; 0 in the row padding_idx (counted from the end where
    negative, as in torch) and where no token is."""
    gradient = torch.zeros(table.shape, dtype=table.dtype, device=table.device)
    T, N = dh.shape
    if T:
        ids, order = ids.sort(stable=True)
        pieces, padding = triton.cdiv(T, CHUNK), -1 if padding_idx is None else padding_idx % len(table)
        partials = torch.empty((pieces, 2, N), dtype=torch.float32, device=dh.device)
        sizes = len(table), padding, T, N
        grid = (pieces, triton.cdiv(N, PIECES.meta["BLOCK_N"]))
        _sum_pieces_kernel[grid](dh, ids, order, gradient, partials, *sizes, **PIECES.meta)
        grid = (pieces, triton.cdiv(N, SPANS.meta["BLOCK_N"]))
        _sum_spans_kernel[grid](ids, gradient, partials, *sizes, **SPANS.meta)
    return gradient


class Embed(torch.autograd.Function):
    """embed_fwd with its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        word: Tensor,
        token_type: Tensor,
        position: Tensor,
        weight: Tensor,
        bias: Tensor,
        ids: tuple[Tensor, ...],
        eps: float,
        padding_idx: int,
        seed: Tensor | None,
        levels: int,
        pad_positions: bool,
    ) -> Tensor:
        tables = word, token_type, position
        y, mean, rstd = embed_fwd(ids, tables, weight, bias, eps, seed, levels)
        ctx.save_for_backward(*ids, *tables, weight, bias, mean, rstd, seed)
        ctx.padding_idx, ctx.levels, ctx.pad_positions = padding_idx, levels, pad_positions
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *saved, seed = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:5]
        settings = ctx.padding_idx, seed, ctx.levels, wanted, ctx.pad_positions
        gradients = embed_bwd(dy, saved[:3], saved[3:6], *saved[6:], *settings)
        return *gradients, None, None, None, None, None, None


def embed(
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word: Tensor,
    token_type: Tensor,
    position: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    padding_idx: int,
    dropout_p: float = 0.0,
    pad_positions: bool = True,
) -> Tensor:
    """dropout(LayerNorm(word[input_ids] + token_type[token_type_ids] + position[position_ids])) → [T, N].

    Ids are int32 or int64 [T]; tables [rows, N]. The row `padding_idx` of `word` and, with pad_positions, of `position`
    gets no gradient; the gradients of the tables are dense. The mask of dropout is drawn from the device's generator.
    IndexError for an id outside its table on a CPU, ValueError for a dropout_p outside [0, 1].
    """
    ids, parameters = (input_ids, token_type_ids, position_ids), (word, token_type, position, weight, bias)
    levels, seed = (keep_levels(dropout_p), draw_seed(word.device)) if dropout_p else (0, None)
    if wants_gradients(*parameters):
        return Embed.apply(*parameters, ids, eps, padding_idx, seed, levels, pad_positions)
    return embed_fwd(ids, parameters[:3], weight, bias, eps, seed, levels, statistics=False)[0]
