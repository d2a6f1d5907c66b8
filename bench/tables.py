"""The kernels' configuration tables: their entries, and their source text with some of them changed."""

import ast
import importlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from xlmr.kernels import _launch
from xlmr.kernels._launch import Config

FILES = ("attention", "linear", "_products", "vocab_softmax", "layer_norm", "embedding")  # those that have tables


@dataclass(frozen=True)
class Entry:
    """The configuration that `target` takes for a bucket from a table of kernels/<file>.py."""

    file: str
    table: str
    target: str
    bucket: Any

    @property
    def module(self) -> ModuleType:
        return importlib.import_module(f"xlmr.kernels.{self.file}")

    @property
    def key(self) -> str:
        """The target's own part of the table, or "portable"."""
        return self.target if self.target in vars(self.module)[self.table] else "portable"

    @property
    def configs(self) -> dict[Any, Config]:
        """The part of the table that it stands in."""
        return vars(self.module)[self.table][self.key]

    @property
    def present(self) -> Config:
        return self.configs[self.bucket]

    @property
    def parts(self) -> tuple[Any, ...]:
        """What the bucket is made of."""
        return self.bucket if isinstance(self.bucket, tuple) else (self.bucket,)

    @property
    def dtype(self) -> str:
        """bf16 but where the bucket has elements of four bytes."""
        return "fp32" if 4 in self.parts else "bf16"

    def __str__(self) -> str:
        return f"{self.file}.{self.table}[{json.dumps(self.target)}][{_literal(self.bucket)}]"


def entries(files: Iterable[str], target: str) -> list[Entry]:
    """Every entry that a target uses, those of bf16 first."""
    found = []
    for file in files:
        module = importlib.import_module(f"xlmr.kernels.{file}")
        tables = {name: v for name, v in vars(module).items() if isinstance(v, Mapping) and "portable" in v}
        found += [Entry(file, name, target, bucket) for name, table in tables.items() for bucket in table["portable"]]
    return sorted(found, key=lambda entry: entry.dtype)


def text(config: Config) -> str:
    """The call that makes it."""
    tiles = ", ".join(f"{name}={size}" for name, size in config.tiles)
    return f"config({config.num_warps}, {config.num_stages}, {tiles})"


def rewritten(source: str, table: str, target: str, changes: Mapping[Any, Config]) -> str:
    """`source` with these entries of a table in their places, and nothing else changed.

    A target without a part of its own gets one, a copy of "portable"; a part that is computed is written out.
    ValueError where `source` has no such table, or the table read back is not the one that was meant.
    """
    node = _table(source, table)
    before = _value(node)
    part = {**before.get(target, before["portable"]), **changes}
    data, own = source.encode(), _items(node).get(target)
    items = _items(own) if isinstance(own, ast.Dict) else {}
    if own is not None and changes.keys() <= items.keys():
        edits = {_span(data, items[bucket]): text(config) for bucket, config in changes.items()}
    elif own is not None:
        edits = {_span(data, own): _written_out(part)}
    else:
        _, end = _span(data, node.values[-1])
        comma = "" if data[end:].lstrip().startswith(b",") else ","
        edits = {(end, end): f",\n    {_literal(target)}: {_written_out(part)}{comma}"}
    for (start, end), new in sorted(edits.items(), reverse=True):
        data = data[:start] + new.encode() + data[end:]
    found = data.decode()
    if _value(_table(found, table)) != {**before, target: part}:
        raise ValueError(f"{table}: the entries of {target} could not be changed; nothing was written")
    return found


def write(path: Path, table: str, target: str, changes: Mapping[Any, Config]) -> None:
    """Rewrites a kernel's file, as a whole or not at all."""
    new = path.with_suffix(f".{os.getpid()}")
    try:
        new.write_text(rewritten(path.read_text(encoding="utf-8"), table, target, changes), encoding="utf-8")
        new.chmod(path.stat().st_mode)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def _table(source: str, name: str) -> ast.Dict:
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name and isinstance(node.value, ast.Dict):
            return node.value
    raise ValueError(f"no table {name} is written there as a dictionary")


def _value(node: ast.Dict) -> dict[str, dict[Any, Config]]:
    """A table as importing it would make it."""
    return eval(compile(ast.Expression(node), "<table>", "eval"), {"config": _launch.config})


def _items(node: ast.Dict) -> dict[Any, ast.expr]:
    """The values that stand there behind a key; not what is unpacked."""
    return {ast.literal_eval(k): v for k, v in zip(node.keys, node.values, strict=True) if k is not None}


def _span(data: bytes, node: ast.expr) -> tuple[int, int]:
    """Where the node stands among the bytes."""
    ends = list(itertools.accumulate(map(len, data.splitlines(keepends=True)), initial=0))
    return ends[node.lineno - 1] + node.col_offset, ends[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)


def _written_out(part: Mapping[Any, Config]) -> str:
    lines = "".join(f"        {_literal(bucket)}: {text(config)},\n" for bucket, config in part.items())
    return f"{{\n{lines}    }}"


def _literal(key: Any) -> str:
    """A key as ruff writes it."""
    return f"({', '.join(map(_literal, key))})" if isinstance(key, tuple) else json.dumps(key)
