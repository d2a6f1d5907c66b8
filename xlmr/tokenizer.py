"""XLMRobertaTokenizer: texts to ids and back, with the names and results of transformers' class.

Where the sentencepiece library and transformers' Rust tokenizer disagree (letters in decomposed form, half-width kana,
full-width special tokens, U+0085), the ids are those of sentencepiece, with which XLM-R was trained.

The way of a call: texts.py reads the texts and makes ids of them, by added_tokens.py and sentencepiece_model.py;
token_layout.py cuts, joins and pads these to rows; batch_encoding.py is what comes back. vocabulary.py turns single
tokens into ids, and ids into text; tokenizer_files.py reads and writes the checkpoint.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from .added_tokens import AddedToken, tokens_by_id
from .arguments import as_lists, check_side, choice, describe, integer
from .batch_encoding import BatchEncoding, CharSpan, Encoding, TokenSpan
from .files import own_keywords, refuse_unknown, write_atomically
from .hub import Pushable, take_keywords
from .texts import Segmenter, read_texts, with_targets
from .token_layout import TRUNCATION, Padding, TokenLayout, Values, kept_spans, pad_row, row_length, special_count
from .tokenizer_files import LARGEST_LIMIT, NO_LIMIT, VOCAB_FILE, read_checkpoint, read_model, write_checkpoint
from .vocabulary import Vocabulary

__all__ = ["AddedToken", "BatchEncoding", "CharSpan", "TokenSpan", "XLMRobertaTokenizer", "XLMRobertaTokenizerFast"]

logger = logging.getLogger(__name__)

# Keywords of a call, of a model and of AutoTokenizer, which the reference's from_pretrained takes and heeds not.
UNHEEDED = {"config", "device_map", "max_length", "padding", "return_tensors", "stride", "tokenizer_type", "truncation"}


class XLMRobertaTokenizer(Vocabulary, Pushable):
    """Texts to XLM-R's ids and back.

    Args:
        vocab_file: path of a `sentencepiece.bpe.model`.
        tokenizer_file: path of a `tokenizer.json`; its added tokens are taken, and its vocabulary if there is no
            `vocab_file`.
        model_max_length: tokens that the model can take, special tokens included; None if that is not known.
        padding_side, truncation_side: "right" or "left"; None is what the `tokenizer_file` says, else "right".
        additional_special_tokens (transformers 5: extra_special_tokens): more special tokens, added where missing.
        added_tokens_decoder: id → token, added at just these ids.
        model_input_names: what a call returns by default, of input_ids, token_type_ids and attention_mask.
        clean_up_tokenization_spaces: whether decode removes spaces before punctuation.
        split_special_tokens: whether special tokens written in a text are cut like any other word.
        add_prefix_space: a text begins with ▁, as in pre-training; nothing else is offered.
        do_lower_case: texts are put in lower case first, letter by letter, but not the added and special tokens in
            them; also where the `tokenizer_file` says so. It is saved there, where transformers 5 does not look for it.
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
        padding_side: str | None = None,
        truncation_side: str | None = None,
        additional_special_tokens: Sequence[Any] = (),
        extra_special_tokens: Sequence[Any] | Mapping[str, Any] = (),
        added_tokens_decoder: Mapping[Any, Any] | None = None,
        model_input_names: Sequence[str] = ("input_ids", "attention_mask"),
        clean_up_tokenization_spaces: bool = False,
        split_special_tokens: bool = False,
        add_prefix_space: bool = True,
        do_lower_case: bool = False,
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
        files = read_model(vocab_file, tokenizer_file)
        self.padding_side = check_side("padding_side", padding_side or files.padding_side)
        self.truncation_side = check_side("truncation_side", truncation_side or files.truncation_side)
        self.model_input_names = list(model_input_names)
        self.clean_up_tokenization_spaces = clean_up_tokenization_spaces
        self.split_special_tokens = split_special_tokens
        self._warned: set[str] = set()

        extra = extra_special_tokens.values() if isinstance(extra_special_tokens, Mapping) else extra_special_tokens
        decoder = {**tokens_by_id((added_tokens_decoder or {}).items()), **files.added}
        model = files.model.in_lower_case() if do_lower_case else files.model
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

        Read are `sentencepiece.bpe.model` and `tokenizer_config.json`; `tokenizer.json` where the former is missing, or
        for what the two do not say, added tokens or lower case.
        `model_max_length` is what that declares, but no more than config.json's positions allow. OSError if there is
        no such checkpoint or it has no vocabulary; ValueError if a file is damaged or describes another tokenizer.
        """
        checkpoint = read_checkpoint(
            pretrained_model_name_or_path,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            subfolder=subfolder,
        )
        given = {name: value for name, value in own_keywords(settings).items() if name not in UNHEEDED}
        settings = {**checkpoint.settings, **given}
        tokenizer = cls(checkpoint.vocab_file, checkpoint.tokenizer_file, **settings)
        tokenizer.init_kwargs = checkpoint.only_kept
        return tokenizer

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        filename_prefix: str | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> tuple[str, ...]:
        """Write what this class and transformers load back, with or without protobuf; return the paths.

        `tokenizer.json` is for transformers: its Rust tokenizer gives other ids where the two libraries disagree.
        push_to_hub: upload the files besides; its keywords are taken, repo_id is by default the directory's name.
        """
        hub = take_keywords(options, save_directory)
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
        written = write_checkpoint(save_directory, filename_prefix, self._model, config)
        if push_to_hub:
            self.push_to_hub(**hub, filename_prefix=filename_prefix)
        return written

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

    @with_targets
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

        `text_target` and `text_pair_target` are further texts, whose ids the result holds as labels; alone they are
        tokenised like any texts.

        Returns a `BatchEncoding` with the rows of input_ids, attention_mask and what else is asked for; of one text,
        and without tensors, the row itself. TypeError or ValueError for anything else than the above.
        """
        texts, batched = read_texts(text, text_pair, is_split_into_words)
        if split_special_tokens is None:
            split_special_tokens = self.split_special_tokens
        segmenter = Segmenter(self._model, self._added, is_split_into_words, split_special_tokens)
        ids = segmenter.encode(texts)
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
        encodings: Any = functools.partial(self._encodings, segmenter, texts, layout, ids)
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
        padded = self._padding(padding, pad_to_multiple_of, padding_side)
        truncation, stride = choice("truncation", truncation, TRUNCATION), integer("stride", stride)
        limit = self._limit(max_length, used=padded.strategy == "max_length" or truncation != "do_not_truncate")
        around = special_count(pair=ids[1] is not None) if add_special_tokens else 0
        most = None if truncation == "do_not_truncate" else limit  # tokens that a row is cut to
        if most is not None and most < around:
            raise ValueError(f"max_length is {most}; the special tokens alone take {around}")
        if most is not None and padded.multiple and most % padded.multiple:
            raise ValueError(f"max_length is {most}, no multiple of pad_to_multiple_of, {padded.multiple}")

        budget = None if most is None else most - around
        spans = kept_spans(ids, truncation, budget, self.truncation_side, stride if overflow else None)
        longest = max((around + row_length(row) for row in spans), default=0)
        if verbose and max_length is None and most is None and longest > self.model_max_length:
            limits = f"{longest} tokens, more than the {self.model_max_length} that the model can take"
            self._warn_once("too long", f"a text has {limits}; truncation=True cuts it")
        return TokenLayout(spans, add_special_tokens, padded.length(longest, limit), padded.side)

    def _padding(self, padding: Any, pad_to_multiple_of: int | None, side: str | None) -> Padding:
        """How to pad, from the options of a call; the side is by default the attribute's."""
        return Padding.of(padding, pad_to_multiple_of, self.padding_side if side is None else side)

    def _limit(self, max_length: int | None, used: bool) -> int | None:
        """The tokens of a row at most; None where nothing limits them, which a warning says if that is `used`."""
        if max_length is not None:
            return integer("max_length", max_length)
        if self.model_max_length <= LARGEST_LIMIT:
            return self.model_max_length
        if used:
            self._warn_once(
                "no limit", "neither max_length nor the tokenizer's model_max_length gives a limit: none is used"
            )
        return None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_warned": set()}  # datasets finds its cached results by a hash of the pickle

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

    def _encodings(self, segmenter: Segmenter, texts: Values, layout: TokenLayout, ids: Values) -> list[Encoding]:
        """The rows of a call again, with the text, the characters and the word behind each id."""
        aligned = segmenter.align(texts)
        made = self._columns(layout, ids, type_ids=True, attention_mask=True, special_tokens_mask=True)
        columns = {
            "ids": made["input_ids"],
            "type_ids": made["token_type_ids"],
            "attention_mask": made["attention_mask"],
            "special_tokens_mask": made["special_tokens_mask"],
            "tokens": layout.rows(aligned.tokens, self.bos_token, self.eos_token, self.pad_token),
            "offsets": layout.rows(aligned.spans, (0, 0), (0, 0), (0, 0)),
            "word_ids": layout.rows(aligned.words, None, None, None),
            "sequence_ids": layout.constant(0, 1, None, None),
        }
        n_sequences = 1 if texts[1] is None else 2
        rows = zip(*columns.values(), strict=True)
        return [Encoding(**dict(zip(columns, row, strict=True)), n_sequences=n_sequences) for row in rows]

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
        given = _read_columns(encoded_inputs)
        return_tensors = return_tensors or _tensor_type(given["input_ids"])
        columns, batched = _as_rows(given)
        lengths = [len(row) for row in columns["input_ids"]]
        if "attention_mask" in self.model_input_names if return_attention_mask is None else return_attention_mask:
            columns.setdefault("attention_mask", [[1] * length for length in lengths])

        padded = self._padding(padding, pad_to_multiple_of, padding_side)
        length = padded.length(max(lengths, default=0), self._limit(max_length, used=padded.strategy == "max_length"))
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
            columns[key] = [pad_row(row, length, fills[key], padded.side) for row in columns[key]]
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


def _as_rows(columns: dict[str, Any]) -> tuple[dict[str, list], bool]:
    """The columns as lists of rows, and whether there were several rows: a single one may be given by itself."""
    columns = {key: as_lists(value) for key, value in columns.items()}
    batched = not columns["input_ids"] or isinstance(columns["input_ids"][0], list)
    if not batched:
        columns = {key: [value] for key, value in columns.items()}
    if "offset_mapping" in columns:  # tuples, as a call gives them
        columns["offset_mapping"] = [[tuple(span) for span in row] for row in columns["offset_mapping"]]
    return columns, batched


def _tensor_type(value: Any) -> str | None:
    """ "pt" or "np" for a tensor or array, or for a list of them."""
    value = value[0] if isinstance(value, (list, tuple)) and value else value
    return {"torch": "pt", "numpy": "np"}.get(type(value).__module__) if getattr(value, "ndim", 0) else None
