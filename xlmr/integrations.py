"""Our encoder inside other libraries: transformers, and what is built on it (sentence-transformers, PEFT, Trainer).

A host's encoder stays the module it is, with its parameters, names and forward; only its class becomes a subclass whose
forward packs the batch and runs the layers as our blocks do, over the host's own leaf modules. What that path does not
compute (a decoder, recorded attentions, a hooked or replaced layer) the host's forward computes, by rule.

Positions whose mask is 0 are not computed: the encoder gives zeros there. transformers' own heads that read them
(question answering, causal language models, labels on masked tokens) get them computed, and so does ColBERT, which
fills queries up with a masked token that is no padding; a head of your own needs `accelerate(model, unpad=False)`.
Run on transformers 4.57.6 (with sentence-transformers 5.7) and on 5.0.0, 5.1.0, 5.3.0, 5.6.0, 5.10.4, 5.15.1 and 5.23.0
(with 6.2).
"""

from __future__ import annotations

import functools
import importlib
import inspect
import weakref
from collections.abc import Callable
from itertools import pairwise
from operator import is_not
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .block import EVERY_POSITION, Block, Collected, Scoped, begin, every_module_is_hooked
from .checkpoint import config_to_save, state_to_save, without_values
from .config import XLMRobertaConfig
from .family import KINDS, REFUSED
from .model import XLMRobertaEncoder
from .ops import Ops, dense_attention, resolve
from .pretrained import XLMRobertaPreTrainedModel
from .varlen import plan

# The heads that read masked positions: those of the first line always, the others where a masked token has a label.
ALWAYS = "ForQuestionAnswering", "ForCausalLM"
LABELLED = "ForMaskedLM", "ForTokenClassification", "ForPreTraining"
ANOTHER_ATTENTION = "position_bias", "softcap", "s_aux"  # keywords of transformers' attention interface
CAPTURING = "transformers.utils.output_capturing"  # hooks from there stay on the layers, idle, after one recorded call
HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
EXPANSION = Scoped[Tensor | None](None)  # labels on tokens that a base model's caller reads though masked

_ours: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # every encoder that is ours now
_replaced: dict[tuple[Any, str], tuple[Any, Any]] = {}  # (class or module, attribute) → what it was, what it is now
_registered: set[Any] = set()  # transformers' interfaces that know "xlmr"


def patch_transformers(*, backend: str | Ops = "auto") -> None:
    """Every XLM-R, RoBERTa, CamemBERT and BERT encoder that is built from now on is ours, also inside AutoModel,
    SentenceTransformer and CrossEncoder; undone by `unpatch`. Positions whose mask is 0 give zeros, except under a head
    of transformers that reads them. ImportError without transformers 4.57 or later.

    backend: one of xlmr.ops.BACKENDS, of which "prepacked" is the fastest on a CPU, for models that only infer
    (xlmr.prepacked); or an xlmr.ops.Ops, to exchange, trace or check single operations.

    The classes are exchanged in their modules. transformers.monkey_patching does the same while a model is built, but
    in 5.6 to 5.15 it imports every image processor on its way, and so fails without torchvision.
    """
    resolve(backend, torch.device("meta"))
    _require_transformers()
    for model_type, kind in KINDS.items():
        packed = _packed_class(model_type)
        _replace(packed, "backend", backend)
        _replace(_host_module(model_type), kind.named("Encoder"), packed)


