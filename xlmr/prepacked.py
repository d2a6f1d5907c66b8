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

TINY = 2**19  # multiplications in fp32 that F.linear has done before oneDNN is called; measured
ROWS = 512  # the number of rows that oneDNN is told to expect; measured: from 1 to 1,640 it makes no difference


def unsupported(device: torch.device) -> str | None:
    """Why weights cannot be packed for `device`, in one clause, or None where they can."""
    if device.type not in ("cpu", "meta"):
        return f"weights are packed for a CPU, and the parameters are on {device.type!r}"
    if not (eager.ONEDNN_DTYPES and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")):
        return "this build of PyTorch has no oneDNN"
    return None


class PackedLinear:
    """Eager's linear, linear_act and qkv_projection, which pack parameters at their first use and again after a change.

    A change is noticed through a parameter's version, address and dtype, and one in training is expected: torch's fused
    optimizers leave no trace in the version. What writes through `.data` in place escapes it, and what writes into
    parameters made in inference mode, which have no version. What cannot be packed (gradients, autocast, graphs,
    weights that are no parameters) goes to eager.
    """

    def __init__(self) -> None:
        self._packed: Any = WeakIdKeyDictionary()  # first weight → {how many: (stamps of all, blocks, bias)}

    def __reduce__(self) -> Any:
        return type(self), ()  # a copy of the model packs its own

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See xlmr.eager.linear."""
        packed = self._pack(x, [weight], [bias])
        return eager.linear(x, weight, bias) if packed is None else eager.onednn_linear(x, *packed, "none")

    def linear_act(self, x: Tensor, weight: Tensor, bias: Tensor | None, act: str = "gelu") -> Tensor:
        """See xlmr.eager.linear_act."""
        packed = self._pack(x, [weight], [bias]) if act == "gelu" else None
        return eager.linear_act(x, weight, bias, act) if packed is None else eager.onednn_linear(x, *packed, act)

    def qkv_projection(
        self, x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, bq: Tensor | None, bk: Tensor | None, bv: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See xlmr.eager.qkv_projection; one product, whose rows the three tensors share."""
        packed = self._pack(x, [wq, wk, wv], [bq, bk, bv])
        if packed is None:
            return eager.qkv_projection(x, wq, wk, wv, bq, bk, bv)
        q, k, v = eager.onednn_linear(x, *packed, "none").split([len(wq), len(wk), len(wv)], dim=-1)
        return q, k, v

    def _pack(
        self, x: Tensor, weights: list[Tensor], biases: list[Tensor | None]
    ) -> tuple[Tensor, Tensor | None] | None:
        """The weights below one another in blocks, and their biases; None where they cannot be used so."""
        given = [b for b in biases if b is not None]
        if (
            torch.compiler.is_compiling()
            or any(type(p) is not nn.Parameter for p in (*weights, *given))
            or len(given) not in (0, len(weights))
        ):
            return None
        if learning := [p for p in (*weights, *given) if _learns(p)]:
            self._forget(learning)  # an optimizer is about to change them
            return None
        tiny = x.dtype == torch.float32 and x.numel() * len(weights[0]) < TINY
        if tiny or not eager.onednn_takes(x, *weights, *given):
            return None
        stamps = [_stamp(p) for p in (*weights, *given)]
        uses = self._packed.setdefault(weights[0], {})
        known, blocks, bias = uses.get(len(weights), (None, None, None))
        if known != stamps:
            blocks = torch.ops.mkldnn._reorder_linear_weight(_joined(weights).contiguous(), ROWS)
            bias = _joined(given) if given else None
            uses[len(weights)] = stamps, blocks, bias
        return blocks, bias

    def _forget(self, parameters: list[Tensor]) -> None:
        """What was packed of any of them."""
        addresses = {p.data_ptr() for p in parameters}
        for uses in self._packed.values():
            for count in [n for n, (stamps, *_) in uses.items() if addresses & {address for address, *_ in stamps}]:
                del uses[count]


def _learns(parameter: Tensor) -> bool:
    return parameter.grad is not None or (parameter.requires_grad and torch.is_grad_enabled())


def _joined(parameters: list[Tensor]) -> Tensor:
    """One below the other; of a single one the tensor itself, not a copy."""
    detached = [p.detach() for p in parameters]
    return detached[0] if len(detached) == 1 else torch.cat(detached)


def _stamp(parameter: Tensor) -> tuple[int, int | None, torch.dtype]:
    return parameter.data_ptr(), None if parameter.is_inference() else parameter._version, parameter.dtype
