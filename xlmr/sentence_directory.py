"""Reading what stands around a model in a sentence-transformers directory: pooling, Dense, norms, prompts, limits.

Both schemas are read: that of sentence-transformers up to 5 (pooling_mode_cls_token: true, …) and the one after it
(pooling_mode: "cls", classes that have moved). Nothing that modules.json names is ever imported: a module that is not
among those known here is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .encode import POOLINGS, check_pooling
from .family import KINDS, REFUSED
from .files import read_json
from .weights import read_weights

Find = Callable[[str, str], "Path | None"]  # (file, folder in the checkpoint) → its path, None if there is none

MODULES = ("Transformer", "Pooling", "Dense", "LayerNorm", "Normalize", "Dropout")
OLD_POOLINGS = {  # in the order in which sentence-transformers joins them
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # of torch's modules without arguments, as saved ones are read
    "torch.nn.modules.linear.Identity": lambda x: x,
    "torch.nn.modules.activation.ELU": F.elu,
    "torch.nn.modules.activation.GELU": F.gelu,
    "torch.nn.modules.activation.Hardswish": F.hardswish,
    "torch.nn.modules.activation.LeakyReLU": F.leaky_relu,
    "torch.nn.modules.activation.Mish": F.mish,
    "torch.nn.modules.activation.ReLU": F.relu,
    "torch.nn.modules.activation.SELU": F.selu,
    "torch.nn.modules.activation.SiLU": F.silu,
    "torch.nn.modules.activation.Sigmoid": torch.sigmoid,
    "torch.nn.modules.activation.Softplus": F.softplus,
    "torch.nn.modules.activation.Tanh": torch.tanh,
}
TASKS = {"feature-extraction": "last_hidden_state", "sequence-classification": "logits"}  # and what is taken from each
PROMPTS = {"query": "", "document": ""}  # what sentence-transformers 5 and later know without being told
TRANSFORMER_FILES = (
    "sentence_bert_config.json", "sentence_roberta_config.json", "sentence_camembert_config.json",
    "sentence_xlm-roberta_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Dense:
    """A linear layer after the pooling, computed in fp32: y = act(x·wᵀ + b), plus the residual where there is one."""

    weight: Tensor  # [out, in]
    bias: Tensor | None
    activation: str
    residual: Tensor | None = None  # [out, in]
    add_input: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias, residual = (None if t is None else t.to(x) for t in (self.weight, self.bias, self.residual))
        assert weight is not None
        y = ACTIVATIONS[self.activation](F.linear(x, weight, bias))
        if self.add_input:
            y = y + (x if residual is None else F.linear(x, residual))
        return y


@dataclass(frozen=True)
class LayerNorm:
    """A LayerNorm after the pooling, computed in fp32."""

    weight: Tensor  # [N]
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight.to(x), self.bias.to(x))


def l2_normalize(x: Tensor) -> Tensor:
    """Each row divided by its Euclidean length."""
    return F.normalize(x, dim=-1)


@dataclass(frozen=True)
class Recipe:
    """How texts become vectors, beside the model: what `read_recipe` reads.

    pooling: modes of xlmr.encode.pool, joined. include_prompt: whether a prompt's tokens are pooled. steps: what is
    applied to the pooled vectors, [n, D] → [n, D'], one after the other. prompts: texts put before a text, by name.
    max_length: tokens, None where the directory declares no limit. lower_case: of the texts that `load`'s tokenizer
    takes. truncate_dim: how many numbers a vector keeps. hidden_size: of the last layer, where declared. folder: where
    the model and its tokenizer are in the directory.
    """

    pooling: tuple[str, ...] = ("mean",)
    hidden_size: int | None = None
    folder: str = ""
    include_prompt: bool = True
    steps: tuple[Callable[[Tensor], Tensor], ...] = ()
    prompts: dict[str, str] = field(default_factory=PROMPTS.copy)
    default_prompt_name: str | None = None
    max_length: int | None = None
    lower_case: bool = False
    truncate_dim: int | None = None


def read_recipe(find: Find) -> Recipe | None:
    """The recipe of a sentence-transformers directory; None without modules.json. A cross-encoder's has no pooling.

    ValueError for modules, poolings and settings that are not known here, and for damaged files.
    """
    path = find("modules.json", "")
    if path is None:
        return None
    modules = _read_modules(path)
    folder = modules[0][1]
    settings = _read_settings(find, folder)
    recipe: dict[str, Any] = {"pooling": (), "steps": ()}
    for kind, place in modules[1:]:
        if kind == "Pooling":
            recipe |= _read_pooling(_config(find, place))
        elif kind != "Dropout":  # which is for training
            recipe["steps"] += (_read_step(kind, find, place),)
    if not recipe["pooling"] and settings.get("transformer_task") != "sequence-classification":
        raise ValueError(f"{path} names no Pooling: texts get no vector without one")
    prompts = _read_prompts(find, PROMPTS if recipe["pooling"] else {})
    return Recipe(**recipe, folder=folder, **_read_transformer(settings), **prompts)


def _read_modules(path: Path) -> list[tuple[str, str]]:
    """(class, folder) of each module, in order."""
    found = []
    for module in read_json(path, kind=list):
        if not isinstance(module, dict) or not all(isinstance(module.get(key), str) for key in ("type", "path")):
            raise ValueError(f"{path} holds {module!r:.80}: each module must have a type and a path")
        kind = module["type"].rpartition(".")[2]
        if not module["type"].startswith("sentence_transformers.") or kind not in MODULES:
            raise ValueError(
                f"{path} names the module {module['type']!r}: known are sentence-transformers' {', '.join(MODULES)}; "
                "others change the vectors in ways unknown here, and their code is not imported: load it in the "
                "library that wrote it, and xlmr.accelerate(model) makes its encoder this one"
            )
        folder = PurePosixPath(module["path"])
        if folder.is_absolute() or ".." in folder.parts or set(module["path"]) & set("\\:\0"):
            raise ValueError(f"{path} names the folder {module['path']!r}, which leaves the directory: refused")
        found.append((kind, str(folder)))
    kinds = [kind for kind, _ in found]
    if kinds[:1] != ["Transformer"] or kinds[1:2] not in ([], ["Pooling"]) or {"Transformer", "Pooling"} & {*kinds[2:]}:
        raise ValueError(f"{path} has the modules {', '.join(kinds) or 'none'}: Transformer, Pooling, … are needed")
    return found


def _config(find: Find, folder: str) -> dict[str, Any]:
    path = find("config.json", folder)
    if path is None:
        raise FileNotFoundError(f"modules.json names {folder}, but there is no {folder}/config.json")
    return read_json(path)


def _read_settings(find: Find, folder: str) -> dict[str, Any]:
    path = next((path for name in TRANSFORMER_FILES if (path := find(name, folder)) is not None), None)
    return {} if path is None else read_json(path)


def _read_transformer(settings: dict[str, Any]) -> dict[str, Any]:
    task = settings.get("transformer_task", "feature-extraction")
    if task not in [*TASKS]:
        raise ValueError(f"transformer_task is {task!r:.40}: known are {', '.join(map(repr, TASKS))}")
    neutral: dict[str, Any] = {
        "modality_config": {"text": {"method": "forward", "method_output_name": TASKS[task]}},
        **{"processing_kwargs": {}, "query_length": None, "document_length": None, "query_expansion": None},
    }
    for name, value in neutral.items():
        if settings.get(name) not in (None, value):
            raise ValueError(f"{name} is {settings[name]!r:.120}: it changes the vectors, and only {value} is known")
    longest = settings.get("max_seq_length")
    if longest is not None and (type(longest) is not int or longest < 2):
        raise ValueError(f"max_seq_length is {longest!r:.40}: an integer of at least 2 is needed")
    return {"max_length": longest, "lower_case": settings.get("do_lower_case") is True}


def _read_pooling(config: dict[str, Any]) -> dict[str, Any]:
    modes = config.get("pooling_mode")
    if modes is None:
        asked = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
        for key in asked:
            if key not in OLD_POOLINGS:
                raise ValueError(f"the pooling {key!r} is not known: allowed are {', '.join(OLD_POOLINGS)}")
        modes = [mode for key, mode in OLD_POOLINGS.items() if key in asked] or ["mean"]
    if not isinstance(modes, (str, list)) or not all(isinstance(mode, str) for mode in modes):
        raise ValueError(f"pooling_mode is {modes!r:.80}: allowed are {', '.join(map(repr, POOLINGS))}, or a list")
    size = config.get("embedding_dimension", config.get("word_embedding_dimension"))
    include_prompt = config.get("include_prompt", True) is not False
    return {"pooling": check_pooling(modes), "hidden_size": size, "include_prompt": include_prompt}


def _read_step(kind: str, find: Find, folder: str) -> Callable[[Tensor], Tensor]:
    old = kind == "Normalize" and find("config.json", folder) is None  # it has a configuration since version 6
    config = {} if old else _config(find, folder)
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, "sentence_embedding"):
            raise ValueError(f"{folder} has {key} {config[key]!r:.40}: only 'sentence_embedding' is known")
    if kind == "Normalize":
        return l2_normalize
    weights = read_weights(lambda name: find(name, folder), folder)
    return (_read_dense if kind == "Dense" else _read_layer_norm)(folder, config, weights)


def _read_layer_norm(folder: str, config: dict[str, Any], weights: dict[str, Tensor]) -> LayerNorm:
    size = (config.get("dimension"),)
    check_shapes(weights, {"norm.weight": size, "norm.bias": size}, folder)
    return LayerNorm(weights["norm.weight"].float(), weights["norm.bias"].float())


def _read_dense(folder: str, config: dict[str, Any], weights: dict[str, Tensor]) -> Dense:
    activation = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{folder} has the activation {activation!r:.80}: known are {', '.join(ACTIVATIONS)}")
    size = config.get("out_features"), config.get("in_features")
    wanted: dict[str, tuple[Any, ...]] = {"linear.weight": size}
    if config.get("bias", True):
        wanted["linear.bias"] = size[:1]
    residual = config.get("use_residual", False) is True
    if residual and size[0] != size[1]:
        wanted["residual.weight"] = size
    check_shapes(weights, wanted, folder)
    found = (weights.get(key) for key in ("linear.bias", "residual.weight"))
    bias, projection = (None if t is None else t.float() for t in found)
    return Dense(weights["linear.weight"].float(), bias, activation, projection, residual)


def check_shapes(weights: dict[str, Tensor], wanted: dict[str, Any], where: str) -> None:
    """ValueError unless `weights` are those, and of the shapes, that `wanted` names."""
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    if shapes != wanted or not all(weight.is_floating_point() for weight in weights.values()):
        raise ValueError(f"{where} holds the weights {shapes}: floating-point ones of shapes {wanted} are needed")


def _read_prompts(find: Find, known: dict[str, str]) -> dict[str, Any]:
    path = find("config_sentence_transformers.json", "")
    config = {} if path is None else read_json(path)
    prompts, default = config.get("prompts") or {}, config.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(text, (str, type(None))) for text in prompts.values()):
        raise ValueError(f"{path} gives {prompts!r:.80} as prompts: names and texts are needed")
    prompts = {**known, **{name: text or "" for name, text in prompts.items()}}
    if default is not None and default not in prompts:
        raise ValueError(f"{path} gives {default!r:.40} as default_prompt_name, but the prompts {list(prompts)}")
    dim = config.get("truncate_dim")
    if dim is not None and (type(dim) is not int or dim < 1):
        raise ValueError(f"{path} gives {dim!r:.40} as truncate_dim: a positive integer is needed")
    return {"prompts": prompts, "default_prompt_name": default, "truncate_dim": dim}


def check_architecture(config: dict[str, Any], where: Any) -> None:
    """ValueError for a model that takes XLM-R's name or tokenizer, but is something else, and for one whose tokenizer
    is not XLM-R's."""
    model_type = config.get("model_type")
    name = model_type if isinstance(model_type, str) else ""
    if "lora_adaptations" in config or config.get("position_embedding_type") == "rotary":
        reason = REFUSED["jina_embeddings_v3"]
    elif name not in KINDS:
        read = " and ".join(repr(known) for known, kind in KINDS.items() if kind.tokenizer is None)
        reason = REFUSED.get(name, f"model_type {model_type!r:.40}, where {read} are read")
    elif tokenizer := KINDS[name].tokenizer:
        reason = f"{tokenizer}; load it with transformers, and xlmr.accelerate(model) makes the encoder this one"
    else:
        return
    raise ValueError(f"{where} is not loaded: {reason}")
