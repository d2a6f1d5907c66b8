"""XLMRobertaTokenizer: texts to ids and back, with the names and results of transformers' class.

Where the sentencepiece library and transformers' Rust tokenizer disagree (letters in decomposed form, half-width kana,
full-width special tokens, U+0085), the ids are those of sentencepiece, with which XLM-R was trained.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .batch_encoding import BatchEncoding, CharSpan, Encoding, TokenSpan
from .files import own_keywords, read_json, refuse_unknown, resolve, write_atomically
from .sentencepiece_model import SPACE, SentencePieceModel, vocabulary_size
from .token_layout import (
    Span,
    TokenLayout,
    Values,
    combine,
    cut,
    kept_part,
    pad_row,
    padded_length,
    special_count,
    windows,
)
from .vocabulary import SPECIAL_TOKENS, AddedToken, AddedVocabulary, Vocabulary, describe, integer, plain, tokens_by_id

__all__ = ["AddedToken", "BatchEncoding", "CharSpan", "TokenSpan", "XLMRobertaTokenizer", "XLMRobertaTokenizerFast"]

logger = logging.getLogger(__name__)

VOCAB_FILE = "sentencepiece.bpe.model"
TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
MAX_TOKENIZER_BYTES = 128 * 2**20  # tokenizer.json of the real vocabulary takes 17 MB
NO_LIMIT = int(1e30)  # model_max_length when nothing is known, as in transformers
LARGEST_LIMIT = int(1e20)  # what lies above means that nothing is known, too

_SETTINGS: dict[str, Any] = {  # what tokenizer_config.json may hold for the constructor, and the type of it
    "added_tokens_decoder": dict,
    "additional_special_tokens": list,
    "clean_up_tokenization_spaces": bool,
    "extra_special_tokens": (list, dict),
    "model_input_names": list,
    "model_max_length": (int, float),
    "padding_side": str,
    "split_special_tokens": bool,
    "truncation_side": str,
}
_NOT_KEPT = ("auto_map", "name_or_path", "special_tokens_map_file", "tokenizer_class", "tokenizer_file", "vocab_file")
_PADDING: dict[Any, str] = {name: name for name in ("longest", "max_length", "do_not_pad")}
_PADDING |= {True: "longest", False: "do_not_pad"}
_TRUNCATION: dict[Any, str] = {name: name for name in ("longest_first", "only_first", "only_second", "do_not_truncate")}
_TRUNCATION |= {True: "longest_first", False: "do_not_truncate", None: "do_not_truncate"}


class XLMRobertaTokenizer(Vocabulary):
    """Texts to XLM-R's ids and back.

    Args:
        vocab_file: path of a `sentencepiece.bpe.model`.
        tokenizer_file: path of a `tokenizer.json`; its added tokens are taken, and its vocabulary if there is no
            `vocab_file`.
        model_max_length: tokens that the model can take, special tokens included; None if that is not known.
        padding_side, truncation_side: "right" or "left".
        additional_special_tokens (transformers 5: extra_special_tokens): more special tokens, added where missing.
        added_tokens_decoder: id → token, added at just these ids.
        model_input_names: what a call returns by default, of input_ids, token_type_ids and attention_mask.
        clean_up_tokenization_spaces: whether decode removes spaces before punctuation.
        split_special_tokens: whether special tokens written in a text are cut like any other word.
        add_prefix_space: a text begins with ▁, as in pre-training; nothing else is offered.
        special_tokens: bos_token, eos_token, sep_token, cls_token, unk_token, pad_token, mask_token; str or AddedToken.

    A text is cut at the added and special tokens in it first, verbatim, then each stretch between them is given to
    sentencepiece. A tokenizer may be shared between threads as long as none of them adds tokens, and can be pickled.
    """

    padding_side: str
    truncation_side: str
    pad_token_type_id = 0
    is_fast = True  # tokens can be mapped to characters

    def __init__(
        self,
        vocab_file: str | os.PathLike[str] | None = None,
        tokenizer_file: str | os.PathLike[str] | None = None,
        *,
        model_max_length: int | None = None,
        padding_side: str = "right",
        truncation_side: str = "right",
        additional_special_tokens: Sequence[Any] = (),
        extra_special_tokens: Sequence[Any] | Mapping[str, Any] = (),
        added_tokens_decoder: Mapping[Any, Any] | None = None,
        model_input_names: Sequence[str] = ("input_ids", "attention_mask"),
        clean_up_tokenization_spaces: bool = False,
        split_special_tokens: bool = False,
        add_prefix_space: bool = True,
        name_or_path: str = "",
        **special_tokens: Any,
    ) -> None:
        if not add_prefix_space:
            raise ValueError("add_prefix_space is False: XLM-R was trained with ▁ in front of every text, leave it out")
        self.name_or_path = name_or_path
        self.init_kwargs: dict[str, Any] = {}  # of tokenizer_config.json, what is only written back
        self.model_max_length = (
            NO_LIMIT if model_max_length is None else integer("model_max_length", model_max_length, 1)
        )
        self.padding_side = _side("padding_side", padding_side)
        self.truncation_side = _side("truncation_side", truncation_side)
        self.model_input_names = list(model_input_names)
        self.clean_up_tokenization_spaces = clean_up_tokenization_spaces
        self.split_special_tokens = split_special_tokens
        self._warned: set[str] = set()

        model, file_tokens = _load(vocab_file, tokenizer_file)
        extra = extra_special_tokens.values() if isinstance(extra_special_tokens, Mapping) else extra_special_tokens
        decoder = {**tokens_by_id((added_tokens_decoder or {}).items()), **file_tokens}
        super().__init__(model, special_tokens, [*additional_special_tokens, *extra], decoder)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        subfolder: str = "",
        **settings: Any,
    ) -> XLMRobertaTokenizer:
        """Load from a checkpoint directory or a name on the Hugging Face hub; `settings` are the constructor's.

        Read are `sentencepiece.bpe.model`, or `tokenizer.json` where it stands alone, and `tokenizer_config.json`.
        `model_max_length` is what that declares, but no more than config.json's positions allow. OSError if there is
        no such checkpoint or it has no vocabulary; ValueError if a file is damaged or describes another tokenizer.
        """

        def find(filename: str) -> Path | None:
            return resolve(
                pretrained_model_name_or_path,
                filename,
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                local_files_only=local_files_only,
                subfolder=subfolder,
            )

        def read(filename: str) -> dict[str, Any]:
            path = find(filename)
            return {} if path is None else read_json(path)

        config = read(CONFIG_FILE)
        complete = "added_tokens_decoder" in config  # since transformers 4.34, and no longer since 5
        if not complete:
            added = read("added_tokens.json").items()
            config |= read("special_tokens_map.json")
            config["added_tokens_decoder"] = tokens_by_id((index, content) for content, index in added)
        vocab_file = find(VOCAB_FILE)
        tokenizer_file = None if vocab_file and complete else find(TOKENIZER_FILE)
        if vocab_file is None and tokenizer_file is None:
            raise OSError(f"{pretrained_model_name_or_path} has neither {VOCAB_FILE} nor {TOKENIZER_FILE}")
        known = {"name_or_path": str(pretrained_model_name_or_path), **_known_settings(config, read("config.json"))}
        tokenizer = cls(vocab_file, tokenizer_file, **{**known, **own_keywords(settings)})
        tokenizer.init_kwargs = {key: value for key, value in config.items() if key not in {*known, *_NOT_KEPT}}
        return tokenizer

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, filename_prefix: str | None = None, **options: Any
    ) -> tuple[str, ...]:
        """Write what this class and transformers load back, with or without protobuf; return the paths.

        `tokenizer.json` is for transformers: its Rust tokenizer gives other ids where the two libraries disagree.
        """
        refuse_unknown("save_pretrained", options)
        config = {
            **self.init_kwargs,
            **self._special_tokens,
            "added_tokens_decoder": {str(index): asdict(token) for index, token in self._added.tokens.items()},
            "additional_special_tokens": self.additional_special_tokens,
            "clean_up_tokenization_spaces": self.clean_up_tokenization_spaces,
            "model_input_names": self.model_input_names,
            "model_max_length": self.model_max_length,
            "padding_side": self.padding_side,
            "split_special_tokens": self.split_special_tokens,
            "tokenizer_class": "XLMRobertaTokenizer",
            "truncation_side": self.truncation_side,
        }
        added = [{"id": index, **asdict(token)} for index, token in self._added.tokens.items()]
        tokenizer_json = self._model.to_tokenizer_json(added, self.bos_token, self.eos_token)
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        files: dict[str, bytes | str] = {
            prefix + VOCAB_FILE: self._model.proto,
            prefix + TOKENIZER_FILE: json.dumps(tokenizer_json, ensure_ascii=False),
            prefix + CONFIG_FILE: json.dumps(config, ensure_ascii=False, indent=2, sort_keys=True) + "\n",
        }
        old = (prefix + name for name in ("added_tokens.json", "special_tokens_map.json"))  # CONFIG_FILE says it all
        write_atomically(save_directory, files, [name for name in old if Path(save_directory, name).is_file()])
        return tuple(os.path.join(save_directory, name) for name in files)

    def save_vocabulary(
        self, save_directory: str | os.PathLike[str], filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Write `sentencepiece.bpe.model` alone; return its path."""
        name = f"{filename_prefix}-{VOCAB_FILE}" if filename_prefix else VOCAB_FILE
        write_atomically(save_directory, {name: self._model.proto})
        return (os.path.join(save_directory, name),)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(name_or_path={self.name_or_path!r}, vocab_size={self.vocab_size}, "
            f"model_max_length={self.model_max_length}, padding_side={self.padding_side!r}, "
            f"truncation_side={self.truncation_side!r}, special_tokens={self.special_tokens_map}, "
            f"additional_special_tokens={self.additional_special_tokens}, added_tokens={len(self._added.tokens)})"
        )

    # Texts to ids

    def __call__(
        self,
        text: Any,
        text_pair: Any = None,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        split_special_tokens: bool | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Tokenise a text, a pair of texts or a batch of either: `<s> A </s>`, `<s> A </s></s> B </s>`.

        Args:
            text: a str or a list of str; with `is_split_into_words` a list of words or a list of such lists. A batch
                may also hold pairs, (text, text).
            text_pair: None, or as many second texts. The empty str is a second text in a batch, none outside of one.
            padding: False; True or "longest", to the longest row; "max_length".
            truncation: False; True or "longest_first", "only_first", "only_second". True if only `max_length` is given.
            max_length: of a row, special tokens included; by default `model_max_length`.
            stride: how many tokens the windows of a text share, with `return_overflowing_tokens`.
            pad_to_multiple_of: round the padded length up to a multiple of it.
            padding_side: "right" or "left"; by default the attribute.
            return_tensors: None for lists of int, "pt" for torch (int64), "np" for NumPy.
            return_overflowing_tokens: what truncation cuts off follows in further rows; overflow_to_sample_mapping
                tells the text of each.
            return_special_tokens_mask: 1 at the special tokens put around texts and at padding.
            return_offsets_mapping: offset_mapping, (start, end) of each token in code points of its text.
            return_length: length, of each row.
            return_token_type_ids, return_attention_mask: by default what `model_input_names` says.
            split_special_tokens: cut special tokens written in a text like any other word; by default the attribute.
            verbose: tell, once, if a row is longer than `model_max_length`.

        Returns a `BatchEncoding` with the rows of input_ids, attention_mask and what else is asked for; of one text,
        and without tensors, the row itself. TypeError or ValueError for anything else than the above.
        """
        texts, batched = _read_texts(text, text_pair, is_split_into_words)
        plain = self.split_special_tokens if split_special_tokens is None else split_special_tokens
        source = _Source(texts, is_split_into_words, plain, self._added)
        ids = self._encode(source)
        layout = self._layout(
            ids,
            add_special_tokens,
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            stride=stride,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            overflow=return_overflowing_tokens,
            verbose=verbose,
        )
        data = self._columns(layout, ids, return_token_type_ids, return_attention_mask, return_special_tokens_mask)
        encodings: Any = functools.partial(self._align, source, layout, ids)
        if return_offsets_mapping:
            encodings = encodings()
            data["offset_mapping"] = [encoding.offsets for encoding in encodings]
        if return_length:
            data["length"] = [len(row) for row in data["input_ids"]]
        if return_overflowing_tokens:
            data["overflow_to_sample_mapping"] = [sample for sample, *_ in layout.spans]
        elif not batched and return_tensors is None:
            data = {key: value if key == "length" else value[0] for key, value in data.items()}
        return BatchEncoding(data, encodings, return_tensors, n_sequences=1 if ids[1] is None else 2)

    def encode(self, text: Any, text_pair: Any = None, add_special_tokens: bool = True, **options: Any) -> Any:
        """The input_ids of a call."""
        return self(text, text_pair, add_special_tokens, **options)["input_ids"]

    def encode_plus(
        self, text: Any, text_pair: Any = None, add_special_tokens: bool = True, **options: Any
    ) -> BatchEncoding:
        """A call, under its name in transformers 4."""
        return self(text, text_pair, add_special_tokens, **options)

    def batch_encode_plus(
        self, batch_text_or_text_pairs: Any, add_special_tokens: bool = True, **options: Any
    ) -> BatchEncoding:
        """A call on a batch of texts, or of pairs of texts, under its name in transformers 4."""
        return self(batch_text_or_text_pairs, None, add_special_tokens, **options)

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **options: Any
    ) -> list[str]:
        """The tokens of a text, or of a pair, as text; an unknown stretch stands there as it is."""
        return self(text, pair, add_special_tokens, **options).tokens()

    def prepare_for_model(
        self,
        ids: list[int],
        pair_ids: list[int] | None = None,
        add_special_tokens: bool = True,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_special_tokens_mask: bool = False,
        prepend_batch_axis: bool = False,
        **options: Any,
    ) -> BatchEncoding:
        """What a call makes of one text, or pair, that is ids already; `options`: those of a call that cut and pad."""
        columns: Values = [list(ids)], None if pair_ids is None else [list(pair_ids)]
        layout = self._layout(columns, add_special_tokens, **options)
        data = self._columns(layout, columns, return_token_type_ids, return_attention_mask, return_special_tokens_mask)
        row = {key: value[0] for key, value in data.items()}
        return BatchEncoding(row, None, return_tensors, prepend_batch_axis, 1 if pair_ids is None else 2)

    def _encode(self, source: _Source) -> Values:
        """The ids of the tokens of each text, without those around it."""
        first, second = source.texts
        count = len(first)
        texts = first if second is None else [*first, *second]
        if source.words:
            ids = iter(self._encode_each([word for text in texts for word in text], source))
            found = [[index for _ in text for index in next(ids)] for text in texts]
        else:
            found = self._encode_each(texts, source)
        return found[:count], None if second is None else found[count:]

    def _encode_each(self, texts: list[Any], source: _Source) -> list[list[int]]:
        if not source.added.may_occur(texts):
            return self._model.encode(texts)
        cuts = [list(source.added.split(text, source.split_special_tokens)) for text in texts]
        stretches = [
            text[a:b] for text, spans in zip(texts, cuts, strict=True) for a, b, index in spans if index is None
        ]
        ids = iter(self._model.encode(stretches))
        return [[i for *_, index in spans for i in (next(ids) if index is None else (index,))] for spans in cuts]

    def _layout(
        self,
        ids: Values,
        add_special_tokens: bool,
        padding: Any = False,
        truncation: Any = None,
        max_length: int | None = None,
        stride: int = 0,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        overflow: bool = False,
        verbose: bool = True,
    ) -> TokenLayout:
        """Where the tokens of each text go, from the options of a call."""
        if max_length is not None and padding is False and truncation is None:
            truncation = True
        padding, truncation = _choice("padding", padding, _PADDING), _choice("truncation", truncation, _TRUNCATION)
        side = self.padding_side if padding_side is None else _side("padding_side", padding_side)
        stride = integer("stride", stride)
        multiple = None if pad_to_multiple_of is None else integer("pad_to_multiple_of", pad_to_multiple_of, least=1)
        limit = self._limit(max_length, used=padding == "max_length" or truncation != "do_not_truncate")
        around = special_count(pair=ids[1] is not None) if add_special_tokens else 0
        budget = None if limit is None or truncation == "do_not_truncate" else limit - around
        if budget is not None and budget < 0:
            raise ValueError(f"max_length is {limit}; the special tokens alone take {around}")
        if budget is not None and padding != "do_not_pad" and multiple and (budget + around) % multiple:
            raise ValueError(f"max_length is {limit}, no multiple of pad_to_multiple_of, {multiple}")

        spans = self._spans(ids, truncation, budget, stride, overflow)
        lengths = [around + stop - start + (pair[1] - pair[0] if pair else 0) for _, (start, stop), pair in spans]
        longest = max(lengths, default=0)
        if verbose and max_length is None and budget is None and longest > self.model_max_length:
            limits = f"{longest} tokens, more than the {self.model_max_length} that the model can take"
            self._warn_once("too long", f"a text has {limits}; truncation=True cuts it")
        return TokenLayout(spans, add_special_tokens, padded_length(longest, padding, limit, multiple), side)

    def _spans(
        self, ids: Values, truncation: str, budget: int | None, stride: int, overflow: bool
    ) -> list[tuple[int, Span, Span | None]]:
        """What of each text stays, and with `overflow` the windows that follow; `budget`: tokens, None for all."""
        first, second = ids
        side = self.truncation_side
        spans: list[tuple[int, Span, Span | None]] = []
        for sample, row in enumerate(first):
            count, other = len(row), None if second is None else len(second[sample])
            kept, other_kept = (count, other or 0) if budget is None else cut(count, other, truncation, budget)
            if overflow:
                others = [None] if other is None else windows(other, other_kept, stride, side)
                spans += [(sample, *both) for both in combine(windows(count, kept, stride, side), others)]
            else:
                other_part = None if other is None else kept_part(other, other_kept, side)
                spans.append((sample, kept_part(count, kept, side), other_part))
        return spans

    def _limit(self, max_length: int | None, used: bool) -> int | None:
        if max_length is not None:
            return integer("max_length", max_length)
        if self.model_max_length <= LARGEST_LIMIT:
            return self.model_max_length
        if used:
            self._warn_once(
                "no limit", "neither max_length nor the tokenizer's model_max_length gives a limit: none is used"
            )
        return None

    def _warn_once(self, reason: str, message: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            logger.warning(message)

    def _columns(
        self,
        layout: TokenLayout,
        ids: Values,
        type_ids: bool | None,
        attention_mask: bool | None,
        special_tokens_mask: bool,
    ) -> dict[str, list]:
        """The rows of each key that is wanted; None stands for what `model_input_names` says."""
        data = {"input_ids": layout.rows(ids, self.bos_token_id, self.eos_token_id, self.pad_token_id)}
        if "token_type_ids" in self.model_input_names if type_ids is None else type_ids:
            data["token_type_ids"] = layout.constant(0, 0, 0, self.pad_token_type_id)
        if "attention_mask" in self.model_input_names if attention_mask is None else attention_mask:
            data["attention_mask"] = layout.constant(1, 1, 1, 0)
        if special_tokens_mask:
            data["special_tokens_mask"] = layout.constant(0, 0, 1, 1)
        return data

    def _align(self, source: _Source, layout: TokenLayout, ids: Values) -> list[Encoding]:
        """The rows of a call again, with the text, the characters and the word behind each id."""
        first, second = source.texts
        aligned: list[Any] = [self._align_text(text, source) for text in first]
        aligned_pairs: Any = None if second is None else [self._align_text(text, source) for text in second]

        def rows(field: int, begin: Any, end: Any, fill: Any) -> list[list]:
            values = [text[field] for text in aligned], aligned_pairs and [text[field] for text in aligned_pairs]
            return layout.rows(values, begin, end, fill)

        columns = {
            **self._columns(layout, ids, type_ids=True, attention_mask=True, special_tokens_mask=True),
            "tokens": rows(0, self.bos_token, self.eos_token, self.pad_token),
            "offsets": rows(1, (0, 0), (0, 0), (0, 0)),
            "word_ids": rows(2, None, None, None),
            "sequence_ids": layout.constant(0, 1, None, None),
        }
        names = [{"input_ids": "ids", "token_type_ids": "type_ids"}.get(name, name) for name in columns]
        n_sequences = 1 if second is None else 2
        return [
            Encoding(**dict(zip(names, row, strict=True)), n_sequences=n_sequences)
            for row in zip(*columns.values(), strict=True)
        ]

    def _align_text(self, text: Any, source: _Source) -> tuple[list[str], list[Span], list[int]]:
        """For each id of a text, which is a str or a list of words: the token, its characters, its word."""
        tokens: list[str] = []
        spans: list[Span] = []
        words: list[int] = []
        if source.words:
            of_words = replace(source, words=False)
            for number, word in enumerate(text):
                found, found_spans, _ = self._align_text(word, of_words)
                tokens += found
                spans += found_spans
                words += [number] * len(found)
            return tokens, spans, words
        for start, end, index in source.added.split(text, source.split_special_tokens):
            number = words[-1] + 1 if words else 0
            if index is not None:
                tokens.append(source.added.tokens[index].content)
                spans.append((start, end))
                words.append(number)
                continue
            pieces, found_spans = self._model.align(text[start:end])
            tokens += pieces
            spans += [(start + first, start + last) for first, last in found_spans] if start else found_spans
            starts = itertools.accumulate((piece[0] == SPACE for piece in pieces), initial=number - 1)
            words += itertools.islice(starts, 1, None)
        return tokens, spans, words

    # Rows of ids

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Pad rows that have been tokenised: a dict of lists or tensors, or a list of such dicts, one a row.

        Padded are input_ids, attention_mask (made where missing), token_type_ids, special_tokens_mask and
        offset_mapping; other keys, labels say, stay as they are. Tensors come back as tensors. The other arguments are
        those of a call; `verbose` has no effect.
        """
        columns = _read_columns(encoded_inputs)
        return_tensors = return_tensors or _tensor_type(columns["input_ids"])
        columns = {key: plain(value) for key, value in columns.items()}
        batched = not columns["input_ids"] or isinstance(columns["input_ids"][0], list)
        if not batched:
            columns = {key: [value] for key, value in columns.items()}
        lengths = [len(row) for row in columns["input_ids"]]
        if "attention_mask" in self.model_input_names if return_attention_mask is None else return_attention_mask:
            columns.setdefault("attention_mask", [[1] * length for length in lengths])

        padding = _choice("padding", padding, _PADDING)
        side = self.padding_side if padding_side is None else _side("padding_side", padding_side)
        multiple = None if pad_to_multiple_of is None else integer("pad_to_multiple_of", pad_to_multiple_of, least=1)
        limit = self._limit(max_length, used=padding == "max_length")
        length = padded_length(max(lengths, default=0), padding, limit, multiple)
        fills = {
            "input_ids": self.pad_token_id,
            "attention_mask": 0,
            "token_type_ids": self.pad_token_type_id,
            "special_tokens_mask": 1,
            "offset_mapping": (0, 0),
        }
        for key in fills.keys() & columns.keys():
            if [len(row) for row in columns[key]] != lengths:
                raise ValueError(f"the rows of {key} are not as many, or not as long, as those of input_ids")
            columns[key] = [pad_row(row, length, fills[key], side) for row in columns[key]]
        return BatchEncoding(
            columns if batched else {key: value[0] for key, value in columns.items()}, tensor_type=return_tensors
        )

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """`<s> A </s>`, or `<s> A </s></s> B </s>`, of ids without special tokens."""
        return self.prepare_for_model(token_ids_0, token_ids_1, verbose=False)["input_ids"]

    def get_special_tokens_mask(
        self, token_ids_0: Any, token_ids_1: Any = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 at special tokens, 0 elsewhere: in the row built from ids without them, or in ids that have them."""
        if not already_has_special_tokens:
            prepared = self.prepare_for_model(token_ids_0, token_ids_1, return_special_tokens_mask=True, verbose=False)
            return prepared["special_tokens_mask"]
        if token_ids_1 is not None:
            raise ValueError("with already_has_special_tokens=True there is one list of ids; token_ids_1 must be None")
        special = set(self.all_special_ids)
        return [int(int(index) in special) for index in token_ids_0]

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Zeros, one for each id of the row: XLM-R has no token types."""
        return [0] * len(self.build_inputs_with_special_tokens(token_ids_0, token_ids_1))

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """How many special tokens stand around a text, or around a pair of texts."""
        return special_count(pair)

    @property
    def max_len_single_sentence(self) -> int:
        """The tokens of one text that fit into `model_max_length`."""
        return self.model_max_length - special_count(pair=False)

    @property
    def max_len_sentences_pair(self) -> int:
        """The tokens of two texts together that fit into `model_max_length`."""
        return self.model_max_length - special_count(pair=True)


XLMRobertaTokenizerFast = XLMRobertaTokenizer


@dataclass(frozen=True)
class _Source:
    """What a call was given: texts and their pairs, each a str or a list of words; the added tokens of that time."""

    texts: Values
    words: bool
    split_special_tokens: bool
    added: AddedVocabulary


# Reading arguments


def _read_texts(text: Any, text_pair: Any, words: bool) -> tuple[Values, bool]:
    """((texts, their pairs or None), whether it was a batch), or an error that says what is wrong with them."""
    is_text = _is_words if words else _is_string
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


def _is_words(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_string, value))


def _is_pair(value: Any, is_text: Callable[[Any], bool]) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(is_text, value))


