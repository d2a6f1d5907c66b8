"""The one accuracy assertion: what we compute may be at most twice as far from the truth as the reference is.

And what else the tests of the kernels share: the dtypes, and the memory that a call keeps for its backward.
"""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="too large for the interpreter")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


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


def bytes_kept(call: Callable[[], Any], parameters: Iterable[Tensor] = ()) -> int:
    """The bytes that autograd keeps for the backward of a call: each tensor once, `parameters` left out."""
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        call()
    known = {parameter.data_ptr() for parameter in parameters}
    return sum(tensor.nbytes for place, tensor in kept.items() if place not in known)
