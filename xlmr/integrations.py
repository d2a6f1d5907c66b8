"""Our encoder inside other libraries: transformers, and what is built on it (sentence-transformers, PEFT, Trainer).

A host's encoder stays the module it is, with its parameters, names and forward; only its class becomes a subclass whose
forward packs the batch and runs the layers as our blocks do, over the host's own leaf modules. What that path does not
compute (a decoder, recorded hidden states, a hooked or replaced layer) the host's forward computes, by rule.
"""

from __future__ import annotations

import functools
import importlib
import weakref
from operator import is_not
from typing import Any

import torch
from torch import Tensor, nn

from .block import Block, begin
from .config import XLMRobertaConfig
from .model import XLMRobertaEncoder
from .ops import dense_attention, resolve
from .varlen import plan

FAMILY = {"xlm-roberta": "XLMRoberta", "roberta": "Roberta", "camembert": "Camembert", "bert": "Bert"}
REFUSED = {
    "xlm-roberta-xl": "its layers normalise before attention and feed-forward, not after",
    "deberta": "its attention has relative positions",
    "deberta-v2": "its attention has relative positions",
    "xlm": "its layers have language embeddings and another mask",
    "mpnet": "its attention has relative positions",
}
_accelerated: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # the encoders that `accelerate` changed
_patched: list[str] = []  # the names that `patch_transformers` registered


def patch_transformers() -> None:
    """Every XLM-R, RoBERTa, CamemBERT and BERT encoder that transformers builds from now on is ours, also inside
    AutoModel, SentenceTransformer and CrossEncoder; undone by `unpatch`. Positions whose mask is 0 give zeros.

    ImportError without transformers 5 that has `transformers.monkey_patching`.
    """
    _require_transformers()
    from transformers.monkey_patching import register_patch_mapping

    if not _patched:
        # Keys are searched as patterns: "BertEncoder" alone would replace MegatronBertEncoder too.
        mapping = {f"^{prefix}Encoder$": _packed_class(_host_class(kind)) for kind, prefix in FAMILY.items()}
        register_patch_mapping(mapping)
        _patched.extend(mapping)


def accelerate(model: Any) -> Any:
    """Makes the encoders inside `model` (of transformers, a SentenceTransformer, a CrossEncoder) ours, in place, and
    returns it; parameters, state_dict and config stay. Undone by `unpatch`, of this model or of all.

    Positions whose mask is 0 give zeros, except under a question-answering head, which reads them. TypeError where
    there is no encoder of the family, with the reason.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: give a torch module, such as a transformers model")
    _require_transformers()
    ours = {_host_class(kind): _packed_class(_host_class(kind)) for kind in FAMILY}
    encoders = [module for module in model.modules() if type(module) in ours]
    if not encoders and not any(type(module) in ours.values() for module in model.modules()):
        raise TypeError(f"{type(model).__name__} {_why_not(model)}; supported are {', '.join(FAMILY)}")
    for encoder in encoders:
        _check_mathematics(encoder.config)
    whole = any(isinstance(getattr(module, "qa_outputs", None), nn.Module) for module in model.modules())
    for encoder in encoders:
        encoder.__class__ = ours[type(encoder)]  # a subclass of what it was
        encoder.every_position = whole  # type: ignore[assignment]
        _accelerated.add(encoder)
    return model


def unpatch(model: nn.Module | None = None) -> None:
    """Undoes `accelerate` for `model`, or, without one, `patch_transformers` and every `accelerate`. A model that was
    built while transformers was patched keeps our encoder until it is given here."""
    if model is None and _patched:
        from transformers.monkey_patching import unregister_patch_mapping

        unregister_patch_mapping(list(_patched))
        _patched.clear()
    for module in list(_accelerated) if model is None else model.modules():
        host = getattr(type(module), "host_class", None)
        if host is not None:
            module.__dict__.pop("view", None)
            module.__dict__.pop("every_position", None)
            module.__class__ = host
            _accelerated.discard(module)


def register_attention() -> None:
    """Makes attn_implementation="xlmr" known to transformers: our attention, inside its own layers.

    The mask is registered too: without it transformers hands over none, and padding would be attended to.
    """
    _require_transformers()
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("xlmr", attention_forward)
    AttentionMaskInterface.register("xlmr", sdpa_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **ignored: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [B, H, Q, D], key and value [B, H, K, D] → ([B, Q, H, D], None)."""
    batch, _, seqlen, size = query.shape
    scaling = size**-0.5 if scaling is None else scaling
    causal = bool(getattr(module, "is_causal", False)) and attention_mask is None and seqlen > 1
    keys = key.shape[2]
    layout = plan(batch, seqlen, attention_mask, device=query.device, keys=keys, causal=causal, every_position=True)
    if layout.dense is not None:
        out, _ = dense_attention(query, key, value, layout.dense, scaling, dropout)
        return out.transpose(1, 2), None
    rows = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    ops, _ = resolve("auto", query.device)
    out = ops.attention(*rows, layout.sequences, scaling, causal, dropout)
    return out.unflatten(0, (batch, seqlen)), None


