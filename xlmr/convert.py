"""`xlmr convert`: the weights of a checkpoint directory rewritten as safetensors, its other files copied."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path
from typing import NamedTuple

from .files import hidden_directory, resolve
from .weights import WEIGHTS, is_shard, read_weights, write_weights

COPIED = 2**26  # bytes: files up to this size are copied


class Converted(NamedTuple):
    """How many weights were written, of how many bytes together; `left_out`: what was not copied."""

    weights: int
    size: int
    left_out: list[Path]


def convert(source: Path, target: Path) -> Converted:
    """Make `target`, a new or empty directory, of `source`: it appears whole or not at all.

    Files above COPIED that are no weights we read are left out: they are weights for other programs. So are pipes and
    the like, and links to anything but files. ValueError for directories that will not do, OSError and ValueError for
    weights that cannot be read.
    """
    _check_directories(source, target)
    weights = read_weights(partial(resolve, source), str(source))
    left_out: list[Path] = []

    def ignore(folder: str, names: list[str]) -> list[str]:
        rewritten = [name for name in names if name in WEIGHTS or is_shard(name)] if Path(folder) == source else []
        others = [Path(folder, name) for name in names if name not in rewritten]
        ignored = [path for path in others if not _is_copied(path)]
        left_out.extend(ignored)
        return [*rewritten, *(path.name for path in ignored)]

    with hidden_directory(target.parent, ".converting-") as scratch:
        new = scratch / "new"
        try:
            shutil.copytree(source, new, ignore=ignore)
        except shutil.Error as error:  # holds what went wrong with each of the files: the first will do
            raise OSError(error.args[0][0][2]) from error
        config = (new / "config.json").read_text(encoding="utf-8")
        write_weights(new, weights, config, "50GB", safe_serialization=True)
        os.replace(new, target)
    return Converted(len(weights), sum(weight.nbytes for weight in weights.values()), left_out)


def _check_directories(source: Path, target: Path) -> None:
    if not source.is_dir():
        raise ValueError(f"{source} is no directory: give that of a checkpoint")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} exists and is not empty: give a new directory")
    if target.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{target} is inside {source}: give a directory outside")
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"there is no config.json in {source}: it is no checkpoint")


def _is_copied(path: Path) -> bool:
    return path.stat().st_size <= COPIED if path.is_file() else path.is_dir() and not path.is_symlink()
