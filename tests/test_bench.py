"""The benchmarks' tools: what is wrong is not timed, what is slower is reported, a round goes on where it stopped."""

import csv
import dataclasses
import functools
import importlib.util
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.utils.flop_counter
import transformers
from torch import Tensor

import xlmr
from bench import (
    bench_attention,
    bench_model,
    bench_peers,
    bench_training,
    bench_vocab_softmax,
    compare,
    forward,
    gpu_tests,
    harness,
    ncu,
    plots,
    profile,
    providers,
    report,
    roofline,
    shapes,
    study,
    sweep,
)
from bench import round as bench_round


def scale(x: Tensor) -> Tensor:
    return x * 2


def case(**providers: Any) -> harness.Case:
    def inputs() -> tuple[Any, ...]:
        return (torch.randn(64, 8),)

    ways = {"xlmr eager": scale, **providers}
    return harness.Case(
        "scale", "scale", "T", "rows", 64, inputs, ways, lambda backward: (512, 4096), (0,), {"dtype": "fp32"}
    )


@pytest.fixture(autouse=True)
def known_roofs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("roofs", "measured_roofs"):
        monkeypatch.setattr(harness, name, lambda dtype: (1e12, 1e9))


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


def test_a_sweep_is_cut_to_the_cases_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(expression: str) -> int:
        out = str(tmp_path / "out.csv")
        monkeypatch.setattr(sys, "argv", ["bench", "--cases", expression, "--dtype", "fp32", "--out", out])
        cases = [case(), dataclasses.replace(case(), x_value=128)]
        return sweep.main("bench_scale", None, lambda dtype: cases)

    assert run("T=128") == 0
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as lines:
        assert {row["x_value"] for row in csv.DictReader(lines)} == {"128"}
    with pytest.raises(SystemExit, match="'T=9' finds no shape"):
        run("T=9")
    assert [point.N for point in sweep.points(widths=(384, 768)) if point.x_name == "N"] == [384, 768]


def test_what_is_wrong_or_fails_of_our_own_ends_the_command() -> None:
    def failing(x: Tensor) -> Tensor:
        raise RuntimeError("illegal memory access")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        rows(**{"xlmr triton": failing})
    with pytest.raises(RuntimeError, match="xlmr triton is wrong by"):
        rows(**{"xlmr triton": lambda x: x * 2.001})


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
    harness.append(before, rows(**{"xlmr triton": scale, "torch": scale}))
    harness.append(after, rows(**{"xlmr triton": slowed}))
    for a, b, code in ((before, after, 1), (before, before, 0), (after, before, 0)):
        monkeypatch.setattr(sys, "argv", ["compare", str(a), str(b)])
        assert compare.main() == code
    monkeypatch.setattr(sys, "argv", ["compare", str(before), str(tmp_path)])
    with pytest.raises(SystemExit, match="no CSV or JSON file"):
        compare.main()


