"""The files of a tokenizer in a checkpoint directory: which are read, what they say, and what is written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from .added_tokens import tokens_by_id
from .arguments import describe
from .files import read_json, resolve, write_atomically
from .sentencepiece_model import OTHER_TOKENIZER, SentencePieceModel, lowers, vocabulary_size
from .vocabulary import SPECIAL_TOKENS

VOCAB_FILE = "sentencepiece.bpe.model"
TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
MAX_TOKENIZER_BYTES = 128 * 2**20  # tokenizer.json of the real vocabulary takes 17 MB
NO_LIMIT = int(1e30)  # model_max_length when nothing is known, as in transformers
LARGEST_LIMIT = int(1e20)  # what lies above means that nothing is known, too

SETTINGS: dict[str, Any] = {  # what tokenizer_config.json may hold for the constructor, and the type of it
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
NOT_KEPT = ("auto_map", "name_or_path", "special_tokens_map_file", "tokenizer_class", "tokenizer_file", "vocab_file")


class TokenizerCheckpoint(NamedTuple):
    """What the constructor of a tokenizer takes from a directory; `only_kept`: what is merely written back."""

    vocab_file: Path | None
    tokenizer_file: Path | None
    settings: dict[str, Any]
    only_kept: dict[str, Any]


def read_checkpoint(name_or_dir: str | os.PathLike[str], **source: Any) -> TokenizerCheckpoint:
    """The tokenizer in a directory or hub repository; `source`: the keywords of files.resolve.

    OSError if there is no such checkpoint or it has no vocabulary; ValueError for settings that make no sense.
    """

    def read(filename: str) -> dict[str, Any]:
        path = resolve(name_or_dir, filename, **source)
        return {} if path is None else read_json(path)

    config = read(CONFIG_FILE)
    complete = "added_tokens_decoder" in config  # since transformers 4.34, and no longer since 5
    if not complete:
        added = read("added_tokens.json").items()
        config |= read("special_tokens_map.json")
        config["added_tokens_decoder"] = tokens_by_id((index, content) for content, index in added)
    vocab_file = resolve(name_or_dir, VOCAB_FILE, **source)
    tokenizer_file = resolve(name_or_dir, TOKENIZER_FILE, **source)
    if vocab_file and complete and tokenizer_file and not _mentions_lower_case(tokenizer_file):
        tokenizer_file = None  # it says nothing more, in many megabytes
    if vocab_file is None and tokenizer_file is None:
        raise OSError(
            f"{name_or_dir} has neither {VOCAB_FILE} nor {TOKENIZER_FILE}, the files of XLM-R's tokenizer; if it has "
            f"another one, {OTHER_TOKENIZER}"
        )
    settings = {"name_or_path": str(name_or_dir), **_known_settings(config, read("config.json"))}
    only_kept = {key: value for key, value in config.items() if key not in {*settings, *NOT_KEPT}}
    return TokenizerCheckpoint(vocab_file, tokenizer_file, settings, only_kept)


def _mentions_lower_case(path: Path) -> bool:
    with open(path, "rb") as file:
        return b'"Lowercase"' in file.read(MAX_TOKENIZER_BYTES)


def write_checkpoint(
    directory: str | os.PathLike[str], prefix: str | None, model: SentencePieceModel, config: dict[str, Any]
) -> tuple[str, ...]:
    """Write the files of a tokenizer, `config` being what tokenizer_config.json holds; return their paths. The file of
    sentencepiece, which is read first, is none of them where texts are put in lower case: it could not say so."""
    added = [{"id": int(index), **token} for index, token in config["added_tokens_decoder"].items()]
    tokenizer_json = model.to_tokenizer_json(added, config["bos_token"], config["eos_token"])
    start = f"{prefix}-" if prefix else ""
    files: dict[str, bytes | str] = {} if model.lower_case else {start + VOCAB_FILE: model.proto}
    files |= {
        start + TOKENIZER_FILE: json.dumps(tokenizer_json, ensure_ascii=False),
        start + CONFIG_FILE: json.dumps(config, ensure_ascii=False, indent=2, sort_keys=True) + "\n",
    }
    old = {start + name for name in ("added_tokens.json", "special_tokens_map.json", VOCAB_FILE)} - files.keys()
    write_atomically(directory, files, [name for name in sorted(old) if Path(directory, name).is_file()])
    return tuple(os.path.join(directory, name) for name in files)


class ModelFiles(NamedTuple):
    """The model, and what `tokenizer.json` says besides: added tokens by id, "left" or "right"."""

    model: SentencePieceModel
    added: dict[int, Any]
    padding_side: str = "right"
    truncation_side: str = "right"


def read_model(vocab_file: str | os.PathLike[str] | None, tokenizer_file: str | os.PathLike[str] | None) -> ModelFiles:
    """Read the one of the files that is given, or both; ValueError if they do not belong together."""
    if vocab_file is None and tokenizer_file is None:
        raise ValueError(f"give vocab_file, the path of a {VOCAB_FILE}, or tokenizer_file, that of a {TOKENIZER_FILE}")
    model = None if vocab_file is None else SentencePieceModel.from_file(vocab_file)
    if tokenizer_file is None and model is not None:
        return ModelFiles(model, {})
    content = read_json(str(tokenizer_file), MAX_TOKENIZER_BYTES)
    try:
        size = vocabulary_size(content)
        model = model or SentencePieceModel.from_tokenizer_json(content)
        model = model.in_lower_case() if lowers(content) else model
        added = content.get("added_tokens", [])
        if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
            raise ValueError("its added_tokens must be a list of objects")
    except ValueError as error:
        raise ValueError(f"{tokenizer_file}: {error}") from error
    if size not in (len(model), len(model) - 1):  # with <mask>, or with <mask> among the added tokens only
        raise ValueError(
            f"{tokenizer_file} holds {size} pieces, {vocab_file} {len(model)}: remove the one that is stale"
        )
    sides = (_side(content.get(key)) for key in ("padding", "truncation"))
    return ModelFiles(model, tokens_by_id((token.get("id"), token) for token in added), *sides)


def _side(rule: Any) -> str:
    """Where a `tokenizer.json` pads, or cuts: the default of calls, as in transformers, unlike the rule's lengths."""
    return "left" if isinstance(rule, dict) and rule.get("direction") == "Left" else "right"


def _known_settings(config: dict[str, Any], model_config: dict[str, Any]) -> dict[str, Any]:
    """What tokenizer_config.json and config.json say that the constructor takes; ValueError for nonsense."""
    known = {
        name: value for name, value in config.items() if value is not None and name in {*SETTINGS, *SPECIAL_TOKENS}
    }
    for name, kind in SETTINGS.items():
        value = known.get(name)
        if value is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
            raise ValueError(f"{CONFIG_FILE} gives {describe(value)} as {name}, which is of another type")
    if config.get("add_prefix_space") is False:
        known["add_prefix_space"] = False  # which the constructor refuses
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
