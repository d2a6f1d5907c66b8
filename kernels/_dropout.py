"""Dropout without a stored mask: which elements are kept is computed from a seed, again in the backward pass.

An element's 16 random bits are Philox-4x32-7 of (seed; column / 8, row): eight neighbours share one call, so that the
random numbers cost an eighth. They depend on row and column alone, not on the tile in which a kernel meets them.

Source  Salmon et al., 2011: Philox with 7 rounds passes BigCrush
"""

import torch
import triton
import triton.language as tl

LEVELS = 1 << 16
ROUNDS = tl.constexpr(7)


def draw_seed(device: torch.device) -> torch.Tensor:
    """A seed, int64 [1] on `device`, from that device's generator: it follows torch.manual_seed, activation
    checkpointing replays it, a CUDA graph draws a new one at each replay, and nothing synchronises."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def keep_levels(p: float) -> int:
    """Of 65,536 random numbers so many keep an element at dropout rate p; what is kept is multiplied by LEVELS / this,
    so that the expectation is exact. ValueError outside [0, 1]."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"the dropout rate is {p}, allowed is 0 to 1")
    return round((1.0 - p) * LEVELS)


@triton.jit
def keeps(seed_ptr, rows, start, levels, BLOCK: tl.constexpr):
    """Which elements stay: [R, BLOCK], of `rows` [R] (≥ 0) and the columns start … start + BLOCK, multiples of 8."""
    seed = tl.load(seed_ptr)
    groups = (start // 8 + tl.arange(0, BLOCK // 8))[None, :].to(tl.uint32)
    rows = rows.to(tl.int64)[:, None]
    low = (rows & 0xFFFFFFFF).to(tl.uint32)
    high = (rows >> 32).to(tl.uint32)
    zero = tl.zeros([rows.shape[0], BLOCK // 8], tl.uint32)
    a, b, c, d = tl.philox(seed, groups + zero, low + zero, high + zero, zero, ROUNDS)
    words = tl.join(tl.join(a, b), tl.join(c, d))
    halves = tl.join(words & 0xFFFF, words >> 16)
    return halves.reshape(rows.shape[0], BLOCK).to(tl.int32) < levels


@triton.jit
def keep_factors(seed_ptr, rows, start, levels, BLOCK: tl.constexpr):
    """What dropout multiplies the elements of `keeps` by: LEVELS / levels where kept, else 0; 1 without a seed."""
    factors = 1.0
    if seed_ptr is not None:
        factors = tl.where(keeps(seed_ptr, rows, start, levels, BLOCK), 65536.0 / tl.maximum(levels, 1), 0.0)
    return factors