def _read_columns(encoded_inputs: Any) -> dict[str, Any]:
    """A dict of columns from one, or from a list of rows that are dicts."""
    if isinstance(encoded_inputs, Mapping):
        columns = dict(encoded_inputs)
    elif isinstance(encoded_inputs, (list, tuple)) and all(isinstance(row, Mapping) for row in encoded_inputs):
        keys = encoded_inputs[0].keys() if encoded_inputs else ()
        if any(row.keys() != keys for row in encoded_inputs):
            raise ValueError("the rows to pad have different keys")
        columns = {key: [row[key] for row in encoded_inputs] for key in keys}
    else:
        raise TypeError(f"pad was given {describe(encoded_inputs)}; allowed: a dict of lists, or a list of dicts")
    if "input_ids" not in columns:
        raise ValueError(f"there are no input_ids to pad, but only {list(columns)}")
    return columns


def _tensor_type(value: Any) -> str | None:
    """ "pt" or "np" for a tensor or array, or for a list of them."""
    value = value[0] if isinstance(value, (list, tuple)) and value else value
    return {"torch": "pt", "numpy": "np"}.get(type(value).__module__) if getattr(value, "ndim", 0) else None


def _choice(name: str, value: Any, choices: Mapping[Any, str]) -> str:
    value = getattr(value, "value", value)  # transformers' enumerations hold the same names
    if not isinstance(value, (str, bool, type(None))) or value not in choices:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, choices))}")
    return choices[value]


