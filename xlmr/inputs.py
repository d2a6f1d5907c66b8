"""Checks of what a caller hands to a model, and the token types and positions of what he left out.

Values are looked at where that costs no synchronisation: on the CPU, and on any device before it would be too late (a
sequence longer than the limit). What a kernel would follow out of its memory, the boundaries of packed sequences, a GPU
asserts by itself. Every error says what was given, what is allowed and what to do.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .block import Collected, Pass, begin
from .cache import KeyValueCache
from .config import XLMRobertaConfig
from .values import readable, recorded, require

INTEGERS = (torch.int64, torch.int32)
TOKENIZER = "; use the tokenizer that belongs to this checkpoint"
TENSORS = (  # the arguments of a model that are tensors, or left out
    "input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "encoder_hidden_states",
    "encoder_attention_mask",
)  # fmt: skip


class Arguments(NamedTuple):
    """What a model's forward hands to its base model, as it was given."""

    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    token_type_ids: Tensor | None = None
    position_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None
    output_attentions: bool | None = None
    output_hidden_states: bool | None = None
    encoder_hidden_states: Tensor | None = None
    encoder_attention_mask: Tensor | None = None
    past_key_values: Any = None
    use_cache: bool | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """[batch, sequence], as far as the arguments tell."""
        given = self.inputs_embeds if self.input_ids is None else self.input_ids
        check_tensors(input_ids=given)
        return () if given is None else tuple(given.shape[:2])

    def without_cache(self) -> "Arguments":
        """The same for layers that are computed twice, in backward again; ValueError if a cache was given."""
        if self.past_key_values is not None:
            raise ValueError(
                "gradient checkpointing computes layers twice, which a cache would remember: leave out "
                "past_key_values, or call gradient_checkpointing_disable()"
            )
        return self._replace(use_cache=False)


class Tables(NamedTuple):
    """How many rows the embedding tables have, and the position of the first token: the modules tell, for as in the
    reference a configuration that is changed after the model was built changes neither."""

    words: int
    positions: int
    types: int
    offset: int

    @classmethod
    def of(cls, embeddings: Any, config: XLMRobertaConfig) -> "Tables":
        """Those of a model's `embeddings`; where something else stands in their place, those of its configuration."""

        def rows(name: str, declared: int) -> int:
            table = getattr(embeddings, name, None)
            weight = table._parameters.get("weight") if isinstance(table, nn.Embedding) else None
            return declared if weight is None or weight.dim() != 2 else weight.shape[0]  # FSDP flattens its shards

        return cls(
            rows("word_embeddings", config.vocab_size),
            rows("position_embeddings", config.max_position_embeddings),
            rows("token_type_embeddings", config.type_vocab_size),
            embeddings.position_offset if hasattr(embeddings, "position_offset") else config.position_offset,
        )

    @property
    def longest(self) -> int:
        """The longest sequence in tokens."""
        return self.positions - self.offset


class Inputs:
    """The arguments of one forward of the base model, checked, with what was left out filled in.

    `to_embed`: ids [B, S] or None, token types and positions [B, S], word vectors [B, S, N] or None; `as_given`: the
    same without what was filled in, which embeddings that are not ours fill in themselves.
    """

    def __init__(self, config: XLMRobertaConfig, tables: Tables, given: Arguments):
        input_ids, inputs_embeds, cache = given.input_ids, given.inputs_embeds, given.past_key_values
        check_tensors(**{name: getattr(given, name) for name in TENSORS})
        self.config = config
        self.given = check_inputs(tables, config.hidden_size, input_ids, inputs_embeds)
        check_settings(config, self.given.shape[1], given.encoder_hidden_states)
        self.masks = given.attention_mask, given.encoder_attention_mask
        self.encoder_hidden_states = given.encoder_hidden_states if config.is_decoder else None
        self.use_cache = config.is_decoder and (config.use_cache if given.use_cache is None else given.use_cache)
        self.cache = KeyValueCache() if self.use_cache and cache is None else cache
        past = self.cache.get_seq_length() if self.cache is not None else 0
        positions, types = positions_and_types(
            tables, input_ids, inputs_embeds, given.token_type_ids, given.position_ids, past
        )
        self.to_embed = {
            "input_ids": input_ids, "token_type_ids": types, "position_ids": positions, "inputs_embeds": inputs_embeds,
        }  # fmt: skip
        self.as_given = {name: getattr(given, name) for name in self.to_embed} | {"past_key_values_length": past}
        self.asked = given.output_attentions, given.output_hidden_states

    def begin(self, **needs: Any) -> Pass:
        """The Pass of this forward; call it once COLLECTED is set."""
        mask, encoder_mask = self.masks
        causal = self.config.is_decoder
        return begin(self.given, mask, self.encoder_hidden_states, encoder_mask, self.cache, causal=causal, **needs)

    def collected(self) -> Collected:
        """Empty lists for what the call, or else the configuration, asks to see."""
        attentions, hidden_states = self.asked
        attentions = self.config.output_attentions if attentions is None else attentions
        hidden_states = self.config.output_hidden_states if hidden_states is None else hidden_states
        return Collected(*([] if asked else None for asked in (hidden_states, attentions, attentions)))


