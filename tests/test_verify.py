"""`xlmr verify`: right on both paths, wrong where an operation or a gradient is."""

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import untrainable

import xlmr
from xlmr import cli
from xlmr.ops import EAGER

TEXT = "The capital of France is Paris."


@pytest.fixture
def verify(checkpoint: Path, capsys: pytest.CaptureFixture[str], device: torch.device) -> Callable[..., Any]:
    def verify(*args: str) -> tuple[int, dict[str, Any]]:
        given = ["--json", "--model", str(checkpoint), "--device", str(device), "--text", TEXT, *args]
        status = cli.main(["verify", *given])
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        return status, {row["operation"]: row for row in rows}

    return verify


DTYPE = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


@DTYPE
@pytest.mark.parametrize("backend", ["eager", "auto"])  # "auto" is the kernels, wherever they run
def test_both_paths_are_right(verify: Callable[..., Any], backend: str, dtype: str) -> None:
    status, rows = verify("--backend", backend, "--dtype", dtype)
    assert status == 0
    assert {"embed", "attention", "linear_act", "vocab_topk", "model, packed", "model, padded"} <= rows.keys()
    assert all(row["right"] and row["error"] <= row["bound"] for row in rows.values())
    assert rows["linear"]["error"] > 0


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_the_gradients_are_right(
    verify: Callable[..., Any], checkpoint: Path, backend: str, device: torch.device
) -> None:
    if backend == "triton" and (why := untrainable(device)):
        pytest.skip(why)
    status, rows = verify("--gradients", "--backend", backend)
    assert status == 0
    operations = {name.partition(", ")[0] for name in rows}
    assert operations == {*vars(EAGER), "model"} - {"vocab_topk", "in_chunks"}
    parameters = list(xlmr.XLMRobertaForMaskedLM.from_pretrained(checkpoint).parameters())
    assert rows["model, gradients"]["calls"] == len(parameters)
    assert rows["model, gradients"]["error"] > 0
    if backend == "eager" and device.type == "cpu":  # PyTorch's own kernels on a GPU may add in any order
        assert verify("--gradients", "--backend", backend) == (status, rows)  # the same at every run


@DTYPE
def test_the_kernels_gradients_are_right_on_a_trained_model(
    dtype: str, device: torch.device, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demo's scores are large, as those of every trained model, not of one with random weights. In bf16 eager's
    loss is right to a fortieth of an ulp, by luck."""
    if why := untrainable(device):
        pytest.skip(why)
    status = cli.main(["verify", "--gradients", "--backend", "triton", "--device", str(device), "--dtype", dtype])
    assert status == 0, capsys.readouterr().out


class Enlarged(torch.autograd.Function):
    """The identity, whose gradient is a thousandth too large."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dx: torch.Tensor) -> torch.Tensor:
        return dx * 1.001


@pytest.mark.parametrize(
    ("args", "wrong", "found"),
    [
        ([], lambda x, *rest: EAGER.linear(x, *rest) * 1.001, "linear"),
        (["--gradients"], lambda x, *rest: EAGER.linear(Enlarged.apply(x), *rest), "linear, x"),
    ],
)
def test_a_wrong_operation_is_status_1(
    verify: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, args: list[str], wrong: Any, found: str
) -> None:
    def pipeline(*args: Any, pipeline: Any, **named: Any) -> Any:
        pipe = pipeline(*args, **named)
        pipe.model.ops = replace(pipe.model.ops, linear=wrong)
        return pipe

    monkeypatch.setattr(cli, "pipeline", functools.partial(pipeline, pipeline=cli.pipeline))
    status, rows = verify("--backend", "eager", *args)
    assert status == 1
    assert {name for name, row in rows.items() if not row["right"] and not name.startswith(("model", "top"))} == {found}


def test_the_table_is_for_people(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "--model", str(checkpoint), "--backend", "eager", "--text", TEXT]) == 0
    first, header, *rows = capsys.readouterr().out.splitlines()
    assert first == "eager, as asked; float32, 1 texts"
    assert header.split() == ["operation", "calls", "error", "eager's", "error", "bound"]
    assert rows[0].split()[:2] == ["embed", "3"]
