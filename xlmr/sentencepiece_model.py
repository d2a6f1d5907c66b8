"""The sentencepiece engine in XLM-R's numbering, from a `sentencepiece.bpe.model` or from a `tokenizer.json`.

A model file starts with <unk>, <s>, </s>. XLM-R numbers as fairseq did: <s> 0, <pad> 1, </s> 2, <unk> 3, the file's
other pieces from 4 on, <mask> last. So three records of the file move and two are added before sentencepiece loads it:
its ids are XLM-R's from then on, and a batch of texts becomes ids without any Python per token.
"""

from __future__ import annotations

import base64
import binascii
import io
import itertools
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

SPACE = "▁"  # how sentencepiece writes a space, and the start of every text
MAX_MODEL_BYTES = 64 * 2**20  # the real vocabulary, 250,000 pieces, takes 5 MB
MAX_PIECES = 2**20  # the largest of the family, XLM-V's, has 901,629
OTHER_TOKENIZER = (  # what to do with a checkpoint that has one
    "leave texts to the library that knows it, and xlmr.accelerate(model) makes the encoder of its model this one"
)
CONTROL_PIECES = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # fields of sentencepiece's ModelProto
_PIECE, _SCORE, _TYPE = 1, 2, 3  # fields of its SentencePiece
_CHARSMAP = 2  # field of its NormalizerSpec
# What Unicode calls white space: rules of normalisation make spaces of it, and where a file has none, this does.
WHITE_SPACE = dict.fromkeys(
    [*range(9, 14), 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000], " "
)
LOWER_CASE = {"type": "Lowercase"}  # a normaliser of tokenizer.json
_UNKNOWN, _CONTROL = 2, 3  # values of SentencePiece.type
_UNSUPPORTED = {3: 1, 24: 0, 35: 0}  # TrainerSpec: model_type other than Unigram, ▁ as a suffix, byte fallback


