"""GELU and its derivative in registers, at every number that fp16 has, against float64."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from xlmr.kernels._gelu import gelu_slope_tile, gelu_tile

BLOCK = 1024


@triton.jit
def _gelu_kernel(x_ptr, y_ptr, slope_ptr, size, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place, mask=place < size, other=0.0)
    tl.store(y_ptr + place, gelu_tile(x, EXACT), mask=place < size)
    if slope_ptr is not None:
        tl.store(slope_ptr + place, gelu_slope_tile(x, EXACT), mask=place < size)


def launch(x: Tensor, exact: bool, slope: Tensor | None = None) -> Tensor:
    y = torch.full_like(x, torch.nan)
    _gelu_kernel[(triton.cdiv(len(x), BLOCK),)](x, y, slope, len(x), EXACT=exact, BLOCK=BLOCK)
    return y.double().cpu()


@pytest.mark.parametrize("exact", [True, False], ids=["erf", "polynomial"])
def test_every_fp16_number(exact: bool, device: torch.device) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16).float()
    x = every[every.isfinite()].to(device)
    slope = torch.full_like(x, torch.nan)
    y = launch(x, exact, slope)
    slope = slope.double().cpu()
    x = x.double().cpu().requires_grad_()
    # Not F.gelu: on the far left it is 0.5·x·(1 + erf), which cancels in float64 too.
    truth = x * torch.special.log_ndtr(x).exp()
    true_slope = torch.autograd.grad(truth.sum(), x)[0]
    error, slope_error = (y - truth.detach()).abs(), (slope - true_slope).abs()
    near = x.detach().abs() <= 4.5
    ulp = 2.0**-24 * x.detach().abs()
    assert (error <= (5e-7 if exact else 1.2e-6) + ulp).all()
    assert (slope_error <= 4e-6).all()
    assert (error[near] <= (6e-3 if exact else 8.5e-6) * truth[near].detach().abs() + 1e-45).all()
    if not exact:  # what it is for: rounded to fp16, nearly every number is the best one
        assert (y.half() == truth.half()).float().mean() > 0.97


def test_numbers_that_are_none(device: torch.device) -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, -100.0, 100.0, 0.0, -0.0], device=device)
    y = launch(x, exact=False)
    assert y[0].isnan()
    torch.testing.assert_close(
        y[1:], torch.tensor([torch.inf, 0, 0, 100, 0, 0], dtype=torch.float64), atol=1e-14, rtol=0
    )