def _side(name: str, value: Any) -> str:
    if value not in ("right", "left"):
        raise ValueError(f"{name} is {value!r}; allowed: 'right', 'left'")
    return value


# Reading checkpoint files


def _load(
    vocab_file: str | os.PathLike[str] | None, tokenizer_file: str | os.PathLike[str] | None
) -> tuple[SentencePieceModel, dict[int, Any]]:
    """The model, and the added tokens of `tokenizer.json` by id."""
    if vocab_file is None and tokenizer_file is None:
        raise ValueError(f"give vocab_file, the path of a {VOCAB_FILE}, or tokenizer_file, that of a {TOKENIZER_FILE}")
    model = None if vocab_file is None else SentencePieceModel.from_file(vocab_file)
    if tokenizer_file is None and model is not None:
        return model, {}
    content = read_json(str(tokenizer_file), MAX_TOKENIZER_BYTES)
    try:
        size = vocabulary_size(content)
        model = model or SentencePieceModel.from_tokenizer_json(content)
        added = content.get("added_tokens", [])
        if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
            raise ValueError("its added_tokens must be a list of objects")
    except ValueError as error:
        raise ValueError(f"{tokenizer_file}: {error}") from error
    if size not in (len(model), len(model) - 1):  # with <mask>, or with <mask> among the added tokens only
        raise ValueError(
            f"{tokenizer_file} holds {size} pieces, {vocab_file} {len(model)}: remove the one that is stale"
        )
    return model, tokens_by_id((token.get("id"), token) for token in added)


