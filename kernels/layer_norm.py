"""LayerNorm behind a residual add, and behind the GELU of the language-model head.

h = x·m + r,  or  h = gelu(x) = x·Φ(x), the exact GELU;  m is dropout's 0 or 1 / (1 − p), or 1 without dropout
μ = mean(h)    rstd = 1 / sqrt(mean((h − μ)²) + eps)    x̂ = (h − μ)·rstd    y = x̂·w + b

Backward, with g = dy·w:   dh = rstd·(g − mean(g) − x̂·mean(g·x̂))    dw = Σ dy·x̂    db = Σ dy
                           dr = dh    dx = dh·m,  or  dx = dh·(Φ(x) + x·φ(x))

Shapes  x, r, y: [T, N], rows at any stride   w, b: [N]   μ, rstd: [T] fp32
        each of x, r, w, b in its own dtype; y in the promoted one
Twins   xlmr.eager.add_layer_norm, xlmr.eager.gelu_layer_norm

h is never rounded: sum, GELU and statistics are fp32 in registers, and the squares are those of h − μ, so rows far from
0 cost no accuracy. Every launch at one N has the same tile, warps and specialisation: a row's reduction has one order.

For backward x, r, μ and rstd are kept and h, m and Φ computed again: to keep h would cost forward as many bytes as
reading r saves backward, round h, and hold one tensor more, for r is the input of the linear layers before and is kept
anyway. Without gradients μ and rstd are not even written.

Prediction for an H200 (4.3 TB/s): bandwidth alone counts, 3 T·N elements with the residual and 2 without, each moved
once. At N = 768 and 1024 in bf16 and T ≥ 16,384 at least 90 % of a copy's rate: a program keeps four rows (16 KB of
loads) in flight in 64 registers a thread (48 with the GELU), so eight programs share an SM, and reads w and b
once for its rows. N = 768 masks a quarter of the lanes, which moves no bytes. Below about 1,000 rows the launch
(2–3 µs) is the cost.
Backward moves 4 T·N (dy, x, r → dh, which is dx and dr), 5 T·N with dropout or two dtypes, 3 T·N with the GELU, where
PyTorch's moves 5 T·N, as it reads h and dy again for dw and db. At least 80 % of a copy's rate with four programs an
SM, two rows of each in flight, in 80 registers (128 with the GELU): from about 8,000 rows on faster than PyTorch's. The
partial sums stay in the L2; adding them up takes about 5 µs.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._dropout import draw_seed, keep_factors, keep_levels
from ._gelu import gelu_slope_tile, gelu_tile
from ._launch import (
    Config,
    Kind,
    Launch,
    Table,
    check_kinds,
    config,
    kinds,
    opaque,
    pick,
    refuse_gradients,
    remembered,
    wants_gradients,
)
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


def cost(
    T: int, N: int, itemsize: int, residual: bool = True, backward: bool = False, dropout: bool = False
) -> tuple[int, int]:
    """Floating-point operations and the least bytes moved by one forward, without gradients, or one backward, of all
    gradients and but for the partial sums; `residual`: add_layer_norm, else gelu_layer_norm."""
    if backward:
        matrices = (5 if dropout else 4) if residual else 3
        return T * N * (19 if residual else 28), (matrices * T * N + 3 * N) * itemsize + 2 * T * 4
    return T * N * (9 if residual else 12), ((3 if residual else 2) * T * N + 2 * N) * itemsize


def activation_bytes(N: int, itemsize: int, residual: bool = True) -> int:
    """Bytes a token kept for backward: x, mean and rstd, and the residual, which others keep too."""
    return (2 if residual else 1) * N * itemsize + 2 * 4


# By the power of two that holds N; "wide" is a loop over blocks. 32 elements a thread from 512 on, backward 16.
# Not measured yet: chosen by compiling for sm_80, sm_90, sm_100 and gfx942 (no spills; at most 96 registers up to
# N = 8192).
CONFIGS: Table = {
    "portable": {
        128: config(4, 1, BLOCK_T=8, BLOCK_N=128),
        256: config(4, 1, BLOCK_T=8, BLOCK_N=256),
        512: config(4, 1, BLOCK_T=8, BLOCK_N=512),
        1024: config(4, 1, BLOCK_T=4, BLOCK_N=1024),
        2048: config(8, 1, BLOCK_T=4, BLOCK_N=2048),
        4096: config(8, 1, BLOCK_T=2, BLOCK_N=4096),
        "wide": config(8, 1, BLOCK_T=1, BLOCK_N=4096),
    }
}
BACKWARD_CONFIGS: Table = {
    "portable": {
        128: config(4, 1, BLOCK_T=8, BLOCK_N=128),
        256: config(4, 1, BLOCK_T=8, BLOCK_N=256),
        512: config(4, 1, BLOCK_T=4, BLOCK_N=512),
        1024: config(4, 1, BLOCK_T=2, BLOCK_N=1024),
        2048: config(8, 1, BLOCK_T=2, BLOCK_N=2048),
        4096: config(8, 1, BLOCK_T=1, BLOCK_N=4096),
        "wide": config(8, 1, BLOCK_T=1, BLOCK_N=1024),
    }
}


@triton.jit
def _hidden(inputs, rows, start, mask, BLOCK_N: tl.constexpr):
    """h and ∂h/∂x of the columns from `start` on, fp32 [R, BLOCK_N]; h is 0 where masked."""
    x_ptr, r_ptr, seed_ptr, levels, stride_xm, stride_rm = inputs
    cols = start + tl.arange(0, BLOCK_N)
    h = load_tile(x_ptr, (rows * stride_xm)[:, None], cols, mask)
    if r_ptr is None:
        slope = gelu_slope_tile(h, x_ptr.dtype.element_ty == tl.float32)
        h = gelu_tile(h, x_ptr.dtype.element_ty == tl.float32)
    else:
        slope = keep_factors(seed_ptr, rows, start, levels, BLOCK_N)
        h = h * slope + load_tile(r_ptr, (rows * stride_rm)[:, None], cols, mask)
    return h, slope


@triton.jit(do_not_specialize=["T", "levels"])
def _layer_norm_fwd_kernel(
    x_ptr,
    r_ptr,  # None: GELU + LayerNorm
    w_ptr, b_ptr, y_ptr,
    mean_ptr, rstd_ptr,  # None: no backward will follow
    seed_ptr, levels,  # None: no dropout
    stride_xm, stride_rm, T, eps,
    N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    inputs = (x_ptr, r_ptr, seed_ptr, levels, stride_xm, stride_rm)
    rows = rows_of(tl.program_id(0), BLOCK_T)
    exists = rows < T
    y_rows = (rows * N)[:, None]
    cols = tl.arange(0, BLOCK_N)
    if BLOCK_N >= N:  # the row stays in registers
        mask = exists[:, None] & (cols < N)[None, :]
        h, _ = _hidden(inputs, rows, 0, mask, BLOCK_N)
        mean = tl.sum(h, axis=1) / N
        centred = tl.where(mask, h - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / N + eps)
        store_affine(y_ptr, w_ptr, b_ptr, y_rows, cols, mask, N, centred * rstd[:, None], 1.0)
    else:  # three passes over the row
        total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        for start in range(0, N, BLOCK_N):
            h, _ = _hidden(inputs, rows, start, exists[:, None] & (start + cols < N)[None, :], BLOCK_N)
            total += h
        mean = tl.sum(total, axis=1) / N
        total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        for start in range(0, N, BLOCK_N):
            mask = exists[:, None] & (start + cols < N)[None, :]
            h, _ = _hidden(inputs, rows, start, mask, BLOCK_N)
            centred = tl.where(mask, h - mean[:, None], 0.0)
            total += centred * centred
        rstd = tl.rsqrt(tl.sum(total, axis=1) / N + eps)
        for start in range(0, N, BLOCK_N):
            mask = exists[:, None] & (start + cols < N)[None, :]
            h, _ = _hidden(inputs, rows, start, mask, BLOCK_N)
            normal = (h - mean[:, None]) * rstd[:, None]
            store_affine(y_ptr, w_ptr, b_ptr, y_rows, start + cols, mask, N, normal, 1.0)
    store_statistics(mean_ptr, rstd_ptr, rows, exists, mean, rstd)


@triton.jit
def _locate(inputs, rows, exists):
    """For norm_bwd."""
    return rows, exists


@triton.jit
def _operands(inputs, located, start, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """For norm_bwd: dy, h and ∂h/∂x of one tile."""
    dy_ptr, stride_dym, of_hidden = inputs
    rows, exists = located
    cols = start + tl.arange(0, BLOCK_N)
    mask = exists[:, None] & (cols < N)[None, :]
    h, slope = _hidden(of_hidden, rows, start, mask, BLOCK_N)
    return load_tile(dy_ptr, (rows * stride_dym)[:, None], cols, mask), h, slope


@triton.jit(do_not_specialize=["T", "levels"])
def _layer_norm_bwd_kernel(
    dy_ptr, x_ptr,
    r_ptr,  # None: GELU + LayerNorm
    w_ptr, mean_ptr, rstd_ptr,
    dx_ptr, dr_ptr,  # None, as the next two: not wanted
    dw_ptr, db_ptr,  # [programs, N]
    seed_ptr, levels,  # None: no dropout
    stride_dym, stride_xm, stride_rm, T,
    N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    inputs = (dy_ptr, stride_dym, (x_ptr, r_ptr, seed_ptr, levels, stride_xm, stride_rm))
    norm_bwd(
        _locate, _operands, inputs, w_ptr, mean_ptr, rstd_ptr, dx_ptr, dr_ptr, dw_ptr, db_ptr, T, N, BLOCK_T, BLOCK_N
    )


@opaque
def layer_norm_fwd(
    operation: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    seed: Tensor | None = None,
    levels: int = 0,
    statistics: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y [T, N], mean [T], rstd [T]) of LayerNorm(x + residual), or of LayerNorm(gelu(x)) where residual is None; no
    mean and rstd without `statistics`. With a seed `levels` of 65,536 of x's elements survive."""
    plan = _plan(operation, *kinds(x, residual, weight, bias))
    refuse_gradients(operation, x, residual, weight, bias)
    T, N = x.shape
    y = torch.empty((T, N), dtype=plan.dtype, device=x.device)
    mean, rstd = torch.empty((2, T), dtype=torch.float32, device=x.device) if statistics else (None, None)
    if T:
        launch = _launch(plan, pick(CONFIGS, x.device, plan.bucket), statistics, seed is not None)
        launch(x, residual, weight, bias, y, mean, rstd, seed, levels, *plan.strides, T, float(eps))
    return y, mean, rstd


