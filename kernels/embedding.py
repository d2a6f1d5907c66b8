"""The embeddings: gather three rows, add them, LayerNorm.

h = (word[i] + token_type[j]) + position[p]
μ = mean(h)    rstd = 1 / sqrt(mean((h − μ)²) + eps)    y = (h − μ)·rstd·w + b

Shapes  i, j, p: [T] int32 or int64, at any stride   tables: [rows, N]   w, b: [N]   y: [T, N]
Twin    xlmr.eager.embed

h is never rounded and stays in registers. Every launch at one N has the same tile and warps: a row's reduction has one
order. An id outside its table raises IndexError where the ids are on a CPU; on a GPU, where asking would synchronise,
nothing outside the table is read and the token's row is NaN.

Prediction for an H200 (4.3 TB/s): of the 4 T·N elements, the types and positions come from the L2 (at most 514 rows, or
8,194) and so do the frequent words of a real text: between T·N and 2 T·N elements cross the memory bus. In bf16 and
T ≥ 16,384 at least 80 % of a copy's rate counted as 2 T·N: a row's address waits for its id, and ten programs an SM
hide that. It runs once a forward, beside 12 or 24 layers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Table, check, config, opaque, pick, require


def cost(T: int, N: int, itemsize: int, id_itemsize: int = 8) -> tuple[int, int]:
    """Floating-point operations and bytes moved of one forward, rows that the L2 serves included."""
    return 10 * T * N, (4 * T * N + 2 * N) * itemsize + 3 * T * id_itemsize


# By the power of two that holds N; wider rows take the last entry in a loop. 16 elements a thread: each is three loads.
# Not measured yet: chosen by compiling for sm_80, sm_90, sm_100 and gfx942 (no spills, at most 96 registers).
MAX_BLOCK_N = 8192
_COMMON = {
    128: config(4, 1, BLOCK_T=8, BLOCK_N=128),
    256: config(4, 1, BLOCK_T=8, BLOCK_N=256),
    512: config(4, 1, BLOCK_T=4, BLOCK_N=512),
    1024: config(4, 1, BLOCK_T=2, BLOCK_N=1024),
    2048: config(4, 1, BLOCK_T=1, BLOCK_N=2048),
    4096: config(8, 1, BLOCK_T=1, BLOCK_N=4096),
    8192: config(16, 1, BLOCK_T=1, BLOCK_N=8192),
}
CONFIGS: Table = {
    "portable": _COMMON,
    "sm_80": _COMMON | {1024: config(4, 1, BLOCK_T=4, BLOCK_N=1024)},  # two rows at N = 1024 spill in fp32
}


def bucket(N: int) -> int:
    """The key of CONFIGS[target] for rows of N elements: it depends on N alone."""
    return min(max(triton.next_power_of_2(N), 128), MAX_BLOCK_N)


@triton.jit
def _row_offsets(ids_ptr, stride_id, table_rows, stride_row, tokens, exists):
    """Where each token's row of a table starts, and whether the table has it."""
    ids = tl.load(ids_ptr + tokens * stride_id, mask=exists, other=0).to(tl.int64)
    return (ids * stride_row)[:, None], (ids >= 0) & (ids < table_rows)