def _known_settings(config: dict[str, Any], model_config: dict[str, Any]) -> dict[str, Any]:
    """What tokenizer_config.json and config.json say that the constructor takes; ValueError for nonsense."""
    known = {
        name: value for name, value in config.items() if value is not None and name in {*_SETTINGS, *SPECIAL_TOKENS}
    }
    for name, kind in _SETTINGS.items():
        if name in known and not isinstance(known[name], kind):
            raise ValueError(f"{CONFIG_FILE} gives {describe(known[name])} as {name}, which is of another type")
    known["model_max_length"] = _longest_row(known.get("model_max_length"), model_config)
    return known


def _longest_row(declared: float | None, config: dict[str, Any]) -> int | None:
    """The lesser of what tokenizer_config.json declares and what config.json has positions for."""
    if declared is not None and not declared >= 1:
        raise ValueError(f"{CONFIG_FILE} gives {declared!r} as model_max_length; a positive integer is needed")
    limits = [] if declared is None or declared > LARGEST_LIMIT else [int(declared)]
    positions, pad = config.get("max_position_embeddings"), config.get("pad_token_id", 1)
    if str(config.get("model_type")).startswith("xlm-roberta") and isinstance(positions, int) and isinstance(pad, int):
        limits.append(max(positions - pad - 1, 1))
    return min(limits, default=None)
