"""What the kernels that end in a LayerNorm share: tiles by width, its last step, its backward, the sums over rows.

x̂ = (h − μ)·rstd    y = x̂·w + b
Backward, with g = dy·w:   dh = rstd·(g − mean(g) − x̂·mean(g·x̂))    dw = Σ dy·x̂    db = Σ dy, over the rows

No atomics: `programs(T, device)` programs share the rows in a fixed order, each writes one fp32 row of partial sums of
dw and of db, and a second kernel adds those rows, again in one order: on one device gradients are bitwise the same at
every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Kind, config, processors

MAX_BLOCK_N = 4096  # wider rows do not fit in the registers: they are walked in blocks
PROGRAMS_PER_PROCESSOR = 4
MIN_ROWS = 16  # of a program: its partial sums then cost at most an eighth of what it reads and writes in bf16


def bucket(N: int) -> int | str:
    """The key of a configuration table for rows of N elements: the power of two that holds them, or "wide"."""
    return max(triton.next_power_of_2(N), 128) if N <= MAX_BLOCK_N else "wide"


def programs(T: int, device: torch.device) -> int:
    """How many programs share the T rows of a backward pass: at least one, which writes the zeros of T = 0."""
    return max(1, min(triton.cdiv(T, MIN_ROWS), PROGRAMS_PER_PROCESSOR * processors(device)))


def check_affine(operation: str, weight: Kind, bias: Kind, N: int) -> None:
    for name, vector in (("weight", weight), ("bias", bias)):
        fits = vector.shape == (N,) and (N == 1 or vector.stride == (1,))
        if not fits:
            raise ValueError(f"{operation}: {name} is {tuple(vector.shape)}, expected a contiguous [{N}]")


def contiguous_rows(dy: Tensor) -> Tensor:
    """The gradient as it came, or a copy where its last dimension is not contiguous (it may be expanded)."""
    return dy if dy.shape[1] == 1 or dy.stride(1) == 1 else dy.contiguous()


def row_stride(rows: Tensor | None) -> int:
    """Elements from one row to the next; of one row, whose stride may be anything, its length."""
    return 0 if rows is None else rows.stride(0) if len(rows) > 1 else rows.shape[1]


@triton.jit
def load_tile(ptr, offsets, cols, mask):
    """Rows starting at `offsets` [R, 1], columns `cols` [C] → fp32 [R, C], 0 where masked."""
    return tl.load(ptr + offsets + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(ptr, offsets, cols, mask, value):
    """Nothing where ptr is None."""
    if ptr is not None:
        tl.store(ptr + offsets + cols[None, :], value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_vector(ptr, cols, N: tl.constexpr):
    return tl.load(ptr + cols, mask=cols < N, other=0.0).to(tl.float32)


@triton.jit
def store_affine(y_ptr, w_ptr, b_ptr, offsets, cols, mask, N: tl.constexpr, normal, factors):
    """y = (x̂·w + b)·factors of one tile; `factors` are dropout's, or 1."""
    w, b = load_vector(w_ptr, cols, N), load_vector(b_ptr, cols, N)
    store_tile(y_ptr, offsets, cols, mask, (normal * w[None, :] + b[None, :]) * factors)


@triton.jit
def store_statistics(mean_ptr, rstd_ptr, rows, exists, mean, rstd):
    """For backward; nothing where the pointers are None."""
    if mean_ptr is not None:
        tl.store(mean_ptr + rows, mean, mask=exists)
        tl.store(rstd_ptr + rows, rstd, mask=exists)


@triton.jit
def load_statistics(mean_ptr, rstd_ptr, rows, T):
    """The means and rstds of rows (0 past the last row)."""
    return tl.load(mean_ptr + rows, mask=rows < T, other=0.0), tl.load(rstd_ptr + rows, mask=rows < T, other=0.0)


@triton.jit
def rows_of(block, BLOCK_T: tl.constexpr):
    """The numbers, int64, of a block's rows."""
    return block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)


@triton.jit
def _input_gradient(g, normal, rstd, mean_g, mean_gx):
    """dh of one tile: g = dy·w, normal = x̂ and, by row, rstd and the means of g and of g·x̂."""
    return rstd[:, None] * (g - mean_g[:, None] - normal * mean_gx[:, None])


