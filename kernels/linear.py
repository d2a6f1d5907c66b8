"""Linear layers.   y = x·wᵀ + b   or   y = gelu(x·wᵀ + b)   or   (q, k, v) = (x·wqᵀ + bq, x·wkᵀ + bk, x·wvᵀ + bv)

Shapes  x: [T, K], rows at any stride   w: [N, K], as in torch.nn.Linear   b: [N] or None   y: [T, N]
        q, k, v: [T, N], views of one buffer [T, 3, N]
Twins   xlmr.eager.linear, xlmr.eager.linear_act, xlmr.eager.qkv_projection

Backward, with z = x·wᵀ + b recomputed and dz = dy ∘ (Φ(z) + z·φ(z)) behind GELU, else dz = dy:
        dx = Σ dz·w over the parts   dw = dzᵀ·x   db = column sums of dz

Products are summed in fp32, BLOCK_K at a time in the order of K; bias and the exact GELU act on that sum, which is
rounded once. The projection's three weights share a launch: each column tile reads one of them.

A row's bits depend on that row alone. K is never split, BLOCK_K is one constant for each dtype, and each target stays
with one tensor-core instruction whatever the tile: BLOCK_M ≥ 64 on sm_90 and sm_100, below which the compiler leaves
wgmma and tcgen05.mma for mma.sync; tiles of at least 32×32 on gfx942, below which it takes an MFMA of another depth.
What varies with the load (tiles, warps, stages, how a tile is loaded) does not enter the order of a sum. Backward has
no such promise, only that it gives the same bits run to run: dw is split along T, its parts summed in one order.

Kept for backward: x alone, K elements a row, which the layer before keeps as well. z is computed again: a sixth of the
feed-forward's products (11 % of a training step's) for 4 N elements a row that no layer has to hold.

Prediction for an H200 (nothing is measured yet), bf16, where 790 TFLOP/s can be had: from T = 16,384 on tensor cores
are the roof. wgmma reads a 128×256 tile from shared memory no slower than it computes, and the next tile's first loads
fly during an epilogue; the epilogue itself is exposed. Counted in cycles at K = 768 (12,300 of wgmma a tile): 1,500 to
store, 3,300 for the 13 instructions an element of a 16-bit GELU (7,900 with erf's 31). Hence 570–640 TFLOP/s at
K ≤ 1024, 460–530 with GELU, 640–700 at K ≥ 3072. One text (T ≤ 64) streams the weights through 48 to 192 programs and
waits for latency: 2–6 µs a launch.
Backward goes through pointers, one tile a program (in 16 bits wgmma reads transposed operands as they lie): 400–500
TFLOP/s for dx and dw.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from ._gelu import gelu_slope_tile, gelu_tile
from ._launch import (
    Config,
    Kind,
    Launch,
    Table,
    autocast,
    check_kinds,
    config,
    input_precision,
    kinds,
    opaque,
    pick,
    processors,
    refuse_gradients,
    remembered,
    target,
    wants_gradients,
)
from ._loops import bound
from ._products import BLOCK_K, of_part, product_dw, product_dx, split_rows, sum_splits, vectorised


def cost(T: int, N: int, K: int, itemsize: int, backward: bool = False, gelu: bool = False) -> tuple[int, int]:
    """(flops, bytes): x, w, b, y or their gradients through memory once. The projection has 3 N columns. Backward of
    all gradients, behind `gelu` with z computed and moved again."""
    product, x, w, y = 2 * T * N * K, T * K, N * K, T * N
    if not backward:
        return product, (x + w + N + y) * itemsize
    again = x + w + N + 3 * y if gelu else 0
    return (3 if gelu else 2) * product, (2 * x + 2 * w + N + y + again) * itemsize


def activation_bytes(K: int, itemsize: int) -> int:
    """Bytes a token kept for backward: x, with or without GELU."""
    return K * itemsize


TEXT_ROWS = 64  # at most so many rows: "text", one tile of rows
OUTPUTS = {"small": 1 << 20, "medium": 1 << 23}  # at most so many elements of y; beyond: "large"

# (bytes of an element, load). "unaligned": elements come one by one, through registers. Not measured yet: chosen by
# compiling for each target (none spills; at most 216 registers and 176 KiB of shared memory).
CONFIGS: Table = {
    "portable": {
        (itemsize, load): config(8 if load == "unaligned" else 4, 3, BLOCK_M=64, BLOCK_N=64)
        for itemsize in (2, 4)
        for load in ("unaligned", "text", "small", "medium", "large")
    },
    "sm_80": {
        (2, "unaligned"): config(8, 2, BLOCK_M=64, BLOCK_N=64),
        (2, "text"): config(4, 6, BLOCK_M=64, BLOCK_N=32),
        (2, "small"): config(4, 4, BLOCK_M=64, BLOCK_N=64),
        (2, "medium"): config(8, 3, BLOCK_M=128, BLOCK_N=128),
        (2, "large"): config(8, 3, BLOCK_M=128, BLOCK_N=128),
        (4, "unaligned"): config(8, 3, BLOCK_M=64, BLOCK_N=64),
        (4, "text"): config(4, 6, BLOCK_M=64, BLOCK_N=32),
        (4, "small"): config(4, 4, BLOCK_M=64, BLOCK_N=64),
        (4, "medium"): config(8, 4, BLOCK_M=128, BLOCK_N=64),
        (4, "large"): config(8, 4, BLOCK_M=128, BLOCK_N=64),
    },
    "sm_90": {
        (2, "unaligned"): config(8, 2, BLOCK_M=64, BLOCK_N=64),
        (2, "text"): config(4, 8, BLOCK_M=64, BLOCK_N=16),
        (2, "small"): config(4, 4, BLOCK_M=64, BLOCK_N=128),
        (2, "medium"): config(8, 4, BLOCK_M=128, BLOCK_N=128),
        (2, "large"): config(8, 3, BLOCK_M=128, BLOCK_N=256),
        (4, "unaligned"): config(8, 3, BLOCK_M=64, BLOCK_N=64),
        (4, "text"): config(4, 8, BLOCK_M=64, BLOCK_N=16),
        (4, "small"): config(4, 4, BLOCK_M=64, BLOCK_N=64),
        (4, "medium"): config(8, 3, BLOCK_M=128, BLOCK_N=128),
        (4, "large"): config(8, 3, BLOCK_M=128, BLOCK_N=128),
    },
    "sm_100": {
        (2, "unaligned"): config(8, 2, BLOCK_M=64, BLOCK_N=64),
        (2, "text"): config(4, 8, BLOCK_M=64, BLOCK_N=32),
        (2, "small"): config(4, 4, BLOCK_M=64, BLOCK_N=128),
        (2, "medium"): config(8, 4, BLOCK_M=128, BLOCK_N=128),
        (2, "large"): config(8, 3, BLOCK_M=128, BLOCK_N=256),
        (4, "unaligned"): config(8, 3, BLOCK_M=64, BLOCK_N=64),
        (4, "text"): config(8, 6, BLOCK_M=64, BLOCK_N=32),
        (4, "small"): config(4, 4, BLOCK_M=64, BLOCK_N=64),
        (4, "medium"): config(8, 3, BLOCK_M=128, BLOCK_N=128),
        (4, "large"): config(8, 3, BLOCK_M=128, BLOCK_N=128),
    },
    "gfx942": {
        (2, "unaligned"): config(4, 2, BLOCK_M=64, BLOCK_N=64),
        (2, "text"): config(4, 2, BLOCK_M=64, BLOCK_N=32),
        (2, "small"): config(4, 2, BLOCK_M=64, BLOCK_N=64),
        (2, "medium"): config(4, 2, BLOCK_M=128, BLOCK_N=128),
        (2, "large"): config(8, 2, BLOCK_M=256, BLOCK_N=128),
        (4, "unaligned"): config(4, 2, BLOCK_M=64, BLOCK_N=64),
        (4, "text"): config(4, 2, BLOCK_M=64, BLOCK_N=32),
        (4, "small"): config(4, 2, BLOCK_M=64, BLOCK_N=64),
        (4, "medium"): config(4, 2, BLOCK_M=128, BLOCK_N=128),
        (4, "large"): config(8, 2, BLOCK_M=128, BLOCK_N=128),
    },
}
# dz and the column sums stream: 16 rows of 128 columns a step on every target, not measured yet.
ROW_SUMS = config(4, 1, BLOCK_M=16, BLOCK_N=128)
WAVES_OF_SUMS = 4  # their programs for each processor
# GPUs that copy whole tiles by themselves (TMA). To describe a layer's tensors takes the host about 80 µs; up to
# HOST_BOUND_ROWS the GPU, which they might save a tenth of its products, waits for the host. Estimated, not measured.
DESCRIPTOR_TARGETS = ("sm_90", "sm_100")
HOST_BOUND_ROWS = 2048
WAVES = 2  # more tiles than this for each processor: with descriptors the grid is persistent, one program a processor
GROUP_M = 8  # row tiles that run down a column tile before the next one: their rows stay in L2
EPILOGUE_N = tl.constexpr(128)  # columns finished at a time: the fp32 temporaries of 256 would spill


def bucket(T: int, N: int, itemsize: int, aligned: bool = True) -> tuple[int, str]:
    """The key of CONFIGS[target] for a y of [T, N]; `aligned`: its operands come in vectors, or by descriptor."""
    if not aligned:
        return itemsize, "unaligned"
    if T <= TEXT_ROWS:
        return itemsize, "text"
    return itemsize, next((load for load, most in OUTPUTS.items() if most >= T * N), "large")


@triton.jit
def _product(
    x_ptr, w_ptr, stride_xm, stride_wn, row, col, T,
    N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x[row : row + BLOCK_M] · w[col : col + BLOCK_N]ᵀ in fp32; zeros beyond T, N and K."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if not DESCRIPTORS:
        m, n, cols = row + tl.arange(0, BLOCK_M)[:, None], col + tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_K)
        x_ptrs = x_ptr + m.to(tl.int64) * stride_xm + cols[None, :]
        w_ptrs = w_ptr + n.to(tl.int64) * stride_wn + cols[None, :]
    for k in range(0, K, BLOCK_K):
        if DESCRIPTORS:
            x, w = x_ptr.load([row, k]), w_ptr.load([col, k])
        else:
            x_mask, w_mask = m < T, n < N
            if K % BLOCK_K != 0:
                x_mask, w_mask = x_mask & (k + cols < K)[None, :], w_mask & (k + cols < K)[None, :]
            x, w = tl.load(x_ptrs + k, mask=x_mask, other=0.0), tl.load(w_ptrs + k, mask=w_mask, other=0.0)
        acc = tl.dot(x, w.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _finish(
    acc, b_ptr, y_ptr, row, part, col, T,
    N: tl.constexpr, PARTS: tl.constexpr, GELU: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Bias and GELU on a tile of sums, stored as y[row :, part, col :]."""
    cols = col + tl.arange(0, BLOCK_N)
    if b_ptr is not None:
        acc += tl.load(b_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if GELU:
        acc = gelu_tile(acc, (y_ptr.dtype if DESCRIPTORS else y_ptr.dtype.element_ty) == tl.float32)
    if DESCRIPTORS:
        y_ptr.store([row, part, col], acc.to(y_ptr.dtype).reshape(BLOCK_M, 1, BLOCK_N))
    else:
        rows = (row + tl.arange(0, BLOCK_M))[:, None]
        y_ptrs = y_ptr + rows.to(tl.int64) * (PARTS * N) + (part * N + cols)[None, :]
        tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(rows < T) & (cols < N)[None, :])


