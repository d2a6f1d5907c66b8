"""README.md: what it shows runs as written, what it names is there, and its promises are what the CI runs."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import transformers
from processes import ROOT

import xlmr
from xlmr import cli
from xlmr.demo import CHECKPOINT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_the_python_runs_as_written(tmp_path: Path) -> None:
    """One block after the other, with the demo checkpoint and, as `theirs`, a model of transformers."""
    pytest.importorskip("triton")  # which the last block is about
    pytest.importorskip("peft")
    theirs = transformers.XLMRobertaForMaskedLM.from_pretrained(CHECKPOINT)
    names: dict[str, Any] = {"theirs": theirs}
    paths = {"path/to/checkpoint": CHECKPOINT, "path/to/adapter": tmp_path}
    try:
        for block in blocks("python"):
            exec(re.sub("|".join(paths), lambda path: str(paths[path[0]]), block), names)
    finally:
        xlmr.unpatch()
    assert names["output"].logits.shape[2] == theirs.config.vocab_size
    assert names["loss"].isfinite()


def test_the_commands_are_understood() -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("xlmr ")]
    commands = [shlex.split(line.partition(" < ")[0], comments=True)[1:] for line in lines]
    parsed = [cli._parsed(command).command for command in commands]
    assert len(parsed) >= 8
    assert parsed == [command[0] for command in commands]


def test_what_is_named_is_there() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link and link[0] != "#"]
    modules = [f"bench/{name}.py" for name in re.findall(r"\bbench\.(\w+)", README)]
    assert [path for path in [*links, *modules] if not (ROOT / path).exists()] == []
    api = README[README.index("## The API") : README.index("## Limits")]
    named = set(re.findall(r"[`…](\w+)", api)) | {f"XLMRoberta{part}" for part in re.findall(r"`…(For\w+)`", api)}
    assert set(xlmr.__all__) - named == {"__version__"}


def test_the_ci_runs_what_is_promised() -> None:
    promised = [line for line in README.splitlines() if line.startswith("pip install -c constraints.txt ")]
    assert len(promised) == 2
    assert {f"({line})" for line in promised} <= set((ROOT / ".ci/run").read_text(encoding="utf-8").splitlines())
