"""Loading and saving models.

Loading maps the weight files into memory, builds the model on the meta device, checks names, shapes and dtypes of one
against the other, and only then assigns: a parameter that needs no conversion is the mapped file itself. Of a class
that is written elsewhere only our base model, and our LM head, are on the meta device: what else it builds stays as it
was initialised where the files have no values for it.
"""

import contextlib
import copy
import functools
import inspect
import json
import logging
import os
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import adapters
from .files import DTYPES, own_keywords, read_json, resolve, to_dtype, write_atomically
from .weights import read_weights, write_weights

logger = logging.getLogger(__name__)

GENERATION = "generation_config.json"  # how a decoder's generate is told by its checkpoint
INITIALISED = "_is_hf_initialized"  # of a module, in transformers too: neither library initialises it a second time
_loading: ContextVar[bool] = ContextVar("loading", default=False)  # set while from_pretrained builds a model


def from_pretrained(
    cls: Any,
    pretrained_model_name_or_path: str | os.PathLike[str] | None,
    *model_args: Any,
    config: Any = None,
    dtype: str | torch.dtype | None = "auto",
    torch_dtype: str | torch.dtype | None = None,
    device: int | str | torch.device | None = None,
    device_map: Any = None,
    backend: str = "auto",
    unpad: bool = True,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    subfolder: str = "",
    use_safetensors: bool | None = None,
    variant: str | None = None,
    key_mapping: Mapping[str, str] | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    ignore_mismatched_sizes: bool = False,
    output_loading_info: bool = False,
    adapter_name: str = "default",
    adapter_kwargs: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Any:
    """A model in eval mode, from a checkpoint directory or a name on the Hugging Face hub.

    Args:
        model_args: positional arguments of the constructor, after the configuration.
        config: a configuration (it is copied), or the directory of one, instead of the checkpoint's own.
        dtype: "auto" is the configuration's, else that of the first weight. torch_dtype: its old name.
        device: by default the CPU. device_map: transformers' name for it; "auto" is the first GPU, or else the CPU.
        backend, unpad: as of the constructor, see XLMRobertaPreTrainedModel.
        revision, cache_dir, token, local_files_only, force_download, subfolder: the hub's, see xlmr.files.resolve.
        use_safetensors: whether safetensors alone are read, or pickles alone; None takes either.
        variant: such as "fp16", which stands in the names of the weight files then.
        key_mapping: regular expressions and what replaces them in the weights' names.
        state_dict: weights, which are copied; no weight files are read. With a config the name may be None then.
        ignore_mismatched_sizes: initialise weights of another shape, too.
        output_loading_info: return (model, info) and log nothing; info is a dict of missing_keys, unexpected_keys,
            mismatched_keys and error_msgs, as in transformers.
        adapter_name, adapter_kwargs: of an adapter, see below; the hub's arguments where its own differ.
        overrides: fields of the configuration, or keywords of the constructor (one written elsewhere may take any).
            What only tells transformers how to load is passed over.

    A directory or repository with an adapter_config.json is an adapter of PEFT, which is loaded into its base model:
    the one beside it in a directory, or else the one that the file names; adapters.Adaptable.load_adapter says what is
    trusted.

    Parameters that the checkpoint lacks are initialised; one warning names them, and the weights of no use here.
    On the CPU a parameter in the checkpoint's dtype is the mapped file, copied on write: files may be replaced, but not
    changed in place, while the model lives.

    Raises OSError where there is no such checkpoint, RuntimeError for weights of another shape, ValueError for damaged,
    hostile or quantised files and for less than half of the model, TypeError for an override that is no field.
    """
    source: dict[str, Any] = {
        "revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only,
        "force_download": force_download, "subfolder": subfolder,
    }  # fmt: skip
    place = place_on(device, device_map)
    name, beside = pretrained_model_name_or_path, {**source, **(adapter_kwargs or {})}
    adapter = None if name is None or state_dict is not None else adapters.find(name, **beside)
    base = name if name is None or adapter is None else adapters.base_of(adapter, name, source)
    config, arguments = _configuration(cls, base if config is None else config, source, own_keywords(overrides))
    config.name_or_path = where = os.fspath(base or "")
    if state_dict is None:
        weights = read_weights(functools.partial(resolve, where, **source), where, use_safetensors, variant)
    else:
        weights = {name: weight.detach().clone() for name, weight in state_dict.items()}
    weights = _renamed(weights, key_mapping or {})
    config.dtype = _choose_dtype(torch_dtype if dtype in (None, "auto") else dtype, config, weights)
    model = _build(cls, config, *model_args, **arguments)
    model.unpad = unpad
    if "ops" not in arguments:
        model.set_backend(backend)
    info = _assign(model, weights, place, ignore_mismatched_sizes)
    for module in model.modules():
        module.__dict__[INITIALISED] = True
    if not output_loading_info:
        _report(cls.__name__, where, info)
    model.to(place, config.dtype).eval()  # what was loaded is there: this tells the model, and moves the rest
    if model.can_generate() and state_dict is None and (path := resolve(where, GENERATION, **source)):
        model.generation_config = read_json(path)
    if adapter is not None:
        model.load_adapter(name, adapter_name, **beside)
    return (model, info) if output_loading_info else model


def _renamed(weights: dict[str, Tensor], key_mapping: Mapping[str, str]) -> dict[str, Tensor]:
    """The weights, in whose names each pattern is replaced, one pattern after the other."""
    for pattern, replacement in key_mapping.items():
        weights = {re.sub(pattern, replacement, name): weight for name, weight in weights.items()}
    return weights


def _build(cls: Any, config: Any, *args: Any, **arguments: Any) -> Any:
    """A `cls` without values. One that is written elsewhere may build anything: there only our own modules, which call
    `values_follow`, are without."""
    token = _loading.set(True)
    try:
        with without_values() if cls.__module__.startswith("xlmr.") else contextlib.nullcontext():
            return cls(config, *args, **arguments)
    finally:
        _loading.reset(token)


def values_follow() -> contextlib.AbstractContextManager[None]:
    """Modules built inside lie on the meta device while `from_pretrained` builds a model: their values follow."""
    return without_values() if _loading.get() else contextlib.nullcontext()


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Modules built inside lie on the meta device, and no random number is drawn for them."""
    with torch.device("meta"), _NotDrawn():
        yield


DRAWING = Tensor.normal_, nn.init.normal_, nn.init.kaiming_uniform_, nn.init.uniform_


class _NotDrawn(TorchFunctionMode):
    """Nothing is drawn: on the meta device that has no effect, but normal_ imports torch's compiler, 0.7 s, for it, and
    torch.func.vmap takes it for an operation whose randomness it has to be told about."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in DRAWING:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def place_on(device: Any, device_map: Any) -> torch.device:
    """The one device that is meant by `device`, or as transformers' `device_map`."""
    if device is not None and device_map is not None:
        raise ValueError("device and device_map are both given: give one of them")
    if isinstance(device_map, Mapping):
        places = set(device_map.values())
        if len(places) != 1:
            raise ValueError(
                f"device_map is {reprlib.repr(device_map)}: a model lies on one device here, give its name"
            )
        device_map = places.pop()
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        device_map = "cuda" if torch.cuda.is_available() else "cpu"
    place = device_map if device is None else device
    return to_device("cpu" if place is None else place)


def to_device(device: int | str | torch.device) -> torch.device:
    """What a device, its name, or a GPU's number (−1 is the CPU) means; ValueError for what PyTorch has not."""
    if isinstance(device, int):
        device = "cpu" if device < 0 else f"cuda:{device}"
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(
            f"device is {device!r}: allowed are cpu, cuda, cuda:1, … and PyTorch's other devices"
        ) from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}: PyTorch sees no GPU here; give cpu")
    return found