@triton.jit
def _tile(
    tile, x_ptr, wq_ptr, wk_ptr, wv_ptr, bq_ptr, bk_ptr, bv_ptr, y_ptr, stride_xm, stride_wn, T,
    N: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, GELU: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Computes and stores the tile of that number."""
    part_tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    group_tiles: tl.constexpr = GROUP_M * PARTS * part_tiles
    first = tile // group_tiles * GROUP_M
    height = tl.minimum(tl.cdiv(T, BLOCK_M) - first, GROUP_M)
    row = (first + tile % group_tiles % height) * BLOCK_M
    column_tile = tile % group_tiles // height
    part, col = column_tile // part_tiles, column_tile % part_tiles * BLOCK_N
    w_ptr, b_ptr = of_part(part, wq_ptr, wk_ptr, wv_ptr, PARTS), bq_ptr
    if bq_ptr is not None:
        b_ptr = of_part(part, bq_ptr, bk_ptr, bv_ptr, PARTS)
    acc = _product(
        x_ptr, w_ptr, stride_xm, stride_wn, row, col, T, N, K, PRECISION, DESCRIPTORS, BLOCK_M, BLOCK_N, BLOCK_K
    )
    if BLOCK_N > EPILOGUE_N:
        left, right = acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
        _finish(left, b_ptr, y_ptr, row, part, col, T, N, PARTS, GELU, DESCRIPTORS, BLOCK_M, BLOCK_N // 2)
        col += BLOCK_N // 2
        _finish(right, b_ptr, y_ptr, row, part, col, T, N, PARTS, GELU, DESCRIPTORS, BLOCK_M, BLOCK_N // 2)
    else:
        _finish(acc, b_ptr, y_ptr, row, part, col, T, N, PARTS, GELU, DESCRIPTORS, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["T"])
def _linear_fwd_kernel(
    x_ptr, wq_ptr, wk_ptr, wv_ptr,  # DESCRIPTORS: tensor descriptors, as is y_ptr
    bq_ptr, bk_ptr, bv_ptr,  # None: no bias
    y_ptr, stride_xm, stride_wn, T,
    N: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, GELU: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    if DESCRIPTORS:
        tiles = tl.cdiv(T, BLOCK_M) * (tl.cdiv(N, BLOCK_N) * PARTS)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _tile(
                tile, x_ptr, wq_ptr, wk_ptr, wv_ptr, bq_ptr, bk_ptr, bv_ptr, y_ptr, stride_xm, stride_wn, T,
                N, K, PARTS, GELU, PRECISION, DESCRIPTORS, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
            )  # fmt: skip
    else:
        _tile(
            tl.program_id(0), x_ptr, wq_ptr, wk_ptr, wv_ptr, bq_ptr, bk_ptr, bv_ptr, y_ptr, stride_xm, stride_wn, T,
            N, K, PARTS, GELU, PRECISION, DESCRIPTORS, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "length"])
def _linear_dz_kernel(
    dq_ptr, dk_ptr, dv_ptr, z_ptr, dz_ptr, db_ptr, stride_dm, stride_dn, T, length,
    N: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Over `length` rows: behind GELU dz [T, N] from dy and z; and the column sums db [splits, parts, N]."""
    part, split = tl.program_id(1), tl.program_id(2)
    d_ptr = of_part(part, dq_ptr, dk_ptr, dv_ptr, PARTS)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    for step in range(0, bound(length), BLOCK_M):
        rows = split.to(tl.int64) * length + step + tl.arange(0, BLOCK_M)
        mask = (rows < T)[:, None] & (cols < N)[None, :]
        d = tl.load(d_ptr + rows[:, None] * stride_dm + cols[None, :] * stride_dn, mask=mask, other=0.0).to(tl.float32)
        if z_ptr is not None:
            z = tl.load(z_ptr + rows[:, None] * N + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            d *= gelu_slope_tile(z, z_ptr.dtype.element_ty == tl.float32)
            tl.store(dz_ptr + rows[:, None] * N + cols[None, :], d.to(dz_ptr.dtype.element_ty), mask=mask)
        total += tl.sum(d, axis=0)
    if db_ptr is not None:
        tl.store(db_ptr + (split * PARTS + part) * N + cols, total, mask=cols < N)


@opaque
def linear_fwd(
    operation: str,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    gelu: bool = False,
    tuned: Config | None = None,
    descriptors: bool | None = None,
) -> Tensor:
    """y [T, P, N] of x [T, K], P weights [N, K] (1 or 3) and as many biases [N], all or none of them None.

    `tuned` and `descriptors` overrule the table's configuration and the choice between descriptors and pointers.
    """
    plan = _plan(operation, descriptors, len(weights), *kinds(x, *weights, *biases))
    refuse_gradients(operation, x, *weights, *biases)
    y = torch.empty((plan.T, plan.parts, plan.N), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    if tuned is None:
        tuned = pick(CONFIGS, x.device, plan.bucket)
    x_arg, w_args, y_arg = x, weights, y
    if plan.descriptors:
        block_m, block_n, block_k = tuned.meta["BLOCK_M"], tuned.meta["BLOCK_N"], BLOCK_K[x.element_size()]
        x_arg = TensorDescriptor.from_tensor(x, [block_m, block_k])
        w_args = [TensorDescriptor.from_tensor(w, [block_n, block_k]) for w in weights]
        y_arg = TensorDescriptor.from_tensor(y, [block_m, 1, min(block_n, EPILOGUE_N.value)])
    absent = [None] * (3 - plan.parts)
    launch = _launch(plan, gelu, tuned, input_precision(x.dtype, x.device))
    launch(x_arg, *w_args, *absent, *biases, *absent, y_arg, *plan.strides, plan.T)
    return y


@dataclass(frozen=True, eq=False)
class _Plan:
    """What the kinds of the operands decide."""

    T: int
    N: int
    K: int
    parts: int
    strides: tuple[int, int]  # of the rows of x and of the weights; a single row may have any
    device: torch.device
    itemsize: int
    descriptors: bool
    bucket: tuple[int, str]


@remembered
def _plan(operation: str, descriptors: bool | None, parts: int, x: Kind, *operands: Kind | None) -> _Plan:
    weights: Sequence[Any] = operands[:parts]
    _check_arguments(operation, x, weights, operands[parts:])
    (T, K), (N, _), itemsize = x.shape, weights[0].shape, x.itemsize
    if descriptors is None:
        makes = target(x.device) in DESCRIPTOR_TARGETS and T > HOST_BOUND_ROWS and not torch.compiler.is_compiling()
        descriptors = makes and _describable(N, x, *weights)
    aligned = descriptors or (N % 16 == 0 and vectorised(x, *weights))  # y too
    strides = K if T == 1 else x.stride[0], K if N == 1 else weights[0].stride[0]
    return _Plan(T, N, K, parts, strides, x.device, itemsize, descriptors, bucket(T, parts * N, itemsize, aligned))


@remembered
def _launch(plan: _Plan, gelu: bool, tuned: Config, precision: str) -> Launch:
    tiles = triton.cdiv(plan.T, tuned.meta["BLOCK_M"]) * triton.cdiv(plan.N, tuned.meta["BLOCK_N"]) * plan.parts
    persistent = plan.descriptors and tiles > WAVES * processors(plan.device)
    return Launch(
        _linear_fwd_kernel, processors(plan.device) if persistent else tiles,
        N=plan.N, K=plan.K, PARTS=plan.parts, GELU=gelu, PRECISION=precision, DESCRIPTORS=plan.descriptors,
        BLOCK_K=BLOCK_K[plan.itemsize], GROUP_M=GROUP_M, **tuned.meta,
    )  # fmt: skip


@opaque
def linear_bwd(
    dys: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    gelu: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of x, of the weights and of the biases, each in its tensor's dtype; None where not `wanted`. `dys`:
    those of the outputs, [T, N] each, at any strides."""
    parts = len(weights)
    of_x, of_weights, of_biases = wanted[0], wanted[1 : 1 + parts], wanted[1 + parts :]
    if len({dy.stride() for dy in dys}) > 1:
        dys = [dy.contiguous() for dy in dys]
    z = linear_fwd("linear_act", x, weights, biases)[:, 0] if gelu else None
    dys, dbs = _dz(dys, z, biases, of_biases)
    dx = product_dx(dys, weights) if of_x else None
    chosen = [dy for dy, want in zip(dys, of_weights, strict=True) if want]
    dws = iter(product_dw(chosen, x) if chosen else ())
    return dx, *(next(dws) if want else None for want in of_weights), *dbs


def _dz(
    dys: Sequence[Tensor], z: Tensor | None, biases: Sequence[Tensor | None], wanted: Sequence[bool]
) -> tuple[Sequence[Tensor], list[Tensor | None]]:
    """The gradients in front of GELU (where z is None: dys) and those of the biases that are wanted."""
    of_bias = any(wanted)
    if z is None and not of_bias:
        return dys, [None] * len(biases)
    (T, N), parts, device = dys[0].shape, len(dys), dys[0].device
    tuned = ROW_SUMS
    column_tiles = triton.cdiv(N, tuned.meta["BLOCK_N"])
    splits, length = split_rows(T, column_tiles * parts, device, WAVES_OF_SUMS)
    dz = None if z is None else torch.empty((T, N), dtype=dys[0].dtype, device=device)
    partials = torch.empty((splits, parts, N), dtype=torch.float32, device=device) if of_bias else None
    if N:
        _linear_dz_kernel[(column_tiles, parts, splits)](
            *dys, *[None] * (3 - parts), z, dz, partials, *dys[0].stride(), T, length, N=N, PARTS=parts, **tuned.meta
        )
    sums = sum_splits(partials, dys[0].dtype) if of_bias else [None] * parts
    return dys if dz is None else [dz], [db if want else None for db, want in zip(sums, wanted, strict=True)]


def _describable(N: int, *matrices: Kind) -> bool:
    """Whether descriptors can express x, the weights and y: all rows at multiples of 16 bytes, none overlapping."""
    row = 16 // matrices[0].itemsize
    return N % row == 0 and all(m.aligned and m.stride[0] % row == 0 and m.stride[0] >= m.shape[1] for m in matrices)


def _check_arguments(operation: str, x: Kind, weights: Sequence[Kind], biases: Sequence[Kind | None]) -> None:
    suffixes = [""] if len(weights) == 1 else ["q", "k", "v"]
    matrices = {f"w{part}" if part else "weight": w for part, w in zip(suffixes, weights, strict=True)}
    vectors = {f"b{part}" if part else "bias": b for part, b in zip(suffixes, biases, strict=True) if b is not None}
    check_kinds(operation, x=x, **matrices, **vectors)
    if len(x.shape) != 2:
        raise ValueError(f"{operation}: x is {tuple(x.shape)}, expected [T, K]")
    first = weights[0]
    for name, w in matrices.items():
        fits = len(w.shape) == 2 and w.shape[1] == x.shape[1] and w.shape == first.shape
        if not fits:
            raise ValueError(f"{operation}: {name} is {tuple(w.shape)}, expected [N, {x.shape[1]}], the same N for all")
        same = w.shape[0] == 1 or w.stride[0] == first.stride[0]
        if not same:
            raise ValueError(
                f"{operation}: rows of {name} are {w.stride[0]} elements apart, of the first {first.stride[0]}"
            )
    for name, m in {"x": x, **matrices}.items():
        contiguous = m.shape[1] <= 1 or m.stride[1] == 1
        if not contiguous:
            raise ValueError(f"{operation}: the last dimension of {name} must be contiguous")
    for name, b in vectors.items():
        fits = b.shape == first.shape[:1] and (b.shape[0] <= 1 or b.stride == (1,))
        if not fits:
            raise ValueError(f"{operation}: {name} is {tuple(b.shape)}, expected a contiguous [{first.shape[0]}]")


class Linear(torch.autograd.Function):
    """linear_fwd with its gradients. The operands: x, the weights, then as many biases."""

    @staticmethod
    def forward(ctx: Any, operation: str, gelu: bool, *operands: Tensor | None) -> tuple[Tensor, ...]:
        x, weights, biases = _split_operands(operands)
        ctx.save_for_backward(*operands)
        ctx.gelu = gelu
        return linear_fwd(operation, x, weights, biases, gelu).unbind(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        gradients = linear_bwd(dys, *_split_operands(ctx.saved_tensors), ctx.gelu, ctx.needs_input_grad[2:])
        return None, None, *gradients


def _split_operands(operands: Sequence[Any]) -> tuple[Any, Sequence[Any], Sequence[Any]]:
    x, *rest = operands
    return x, rest[: len(rest) // 2], rest[len(rest) // 2 :]


def _linear(operation: str, gelu: bool, *operands: Tensor | None) -> tuple[Tensor, ...]:
    operands = autocast(*operands)
    if wants_gradients(*operands):
        return Linear.apply(operation, gelu, *operands)
    return linear_fwd(operation, *_split_operands(operands), gelu).unbind(1)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x · weightᵀ + bias; x [T, in], weight [out, in] → [T, out]."""
    return _linear("linear", False, x, weight, bias)[0]


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, act: str = "gelu") -> Tensor:
    """gelu(x · weightᵀ + bias) with the exact, erf form of GELU (Hendrycks & Gimpel, 2016); [T, in] → [T, out].

    ValueError for any other `act`.
    """
    if act != "gelu":
        raise ValueError(f"linear_act fuses 'gelu' only, not {act!r}: apply that activation to linear's result")
    return _linear("linear_act", True, x, weight, bias)[0]


def qkv_projection(
    x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, bq: Tensor | None, bk: Tensor | None, bv: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (unscaled), keys and values of x [T, N]: three [T, H·D] views of one buffer [T, 3, H·D], one launch."""
    biases = [bq, bk, bv]
    if any(b is None for b in biases) and any(b is not None for b in biases):
        biases = [x.new_zeros(len(w)) if b is None else b for w, b in zip((wq, wk, wv), biases, strict=True)]
    q, k, v = _linear("qkv_projection", False, x, wq, wk, wv, *biases)
    return q, k, v