def accelerate(model: Any, *, unpad: bool = True, backend: str | Ops = "auto") -> Any:
    """Makes the encoders inside `model` (of transformers, a SentenceTransformer, a CrossEncoder) ours, in place, and
    returns it; parameters, state_dict and config stay. Undone by `unpatch`, of this model or of all.

    unpad: whether positions whose mask is 0 are left out and give zeros, except under a head of transformers that
    reads them; False computes every position. backend: as in `patch_transformers`. TypeError where there is no encoder
    of the family, with the reason; ImportError without transformers 4.57 or later.
    """
    resolve(backend, torch.device("meta"))
    if not isinstance(model, nn.Module):
        inside = [f".{name}" for name, value in getattr(model, "__dict__", {}).items() if isinstance(value, nn.Module)]
        what = f"the torch module in it, {' or '.join(inside)}" if inside else "a torch module, as transformers' are"
        raise TypeError(f"model is a {type(model).__name__}: give {what}")
    _require_transformers()
    ours = {_host_class(model_type): _packed_class(model_type) for model_type in KINDS}
    encoders = [module for module in model.modules() if getattr(type(module), "host_class", type(module)) in ours]
    if not encoders:
        raise TypeError(f"{type(model).__name__} {_why_not(model)}; supported are {', '.join(KINDS)}")
    for encoder in encoders:
        if (kind := _positions(encoder.config)) != "absolute":
            raise TypeError(f"position_embedding_type is {kind!r}: only 'absolute' is computed here")
    _watch_heads()
    for encoder in encoders:
        encoder.__class__ = ours.get(type(encoder), type(encoder))  # a subclass of what it was
        encoder.every_position, encoder.backend = not unpad, backend  # type: ignore[assignment]
        _ours.add(encoder)
    return model


def unpatch(model: nn.Module | None = None) -> None:
    """Undoes `accelerate` and `patch_transformers` for the encoders in `model`; or, without one, for all there are, and
    `register_attention` too."""
    for module in list(_ours) if model is None else model.modules():
        host = getattr(type(module), "host_class", None)
        if host is not None:
            for name in ("view", "every_position", "backend"):
                module.__dict__.pop(name, None)
            module.__class__ = host
            _ours.discard(module)
    if model is not None:
        return
    for (owner, name), (former, ours) in _replaced.items():
        if getattr(owner, name) is ours:  # else somebody has put something over it, which may go on calling it
            setattr(owner, name, former)
    _replaced.clear()
    for interface in _registered:
        interface._global_mapping.pop("xlmr", None)  # transformers has no other way back from register()
    _registered.clear()


def register_attention() -> None:
    """Makes attn_implementation="xlmr" known to transformers: our attention, inside its own layers.

    The mask is registered too: without it transformers hands over none, and padding would be attended to. Undone by
    `unpatch()`: models that ask for it then raise, until their `set_attn_implementation("sdpa")`. ImportError without
    transformers 5: the encoders of 4.57 do not ask for an attention by name.
    """
    _require_transformers((5, 0))
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    for interface, function in ((AttentionInterface, attention_forward), (AttentionMaskInterface, sdpa_mask)):
        interface.register("xlmr", function)
        _registered.add(interface)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [B, H, Q, D], key and value [B, H, K, D] → ([B, Q, H, D], None).

    ValueError for what other architectures hand over and is not computed here, silently left out otherwise.
    """
    beyond = [name for name in ANOTHER_ATTENTION if others.get(name) is not None]
    if beyond or query.shape[1] != key.shape[1]:
        what = " and ".join(beyond) or f"{query.shape[1]} query heads on {key.shape[1]} key heads"
        raise ValueError(
            f"{type(module).__name__} computes attention with {what}, which ours does not: load it without "
            "attn_implementation='xlmr'"
        )
    batch, _, seqlen, size = query.shape
    scaling = size**-0.5 if scaling is None else scaling
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal  # True is the reference's, too
    causal = bool(is_causal) and attention_mask is None and seqlen > 1
    keys = key.shape[2]
    layout = plan(batch, seqlen, attention_mask, device=query.device, keys=keys, causal=causal, every_position=True)
    if layout.dense is not None:
        out, _ = dense_attention(query, key, value, layout.dense, scaling, dropout)
        return out.transpose(1, 2), None
    rows = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    ops, _ = resolve("auto", query.device)
    out = ops.attention(*rows, layout.sequences, scaling, causal, dropout)
    return out.unflatten(0, (batch, seqlen)), None


class TrainerMixin:
    """Makes transformers' Trainer save our models whole: `class MyTrainer(xlmr.TrainerMixin, Trainer): pass`.

    Trainer knows transformers' own classes only: of ours it saves no config.json, and fails where weights are tied.
    What MyTrainer saves has a config.json, and tied weights once; other models it saves as Trainer does.
    """

    model: Any
    args: Any

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        ours = isinstance(self.model, XLMRobertaPreTrainedModel)
        state = state_to_save(self.model, state_dict) if ours else state_dict
        super()._save(output_dir, state)  # type: ignore[misc]
        directory = output_dir or self.args.output_dir
        if ours and self.args.should_save and self.model._hf_peft_config_loaded:
            self.model.save_pretrained(directory)  # the adapter, which from_pretrained takes; the rest is to go on from
        elif ours and self.args.should_save:
            config_to_save(self.model, state).save_pretrained(directory)


def __getattr__(name: str) -> Any:
    """The packed classes by name: what unpickles a model that has them."""
    for model_type, kind in KINDS.items():
        if name == f"Packed{kind.named('Encoder')}":
            return _packed_class(model_type)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _packed_class(model_type: str) -> type[nn.Module]:
    """The subclass of a host's encoder class whose forward packs."""
    host = _host_class(model_type)
    facts = {"host_class": host, "__doc__": host.__doc__, "__module__": __name__}
    forward = torch.compiler.disable(_Packing.forward)  # the lengths of a batch, read there, decide every shape
    return type(f"Packed{host.__name__}", (_Packing, host), {"forward": forward, **facts})