@dataclass(frozen=True, eq=False)
class _Plan:
    """What the kinds of x, residual, weight and bias decide."""

    T: int
    N: int
    dtype: torch.dtype  # of y
    strides: tuple[int, int]  # of the rows of x and residual
    bucket: int | str


@remembered
def _plan(operation: str, x: Kind, residual: Kind | None, weight: Kind, bias: Kind) -> _Plan:
    check_kinds(operation, mixed=True, x=x, residual=residual, weight=weight, bias=bias)
    if not (len(x.shape) == 2 and x.shape[1] > 0):
        raise ValueError(f"{operation}: x is {tuple(x.shape)}, expected [T, N] with N ≥ 1")
    T, N = x.shape
    for name, rows in (("x", x), ("residual", residual)):
        if rows is not None:
            if rows.shape != x.shape:
                raise ValueError(f"{operation}: {name} is {tuple(rows.shape)}, x is {tuple(x.shape)}")
            if not (N == 1 or rows.stride[1] == 1):
                raise ValueError(f"{operation}: the last dimension of {name} must be contiguous")
    check_affine(operation, weight, bias, N)
    given = [x.dtype, weight.dtype] if residual is None else [x.dtype, weight.dtype, residual.dtype]
    strides = [0 if rows is None else N if T == 1 else rows.stride[0] for rows in (x, residual)]
    return _Plan(T, N, functools.reduce(torch.promote_types, given), (strides[0], strides[1]), bucket(N))


