"""How the tokens of texts become the rows of a batch: cut to a limit, joined by special tokens, padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .arguments import check_side, choice, integer

Span = tuple[int, int]  # of the tokens of one text: first, and one past the last
Values = tuple[list[list], "list[list] | None"]  # one value a token, for each text and for its pair, if there are pairs
RowSpans = tuple[int, Span, "Span | None"]  # the number of a row's text, the span of its tokens, and its pair's

LONGEST = 2**24  # tokens that rows are padded to at most, above what any configuration has positions for
PADDING: dict[Any, str] = {name: name for name in ("longest", "max_length", "do_not_pad")}
PADDING |= {True: "longest", False: "do_not_pad"}
TRUNCATION: dict[Any, str] = {name: name for name in ("longest_first", "only_first", "only_second", "do_not_truncate")}
TRUNCATION |= {True: "longest_first", False: "do_not_truncate", None: "do_not_truncate"}


@dataclass(frozen=True)
class TokenLayout:
    """The rows of a batch, whatever is laid out in them: ids, masks, offsets.

    special: whether special tokens stand around the texts.  length, side: where rows are padded to, None for nowhere.
    """

    spans: list[RowSpans]
    special: bool
    length: int | None = None
    side: str = "right"

    def rows(self, values: Values, begin: Any, end: Any, fill: Any) -> list[list]:
        """The values of each row's tokens; `begin`, `end` and `fill` are those of <s>, </s> and <pad>."""
        first, second = values
        return [
            self._row(
                first[text][start:stop], second[text][slice(*pair)] if second and pair else None, begin, end, fill
            )
            for text, (start, stop), pair in self.spans
        ]

    def constant(self, first: Any, second: Any, around: Any, fill: Any) -> list[list]:
        """One value for every token of a text, one for those of a pair, one for special tokens, one for padding."""
        return [
            self._row([first] * (stop - start), [second] * (pair[1] - pair[0]) if pair else None, around, around, fill)
            for _, (start, stop), pair in self.spans
        ]

    def _row(self, first: list, second: list | None, begin: Any, end: Any, fill: Any) -> list:
        """<s> A </s>, or <s> A </s></s> B </s>."""
        before, after = ([begin], [end]) if self.special else ([], [])
        row = [*before, *first, *after]
        if second is not None:
            row += [*after, *second, *after]
        return pad_row(row, self.length, fill, self.side)


def special_count(pair: bool) -> int:
    """How many special tokens stand around a text, or around a pair of texts."""
    return 4 if pair else 2


def pad_row(row: list, length: int | None, fill: Any, side: str) -> list:
    """The row with as many `fill` on one side as make it `length` long; longer rows stay as they are."""
    missing = [] if length is None else [fill] * (length - len(row))
    return row + missing if side == "right" else missing + row


@dataclass(frozen=True)
class Padding:
    """How rows are padded: to the longest or a limit or not at all, rounded up to a multiple, on one side."""

    strategy: str
    multiple: int | None
    side: str

    @classmethod
    def of(cls, padding: Any, pad_to_multiple_of: Any, side: Any) -> Padding:
        """Read the options of a call; ValueError for what is not allowed."""
        strategy = choice("padding", padding, PADDING)
        multiple = None if pad_to_multiple_of is None else integer("pad_to_multiple_of", pad_to_multiple_of, least=1)
        return cls(strategy, None if strategy == "do_not_pad" else multiple, check_side("padding_side", side))

    def length(self, longest: int, limit: int | None) -> int | None:
        """The length that rows are padded to; None for "do_not_pad" and for "max_length" where there is no limit."""
        length = longest if self.strategy == "longest" else limit
        if self.strategy == "do_not_pad" or length is None:
            return None
        length = -(-length // (self.multiple or 1)) * (self.multiple or 1)
        if length > LONGEST:
            raise ValueError(f"padding would make rows of {length} tokens: more than {LONGEST} are never needed")
        return length


def kept_spans(
    ids: Values, truncation: str, budget: int | None, side: str, stride: int | None = None
) -> list[RowSpans]:
    """Of each text, and its pair, what stays of its tokens if it may keep `budget` of them, None for all.

    With a `stride`, the windows follow that the rest is cut into, which share so many tokens.
    """
    first, second = ids
    spans: list[RowSpans] = []
    for sample, row in enumerate(first):
        count, other = len(row), None if second is None else len(second[sample])
        kept, other_kept = (count, other or 0) if budget is None else cut(count, other, truncation, budget)
        if stride is not None:
            others = [None] if other is None else windows(other, other_kept, stride, side)
            spans += [(sample, *both) for both in combine(windows(count, kept, stride, side), others)]
        else:
            other_part = None if other is None else kept_part(other, other_kept, side)
            spans.append((sample, kept_part(count, kept, side), other_part))
    return spans


def row_length(spans: RowSpans) -> int:
    """How many tokens of texts a row holds, those around them not counted."""
    _, (start, stop), pair = spans
    return stop - start + (pair[1] - pair[0] if pair else 0)


def cut(first: int, second: int | None, strategy: str, budget: int) -> tuple[int, int]:
    """How many tokens stay of two texts that hold `first` and `second` and may keep `budget` together.

    "longest_first": the shorter keeps up to half of the budget, the longer the rest, a tie's odd token goes to the
    second. ValueError where "only_first" or "only_second" would have to take away a whole text, or more than it.
    """
    excess = first + (second or 0) - budget
    if excess <= 0:
        return first, second or 0
    if strategy == "longest_first":
        if second is None:
            return budget, 0
        shorter = min(first, second, budget // 2)
        return (shorter, budget - shorter) if first <= second else (budget - shorter, shorter)
    left = (first if strategy == "only_first" else second or 0) - excess
    if left <= 0:
        raise ValueError(
            f"truncation={strategy!r} cannot remove {excess} tokens: the texts hold {first} and {second or 0}; "
            "use truncation='longest_first' or a larger max_length"
        )
    return (left, second or 0) if strategy == "only_first" else (first, left)


def kept_part(count: int, size: int, side: str) -> Span:
    """Where the `size` tokens are that stay of `count`: the first ones, with side "left" the last ones."""
    return (0, min(size, count)) if side == "right" else (max(count - size, 0), count)


def windows(count: int, size: int, stride: int, side: str) -> list[Span]:
    """`kept_part`, then the parts that overflow: at most `size` tokens each, `stride` of them from the one before."""
    if count <= size:
        return [(0, count)]
    if stride >= size:
        raise ValueError(
            f"stride is {stride}, but a window has room for {size} tokens of the text, which must be more; "
            "use a smaller stride or a larger max_length"
        )
    spans = [(start, min(start + size, count)) for start in range(0, count - stride, size - stride)]
    return spans if side == "right" else [(count - stop, count - start) for start, stop in spans]


def combine(first: Sequence[Span], second: Sequence[Span | None]) -> Iterator[tuple[Span, Span | None]]:
    """The windows of a pair of texts: what is kept of both, then the first's others with each of the second's, …"""
    yield first[0], second[0]
    for window in first[1:]:
        yield from ((window, other) for other in second)
    yield from ((first[0], other) for other in second[1:])
