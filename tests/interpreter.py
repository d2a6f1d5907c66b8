"""Triton's interpreter with the numbers of a GPU: bf16 rounded to nearest and multiplied as what it is, fp32 products
as three of TF32 where a kernel asks for "tf32x3". Imported by conftest, before any kernel runs."""

import functools
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

_cast, _dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot
_prepared = functools.cache(interpreter._patch_lang)


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """What a kernel's launch has done to triton.language the interpreter does again at every call of a function
    within it, which takes a third of the time. Once is enough: for the modules that only the function knows."""
    _prepared(self.fn)
    return self.rewrite()(*args, **kwargs)


def _rounded(self: Any, source: Any, to: Any) -> Any:
    """The interpreter cuts off what a bf16 cannot hold."""
    if (source.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
        return _cast(self, source, to)
    rounded = torch.from_numpy(np.array(source.data)).bfloat16()
    return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)


def widened(builder: Any, operand: Any) -> Any:
    """A bf16 operand in fp32, exactly: the interpreter has its bits, and would multiply those."""
    return builder.cast_impl(operand, tl.float32) if operand.dtype.scalar == tl.bfloat16 else operand


def _tf32(x: np.ndarray) -> np.ndarray:
    """Rounded to 10 bits of mantissa, ties away from zero, as cvt.rna.tf32.f32."""
    rounded = ((x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(x), rounded, x)


def _product(self: Any, a: Any, b: Any, total: Any, precision: Any, *options: Any) -> Any:
    a, b = widened(self, a), widened(self, b)
    if a.dtype.scalar != tl.float32 or "TF32" not in str(precision):
        return _dot(self, a, b, total, precision, *options)
    a, b = np.ascontiguousarray(a.data), np.ascontiguousarray(b.data)
    high_a, high_b = _tf32(a), _tf32(b)
    product = high_a @ high_b
    if "3" in str(precision).replace("TF32", ""):
        with np.errstate(invalid="ignore"):  # ∞ − ∞, which a GPU replaces by 0 as well
            low = _tf32(a - high_a) @ high_b + high_a @ _tf32(b - high_b)
        product += np.where(np.isnan(low), 0, low)
    return TensorHandle(product + total.data, tl.float32)


InterpretedFunction.__call__ = _call
InterpreterBuilder.cast_impl = _rounded
InterpreterBuilder.create_dot = _product
