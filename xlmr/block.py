"""The containers of the module tree, and the one rule that keeps the tree open to surgery.

A *plain* module is exactly what this package built: its arithmetic is known, so the fused operations read its
parameters directly and never call it. Whatever somebody replaced (LoRA, a quantised Linear), hooked, parametrised or
gave another `forward` is not plain, and is called instead: to bypass it silently would be a wrong answer. Leaves are
called on rows [T, N], whatever their number; a block that is not plain is called as the reference calls it, on
[B, S, N].
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from .cache import KeyValueCache
from .ops import EAGER, Ops
from .varlen import Layout, additive, plan

BLOCKS: set[type] = {nn.ModuleList}
PARAMETERS = {nn.Parameter, type(None)}


def plain(module: nn.Module, kind: type | None = None) -> bool:
    """Whether calling `module` would do nothing but the arithmetic of `kind` (of its own class, for a block) on its own
    parameters."""
    state = module.__dict__
    return (
        (type(module) in BLOCKS if kind is None else type(module) is kind)
        and "forward" not in state  # accelerate's offloading puts one there
        and not (state["_forward_hooks"] or state["_forward_pre_hooks"])
        and not (state["_backward_hooks"] or state["_backward_pre_hooks"])
        and not every_module_is_hooked()
        and PARAMETERS.issuperset(map(type, state["_parameters"].values()))
    )


def every_module_is_hooked() -> bool:
    """Whether there are hooks on all modules of this process, as torch.utils.flop_counter registers them."""
    return bool(
        hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
        or hooks._global_backward_pre_hooks
    )


def plain_norm(norm: Any) -> bool:
    return plain(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None


def plain_embedding(table: Any) -> bool:
    if not plain(table, nn.Embedding):
        return False
    return table.max_norm is None and not (table.scale_grad_by_freq or table.sparse)


def rate(dropout: Any) -> float:
    """The probability with which a dropout drops now: its `p` and its `training` may have been set alone."""
    return float(getattr(dropout, "p", 0.0)) if dropout.training else 0.0


@dataclass
class Collected:
    """What a caller asked to see of one forward pass; None: not asked for."""

    hidden_states: list[Tensor] | None = None
    attentions: list[Tensor] | None = None
    cross_attentions: list[Tensor] | None = None

    @property
    def nothing(self) -> bool:
        return self.hidden_states is None and self.attentions is None

    def like(self) -> "Collected":
        """Empty lists for the same."""
        return Collected(*(None if kept is None else [] for kept in (self.hidden_states, *self.weights)))

    @property
    def weights(self) -> tuple[list[Tensor] | None, list[Tensor] | None]:
        """Those of self attention and of cross attention."""
        return self.attentions, self.cross_attentions

    def fields(self) -> dict[str, tuple[Tensor, ...] | None]:
        """As the fields of an output."""
        names = ("hidden_states", "attentions", "cross_attentions")
        kept = (self.hidden_states, *self.weights)
        return {name: None if k is None else tuple(k) for name, k in zip(names, kept, strict=True)}


T = TypeVar("T")


class Scoped(threading.local, Generic[T]):
    """What a thread holds for the length of a call: a ContextVar that torch.compile and torch.export can trace."""

    def __init__(self, default: T) -> None:
        self._value = default

    def get(self) -> T:
        return self._value

    @contextmanager
    def set(self, value: T) -> Iterator[None]:
        """That value inside."""
        before, self._value = self._value, value
        try:
            yield
        finally:
            self._value = before


# Set for the length of one forward pass: what a foreign module calls begins its own Pass and collects into the same.
COLLECTED = Scoped[Collected | None](None)
# Set by a head while it calls a base model whose masked positions it reads: nothing is left out.
EVERY_POSITION = Scoped[bool](False)


@dataclass
class Pass:
    """What travels with the rows through one forward pass.

    `layout` says where they lie; `cache` holds past keys and values; `cross` is an encoder's states [B·Sk, N] and their
    layout against the queries; `rows` (sorted int64 [R]) are the only ones that the layer's caller wants, `one_each` if
    they are one of every sequence; `collected` takes what the caller of the model asked to see.
    """

    layout: Layout
    causal: bool = False
    cache: KeyValueCache | Any = None
    cross: tuple[Tensor, Layout] | None = None
    rows: Tensor | None = None
    one_each: bool = False
    collected: Collected | None = None

    def kept(self, x: Tensor) -> Tensor:
        """Returns the rows x. Where hidden states were asked for, x is added to them, padded, and returned as read back
        from there: so a gradient of what the caller sees passes through."""
        states = self.collected.hidden_states if self.collected else None
        if states is None:
            return x
        states.append(self.layout.pad(x))
        return self.layout.unpad(states[-1])

    def crossing(self) -> "Pass":
        """What cross attention gets: another sequence, neither the mask nor the cache of its own."""
        return replace(self, layout=replace(self.layout, dense=None, keep=None), causal=False, cache=None)

    def mask(self, layout: Layout, causal: bool, dtype: torch.dtype) -> Tensor | None:
        """The additive mask [B, 1 | H, Q | 1, K] that the reference would hand to a layer."""
        if layout.dense is not None:
            dense = layout.dense.to(torch.promote_types(layout.dense.dtype, dtype))
            return dense.clamp(min=torch.finfo(dtype).min).to(dtype)
        sees = None if layout.keep is None else layout.keep[:, None, None]
        if causal:
            keys, device = layout.sequences.max_k, layout.sequences.q_starts.device
            earlier = torch.ones(layout.seqlen, keys, dtype=torch.bool, device=device).tril(keys - layout.seqlen)
            sees = earlier if sees is None else sees & earlier
        return None if sees is None else additive(sees, dtype).expand(layout.batch, 1, -1, -1)

    def arguments(self, dtype: torch.dtype) -> dict[str, Any]:
        """The keywords, beside the mask, with which the reference would call a layer; those that are None left out."""
        keywords: dict[str, Any] = {"past_key_values": self.cache}
        if self.cross is not None:
            states, layout = self.cross
            keywords["encoder_hidden_states"] = states.unflatten(0, (layout.batch, -1))
            keywords["encoder_attention_mask"] = self.mask(layout, False, dtype)
        return {name: value for name, value in keywords.items() if value is not None}


@dataclass
class Encoded:
    """The last layer's rows, [T, N], or [R, N] where only those that the caller wants were computed (`picked`); beside
    them the further fields of BaseModelOutput, in the padded shape."""

    x: Tensor
    layout: Layout
    fields: dict[str, Any]
    picked: bool = False

    def first_rows(self) -> Tensor:
        """h[:, 0], [B, N], of all rows, or where these are the rows that were picked."""
        return self.x if self.picked else self.x[self.layout.first_rows()]


class Block(nn.Module):
    """A container: `rows` is its arithmetic on [T, N], `forward` the same with the reference's signature."""

    ops: Ops = EAGER
    rows: Any
    contains: tuple[str, ...] = ()  # the attributes that are blocks too

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith("xlmr."):  # a subclass written elsewhere may compute anything
            BLOCKS.add(cls)

    def leaves_plain(self) -> bool:
        """Whether this block's leaves may be called on rows; where one was replaced, the embeddings say no."""
        return True

    def linear(self, dense: Any, x: Tensor) -> Tensor:
        return self.ops.linear(x, dense.weight, dense.bias) if plain(dense, nn.Linear) else dense(x)

    def linear_act(self, dense: Any, act: Any, x: Tensor) -> Tensor:
        if plain(dense, nn.Linear) and plain(act, nn.GELU) and act.approximate == "none":
            return self.ops.linear_act(x, dense.weight, dense.bias, "gelu")
        return act(self.linear(dense, x))

    def add_layer_norm(self, norm: Any, dropout: Any, x: Tensor, residual: Tensor) -> Tensor:
        dropout_p = 0.0
        if dropout is not None:
            x, dropout_p = (x, rate(dropout)) if plain(dropout, nn.Dropout) else (dropout(x), 0.0)
        if plain_norm(norm):
            return self.ops.add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps, dropout_p)
        return norm(F.dropout(x, dropout_p) + residual)


