"""Where the Triton kernels can run: every answer of `unsupported`, on machines made up for the purpose."""

import contextlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import python

from xlmr.kernels._launch import _unsupported, opaque, unsupported

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def machine(
        triton: str | None = "3.6.0",
        capability: tuple[int, int] | None = (9, 0),
        amd: str | None = None,
        interpreter: bool = False,
    ) -> None:
        monkeypatch.setitem(sys.modules, "triton", triton and SimpleNamespace(__version__=triton))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None or amd is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=amd))
        monkeypatch.setattr(torch.version, "hip", "7.0" if amd else None)
        monkeypatch.setenv("TRITON_INTERPRET", "1" if interpreter else "0")
        _unsupported.cache_clear()

    yield machine
    _unsupported.cache_clear()


@pytest.mark.parametrize(
    ("facts", "device", "reason"),
    [
        ({}, GPU, None),
        ({"capability": (8, 0)}, GPU, None),
        ({"triton": "3.9.1+git12"}, GPU, None),
        ({"amd": "gfx942:sramecc+:xnack-"}, GPU, None),
        ({"interpreter": True, "capability": None}, CPU, None),
        ({}, CPU, "need a GPU and the tensors are on 'cpu'"),
        ({"interpreter": True}, torch.device("meta"), "the tensors are on 'meta'"),
        ({"triton": None}, GPU, "not installed (pip install 'xlmr[triton]')"),
        ({"triton": None, "interpreter": True}, CPU, "not installed"),
        ({"triton": "3.5.1"}, GPU, "Triton is 3.5.1, supported are 3.6 to 3.9"),
        ({"triton": "3.10.0"}, GPU, "Triton is 3.10.0, supported are 3.6 to 3.9"),
        ({"capability": None}, GPU, "PyTorch sees no GPU"),
        ({"capability": (7, 5)}, GPU, "compute capability 7.5, at least 8.0 is needed"),
        ({"amd": "gfx1100"}, GPU, "the GPU is gfx1100, not one of gfx942"),
    ],
)
def test_unsupported_says_why(machine: Any, facts: dict[str, Any], device: torch.device, reason: str | None) -> None:
    machine(**facts)
    found = unsupported(device)
    assert found is None if reason is None else found is not None and reason in found


def test_the_question_leaves_cuda_alone_on_a_cpu() -> None:
    code = """
import torch
from xlmr.kernels._launch import opaque, unsupported
assert unsupported(torch.device("cpu")) and not torch.cuda.is_initialized()
"""
    python(code, TRITON_INTERPRET="0")


@pytest.mark.parametrize(("gpus", "entered"), [(1, []), (2, [GPU])])
def test_a_launcher_works_where_its_first_tensor_is(
    gpus: int, entered: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Somewhere(torch.Tensor):
        device = GPU

    seen = []
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "device", lambda device: seen.append(device) or contextlib.nullcontext())
    launch = opaque(lambda name, tensors, *, by: (name, len(tensors), by))
    assert launch("linear", [None, torch.zeros(1).as_subclass(Somewhere)], by=2) == ("linear", 2, 2)
    assert launch("linear", [torch.zeros(1)], by=2) == ("linear", 1, 2)  # to refuse it is the launcher's part
    assert seen == entered


# Calls each launcher for many kinds of tensors: kernels `chosen` by Triton, as no plan is remembered, or `started`.
SCRIPT = """
import functools
import itertools
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

from bench.host_time import Silent, silent_gpu
from xlmr.kernels import _launch, attention, layer_norm, linear
from xlmr.varlen import Sequences

launches, searches = [], []


def start(kernel, *args):
    grid, (_, *hooks_and_arguments) = args[:6], args[6:]  # without the launch's metadata, new every time
    launches.append((kernel.name, kernel.key, grid, *map(noted, hooks_and_arguments)))


def noted(value):
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.stride(), value.data_ptr() % 16
    if hasattr(value, "block_shape"):
        return noted(value.base), value.shape, value.strides, value.block_shape
    return value


def search(self, *args, run=JITFunction.run, **kwargs):
    searches.append(self)
    return run(self, *args, **kwargs)


mock.patch.object(Silent, "_run", start).start()
mock.patch.object(JITFunction, "run", search).start()


def matrix(rows, cols, dtype, offset=0, gap=0):
    return torch.zeros(offset + rows * (cols + gap), dtype=dtype)[offset:].view(rows, cols + gap)[:, :cols]


calls = []
for T, offset, gap, dtype, bias in itertools.product(
    (1, 16, 65, 130), (0, 1, 8), (0, 1, 16), (torch.bfloat16, torch.float32), (True, False)
):
    x, w = matrix(T, 64, dtype, offset, gap), matrix(64, 64, dtype, offset)
    b = torch.zeros(64, dtype=dtype) if bias else None
    calls += [
        functools.partial(linear.linear, x, w, b),
        functools.partial(linear.linear_act, x, w, b),
        functools.partial(linear.qkv_projection, x, w, w, w, b, b, b),
        functools.partial(layer_norm.gelu_layer_norm, x, w[0], w[0], 1),  # Triton makes an integer 1 a constant
        functools.partial(layer_norm.gelu_layer_norm, x, w[0], w[0], 1e-5),
        functools.partial(layer_norm.add_layer_norm, x, x.contiguous().bfloat16(), w[0], w[0], 1e-5, 0.1 * bias),
    ]
    q = x.view(T, 4, 16) if gap == 0 else x.unflatten(1, (4, 16))
    sequences = Sequences.packed(torch.tensor([0, T], dtype=torch.int32), T)
    calls.append(functools.partial(attention.attention, q, q, q.contiguous(), sequences, 0.25, offset == 1, 0.1 * bias))


def training(call):
    call.args[0].requires_grad_(True)
    call()
    call.args[0].requires_grad_(False)


def record(remembers):
    launches.clear()
    searches.clear()
    with silent_gpu(), mock.patch.object(_launch, "REMEMBERS", remembers):
        for i, call in enumerate(calls):
            call() if i % 7 else training(call)
    return list(launches), len(searches)


chosen, searched = record(False)
assert len(chosen) == searched == len(calls), (len(chosen), searched, len(calls))
record(True)
started, searched = record(True)
assert searched == 0
for one, other in zip(chosen, started, strict=True):
    assert one == other, (one, other)
assert len({(name, key) for name, key, *_ in chosen}) > 50
"""


def test_launches_from_memory_are_those_that_triton_chooses() -> None:
    pytest.importorskip("triton")
    python(SCRIPT, TRITON_INTERPRET="0")
