"""The host's time of a forward pass on the kernels, measured without a GPU: a driver that starts nothing.

What stays is what Python does before a GPU can work: the module tree, the checks, the choice of tiles, the allocations,
and Triton's own path to the driver. What is left out is the driver: about 5 µs a launch.
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from xlmr.kernels import _launch, attention, embedding


class Silent(CompiledKernel):
    """What Triton would have compiled; it starts nothing."""

    def __init__(self, kernel: JITFunction, key: str) -> None:
        self.name, self.key = kernel.__name__, key
        self.src, self.module, self.function, self.packed_metadata = None, self, None, None

    def __del__(self) -> None:
        pass

    def _run(self, *args: Any) -> None:
        pass


def _told(answer: Any, *_: Any) -> Any:
    return answer


@contextlib.contextmanager
def silent_gpu() -> Iterator[None]:
    """Kernels take CPU tensors as if they lay on an H200, and are not run: what they return is fresh memory."""
    if not isinstance(attention._attention_fwd_kernel, JITFunction):
        raise RuntimeError("kernels are interpreted in this process: run it without TRITON_INTERPRET=1")

    def compiled(kernel: JITFunction, key: str, *_: Any) -> Silent:
        return kernel.device_caches[0][0].setdefault(key, Silent(kernel, key))

    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    answers = {
        (torch.cuda, "device_count"): 1,
        (_launch, "_unsupported"): None,
        (_launch, "_target"): "sm_90",
        (_launch, "_processors"): 132,
        (embedding, "_check_ids"): None,  # asked on a CPU only
    }
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(driver)
    with contextlib.ExitStack() as stack:
        stack.callback(triton.runtime.driver.set_active, before)
        stack.enter_context(mock.patch.object(JITFunction, "_do_compile", compiled))
        for (module, name), answer in answers.items():  # by a function: to ask a Mock takes microseconds
            stack.enter_context(mock.patch.object(module, name, partial(_told, answer)))
        yield