class _Packing:
    """What a host's encoder class inherits besides, to become ours."""

    host_class: type[nn.Module]
    config: Any
    every_position = False
    backend: str | Ops = "auto"

    def __new__(cls, *args: Any, **kw: Any) -> Any:
        encoder = super().__new__(cls)
        _watch_heads()
        _ours.add(encoder)  # type: ignore[arg-type]
        return encoder

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kw: Any) -> Any:
        view = None if _asks_more(self.config, args, kw) else _view(self, hidden_states.device)
        if view is None:
            return self.host_class.forward(self, hidden_states, attention_mask, *args, **kw)
        labels = EXPANSION.get()
        if labels is not None and labels.shape != hidden_states.shape[:2]:
            labels = None  # of an encoder around this one
        whole = self.every_position or EVERY_POSITION.get()
        state = begin(hidden_states, attention_mask, reads_first=True, every_position=whole, labels=labels)
        states: list[Tensor] | None = [] if _asks("output_hidden_states", self.config, kw) else None
        state.collected = Collected(hidden_states=states)
        x = state.layout.pad(state.kept(view.rows(state.layout.unpad(hidden_states), state)))
        return _host_output(x, None if states is None else _recorded(self, states))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "view"}  # rebuilt where needed


def _host_output(x: Tensor, states: tuple[Tensor, ...] | None) -> Any:
    from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

    return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=x, hidden_states=states)


def _asks_more(config: Any, args: tuple[Any, ...], kw: dict[str, Any]) -> bool:
    """Whether a call of an encoder wants what only the host computes: cross attention, a cache, attention weights."""
    heads = kw.get("head_mask")  # of transformers 4, which gives a list of None for no mask
    given = (kw.get(name) for name in ("encoder_hidden_states", "past_key_values"))
    beyond = *args, *given, *(() if heads is None else heads)
    return any(x is not None for x in beyond) or _asks("output_attentions", config, kw)


def _asks(name: str, config: Any, kw: dict[str, Any]) -> bool:
    """Whether a call or else the configuration asks to record something; a number chooses one of the states."""
    asked = kw.get(name, getattr(config, name, False))
    return asked is not None and asked is not False


def _recorded(encoder: Any, states: list[Tensor]) -> tuple[Tensor, ...]:
    """The states [B, S, N] of an encoder, given also to the hooks by which transformers 5 waits for each layer's."""
    for layer, (x, y) in zip(encoder.layer, pairwise(states), strict=True):
        for hook in layer._forward_hooks.values():
            hook(layer, (x,), y)
    return tuple(states)