@remembered
def _launch(plan: _Plan, tuned: Config, statistics: bool, dropout: bool) -> Launch:
    """`statistics` and `dropout`, which tensors are None, choose another compiled kernel."""
    return Launch(_layer_norm_fwd_kernel, triton.cdiv(plan.T, tuned.meta["BLOCK_T"]), N=plan.N, **tuned.meta)


@opaque
def layer_norm_bwd(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None = None,
    levels: int = 0,
    wanted: Sequence[bool] = (True, True, True, True),
) -> tuple[Tensor | None, ...]:
    """The gradients of x, residual, weight and bias, each in its tensor's dtype, None where it is not `wanted`."""
    T, N = x.shape
    dy, (of_x, of_residual, of_weight, of_bias) = contiguous_rows(dy), wanted
    same = residual is not None and seed is None and residual.dtype == x.dtype  # dx and dresidual are one tensor
    dx = torch.empty((T, N), dtype=x.dtype, device=x.device) if of_x or (of_residual and same) else None
    dresidual = torch.empty((T, N), dtype=residual.dtype, device=x.device) if of_residual and not same else None
    tuned = pick(BACKWARD_CONFIGS, x.device, bucket(N)).meta
    P = programs(T, x.device)
    dw, db = new_partials(weight, of_weight, P), new_partials(bias, of_bias, P)
    tensors = dy, x, residual, weight, mean, rstd, dx, dresidual, dw, db, seed
    strides = map(row_stride, (dy, x, residual))
    _layer_norm_bwd_kernel[(P,)](*tensors, levels, *strides, T, N=N, **tuned)
    return dx if of_x else None, dx if of_residual and same else dresidual, *sum_partials(dw, db, weight, bias)


