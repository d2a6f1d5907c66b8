"""Added tokens: what a tokenizer finds in a text verbatim, before sentencepiece sees the rest."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

WORD = {"Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "Pc"}  # categories of Unicode
# Of a word too, whatever their category: joiners, and the Latin letters in circles and squares.
ENCLOSED = (0x24B6, 0x24EA), (0x1F130, 0x1F14A), (0x1F150, 0x1F16A), (0x1F170, 0x1F18A)
JOINING = {"\u200c", "\u200d", *(chr(code) for start, stop in ENCLOSED for code in range(start, stop))}
SEPARATORS = "\x1c\x1d\x1e\x1f"  # white space for Python alone


@dataclass(frozen=True)
class AddedToken:
    """A token outside sentencepiece's reach; the fields are those of tokenizers.AddedToken.

    lstrip, rstrip: the token takes the white space before, after it. single_word: it is matched only where no word
    character touches it. special: `skip_special_tokens` leaves it out. normalized: kept for other readers of the
    files; here a token is always matched verbatim, as transformers 4's Python tokenizer does.
    """

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.content, str) or not self.content:
            raise ValueError(f"an added token is {self.content!r}; a non-empty str is needed")
        for field in fields(self)[1:]:
            if not isinstance(getattr(self, field.name), bool):
                raise ValueError(f"{field.name} of the added token {self.content!r} must be true or false")

    def __str__(self) -> str:
        return self.content

    @classmethod
    def of(cls, value: Any, special: bool = False) -> AddedToken:
        """Read a str, a dict as the checkpoint files hold, or an object such as tokenizers.AddedToken."""
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            return cls(value, special=special, normalized=not special)
        names = [field.name for field in fields(cls)]
        if isinstance(value, Mapping) and "content" in value:
            return cls(**{"special": special, **{name: value[name] for name in names if name in value}})
        if hasattr(value, "content"):
            return cls(**{name: getattr(value, name) for name in names})
        raise ValueError(f"a token is {value!s:.80}; allowed: a str, an AddedToken or a dict with its fields")


class AddedVocabulary:
    """The added tokens and their ids; immutable, so that whoever still reads an older one is never misled."""

    def __init__(self, tokens: Mapping[int, AddedToken]) -> None:
        self.tokens = dict(sorted(tokens.items()))
        self.ids = {token.content: index for index, token in self.tokens.items()}
        self.special_ids = frozenset(index for index, token in self.tokens.items() if token.special)
        self.end = max(self.tokens, default=-1) + 1

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.tokens,)  # without what is cached, so that calls do not change a pickle

    @functools.cached_property
    def _every(self) -> _Matcher:
        return _Matcher(self.ids)

    @functools.cached_property
    def _ordinary(self) -> _Matcher:
        return _Matcher(token.content for token in self.tokens.values() if not token.special)

    def with_tokens(self, new: Mapping[int, AddedToken]) -> AddedVocabulary:
        """This vocabulary with some tokens put in, or put in the place of those with the same id."""
        return AddedVocabulary({**self.tokens, **new})

    def may_occur(self, texts: Iterable[str]) -> bool:
        """False only if no text holds an added token: a quick look for their first characters."""
        return any(map(self._every.first.search, texts))

    def split(self, text: str, split_special_tokens: bool = False) -> Iterator[tuple[int, int, int | None]]:
        """Yield (start, end, id) of the added tokens in a text, the longest that fits, and (…, None) between them.

        `split_special_tokens` leaves the special ones in the text, where sentencepiece cuts them like any other word.
        """
        end = 0
        for start, stop in (self._ordinary if split_special_tokens else self._every).find(text):
            token = self.tokens[self.ids[text[start:stop]]]
            if token.single_word and _touches_word(text, start, stop):
                continue
            while token.lstrip and start > end and _is_space(text[start - 1]):
                start -= 1
            while token.rstrip and stop < len(text) and _is_space(text[stop]):
                stop += 1
            if token.lstrip and start < end:  # the token before has taken white space that this one starts with
                start = end
                if start >= stop:
                    continue
            if start > end:
                yield end, start, None
            yield start, stop, self.ids[token.content]
            end = stop
        if end < len(text):
            yield end, len(text), None


class _Matcher:
    """Finds words in a text: a regular expression jumps to their first characters, a set tells the rest."""

    def __init__(self, words: Iterable[str]) -> None:
        self._words = frozenset(words)
        self._lengths: dict[str, list[int]] = {}
        for word in sorted(self._words, key=len, reverse=True):
            lengths = self._lengths.setdefault(word[0], [])
            if len(word) not in lengths[-1:]:
                lengths.append(len(word))
        self.first = re.compile(f"[{re.escape(''.join(self._lengths))}]" if self._words else "(?!)")

    def find(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield (start, end) of matches from left to right, none overlapping, each the longest at its place."""
        end = 0
        for candidate in self.first.finditer(text):
            start = candidate.start()
            if start < end:
                continue
            for length in self._lengths[text[start]]:
                word = text[start : start + length]
                if word in self._words:
                    end = start + len(word)  # the slice is shorter at the end of the text
                    yield start, end
                    break


def _is_space(character: str) -> bool:
    return character.isspace() and character not in SEPARATORS


def _touches_word(text: str, start: int, stop: int) -> bool:
    """Whether a word goes on at either side, vowel signs and joiners included, which are none of Python's \\w."""
    beside = text[max(start - 1, 0) : start] + text[stop : stop + 1]
    return any(char in JOINING or unicodedata.category(char) in WORD for char in beside)


def tokens_by_id(entries: Iterable[tuple[Any, Any]]) -> dict[int, Any]:
    """The added tokens of a checkpoint by id, from (id, token); ValueError for what is no id, or one given twice."""
    tokens: dict[int, Any] = {}
    for index, token in entries:
        if type(index) not in (int, str) or not re.fullmatch("[0-9]{1,18}", str(index)):
            raise ValueError(
                f"the checkpoint gives an added token the id {index!r:.40}; an integer from 0 up is needed"
            )
        if int(index) in tokens:
            raise ValueError(f"the checkpoint gives two added tokens the id {index}")
        tokens[int(index)] = token
    return tokens