def _configuration(
    cls: Any, config: Any, source: dict[str, Any], overrides: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The configuration, with those of `overrides` that are fields, and what of them the constructor of `cls` takes."""
    accepted = inspect.signature(cls.__init__).parameters
    arguments = {name: value for name, value in overrides.items() if name in accepted}
    if isinstance(config, (str, os.PathLike)):
        config, unused = cls.config_class.from_pretrained(config, return_unused_kwargs=True, **source, **overrides)
    elif hasattr(config, "to_dict"):
        config, unused = cls.config_class.from_dict(config.to_dict(), return_unused_kwargs=True, **overrides)
    else:
        raise TypeError(
            f"{reprlib.repr(config)} is neither a checkpoint nor a configuration: give a directory, a hub name or an "
            f"xlmr.{cls.config_class.__name__}"
        )
    if quantization := getattr(config, "quantization_config", None):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ValueError(f"the weights are quantised ({method}), which is not read; use the checkpoint they came from")
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values()):  # a class written elsewhere
        arguments |= unused
    for name in unused.keys() - arguments.keys():
        raise config.unknown_field(name)
    return config, arguments


def _choose_dtype(dtype: Any, config: Any, weights: Mapping[str, Tensor]) -> torch.dtype:
    if dtype in (None, "auto"):
        dtype = config.dtype or next((w.dtype for w in weights.values() if w.is_floating_point()), torch.float32)
    return to_dtype(dtype)


def _assign(model: Any, weights: dict[str, Tensor], device: torch.device, ignore_mismatched: bool) -> dict[str, Any]:
    """Gives the parameters and buffers of `model` their values in `weights`, and initialises those on the meta device
    that have none there; returns what did not fit. `weights` is emptied: each can be freed once it is converted."""
    wanted = {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    found, unexpected = _match(weights, wanted, model.base_model_prefix, model.config.kind.prefix)
    weights.clear()
    stored = sum(weight.numel() for weight in found.values())
    mismatched = {(name, w.shape, wanted[name].shape) for name, w in found.items() if w.shape != wanted[name].shape}
    if mismatched and not ignore_mismatched:
        raise RuntimeError(_explain(mismatched, type(model).__name__))
    for name, *_ in mismatched:
        del found[name]
    ties = _tie(model, found)
    lacking = wanted.keys() - found.keys() - {name for name, *_ in mismatched}
    missing = {name for name in lacking if ties.get(name, name) in lacking}
    empty = [wanted[name] for name in missing - ties.keys() if wanted[name].is_meta]
    if sum(weight.numel() for weight in empty) > stored:  # before memory is taken for them
        reason = f"it lacks {_listed(missing)}" + (f", and holds {_listed(unexpected, 3)}" if unexpected else "")
        raise ValueError(f"the checkpoint holds less than half of {type(model).__name__}: {reason}")
    _initialise(model, wanted.keys() - found.keys() - ties.keys(), device)
    _fill(model, found, wanted, device)
    for tied, source in ties.items():
        _set(model, tied, model.get_parameter(source))
    return {"missing_keys": missing, "unexpected_keys": unexpected, "mismatched_keys": mismatched, "error_msgs": []}


def _fill(model: Any, found: dict[str, Tensor], wanted: Mapping[str, Tensor], device: torch.device) -> None:
    """Puts each weight of `found`, which is emptied, on the device, in the dtype of the model, and into it."""
    addresses: set[int] = set()
    for name in list(found):
        dtype = model.config.dtype if wanted[name].is_floating_point() else wanted[name].dtype
        values = found.pop(name).to(device, dtype).contiguous()
        if values.data_ptr() in addresses:  # a pickle may hold one storage twice
            values = values.clone()
        addresses.add(values.data_ptr())
        _set(model, name, values)


def _match(
    weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], prefix: str, stored_prefix: str
) -> tuple[dict[str, Tensor], set[str]]:
    """The weights under the model's names, and the names in the files for which it has no tensor. The base model's
    names begin with `prefix` in a head, with `stored_prefix` (or "xlm-roberta") or nothing in files."""
    begin = re.compile(rf"^(xlm-roberta|{stored_prefix})\.")
    found: dict[str, Tensor] = {}
    unexpected = set()
    for key, weight in weights.items():
        whole = key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        body = begin.sub("", whole)
        name = next((name for name in (whole, body, f"{prefix}.{body}") if name in wanted), None)
        if name is None:
            unexpected.add(key)
        elif name in found:
            raise ValueError(f"the checkpoint holds {name} twice, once as {key}")
        elif wanted[name].is_floating_point() and str(weight.dtype).removeprefix("torch.") not in DTYPES:
            raise ValueError(f"{key} is {weight.dtype}; only {', '.join(DTYPES)} are read, and no quantised weights")
        else:
            found[name] = weight
    return found, {key for key in unexpected if not key.endswith("position_ids")}  # a buffer in files of 4.x


def _explain(mismatched: set[tuple[str, torch.Size, torch.Size]], model: str) -> str:
    shapes = [f"  {name}: {tuple(there)} there, {tuple(here)} here" for name, there, here in sorted(mismatched)]
    head = f"{len(shapes)} weights of the checkpoint have another shape than {model} with this configuration:"
    advice = "Load with the configuration they were saved with, or initialise them: ignore_mismatched_sizes=True"
    return "\n".join([head, *shapes[:20], advice])


def _tie(model: Any, found: dict[str, Tensor]) -> dict[str, str]:
    """The ties (tied name → source) to make; leaves in `found` the source alone, whichever of the two the file holds.

    Two that the file holds with different values stay untied, as in the reference.
    """
    ties = model.all_tied_weights_keys
    for tied, source in list(ties.items()):
        weight = found.pop(tied, None)
        if weight is None or _same(weight, found.setdefault(source, weight)):
            continue
        logger.warning("%s and %s differ in the checkpoint, so they are not tied", tied, source)
        found[tied] = weight
        del ties[tied]
    return ties


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return a.data_ptr() == b.data_ptr() or torch.equal(a, b)


def _initialise(model: Any, names: Iterable[str], device: torch.device) -> None:
    """Initialise the modules that own `names` and are not yet; their other parameters get the values that were found
    afterwards."""
    owners = {name.rpartition(".")[0] for name in names}
    for path, module in model.named_modules():
        if path in owners and not module.__dict__.get(INITIALISED):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.is_meta:
                    _set(module, name, torch.zeros(parameter.shape, dtype=model.config.dtype, device=device))
            model._init_weights(module)


def _set(model: Any, name: str, values: Tensor) -> None:
    """Put `values` in place of the parameter or buffer `name`; a Parameter stays itself, and so is shared."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = values
        return
    if not isinstance(values, nn.Parameter):
        values = nn.Parameter(values, requires_grad=module._parameters[leaf].requires_grad)
    module._parameters[leaf] = values


def _report(model: str, where: str, info: dict[str, Any]) -> None:
    groups = {
        "missing, so newly initialised (train them before use)": info["missing_keys"],
        "of another shape, so newly initialised": {name for name, *_ in info["mismatched_keys"]},
        "in the checkpoint, but of no use here": info["unexpected_keys"],
    }
    text = "".join(f"\n  {what}: {_listed(names)}" for what, names in groups.items() if names)
    if text:
        logger.warning("%s from %s:%s", model, where, text)


def _listed(names: Iterable[str], limit: int = 20) -> str:
    """The names, those of all layers as one, at most `limit` of them; what a file calls its weights may be anything."""
    unique = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names})
    shown = (name if name.isprintable() and len(name) < 200 else reprlib.repr(name) for name in unique[:limit])
    return ", ".join(shown) + (f" and {len(unique) - limit} more" if len(unique) > limit else "")