def _expansion(config: Any, tokens: Any, mask: Any) -> Tensor | None:
    """Labels [B, S] by which masked positions are computed that the caller reads: ColBERT fills queries up with one
    token, [MASK], masks it, and reads its states. The labels are that token where it stands under the mask, but -100
    elsewhere, where it is padding, and where other tokens are masked too. Padding is 0 or 1 in the whole family,
    whatever a configuration says. Nothing waits for the device."""
    if not (isinstance(tokens, Tensor) and isinstance(mask, Tensor) and mask.shape == tokens.shape and mask.numel()):
        return None
    filled = (mask == 0) & (tokens > 1)
    if config.pad_token_id is not None:
        filled &= tokens != config.pad_token_id
    one = (tokens == (tokens * filled).max()) & filled
    return tokens.masked_fill(~one | (one != filled).any(), -100)


def _replace(owner: Any, name: str, value: Any) -> None:
    """Sets an attribute until `unpatch`."""
    _replaced[owner, name] = _former(owner, name), value
    setattr(owner, name, value)


def _former(owner: Any, name: str) -> Any:
    """What an attribute is, but for us."""
    return _replaced[owner, name][0] if (owner, name) in _replaced else getattr(owner, name)


def _watch_heads() -> None:
    """Lets the host's heads, and its base models by their tokens, tell our encoder when masked positions are read."""
    for model_type, kind in KINDS.items():
        base = getattr(_host_module(model_type), kind.named("Model"))
        if (base, "forward") not in _replaced:
            _replace(base, "forward", _telling(base.forward))
        for part in (*ALWAYS, *LABELLED):
            head = getattr(_host_module(model_type), kind.named(part), None)
            if head is not None and (head, "forward") not in _replaced:
                _replace(head, "forward", _watched(head.forward, part in ALWAYS))


