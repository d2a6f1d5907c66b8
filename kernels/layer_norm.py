"""LayerNorm behind a residual add, and behind the GELU of the language-model head.

h = x + r,  or  h = gelu(x) = x·Φ(x) with Φ through erf
μ = mean(h)    rstd = 1 / sqrt(mean((h − μ)²) + eps)    y = (h − μ)·rstd·w + b

Shapes  x, r, y: [T, N], rows at any stride   w, b: [N]   μ, rstd: [T] fp32
Twins   xlmr.eager.add_layer_norm, xlmr.eager.gelu_layer_norm

h is never rounded: sum, GELU and statistics are fp32 in registers, and the squares are those of h − μ, so rows far from
0 cost no accuracy. Every launch at one N has the same tile, warps and specialisation: a row's reduction has one order.

Prediction for an H200 (4.3 TB/s): bandwidth alone counts, 3 T·N elements with the residual and 2 without, each moved
once. At N = 768 and 1024 in bf16 and T ≥ 16,384 at least 90 % of a copy's rate: a program keeps four rows (16 KB of
loads) in flight in 64 registers a thread, so eight programs share an SM, and reads w and b once for its rows. N = 768
masks a quarter of the lanes, which moves no bytes. Below about 1,000 rows the launch (2–3 µs) is the cost.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Table, check, config, opaque, pick, require


def cost(T: int, N: int, itemsize: int, residual: bool = True) -> tuple[int, int]:
    """Floating-point operations and bytes moved of one forward; `residual`: add_layer_norm, else gelu_layer_norm."""
    flops = T * N * (9 if residual else 12)
    return flops, ((3 if residual else 2) * T * N + 2 * N) * itemsize + 2 * T * 4


# By the power of two that holds N; wider rows take the last entry in a loop. 32 elements a thread from 512 on.
# Not measured yet: chosen by compiling for sm_80, sm_90, sm_100 and gfx942 (no spills; at most 94 registers, 128 in
# fp32 or the loop).
MAX_BLOCK_N = 8192
CONFIGS: Table = {
    "portable": {
        128: config(4, 1, BLOCK_T=8, BLOCK_N=128),
        256: config(4, 1, BLOCK_T=8, BLOCK_N=256),
        512: config(4, 1, BLOCK_T=8, BLOCK_N=512),
        1024: config(4, 1, BLOCK_T=4, BLOCK_N=1024),
        2048: config(8, 1, BLOCK_T=4, BLOCK_N=2048),
        4096: config(8, 1, BLOCK_T=2, BLOCK_N=4096),
        8192: config(8, 1, BLOCK_T=1, BLOCK_N=8192),
    }
}


def bucket(N: int) -> int:
    """The key of CONFIGS[target] for rows of N elements: it depends on N alone."""
    return min(max(triton.next_power_of_2(N), 128), MAX_BLOCK_N)


@triton.jit
def _hidden(x_ptr, r_ptr, x_rows, r_rows, cols, mask):
    """One tile of h in fp32, 0 where masked: x + r, or gelu(x) where there is no r."""
    h = tl.load(x_ptr + x_rows + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if r_ptr is None:
        h = 0.5 * h * (1.0 + tl.math.erf(h * 0.7071067811865476))
    else:
        h += tl.load(r_ptr + r_rows + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    return h


@triton.jit
def _scale_and_store(y_ptr, w_ptr, b_ptr, y_rows, cols, mask, N: tl.constexpr, centred, rstd):
    """y = (h − μ)·rstd·w + b of one tile."""
    w = tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    y = centred * rstd[:, None] * w[None, :] + b[None, :]
    tl.store(y_ptr + y_rows + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def _layer_norm_fwd_kernel(
    x_ptr,
    r_ptr,  # None: GELU + LayerNorm
    w_ptr,
    b_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    stride_xm,
    stride_rm,
    T,
    eps,
    N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    exists = rows < T
    x_rows, r_rows, y_rows = (rows * stride_xm)[:, None], (rows * stride_rm)[:, None], (rows * N)[:, None]
    cols = tl.arange(0, BLOCK_N)
    if BLOCK_N >= N:  # the row stays in registers
        mask = exists[:, None] & (cols < N)[None, :]
        h = _hidden(x_ptr, r_ptr, x_rows, r_rows, cols, mask)
        mean = tl.sum(h, axis=1) / N
        centred = tl.where(mask, h - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / N + eps)
        _scale_and_store(y_ptr, w_ptr, b_ptr, y_rows, cols, mask, N, centred, rstd)
    else:  # three passes over the row
        total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        for start in range(0, N, BLOCK_N):
            mask = exists[:, None] & (start + cols < N)[None, :]
            total += _hidden(x_ptr, r_ptr, x_rows, r_rows, start + cols, mask)
        mean = tl.sum(total, axis=1) / N
        total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        for start in range(0, N, BLOCK_N):
            mask = exists[:, None] & (start + cols < N)[None, :]
            h = _hidden(x_ptr, r_ptr, x_rows, r_rows, start + cols, mask)
            centred = tl.where(mask, h - mean[:, None], 0.0)
            total += centred * centred
        rstd = tl.rsqrt(tl.sum(total, axis=1) / N + eps)
        for start in range(0, N, BLOCK_N):
            mask = exists[:, None] & (start + cols < N)[None, :]
            h = _hidden(x_ptr, r_ptr, x_rows, r_rows, start + cols, mask)
            _scale_and_store(y_ptr, w_ptr, b_ptr, y_rows, start + cols, mask, N, h - mean[:, None], rstd)
    tl.store(mean_ptr + rows, mean, mask=exists)
    tl.store(rstd_ptr + rows, rstd, mask=exists)


@opaque
def layer_norm_fwd(
    operation: str, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(y [T, N], mean [T], rstd [T]) of LayerNorm(x + residual), or of LayerNorm(gelu(x)) where residual is None."""
    check(operation, x=x, residual=residual, weight=weight, bias=bias)
    require(x.dim() == 2 and x.shape[1] > 0, f"{operation}: x is {tuple(x.shape)}, expected [T, N] with N ≥ 1")
    T, N = x.shape
    for name, rows in (("x", x), ("residual", residual)):
        if rows is not None:
            require(rows.shape == x.shape, f"{operation}: {name} is {tuple(rows.shape)}, x is {tuple(x.shape)}")
            require(N == 1 or rows.stride(1) == 1, f"{operation}: the last dimension of {name} must be contiguous")
    for name, vector in (("weight", weight), ("bias", bias)):
        fits = vector.shape == (N,) and vector.is_contiguous()
        require(fits, f"{operation}: {name} is {tuple(vector.shape)}, expected a contiguous [{N}]")
    y = torch.empty((T, N), dtype=x.dtype, device=x.device)
    mean, rstd = torch.empty((2, T), dtype=torch.float32, device=x.device)
    if T:
        tuned = pick(CONFIGS, x.device, bucket(N)).meta
        strides = [N if rows is None or T == 1 else rows.stride(0) for rows in (x, residual)]  # one row: any stride
        _layer_norm_fwd_kernel[(triton.cdiv(T, tuned["BLOCK_T"]),)](
            x, residual, weight, bias, y, mean, rstd, *strides, T, eps, N=N, **tuned
        )
    return y, mean, rstd


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout_p: float = 0.0
) -> Tensor:
    """LayerNorm(x + residual); x and residual [T, N], weight and bias [N] → [T, N]. RuntimeError for dropout_p > 0."""
    if dropout_p:
        raise RuntimeError(f"add_layer_norm: the kernel has no dropout (dropout_p={dropout_p}); use backend='eager'")
    return layer_norm_fwd("add_layer_norm", x, residual, weight, bias, eps)[0]


def gelu_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm(gelu(x)) with the exact GELU; x [T, N] → [T, N]. The transform of the language-model head."""
    return layer_norm_fwd("gelu_layer_norm", x, None, weight, bias, eps)[0]
