"""Tokens and their ids: sentencepiece's pieces, special and added tokens; ids back to text."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .added_tokens import AddedToken, AddedVocabulary
from .arguments import as_lists, describe, integer
from .files import refuse_unknown
from .sentencepiece_model import CONTROL_PIECES, SPACE, SentencePieceModel

SPECIAL_TOKENS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "cls_token": "<s>",
    "mask_token": "<mask>",
}
_CLEAN_UP = {
    **{f" {mark}": mark for mark in ".?!,"},
    " ' ": "'",
    **{f" {ending}": ending for ending in ("n't", "'m", "'s", "'ve", "'re")},
}


def _special_token(name: str) -> property:
    def read(self: Vocabulary) -> str:
        return self._special_tokens[name]

    def assign(self: Vocabulary, value: str | AddedToken) -> None:
        if self._index(str(value)) is None:
            advice = f"add it: add_special_tokens({{{name!r}: {str(value)!r}}})"
            raise ValueError(f"{name} {str(value)!r} is not in the vocabulary; {advice}")
        self.add_special_tokens({name: value})

    return property(read, assign, doc=f"The text of the {name.replace('_', ' ')}.")


def _special_token_id(name: str) -> property:
    def read(self: Vocabulary) -> int | None:
        return self._index(self._special_tokens[name])

    def assign(self: Vocabulary, value: int) -> None:
        setattr(self, name, self._token(value))

    return property(read, assign, doc=f"The id of the {name.replace('_', ' ')}.")


class Vocabulary:
    """What of a tokenizer turns tokens into ids and back; transformers' names.

    Special tokens that are not in the vocabulary yet get the ids that follow; `added_tokens_decoder` (id → token) says
    where a checkpoint has put its own.
    """

    clean_up_tokenization_spaces = False

    bos_token, bos_token_id = _special_token("bos_token"), _special_token_id("bos_token")
    eos_token, eos_token_id = _special_token("eos_token"), _special_token_id("eos_token")
    unk_token, unk_token_id = _special_token("unk_token"), _special_token_id("unk_token")
    sep_token, sep_token_id = _special_token("sep_token"), _special_token_id("sep_token")
    pad_token, pad_token_id = _special_token("pad_token"), _special_token_id("pad_token")
    cls_token, cls_token_id = _special_token("cls_token"), _special_token_id("cls_token")
    mask_token, mask_token_id = _special_token("mask_token"), _special_token_id("mask_token")

    def __init__(
        self,
        model: SentencePieceModel,
        special_tokens: Mapping[str, Any],
        additional_special_tokens: Sequence[Any],
        added_tokens_decoder: Mapping[int, Any],
    ) -> None:
        unknown = ", ".join(sorted(special_tokens.keys() - SPECIAL_TOKENS.keys()))
        if unknown:
            raise TypeError(f"XLMRobertaTokenizer knows no {unknown}; special tokens are {', '.join(SPECIAL_TOKENS)}")
        self._model = model
        base = {index: AddedToken.of(piece, special=True) for piece, index in CONTROL_PIECES.items()}
        mask = AddedToken("<mask>", lstrip=True, normalized=False, special=True)
        self._added = AddedVocabulary({**base, len(model) - 1: mask})
        self._place(added_tokens_decoder)
        self._special_tokens = dict(SPECIAL_TOKENS)
        self._additional: list[str] = []
        named = {**SPECIAL_TOKENS, **{name: value for name, value in special_tokens.items() if value is not None}}
        self.add_special_tokens({**named, "additional_special_tokens": list(additional_special_tokens)})

    def train_new_from_iterator(
        self,
        text_iterator: Iterable[Any],
        vocab_size: int,
        length: int | None = None,
        new_special_tokens: Sequence[Any] | None = None,
        special_tokens_map: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """A tokenizer like this one, its settings and added tokens included, with a vocabulary that sentencepiece's
        trainer (Unigram) learns from texts, or lists of texts: `vocab_size` ids at most, all of them counted.

        new_special_tokens: str or AddedToken, further ones.  special_tokens_map: new contents of added and special
        tokens.  kwargs: options of SentencePieceTrainer, such as character_coverage or num_threads.  length has no
        effect. The texts are normalised by this tokenizer's rules. ValueError where the trainer cannot.
        """

        def renamed(token: AddedToken) -> AddedToken:
            return replace(token, content=(special_tokens_map or {}).get(token.content, token.content))

        tokens = self._added.tokens
        own = {name: renamed(tokens[self._added.ids[token]]) for name, token in self._special_tokens.items()}
        further = [renamed(token) for index, token in tokens.items() if index >= len(self._model)]
        further += [AddedToken.of(token, special=True) for token in new_special_tokens or ()]
        added = {token.content for token in [*own.values(), *further]} - {*CONTROL_PIECES, "<mask>"}
        texts = (text for item in text_iterator for text in ([item] if isinstance(item, str) else item))
        model = self._model.trained(texts, integer("vocab_size", vocab_size, 1) - len(added), **kwargs)

        new = copy.copy(self)
        additional = [str((special_tokens_map or {}).get(token, token)) for token in self._additional]
        Vocabulary.__init__(new, model, own, [*additional, *(new_special_tokens or ())], {})
        new.add_tokens(further)
        return new

    def __len__(self) -> int:
        """The number of ids, added tokens included."""
        return max(len(self._model), self._added.end)

    @property
    def vocab_size(self) -> int:
        """The number of ids without the tokens that were added to XLM-R's."""
        return len(self._model)

    def get_vocab(self) -> dict[str, int]:
        """Token → id, added tokens included."""
        return {**{piece: index for index, piece in enumerate(self._model.pieces())}, **self._added.ids}

    def get_added_vocab(self) -> dict[str, int]:
        """Token → id of the tokens that are matched verbatim, the special ones among them."""
        return dict(self._added.ids)

    vocab = property(get_vocab)
    added_tokens_encoder = property(get_added_vocab)

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Id → token of the tokens that are matched verbatim, the special ones among them."""
        return dict(self._added.tokens)

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Match one token or a list of them (str or AddedToken) verbatim from now on; return how many ids are new.

        New ids follow the old ones: `model.resize_token_embeddings(len(tokenizer))` makes room for them. One of
        `all_special_tokens` stays special.
        """
        tokens = new_tokens if isinstance(new_tokens, (list, tuple)) else [new_tokens]
        size, special = len(self), {*self.all_special_tokens}
        placed: dict[int, AddedToken] = {}
        fresh: dict[str, int] = {}
        for value in tokens:
            content = AddedToken.of(value).content
            index = self._index(content)
            if index is None:
                index = fresh.setdefault(content, size + len(fresh))
            placed[index] = self._read_token(value, index, special_tokens or content in special)
        if placed:
            self._added = self._added.with_tokens(placed)
        return len(fresh)

    def add_special_tokens(
        self,
        special_tokens_dict: Mapping[str, Any],
        replace_extra_special_tokens: bool = True,
        replace_additional_special_tokens: bool = True,
    ) -> int:
        """Give the special tokens' attributes, or `additional_special_tokens`, new tokens; return how many ids are new.

        `replace_extra_special_tokens` (transformers 4: replace_additional_special_tokens): whether the additional ones
        take the place of those before or join them.
        """
        replaces = replace_extra_special_tokens and replace_additional_special_tokens
        extra_names = {"additional_special_tokens", "extra_special_tokens"}
        unknown = special_tokens_dict.keys() - SPECIAL_TOKENS.keys() - extra_names
        if unknown:
            allowed = ", ".join([*SPECIAL_TOKENS, *sorted(extra_names)])
            raise ValueError(f"{', '.join(map(repr, unknown))} is no special token; allowed: {allowed}")
        count = 0
        for name, value in special_tokens_dict.items():
            if name in extra_names:
                if not isinstance(value, (list, tuple)):
                    raise ValueError(f"{name} is {value!r}; a list of str or AddedToken is needed")
                before = [] if replaces else self._additional
                contents = [AddedToken.of(token).content for token in value]
                self._additional = list(dict.fromkeys([*before, *contents]))
            else:
                self._special_tokens[name] = AddedToken.of(value).content
            count += self.add_tokens(value, special_tokens=True)
        return count

    @property
    def additional_special_tokens(self) -> list[str]:
        """The special tokens that have no attribute of their own."""
        return list(self._additional)

    @property
    def additional_special_tokens_ids(self) -> list[int]:
        """The ids of `additional_special_tokens`."""
        return [self._added.ids[token] for token in self._additional]

    extra_special_tokens = additional_special_tokens  # its name in transformers 5
    extra_special_tokens_ids = additional_special_tokens_ids

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """Attribute → special token."""
        return dict(self._special_tokens)

    @property
    def all_special_tokens(self) -> list[str]:
        """The special tokens, each once."""
        return list(dict.fromkeys([*self._special_tokens.values(), *self.additional_special_tokens]))

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of `all_special_tokens`."""
        return [self._added.ids[token] for token in self.all_special_tokens]

    def _index(self, token: str) -> int | None:
        index = self._added.ids.get(token)
        return self._model.piece_to_id(token) if index is None else index

    def _token(self, index: Any) -> str:
        index = integer("a token id", index)
        if index >= len(self):
            raise ValueError(f"token id {index} is outside the vocabulary; allowed: 0 to {len(self) - 1}")
        return self._added.tokens[index].content if index >= len(self._model) else self._model.ids_to_pieces([index])[0]

    def _place(self, decoder: Mapping[int, Any]) -> None:
        """Put in the added tokens of a checkpoint, at the ids that it gives them."""
        placed: dict[int, AddedToken] = {}
        size, taken = len(self), set[str]()
        for index, value in sorted(decoder.items(), key=operator.itemgetter(0)):
            content = AddedToken.of(value).content
            known = self._index(content)
            if content in taken or index != (size if known is None else known):
                right = f"its id is {known}" if known is not None else f"the next free id is {size}"
                raise ValueError(f"the checkpoint gives its added token {content!r} id {index}, but {right}")
            placed[index] = self._read_token(value, index)
            size = max(size, index + 1)
            taken.add(content)
        self._added = self._added.with_tokens(placed)

    def _read_token(self, value: Any, index: int, special: bool = False) -> AddedToken:
        """The token that `value` describes; a bare str says nothing new about a token that is there already."""
        known = self._added.tokens.get(index) if isinstance(value, str) else None
        token = known or AddedToken.of(value, special)
        return replace(token, special=True) if special else token

    # Ids and tokens

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """The id of a token, or the ids of a list of them; that of <unk> for a token that is not in the vocabulary."""
        if isinstance(tokens, (list, tuple)):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        if not isinstance(tokens, str):
            raise TypeError(f"a token is {describe(tokens)}; allowed: a str, or a list of them")
        index = self._index(tokens)
        return self.unk_token_id if index is None else index

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """The token of an id, or the tokens of a list or tensor of them; ValueError for an id that does not exist."""
        ids = _read_ids(ids)
        if isinstance(ids, int):
            return self._token(ids)
        if skip_special_tokens:
            ids = [index for index in ids if index not in self._added.special_ids]
        if {*map(type, ids)} == {int} and min(ids) >= 0 and max(ids) < len(self._model):  # the usual case, in one call
            return self._model.ids_to_pieces(ids)
        return [self._token(index) for index in ids]

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text of some tokens: ▁ becomes a space, except in the first of them."""
        first, rest = "".join(tokens[:1]), "".join(tokens[1:])
        return first.replace(SPACE, "") + rest.replace(SPACE, " ")

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **options: Any,
    ) -> Any:
        """The text of an id, or of a list or tensor of ids, or of the input_ids of a dict; of several such rows the
        list of their texts.

        `clean_up_tokenization_spaces`: remove the spaces before punctuation and English contractions; by default the
        attribute of that name. ValueError for an id that does not exist.
        """
        refuse_unknown("decode", options)
        ids = _read_ids(token_ids)
        ids = [ids] if isinstance(ids, int) else ids
        if ids and isinstance(ids[0], list):
            return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in ids]
        text = self.convert_tokens_to_string(self.convert_ids_to_tokens(ids, skip_special_tokens))
        if clean_up_tokenization_spaces or (clean_up_tokenization_spaces is None and self.clean_up_tokenization_spaces):
            text = self.clean_up_tokenization(text)
        return text

    def batch_decode(
        self,
        sequences: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **options: Any,
    ) -> list[str]:
        """`decode` as a list in any case: ids that are no list of rows are one row, as in transformers 5."""
        texts = self.decode(sequences, skip_special_tokens, clean_up_tokenization_spaces, **options)
        return texts if isinstance(texts, list) else [texts]

    @staticmethod
    def clean_up_tokenization(text: str) -> str:
        """Remove the spaces before punctuation and English contractions."""
        for spaced, joined in _CLEAN_UP.items():
            text = text.replace(spaced, joined)
        return text


def _read_ids(value: Any) -> Any:
    """The id, or the list of ids or rows, in a tensor, a sequence or the input_ids of a dict; TypeError if none is."""
    ids = as_lists(value["input_ids"] if isinstance(value, Mapping) else value)
    if isinstance(ids, (int, list)):
        return ids
    if isinstance(ids, Iterable) and not isinstance(ids, (str, bytes)):
        return list(ids)
    raise TypeError(f"the token ids are {describe(value)}; allowed: an int, a list or a tensor of them")
