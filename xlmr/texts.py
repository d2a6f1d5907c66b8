"""The texts of a tokenizer call: read, cut at added tokens, turned into ids, aligned with characters and words."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from .added_tokens import AddedVocabulary
from .arguments import describe
from .sentencepiece_model import SPACE, SentencePieceModel
from .token_layout import Span, Values


class Aligned(NamedTuple):
    """What stands behind each id: the token, its characters, its word."""

    tokens: Values
    spans: Values
    words: Values


@dataclass(frozen=True)
class Segmenter:
    """Cuts texts, each a str or (`of_words`) a list of words, into tokens, with the added tokens of one moment."""

    model: SentencePieceModel
    added: AddedVocabulary
    of_words: bool
    split_special_tokens: bool

    def encode(self, texts: Values) -> Values:
        """The ids of the tokens of each text, and of each pair, without those around it."""
        first, second = texts
        every: list[Any] = first if second is None else [*first, *second]
        if self.of_words:
            ids = iter(self._encode_each([word for words in every for word in words]))
            found = [[index for _ in words for index in next(ids)] for words in every]
        else:
            found = self._encode_each(every)
        return found[: len(first)], None if second is None else found[len(first) :]

    def _encode_each(self, texts: list[str]) -> list[list[int]]:
        if not self.added.may_occur(texts):
            return self.model.encode(texts)
        cuts = [list(self.added.split(text, self.split_special_tokens)) for text in texts]
        stretches = [
            text[a:b] for text, spans in zip(texts, cuts, strict=True) for a, b, index in spans if index is None
        ]
        ids = iter(self.model.encode(stretches))
        return [[i for *_, index in spans for i in (next(ids) if index is None else (index,))] for spans in cuts]

    def align(self, texts: Values) -> Aligned:
        """What stands behind the ids that `encode` gives for these texts."""
        first: list[Any] = [self._align_text(text) for text in texts[0]]
        second: list[Any] | None = None if texts[1] is None else [self._align_text(text) for text in texts[1]]

        def column(field: int) -> Values:
            return [row[field] for row in first], None if second is None else [row[field] for row in second]

        return Aligned(tokens=column(0), spans=column(1), words=column(2))

    def _align_text(self, text: Any) -> tuple[list[str], list[Span], list[int]]:
        """The tokens of a text, and of each its characters and its word."""
        if not self.of_words:
            return self._align_string(text)
        tokens: list[str] = []
        spans: list[Span] = []
        words: list[int] = []
        for number, word in enumerate(text):
            found, found_spans, _ = self._align_string(word)
            tokens += found
            spans += found_spans
            words += [number] * len(found)
        return tokens, spans, words

    def _align_string(self, text: str) -> tuple[list[str], list[Span], list[int]]:
        tokens: list[str] = []
        spans: list[Span] = []
        words: list[int] = []
        for start, end, index in self.added.split(text, self.split_special_tokens):
            number = words[-1] + 1 if words else 0
            if index is not None:
                tokens.append(self.added.tokens[index].content)
                spans.append((start, end))
                words.append(number)
                continue
            pieces, found_spans = self.model.align(text[start:end])
            tokens += pieces
            spans += [(start + first, start + last) for first, last in found_spans] if start else found_spans
            starts = itertools.accumulate((piece[0] == SPACE for piece in pieces), initial=number - 1)
            words += itertools.islice(starts, 1, None)
        return tokens, spans, words


def with_targets(call: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `text_target` and `text_pair_target` to the call of a tokenizer."""

    @functools.wraps(call)
    def call_twice(
        self: Any,
        text: Any = None,
        text_pair: Any = None,
        *args: Any,
        text_target: Any = None,
        text_pair_target: Any = None,
        **options: Any,
    ) -> Any:
        if text_target is None:
            return call(self, text, text_pair, *args, **options)
        targets = call(self, text_target, text_pair_target, *args, **options)
        if text is None:
            return targets
        encoding = call(self, text, text_pair, *args, **options)
        encoding["labels"] = targets["input_ids"]
        return encoding

    signature = inspect.signature(call)
    optional = [p.replace(default=None) if p.name == "text" else p for p in signature.parameters.values()]
    optional += [p.replace(name=f"{p.name}_target", kind=p.KEYWORD_ONLY) for p in optional if p.name.startswith("text")]
    call_twice.__signature__ = signature.replace(parameters=optional)  # type: ignore[attr-defined]  # for help()
    return call_twice


def read_texts(text: Any, text_pair: Any, words: bool) -> tuple[Values, bool]:
    """((texts, their pairs or None), whether it was a batch), or an error that says what is wrong with them."""
    is_text = is_words if words else _is_string
    kind = "list of str (words)" if words else "str"
    if is_text(text):
        if text_pair is not None and not is_text(text_pair):
            raise TypeError(f"text_pair is {describe(text_pair)}; beside a single text it must be a {kind} or None")
        return ([text], [text_pair] if text_pair else None), False
    if not isinstance(text, (list, tuple)):
        raise TypeError(f"text is {describe(text)}; allowed: a {kind}, or a list of them")
    if text_pair is None and text and all(_is_pair(item, is_text) for item in text):
        return ([first for first, _ in text], [second for _, second in text]), True
    if text_pair is not None and not isinstance(text_pair, (list, tuple)):
        raise TypeError(f"text_pair is {describe(text_pair)}; beside a batch it must be a list of as many texts")
    if text_pair is not None and len(text_pair) != len(text):
        raise ValueError(f"there are {len(text)} texts and {len(text_pair)} in text_pair; as many are needed")
    for name, items in (("text", text), ("text_pair", text_pair or [])):
        for number, item in enumerate(items):
            if not is_text(item):
                raise TypeError(f"{name}[{number}] is {describe(item)}; a {kind} is needed")
    return (list(text), None if text_pair is None else list(text_pair)), True


def _is_string(value: Any) -> bool:
    return isinstance(value, str)


def is_words(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_string, value))


def _is_pair(value: Any, is_text: Callable[[Any], bool]) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(is_text, value))
