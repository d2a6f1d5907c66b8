"""Tuning, but for the timing itself: what is tried, refused, checked and chosen, and how a table is rewritten."""

import difflib
import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ROOT, python

pytest.importorskip("triton")

from triton.runtime.jit import KernelInterface

from bench import loads, report, tables, tune
from bench import round as bench_round
from bench.candidates import limits, neighbours, same_bits
from bench.tables import Entry
from xlmr.kernels import _launch
from xlmr.kernels._launch import Config, config

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942", "sm_120")  # the last has no table
ENTRIES = tables.entries(tables.FILES, "sm_90")
ROWS = Entry("layer_norm", "CONFIGS", "sm_90", 128)


def test_every_entry_is_listed() -> None:
    assert len(set(ENTRIES)) == len(ENTRIES)
    for file in tables.FILES:
        found = {(entry.table, entry.bucket) for entry in ENTRIES if entry.file == file}
        module = importlib.import_module(f"xlmr.kernels.{file}")
        named = {name: table for name, table in vars(module).items() if name.endswith("CONFIGS")}
        assert found == {(name, bucket) for name, table in named.items() for bucket in table["portable"]}


def test_neighbours_are_one_step_away() -> None:
    here = config(4, 2, BLOCK_M=64, BLOCK_N=32)
    found = neighbours(here, {"BLOCK_M": (64, 128), "num_warps": (1, 4), "num_stages": (2, 3)})
    assert set(found) == {
        config(4, 2, BLOCK_M=128, BLOCK_N=32),
        config(2, 2, BLOCK_M=64, BLOCK_N=32),
        config(4, 3, BLOCK_M=64, BLOCK_N=32),
    }
    pairs = set(neighbours(here, {"BLOCK_M": (16, 256), "num_warps": (1, 16)}))
    assert {config(8, 2, BLOCK_M=128, BLOCK_N=32), config(2, 2, BLOCK_M=32, BLOCK_N=32)} < pairs
    assert here not in pairs
    assert config(8, 2, BLOCK_M=32, BLOCK_N=32) not in pairs


@pytest.mark.parametrize("target", TARGETS)
def test_neighbours_keep_what_decides_a_rows_bits(target: str) -> None:
    for entry in tables.entries(tables.FILES, target):
        present, found = dict(entry.present.tiles), neighbours(entry.present, limits(entry))
        assert found, entry
        fixed = {"attention": "BLOCK_N", "vocab_softmax": "BLOCK_V"}.get(entry.file) if same_bits(entry) else None
        for tiles in (dict(other.tiles) for other in found):
            assert tiles.keys() == present.keys()
            assert fixed is None or tiles[fixed] == present[fixed]
            if entry.file == "linear":
                assert tiles["BLOCK_M"] >= 64
                assert tiles["BLOCK_N"] >= (32 if target == "gfx942" else 16)
            if isinstance(entry.bucket, int) and "BLOCK_T" in tiles:
                assert tiles["BLOCK_N"] == entry.bucket


