"""The benchmarks' tools: what is wrong is not timed, what is slower is reported, a round goes on where it stopped."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import compare, harness, ncu, plots, report, roofline
from bench import round as bench_round


def scale(x: Tensor) -> Tensor:
    return x * 2


def case(**providers: Any) -> harness.Case:
    def inputs() -> tuple[Any, ...]:
        return (torch.randn(64, 8),)

    ways = {"xlmr eager": scale, **providers}
    return harness.Case(
        "scale", "scale", "T", "rows", 64, inputs, ways, lambda mode: (512, 4096), (0,), {"dtype": "fp32"}
    )


@pytest.fixture(autouse=True)
def known_roofs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "roofs", lambda dtype: (1e12, 1e9))


def rows(**providers: Any) -> list[dict[str, Any]]:
    return list(harness.measure(case(**providers), ["forward"], seconds=0.01))


def test_what_is_wrong_or_missing_is_not_timed(capsys: pytest.CaptureFixture[str]) -> None:
    def missing(x: Tensor) -> Tensor:
        raise ImportError("no such library")

    measured = list(harness.measure(case(wrong=lambda x: x * 2.001, right=scale, missing=missing), seconds=0.01))
    assert {(row["kernel_provider"], row["kernel_operation_mode"]) for row in measured} == {
        (provider, mode) for provider in ("xlmr eager", "right") for mode in harness.MODES
    }
    said = capsys.readouterr().err
    assert "wrong is wrong by" in said
    assert "missing cannot run: no such library" in said
    row = measured[0]
    assert set(row) == set(harness.COLUMNS)
    assert row["roof"] == "bandwidth"
    assert row["fraction_of_roof"] == pytest.approx(4096 / 1e9 / (row["y_value_50"] / 1e3))


def test_a_wrong_gradient_is_not_timed() -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            return dy * 2.001

    measured = list(harness.measure(case(wrong=Wrong.apply), seconds=0.01))
    assert [row["kernel_operation_mode"] for row in measured if row["kernel_provider"] == "wrong"] == ["forward"]


def test_a_slowed_provider_is_a_regression(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slowed(x: Tensor) -> Tensor:
        time.sleep(0.002)
        return x * 2

    before, after = tmp_path / "a.csv", tmp_path / "b.csv"
    harness.append(before, rows(ours=scale, other=scale))
    harness.append(after, rows(ours=slowed))
    for a, b, code in ((before, after, 1), (before, before, 0), (after, before, 0)):
        monkeypatch.setattr(sys, "argv", ["compare", str(a), str(b)])
        assert compare.main() == code
    monkeypatch.setattr(sys, "argv", ["compare", str(before), str(tmp_path)])
    with pytest.raises(SystemExit, match="no CSV file"):
        compare.main()


def test_nsight_compute(tmp_path: Path) -> None:
    columns = ["ID", "Kernel Name", ncu.TIME, ncu.BYTES, ncu.FMA, "sm__ops_path_tensor_src_bf16_dst_fp32.sum"]
    lines = [
        "==PROF== Connected",
        *(
            ",".join(f'"{value}"' for value in line) + "\n"
            for line in (
                columns,
                ["", "", "ns", "Mbyte", "inst", "inst"],
                ["0", "_linear_fwd_kernel", "1,000,000", "200", "0", "4,000,000,000"],
                ["1", "_linear_fwd_kernel", "1,000,000", "200", "500,000,000", "0"],
                ["2", "_layer_norm_fwd_kernel", "3,000,000", "1", "0", ""],
            )
        ),
    ]
    first, second = ncu.read(lines)
    assert second == {
        "name": "_linear_fwd_kernel", "launches": 2, "ms": pytest.approx(2.0), "gbytes": pytest.approx(0.4),
        "gflops": pytest.approx(5.0), "gbytes_per_s": pytest.approx(200.0), "gflops_per_s": pytest.approx(2500.0),
    }  # fmt: skip
    assert first["name"] == "_layer_norm_fwd_kernel"
    with pytest.raises(ValueError, match=r"no columns .*dram__bytes"):
        ncu.read(['"Kernel Name","Duration"\n', '"a","1"\n'])


def test_roofs_come_back_from_the_rows(tmp_path: Path) -> None:
    compute = {**rows()[0], "roof": "compute", "gflops": 4.0, "y_value_50": 10.0, "fraction_of_roof": 0.4}
    found = roofline.roofs([*rows(), compute])
    assert found == {"fp32": (pytest.approx(1e12), pytest.approx(1e9))}
    picture = plots.roofline(roofline.points([compute], "xlmr eager", "forward"), found, tmp_path / "roofs.svg")
    assert "<svg" in picture.read_text(encoding="utf-8")


def test_a_round_goes_on_and_ends_in_a_page(tmp_path: Path) -> None:
    count = f"open({str(tmp_path / 'runs')!r}, 'a').write('x')"
    todo = [
        bench_round.Part("once", (sys.executable, "-c", count), 0.5),
        bench_round.Part("broken", (sys.executable, "-c", f"{count}; exit(3)"), 0.5),
    ]
    for runs in ("xx", "xxx"):  # what is done is not done again, what failed is
        state = bench_round.measure(todo, tmp_path, minutes=1)
        assert state["once"] == "done"
        assert state["broken"].startswith("failed (exit 3)")
        assert (tmp_path / "runs").read_text() == runs
    assert bench_round.measure([bench_round.Part("late", ("false",), 1.0)], tmp_path, 0)["late"] == "out of time"
    environment = {**harness.environment(), "gpu": "<GPU>"}
    (tmp_path / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    harness.append(tmp_path / "kernels.csv", [{**rows()[0], "x_value": x} for x in (1, 2)])
    page = report.write(tmp_path, state).read_text(encoding="utf-8")
    assert "&lt;GPU&gt;" in page
    assert page.count("<svg") == 1
    assert "failed (exit 3)" in page