class RowBlock(Block):
    """A block that treats each row alone: `rows(*tensors)` [T, ·] → [T, ·], and `forward` on any leading shape."""

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.rows(*(t.flatten(0, -2) for t in tensors)).unflatten(0, tensors[0].shape[:-1])


class SequenceBlock(Block):
    """A block in which a row sees its sequence: `rows(x, state)` [T, N] → [T, N]; `forward` is the reference's."""

    is_causal = False
    layer_idx = 0  # whose past keys and values a cache has for this block

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **ignored: Any,
    ) -> Any:
        """[B, S, N] → [B, S, N]; masks as varlen.plan takes them. Further keywords are ignored, as in the reference."""
        state = begin(
            hidden_states,
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask,
            past_key_values,
            layer_idx=self.layer_idx,
            causal=self.is_causal,
            every_position=True,
        )
        rows = self.rows(hidden_states.flatten(0, 1), state)
        return torch.ops.aten._unsafe_view(rows, hidden_states.shape)  # FSDP2 warns of a layer that returns any view


class AttentionBlock(SequenceBlock):
    """A SequenceBlock whose `forward` returns, like the reference's, a pair: rows and attention weights."""

    is_cross_attention = False

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """[B, S, N] → ([B, S, N], weights [B, H, S, K] where the caller of the model asked for them, else None)."""
        out, weights = super().forward(*args, **kwargs), self.collected_weights(COLLECTED.get())
        return out, weights[-1] if weights else None

    def collected_weights(self, collected: Collected | None) -> list[Tensor] | None:
        """Where the weights of this attention go, if the caller of the model asked for them."""
        return collected.weights[self.is_cross_attention] if collected else None


