"""The seam between the module tree and the two paths that compute it.

`Ops` is a frozen record of functions. `EAGER` is plain PyTorch (xlmr.eager). A model holds one Ops and calls
`self.ops.linear(…)`; putting another there, or `dataclasses.replace(ops, attention=…)`, swaps a path or one operation.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import eager
from .eager import dense_attention

__all__ = ["BACKENDS", "EAGER", "Ops", "dense_attention", "resolve", "triton"]

BACKENDS = ("auto", "eager", "triton")


@dataclass(frozen=True)
class Ops:
    """One implementation of every operation; xlmr.eager documents each field's arguments, shapes and errors."""

    embed: Callable[..., torch.Tensor]
    qkv_projection: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    attention: Callable[..., torch.Tensor]
    linear: Callable[..., torch.Tensor]
    linear_act: Callable[..., torch.Tensor]
    add_layer_norm: Callable[..., torch.Tensor]
    gelu_layer_norm: Callable[..., torch.Tensor]
    vocab_cross_entropy: Callable[..., torch.Tensor]
    vocab_topk: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    rows_at_once: Callable[[torch.Tensor], int]


EAGER = Ops(
    embed=eager.embed,
    qkv_projection=eager.qkv_projection,
    attention=eager.attention,
    linear=eager.linear,
    linear_act=eager.linear_act,
    add_layer_norm=eager.add_layer_norm,
    gelu_layer_norm=eager.gelu_layer_norm,
    vocab_cross_entropy=eager.vocab_cross_entropy,
    vocab_topk=eager.vocab_topk,
    rows_at_once=eager.rows_at_once,
)


def triton() -> Ops:
    """The Triton kernels. Raises RuntimeError: this version of xlmr has none yet."""
    raise RuntimeError(
        "backend 'triton' cannot run: this version of xlmr has no Triton kernels yet; use 'eager' or 'auto'"
    )


def resolve(backend: str, device: torch.device) -> tuple[Ops, str]:
    """The Ops that `backend` ("auto", "eager" or "triton") means for parameters on `device`, and why, in words.

    "triton" raises RuntimeError where the kernels cannot run; nothing falls back silently.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}: allowed are {', '.join(map(repr, BACKENDS))}")
    if backend == "triton":
        return triton(), "triton, as asked"
    if backend == "eager":
        return EAGER, "eager, as asked"
    return EAGER, f"eager on {device.type}: this version of xlmr has no Triton kernels yet"
