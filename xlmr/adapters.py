"""Adapters of PEFT inside a model: the names and results of transformers' PeftAdapterMixin, by the library peft.

An adapter is a directory with adapter_config.json and adapter_model.safetensors (or .bin), which peft and transformers
read and write too. Whatever peft puts into layers goes into a model here; prompt learning needs its get_peft_model.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from .files import own_keywords, read_json, resolve, write_atomically
from .weights import read_weights

logger = logging.getLogger(__name__)

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."  # of the names in a file: where peft's own PeftModel has the model
NAMES_OTHERS = ("adapters", "megatron_config")  # fields by which peft opens other files, or imports any module


class Adaptable:
    """Base of the models: adapters are added, loaded, switched and deleted. ImportError without peft."""

    _hf_peft_config_loaded = False  # whether there are adapters: what transformers' Trainer asks
    peft_config: dict[str, Any]  # by the adapters' names, where there are any
    config: Any

    def add_adapter(self, adapter_config: Any, adapter_name: str | None = None) -> None:
        """Puts a new adapter ("default") of a peft.PeftConfig into the model and makes it the active one: it alone is
        trained. TypeError for another configuration, ValueError for a name that is taken."""
        if not isinstance(adapter_config, peft().PeftConfig):
            raise TypeError(
                f"adapter_config is a {type(adapter_config).__name__}: give one of peft, such as LoraConfig"
            )
        self.set_adapter(self._inject(adapter_config, adapter_name))

    def load_adapter(
        self,
        peft_model_id: str | os.PathLike[str] | None = None,
        adapter_name: str | None = None,
        peft_config: Any = None,
        adapter_state_dict: Mapping[str, Tensor] | None = None,
        low_cpu_mem_usage: bool = False,
        is_trainable: bool = False,
        hotswap: bool | str = "auto",
        force_download: bool = False,
        adapter_kwargs: Mapping[str, Any] | None = None,
        **source: Any,
    ) -> Any:
        """Puts a saved adapter ("default") into the model and makes it the active one, frozen unless `is_trainable`.
        Returns what load_state_dict does, of the adapter's weights.

        peft_model_id: its directory or hub name; or give peft_config and adapter_state_dict.  low_cpu_mem_usage: it
        gets no first values, which is faster.  force_download, source, adapter_kwargs: the hub's, see files.resolve.

        Trusted is what adapter_config.json says of the adapter: how it computes, and the patterns that choose its
        modules. A rank beyond the weights, other files and modules to import are refused, and the base model that it
        names is not looked at: it is this one. As in peft, weights may replace the model's own, by name.
        OSError: no adapter there. ValueError: a name that is taken, weights missing, damaged or hostile files.
        """
        if hotswap not in (False, "auto"):
            raise TypeError(f"hotswap is {hotswap!r}: this is not offered; delete_adapter makes room for another")
        state = dict(adapter_state_dict or {})
        if peft_model_id is not None:
            source = {"force_download": force_download, **own_keywords(source), **(adapter_kwargs or {})}
            peft_config, state = _read(peft_model_id, **source)
        elif peft_config is None or adapter_state_dict is None:
            raise ValueError("there is no adapter to load: give peft_model_id, or peft_config and adapter_state_dict")
        peft_config.inference_mode = not is_trainable
        name = self._inject(peft_config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
        try:
            result = self._fill(name, state, low_cpu_mem_usage)
        except BaseException:
            self.delete_adapter(name)
            raise
        self.set_adapter(name)
        if peft_config.inference_mode:
            self.eval()  # type: ignore[attr-defined]
            for _, layer in self._layers():
                layer.requires_grad_(False)
        if result.unexpected_keys:
            logger.warning("the adapter %s holds weights of no use here: %s", name, ", ".join(result.unexpected_keys))
        return result

    def set_adapter(self, adapter_name: list[str] | str) -> None:
        """Makes one adapter, or several, the active ones; ValueError for one that is not there."""
        self._known([adapter_name] if isinstance(adapter_name, str) else adapter_name)
        peft().functional.set_adapter(self, adapter_name)

    def active_adapters(self) -> list[str]:
        """The names of the active ones; ValueError if there are no adapters."""
        self._known([])
        active = next(layer.active_adapter for _, layer in self._layers(wrappers=False))
        return [active] if isinstance(active, str) else list(active)

    def enable_adapters(self) -> None:
        """Undoes disable_adapters."""
        self._known([])
        for _, layer in self._layers():
            layer.enable_adapters(enabled=True)

    def disable_adapters(self) -> None:
        """Leaves the base model alone to compute, until enable_adapters; ValueError if there are no adapters."""
        self._known([])
        for _, layer in self._layers():
            layer.enable_adapters(enabled=False)

    def delete_adapter(self, adapter_names: list[str] | str) -> None:
        """Removes one adapter, or several; the modules of the base model are back in their places after the last."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self._known(names)
        for name in names:
            peft().functional.delete_adapter(self, name, f"{self.peft_config[name].peft_type.value.lower()}_")
            self.peft_config.pop(name, None)
        if not self.peft_config:
            while outermost := next(self._layers(), None):
                path, layer = outermost
                base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer.original_module
                self.set_submodule(path, base)  # type: ignore[attr-defined]
            del self.peft_config, self._hf_peft_config_loaded

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The weights of an adapter, by default the active one, under the names that are saved; taken from `state_dict`
        if that is given. ValueError for one that is not there."""
        name = adapter_name or self.active_adapters()[0]
        self._known([name])
        return peft().get_peft_model_state_dict(self, state_dict=state_dict, adapter_name=name)

    def _inject(self, config: Any, name: str | None, **options: Any) -> str:
        name = name or "default"
        if name in getattr(self, "peft_config", {}):
            raise ValueError(
                f"there is an adapter {name!r}: give adapter_name another name, or delete_adapter({name!r})"
            )
        config.base_model_name_or_path = self.config.name_or_path
        if str(getattr(config, "target_modules", None)).lower() == "all-linear":
            config.target_modules = self._linear(classifier=config.task_type != "SEQ_CLS")
        try:
            peft().inject_adapter_in_model(config, self, name, **options)
        except BaseException:
            getattr(self, "peft_config", {}).pop(name, None)  # which peft notes first
            raise
        self._hf_peft_config_loaded = True
        return name

    def _linear(self, classifier: bool) -> set[str]:
        """All linear layers but the decoder and, unless `classifier`, that: peft leaves them out for transformers' own
        classes alone."""
        model: Any = self
        inside = tuple(f"{path}." for path, _ in self._layers())
        heads = (model.get_output_embeddings(), None if classifier else getattr(model, "classifier", None))
        return {
            path
            for path, module in model.named_modules()
            if isinstance(getattr(module, "base_layer", module), nn.Linear)
            and not any(module is head for head in heads)
            and not path.startswith(inside)
        }

    def _fill(self, name: str, state: dict[str, Tensor], assign: bool) -> Any:
        """Gives the adapter the values of a file, those of `state`."""
        library, state = peft(), {key.removeprefix(PREFIX): weight for key, weight in state.items()}
        wanted = library.get_peft_model_state_dict(self, adapter_name=name, save_embedding_layers=False)
        if missing := wanted.keys() - state.keys():
            raise ValueError(f"the adapter lacks weights for this model: {', '.join(sorted(missing)[:3])}, …")
        result = library.set_peft_model_state_dict(self, state, adapter_name=name, low_cpu_mem_usage=assign)
        return result._replace(missing_keys=[])  # those of the base model, which it was not to hold

    def _layers(self, wrappers: bool = True) -> Iterator[tuple[str, Any]]:
        """What peft has put in place of modules: layers with adapters and, with `wrappers`, modules trained whole."""
        layers = peft().tuners.tuners_utils.BaseTunerLayer
        kinds = (layers, peft().utils.other.AuxiliaryTrainingWrapper) if wrappers else layers
        for path, module in self.named_modules():  # type: ignore[attr-defined]
            if isinstance(module, kinds):
                yield path, module

    def _known(self, names: list[str]) -> None:
        if not self._hf_peft_config_loaded:
            raise ValueError("there are no adapters in this model: add_adapter, or load_adapter, first")
        if unknown := ", ".join(sorted(set(names) - self.peft_config.keys())):
            raise ValueError(f"there is no adapter {unknown}; there are {', '.join(self.peft_config)}")


def peft() -> Any:
    try:
        import peft.functional
    except ImportError as error:
        raise ImportError("adapters need the library peft: pip install peft") from error
    return peft


def find(name_or_dir: str | os.PathLike[str], **source: Any) -> Path | None:
    """The adapter_config.json of a directory or hub repository, None if it has none; `source`: as of files.resolve."""
    return resolve(name_or_dir, CONFIG, **source)


def base_of(adapter: Path, name_or_dir: str | os.PathLike[str], source: dict[str, Any]) -> str:
    """The checkpoint of the base model: the adapter's own directory if that has a config.json, else what the file
    `adapter` names, as in transformers: a directory or a hub name, read like any other checkpoint."""
    peft()  # without which nothing need be loaded
    if Path(name_or_dir).is_dir() and adapter.with_name("config.json").is_file():
        return os.fspath(name_or_dir)
    base = read_json(adapter).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{adapter} names no base model: load that, and give it the adapter, model.load_adapter(…)")
    if find(base, **source):
        raise ValueError(f"{adapter} names {base} as its base model, which is an adapter too: merge that one first")
    logger.info("%s is an adapter of %s, which is loaded first", name_or_dir, base)
    return base


def _read(name_or_dir: str | os.PathLike[str], **source: Any) -> tuple[Any, dict[str, Tensor]]:
    """The configuration and the weights of a saved adapter."""
    path = find(name_or_dir, **source)
    if path is None:
        raise FileNotFoundError(f"there is no {CONFIG} in {os.fspath(name_or_dir)}")
    fields = {key: value for key, value in read_json(path).items() if key not in ("auto_mapping", "runtime_config")}
    if refused := [name for name in NAMES_OTHERS if fields.get(name)]:
        raise ValueError(f"{path} is refused: {', '.join(refused)} would have peft open files, or import modules")
    state = read_weights(lambda name: resolve(name_or_dir, name, **source), str(name_or_dir), names=(WEIGHTS, PICKLE))
    try:
        config = peft().PeftConfig.from_peft_type(**fields)
        ranks = [getattr(config, "r", None) or 0, *(getattr(config, "rank_pattern", None) or {}).values()]
        largest = max((size for weight in state.values() for size in weight.shape), default=0)
        if max(ranks) > largest:
            raise ValueError(f"a rank of {max(ranks)}, where the weights have {largest} rows at most")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is refused: no adapter that peft {peft().__version__} knows: {error}") from error
    return config, state


def save_adapter(model: Any, directory: str | os.PathLike[str], state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Writes the active adapter into `directory`, atomically, as peft and transformers read it, and no config.json;
    ValueError if several are active."""
    name, *others = model.active_adapters()
    if others:
        raise ValueError(f"{len(others) + 1} adapters are active: save one at a time, after model.set_adapter(name)")
    state = model.get_adapter_state_dict(name, state_dict)
    weights = save({PREFIX + key: weight.detach().clone() for key, weight in state.items()}, {"format": "pt"})
    files: dict[str, bytes | Callable[[Path], None]] = {
        WEIGHTS: weights,
        CONFIG: lambda path: model.peft_config[name].save_pretrained(path.parent),  # under that name
    }
    write_atomically(directory, files, [PICKLE] if Path(directory, PICKLE).is_file() else [])