def test_which_tables_promise_bits() -> None:
    promised = {(entry.file, entry.table, entry.parts[-1]) for entry in ENTRIES if same_bits(entry)}
    assert promised == {
        *(("attention", "CONFIGS", load) for load in ("short", "long")),
        *(("linear", "CONFIGS", load) for load in loads.ROWS),
        *(("vocab_softmax", "CONFIGS", load) for load in ("few", "some", "many")),
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is launched")
@pytest.mark.parametrize("file", tables.FILES)
def test_every_entry_has_calls_that_launch_it(file: str, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(KernelInterface, "__getitem__", lambda kernel, grid: lambda *args, **kwargs: None)
    monkeypatch.setattr(torch, "randn", torch.empty)  # the shapes are those of a GPU: no memory is touched
    monkeypatch.setattr(loads, "WORDS", 4096)
    monkeypatch.setattr(loads, "SOME_WORDS", 2048)
    for entry in tables.entries([file], "portable"):  # what the interpreter takes
        with tune.launches(entry) as found, torch.no_grad():
            for call in loads.calls(entry, device):
                before = len(found)
                call()
                assert len(found) > before, entry
        tiles = dict(entry.present.tiles).items()
        assert all(tiles <= launch.keywords.items() for launch in found), "a launch that the entry does not decide"


# ---- Measured by a clock that is told what to say ----


def rows(*also: Callable[[], torch.Tensor]) -> list[Callable[[], Any]]:
    x, affine = torch.randn(5, 100), torch.ones(100)
    return [partial(ROWS.module.add_layer_norm, x, x, affine, affine, 1e-5), *also]


Times = Mapping[Config, tuple[float, float, float]]  # the 20 % quantile, the median and the 80 % quantile


def choose(candidates: Sequence[Config], *said: Times, calls: Sequence[Any] | None = None) -> tuple[Config, Any, Any]:
    """tuned() with a clock that says one thing after the other; what it was asked."""
    asked: list[set[Config]] = []

    def clock(found: Mapping[Config, Sequence[Any]]) -> dict[Config, dict[str, float]]:
        assert {len(launches) for launches in found.values()} == {2}
        for tried, launches in found.items():
            assert {call.keywords["BLOCK_T"] for call in launches} == {dict(tried.tiles)["BLOCK_T"]}
        asked.append(set(found))
        times = said[len(asked) - 1]
        return {c: dict(zip(("q20_ms", "median_ms", "q80_ms"), times[c], strict=True)) for c in found}

    best, row = tune.tuned(ROWS, candidates, [calls or rows(), rows()], clock)
    return best, row, asked


HERE, THERE = ROWS.present, config(4, 1, BLOCK_T=4, BLOCK_N=128)
USUAL, SLOW, FAST = (0.9, 1.0, 1.1), (1.9, 2.0, 2.1), (0.4, 0.5, 0.6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted")
@pytest.mark.parametrize(
    ("said", "best"),
    [
        ([{HERE: USUAL, THERE: FAST}] * 2, THERE),
        ([{HERE: USUAL, THERE: SLOW}], HERE),
        ([{HERE: (0.99, 1.0, 1.0), THERE: (0.98, 0.98, 0.98)}], HERE),  # two percent
        ([{HERE: USUAL, THERE: (0.4, 0.5, 0.95)}], HERE),  # the quantiles overlap
        ([{HERE: USUAL, THERE: FAST}, {HERE: USUAL, THERE: USUAL}], HERE),  # luck
    ],
)
def test_better_is_what_is_faster_beyond_noise_and_again(said: list[Times], best: Config) -> None:
    found, row, asked = choose([THERE], *said)
    assert found == best
    assert row["better"] == (best == THERE)
    assert asked == [{HERE, THERE}] * len(said)
    if best == THERE:
        assert (row["present_ms"], row["best_ms"], row["ratio"]) == (0.5, 0.25, 2.0)  # of one of the two copies
    assert ROWS.present == HERE, "the table is as before"


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted")
@pytest.mark.parametrize("fault", ["a value", "NaN"])
def test_what_is_wrong_is_not_timed(fault: str) -> None:
    bad = {"a value": 1.5, "NaN": float("nan")}[fault]
    calls = rows(lambda: torch.tensor([1.0, bad if ROWS.present == THERE else 1.0]))
    best, row, asked = choose([THERE], {HERE: USUAL}, calls=calls)
    assert (best, row["wrong"], row["timed"], asked) == (HERE, 1, 1, [{HERE}])


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted")
def test_what_a_kernel_leaves_unwritten_is_found() -> None:
    (result,), _ = tune.run(ROWS, HERE, [[lambda: torch.empty(3)]])
    assert result.isnan().all()
    with pytest.raises(RuntimeError, match=r'layer_norm.CONFIGS\["sm_90"\]\[128\]: none of its calls launches'):
        tune.tuned(ROWS, [], [[lambda: torch.zeros(3)]], clock=lambda found: {})


def test_agreement() -> None:
    one = torch.ones(4, dtype=torch.bfloat16)
    near, far = one.clone(), one.clone()
    near[0], far[0] = 1 + 2**-7, 1.25
    assert tune.agree([near], [one], bits=False)
    assert not tune.agree([near], [one], bits=True)
    assert not tune.agree([far], [one], bits=False)
    assert [id(t) for t in tune.tensors([(one, {"a": near}), 3, None])] == [id(one), id(near)]


# ---- Written ----


def imported(path: Path) -> dict[str, Any]:
    """The tables of a copied kernel file."""
    spec = importlib.util.spec_from_file_location(f"xlmr.kernels.{path.stem}_copy", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {name: table for name, table in vars(module).items() if name.endswith("CONFIGS")}


@pytest.mark.parametrize(
    ("file", "table", "target", "bucket", "lines"),
    [
        ("linear", "CONFIGS", "sm_90", (2, "large"), (1, 1)),
        ("vocab_softmax", "CONFIGS", "sm_80", (4, "few"), (1, 1)),  # with a comment behind it
        ("vocab_softmax", "DZ_CONFIGS", "sm_90", 4, (1, 1)),  # two entries a line
        ("layer_norm", "CONFIGS", "portable", "wide", (1, 1)),
        ("layer_norm", "BACKWARD_CONFIGS", "sm_90", 1024, (1, 10)),  # a part of its own: "}" becomes "},"
        ("attention", "BACKWARD_CONFIGS", "sm_120", ("dq", 64, 2), (0, 10)),
        ("linear", "CONFIGS", "portable", (4, "text"), (3, 10)),  # computed: written out
        ("_products", "CONFIGS", "gfx942", (2, "dx"), (3, 6)),
    ],
)
def test_one_entry_is_rewritten(
    file: str, table: str, target: str, bucket: Any, lines: tuple[int, int], tmp_path: Path
) -> None:
    path = tmp_path / f"{file}.py"
    path.write_bytes((ROOT / "kernels" / path.name).read_bytes())
    before, was = imported(path), path.read_text(encoding="utf-8").splitlines()
    tiles = before[table].get(target, before[table]["portable"])[bucket].tiles
    new = _launch.Config(tiles, 16, 7)
    tables.write(path, table, target, {bucket: new})
    part = {**before[table].get(target, before[table]["portable"]), bucket: new}
    assert imported(path) == {**before, table: {**before[table], target: part}}
    now = path.read_text(encoding="utf-8").splitlines()
    changes = [line[0] for line in difflib.ndiff(was, now)]
    assert (changes.count("-"), changes.count("+")) == lines
    assert [x.partition("#")[2] for x in was if "#" in x] == [x.partition("#")[2] for x in now if "#" in x]
    assert [path] == list(tmp_path.glob("*.*"))
    again = path.read_text(encoding="utf-8")
    tables.write(path, table, target, {bucket: new})
    assert path.read_text(encoding="utf-8") == again


def test_a_table_that_cannot_be_rewritten_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "kernel.py"
    path.write_text("CONFIGS = dict()\n")
    with pytest.raises(ValueError, match="no table CONFIGS"):
        tables.write(path, "CONFIGS", "sm_90", {2: HERE})
    assert [path] == list(tmp_path.iterdir())
    assert path.read_text() == "CONFIGS = dict()\n"


def test_files_that_git_does_not_know_are_named(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    paths = [tmp_path / "a.py", tmp_path / "b.py"]
    for path in paths:
        path.write_text("A = 1\n")
    assert tune.changed(paths) == ""  # a copy of the tree on another machine
    git("init")
    git("add", "a.py")
    git("commit", "-m", "a")
    assert tune.changed(paths[:1]) == ""
    assert tune.changed(paths) == "?? b.py\n"
    paths[0].write_text("A = 2\n")
    assert tune.changed(paths[:1]) == " M a.py\n"


# ---- The command ----


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_is_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # put back afterwards
    for arguments, said in (([], "PyTorch sees no GPU"), (["softmax"], "'softmax' has no tables: allowed are attent")):
        with pytest.raises(SystemExit) as stopped:
            tune.main(arguments)
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted")
def test_what_wins_is_written_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class AllButThere:
        def __init__(self, *_: Any) -> None: ...

        def fitting(self, entry: Entry, candidates: Sequence[Config]) -> list[Config]:
            return [candidate for candidate in candidates if candidate == THERE]

    def clock(found: Mapping[Config, Any]) -> dict[Config, dict[str, float]]:
        assert json.loads((tmp_path / "tune.json").read_text())["rows"] == []  # what is known stands there at any time
        return {c: {"q20_ms": ms, "median_ms": ms, "q80_ms": ms} for c, ms in ((c, 1 + (c == HERE)) for c in found)}

    copied = tmp_path / "layer_norm.py"
    copied.write_bytes((ROOT / "kernels/layer_norm.py").read_bytes())
    before = copied.read_text(encoding="utf-8")
    planted = {"Gate": AllButThere, "graphs": clock, "copies": lambda *_: [rows()], "source": lambda file: copied}
    for name, value in {**planted, "changed": lambda paths: ""}.items():
        monkeypatch.setattr(tune, name, value)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # put back afterwards
    monkeypatch.setattr(_launch, "unsupported", lambda device: None)
    monkeypatch.setattr(_launch, "target", lambda device: "sm_90" if device.type == "cuda" else "portable")
    monkeypatch.setattr(tables, "entries", lambda files, target: [ROWS])
    out = ["layer_norm", "--out", str(tmp_path / "tune.json")]
    for options, now in (([], {}), (["--write", "--minutes", "0"], {}), (["--write"], {128: THERE})):
        assert tune.main([*out, *options]) == 0
        assert ("out of time: 1 of 1" in capsys.readouterr().err) == ("--minutes" in options)
        part = imported(copied)["CONFIGS"].get("sm_90", {})
        assert {bucket: part[bucket] for bucket in now} == now
        assert (copied.read_text(encoding="utf-8") == before) == (now == {})
    results = json.loads((tmp_path / "tune.json").read_text())
    (row,) = results["rows"]
    refused = len(neighbours(HERE, limits(ROWS))) - 1
    assert (row["ratio"], row["better"], row["refused"], results["written"]) == (2.0, True, refused, True)
    assert "config(4, 1, BLOCK_T=4, BLOCK_N=128)" in "".join(report._tuning(tmp_path / "tune.json"))
    monkeypatch.setattr(tune, "changed", lambda paths: " M kernels/layer_norm.py")
    with pytest.raises(SystemExit):
        tune.main([*out, "--write"])
    assert "commit or take back first:\n M kernels/layer_norm.py" in capsys.readouterr().err


def test_a_round_tunes_on_a_gpu_where_it_is_asked_to(tmp_path: Path) -> None:
    def names(**on: bool) -> list[str]:
        return [part.name for part in bench_round.parts(tmp_path, **on)]

    usual = names(gpu=False)
    assert names(gpu=True) == ["tests on the GPU", *usual, "profile with Proton"]
    assert names(gpu=True, tune=True) == ["tests on the GPU", "tuning", *usual, "profile with Proton"]
    say = (sys.executable, "-c", "import sys; print(*sys.argv[1:])")
    assert bench_round.run(bench_round.Part("told", say, 1.0, timed=True), tmp_path, 120) == "done"
    assert (tmp_path / "logs/told.txt").read_text() == "--minutes 1.8\n"


REFUSED = """
import pathlib, sys
from bench.candidates import Gate
from bench.tables import Entry
from xlmr.kernels._launch import config

entry = Entry("layer_norm", "CONFIGS", "sm_90", 256)
sound, spilling = config(4, 1, BLOCK_T=4, BLOCK_N=256), config(1, 1, BLOCK_T=16, BLOCK_N=256)
gate = Gate("sm_90", pathlib.Path(sys.argv[1]), 2)
print(gate.fitting(entry, [entry.present, sound, spilling]) == [entry.present, sound])
"""


def test_the_gate_refuses_what_spills(tmp_path: Path) -> None:
    kept = tmp_path / "triton"
    assert python(REFUSED, tmp_path / "gate", TRITON_CACHE_DIR=str(kept)) == "True\n"
    assert list(kept.rglob("*.cubin")), "what fits is launched next: to compile it again, one by one, takes longest"
