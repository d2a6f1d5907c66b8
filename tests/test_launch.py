"""Where the Triton kernels can run: every answer of `unsupported`, on machines made up for the purpose."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

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
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "TRITON_INTERPRET": "0"})


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
