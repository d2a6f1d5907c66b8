"""Checking what callers pass, with errors that say what was given and what is allowed."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any


def describe(value: Any) -> str:
    """The value and its type, cut short, for an error message."""
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def as_lists(value: Any) -> Any:
    """Tensors and arrays, and lists of them, as lists and numbers."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if not isinstance(value, (list, tuple)):
        return value
    return list(value) if {*map(type, value)} == {int} else [as_lists(item) for item in value]


def integer(name: str, value: Any, least: int = 0) -> int:
    """The value as an int; TypeError or ValueError if it is none, or less than `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {describe(value)}; an int is needed") from None
    if number < least:
        raise ValueError(f"{name} is {number}; it must be at least {least}")
    return number


def choice(name: str, value: Any, choices: Mapping[Any, str]) -> str:
    """What the value stands for among `choices`; ValueError if it is none of them."""
    value = getattr(value, "value", value)  # transformers' enumerations hold the same names
    if not isinstance(value, (str, bool, type(None))) or value not in choices:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, choices))}")
    return choices[value]


def check_side(name: str, value: Any) -> str:
    """The value, "right" or "left"; ValueError for any other."""
    if value not in ("right", "left"):
        raise ValueError(f"{name} is {value!r}; allowed: 'right', 'left'")
    return value
