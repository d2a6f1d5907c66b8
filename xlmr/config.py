"""XLMRobertaConfig: the sizes and settings of a model, and their file config.json.

Fields, defaults and file format are those of transformers' XLMRobertaConfig (5.x); files written by 4.x are read too.
The look-alikes that share its module tree (xlmr.family) are read too, each under its own model_type.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import json
import logging
import math
import os
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .family import Kind, kind_of
from .files import own_keywords, read_json, refuse_unknown, resolve, to_dtype, write_atomically
from .hub import Pushable, take_keywords

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

ACTIVATIONS = (
    "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python", "quick_gelu", "relu", "relu2", "relu6",
    "leaky_relu", "silu", "swish", "mish", "hardswish", "sigmoid", "tanh", "linear",
)  # fmt: skip
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

# Smallest and largest value of each size. The largest are far above every model of the family: they stop hostile files.
SIZES = {
    "vocab_size": (1, 2**24),
    "hidden_size": (1, 2**16),
    "num_hidden_layers": (0, 2**10),
    "num_attention_heads": (1, 2**12),
    "intermediate_size": (1, 2**20),
    "max_position_embeddings": (2, 2**24),
    "type_vocab_size": (1, 2**16),
    "chunk_size_feed_forward": (0, 2**24),
    "pad_token_id": (0, 2**24),
}
MAX_LABELS = 2**20
RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
FLAGS = (
    "use_cache", "is_decoder", "add_cross_attention", "tie_word_embeddings", "output_hidden_states",
    "output_attentions", "return_dict", "is_encoder_decoder",
)  # fmt: skip
# Keys that change the computation in transformers (most of them in 4.x only): their neutral value is all that is read.
NEUTRAL = {"position_embedding_type": "absolute", "pruned_heads": {}, "is_encoder_decoder": False}
NOT_WRITTEN = ("_attn_implementation", "_commit_hash")
# Written to config.json only where they differ from the default, as transformers does.
WRITTEN_IF_SET = (
    "architectures", "output_hidden_states", "output_attentions", "return_dict", "dtype", "chunk_size_feed_forward",
    "is_encoder_decoder", "id2label", "label2id", "problem_type", "transformers_version",
)  # fmt: skip


@dataclass(init=False, eq=False, repr=False)
class XLMRobertaConfig(Pushable):
    """The configuration of every XLM-RoBERTa model; keyword arguments only, with the defaults of transformers' class.

    model_type: one of xlmr.family.KINDS; "roberta", "camembert" and "bert" stand for those encoders, which the same
    model computes, with the defaults of their own transformers class. `num_labels` (names the labels LABEL_0 …) and
    `torch_dtype` (the old name of `dtype`) are accepted too, and `attn_implementation`, which decides nothing here. Any
    other keyword becomes an attribute and is written back to config.json.
    ValueError, naming the field, for a value of a wrong type or out of range.
    """

    model_type: str = "xlm-roberta"
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    use_cache: bool = True
    classifier_dropout: float | None = None
    is_decoder: bool = False
    add_cross_attention: bool = False
    tie_word_embeddings: bool = True
    output_hidden_states: bool = False
    output_attentions: bool = False
    return_dict: bool = True
    dtype: torch.dtype | None = None
    chunk_size_feed_forward: int = 0
    is_encoder_decoder: bool = False
    id2label: dict[int, str] | None = None
    label2id: dict[str, int] | None = None
    problem_type: str | None = None
    architectures: list[str] | None = None
    transformers_version: str | None = None
    _name_or_path: str = ""
    # Of transformers, whose pipelines ask for the second: taken and told, neither used nor written.
    _attn_implementation: str | None = "sdpa"
    _commit_hash: str | None = None

    def __init__(self, /, **values: Any) -> None:  # "self" may be a key of config.json
        values = _own_copy(values)
        defaults = kind_of(values.get("model_type", self.model_type)).defaults
        torch_dtype, num_labels = values.pop("torch_dtype", None), values.pop("num_labels", None)
        for name in ("name_or_path", "attn_implementation"):
            if name in values:
                values[f"_{name}"] = values.pop(name)
        for own in fields(self):
            setattr(self, own.name, values.pop(own.name, defaults.get(own.name, own.default)))
        for name, value in values.items():
            if hasattr(type(self), name):
                raise ValueError(f"{name!r} cannot be a configuration key: it is the name of a method or property")
            setattr(self, name, value)
        dtype = torch_dtype if self.dtype is None else self.dtype
        self.dtype = None if dtype is None else to_dtype(dtype)
        self._set_labels(num_labels)
        self.validate()

    @classmethod
    def base(cls, **overrides: Any) -> XLMRobertaConfig:
        """XLM-RoBERTa base: 12 layers of 768, 278 M parameters."""
        released = {"vocab_size": 250002, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
        return cls(**{**released, **overrides})

    @classmethod
    def large(cls, **overrides: Any) -> XLMRobertaConfig:
        """XLM-RoBERTa large: 24 layers of 1024, 560 M parameters."""
        sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
        return cls.base(**{**sizes, **overrides})

    @classmethod
    def long(cls, **overrides: Any) -> XLMRobertaConfig:
        """Large with 8,194 positions, so 8,192 tokens: the bge-m3 family."""
        return cls.large(**{"max_position_embeddings": 8194, **overrides})

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        subfolder: str = "",
        return_unused_kwargs: bool = False,
        **overrides: Any,
    ) -> Any:
        """Read config.json from a directory or hub repository (or the JSON file given), then apply `overrides`.

        OSError if there is no such file, ValueError if it is no valid configuration. An override that is neither a
        field nor a key of the file is a TypeError, or with `return_unused_kwargs` in the dictionary beside the result.
        """
        name_or_dir = os.fspath(pretrained_model_name_or_path)
        source: dict[str, Any] = {
            "revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only,
            "force_download": force_download,
        }  # fmt: skip
        file = Path(name_or_dir)
        path = file if file.is_file() else resolve(name_or_dir, "config.json", subfolder=subfolder, **source)
        if path is None:
            left = resolve(name_or_dir, "training_args.bin", subfolder=subfolder, **source) is not None
            advice = ", which a Trainer writes with xlmr.TrainerMixin only: give the model's config=…" if left else ""
            raise FileNotFoundError(f"there is no config.json in {os.path.join(name_or_dir, subfolder)}{advice}")
        values = read_json(path)
        try:
            return cls.from_dict(
                {**values, "name_or_path": name_or_dir}, return_unused_kwargs, **own_keywords(overrides)
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str]) -> XLMRobertaConfig:
        """Read one JSON file."""
        return cls.from_dict(read_json(path))

    @classmethod
    def from_dict(cls, values: dict[str, Any], return_unused_kwargs: bool = False, **overrides: Any) -> Any:
        """Build from a dictionary of fields, then `overrides`, of which those that are neither a field nor in it are a
        TypeError, or with `return_unused_kwargs` in the dictionary beside the result."""
        values = {name: value for name, value in values.items() if name != "max_length"}  # of text generation, in 4.x
        known = {own.name for own in fields(cls)} | set(values)
        known |= {"num_labels", "torch_dtype", "name_or_path", "attn_implementation"}
        given = inspect.signature(cls).parameters.values()  # a subclass written elsewhere may add some
        known |= {parameter.name for parameter in given if parameter.kind is not parameter.VAR_KEYWORD}
        unused = {name: value for name, value in overrides.items() if name not in known}
        values |= {name: value for name, value in overrides.items() if name in known}
        if "id2label" in overrides and "label2id" not in overrides:
            values.pop("label2id", None)  # it would describe the labels that were overridden
        if "torch_dtype" in overrides and "dtype" not in overrides:
            values.pop("dtype", None)
        config = cls(**values)
        for name in () if return_unused_kwargs else unused:
            raise config.unknown_field(name)
        return (config, unused) if return_unused_kwargs else config

    def unknown_field(self, name: str) -> TypeError:
        """The error for a keyword that means nothing here."""
        close = difflib.get_close_matches(name, [*vars(self), "num_labels", "torch_dtype"], 1)
        return TypeError(
            f"{name!r} is no field of {type(self).__name__}" + (f"; is {close[0]!r} meant?" if close else "")
        )

    @property
    def num_labels(self) -> int:
        """The number of labels; setting another number renames them LABEL_0, LABEL_1, …"""
        return len(self.id2label or ())

    @num_labels.setter
    def num_labels(self, number: int) -> None:
        if self.id2label is None or number != len(self.id2label):
            _check_integer("num_labels", number, 0, MAX_LABELS)
            self.id2label = {i: f"LABEL_{i}" for i in range(number)}
            self.label2id = {label: i for i, label in self.id2label.items()}

    @property
    def kind(self) -> Kind:
        """What sets this model_type apart."""
        return kind_of(self.model_type)

    @property
    def position_offset(self) -> int:
        """The position of the first token: pad_token_id + 1, which leaves pad_token_id itself for the pad tokens, or 0
        where (as in BERT) pad tokens are counted like any other."""
        return self.pad_token_id + 1 if self.kind.positions_follow_pad else 0

    @property
    def max_length(self) -> int:
        """The longest sequence in tokens."""
        return self.max_position_embeddings - self.position_offset

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The old name of `dtype`."""
        return self.dtype

    @torch_dtype.setter
    def torch_dtype(self, dtype: str | torch.dtype | None) -> None:
        self.dtype = None if dtype is None else to_dtype(dtype)

    @property
    def use_return_dict(self) -> bool:
        """The old name of `return_dict`."""
        return self.return_dict

    @property
    def name_or_path(self) -> str:
        """The directory or hub name that this configuration was read from."""
        return self._name_or_path

    @name_or_path.setter
    def name_or_path(self, name: str | os.PathLike[str]) -> None:
        self._name_or_path = os.fspath(name)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> XLMRobertaConfig:
        """This configuration: where other libraries look for the text part of a model, this model has no other."""
        return self

    def _set_labels(self, num_labels: int | None) -> None:
        if self.id2label is None:
            self.num_labels = 2 if num_labels is None else num_labels
            return
        self.id2label = _integer_keys(self.id2label)
        if not isinstance(self.label2id, (dict, type(None))):
            raise ValueError(f"label2id is {reprlib.repr(self.label2id)}; it must map names to numbers")
        inverse = {label: i for i, label in self.id2label.items()}
        if self.label2id is None:
            self.label2id = inverse
        if num_labels is not None and num_labels != len(self.id2label):
            logger.warning("num_labels=%s replaces an id2label of %d labels", num_labels, len(self.id2label))
            self.num_labels = num_labels
        elif self.label2id != inverse or sorted(self.id2label) != list(range(len(self.id2label))):
            labels = reprlib.repr(self.id2label), reprlib.repr(self.label2id)
            logger.warning("id2label %s and label2id %s are not a numbering from 0 and its inverse", *labels)

    def validate(self) -> None:
        """Raise ValueError naming the first wrong field; run at construction and before saving."""
        kind_of(self.model_type)
        _check_own_code(getattr(self, "auto_map", None))
        for name, (smallest, largest) in SIZES.items():
            _check_integer(name, getattr(self, name), smallest, largest)
        for name in RATES:
            if getattr(self, name) is not None or name != "classifier_dropout":
                _check_real(name, getattr(self, name), 0.0, 1.0)
        _check_real("initializer_range", self.initializer_range, 0.0, math.inf)
        _check_real("layer_norm_eps", self.layer_norm_eps, 0.0, math.inf)
        for name in FLAGS:
            _check_choice(name, getattr(self, name), (True, False))
        for name, neutral in NEUTRAL.items():
            _check_choice(name, getattr(self, name, neutral), (neutral,))
        for name in ("bos_token_id", "eos_token_id"):
            _check_token_ids(name, getattr(self, name))
        if not _are_names(self.architectures):
            raise ValueError(f"architectures is {reprlib.repr(self.architectures)}; it must be a list of names or None")
        _check_choice("hidden_act", self.hidden_act, ACTIVATIONS)
        _check_choice("problem_type", self.problem_type, (None, *PROBLEM_TYPES))
        self._validate_combinations()

    def _validate_combinations(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.pad_token_id >= self.vocab_size:
            raise ValueError(f"pad_token_id {self.pad_token_id} is outside of a vocabulary of {self.vocab_size}")
        if self.max_length < 1:
            rows, offset = self.max_position_embeddings, self.position_offset
            raise ValueError(f"max_position_embeddings is {rows}; more than {offset} are needed: positions begin there")
        if self.problem_type == "single_label_classification" and self.num_labels == 1:
            raise ValueError(
                "single_label_classification needs num_labels > 1: 2 for yes or no, or problem_type 'regression'"
            )

    def to_dict(self) -> dict[str, Any]:
        """Every field and extra key, `dtype` as its name; a deep copy."""
        dtype = None if self.dtype is None else str(to_dtype(self.dtype)).removeprefix("torch.")
        kept = {name: value for name, value in vars(self).items() if name not in NOT_WRITTEN}
        return {**_own_copy(kept), "dtype": dtype}

    def to_diff_dict(self) -> dict[str, Any]:
        """`to_dict` without the fields that config.json leaves out at their default."""
        default = XLMRobertaConfig().to_dict()
        left_out = {name for name in WRITTEN_IF_SET if getattr(self, name) == default[name]} | {"_name_or_path"}
        return {name: value for name, value in self.to_dict().items() if name not in left_out}

    def to_json_string(self, use_diff: bool = True) -> str:
        """The text of config.json: sorted keys, indented by 2; all of `to_dict` unless `use_diff`."""
        values = self.to_diff_dict() if use_diff else self.to_dict()
        return json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n"

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, push_to_hub: bool = False, **options: Any
    ) -> None:
        """Write config.json, atomically, into `save_directory` (made if missing); ValueError where `validate` finds
        one. push_to_hub: upload it besides; its keywords are taken, repo_id is by default the directory's name."""
        hub = take_keywords(options, save_directory)
        refuse_unknown("save_pretrained", options)
        self.validate()
        write_atomically(save_directory, {"config.json": self.to_json_string()})
        if push_to_hub:
            self.push_to_hub(**hub)

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Write `to_json_string` into one file."""
        path = Path(json_file_path)
        write_atomically(path.parent, {path.name: self.to_json_string(use_diff)})

    def update(self, config_dict: dict[str, Any]) -> None:
        """Set each field to its value."""
        for name, value in config_dict.items():
            setattr(self, name, value)

    def __iter__(self) -> Iterator[str]:
        """The names of the fields and keys, so `"key" in config`, too."""
        return iter(vars(self))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, XLMRobertaConfig):
            return NotImplemented
        return {**self.to_dict(), "_name_or_path": ""} == {**other.to_dict(), "_name_or_path": ""}

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"


def _signature(cls: type[XLMRobertaConfig]) -> inspect.Signature:
    """What help() and notebooks show of the constructor: the fields as keywords, and that others are taken."""
    keyword, named = inspect.Parameter.KEYWORD_ONLY, [f for f in fields(cls) if not f.name.startswith("_")]
    shown = [inspect.Parameter(f.name, keyword, default=f.default, annotation=f.type) for f in named]
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    return inspect.Signature([first, *shown, inspect.Parameter("values", inspect.Parameter.VAR_KEYWORD)])


XLMRobertaConfig.__init__.__signature__ = _signature(XLMRobertaConfig)  # type: ignore[attr-defined]


def _own_copy(values: dict[str, Any]) -> dict[str, Any]:
    try:
        return copy.deepcopy(values)
    except RecursionError:
        raise ValueError("the configuration is nested too deeply") from None


def _check_own_code(auto_map: Any) -> None:
    if isinstance(auto_map, (dict, list)) and any(
        str(name).startswith(("AutoConfig", "AutoModel")) for name in auto_map
    ):
        raise ValueError(
            f"auto_map is {reprlib.repr(auto_map)}: the model is computed by the repository's own code (as are "
            "jina-embeddings-v3 and gte-multilingual), which is not run; give auto_map=None if the weights are those "
            "of a plain encoder all the same"
        )


def _check_integer(name: str, value: Any, smallest: int, largest: int) -> None:
    if type(value) is not int or not smallest <= value <= largest:
        raise ValueError(f"{name} is {reprlib.repr(value)}; it must be an integer from {smallest} to {largest}")


def _check_token_ids(name: str, value: Any) -> None:
    ids = value if isinstance(value, list) else [value]
    if value is not None and not all(type(i) is int for i in ids):
        raise ValueError(f"{name} is {reprlib.repr(value)}; it must be an integer, a list of integers or None")


def _are_names(value: Any) -> bool:
    return value is None or (isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value))


def _check_real(name: str, value: Any, smallest: float, largest: float) -> None:
    if type(value) not in (int, float) or not (smallest <= value <= largest and math.isfinite(value)):
        raise ValueError(f"{name} is {reprlib.repr(value)}; it must be a finite number from {smallest} to {largest}")


def _check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        raise ValueError(f"{name} is {reprlib.repr(value)}; allowed: {', '.join(map(repr, allowed))}")


def _integer_keys(id2label: Any) -> dict[int, Any]:
    """JSON has string keys only: "0" → 0."""
    if not isinstance(id2label, dict) or len(id2label) > MAX_LABELS:
        raise ValueError(f"id2label is {reprlib.repr(id2label)}; it must map up to {MAX_LABELS} numbers to names")
    for key, label in id2label.items():
        if not str(key).isdecimal() or not isinstance(label, (str, int, float)):
            raise ValueError(f"id2label has {reprlib.repr(key)}: {reprlib.repr(label)}; a number and a name are needed")
    return {int(key): label for key, label in id2label.items()}
