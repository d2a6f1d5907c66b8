"""The tuner without a GPU: what is tried, what is refused, what wins, and what is written into a table."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from bench import harness, tune
from bench import round as whole_round
from xlmr.kernels._launch import Config, config, pick

ENTRY = "small"


@pytest.fixture
def module() -> ModuleType:
    """A "kernel" whose BLOCK_K decides the last bits, and which eight warps cannot run."""
    module: Any = ModuleType("kernel")
    module.CONFIGS = {"portable": {ENTRY: config(4, 2, BLOCK_M=32, BLOCK_K=16)}}
    module.pick = pick

    def launch(x: Tensor) -> Tensor:
        chosen = module.pick(module.CONFIGS, x.device, ENTRY)
        if chosen.num_warps == 8:
            raise RuntimeError("out of resource")
        return x * (1 + dict(chosen.tiles)["BLOCK_K"] * 2**-20)

    module.launch = launch
    return module


def case(module: Any, size: int = 64) -> harness.Case:
    return harness.Case(
        "kernel", "kernel", "T", "rows", size, lambda: (torch.ones(size),), {"xlmr triton": module.launch},
        lambda backward: (size, size),
    )  # fmt: skip


def race(milliseconds: Callable[[Config], float]) -> tune.Race:
    """A clock that knows how long each configuration takes, with quantiles 1 % around."""

    def timed(calls: dict[Config, Callable[[], Any]]) -> dict[Config, dict[str, float]]:
        assert all(isinstance(call(), Tensor) for call in calls.values())
        known = {chosen: milliseconds(chosen) for chosen in calls}
        return {c: {"median_ms": t, "q20_ms": 0.99 * t, "q80_ms": 1.01 * t} for c, t in known.items()}

    return timed


def climb(module: Any, milliseconds: Callable[[Config], float]) -> tuple[Config, float]:
    with tune.Picker([module]) as picker:
        found = tune.reached(picker, [(case(module, 32), "forward"), (case(module), "forward")])
        ((entry, (largest, _)),) = found.items()
        assert entry == tune.Entry("kernel", "CONFIGS", ENTRY, config(4, 2, BLOCK_M=32, BLOCK_K=16))
        assert largest.x_value == 64
        return tune.climb(picker, entry, (largest, "forward"), race(milliseconds))


def test_the_climb_goes_on_while_something_is_faster(module: Any) -> None:
    """Two steps away, past neighbours that are fast but give other bits or do not run."""

    def milliseconds(chosen: Config) -> float:
        tiles = dict(chosen.tiles)
        return 100 / tiles["BLOCK_M"] + 10 * (tiles["BLOCK_K"] == 16) + abs(chosen.num_stages - 3)

    best, ratio = climb(module, milliseconds)
    assert best == config(4, 3, BLOCK_M=256, BLOCK_K=16)
    assert ratio == pytest.approx((100 / 32 + 10 + 1) / (100 / 256 + 10))
    assert module.pick is pick


def test_noise_is_no_gain(module: Any) -> None:
    present = config(4, 2, BLOCK_M=32, BLOCK_K=16)
    assert climb(module, lambda chosen: 1.0 if chosen == present else 0.98) == (present, 1.0)


@pytest.mark.parametrize("name", tune.TABLES)
def test_a_written_table_says_what_won_and_nothing_else(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(f"xlmr.kernels.{name}")
    copy = tmp_path / f"{name}.py"
    copy.write_text(Path(str(module.__file__)).read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(module, "__file__", str(copy))
    won = config(2, 7, BLOCK_M=256)
    entries = {
        tune.Entry(module.__name__, table, bucket, won): won
        for table, value in tune.tables(module)
        for bucket in list(value.get("sm_90", value["portable"]))[:2]
    }
    assert tune.write(entries, "sm_90", "measured on a test") == [copy]

    spec = importlib.util.spec_from_file_location(f"xlmr.kernels.{name}_written", copy)
    assert spec is not None
    assert spec.loader is not None
    written = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, written)
    spec.loader.exec_module(written)
    for table, value in tune.tables(module):
        chosen = {entry.bucket for entry in entries if entry.table == table}
        expected = {b: won if b in chosen else c for b, c in value.get("sm_90", value["portable"]).items()}
        assert getattr(written, table) == {**value, "sm_90": expected}
    assert copy.read_text(encoding="utf-8").count("# measured on a test") == len(dict(tune.tables(module)))


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["tune"])
    with pytest.raises(SystemExit):
        tune.main()
    assert "PyTorch sees none" in capsys.readouterr().err


def test_a_round_tunes_before_it_measures(tmp_path: Path) -> None:
    """And only where it is told to, behind the tests."""

    def names(**given: bool) -> list[str]:
        return [part.name for part in whole_round.parts(tmp_path, **given)]

    assert names(gpu=True, tune=True)[:3] == ["tests on the GPU", "tuning", "models"]
    assert names(gpu=True)[:2] == ["tests on the GPU", "models"]
    assert names(gpu=False)[0] == "models"