class SentencePieceModel:
    """A Unigram vocabulary; ids are XLM-R's. Immutable and safe to share between threads.

    `proto` holds the bytes of a `sentencepiece.bpe.model` file. ValueError if they are none that XLM-R could have.
    lower_case: texts are put in lower case before anything else, which such a file cannot say.
    """

    def __init__(self, proto: bytes, lower_case: bool = False) -> None:
        self.proto = proto
        self.lower_case = lower_case
        try:
            self._processor = SentencePieceProcessor(model_proto=_renumber(proto))
        except (RuntimeError, TypeError, OSError) as error:
            raise ValueError(f"sentencepiece refuses the model: {' '.join(str(error).split())}") from error
        specs = {number: value for number, value, _ in _fields(proto) if number in (_TRAINER, _NORMALIZER)}
        trainer = _first_level(specs.get(_TRAINER, b""))
        self._charsmap = _first_level(specs.get(_NORMALIZER, b"")).get(_CHARSMAP)
        if any(trainer.get(field, usual) != usual for field, usual in _UNSUPPORTED.items()):
            raise ValueError("the sentencepiece model is not of XLM-R's kind: Unigram, ▁ in front, no byte fallback")
        if self._processor.normalize(" a  b ") != "▁a▁b":
            raise ValueError("the sentencepiece model does not put ▁ in front of a text, or keeps extra spaces")
        self._spaces = {} if self._charsmap else WHITE_SPACE
        self._leaves_nothing: dict[str, bool] = {}

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> SentencePieceModel:
        """Read `sentencepiece.bpe.model`; ValueError names the file if it is not one."""
        with open(path, "rb") as file:
            proto = file.read(MAX_MODEL_BYTES + 1)
        if len(proto) > MAX_MODEL_BYTES:
            raise ValueError(f"{path} is larger than {MAX_MODEL_BYTES} bytes: refused")
        try:
            return cls(proto)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_tokenizer_json(cls, content: dict[str, Any]) -> SentencePieceModel:
        """Rebuild the model from a parsed `tokenizer.json`; ValueError if that describes any other pipeline."""
        return cls(_proto_from_tokenizer_json(content), lowers(content))

    def trained(self, texts: Iterable[str], size: int, **options: Any) -> SentencePieceModel:
        """A model with `size` pieces at most, learnt from texts by sentencepiece's trainer, and this one's rules of
        normalisation; `options`: the trainer's. ValueError where it finds nothing to learn, or refuses an option."""
        learnt = io.BytesIO()
        settings = {
            "model_type": "unigram", "vocab_size": size - 2,  # without <pad> and <mask>
            "hard_vocab_limit": False,
            "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, "unk_piece": "<unk>", "bos_piece": "<s>",
            "eos_piece": "</s>", "normalization_rule_name": "identity",  # what it is given has been normalised
            "max_sentence_length": 2**30,  # it leaves out longer texts, by default those of 4,192 bytes
            "minloglevel": 2, **options,
        }  # fmt: skip
        normalized = (self._processor.normalize(self._prepared(text)).replace(SPACE, " ") for text in texts)
        try:
            SentencePieceTrainer.train(sentence_iterator=normalized, model_writer=learnt, **settings)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"sentencepiece cannot learn {size} pieces: {' '.join(str(error).split())}") from error
        kept = [(number, value) for number, value, _ in _fields(learnt.getvalue()) if number != _NORMALIZER]
        kept += [(number, value) for number, value, _ in _fields(self.proto) if number == _NORMALIZER]
        return type(self)(b"".join(_field(number, value) for number, value in kept), self.lower_case)

    def in_lower_case(self) -> SentencePieceModel:
        """The model that puts texts in lower case first."""
        return self if self.lower_case else type(self)(self.proto, lower_case=True)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return type(self), (self.proto, self.lower_case)

    def __deepcopy__(self, memo: dict[int, Any]) -> SentencePieceModel:
        return self

    def __len__(self) -> int:
        return len(self._processor)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The ids of every text, in one call that uses all cores. ValueError if a text is not Unicode."""
        if self._spaces or self.lower_case:
            texts = [self._prepared(text) for text in texts]
        try:
            if len(texts) == 1:  # no threads to start
                return [self._processor.encode(texts[0])]
            return self._processor.encode(texts)
        except (RuntimeError, TypeError):
            for text in texts:
                _refuse_surrogates(text)
            raise

    def align(self, text: str) -> tuple[list[str], list[tuple[int, int]]]:
        """The piece behind every id of `encode([text])`, and (start, end): `text[start:end]` is what became the piece.

        Positions are code points of the text before normalisation, without the spaces around the piece. What a single
        character expands to (㍿ to 株式会社) keeps that character, however many pieces it is cut into.
        """
        given, text = text, self._prepared(text)
        pieces: list[str] = self._processor.encode(text, out_type=str)
        normalized, origin = self._processor.normalize(text, with_offsets=True)
        size, spans, stop = len(normalized), [], 0
        for piece in pieces:
            start, stop = stop, stop + len(piece)
            first = start + 1 if piece[0] == SPACE and start + 1 < size else start  # ▁ alone: the character behind it
            last = stop - 1 if stop > first else first
            after = last + 1
            while after < size and origin[after] == origin[last]:
                after += 1
            end = origin[after]
            while end > origin[last] + 1 and self._is_removed(text[end - 1]):
                end -= 1
            spans.append((origin[first], end))
        if len(text) > len(given):  # İ has two letters in lower case
            begin = [position for position, letter in enumerate(given) for _ in letter.lower()]
            spans = [(begin[start], begin[end - 1] + 1) for start, end in spans]
        return pieces, spans

    def _prepared(self, text: str) -> str:
        """What sentencepiece is given of a text; in lower case letter by letter: σ at the end of a word, too."""
        if self.lower_case:
            text = text.replace("Σ", "σ").lower()
        return text.translate(self._spaces)

    def _is_removed(self, character: str) -> bool:
        """Whether normalisation leaves nothing of it: spaces and most control characters."""
        if character not in self._leaves_nothing:
            self._leaves_nothing[character] = not self._processor.normalize(character.translate(self._spaces))
        return self._leaves_nothing[character]

    def ids_to_pieces(self, ids: list[int]) -> list[str]:
        """The pieces with these ids, which must be below `len(self)`."""
        return self._processor.id_to_piece(ids)

    def piece_to_id(self, piece: str) -> int | None:
        """The id of a piece of the vocabulary, None if it has no such piece."""
        _refuse_surrogates(piece)
        index = self._processor.piece_to_id(piece)
        return index if self._processor.id_to_piece(index) == piece else None

    def pieces(self) -> list[str]:
        """The vocabulary: the piece of id i at i."""
        return self.ids_to_pieces(list(range(len(self))))

    def to_tokenizer_json(self, added_tokens: list[dict[str, Any]], bos: str, eos: str) -> dict[str, Any]:
        """The content of the `tokenizer.json` that makes the tokenizers library work as nearly alike as it can.

        `added_tokens` are the file's entries of that name; `bos` and `eos` the contents of two of them.
        """
        scores = self._processor.get_score(list(range(len(self))))
        metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": True}
        token_ids = {token["content"]: token["id"] for token in added_tokens}
        first, last = ({"SpecialToken": {"id": content, "type_id": 0}} for content in (bos, eos))
        text, pair = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
        rules: list[dict[str, Any]] = [LOWER_CASE] if self.lower_case else []
        if self._charsmap:
            encoded = base64.b64encode(self._charsmap).decode()
            rules.append({"type": "Precompiled", "precompiled_charsmap": encoded})
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added_tokens,
            "normalizer": {"type": "Sequence", "normalizers": rules} if len(rules) > 1 else next(iter(rules), None),
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace]},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [first, text, last],
                "pair": [first, text, last, last, pair, last],
                "special_tokens": {t: {"id": t, "ids": [token_ids[t]], "tokens": [t]} for t in (bos, eos)},
            },
            "decoder": metaspace,
            "model": {
                "type": "Unigram",
                "unk_id": CONTROL_PIECES["<unk>"],
                "vocab": list(zip(self.pieces(), scores, strict=True)),
                "byte_fallback": False,
            },
        }


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has the lone surrogate U+{ord(text[error.start]):04X} at position {error.start}, which is no "
            "character; repair the text, for example by text.encode('utf-8', 'replace').decode()"
        ) from None


# The protobuf wire format, as little of it as a model file needs


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, value: int | float | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _fields(message: bytes) -> Iterator[tuple[int, Any, int]]:
    """Yield (number, value, where the next field starts) of a message; ValueError if it is cut short or no message."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = 0
        for shift in range(0, 70, 7):  # ten bytes hold 64 bits
            byte = message[position]
            position += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise IndexError

    try:
        while position < len(message):
            number, wire_type = divmod(varint(), 8)
            if wire_type == 0:
                yield number, varint(), position
                continue
            size = {1: 8, 2: None, 5: 4}[wire_type]
            size = varint() if size is None else size
            position += size
            if position > len(message):
                raise IndexError
            yield number, message[position - size : position], position
    except LookupError:
        raise ValueError("not a sentencepiece model: its bytes are cut short or no protobuf message") from None