def _telling(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    @functools.partial(torch.compiler.disable, recursive=False)
    def telling(self: Any, *args: Any, **kw: Any) -> Any:
        given = dict(zip(("input_ids", "attention_mask"), args, strict=False), **kw)
        with EXPANSION.set(_expansion(self.config, given.get("input_ids"), given.get("attention_mask"))):
            return forward(self, *args, **kw)

    return telling


def _watched(forward: Callable[..., Any], always: bool) -> Callable[..., Any]:
    signature = inspect.signature(forward)

    @torch.compiler.disable
    def reads_masked(self: Any, args: tuple[Any, ...], kw: dict[str, Any]) -> bool:
        if not any(hasattr(type(module), "host_class") for module in self.modules()):
            return False
        given = signature.bind(self, *args, **kw).arguments
        mask, labels = given.get("attention_mask"), given.get("labels")
        if always or mask is None or labels is None:
            return always
        return mask.shape != labels.shape or bool(((mask == 0).to(labels.device) & (labels != -100)).any())

    @functools.wraps(forward)
    @functools.partial(torch.compiler.disable, recursive=False)
    def watched(self: Any, *args: Any, **kw: Any) -> Any:
        with EVERY_POSITION.set(reads_masked(self, args, kw)):
            return forward(self, *args, **kw)

    return watched


def _view(encoder: Any, device: torch.device) -> XLMRobertaEncoder | None:
    """Our blocks over the leaf modules of `encoder`, rebuilt when one was exchanged; None where the host must run."""
    modules = list(encoder.modules())
    beyond = encoder.config.is_decoder or _positions(encoder.config) != "absolute" or _rewritten(encoder.host_class)
    if beyond or any(layer.training and getattr(layer, "gradient_checkpointing", False) for layer in encoder.layer):
        return None
    view: _View | None = encoder.__dict__.get("view")
    path = encoder.backend, device, *[module.scaling for module in modules if "scaling" in module.__dict__]
    if view is None or not view.is_of(modules, path):
        view = encoder.__dict__["view"] = _View(_build(encoder, device), modules, path)
    return None if every_module_is_hooked() or any(map(_hooked, modules[1:])) else view.blocks


class _View(NamedTuple):
    """Our blocks over a host's encoder (None where they cannot be), and what they were built of."""

    blocks: XLMRobertaEncoder | None
    modules: list[nn.Module]
    path: tuple[Any, ...]

    def is_of(self, modules: list[nn.Module], path: tuple[Any, ...]) -> bool:
        same = len(self.modules) == len(modules) and not any(map(is_not, self.modules, modules))
        return same and self.path == path


def _hooked(module: nn.Module) -> bool:
    """Whether a container or GELU of the host has to be called itself, or a leaf as the host calls it, with a batch:
    peft's hooks give its layers an adapter for each text. Else blocks look at the leaves they use."""
    kind, state = type(module), module.__dict__
    if state["_forward_pre_hooks_with_kwargs"]:
        return True
    if not kind.__module__.startswith("transformers.") or not (state["_modules"] or _is_gelu(module)):
        return False
    own = "forward" in state and state["forward"] != kind.forward.__get__(module)  # 5.0 leaves the class's there
    hooks = (hook for name in HOOKS if state[name] for hook in state[name].values())
    return own or _rewritten(kind) or any(getattr(hook, "__module__", "") != CAPTURING for hook in hooks)


def _rewritten(kind: Any) -> bool:
    """Whether somebody has given a class of transformers another forward."""
    return not kind.forward.__module__.startswith("transformers.")


def _build(encoder: Any, device: torch.device) -> XLMRobertaEncoder | None:
    config = encoder.config
    heads = config.num_attention_heads
    with without_values():  # its leaves are thrown away: no memory, and no random numbers drawn from the host's
        view = XLMRobertaEncoder(
            XLMRobertaConfig(hidden_size=heads, num_attention_heads=heads, num_hidden_layers=len(encoder.layer),
                             chunk_size_feed_forward=config.chunk_size_feed_forward)
        )  # fmt: skip
    ops, _ = resolve(encoder.backend, device)
    for name, ours in list(view.named_modules()):
        theirs = encoder.get_submodule(name)
        if isinstance(ours, Block):
            if name and not type(theirs).__module__.startswith("transformers.models."):
                return None  # somebody's own layer
            ours.ops = ops
            if hasattr(ours, "scaling"):
                ours.attention_head_size = theirs.attention_head_size
                ours.scaling = getattr(theirs, "scaling", theirs.attention_head_size**-0.5)  # 4.57 keeps none
        elif not isinstance(ours, nn.ModuleList) and not _is_gelu(theirs):  # ours is fused with the linear layer
            parent, _, leaf = name.rpartition(".")
            setattr(view.get_submodule(parent), leaf, theirs)
    return view


def _is_gelu(module: nn.Module) -> bool:
    return (type(module).__module__, type(module).__name__) == ("transformers.activations", "GELUActivation")


def _host_module(model_type: str) -> Any:
    name = model_type.replace("-", "_")
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def _host_class(model_type: str) -> Any:
    module, name = _host_module(model_type), KINDS[model_type].named("Encoder")
    return _former(module, name)


def _positions(config: Any) -> str:
    """How attention sees positions: before 5.0 BERT's and RoBERTa's encoders may know relative ones."""
    return getattr(config, "position_embedding_type", None) or "absolute"


def _why_not(model: nn.Module) -> str:
    types = {getattr(getattr(module, "config", None), "model_type", None) for module in model.modules()}
    named = sorted(str(model_type) for model_type in types if model_type)
    for model_type in named:
        if model_type in REFUSED:
            return f"holds a model of type {model_type} ({REFUSED[model_type]})"
    if KINDS.keys() & set(named):
        return f"calls itself {', '.join(named)} but has no encoder of transformers: its code may compute anything"
    return f"holds no encoder of the family (model_type {', '.join(named) or 'not given'})"


def _require_transformers(least: tuple[int, int] = (4, 57)) -> None:
    wanted = ".".join(map(str, least))
    try:
        from transformers import __version__
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError(f"transformers is not installed: pip install 'transformers>={wanted}'") from None
    if tuple(map(int, __version__.split(".")[:2])) < least:
        raise ImportError(
            f"transformers {__version__} is not supported: install {wanted} or later, or use xlmr's classes"
        )