def check_tensors(**given: Any) -> None:
    """Refuses what is neither a tensor nor None: lists, as a tokenizer gives them by default, and arrays."""
    for name, value in given.items():
        if not isinstance(value, (Tensor, type(None))):
            kind = type(value).__name__
            raise TypeError(f"{name} is a {kind}: give a tensor, as tokenizer(…, return_tensors='pt') does")


def check_inputs(tables: Tables, hidden: int, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """The one of the two that was given: ids [B, S] below vocab_size, or vectors [B, S, N] of `hidden` numbers."""
    if (input_ids is None) == (inputs_embeds is None):
        given = "neither" if input_ids is None else "both"
        raise ValueError(f"{given} of input_ids and inputs_embeds is given: exactly one is needed")
    if input_ids is not None:
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: it must be [batch, sequence]")
        check_range("input_ids", input_ids, tables.words, "vocab_size", TOKENIZER)
        return input_ids
    assert inputs_embeds is not None
    if inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != hidden:
        shape = tuple(inputs_embeds.shape)
        raise ValueError(f"inputs_embeds has shape {shape}: it must be [batch, sequence, {hidden}]")
    return inputs_embeds


def check_settings(config: XLMRobertaConfig, seqlen: int, encoder_hidden_states: Tensor | None) -> None:
    """Refuses what the configuration does not allow: cross attention without its layers, a chunk that leaves a rest."""
    if config.is_decoder and encoder_hidden_states is not None and not config.add_cross_attention:
        raise ValueError("encoder_hidden_states was given: this needs a model with config.add_cross_attention=True")
    chunk = config.chunk_size_feed_forward
    if chunk and seqlen % chunk:
        raise ValueError(f"the sequence has {seqlen} tokens: chunk_size_feed_forward {chunk} must divide it; pad it")


def check_range(name: str, ids: Tensor, size: int, setting: str, advice: str = "") -> None:
    """Refuses a dtype that is no integer, and values outside 0 … size − 1 where looking costs no synchronisation."""
    if ids.dtype not in INTEGERS:
        raise TypeError(f"{name} has dtype {ids.dtype}: give torch.long or torch.int")
    if readable(ids) and ids.numel():
        low, high = (int(v) for v in torch.aminmax(ids))
        if low < 0 or high >= size:
            wrong = low if low < 0 else high
            raise IndexError(f"{name} holds {wrong}: allowed are 0 … {size - 1} ({setting} is {size}){advice}")


def positions_and_types(
    tables: Tables,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    past: int = 0,
) -> tuple[Tensor, Tensor]:
    """Positions and token types of a batch, [B, S] each, checked. By default types are 0, and positions count up from
    tables.offset, whatever the attention mask. Pad tokens among the ids are skipped: their position is the one before
    the first. (A model of offset 0 counts them like any token: −1 is the id of none.)"""
    given = input_ids if input_ids is not None else inputs_embeds
    assert given is not None
    shape, device, pad = given.shape[:2], given.device, tables.offset - 1
    if position_ids is None and input_ids is not None:
        real = (input_ids != pad).long()
        position_ids = (real.cumsum(1) + past) * real + pad
        if shape[1] + past > tables.longest:  # only then, since it synchronises: pad tokens take no position
            check_length(tables, int(position_ids.max()) - pad)
    elif position_ids is None:
        first = tables.offset or past  # where positions follow pad, it is the first after a cache too, as there
        position_ids = torch.arange(first, first + shape[1], device=device)
        check_length(tables, first + shape[1] - tables.offset)
    else:
        check_range("position_ids", position_ids, tables.positions, "max_position_embeddings")
    if token_type_ids is None:
        token_type_ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    check_range("token_type_ids", token_type_ids, tables.types, "type_vocab_size")
    return position_ids.expand(shape), token_type_ids.expand(shape)


def check_length(tables: Tables, length: int) -> None:
    """Refuses a sequence that has more tokens than there are positions."""
    if length > tables.longest:
        raise ValueError(
            f"a sequence has {length} tokens: this model takes at most {tables.longest} (max_position_embeddings "
            f"{tables.positions} − {tables.offset}); cut it with "
            f"tokenizer(…, truncation=True, max_length={tables.longest})"
        )


def check_packed(tables: Tables, input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int, rows: Tensor | None) -> None:
    """Refuses ids that are not [T], boundaries that do not cut them into sequences of at most `max_seqlen`, and `rows`
    that are not sorted rows of them."""
    check_tensors(input_ids=input_ids, cu_seqlens=cu_seqlens, rows=rows)
    if rows is not None:
        if rows.dim() != 1 or rows.dtype not in INTEGERS:
            raise ValueError(f"rows is {tuple(rows.shape)} of {rows.dtype}: it must be torch.long [rows]")
        check_range("rows", rows, input_ids.numel(), "the number of tokens")
        if not recorded():
            inside = (rows[:1] >= 0).all() & (rows[-1:] < input_ids.numel()).all()
            what = f"rows must be sorted and below {input_ids.numel()}, the tokens: give rows.sort().values"
            require(inside & (rows.diff() >= 0).all(), what, rows=rows)
    if input_ids.dim() != 1:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: a packed batch is [tokens]")
    check_range("input_ids", input_ids, tables.words, "vocab_size", TOKENIZER)
    check_length(tables, max_seqlen)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.dtype not in INTEGERS:
        given = f"{tuple(cu_seqlens.shape)} of {cu_seqlens.dtype}"
        raise ValueError(f"cu_seqlens is {given}: it must be int32 or int64 [batch + 1]")
    if not recorded():
        lens, tokens = cu_seqlens.diff(), input_ids.numel()
        right = (lens.clamp(0, max_seqlen) == lens).all() & (cu_seqlens[0] == 0) & (cu_seqlens[-1] == tokens)
        what = f"cu_seqlens must rise from 0 to {tokens} (the tokens) in steps of at most max_seqlen = {max_seqlen}"
        require(right, what, cu_seqlens=cu_seqlens)


def class_labels(labels: Tensor | None, shape: tuple[int, ...], classes: int) -> Any:
    """`labels`, which may be flat, as int64 of `shape`, or None; refuses those of another shape, and those that are not
    −100 (none) or a class below `classes`."""
    check_tensors(labels=labels)
    if labels is None:
        return None
    if labels.shape not in (shape, (math.prod(shape),)):
        raise ValueError(f"labels has shape {tuple(labels.shape)}: it must be {tuple(shape)}")
    labels = labels.long() if labels.dtype == torch.uint8 else labels  # the one dtype beside int64 that torch scores
    check_range(
        "labels", labels.masked_fill(labels == -100, 0), classes, "the number of classes", "; −100 stands for none"
    )
    return labels.view(shape).long()


def as_targets(labels: Tensor, logits: Tensor) -> Tensor:
    """Labels that are numbers, as floating point; refuses those that are not of the logits' shape."""
    if labels.shape != logits.shape:
        raise ValueError(f"labels has shape {tuple(labels.shape)}: it must be {tuple(logits.shape)}")
    return labels.to(torch.promote_types(labels.dtype, logits.dtype))


def check_positions(name: str, positions: Tensor, batch: int) -> None:
    """Refuses positions that are not integers [B] or [B, 1]; any value is allowed."""
    check_tensors(**{name: positions})
    if positions.dtype not in INTEGERS:
        raise TypeError(f"{name} has dtype {positions.dtype}: give torch.long or torch.int")
    if positions.shape not in ((batch,), (batch, 1)):
        raise ValueError(f"{name} has shape {tuple(positions.shape)}: it must be {(batch,)}")