def _first_level(message: Any) -> dict[int, Any]:
    if not isinstance(message, bytes):
        raise ValueError("not a sentencepiece model: a number stands where a message should")
    return {number: value for number, value, _ in _fields(message)}


def _renumber(proto: bytes) -> bytes:
    """The model with its pieces in XLM-R's order: <s>, <pad>, </s>, <unk>, the rest, <mask>."""
    first_three = list(itertools.islice(_fields(proto), 3))
    pieces = [_first_level(value) for number, value, _ in first_three if number == _PIECES]
    expected = [(b"<unk>", _UNKNOWN), (b"<s>", _CONTROL), (b"</s>", _CONTROL)]
    if [(piece.get(_PIECE), piece.get(_TYPE)) for piece in pieces] != expected:
        raise ValueError("not XLM-R's sentencepiece model: its first three pieces must be <unk>, <s>, </s>")
    head = [_piece(piece, 0.0, _UNKNOWN if piece == "<unk>" else _CONTROL) for piece in CONTROL_PIECES]
    *_, (_, _, end) = first_three
    return b"".join([*head, proto[end:], _piece("<mask>", 0.0, _CONTROL)])


def _piece(piece: str, score: float, kind: int | None = None) -> bytes:
    record = _field(_PIECE, piece.encode()) + _field(_SCORE, score)
    return _field(_PIECES, record if kind is None else record + _field(_TYPE, kind))


# tokenizer.json


