"""The benchmarks' tools: what is wrong is not timed, a round goes on where it stopped."""

import csv
import dataclasses
import functools
import importlib.util
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.flop_counter
from processes import ROOT
from torch import Tensor

from bench import (
    bench_attention,
    bench_embedding,
    bench_layer_norm,
    bench_linear,
    bench_vocab_softmax,
    gpu_tests,
    harness,
    ncu,
    plots,
    profile,
    report,
    roofline,
    shapes,
    study,
    sweep,
)
from bench import round as bench_round

pytestmark = pytest.mark.usefixtures("known_roofs")


def scale(x: Tensor) -> Tensor:
    return x * 2


def case(**providers: Any) -> harness.Case:
    def inputs() -> tuple[Any, ...]:
        return (torch.randn(64, 8),)

    ways = {"xlmr eager": scale, **providers}
    return harness.Case(
        "scale", "scale", "T", "rows", 64, inputs, ways, lambda backward: (512, 4096), (0,), {"dtype": "fp32"}
    )


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


@pytest.mark.parametrize(
    ("script", "end"),
    [
        ("import bench.plots", r"\ANo module named 'matplotlib': pip install -c constraints.txt -e '.\[bench\]'\n"),
        ("import bench; 1 / 0", r"(?s)\ATraceback .* in <module>\n.*ZeroDivisionError: division by zero\n"),
    ],
)
def test_a_package_that_is_not_installed_is_one_line(script: str, end: str) -> None:
    command = [sys.executable, "-S", "-c", script]  # -S: without site-packages
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.fullmatch(end, done.stderr), done.stderr


def test_a_sweep_is_cut_to_the_cases_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(expression: str) -> int:
        out = str(tmp_path / "out.csv")
        monkeypatch.setattr(sys, "argv", ["bench", "--cases", expression, "--dtype", "fp32", "--out", out])
        cases = [case(), dataclasses.replace(case(), x_value=128)]
        return sweep.main("bench_scale", None, lambda dtype: cases)

    assert run("T=128") == 0
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as lines:
        assert {row["x_value"] for row in csv.DictReader(lines)} == {"128"}
    with pytest.raises(SystemExit, match=r"^--cases 'T=9' finds none of 2, such as 'scale: dtype=fp32, T=64'$"):
        run("T=9")


def test_every_kernel_is_swept_over_tokens_and_widths() -> None:
    for file in (bench_attention, bench_embedding, bench_layer_norm, bench_linear, bench_vocab_softmax):
        swept: dict[tuple[str, str], set[int]] = {}
        for case in file.cases("fp32"):
            swept.setdefault((case.operation, case.x_name), set()).add(case.x_value)
        for operation in {operation for operation, _ in swept}:
            assert swept[operation, "N"] == {384, 768, 1024, 2560}
            assert len(swept[operation, "S" if operation == "attention" else "T"]) > 1


def test_a_gpu_has_two_more_providers(monkeypatch: pytest.MonkeyPatch) -> None:
    """And to make them, which imports torch's compiler, warns of nothing that the tests take for an error."""
    monkeypatch.setattr(sweep, "GPU", True)
    found = sweep.providers("linear", {"torch": torch.nn.functional.linear})
    assert list(found) == ["xlmr eager", "torch", "torch.compile", "xlmr triton"]


def test_inputs_are_drawn_once_and_gradients_judged_once_for_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing a large weight takes longer than multiplying with it, and float64 longer than all providers."""
    monkeypatch.setattr(harness, "_cache_bytes", lambda: 0)  # no copies, as on a GPU of what its cache would hold
    calls: list[str] = []

    def judge(x: Tensor) -> Tensor:
        calls.append(str(x.dtype))
        return x * 2

    watched = dataclasses.replace(case(), providers={"xlmr eager": judge})
    drawn = dataclasses.replace(watched, inputs=lambda: calls.append("drawn") or (torch.randn(64, 8),))
    measured = list(harness.measure(drawn, seconds=0.01))
    assert len(measured) == len(harness.MODES)
    assert (calls.count("drawn"), calls.count("torch.float64")) == (1, 2)


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


def test_the_parts_left_divide_the_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    monkeypatch.setattr(bench_round, "run", lambda part, out, seconds: given.append(seconds) or "done")
    weights = {"slow": 60, "quick": 15, "small": 1, "last": 24}
    bench_round.measure([bench_round.Part(name, (), weight) for name, weight in weights.items()], tmp_path, 2)
    assert given == pytest.approx([72, 45, 10, 120], abs=1)  # what a part does not need is the others'


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


def test_a_profile_of_both_steps(tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the rows are those of a CPU
    monkeypatch.setattr(profile, "BASE", tiny)
    monkeypatch.setattr(profile, "batch", functools.partial(shapes.batch, vocabulary=tiny["vocab_size"]))
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


def test_the_study_of_tiles_has_those_of_the_table() -> None:
    pytest.importorskip("triton")
    table = importlib.import_module("xlmr.kernels.attention").CONFIGS["sm_90"]
    found = study._tiles()
    assert {table[64, 2, load] for load in ("short", "long")} <= set(found.values())
    assert len(set(found.values())) == len(found) > 40
    ways = {"fails": lambda x: 1 / 0, "wrong": lambda x: x * 2.001, "right": lambda x: x + x}
    assert list(study.right(case(), ways)) == ["right"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU measures other ways and, in bf16, takes less for right")
def test_the_studies_check_what_they_time(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "HERE", tmp_path)
    monkeypatch.setattr(study, "BASE", tiny)
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
