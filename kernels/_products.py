"""The gradients of matrix products, for the kernels that end or begin in one.   y = x·wᵀ

dx = Σ dy·w over the parts of a projection    dw = dyᵀ·x    and sums over rows

Shapes  x, dx: [T, K]   w, dw: [N, K]   dy: [T, N] at any strides

No atomics: a tile of dx is one program's; dw and sums over rows are split along T, and a second kernel adds the parts
in one order, so that gradients are bitwise the same at every run.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Kind, Table, config, input_precision, kind, pick, processors
from ._loops import bound

# Elements a step along the summed dimension, by the bytes of an element: 128 bytes. Never by the load: it decides the
# order of a sum.
BLOCK_K = {2: 64, 4: 32}

# (bytes of an element, gradient). "unaligned": dx and dw of elements that come one by one. Not measured yet: chosen by
# compiling for each target (no spills).
CONFIGS: Table = {
    "portable": {
        **{(itemsize, name): config(8, 3, BLOCK_M=64, BLOCK_N=64) for itemsize in (2, 4) for name in ("dx", "dw")},
        **{(itemsize, "unaligned"): config(8, 2, BLOCK_M=64, BLOCK_N=64) for itemsize in (2, 4)},
    },
    "sm_80": {
        **{(2, name): config(8, 3, BLOCK_M=128, BLOCK_N=128) for name in ("dx", "dw")},
        **{(4, name): config(8, 3, BLOCK_M=128, BLOCK_N=64) for name in ("dx", "dw")},
        **{(itemsize, "unaligned"): config(8, 2, BLOCK_M=64, BLOCK_N=64) for itemsize in (2, 4)},
    },
    "sm_90": {
        **{(2, name): config(8, 4, BLOCK_M=128, BLOCK_N=128) for name in ("dx", "dw")},
        **{(4, name): config(8, 3, BLOCK_M=128, BLOCK_N=64) for name in ("dx", "dw")},
        **{(itemsize, "unaligned"): config(8, 2, BLOCK_M=64, BLOCK_N=64) for itemsize in (2, 4)},
    },
    "sm_100": {
        **{(2, name): config(8, 4, BLOCK_M=128, BLOCK_N=128) for name in ("dx", "dw")},
        **{(4, name): config(8, 3, BLOCK_M=128, BLOCK_N=64) for name in ("dx", "dw")},
        (2, "unaligned"): config(8, 2, BLOCK_M=64, BLOCK_N=64),
        (4, "unaligned"): config(8, 2, BLOCK_M=64, BLOCK_N=32),
    },
    "gfx942": {
        **{(2, name): config(4, 2, BLOCK_M=128, BLOCK_N=128) for name in ("dx", "dw")},
        **{(4, name): config(4, 2, BLOCK_M=64, BLOCK_N=64) for name in ("dx", "dw")},
        **{(itemsize, "unaligned"): config(4, 2, BLOCK_M=64, BLOCK_N=64) for itemsize in (2, 4)},
    },
}
SPLIT_ROWS = 64  # dw and db are split along T into multiples of it
MANY_ROWS, MOST_PARTS = 8192, 4  # from so many rows on a second part may pay
PART = 1 / 8  # of a wave: what a part's sums cost to write and to read. Estimated for an H200: as 600 rows of a product
SUM = config(4, 1, BLOCK=1024)


@triton.jit
def of_part(part, q, k, v, PARTS: tl.constexpr):
    """q, k or v for part 0, 1 or 2 of PARTS: a pointer or a descriptor."""
    chosen = q
    if PARTS > 1:
        if part == 1:
            chosen = k
        if part == 2:
            chosen = v
    return chosen


@triton.jit
def _strided_product(
    a_ptr, b_ptr, stride_am, stride_ak, stride_bn, stride_bk, row, col, start, length, K, acc,
    M, N, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + a[row : row + BLOCK_M, k] · b[col : col + BLOCK_N, k]ᵀ for k from start, `length` of them, below K."""
    m, n, k = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N), start + tl.arange(0, BLOCK_K).to(tl.int64)
    a_ptrs = a_ptr + m.to(tl.int64)[:, None] * stride_am + k[None, :] * stride_ak
    b_ptrs = b_ptr + n.to(tl.int64)[:, None] * stride_bn + k[None, :] * stride_bk
    for step in range(0, length, BLOCK_K):
        left = K - step
        a = tl.load(a_ptrs, mask=(m < M)[:, None] & (k < left)[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=(n < N)[:, None] & (k < left)[None, :], other=0.0)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
        a_ptrs += tl.cast(stride_ak, tl.int64) * BLOCK_K
        b_ptrs += tl.cast(stride_bk, tl.int64) * BLOCK_K
    return acc


@triton.jit(do_not_specialize=["T"])
def _dx_kernel(
    dq_ptr, dk_ptr, dv_ptr, wq_ptr, wk_ptr, wv_ptr, dx_ptr, stride_dm, stride_dn, stride_wn, T,
    N: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of dx [T, K]: the gradients of all parts times their weights; ADD: to what stands there."""
    tiles: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    row, col = tl.program_id(0) // tiles * BLOCK_M, tl.program_id(0) % tiles * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for part in range(0, PARTS):
        d_ptr, w_ptr = of_part(part, dq_ptr, dk_ptr, dv_ptr, PARTS), of_part(part, wq_ptr, wk_ptr, wv_ptr, PARTS)
        acc = _strided_product(
            d_ptr, w_ptr, stride_dm, stride_dn, 1, stride_wn, row, col, 0, N, N, acc,
            T, K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    rows, cols = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
    dx_ptrs = dx_ptr + rows.to(tl.int64)[:, None] * K + cols[None, :]
    mask = (rows < T)[:, None] & (cols < K)[None, :]
    if ADD:
        acc += tl.load(dx_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptrs, acc.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "length"])
def _dw_kernel(
    dq_ptr, dk_ptr, dv_ptr, x_ptr, dw_ptr, stride_dm, stride_dn, stride_xm, T, length,
    N: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of one weight's gradient, over `length` rows of x: of dw [splits, parts, N, K]."""
    tiles: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    row, col = tl.program_id(0) // tiles * BLOCK_M, tl.program_id(0) % tiles * BLOCK_N
    part, split = tl.program_id(1), tl.program_id(2)
    d_ptr = of_part(part, dq_ptr, dk_ptr, dv_ptr, PARTS)
    start = split.to(tl.int64) * length
    tl.assume(length > 0)  # else ptxas serialises wgmma, for what a loop that is never entered leaves in registers
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc = _strided_product(
        d_ptr, x_ptr, stride_dn, stride_dm, 1, stride_xm, row, col, start, bound(length), T, acc,
        N, K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    rows, cols = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
    dw_ptr += (split * PARTS + part).to(tl.int64) * (N * K)
    dw_ptrs = dw_ptr + rows.to(tl.int64)[:, None] * K + cols[None, :]
    tl.store(dw_ptrs, acc.to(dw_ptr.dtype.element_ty), mask=(rows < N)[:, None] & (cols < K)[None, :])


@triton.jit(do_not_specialize=["splits"])
def _sum_splits_kernel(partials_ptr, sum_ptr, size, splits, BLOCK: tl.constexpr):
    """sum [size] of partials [splits, size], in the order of the splits."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    partials_ptrs = partials_ptr + place
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, bound(splits)):
        total += tl.load(partials_ptrs, mask=place < size, other=0.0)
        partials_ptrs += size
    tl.store(sum_ptr + place, total.to(sum_ptr.dtype.element_ty), mask=place < size)


def product_dx(dys: Sequence[Tensor], weights: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    """Σ dy·w over the parts: one to three of each, the gradients at equal strides; added to `out` where it is given."""
    T, (N, K), parts, first = len(dys[0]), weights[0].shape, len(dys), dys[0]
    dx = torch.empty((T, K), dtype=first.dtype, device=first.device) if out is None else out
    if dx.numel():
        itemsize, pads = first.element_size(), 3 - parts
        tuned = pick(CONFIGS, first.device, (itemsize, _load("dx", *dys, *weights)))
        block_m, block_n = (tuned.meta[name] for name in ("BLOCK_M", "BLOCK_N"))
        _dx_kernel[(triton.cdiv(T, block_m) * triton.cdiv(K, block_n),)](
            *dys, *[None] * pads, *weights, *[None] * pads, dx, *first.stride(), K if N == 1 else weights[0].stride(0),
            T, N=N, K=K, PARTS=parts, ADD=out is not None, PRECISION=input_precision(first.dtype, first.device),
            BLOCK_K=BLOCK_K[itemsize], **tuned.meta,
        )  # fmt: skip
    return dx


def product_dw(dys: Sequence[Tensor], x: Tensor) -> Tensor:
    """dyᵀ·x of each part, [parts, N, K]: one to three gradients at equal strides."""
    (T, K), N, parts, itemsize = x.shape, dys[0].shape[1], len(dys), x.element_size()
    tuned = pick(CONFIGS, x.device, (itemsize, _load("dw", *dys, x)))
    block_m, block_n = (tuned.meta[name] for name in ("BLOCK_M", "BLOCK_N"))
    tiles = triton.cdiv(N, block_m) * triton.cdiv(K, block_n)
    splits, length = split_rows(T, tiles * parts, x.device)
    partials = torch.empty((splits, parts, N, K), dtype=torch.float32 if splits > 1 else x.dtype, device=x.device)
    if partials.numel():
        _dw_kernel[(tiles, parts, splits)](
            *dys, *dys[:1] * (3 - parts), x, partials, *dys[0].stride(), K if T == 1 else x.stride(0), T, length,
            N=N, K=K, PARTS=parts, PRECISION=input_precision(x.dtype, x.device), BLOCK_K=BLOCK_K[itemsize],
            **tuned.meta,
        )  # fmt: skip
    return sum_splits(partials, x.dtype)


def vectorised(*matrices: Kind) -> bool:
    """Whether Triton sees that 16 bytes can be loaded at once: it asks for multiples of 16 elements."""
    return all(m.aligned and m.shape[1] % 16 == 0 and (m.shape[0] == 1 or m.stride[0] % 16 == 0) for m in matrices)


def _load(gradient: str, *matrices: Tensor) -> str:
    """The load of CONFIGS: `gradient`, or "unaligned"."""
    return gradient if all(m.stride(1) == 1 for m in matrices) and vectorised(*map(kind, matrices)) else "unaligned"


def split_rows(T: int, programs: int, device: torch.device, waves: int = 1) -> tuple[int, int]:
    """Into how many parts T rows are cut so that the programs fill the device, and the rows of a part: multiples of
    SPLIT_ROWS, whatever the tile. Many rows are cut in more where that leaves fewer processors idle: 144 programs on
    132 take two waves, and as three parts each four waves of a third."""
    places, programs = waves * processors(device), max(programs, 1)
    fewest = max(1, places // programs)
    choices = range(fewest, max(fewest, MOST_PARTS if T >= MANY_ROWS else 1) + 1)
    times = [triton.cdiv(programs * parts, places) / parts + PART * parts * programs / places for parts in choices]
    wanted = choices[times.index(min(times))]
    length = triton.cdiv(triton.cdiv(max(T, 1), wanted), SPLIT_ROWS) * SPLIT_ROWS
    return triton.cdiv(max(T, 1), length), length


def sum_splits(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """partials [splits, …] summed over the splits, in `dtype`."""
    if len(partials) == 1:
        return partials[0].to(dtype)
    total = torch.empty(partials.shape[1:], dtype=dtype, device=partials.device)
    if total.numel():
        grid = (triton.cdiv(total.numel(), SUM.meta["BLOCK"]),)
        _sum_splits_kernel[grid](partials, total, total.numel(), len(partials), **SUM.meta)
    return total