def vocabulary_size(content: dict[str, Any]) -> int:
    """How many pieces a parsed `tokenizer.json` holds; ValueError if it is of another kind, has no such list, or one
    that is too long."""
    match content:
        case {"model": {"type": str(kind)}} if kind != "Unigram":
            raise ValueError(f"its model is a {kind:.40}, XLM-R's is a Unigram: {OTHER_TOKENIZER}")
        case {"model": {"vocab": list(vocabulary)}} if len(vocabulary) > MAX_PIECES:
            raise ValueError(f"its model.vocab holds {len(vocabulary)} pieces: at most {MAX_PIECES} are read")
        case {"model": {"vocab": list(vocabulary)}}:
            return len(vocabulary)
    raise ValueError("its model.vocab must be a list of [piece, score]")


def lowers(content: dict[str, Any]) -> bool:
    """Whether a parsed `tokenizer.json` puts texts in lower case."""
    return LOWER_CASE in _components(content.get("normalizer"), "normalizers")


def _proto_from_tokenizer_json(content: dict[str, Any]) -> bytes:
    vocabulary_size(content)
    model = content["model"]
    if model.get("byte_fallback"):
        raise ValueError("its model must be a Unigram without byte fallback, as XLM-R's is")
    vocabulary = _checked_vocabulary(model["vocab"])
    if model.get("unk_id") != CONTROL_PIECES["<unk>"] or [p for p, _ in vocabulary[:4]] != list(CONTROL_PIECES):
        raise ValueError(f"its vocabulary must start with {', '.join(CONTROL_PIECES)}, unk_id 3, as XLM-R's does")
    pieces = vocabulary[4:-1] if vocabulary[-1][0] == "<mask>" else vocabulary[4:]
    _check_pre_tokenizer(content.get("pre_tokenizer"))
    head = [("<unk>", _UNKNOWN), ("<s>", _CONTROL), ("</s>", _CONTROL)]
    return b"".join(
        [
            *(_piece(piece, 0.0, kind) for piece, kind in head),
            *(_piece(piece, score) for piece, score in pieces),
            _field(_NORMALIZER, _field(_CHARSMAP, _read_charsmap(content.get("normalizer")))),
        ]
    )


def _checked_vocabulary(vocabulary: list[Any]) -> list[tuple[str, float]]:
    if not vocabulary:
        raise ValueError("its model.vocab must be a list of [piece, score]")
    checked = []
    for index, entry in enumerate(vocabulary):
        match entry:
            case [str(piece), int() | float() as score] if abs(score) < 3e38:  # a float32; False for NaN
                checked.append((piece, float(score)))
            case _:
                raise ValueError(f"its model.vocab[{index}] is {entry!s:.80}, not [piece, score]")
    if len(dict(checked)) < len(checked):
        raise ValueError("its model.vocab holds a piece twice")
    return checked


def _components(value: Any, key: str) -> Iterator[dict[str, Any]]:
    """The normalizers or pre-tokenizers that a `tokenizer.json` chains, those inside a Sequence one by one."""
    if isinstance(value, dict) and value.get("type") == "Sequence" and isinstance(value.get(key), list):
        for part in value[key]:
            yield from _components(part, key)
    elif isinstance(value, dict):
        yield value
    elif value is not None:
        raise ValueError(f"its {key} hold {value!s:.80}, which is no component")


def _read_charsmap(normalizer: Any) -> bytes:
    """The precompiled normalisation rules; the other normalisers allowed only touch spaces, as sentencepiece does, or
    go before."""
    charsmap = b""
    for part in _components(normalizer, "normalizers"):
        match part:
            case {"type": "Precompiled", "precompiled_charsmap": str(encoded)} if not charsmap:
                try:
                    charsmap = base64.b64decode(encoded, validate=True)
                except binascii.Error as error:
                    raise ValueError(f"its precompiled_charsmap is not base64: {error}") from error
            case {"type": "Strip"}:
                pass
            case {"type": "Lowercase"} if not charsmap:  # behind the rules it would make other letters
                pass
            case {"type": "Replace", "pattern": {"Regex": " {2,}"} | {"String": " " | " {2,}"}, "content": " " | "▁"}:
                pass
            case _:
                raise ValueError(f"its normalizer has {part!s:.80}, which XLM-R does not use")
    return charsmap


def _check_pre_tokenizer(pre_tokenizer: Any) -> None:
    for part in _components(pre_tokenizer, "pretokenizers"):
        match part:
            case {"type": "WhitespaceSplit"} | {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}:
                pass
            case {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True} if "prepend_scheme" not in part:
                pass
            case _:
                raise ValueError(f"its pre_tokenizer has {part!s:.80}, which XLM-R does not use")
