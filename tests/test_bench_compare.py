"""bench.compare: what is slower beyond noise and drift is reported, and nothing else."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT

from bench import compare, harness
from bench.command import exit_with

STORED = harness.RESULTS / "round_cpu"
BENCH = sorted(Path(harness.__file__).parent.glob("*.py"))
TIMES = ("y_value_20", "y_value_50", "y_value_80")
Factor = Callable[[compare.Key], float]


def times(run: compare.Run, factor: Factor) -> compare.Run:
    return {key: {**row, **{name: factor(key) * float(row[name]) for name in TIMES}} for key, row in run.items()}


def another_day(run: compare.Run, seed: int) -> compare.Run:
    """The same code as four stored rounds show it: every point's drift within 10 %, every provider's own within 1.5 %,
    and one in a hundred with a disturbance that its quantiles show."""
    draw = random.Random(seed)
    drift = {point: draw.lognormvariate(0.05, 0.1) for point in sorted(map(compare._point, run))}
    later = times(run, lambda key: drift[compare._point(key)] * draw.lognormvariate(0.0, 0.015))
    for key in draw.sample(sorted(later), len(later) // 100):
        later[key] |= {"y_value_50": 1.4 * later[key]["y_value_50"], "y_value_80": 2 * later[key]["y_value_80"]}
    return later


def slower(before: compare.Run, after: compare.Run) -> set[tuple[str, str]]:
    """Operation and mode of what is reported."""
    lines = compare.compare(before, after)
    return {(r["kernel_name"], r["kernel_operation_mode"]) for r in lines if r["verdict"] == "REGRESSION"}


@pytest.fixture(scope="module")
def kernels() -> compare.Run:
    return compare.read(STORED / "kernels.csv")


def test_the_same_code_on_another_day_has_not_become_slower(kernels: compare.Run) -> None:
    for seed in range(5):
        later = another_day(kernels, seed)
        assert not slower(kernels, later)
        assert not slower(later, kernels)


@pytest.mark.parametrize("operation", ["attention", "add_layer_norm", "gelu_layer_norm", "linear", "linear_act"])
def test_an_operation_that_is_six_percent_slower_is_reported(kernels: compare.Run, operation: str) -> None:
    """Two percent are within what a process makes of all its figures."""

    def by(factor: float) -> Factor:
        return lambda key: factor if key[0] == operation and compare._ours(key) else 1.0

    later = another_day(kernels, 0)
    assert (operation, "all") in slower(kernels, times(later, by(1.06)))
    assert not slower(kernels, times(later, by(1.02)))


def test_one_figure_that_is_slower_is_reported_alone(kernels: compare.Run) -> None:
    calm = min((key for key in kernels if compare._ours(key)), key=lambda key: spread(kernels[key]))
    later = times(another_day(kernels, 0), lambda key: 1.3 if key == calm else 1.0)
    found = [line for line in compare.compare(kernels, later) if line["verdict"] == "REGRESSION"]
    assert [tuple(line[name] for name in compare.KEY) for line in found] == [calm]
    assert found[0]["slower_%"] == pytest.approx(30, abs=6)


def spread(row: dict[str, Any]) -> float:
    return float(row["y_value_80"]) / float(row["y_value_20"])


def test_all_of_ours_slower_is_not_taken_for_noise(kernels: compare.Run) -> None:
    later = times(another_day(kernels, 0), lambda key: 1.15 if compare._ours(key) else 1.0)
    assert {("attention", "all"), ("embed", "all"), ("linear", "all")} <= slower(kernels, later)


def row(provider: str, ms: float, **facts: Any) -> dict[str, Any]:
    """A row of a CSV file with quantiles of 1 % around the median."""
    own = dict(zip(TIMES, (0.99 * ms, ms, 1.01 * ms), strict=True))
    return {"kernel_name": "scale", "kernel_provider": provider, "kernel_operation_mode": "forward", "x_name": "T",
            "x_value": 64, "gpu_name": "CPU: some", "torch": "2.13", **own, **facts}  # fmt: skip


@pytest.mark.parametrize(
    ("after", "code"),
    [
        ({"xlmr triton": 2.0, "torch": 2.0}, 0),
        ({"xlmr triton": 2.6, "torch": 2.0}, 1),
        ({"xlmr triton": 2.0, "torch": 1.4}, 1),
        ({"xlmr triton": 1.2}, 0),  # nobody else tells whether the machine was slower
        ({"xlmr triton": 2.0}, 1),
    ],
)
def test_a_slower_machine_is_no_regression(
    after: dict[str, float], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = tmp_path / "a.csv", tmp_path / "b.csv"
    for file, medians in zip(files, (dict.fromkeys(after, 1.0), after), strict=True):
        harness.append(file, [row(provider, ms) for provider, ms in medians.items()])
    monkeypatch.setattr("sys.argv", ["compare", *map(str, files)])
    assert compare.main() == code


def test_where_nobody_ran_beside_the_drift_is_that_of_all_others() -> None:
    def run(day: float, alone: float) -> compare.Run:
        shared = [row(provider, day, x_value=x) for provider in ("xlmr eager", "torch") for x in range(5)]
        rows = [*shared, row("xlmr eager", alone, x_value=9)]
        return {tuple(str(each.get(name, "")) for name in compare.KEY): each for each in rows}

    assert not slower(run(1.0, 1.0), run(1.5, 1.5))
    assert slower(run(1.0, 1.0), run(1.5, 1.9)) == {("scale", "forward")}


def test_a_slowed_model_is_a_regression(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = STORED / "models.json"
    results = json.loads(stored.read_text(encoding="utf-8"))
    results["rows"][1] |= {name: 2 * results["rows"][1][name] for name in ("median_ms", "q20_ms", "q80_ms")}
    results["environment"]["torch"] = "2.99"
    harness.write(tmp_path / "models.json", results)
    for after, code in ((tmp_path, 1), (stored, 0)):
        monkeypatch.setattr("sys.argv", ["compare", str(stored), str(after)])
        assert compare.main() == code
    said = capsys.readouterr()
    assert said.out.count("REGRESSION") == 1
    assert said.err.count("the runs differ in torch: ") == 1


def test_what_cannot_be_compared_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness.append(tmp_path / "a.csv", [row("xlmr eager", 1.0)])
    harness.append(tmp_path / "b.csv", [row("xlmr eager", 1.0, x_value=128)])
    for other, message in ((tmp_path, "no CSV or JSON file"), (tmp_path / "b.csv", "nothing can be compared")):
        monkeypatch.setattr("sys.argv", ["compare", str(tmp_path / "a.csv"), str(other)])
        with pytest.raises(SystemExit, match=message):
            compare.main()


def test_a_closed_pipe_ends_a_command_quietly() -> None:
    """What `| head` does."""
    command = [sys.executable, "-m", "bench.compare", str(STORED), str(STORED)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate()
    assert process.returncode == 141
    assert "Error" not in err


def test_a_file_that_is_not_there_is_one_line() -> None:
    with pytest.raises(SystemExit, match=r"^\[Errno 2\] No such file or directory: 'nowhere.csv'$"):
        exit_with(open, "nowhere.csv")


def test_what_a_command_runs_as_a_part_of_itself_says_so() -> None:
    done = subprocess.run([sys.executable, "-m", "bench.cold", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "bench.bench_model" in done.stdout


def test_every_command_ends_so() -> None:
    """Except for what others run as a part of themselves, which pass on a value."""
    ends = [path.read_text(encoding="utf-8").partition('if __name__ == "__main__":\n')[2] for path in BENCH]
    own = {path.name for path, end in zip(BENCH, ends, strict=True) if end and not end.startswith("    exit_with(")}
    assert own == {"bench_training.py", "cold.py"}
