"""The seam between the module tree and the two paths that compute it.

`Ops` is a frozen record of functions. `EAGER` is plain PyTorch (xlmr.eager), `triton()` the kernels (xlmr.kernels). A
model holds one Ops and calls `self.ops.linear(…)`; putting another there, or `dataclasses.replace(ops, attention=…)`,
swaps a path or one operation. What cuts across operations is a function from Ops to Ops: `checked`, `traced`.
"""

import contextlib
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from . import eager
from .eager import dense_attention

__all__ = ["BACKENDS", "EAGER", "Check", "Ops", "checked", "compare", "dense_attention", "resolve", "traced", "triton"]

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


COMPUTED = tuple(field.name for field in fields(Ops) if field.name != "rows_at_once")  # the fields that compute tensors

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


@functools.cache
def triton() -> Ops:
    """The Triton kernels. Raises RuntimeError where Triton is not installed or of a version that is not supported."""
    from .kernels import _launch

    why = _launch.triton_problem()
    if why is not None:
        raise RuntimeError(f"backend 'triton' cannot run: {why}")
    from .kernels import attention, embedding, layer_norm, linear, vocab_softmax

    return Ops(
        embed=embedding.embed,
        qkv_projection=linear.qkv_projection,
        attention=attention.attention,
        linear=linear.linear,
        linear_act=linear.linear_act,
        add_layer_norm=layer_norm.add_layer_norm,
        gelu_layer_norm=layer_norm.gelu_layer_norm,
        vocab_cross_entropy=vocab_softmax.vocab_cross_entropy,
        vocab_topk=vocab_softmax.vocab_topk,
        rows_at_once=_launch.rows_at_once,
    )


def resolve(backend: str, device: torch.device) -> tuple[Ops, str]:
    """The Ops that `backend` ("auto", "eager" or "triton") means for parameters on `device`, and why, in words.

    "auto" takes the kernels on a GPU that can run them. "triton" raises RuntimeError where they cannot run (on the meta
    device, where nothing runs, it waits until the model has a place); nothing falls back silently.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}: allowed are {', '.join(map(repr, BACKENDS))}")
    if backend == "eager":
        return EAGER, "eager, as asked"
    if backend == "auto" and device.type in ("cpu", "meta"):
        return EAGER, f"eager on {device.type}: the kernels are for GPUs"
    from .kernels._launch import unsupported

    why = None if device.type == "meta" else unsupported(device)
    if backend == "triton":
        if why is not None:
            raise RuntimeError(f"backend 'triton' cannot run: {why}; use 'auto' or 'eager'")
        return triton(), f"triton on {device.type}, as asked"
    if why is not None:
        return EAGER, f"eager on {device.type}: {why}"
    return triton(), f"triton on {device.type}"


@dataclass(frozen=True)
class Check:
    """One call of one operation: the largest error of it and of its twin in the same dtype, both against the twin in
    float64. It is right while its error stays within twice its twin's and a few units in the last place."""

    operation: str
    error: float
    twin_error: float
    ulp: float

    @property
    def bound(self) -> float:
        return 2 * self.twin_error + 4 * self.ulp

    @property
    def right(self) -> bool:
        return self.error <= self.bound  # False for NaN


def checked(ops: Ops, checks: list[Check], against: Ops = EAGER) -> Ops:
    """`ops`, whose every call is also computed by its twin in `against`, in the same dtype and in float64; the errors
    are appended to `checks`."""

    def check(name: str) -> Callable[..., Any]:
        operation, twin = getattr(ops, name), getattr(against, name)

        def call(*args: Any) -> Any:
            out = operation(*args)
            exact = twin(*(a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args))
            checks.append(compare(name, out, twin(*args), exact))
            return out

        return call

    return replace(ops, **{name: check(name) for name in COMPUTED})


def traced(ops: Ops) -> Ops:
    """`ops`, whose every call stands in a range named after it, "xlmr.linear": one of torch.profiler, and where they
    are at work one of NVTX (Nsight) and one of Proton (Triton's profiler)."""

    def trace(name: str) -> Callable[..., Any]:
        operation, label = getattr(ops, name), f"xlmr.{name}"

        def call(*args: Any, **kwargs: Any) -> Any:
            with contextlib.ExitStack() as ranges:
                ranges.enter_context(torch.profiler.record_function(label))
                if torch.cuda.is_available():
                    ranges.enter_context(torch.cuda.nvtx.range(label))
                if "triton.profiler" in sys.modules:  # imported by whoever measures with Proton
                    ranges.enter_context(sys.modules["triton.profiler"].scope(label))
                return operation(*args, **kwargs)

        return call

    return replace(ops, **{name: trace(name) for name in COMPUTED})


def compare(operation: str, out: Any, twin: Any, exact: Any) -> Check:
    """Of tensors or tuples of them; integers (the ids of a top-k, whose order ties leave open) are not compared."""
    pairs = [
        (o.double(), t.double(), e)
        for o, t, e in zip(*(x if isinstance(x, tuple) else (x,) for x in (out, twin, exact)), strict=True)
        if o.is_floating_point() and o.numel()
    ]
    error, twin_error = (max(((pair[i] - pair[2]).abs().max().item() for pair in pairs), default=0.0) for i in (0, 1))
    dtype = out[0].dtype if isinstance(out, tuple) else out.dtype
    scale = max((e.abs().max().item() for *_, e in pairs), default=0.0)
    return Check(operation, error, twin_error, torch.finfo(dtype).eps * max(scale, 1.0))
