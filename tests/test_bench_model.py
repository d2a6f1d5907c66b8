"""The benchmarks of whole models: who is wrong stops them, what is not measured is said, every kind has its case."""

import dataclasses
import importlib.util
import itertools
import json
import shutil
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
    bench_model,
    bench_peers,
    bench_training,
    forward,
    harness,
    plots,
    providers,
    report,
    shapes,
)

pytestmark = pytest.mark.usefixtures("known_roofs")


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
    monkeypatch.setattr(harness, "measured_roofs", lambda dtype, **_: (next(rates), 1e9))
    todo = [(str(i), lambda: forward.measure(model_case(), 3, ["xlmr eager"])) for i in range(3)]
    results, _ = bench_model.run(todo, tmp_path / "m.json", minutes=1)
    for row in results["rows"]:
        assert row["mfu"] == pytest.approx(model_case().flops() / (row["median_ms"] / 1e3) / 3e12)
    assert len(results["rows"]) == 3


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("head", ["Model", "ForMaskedLM"])
def test_flops_are_those_that_torch_counts(head: str) -> None:
    case = shapes.Case("2 texts", (8, 8), "fp32", "fixed", head=head)
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


def test_training_steps_with_a_wrong_gradient_are_not_measured(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_training, "BASE", tiny)
    monkeypatch.setattr(bench_training, "peak_memory", lambda *task: 1.0)
    path = tmp_path / "training.json"
    args = SimpleNamespace(layers=1, vocab=97, rounds=3, out=path, json=True)
    assert bench_training.main(args) == 0
    found = json.loads(path.read_text(encoding="utf-8"))["rows"]
    ways = bench_training.providers()
    assert [(row["dtype"], row["provider"]) for row in found] == [(d, p) for d in shapes.DTYPES for p in ways]
    assert all(row["peak_mib"] == 1.0 for row in found)
    true = bench_training.gradients

    def wrong(model: Any, *given: Any) -> Any:
        return tuple(g * (1.00025 if isinstance(model, xlmr.XLMRobertaForMaskedLM) else 1) for g in true(model, *given))

    monkeypatch.setattr(bench_training, "gradients", wrong)
    with pytest.raises(SystemExit, match=r"xlmr eager fp32: gradients differ by 0\.0002"):
        bench_training.measure("fp32", [9, 4], tiny, 3)


def test_the_part_that_measures_a_peak_names_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        bench_training.part(["--help"])
    assert "bench.bench_model --train" in capsys.readouterr().out


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
    assert {*found.not_run[0]["provider"].split("; ")} == set(providers.PROVIDERS) - set(shapes.PAIR)
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
        assert [case.group for case in found[:2]] == ["headline"] * 2
        assert {case.head for case in found} == set(shapes.HEADS)
        assert {case.text.split(",")[0] for case in found if case.group == "mix"} == set(shapes.MIXES)
        assert {case.size for case in found} == set(shapes.SIZES)
        assert {name for case in found for name in case.providers or ()} <= set(providers.PROVIDERS)
        assert any(case.providers is None for case in found)
    lengths = {case.lens[0] for case in shapes.cases(gpu=True) if case.group == "fixed"}
    assert lengths == {32, 64, 128, 256, 512, 1024, 2048, 4096, 8192}
    first = list(itertools.takewhile(lambda case: case.dtype == "bf16", shapes.cases(gpu=False)))  # a round has these
    assert {case.group for case in first} == {"headline", "latency", "fixed", "mix", "head"}
    assert {case.lens[0] for case in first if case.group == "fixed"} == {32, 128, 512, 2048}
    assert {case.head for case in first} == set(shapes.HEADS)
    assert {case.size for case in first} == set(shapes.SIZES)
    assert len({tuple(case.sizes.items()) for case in first}) == 1 + sum(
        a.sizes != b.sizes for a, b in itertools.pairwise(first)
    )  # an encoder is drawn once


def test_a_line_goes_from_left_to_right(tmp_path: Path) -> None:
    """In whichever order its points were measured."""
    measured = {512: 2.0, 32: 4.0, 2048: 1.0}
    found = (plots.lines({"xlmr eager": s}, tmp_path / "p.svg", "title", "x", "y").read_bytes()
             for s in (measured, dict(sorted(measured.items()))))  # fmt: skip
    assert len(set(found)) == 1


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