def begin(
    hidden: Tensor,
    mask: Tensor | None,
    encoder_hidden: Tensor | None = None,
    encoder_mask: Tensor | None = None,
    cache: Any = None,
    *,
    layer_idx: int = 0,
    causal: bool = False,
    **needs: Any,
) -> Pass:
    """The Pass of a batch of which `hidden` [B, S, …] tells shape and device, begun by layer `layer_idx`: those before
    it have put these tokens into the cache. `needs` go to varlen.plan."""
    (batch, seqlen), collected = hidden.shape[:2], COLLECTED.get()
    weights = collected is not None and collected.attentions is not None
    common: dict[str, Any] = {"device": hidden.device, "weights": weights}
    past = cache.get_seq_length(layer_idx) if cache is not None else 0
    if cache is not None or encoder_hidden is not None:
        needs["every_position"] = True  # keys and values are kept for, or come from, a padded batch
    layout = plan(batch, seqlen, mask, keys=past + seqlen, causal=causal, **common, **needs)
    state = Pass(layout, causal and (mask is None or mask.dim() == 2), cache, collected=collected)
    if encoder_hidden is not None:
        cross = plan(batch, seqlen, encoder_mask, keys=encoder_hidden.shape[1], every_position=True, **common)
        state.cross = encoder_hidden.flatten(0, 1), cross
    return state


def run_rows(block: Any, layout: Layout, *tensors: Tensor) -> Tensor:
    """A position-wise block, or whatever stands in its place, on rows [T, ·]."""
    if plain(block):
        return block.rows(*tensors)
    return block(*(layout.pad(t) for t in tensors)).flatten(0, 1)


def run(block: Any, x: Tensor, state: Pass, positional: tuple[str, ...] = ()) -> Tensor:
    """A block in which rows see each other, or whatever stands in its place, on rows [T, N]. `positional`: the
    arguments that the reference gives it by position."""
    if plain(block):
        return block.rows(x, state)
    given = {"attention_mask": state.mask(state.layout, state.causal, x.dtype), **state.arguments(x.dtype)}
    first = [given.pop(name, None) for name in positional]
    out = block(state.layout.pad(x), *first, **given)
    return (out if isinstance(out, Tensor) else out[0]).flatten(0, 1)


def run_again(block: Any, x: Tensor, state: Pass, positional: tuple[str, ...] = ()) -> Tensor:
    """`run` for activation checkpointing, which repeats it in the backward pass: what is collected then is dropped."""
    if state.collected is None or COLLECTED.get() is state.collected:
        return run(block, x, state, positional)
    collected = state.collected.like()
    with COLLECTED.set(collected):
        return run(block, x, replace(state, collected=collected), positional)


def untouched(block: Any) -> bool:
    """Whether `block` and all blocks in it are plain, so that nothing but our own code sees the layout of the rows."""
    if not plain(block):
        return False
    inner = block if isinstance(block, nn.ModuleList) else (getattr(block, name) for name in block.contains)
    return block.leaves_plain() if isinstance(block, Block) and not block.contains else all(map(untouched, inner))