@functools.cache
def _packed_class(host: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a host's encoder class whose forward packs."""
    from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions as Output

    @torch.compiler.disable  # the lengths of a batch, read here, decide every shape
    def forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kw: Any) -> Any:
        beyond = *args, *(kw.get(name) for name in ("encoder_hidden_states", "past_key_values"))
        view = None if any(x is not None for x in beyond) else _view(self, hidden_states.device)
        if view is None:
            return host.forward(self, hidden_states, attention_mask, *args, **kw)
        state = begin(hidden_states, attention_mask, reads_first=True, every_position=self.every_position)
        return Output(last_hidden_state=state.layout.pad(view.rows(state.layout.unpad(hidden_states), state)))

    namesake = importlib.import_module("transformers.models.bert_generation.modeling_bert_generation").BertEncoder

    def __new__(cls: Any, config: Any = None, *args: Any, **kw: Any) -> Any:
        """transformers has two classes BertEncoder and patches by name: that of bert-generation stays."""
        return namesake(config) if getattr(config, "model_type", "") == "bert-generation" else nn.Module.__new__(cls)

    members: dict[str, Any] = {
        "__new__": __new__,
        "forward": forward,
        "host_class": host,
        "every_position": False,
        "__doc__": host.__doc__,
    }
    return type(host.__name__, (host,), {**members, "__module__": __name__})


def _view(encoder: Any, device: torch.device) -> XLMRobertaEncoder | None:
    """Our blocks over the leaf modules of `encoder`, rebuilt when one was exchanged; None where the host must run."""
    modules = list(encoder.modules())
    layers = encoder.layer
    if encoder.config.is_decoder or any(layer.training and layer.gradient_checkpointing for layer in layers):
        return None
    known = encoder.__dict__.get("view")
    if known is None or known[1] != device or len(known[2]) != len(modules) or any(map(is_not, known[2], modules)):
        known = encoder.__dict__["view"] = _build(encoder, device), device, modules
    view: XLMRobertaEncoder | None = known[0]
    return None if any(map(_hooked, modules[1:])) else view


def _hooked(module: nn.Module) -> bool:
    """Whether a container of the host has to be called itself; leaves are looked at by the blocks that use them."""
    if not any(True for _ in module.children()) or not type(module).__module__.startswith("transformers."):
        return False
    state = module.__dict__
    hooks = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return "forward" in state or any(state[name] for name in hooks)


def _build(encoder: Any, device: torch.device) -> XLMRobertaEncoder | None:
    config = encoder.config
    heads = config.num_attention_heads
    view = XLMRobertaEncoder(  # of the least size: its leaves are thrown away
        XLMRobertaConfig(hidden_size=heads, num_attention_heads=heads, intermediate_size=1,
                         num_hidden_layers=len(encoder.layer), vocab_size=2,
                         chunk_size_feed_forward=config.chunk_size_feed_forward)
    )  # fmt: skip
    ops, _ = resolve("auto", device)
    for name, ours in list(view.named_modules()):
        theirs = encoder.get_submodule(name)
        if isinstance(ours, Block):
            if name and not type(theirs).__module__.startswith("transformers.models."):
                return None  # somebody's own layer
            ours.ops = ops
            if hasattr(ours, "scaling"):
                ours.scaling, ours.attention_head_size = theirs.scaling, theirs.attention_head_size
        elif not isinstance(ours, nn.ModuleList) and not (name.endswith("act_fn") and config.hidden_act == "gelu"):
            parent, _, leaf = name.rpartition(".")
            setattr(view.get_submodule(parent), leaf, theirs)
    return view


def _host_class(model_type: str) -> Any:
    name = model_type.replace("-", "_")
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    return getattr(module, f"{FAMILY[model_type]}Encoder")


def _check_mathematics(config: Any) -> None:
    kind = getattr(config, "position_embedding_type", None) or "absolute"
    if kind != "absolute":
        raise TypeError(f"position_embedding_type is {kind!r}: only 'absolute' is computed here")


def _why_not(model: nn.Module) -> str:
    kinds: set[Any] = {getattr(getattr(module, "config", None), "model_type", None) for module in model.modules()} - {
        None
    }
    for kind in kinds & REFUSED.keys():
        return f"holds a {kind} model: {REFUSED[kind]}"
    return f"holds no encoder of the family (model_type {', '.join(sorted(map(str, kinds))) or 'not given'})"


def _require_transformers() -> None:
    try:
        importlib.import_module("transformers.monkey_patching")
    except ModuleNotFoundError as error:
        if error.name == "transformers":
            raise ImportError("transformers is not installed: pip install 'transformers>=5'") from None
        from transformers import __version__

        message = (
            f"transformers {__version__} has no monkey_patching: install transformers 5, or use xlmr's own classes"
        )
        raise ImportError(message) from None