def save_model(
    model: Any,
    directory: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "50GB",
    safe_serialization: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    variant: str | None = None,
) -> None:
    """Write config.json and the weights into `directory`, and remove the weights of a checkpoint that stood there.

    max_shard_size: bytes, or a string such as "5GB" (10⁹ bytes); a larger model becomes several files and an index.
    safe_serialization: model.safetensors, else pytorch_model.bin.  state_dict: weights to write instead of the model's.
    variant: "fp16" makes it model.fp16.safetensors, beside weights of other variants and of none, which stay.
    Tied weights are written once. Names are those of transformers' class for config.model_type: a BERT head's base
    model is stored as `bert.`, not `roberta.`.

    An exception at any point leaves the directory as it was, and so does a kill while files are written. A kill during
    the switch that follows, a few renames, leaves the old weights or the new ones, never a mix; only if config.json
    changes is there a moment in it when the old weights stand beside the new config.json. What a kill leaves besides, a
    directory `.saving-…` or surplus shards, is never read.
    """
    state = state_to_save(model, state_dict)
    own = f"{model.base_model_prefix}."
    theirs = f"{model.config.kind.prefix}."
    state = {theirs + name.removeprefix(own) if name.startswith(own) else name: state[name] for name in state}
    config = config_to_save(model, state)
    config.validate()
    write_weights(Path(directory), state, config.to_json_string(), max_shard_size, safe_serialization, variant)
    if told := getattr(model, "generation_config", None):
        write_atomically(directory, {GENERATION: json.dumps(dict(told), indent=2) + "\n"})


def state_to_save(model: Any, state_dict: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The state of a model, or what is given as that, with tied weights once; ValueError where values lack."""
    state = dict(model.state_dict() if state_dict is None else state_dict)
    for name, weight in state.items():
        if weight.device.type == "meta":
            raise ValueError(f"{name} is on the meta device: it has no values to save")
        if hasattr(weight, "full_tensor"):  # a DTensor
            raise ValueError(
                f"{name} is sharded over processes: let all of them gather the weights and give these as state_dict=…, "
                "by accelerator.get_state_dict(model) or torch's get_model_state_dict with full_state_dict=True"
            )
    for tied, source in model.all_tied_weights_keys.items():
        if tied in state and source in state and _same(state[tied], state[source]):
            del state[tied]
    return state


def config_to_save(model: Any, state: Mapping[str, Tensor]) -> Any:
    """The configuration of a model that is saved with that state: it names the class and the dtype."""
    config = copy.deepcopy(model.config)
    config.architectures = [config.kind.theirs(type(model).__name__.removeprefix("FSDP"))]  # FSDP2's name for the class
    config.dtype = next((weight.dtype for weight in state.values() if weight.is_floating_point()), config.dtype)
    return config
