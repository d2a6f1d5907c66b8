"""The one accuracy assertion: what we compute may be at most twice as far from the truth as the reference is."""

import torch
from torch import Tensor


def assert_accurate(
    ours: Tensor,
    reference: Tensor,
    truth: Tensor,
    *,
    dtype: torch.dtype | None = None,
    scale: float | None = None,
    ulps: int = 4,
) -> None:
    """max|ours − truth| ≤ 2 · max|reference − truth| + a few ulp, where `truth` is the reference in float64.

    `reference` is the same computation in the dtype under test: its error is what that dtype costs. The ulps, of
    `dtype` (by default that of `ours`) at `scale` (by default the truth's largest magnitude, at least 1), are for a
    reference that is exact by luck.
    """
    assert ours.shape == truth.shape, f"shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    assert ours.dtype == reference.dtype, f"dtype {ours.dtype}, expected {reference.dtype}"
    if truth.numel() == 0:
        return
    error = (ours.double() - truth.double()).abs().max().item()
    allowed = 2 * (reference.double() - truth.double()).abs().max().item()
    allowed += ulps * torch.finfo(dtype or ours.dtype).eps * (scale or max(1.0, truth.abs().max().item()))
    assert error <= allowed, f"max error {error:.3e}, allowed {allowed:.3e}"