@triton.jit
def _store_gradients(dx_ptr, dh_ptr, rows, T, cols, N: tl.constexpr, dh, slope):
    """dx = dh·∂h/∂x, and dh itself; nothing where a pointer is None."""
    mask = (rows < T)[:, None] & (cols < N)[None, :]
    store_tile(dx_ptr, (rows * N)[:, None], cols, mask, dh * slope)
    store_tile(dh_ptr, (rows * N)[:, None], cols, mask, dh)


@triton.jit
def _store_partials(dw_ptr, db_ptr, cols, N: tl.constexpr, dw, db):
    """This program's row of partial sums; nothing where a pointer is None."""
    row = tl.program_id(0).to(tl.int64) * N
    if dw_ptr is not None:
        tl.store(dw_ptr + row + cols, dw, mask=cols < N)
    if db_ptr is not None:
        tl.store(db_ptr + row + cols, db, mask=cols < N)


@triton.jit
def norm_bwd(
    locate: tl.constexpr, operands: tl.constexpr,  # functions, see below
    inputs, w_ptr, mean_ptr, rstd_ptr,
    dx_ptr, dh_ptr,  # None, as the next two: not wanted
    dw_ptr, db_ptr,  # [programs, N]
    T, N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The backward pass of every num_programs-th block of BLOCK_T rows, from program_id on.

    locate(inputs, rows, exists) → what is known of a block of rows before its columns
    operands(inputs, located, start, N, BLOCK_N) → dy, h, ∂h/∂x of the columns from `start` on: fp32 [BLOCK_T, BLOCK_N],
    dy and h 0 where there is no element
    """
    if BLOCK_N >= N:
        _narrow_bwd(
            locate, operands, inputs, w_ptr, mean_ptr, rstd_ptr, dx_ptr, dh_ptr, dw_ptr, db_ptr, T, N, BLOCK_T, BLOCK_N
        )
    else:
        if dx_ptr is not None or dh_ptr is not None:
            _wide_bwd_dx(locate, operands, inputs, w_ptr, mean_ptr, rstd_ptr, dx_ptr, dh_ptr, T, N, BLOCK_T, BLOCK_N)
        if dw_ptr is not None or db_ptr is not None:
            _wide_bwd_dw(locate, operands, inputs, mean_ptr, rstd_ptr, dw_ptr, db_ptr, T, N, BLOCK_T, BLOCK_N)


@triton.jit
def _narrow_bwd(
    locate: tl.constexpr, operands: tl.constexpr, inputs, w_ptr, mean_ptr, rstd_ptr, dx_ptr, dh_ptr, dw_ptr, db_ptr, T,
    N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All gradients in one pass: the rows stay in registers."""
    cols = tl.arange(0, BLOCK_N)
    w = load_vector(w_ptr, cols, N)[None, :]
    dw, db = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    block = tl.program_id(0)
    while block * BLOCK_T < T:
        rows = rows_of(block, BLOCK_T)
        mean, rstd = load_statistics(mean_ptr, rstd_ptr, rows, T)
        located = locate(inputs, rows, rows < T)
        dy, h, slope = operands(inputs, located, 0, N, BLOCK_N)
        normal = (h - mean[:, None]) * rstd[:, None]
        dw += tl.sum(dy * normal, axis=0)
        db += tl.sum(dy, axis=0)
        g = dy * w
        dh = _input_gradient(g, normal, rstd, tl.sum(g, axis=1) / N, tl.sum(g * normal, axis=1) / N)
        _store_gradients(dx_ptr, dh_ptr, rows, T, cols, N, dh, slope)
        block += tl.num_programs(0)
    _store_partials(dw_ptr, db_ptr, cols, N, dw, db)


@triton.jit
def _wide_bwd_dx(
    locate: tl.constexpr, operands: tl.constexpr, inputs, w_ptr, mean_ptr, rstd_ptr, dx_ptr, dh_ptr, T,
    N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx and dh in two passes over each row."""
    cols = tl.arange(0, BLOCK_N)
    block = tl.program_id(0)
    while block * BLOCK_T < T:
        rows = rows_of(block, BLOCK_T)
        mean, rstd = load_statistics(mean_ptr, rstd_ptr, rows, T)
        located = locate(inputs, rows, rows < T)
        sum_g, sum_gx = tl.zeros([BLOCK_T, BLOCK_N], tl.float32), tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        for start in range(0, N, BLOCK_N):
            dy, h, _ = operands(inputs, located, start, N, BLOCK_N)
            g = dy * load_vector(w_ptr, start + cols, N)[None, :]
            sum_g += g
            sum_gx += g * (h - mean[:, None]) * rstd[:, None]
        mean_g, mean_gx = tl.sum(sum_g, axis=1) / N, tl.sum(sum_gx, axis=1) / N
        for start in range(0, N, BLOCK_N):
            dy, h, slope = operands(inputs, located, start, N, BLOCK_N)
            g = dy * load_vector(w_ptr, start + cols, N)[None, :]
            dh = _input_gradient(g, (h - mean[:, None]) * rstd[:, None], rstd, mean_g, mean_gx)
            _store_gradients(dx_ptr, dh_ptr, rows, T, start + cols, N, dh, slope)
        block += tl.num_programs(0)


@triton.jit
def _wide_bwd_dw(
    locate: tl.constexpr, operands: tl.constexpr, inputs, mean_ptr, rstd_ptr, dw_ptr, db_ptr, T,
    N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Partial sums of dw and db: a block of columns of every row, then the next block."""
    for start in range(0, N, BLOCK_N):
        dw, db = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
        block = tl.program_id(0)
        while block * BLOCK_T < T:
            rows = rows_of(block, BLOCK_T)
            mean, rstd = load_statistics(mean_ptr, rstd_ptr, rows, T)
            dy, h, _ = operands(inputs, locate(inputs, rows, rows < T), start, N, BLOCK_N)
            dw += tl.sum(dy * (h - mean[:, None]) * rstd[:, None], axis=0)
            db += tl.sum(dy, axis=0)
            block += tl.num_programs(0)
        _store_partials(dw_ptr, db_ptr, start + tl.arange(0, BLOCK_N), N, dw, db)


@triton.jit
def _sum_column(partials_ptr, total_ptr, P, N, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    rows = tl.arange(0, BLOCK_P)
    start = 0
    while start < P:
        mask = (start + rows < P)[:, None] & (cols < N)[None, :]
        total += tl.sum(load_tile(partials_ptr, (start + rows)[:, None] * N, cols, mask), axis=0)
        start += BLOCK_P
    tl.store(total_ptr + cols, total.to(total_ptr.dtype.element_ty), mask=cols < N)


@triton.jit(do_not_specialize=["P"])
def _sum_partials_kernel(
    dw_partials_ptr, db_partials_ptr, dw_ptr, db_ptr, P, N, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr
):
    if dw_ptr is not None:
        _sum_column(dw_partials_ptr, dw_ptr, P, N, BLOCK_P, BLOCK_N)
    if db_ptr is not None:
        _sum_column(db_partials_ptr, db_ptr, P, N, BLOCK_P, BLOCK_N)


# One configuration for every target: a few megabytes that are still in the L2. Not measured yet.
SUM = config(4, 1, BLOCK_P=64, BLOCK_N=32)


def new_partials(vector: Tensor, wanted: bool, count: int) -> Tensor | None:
    """[programs, N] fp32 for the gradient of `vector` [N], where it is wanted."""
    return torch.empty((count, len(vector)), dtype=torch.float32, device=vector.device) if wanted else None


def sum_partials(dw: Tensor | None, db: Tensor | None, weight: Tensor, bias: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of weight and bias, in their dtypes, from the programs' partial sums; None for None."""
    given = [partials for partials in (dw, db) if partials is not None]
    totals = [
        None if partials is None else torch.empty_like(vector)
        for partials, vector in zip((dw, db), (weight, bias), strict=True)
    ]
    if given:
        P, N = given[0].shape
        _sum_partials_kernel[(triton.cdiv(N, SUM.meta["BLOCK_N"]),)](dw, db, *totals, P, N, **SUM.meta)
    return tuple(totals)
