"""The text of a training run: lines of files, their token ids, and the order in which batches of them are read."""

from __future__ import annotations

import mmap
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from .encode import batches
from .tokenizer import XLMRobertaTokenizer

POOL = 4096  # lines that are tokenised, sorted by length and cut into batches together


class Lines(Sequence[str]):
    """The lines of text files that are not blank, read where they stand: only their offsets are kept in memory."""

    def __init__(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        self.paths = [Path(path) for path in paths]
        self._maps: list[mmap.mmap] = []
        self._offsets: list[array[int]] = []
        for path in self.paths:
            with open(path, "rb") as file:
                if os.fstat(file.fileno()).st_size == 0:
                    raise ValueError(f"{path} is empty: give text files of one text a line")
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            offsets, start = array("q"), 0
            for line in iter(mapped.readline, b""):
                if not line.isspace():
                    offsets.append(start)
                start += len(line)
            if not offsets:
                raise ValueError(f"{path} holds blank lines only: give text files of one text a line")
            self._maps.append(mapped)
            self._offsets.append(offsets)
        self._ends = list(accumulate(map(len, self._offsets)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: Any) -> Any:
        which = bisect_right(self._ends, index)
        offset = self._offsets[which][index - self._ends[which]]
        mapped = self._maps[which]
        end = mapped.find(b"\n", offset)
        try:
            return mapped[offset : len(mapped) if end < 0 else end].decode("utf-8").strip("\r\ufeff")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.paths[which]} is not UTF-8 in the line at byte {offset}: {error}") from error

    def fingerprint(self) -> list[list[Any]]:
        """What must not change between a run and its resumption: names aside, the size of each file."""
        return [[len(mapped), len(offsets)] for mapped, offsets in zip(self._maps, self._offsets, strict=True)]


class LineTokenizer:
    """Lines to token ids, cut to `max_length`; counts the texts and those it cut, in all and before its last call."""

    def __init__(self, tokenizer: XLMRobertaTokenizer, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.texts = self.cut = 0
        self.before = (0, 0)

    def __call__(self, lines: Sequence[str]) -> list[list[int]]:
        self.before = (self.texts, self.cut)
        parts = [[part for part in line.split("\t", 1) if part.strip()] for line in lines]
        ids: dict[int, list[int]] = {}
        for count in (1, 2):
            chosen = [i for i, texts in enumerate(parts) if len(texts) == count]
            rows = self._encode([parts[i] for i in chosen], self.max_length + 1)
            ids.update(zip(chosen, rows, strict=True))
            long = [i for i in chosen if len(ids[i]) > self.max_length]
            rows = self._encode([parts[i] for i in long], self.max_length)
            ids.update(zip(long, rows, strict=True))
            self.cut += len(long)
        self.texts += len(lines)
        return [ids[i] for i in range(len(lines))]

    def _encode(self, parts: list[list[str]], max_length: int) -> list[list[int]]:
        """Single texts, or pairs, to rows of at most `max_length` ids."""
        if not parts:
            return []
        columns = [list(column) for column in zip(*parts, strict=True)]
        second = columns[1] if len(columns) > 1 else None
        return self.tokenizer(columns[0], second, truncation=True, max_length=max_length)["input_ids"]


@dataclass(frozen=True)
class Position:
    """How far a run has read: so many batches of a pool of an epoch."""

    epoch: int = 0
    pool: int = 0
    batch: int = 0


def read_batches(
    lines: Lines, encode: LineTokenizer, position: Position, *, seed: int, batch_tokens: int
) -> Iterator[tuple[Position, list[list[int]]]]:
    """Batches of token ids from `position` on, without end, each with the position after it. Texts of a batch are of
    like lengths; pools of lines and the batches in a pool come in a new random order every epoch."""
    while True:
        draw = torch.Generator().manual_seed(seed * 2**20 + position.epoch)
        order = torch.randperm(len(lines), generator=draw).split(POOL)
        for pool, chosen in enumerate(order):
            if pool < position.pool:
                continue
            draw.manual_seed((seed * 2**20 + position.epoch) * 2**20 + pool)
            ids = encode([lines[i] for i in chosen.tolist()])
            cut = list(batches([len(one) for one in ids], batch_tokens))
            for number, index in enumerate(torch.randperm(len(cut), generator=draw).tolist()):
                if number >= position.batch:
                    yield Position(position.epoch, pool, number + 1), [ids[i] for i in cut[index]]
            position = replace(position, batch=0)
        position = Position(position.epoch + 1)


def read_once(lines: Lines, encode: LineTokenizer, batch_tokens: int) -> Iterator[tuple[int, list[list[int]]]]:
    """Batches of the token ids of every line, in the order of the pools, each with a number of its own."""
    for start in range(0, len(lines), POOL):
        ids = encode([lines[i] for i in range(start, min(start + POOL, len(lines)))])
        for number, batch in enumerate(batches([len(one) for one in ids], batch_tokens)):
            yield start + number, [ids[i] for i in batch]