class LayerNorm(torch.autograd.Function):
    """layer_norm_fwd with its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        operation: str,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        seed: Tensor | None,
        levels: int,
    ) -> Tensor:
        y, mean, rstd = layer_norm_fwd(operation, x, residual, weight, bias, eps, seed, levels)
        ctx.save_for_backward(x, residual, weight, bias, mean, rstd, seed)
        ctx.levels = levels
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gradients = layer_norm_bwd(dy, *ctx.saved_tensors, ctx.levels, ctx.needs_input_grad[1:5])
        return None, *gradients, None, None, None


def _layer_norm(
    operation: str, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dropout_p: float = 0.0
) -> Tensor:
    levels, seed = (keep_levels(dropout_p), draw_seed(x.device)) if dropout_p else (0, None)
    if wants_gradients(x, residual, weight, bias):
        return LayerNorm.apply(operation, x, residual, weight, bias, eps, seed, levels)
    return layer_norm_fwd(operation, x, residual, weight, bias, eps, seed, levels, statistics=False)[0]


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout_p: float = 0.0
) -> Tensor:
    """LayerNorm(dropout(x) + residual); x and residual [T, N], weight and bias [N] → [T, N]. The mask of dropout is
    drawn from the device's generator. ValueError for a dropout_p outside [0, 1]."""
    return _layer_norm("add_layer_norm", x, residual, weight, bias, eps, dropout_p)


def gelu_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm(gelu(x)) with the exact GELU; x [T, N] → [T, N]. The transform of the language-model head."""
    return _layer_norm("gelu_layer_norm", x, None, weight, bias, eps)
