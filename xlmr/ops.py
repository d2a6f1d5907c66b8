"""The seam between the module tree and the two paths that compute it.

`Ops` is a frozen record of functions. `EAGER` is plain PyTorch (xlmr.eager), `triton()` the kernels (xlmr.kernels),
`prepacked()` eager with weights packed for a CPU (xlmr.prepacked). A model holds one Ops and calls
`self.ops.linear(…)`; putting another there, or `dataclasses.replace(ops, attention=…)`, swaps a path or one operation.
What cuts across operations is a function from Ops to Ops: `checked`, `traced`.
"""

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from . import eager
from .eager import dense_attention, top_words
from .prepacked import PackedLinear
from .prepacked import unsupported as unpackable

__all__ = [
    "BACKENDS", "EAGER", "Check", "Ops", "checked", "checked_gradients", "compare", "dense_attention",
    "for_inference", "gradients", "prepacked", "resolve", "top_words", "traced", "triton",
]  # fmt: skip

BACKENDS = ("auto", "eager", "prepacked", "triton")


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
    in_chunks: Callable[[Callable[[torch.Tensor], torch.Tensor], torch.Tensor], torch.Tensor]


COMPUTED = tuple(field.name for field in fields(Ops) if field.name != "in_chunks")  # the fields that compute tensors

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
    in_chunks=eager.in_chunks,
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
        in_chunks=_launch.in_chunks,
    )


def prepacked() -> Ops:
    """EAGER with the weights of the linear layers packed for a CPU: of one model, which packs them as it uses them."""
    packed = PackedLinear()
    return replace(EAGER, linear=packed.linear, linear_act=packed.linear_act, qkv_projection=packed.qkv_projection)


def resolve(backend: str | Ops, device: torch.device) -> tuple[Ops, str]:
    """The Ops that `backend` (one of BACKENDS, or itself an Ops) means for parameters on `device`, and why, in words.

    "auto" takes the kernels on a GPU that can run them, else eager. ValueError for another name, RuntimeError where a
    path cannot run: "prepacked" elsewhere than on a CPU with oneDNN, "triton" where the kernels cannot, except that a
    model on its way to a GPU (on the meta device, or on the CPU of a machine that has one) waits for it; every call
    before that is refused: nothing falls back silently.
    """
    if isinstance(backend, Ops):
        return backend, "the ops given"
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}: allowed are {', '.join(map(repr, BACKENDS))}")
    if backend == "eager":
        return EAGER, "eager, as asked"
    if backend == "prepacked":
        if why := unpackable(device):
            raise RuntimeError(f"backend 'prepacked' cannot run: {why}; use 'auto' or 'eager'")
        return prepacked(), "eager with packed weights"
    if backend == "auto" and device.type in ("cpu", "meta"):
        return EAGER, f"eager on {device.type}: the kernels are for GPUs"
    from .kernels._launch import unsupported

    why = None if device.type == "meta" else unsupported(device)
    if backend == "triton":
        if why is not None and not (device.type == "cpu" and torch.cuda.is_available()):
            raise RuntimeError(f"backend 'triton' cannot run: {why}; use 'auto' or 'eager'")
        return triton(), f"triton on {device.type}, as asked" + (f": {why}" if why else "")
    if why is not None:
        return EAGER, f"eager on {device.type}: {why}"
    return triton(), f"triton on {device.type}"


def for_inference(backend: str, device: torch.device) -> str:
    """`backend` for a model that only infers on `device`: "auto" is then "prepacked" on a CPU that can."""
    return "prepacked" if backend == "auto" and device.type == "cpu" and not unpackable(device) else backend


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

        def call(*args: Any, **settings: Any) -> Any:
            out = operation(*args, **settings)
            checks.append(compare(name, out, twin(*args, **settings), twin(*_double(args), **settings)))
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


def checked_gradients(ops: Ops, checks: list[Check], against: Ops = EAGER) -> Ops:
    """`ops`, of which every call is also differentiated, for a random upstream gradient that is the same at every run:
    by the operation, and by its twin in the same dtype and in float64. One Check an argument; not for dropout."""
    generator = torch.Generator().manual_seed(0)

    def check(name: str) -> Callable[..., Any]:
        operation, twin = getattr(ops, name), getattr(against, name)
        names = list(inspect.signature(getattr(EAGER, name)).parameters)

        def call(*args: Any, **settings: Any) -> Any:
            out = operation(*args, **settings)
            outputs = out if isinstance(out, tuple) else (out,)
            upstream = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
            judged = ((operation, args), (twin, args), (twin, _double(args)))
            mine, theirs, exact = (
                gradients(functools.partial(function, **settings), given, upstream) for function, given in judged
            )
            checks.extend(compare(f"{name}, {names[i]}", mine[i], theirs[i], exact[i]) for i in mine)
            return out

        return call

    return replace(ops, **{name: check(name) for name in COMPUTED if name != "vocab_topk"})


def _double(args: Sequence[Any]) -> list[Any]:
    return [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]


def gradients(
    function: Callable[..., Any], args: Sequence[Any], upstream: Sequence[torch.Tensor] | None = None
) -> dict[int, torch.Tensor]:
    """Forward and backward of function(*args): the gradient of each tensor of floats, by its place among the arguments.
    `upstream` are the gradients of what it returns; by default the returned values themselves."""
    given = [a.detach().requires_grad_(a.is_floating_point()) if isinstance(a, torch.Tensor) else a for a in args]
    with torch.enable_grad():
        out = function(*given)
    outputs = out if isinstance(out, tuple) else (out,)
    inputs = {i: a for i, a in enumerate(given) if isinstance(a, torch.Tensor) and a.requires_grad}
    dy = [g.to(o.dtype) for g, o in zip(upstream or [o.detach() for o in outputs], outputs, strict=True)]
    return dict(zip(inputs, torch.autograd.grad(outputs, list(inputs.values()), dy), strict=True))


def compare(
    operation: str, out: Any, twin: Any, exact: Any, *, scale: float | None = None, dtype: torch.dtype | None = None
) -> Check:
    """The Check of a call that returned `out`, while its twin returned `twin`, and `exact` in float64: tensors, or
    tuples of them, of which integers (the ids of a top-k, whose order ties leave open) are not compared. Units in the
    last place are those of `scale`, by default the largest magnitude, at least 1, in `dtype`, by default that of `out`.
    """
    pairs = [
        (o.double(), t.double(), e)
        for o, t, e in zip(*(x if isinstance(x, tuple) else (x,) for x in (out, twin, exact)), strict=True)
        if o.is_floating_point() and o.numel()
    ]
    error, twin_error = (max(((pair[i] - pair[2]).abs().max().item() for pair in pairs), default=0.0) for i in (0, 1))
    dtype = dtype or (out[0] if isinstance(out, tuple) else out).dtype
    if scale is None:
        scale = max(1.0, *(e.abs().max().item() for *_, e in pairs))
    return Check(operation, error, twin_error, torch.finfo(dtype).eps * scale)