@triton.jit
def _hidden(word_ptr, type_ptr, position_ptr, words, types, positions, cols, mask):
    """One tile of h in fp32, 0 where masked."""
    h = tl.load(word_ptr + words + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    h += tl.load(type_ptr + types + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    return h + tl.load(position_ptr + positions + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _scale_and_store(y_ptr, w_ptr, b_ptr, y_rows, cols, mask, N: tl.constexpr, centred, rstd):
    """y = (h − μ)·rstd·w + b of one tile."""
    w = tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    y = centred * rstd[:, None] * w[None, :] + b[None, :]
    tl.store(y_ptr + y_rows + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "word_rows", "type_rows", "position_rows"])
def _embed_fwd_kernel(
    word_ids_ptr,
    type_ids_ptr,
    position_ids_ptr,
    word_ptr,
    type_ptr,
    position_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    stride_word_id,
    stride_type_id,
    stride_position_id,
    stride_word,
    stride_type,
    stride_position,
    word_rows,
    type_rows,
    position_rows,
    T,
    eps,
    N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    exists = tokens < T
    words, has_word = _row_offsets(word_ids_ptr, stride_word_id, word_rows, stride_word, tokens, exists)
    types, has_type = _row_offsets(type_ids_ptr, stride_type_id, type_rows, stride_type, tokens, exists)
    positions, has_position = _row_offsets(
        position_ids_ptr, stride_position_id, position_rows, stride_position, tokens, exists
    )
    known = exists & has_word & has_type & has_position
    poison = tl.where(known, 0.0, float("nan"))  # joins the mean: a row with a wrong id is NaN
    y_rows = (tokens * N)[:, None]
    cols = tl.arange(0, BLOCK_N)
    if BLOCK_N >= N:  # the row stays in registers
        in_row = (cols < N)[None, :]
        h = _hidden(word_ptr, type_ptr, position_ptr, words, types, positions, cols, known[:, None] & in_row)
        mean = tl.sum(h, axis=1) / N + poison
        centred = tl.where(in_row, h - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / N + eps)
        _scale_and_store(y_ptr, w_ptr, b_ptr, y_rows, cols, exists[:, None] & in_row, N, centred, rstd)
    else:  # three passes over the row
        total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        for start in range(0, N, BLOCK_N):
            mask = known[:, None] & (start + cols < N)[None, :]
            total += _hidden(word_ptr, type_ptr, position_ptr, words, types, positions, start + cols, mask)
        mean = tl.sum(total, axis=1) / N + poison
        total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        for start in range(0, N, BLOCK_N):
            mask = known[:, None] & (start + cols < N)[None, :]
            h = _hidden(word_ptr, type_ptr, position_ptr, words, types, positions, start + cols, mask)
            centred = tl.where(mask, h - mean[:, None], 0.0)
            total += centred * centred
        rstd = tl.rsqrt(tl.sum(total, axis=1) / N + eps)
        for start in range(0, N, BLOCK_N):
            in_row = (start + cols < N)[None, :]
            mask = known[:, None] & in_row
            h = _hidden(word_ptr, type_ptr, position_ptr, words, types, positions, start + cols, mask)
            centred, mask = h - mean[:, None], exists[:, None] & in_row
            _scale_and_store(y_ptr, w_ptr, b_ptr, y_rows, start + cols, mask, N, centred, rstd)


@opaque
def embed_fwd(ids: tuple[Tensor, ...], tables: tuple[Tensor, ...], weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm of the sum of one row of each table, [T, N]; ids and tables of words, token types and positions."""
    word, token_type, position = tables
    check("embed", word=word, token_type=token_type, position=position, weight=weight, bias=bias)
    T, N = ids[0].numel(), weight.numel()
    for name, table in zip(("word", "token_type", "position"), tables, strict=True):
        fits = table.dim() == 2 and table.shape[1] == N > 0 and (table.stride(1) == 1 or N == 1)
        require(fits, f"embed: {name} is {tuple(table.shape)}, expected [rows, {N}] with a contiguous last dimension")
    for name, vector in (("weight", weight), ("bias", bias)):
        fits = vector.shape == (N,) and vector.is_contiguous()
        require(fits, f"embed: {name} is {tuple(vector.shape)}, expected a contiguous [{N}]")
    for name, given, table in zip(("input_ids", "token_type_ids", "position_ids"), ids, tables, strict=True):
        _check_ids(name, given, T, table)
    y = torch.empty((T, N), dtype=word.dtype, device=word.device)
    if T:
        tuned = pick(CONFIGS, word.device, bucket(N)).meta
        id_strides = [given.stride(0) if T > 1 else 1 for given in ids]
        strides, rows = [table.stride(0) for table in tables], [len(table) for table in tables]
        _embed_fwd_kernel[(triton.cdiv(T, tuned["BLOCK_T"]),)](
            *ids, *tables, weight, bias, y, *id_strides, *strides, *rows, T, eps, N=N, **tuned
        )
    return y


def _check_ids(name: str, ids: Tensor, T: int, table: Tensor) -> None:
    require(ids.shape == (T,), f"embed: {name} is {tuple(ids.shape)}, expected [{T}], as input_ids has {T} tokens")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"embed: {name} is {ids.dtype}, allowed are torch.int32 and torch.int64")
    require(ids.device == table.device, f"embed: {name} is on {ids.device}, the tables on {table.device}")
    if ids.device.type == "cpu" and T and not 0 <= int(ids.min()) <= int(ids.max()) < len(table):
        found = f"from {int(ids.min())} to {int(ids.max())}"
        raise IndexError(f"embed: {name} go {found}, the table has rows 0 to {len(table) - 1}")


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
) -> Tensor:
    """LayerNorm(word[input_ids] + token_type[token_type_ids] + position[position_ids]) → [T, N].

    Ids are int32 or int64 [T]; tables [rows, N]. `padding_idx` concerns gradients. RuntimeError for dropout_p > 0.
    """
    if dropout_p:
        raise RuntimeError(f"embed: the kernel has no dropout (dropout_p={dropout_p}); use backend='eager'")
    ids, tables = (input_ids, token_type_ids, position_ids), (word, token_type, position)
    return embed_fwd(ids, tables, weight, bias, eps)