@pytest.mark.parametrize(("times", "code"), [({}, 0), ({"xlmr triton": 1.3}, 1), ({"torch": 0.7}, 1)])
def test_a_slower_machine_is_no_regression(
    times: dict[str, float], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice as slow that day; what other libraries took, interleaved with ours, tells."""
    files = tmp_path / "a.csv", tmp_path / "b.csv"
    for file, day in zip(files, (1.0, 2.0), strict=True):
        for row in rows(**{"xlmr triton": scale, "torch": scale}):
            own = day if day == 1 else day * times.get(row["kernel_provider"], 1.0)
            timed = {name: own * ms for name, ms in (("y_value_20", 0.99), ("y_value_50", 1.0), ("y_value_80", 1.01))}
            harness.append(file, [{**row, **timed}])
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, files)])
    assert compare.main() == code


def test_a_slowed_model_is_a_regression(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = harness.RESULTS / "round_cpu/models.json"
    results = json.loads(stored.read_text(encoding="utf-8"))
    results["rows"][1] |= {name: 2 * results["rows"][1][name] for name in ("median_ms", "q20_ms", "q80_ms")}
    harness.write(tmp_path / "models.json", results)
    for after, code in ((tmp_path, 1), (stored, 0)):
        monkeypatch.setattr(sys, "argv", ["compare", str(stored), str(after)])
        assert compare.main() == code
    assert capsys.readouterr().out.count("REGRESSION") == 1


def ncu_lines(columns: list[str], *rows: list[str]) -> list[str]:
    """What ncu --csv --page raw prints: the program's own words, names, units, a line a launch."""
    names = ["ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream", "Block Size",
             "Grid Size", "Device", "CC"]  # fmt: skip
    launch = ["0", "19963", "python", "127.0.0.1", "", "1", "7", "(256, 1, 1)", "(16384, 1, 1)", "0", "9.0"]
    lines = [[*names, *columns], *([*([""] * 11 if not kernel else launch), *rest] for kernel, *rest in rows)]
    for line, (kernel, *_) in zip(lines[1:], rows, strict=True):
        line[4] = kernel
    return ["==PROF== Connected to process 19963\n", *(",".join(f'"{v}"' for v in line) + "\n" for line in lines)]


def test_nsight_compute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fma, tensor = "smsp__sass_thread_inst_executed_op_ffma_pred_on.sum", "sm__ops_path_tensor_src_bf16_dst_fp32"
    columns = [ncu.BYTES, ncu.TIME, f"{tensor}.sum", f"{tensor}_sparsity_off.sum", fma]
    lines = ncu_lines(
        columns,
        ["", "Mbyte", "ns", "", "", "inst"],
        ["_linear_fwd_kernel", "200", "1,000,000", "4,000,000,000", "4,000,000,000", "0"],
        ["_linear_fwd_kernel", "200", "1,000,000", "0", "0", "500,000,000"],
        ["_layer_norm_fwd_kernel", "1", "3,000,000", "n/a", "n/a", "0"],
    )
    first, second = ncu.read(lines)
    assert second == {
        "name": "_linear_fwd_kernel", "launches": 2, "ms": pytest.approx(2.0), "gbytes": pytest.approx(0.4),
        "gflops": pytest.approx(5.0), "gbytes_per_s": pytest.approx(200.0), "gflops_per_s": pytest.approx(2500.0),
    }  # fmt: skip
    assert (first["name"], first["gflops"]) == ("_layer_norm_fwd_kernel", 0)
    with pytest.raises(ValueError, match=r"no columns .*dram__bytes"):
        ncu.read(['"Kernel Name","Duration"\n', '"a","1"\n'])
    with pytest.raises(ValueError, match=r"gpu__time_duration.sum in 'hour': allowed are ns"):
        ncu.read(ncu_lines([ncu.BYTES, ncu.TIME], ["", "byte", "hour"], ["kernel", "1", "1"]))
    with pytest.raises(ValueError, match=r"kernel: dram__bytes.sum is n/a"):
        ncu.read(ncu_lines([ncu.BYTES, ncu.TIME], ["", "byte", "ns"], ["kernel", "n/a", "1"]))
    (tmp_path / "ncu.csv").write_text("".join(lines), encoding="utf-8")
    out = tmp_path / "ncu.svg"
    roofs = str(harness.RESULTS / "round_cpu/kernels.csv")
    monkeypatch.setattr(sys, "argv", ["ncu", str(tmp_path / "ncu.csv"), "--roofs", roofs, "--out", str(out)])
    assert ncu.main() == 0
    assert "<svg" in out.read_text(encoding="utf-8")


def test_roofs_come_back_from_the_rows(tmp_path: Path) -> None:
    compute = {**rows()[0], "roof": "compute", "gflops": 4.0, "y_value_50": 10.0, "fraction_of_roof": 0.4}
    disturbed = {**compute, "fraction_of_roof": 0.9}
    found = roofline.roofs([*rows(), compute, disturbed])
    assert found == {"fp32": (pytest.approx(1e12), pytest.approx(1e9))}
    picture = plots.roofline(
        roofline.points([compute], "xlmr eager", "forward"), found, tmp_path / "roofs.svg", "A title"
    )
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
    unfinished = bench_round.Part("unfinished", (sys.executable, "-c", f"exit({harness.UNFINISHED})"), 1.0)
    assert bench_round.run(unfinished, tmp_path, 20) == "out of time"
    environment = {**harness.environment(), "gpu": "<GPU>"}
    (tmp_path / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    harness.append(tmp_path / "kernels.csv", [{**rows()[0], "x_value": x} for x in (1, 2)])
    page = report.write(tmp_path, state).read_text(encoding="utf-8")
    assert "&lt;GPU&gt;" in page
    assert page.count("<svg") == 1
    assert "failed (exit 3)" in page


@pytest.mark.parametrize("mixed", [False, True])
def test_padded_attention_pays_for_padding_alone(mixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of equal lengths are a rectangle as they lie: no copy and no mask, which would flatter the others."""
    monkeypatch.setattr(bench_attention, "TOKENS", 64)
    case = bench_attention.case("fp32", 16, mixed)
    given, sdpa = case.inputs(), torch.nn.functional.scaled_dot_product_attention
    expected = case.providers["xlmr eager"](*given)
    seen: dict[str, Any] = {}

    def watched(*qkv: Tensor, attn_mask: Tensor | None, **settings: Any) -> Tensor:
        seen.update(copied=qkv[0].data_ptr() != given[0].data_ptr(), mask=attn_mask)
        return sdpa(*qkv, attn_mask=attn_mask, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    torch.testing.assert_close(bench_attention.padded(None)(*given), expected)
    assert (seen["copied"], seen["mask"] is not None) == (mixed, mixed)


def test_a_machine_without_its_tools_is_measured_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("PATH", "")
    assert harness._nvidia("driver_version") is harness._commit() is None


def event(category: str, name: str, begin: float, duration: float, thread: int = 1, launch: int = 0) -> dict[str, Any]:
    return {"cat": category, "name": name, "pid": 9, "tid": thread, "ts": begin, "dur": duration,
            "args": {"correlation": launch} if launch else {}}  # fmt: skip


def test_kernels_belong_to_the_operation_that_launched_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no operation of torch did, and whatever runs meanwhile; a range's shadow on the GPU counts nothing."""
    node = "autograd::engine::evaluate_function: LinearBackward"
    events = [
        {"ph": "M", "name": "process_name"},
        event("user_annotation", "step", 0, 90), event("user_annotation", "xlmr.linear", 10, 20),
        event("gpu_user_annotation", "xlmr.linear", 0, 1000, thread=7), event("cpu_op", node, 50, 9, thread=2),
        event("cuda_driver", "cuLaunchKernelEx", 12, 2, launch=1), event("kernel", "_fwd", 500, 3000, 7, 1),
        event("cuda_driver", "cuLaunchKernelEx", 14, 2, launch=2), event("kernel", "_fwd", 500, 1000, 7, 2),
        event("cuda_runtime", "cudaLaunchKernel", 52, 2, 2, 3), event("kernel", "_bwd", 600, 500, 7, 3),
        event("cuda_runtime", "cudaMemcpyAsync", 40, 2, launch=4), event("gpu_memcpy", "Memcpy", 700, 100, 7, 4),
        event("kernel", "of a graph", 800, 100, 7, 5),
    ]  # fmt: skip
    monkeypatch.setattr(profile, "STEPS", 2)
    found = profile.kernels(events)
    assert found == {
        ("linear", "_fwd"): [3, 1], ("backward, LinearBackward", "_bwd"): [0.5],
        ("everything else", "Memcpy"): [0.1], ("everything else", "of a graph"): [0.1],
    }  # fmt: skip
    assert profile.on_the_gpu(found) == {"linear": 2, "backward, LinearBackward": 0.25}
    longest = profile.kernel_rows(found, {"linear": 1.0}, whole=4.0)[0]
    assert longest == {
        "kernel": "_fwd", "operation": "linear", "calls": 1, "ms": 2, "share": 0.5, "fraction_of_roof": 0.5
    }  # fmt: skip


@pytest.mark.usefixtures("tiny")
def test_a_profile_of_both_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "BASE", TINY)
    monkeypatch.setattr(profile, "batch", functools.partial(shapes.batch, vocabulary=TINY["vocab_size"]))
    monkeypatch.setattr(profile, "STEPS", 1)
    monkeypatch.setattr(profile, "kernels", lambda events: {("linear", "_linear_fwd_kernel"): [1.0]})  # as on a GPU
    monkeypatch.setattr(sys, "argv", ["profile", "--layers", "1", "--dtype", "fp32", "--out", str(tmp_path)])
    assert profile.main() == 0
    for name, expected in (("forward", "attention"), ("training", "backward, AddmmBackward0")):
        assert {path.name for path in (tmp_path / name).iterdir()} == {
            "trace.json", "operations.json", "operations.svg", "kernels.svg",
        }  # fmt: skip
        page = report._profile(tmp_path / name / "operations.json")
        assert (page.count("<svg"), "_linear_fwd_kernel" in page) == (2, True)
        found = {row["operation"]: row for row in json.loads((tmp_path / name / "operations.json").read_text())["rows"]}
        assert found[expected]["ms"] > 0
        assert sum(row["share"] for row in found.values()) == pytest.approx(1)
        assert found["embed"]["calls"] == 1


def test_a_kernel_is_timed_with_the_host_ahead_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events in an idle queue would time the launching: tens of microseconds where a kernel takes three."""
    done: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None: ...

        def record(self) -> None:
            done.append("event")

        def synchronize(self) -> None: ...

        def elapsed_time(self, end: Any) -> float:
            return 2.0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", done.append)
    times = harness.interleaved({"kernel": lambda: done.append("call")}, rounds=1, warm_up=0, lead=7)
    assert (times, done) == ({"kernel": [0.002]}, [7, "event", "call", "event"])
    harness.interleaved({"model": lambda: done.append("call")}, rounds=1, warm_up=0)
    assert done[4:] == ["event", "call", "event"]


def test_a_part_out_of_time_leaves_no_process_behind(tmp_path: Path) -> None:
    """As the tests on a GPU and the compiler's workers are: processes of a part's own, which would disturb the next."""
    code = "import subprocess; child = subprocess.Popen(['sleep', '60']); print(child.pid, flush=True); child.wait()"
    part = bench_round.Part("late", (sys.executable, "-c", code), 1.0)
    assert bench_round.run(part, tmp_path, 2) == "out of time"
    ended((tmp_path / "logs/late.txt").read_text())


def test_a_round_that_is_ended_ends_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import os, signal, time; print(os.getpid(), flush=True); os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    )
    part = bench_round.Part("part", (sys.executable, "-c", code), 1.0)
    monkeypatch.setattr(bench_round, "parts", lambda *_: [part])
    monkeypatch.setattr(sys, "argv", ["round", "--out", str(tmp_path)])
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit, match="143"):
            bench_round.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    ended((tmp_path / "logs/part.txt").read_text())


def ended(process: str) -> None:
    """Waits for its end."""
    child = Path("/proc", process.strip(), "stat")
    deadline = time.monotonic() + 5
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "it goes on"
        time.sleep(0.05)


def test_every_test_on_a_gpu_is_in_one_share(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    argv = ["gpu_tests", "--processes", "2", "--out", str(tmp_path), "--", "--collect-only", "tests/test_dropout.py"]
    monkeypatch.setattr(sys, "argv", argv)
    assert gpu_tests.main() == 0
    shares = [re.findall(r"tests/\S+::\S+", path.read_text()) for path in tmp_path.iterdir()]
    assert sorted(map(len, shares)) == [3, 3]
    assert len({*shares[0], *shares[1]}) == 6  # those that take no device are in none

    def start(log: Path, number: int, *_: Any) -> Any:
        log.write_text("said\n")
        return subprocess.Popen([sys.executable, "-c", f"exit({number})"])

    monkeypatch.setattr(gpu_tests, "start", start)
    assert gpu_tests.main() == 1


TINY = {
    **shapes.BASE, "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64,
}  # fmt: skip


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SIZES, "base", TINY)


def model_case(head: str = "Model", **settings: Any) -> shapes.Case:
    return shapes.Case("4 texts", (9, 4, 7, 5), "fp32", "mix", head=head, **settings)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("head", shapes.HEADS)
def test_a_model_case(head: str) -> None:
    found = forward.measure(model_case(head), 3, ["transformers eager", "xlmr eager", "xlmr triton", providers.GRAPH])
    assert [row["provider"] for row in found.rows[:2]] == ["transformers eager", "xlmr eager"]
    for row in found.rows:
        assert row["max_difference"] < 1e-4
        assert row["tokens_per_s"] == pytest.approx(25e3 / row["median_ms"])
        assert row["padding"] == pytest.approx(1 - 25 / 36)
        assert "ratio" not in row  # transformers sdpa judged and was not measured
    if not torch.cuda.is_available():
        assert {each["provider"]: each["reason"] for each in found.not_run} == {
            "xlmr triton": "needs a GPU", providers.GRAPH: "needs a GPU",
        }  # fmt: skip


@pytest.mark.usefixtures("tiny")
def test_utilisation_is_of_the_best_roof_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter((2e12, 3e12, 1e12))
    monkeypatch.setattr(forward, "ROOFS", {})
    monkeypatch.setattr(harness, "measured_roofs", lambda dtype: (next(rates), 1e9))
    todo = [(str(i), lambda: forward.measure(model_case(), 3, ["xlmr eager"])) for i in range(3)]
    results, _ = bench_model.run(todo, tmp_path / "m.json", minutes=1)
    for row in results["rows"]:
        assert row["mfu"] == pytest.approx(model_case().flops() / (row["median_ms"] / 1e3) / 3e12)
    assert len(results["rows"]) == 3


def test_flops_are_those_that_torch_counts() -> None:
    for head in ("Model", "ForMaskedLM"):
        case = shapes.Case("2 texts", (8, 8), "fp32", "fixed", "tiny", head)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(shapes.SIZES, "tiny", TINY)
            call = providers.PROVIDERS["transformers eager"](providers.prepare(case))
            with torch.no_grad(), torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
                call()
            assert counter.get_total_flops() == case.flops()


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("wrong", ["one value", "everything a little", "no mask", "nan"])
def test_a_wrong_model_stops_the_measurement(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def planted(given: providers.Setting) -> providers.Call:
        def call() -> dict[str, Tensor]:
            mask = None if wrong == "no mask" else given.mask
            out = given.reference(given.ids, attention_mask=mask).last_hidden_state.clone()
            if wrong == "one value":
                out[2, 3, 5] += 0.01
            elif wrong == "everything a little":
                out *= 1.0005
            elif wrong == "nan":
                out[1, 0, 0] = float("nan")
            return {"last_hidden_state": out}

        return call

    monkeypatch.setitem(providers.PROVIDERS, "xlmr eager", planted)
    monkeypatch.setattr(forward, "timed", lambda *args: pytest.fail("timed beside a wrong output"))
    todo = [("planted", lambda: forward.measure(model_case(providers=shapes.PAIR), 3))]
    results, right = bench_model.run(todo, tmp_path / "m.json", minutes=1)
    assert not right
    assert results["rows"] == []
    assert "WRONG: xlmr eager differs by" in capsys.readouterr().err


def test_training_steps_with_a_wrong_gradient_are_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_training, "BASE", TINY)
    monkeypatch.setattr(bench_training, "peak_memory", lambda *task: 1.0)
    path = tmp_path / "training.json"
    args = SimpleNamespace(layers=1, vocab=97, rounds=3, out=path, json=True)
    assert bench_training.main(args) == 0
    found = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert [(row["dtype"], row["provider"]) for row in found] == [(d, p) for d in shapes.DTYPES for p in shapes.PAIR]
    assert all(row["peak_mib"] == 1.0 for row in found)
    true = bench_training.gradients

    def wrong(model: Any, *given: Any) -> Any:
        return tuple(g * (1.0002 if isinstance(model, xlmr.XLMRobertaForMaskedLM) else 1) for g in true(model, *given))

    monkeypatch.setattr(bench_training, "gradients", wrong)
    with pytest.raises(SystemExit, match=r"xlmr eager fp32: gradients differ by 0\.0002"):
        bench_training.measure("fp32", [9, 4], TINY, 3)


@pytest.mark.usefixtures("tiny")
def test_the_packed_ways_are_right_but_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU alone can run, with a plain loop in flash attention's place and no graph around the call."""

    def loop(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, *, scaling: float, **given: Any) -> Any:
        assert mask is None
        assert given["max_length_q"] == given["max_length_k"] == 9
        ends = given["cu_seq_lens_q"].tolist()
        texts = [slice(a, b) for a, b in itertools.pairwise(ends)]
        parts = [torch.nn.functional.scaled_dot_product_attention(*(t[:, :, at] for t in (q, k, v))) for at in texts]
        return torch.cat(parts, dim=2).transpose(1, 2), None

    monkeypatch.setattr(providers, "FLASH", "planted")
    monkeypatch.setattr(providers, "_need_gpu", lambda: None)
    monkeypatch.setattr(providers, "_need_package", lambda name: None)
    monkeypatch.setattr(providers, "captured", lambda call: call)
    own = providers.own
    monkeypatch.setattr(providers, "own", lambda backend, *given: own("eager", *given))
    transformers.AttentionInterface.register("planted", loop)
    names = "transformers flash", providers.GRAPH
    with torch.inference_mode():
        given = providers.prepare(dataclasses.replace(model_case(), dtype="bf16"))  # flash attention has no fp32
        calls, differences = forward.checked(given, names, forward.Found())
    assert tuple(calls) == names
    assert max(differences.values()) < 0.1


@pytest.mark.usefixtures("tiny")
def test_what_is_not_measured_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = forward.measure(model_case(providers=shapes.PAIR), 3)
    others = set(providers.PROVIDERS) - set(shapes.PAIR)
    assert {each["provider"] for each in found.not_run} == others
    assert "transformers compiled" in capsys.readouterr().err
    assert found.rows[0]["ratio"] == 1

    def breaks(given: providers.Setting) -> providers.Call:
        raise torch.OutOfMemoryError("out of memory\nand a long story")

    def fails(given: providers.Setting) -> providers.Call:
        raise TypeError("no such argument")

    monkeypatch.setitem(providers.PROVIDERS, "xlmr eager", breaks)
    assert forward.measure(model_case(), 3, ["xlmr eager"]).not_run[0]["reason"] == "out of memory"
    monkeypatch.setitem(providers.PROVIDERS, "transformers eager", fails)  # what this machine lacks
    assert forward.measure(model_case(), 3, ["transformers eager"]).not_run[0]["reason"] == "no such argument"
    monkeypatch.setitem(providers.PROVIDERS, "xlmr eager", fails)
    with pytest.raises(forward.Wrong, match="xlmr eager failed: no such argument"):
        forward.measure(model_case(), 3, ["xlmr eager"])
    monkeypatch.setattr(forward, "predicted", lambda case: 11.6)
    too_long = forward.measure(model_case(), 3)
    assert (too_long.rows, too_long.not_run[0]["reason"]) == ([], "a call would take about 12 s")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert {each["provider"] for each in bench_model.runtimes(1).not_run} == {"onnx runtime", "ctranslate2"}
    assert not bench_peers.installed("onnx runtime", "onnxruntime")


def test_a_time_limit_ends_the_models_and_results_stand_after_every_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "models.json"

    def job(name: str, seconds: float) -> forward.Found:
        if name == "second":
            assert [row["case"] for row in json.loads(path.read_text(encoding="utf-8"))["rows"]] == ["first"]
        time.sleep(seconds)
        return forward.Found([{"case": name}])

    todo = [(name, lambda name=name, s=s: job(name, s)) for name, s in (("first", 0), ("second", 0.3), ("third", 0))]
    results, right = bench_model.run(todo, path, minutes=0.2 / 60)
    assert right
    assert [row["case"] for row in results["rows"]] == ["first", "second"]
    assert results["not_run"] == [{"case": "third", "provider": "all", "reason": "the 0.00333333 minutes were over"}]
    assert json.loads(path.read_text(encoding="utf-8")) == results
    assert [file.name for file in tmp_path.iterdir()] == ["models.json"]
    left = [(name, lambda name=name: forward.Found([{"case": f"{name}, later"}])) for name, _ in todo]
    results, _ = bench_model.run(left, path, minutes=1, resume=True)
    assert [row["case"] for row in results["rows"]] == ["first", "second", "third, later"]
    assert (results["not_run"], results["done"]) == ([], ["first", "second", "third"])
    monkeypatch.setattr(harness, "_commit", lambda: "another")
    results, _ = bench_model.run(left, path, minutes=1, resume=True)
    assert [row["case"] for row in results["rows"]] == ["first, later", "second, later", "third, later"]


def test_the_cases_cover_what_they_should() -> None:
    for gpu in (False, True):
        found = shapes.cases(gpu)
        assert len({case.title for case in found}) == len(found)
        assert [case.group for case in found[:4]] == ["headline"] * 4
        assert {case.head for case in found} == set(shapes.HEADS)
        assert {case.text.split(",")[0] for case in found if case.group == "mix"} == set(shapes.MIXES)
        assert {case.size for case in found} == set(shapes.SIZES)
        assert {name for case in found for name in case.providers or ()} <= set(providers.PROVIDERS)
        assert any(case.providers is None for case in found)
    lengths = {case.lens[0] for case in shapes.cases(gpu=True) if case.group == "fixed"}
    assert lengths == {32, 64, 128, 256, 512, 1024, 2048, 4096, 8192}


def test_models_are_drawn(tmp_path: Path) -> None:
    common = {"dtype": "bf16", "provider": "xlmr eager", "size": "base", "median_ms": 1.0}
    rows = [
        {**common, "case": f"fixed, {S}", "group": "fixed", "longest": S, "tokens_per_s": 1e6 / S} for S in (32, 64)
    ]
    rows.append({**common, "dtype": "fp32", "case": "fixed, 8", "group": "fixed", "longest": 8, "tokens_per_s": 1e6})
    rows.append({**common, "case": "queries", "group": "mix", "longest": 64, "tokens_per_s": 1e5})
    results = {"rows": rows, "not_run": [{"case": "queries", "provider": "<flash>", "reason": "needs a GPU"}]}
    harness.write(tmp_path / "models.json", results)
    (tmp_path / "environment.json").write_text(json.dumps(harness.environment()), encoding="utf-8")
    page = report.write(tmp_path, {}).read_text(encoding="utf-8")
    assert page.count("<svg") == 2  # one length alone makes no line
    assert "&lt;flash&gt;" in page
    shutil.copy(harness.RESULTS / "round_cpu/models.json", tmp_path)  # what is committed can be shown
    assert "32 texts, 40% fill" in report.write(tmp_path, {}).read_text(encoding="utf-8")


def test_the_study_of_tiles_has_those_of_the_table() -> None:
    pytest.importorskip("triton")
    table = importlib.import_module("xlmr.kernels.attention").CONFIGS["sm_90"]
    found = study._tiles()
    assert {table[64, 2, load] for load in ("short", "long")} <= set(found.values())
    assert len(set(found.values())) == len(found) > 40
    ways = {"fails": lambda x: 1 / 0, "wrong": lambda x: x * 2.001, "right": lambda x: x + x}
    assert list(study.right(case(), ways)) == ["right"]


@pytest.mark.usefixtures("tiny")
def test_the_studies_check_what_they_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "HERE", tmp_path)
    monkeypatch.setattr(study, "BASE", TINY)
    monkeypatch.setattr(bench_vocab_softmax, "WORDS", 500)
    monkeypatch.setattr(harness, "peak_of", lambda call: 1 << 20)
    for name, pictures in (("packing", ["packing"]), ("vocabulary", ["vocabulary-memory", "vocabulary-time"])):
        monkeypatch.setattr(sys, "argv", ["study", name])
        assert study.main() == 0
        assert len(json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))["milliseconds"]) == 2
        assert [path.stem for path in sorted(tmp_path.glob(f"{name}*.svg"))] == pictures
    monkeypatch.setitem(
        bench_vocab_softmax.LOSSES, "torch", lambda *given: 1.001 * study.EAGER.vocab_cross_entropy(*given)
    )
    with pytest.raises(RuntimeError, match="torch, logits in memory is wrong by"):
        study.main()


def test_the_committed_bytes_are_those_that_cost_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed = json.loads((study.HERE / "traffic.json").read_text(encoding="utf-8"))
    monkeypatch.setattr(study, "HERE", tmp_path)
    assert study.traffic() == {name: committed[name] for name in ("fused_mb", "apart_mb")}
