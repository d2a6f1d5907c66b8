"""Which elements dropout keeps: the right number of them, independently, the same in every tile and at every replay."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from xlmr.kernels._dropout import LEVELS, draw_seed, keep_levels, keeps


@triton.jit
def _keeps_kernel(seed_ptr, out_ptr, first_row, levels, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = first_row + tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    kept = keeps(seed_ptr, row, tl.program_id(1) * BLOCK, levels, BLOCK)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    places = (row - first_row)[:, None] * (tl.num_programs(1) * BLOCK) + columns[None, :]
    tl.store(out_ptr + places, kept.to(tl.int8))


def mask(
    seed: Tensor, p: float, tile: tuple[int, int], first_row: int = 0, shape: tuple[int, int] = (256, 512)
) -> Tensor:
    out = torch.full(shape, 9, dtype=torch.int8, device=seed.device)
    grid = shape[0] // tile[0], shape[1] // tile[1]
    _keeps_kernel[grid](seed, out, first_row, keep_levels(p), ROWS=tile[0], BLOCK=tile[1], enable_fp_fusion=True)
    return out


def dropout_factors(seed: Tensor, T: int, N: int, p: float) -> Tensor:
    """What a kernel multiplies a [T, N] tensor by at dropout rate p, float64: LEVELS / keep_levels(p) where kept."""
    kept = mask(seed, p, (64, 128), shape=(-(-T // 64) * 64, -(-N // 128) * 128))[:T, :N]
    return kept.double() * LEVELS / max(keep_levels(p), 1)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999, 1.0])
def test_rate_and_independence(p: float, device: torch.device) -> None:
    kept = mask(draw_seed(device), p, (256, 512)).double().cpu()
    n, rate = kept.numel(), keep_levels(p) / LEVELS
    spread = (rate * (1 - rate)) ** 0.5
    assert abs(rate - (1 - p)) <= 0.5 / LEVELS
    assert abs(kept.mean() - rate) <= 4 * spread / n**0.5
    if spread:
        z = (kept - rate) / spread
        assert z.mean(0).abs().max() < 6 / 16
        assert z.mean(1).abs().max() < 6 / 512**0.5
        for other in (z.roll(1, 0), z.roll(1, 1), z.roll(4, 1), z.roll(8, 1), mask_z(draw_seed(device), p)):
            assert abs((z * other).mean()) < 5 / n**0.5


def mask_z(seed: Tensor, p: float) -> Tensor:
    rate = keep_levels(p) / LEVELS
    return (mask(seed, p, (256, 512)).double().cpu() - rate) / (rate * (1 - rate)) ** 0.5


def test_neither_tile_nor_replay_matters(device: torch.device) -> None:
    torch.manual_seed(3)
    seed = draw_seed(device)
    whole = mask(seed, 0.3, (256, 512))
    for tile in ((1, 8), (16, 32), (64, 128)):
        shape = min(64, 16 * tile[0]), min(128, 8 * tile[1])
        assert torch.equal(mask(seed, 0.3, tile, shape=shape), whole[: shape[0], : shape[1]])
    assert torch.equal(mask(seed, 0.3, (64, 128), first_row=64, shape=(64, 128)), whole[64:128, :128])
    torch.manual_seed(3)
    assert torch.equal(draw_seed(device), seed)
    assert not torch.equal(mask(draw_seed(device), 0.3, (256, 512)), whole)
    far = 1 << 32  # the same low half of the row's number
    assert not torch.equal(mask(seed, 0.3, (64, 128), first_row=far, shape=(64, 128)), whole[:64, :128])


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_a_rate_out_of_range_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match="allowed is 0 to 1"):
        keep_levels(p)
