"""Eager's linear layers with their weights packed once: for models that only infer, on a CPU.

oneDNN multiplies weights that lie in blocks of its own. Eager's linear has it lay them so at every call, which takes
half the time of a short text and a sixth of a long batch in bf16; here each is kept in that order too, and the bytes of
the linear layers are in memory twice. The numbers are the same.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from . import eager

ROWS = 512  # the number of rows that oneDNN is told to expect; measured: from 1 to 1,640 it makes no difference


def unsupported(device: torch.device) -> str | None:
    """Why weights cannot be packed for `device`, in one clause, or None where they can."""
    if device.type not in ("cpu", "meta"):
        return f"weights are packed for a CPU, and the parameters are on {device.type!r}"
    if not (eager.ONEDNN_DTYPES and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")):
        return "this build of PyTorch has no oneDNN"
    return None


class PackedLinear:
    """Eager's linear, linear_act and qkv_projection, which pack a parameter at its first use and again after a change.

    A change is noticed through the parameter's version, address and dtype, and one in training is expected: torch's
    fused optimizers leave no trace in the version. What writes through `.data` in place escapes it, and what writes
    into parameters made in inference mode, which have no version. What cannot be packed (gradients, autocast, graphs,
    weights that are no parameters) goes to eager.
    """

    def __init__(self) -> None:
        self._packed: Any = WeakIdKeyDictionary()  # parameter → (its stamp, its weights in blocks)

    def __reduce__(self) -> Any:
        return type(self), ()  # a copy of the model packs its own

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See xlmr.eager.linear."""
        packed = self._pack(x, weight, bias)
        return eager.linear(x, weight, bias) if packed is None else eager.onednn_linear(x, packed, bias, "none")

    def linear_act(self, x: Tensor, weight: Tensor, bias: Tensor | None, act: str = "gelu") -> Tensor:
        """See xlmr.eager.linear_act."""
        packed = self._pack(x, weight, bias) if act == "gelu" else None
        return eager.linear_act(x, weight, bias, act) if packed is None else eager.onednn_linear(x, packed, bias, act)

    def qkv_projection(
        self, x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, bq: Tensor | None, bk: Tensor | None, bv: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See xlmr.eager.qkv_projection."""
        return self.linear(x, wq, bq), self.linear(x, wk, bk), self.linear(x, wv, bv)

    def _pack(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """The weight in blocks; None where it cannot be used so."""
        if type(weight) is not nn.Parameter or torch.compiler.is_compiling():
            return None
        if weight.grad is not None or (weight.requires_grad and torch.is_grad_enabled()):
            self._packed.pop(weight, None)  # an optimizer is about to change it
            return None
        if not eager.onednn_takes(x, weight, bias):
            return None
        stamp = weight.data_ptr(), None if weight.is_inference() else weight._version, weight.dtype
        known, packed = self._packed.get(weight, (None, None))
        if known != stamp:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)
            self._packed[weight] = stamp, packed
        return packed
