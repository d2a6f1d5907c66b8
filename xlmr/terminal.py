"""What the command `xlmr` prints: lines of JSON, and tables that align in every script."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

# What json.dumps leaves as it is, though some readers end a line there, and terminals take orders from it.
UNSEEN = re.compile("[\x7f-\x9f\u2028\u2029]")


def print_json(value: dict[str, Any]) -> None:
    """One line of JSON, letters of all scripts as they are."""
    print(UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False)))


def print_table(rows: Iterable[Sequence[Any]]) -> None:
    """Columns of equal width, also where letters take two cells of a terminal or none."""
    cells = [[clean(str(cell)) for cell in row] for row in rows]
    widths = [max(map(_width, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        padded = (cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True))
        print("  " + "  ".join(padded).rstrip())


def clean(text: str) -> str:
    """The text without control characters, which could steer the terminal."""
    return "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) == "Cc" else c for c in text)


def _width(text: str) -> int:
    """How many cells of a terminal the text takes."""
    return sum(_cells(character) for character in text)


def _cells(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):  # drawn onto the letter before, or not at all
        return 0
    return 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1
