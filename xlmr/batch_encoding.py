"""What the tokenizer returns: a dict of ids and masks that can also map between tokens, words and characters."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class CharSpan(NamedTuple):
    """Code points start … end − 1 of a text."""

    start: int
    end: int


class TokenSpan(NamedTuple):
    """Tokens start … end − 1 of an encoding."""

    start: int
    end: int


@dataclass(frozen=True)
class Encoding:
    """One row of a batch, token by token, with the names of tokenizers.Encoding; all lists are as long as the row,
    padding included.

    `sequence_ids` and `word_ids` are None, and `offsets` (0, 0), at the special tokens and padding that the tokenizer
    put in. A word is a stretch without spaces, or the caller's own word with is_split_into_words; offsets then count
    from its start.
    """

    ids: list[int]
    type_ids: list[int]
    tokens: list[str]
    offsets: list[tuple[int, int]]
    attention_mask: list[int]
    special_tokens_mask: list[int]
    word_ids: list[int | None]
    sequence_ids: list[int | None]
    n_sequences: int

    def __len__(self) -> int:
        return len(self.ids)

    def token_to_sequence(self, token_index: int) -> int | None:
        """0 or 1, the text that the token comes from; None for special tokens, padding and what is past the end."""
        return self.sequence_ids[token_index] if token_index < len(self) else None

    def token_to_word(self, token_index: int) -> int | None:
        """The word that the token is part of; None where `token_to_sequence` gives it."""
        return self.word_ids[token_index] if token_index < len(self) else None

    def token_to_chars(self, token_index: int) -> CharSpan | None:
        """The characters that became the token; None where `token_to_sequence` gives it."""
        return None if self.token_to_sequence(token_index) is None else CharSpan(*self.offsets[token_index])

    def word_to_tokens(self, word_index: int, sequence_index: int = 0) -> TokenSpan | None:
        """The tokens of a word, None if the row has none of them."""
        wanted = word_index, sequence_index
        found = [i for i, at in enumerate(zip(self.word_ids, self.sequence_ids, strict=True)) if at == wanted]
        return TokenSpan(found[0], found[-1] + 1) if found else None

    def word_to_chars(self, word_index: int, sequence_index: int = 0) -> CharSpan | None:
        """The characters of a word, None if the row has none of its tokens."""
        span = self.word_to_tokens(word_index, sequence_index)
        return None if span is None else CharSpan(self.offsets[span.start][0], self.offsets[span.end - 1][1])

    def char_to_token(self, char_pos: int, sequence_index: int = 0) -> int | None:
        """The first token that covers a character, None if there is none (a space, or cut off)."""
        for token, (start, end) in enumerate(self.offsets):
            if start <= char_pos < end and self.sequence_ids[token] == sequence_index:
                return token
        return None

    def char_to_word(self, char_pos: int, sequence_index: int = 0) -> int | None:
        """The word that covers a character, None if there is none."""
        token = self.char_to_token(char_pos, sequence_index)
        return None if token is None else self.word_ids[token]


class BatchEncoding(UserDict[str, Any]):
    """A dict of lists or tensors (`input_ids`, `attention_mask`, …), with its keys as attributes too.

    `batch[0]` is the first row as an `Encoding`, `batch[1:3]` a dict of the values of rows 1 and 2. The methods that
    map between tokens, words and characters take the row first, which may be left out where it is 0. They work on what
    a tokenizer call returned; the alignment is computed at their first use.
    """

    def __init__(
        self,
        data: Mapping[str, Any] | None = None,
        encoding: Encoding | list[Encoding] | Callable[[], list[Encoding]] | None = None,
        tensor_type: str | None = None,
        prepend_batch_axis: bool = False,
        n_sequences: int | None = None,
    ) -> None:
        super().__init__(data)
        self._encodings = [encoding] if isinstance(encoding, Encoding) else encoding  # a callable: until first needed
        self._n_sequences = n_sequences
        self.convert_to_tensors(tensor_type, prepend_batch_axis)

    def __getitem__(self, item: Any) -> Any:
        if isinstance(item, str):
            return self.data[item]
        if isinstance(item, slice):
            return {key: value[item] for key, value in self.data.items()}
        if isinstance(item, int):
            return self._rows()[item]
        raise KeyError(f"key {item!r}; allowed: a name such as 'input_ids', the number of a row, a slice of rows")

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["data"][name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}") from None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_encodings": self.encodings}

    @property
    def is_fast(self) -> bool:
        """Whether tokens can be mapped to words and characters."""
        return self._encodings is not None

    @property
    def encodings(self) -> list[Encoding] | None:
        """The rows, None if this did not come from a tokenizer call."""
        if callable(self._encodings):
            self._encodings = self._encodings()
        return self._encodings

    @property
    def n_sequences(self) -> int | None:
        """1 for texts, 2 for pairs of texts, None if this did not come from a tokenizer call."""
        return self._n_sequences

    def _rows(self) -> list[Encoding]:
        rows = self.encodings
        if rows is None:
            raise ValueError("only the result of a tokenizer call on texts maps between tokens, words and characters")
        return rows

    def tokens(self, batch_index: int = 0) -> list[str]:
        """The tokens of a row as text; an unknown stretch stands there as it is."""
        return self._rows()[batch_index].tokens

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """For each token of a row 0 or 1, the text that it comes from; None for special tokens and padding."""
        return self._rows()[batch_index].sequence_ids

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """For each token of a row the word that it is part of; None for special tokens and padding."""
        return self._rows()[batch_index].word_ids

    def _row(self, first: int, second: int | None) -> tuple[Encoding, int]:
        """The row and the index inside it, from the arguments (row, index) or (index,)."""
        row, index = (0, first) if second is None else (first, second)
        return self._rows()[row], index

    def token_to_sequence(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        """`Encoding.token_to_sequence` of a row."""
        row, token = self._row(batch_or_token_index, token_index)
        return row.token_to_sequence(token)

    def token_to_word(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        """`Encoding.token_to_word` of a row."""
        row, token = self._row(batch_or_token_index, token_index)
        return row.token_to_word(token)

    def token_to_chars(self, batch_or_token_index: int, token_index: int | None = None) -> CharSpan | None:
        """`Encoding.token_to_chars` of a row."""
        row, token = self._row(batch_or_token_index, token_index)
        return row.token_to_chars(token)

    def word_to_tokens(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> TokenSpan | None:
        """`Encoding.word_to_tokens` of a row."""
        row, word = self._row(batch_or_word_index, word_index)
        return row.word_to_tokens(word, sequence_index)

    def word_to_chars(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> CharSpan | None:
        """`Encoding.word_to_chars` of a row."""
        row, word = self._row(batch_or_word_index, word_index)
        return row.word_to_chars(word, sequence_index)

    def char_to_token(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """`Encoding.char_to_token` of a row."""
        row, char = self._row(batch_or_char_index, char_index)
        return row.char_to_token(char, sequence_index)

    def char_to_word(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """`Encoding.char_to_word` of a row."""
        row, char = self._row(batch_or_char_index, char_index)
        return row.char_to_word(char, sequence_index)

    def convert_to_tensors(self, tensor_type: str | None = None, prepend_batch_axis: bool = False) -> BatchEncoding:
        """Turn every value into a torch tensor ("pt") or NumPy array ("np"), in place; None leaves them as they are.

        Of rows that differ in length NumPy makes an array of arrays, torch nothing: ValueError.
        """
        if tensor_type is not None:
            convert = _converter(tensor_type)
            for key, value in self.data.items():
                self.data[key] = convert(key, [value] if prepend_batch_axis else value)
        return self

    def to(self, device: Any, *, non_blocking: bool = False) -> BatchEncoding:
        """Move the tensors to a device, in place: a torch.device, its name or its number."""
        for key, value in self.data.items():
            if hasattr(value, "to"):
                self.data[key] = value.to(device=device, non_blocking=non_blocking)
        return self


def _converter(tensor_type: Any) -> Callable[[str, Any], Any]:
    make: Callable[..., Any]
    kind: type
    integers: Any
    name = getattr(tensor_type, "value", tensor_type)
    if name == "pt":
        import torch

        make, kind, integers = torch.as_tensor, torch.Tensor, torch.int64
    elif name == "np":
        import numpy

        make, kind, integers = _array, numpy.ndarray, numpy.int64
    else:
        raise ValueError(f"return_tensors is {tensor_type!r}; allowed: 'pt' for torch, 'np' for NumPy, None for lists")

    def convert(key: str, value: Any) -> Any:
        if isinstance(value, kind):
            return value
        try:
            return make(value) if _is_filled(value) else make(value, dtype=integers)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"{key} makes no rectangular tensor ({error}); pad and cut the rows to one length: "
                "padding=True, truncation=True"
            ) from error

    return convert


def _array(value: Any, dtype: Any = None) -> Any:
    """A NumPy array; of rows that differ in length an array of arrays."""
    import numpy

    if isinstance(value, list) and len({len(row) for row in value if isinstance(row, list)}) > 1:
        value, dtype = [numpy.asarray(row) for row in value], object
    return numpy.asarray(value, dtype)


def _is_filled(value: Any) -> bool:
    """Whether a nested list holds any value at all, from which its dtype can be told."""
    return not isinstance(value, list) or any(map(_is_filled, value))
