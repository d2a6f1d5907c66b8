"""The module tree of XLM-RoBERTa (Conneau et al., 2020): embeddings, post-norm transformer layers, pooler.

Names, parameters and signatures are those of transformers' modeling_xlm_roberta. Each block's `rows` is its arithmetic on
rows [T, N] (T tokens, N hidden units, H heads of D units), where nothing but attention looks from one row to another.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .activations import ACTIVATIONS
from .block import (
    COLLECTED, AttentionBlock, Block, Collected, Pass, RowBlock, SequenceBlock, begin, collected_weights, plain, rate, run,
    run_rows, untouched,
)  # fmt: skip
from .cache import KeyValueCache
from .config import XLMRobertaConfig
from .inputs import check_inputs, check_length, check_packed, check_range, positions_and_types
from .ops import dense_attention
from .outputs import BaseModelOutput
from .pretrained import XLMRobertaPreTrainedModel
from .varlen import Layout, Sequences, packed_positions


class XLMRobertaEmbeddings(Block):
    def __init__(self, config: XLMRobertaConfig):
        super().__init__()
        self.config, self.padding_idx = config, config.pad_token_id
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=self.padding_idx)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.position_embeddings = nn.Embedding(
            config.max_position_embeddings, config.hidden_size, padding_idx=self.padding_idx
        )

    def rows(self, input_ids: Tensor | None, token_type_ids: Tensor, position_ids: Tensor, embeds: Tensor | None):
        """Ids [T], or in their stead word vectors `embeds` [T, N] → [T, N]."""
        word, token_type, position, norm = (
            self.word_embeddings, self.token_type_embeddings, self.position_embeddings, self.LayerNorm
        )  # fmt: skip
        if embeds is None and all(map(plain, (word, token_type, position, norm, self.dropout))):
            return self.ops.embed(
                input_ids, token_type_ids, position_ids, word.weight, token_type.weight, position.weight,
                norm.weight, norm.bias, norm.eps, self.padding_idx, rate(self.dropout),
            )  # fmt: skip
        x = (word(input_ids) if embeds is None else embeds) + token_type(token_type_ids)
        return self.dropout(self.add_layer_norm(norm, nn.Dropout(0.0), x, position(position_ids)))

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values_length: int = 0,
    ) -> Tensor:
        """Ids [B, S] or vectors [B, S, N] → [B, S, N]."""
        positions, types = positions_and_types(
            self.config, input_ids, inputs_embeds, token_type_ids, position_ids, past_key_values_length
        )
        ids, embeds = (None if t is None else t.flatten(0, 1) for t in (input_ids, inputs_embeds))
        return self.rows(ids, types.flatten(), positions.flatten(), embeds).unflatten(0, positions.shape)


class XLMRobertaSelfAttention(AttentionBlock):
    def __init__(self, config: XLMRobertaConfig, layer_idx: int, cross: bool = False):
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.attention_head_size = config.hidden_size // config.num_attention_heads
        self.scaling = self.attention_head_size**-0.5
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)
        self.layer_idx = layer_idx
        self.is_cross_attention = cross
        self.is_causal = config.is_decoder and not cross

    def rows(self, x: Tensor, state: Pass) -> Tensor:
        """[T, N] → [T, N], or [R, N] for the rows that `state.rows` names."""
        if self.is_cross_attention:
            source, layout = state.cross
        else:
            source, layout = x, state.layout
        q, k, v = self.project(x, source, state.rows)
        q, k, v = (t.unflatten(-1, (-1, self.attention_head_size)) for t in (q, k, v))
        if state.cache is not None and not self.is_cross_attention:
            k, v = self.remember(k, v, state.cache, layout.batch)
        sequences = layout.sequences if state.rows is None else layout.sequences.with_queries(state.rows)
        if layout.dense is None:
            causal = state.causal and not self.is_cross_attention
            out = self.ops.attention(q, k, v, sequences, self.scaling, causal, rate(self.dropout))
        else:
            out = self.dense(q, k, v, layout)
        return out.flatten(-2)

    def project(self, x: Tensor, source: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of x (of its `rows`), keys and values of source: in one fused projection where they allow it."""
        query, key, value = leaves = self.query, self.key, self.value
        if source is x and rows is None and all(map(plain, leaves)):
            return self.ops.qkv_projection(x, *(m.weight for m in leaves), *(m.bias for m in leaves))
        x = x if rows is None else x[rows]
        return self.linear(query, x), self.linear(key, source), self.linear(value, source)

    def remember(self, k: Tensor, v: Tensor, cache: Any, batch: int) -> tuple[Tensor, Tensor]:
        """Adds keys and values [B·S, H, D] to the cache; returns all it holds, [B·(past + S), H, D]."""
        k, v = (t.unflatten(0, (batch, -1)).transpose(1, 2) for t in (k, v))
        k, v = getattr(cache, "self_attention_cache", cache).update(k, v, self.layer_idx)
        return k.transpose(1, 2).flatten(0, 1), v.transpose(1, 2).flatten(0, 1)

    def dense(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        """What no kernel computes, by rule in plain PyTorch: a mask per query, and the attention weights themselves."""
        q, k, v = (t.unflatten(0, (layout.batch, -1)).transpose(1, 2) for t in (q, k, v))
        out, weights = dense_attention(q, k, v, layout.dense, self.scaling, rate(self.dropout))
        asked = collected_weights(self.is_cross_attention)
        if asked is not None:
            asked.append(weights)
        return out.transpose(1, 2).flatten(0, 1)


class XLMRobertaResidual(RowBlock):
    """dense → dropout → add → LayerNorm, after the attention and after the feed-forward."""

    def __init__(self, config: XLMRobertaConfig, size: int):
        super().__init__()
        self.dense = nn.Linear(size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def rows(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.add_layer_norm(self.LayerNorm, self.dropout, self.linear(self.dense, x), residual)


class XLMRobertaSelfOutput(XLMRobertaResidual):
    def __init__(self, config: XLMRobertaConfig):
        super().__init__(config, config.hidden_size)


class XLMRobertaOutput(XLMRobertaResidual):
    def __init__(self, config: XLMRobertaConfig):
        super().__init__(config, config.intermediate_size)


class XLMRobertaIntermediate(RowBlock):
    def __init__(self, config: XLMRobertaConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = ACTIVATIONS[config.hidden_act]()

    def rows(self, x: Tensor) -> Tensor:
        return self.linear_act(self.dense, self.intermediate_act_fn, x)


class XLMRobertaAttention(AttentionBlock):
    contains = ("self", "output")

    def __init__(self, config: XLMRobertaConfig, layer_idx: int, cross: bool = False):
        super().__init__()
        self.is_cross_attention = cross
        self.self = XLMRobertaSelfAttention(config, layer_idx, cross)
        self.output = XLMRobertaSelfOutput(config)
        self.is_causal = self.self.is_causal

    def rows(self, x: Tensor, state: Pass) -> Tensor:
        residual = x if state.rows is None else x[state.rows]
        return run_rows(self.output, state.layout, run(self.self, x, state), residual)


class XLMRobertaLayer(SequenceBlock):
    contains = ("attention", "intermediate", "output")

    def __init__(self, config: XLMRobertaConfig, layer_idx: int):
        super().__init__()
        self.chunk_size_feed_forward = config.chunk_size_feed_forward
        self.is_causal = config.is_decoder
        self.attention = XLMRobertaAttention(config, layer_idx)
        if config.add_cross_attention:
            if not config.is_decoder:
                raise ValueError("add_cross_attention=True needs is_decoder=True: only a decoder has cross attention")
            self.crossattention = XLMRobertaAttention(config, layer_idx, cross=True)
            self.contains = (*self.contains, "crossattention")
        self.intermediate = XLMRobertaIntermediate(config)
        self.output = XLMRobertaOutput(config)

    def rows(self, x: Tensor, state: Pass) -> Tensor:
        """[T, N] → [T, N], or [R, N] for the rows that `state.rows` names."""
        x = run(self.attention, x, state)
        if state.cross is not None:
            x = run(self.crossattention, x, state)
        if not self.chunk_size_feed_forward:
            return self.feed_forward(x, state.layout)
        size = self.chunk_size_feed_forward * state.layout.batch  # the reference cuts the sequence, we cut the rows
        whole = replace(state.layout, seqlen=self.chunk_size_feed_forward, indices=None)
        return torch.cat([self.feed_forward(chunk, whole) for chunk in x.split(size)])

    def feed_forward(self, x: Tensor, layout: Layout) -> Tensor:
        return run_rows(self.output, layout, run_rows(self.intermediate, layout, x), x)


class XLMRobertaEncoder(SequenceBlock):
    contains = ("layer",)

    def __init__(self, config: XLMRobertaConfig):
        super().__init__()
        self.config = config
        self.is_causal = config.is_decoder
        self.layer = nn.ModuleList([XLMRobertaLayer(config, i) for i in range(config.num_hidden_layers)])
        self.checkpointing: dict[str, Any] | None = None  # torch.utils.checkpoint's keywords, where enabled

    def rows(self, x: Tensor, state: Pass) -> Tensor:
        collected = COLLECTED.get()
        hidden_states = collected.hidden_states if collected else None
        every = replace(state, rows=None)
        for i, layer in enumerate(self.layer):
            if hidden_states is not None:
                hidden_states.append(x)
            wanted = state if i == len(self.layer) - 1 else every
            if self.checkpointing is not None and self.training:
                x = checkpoint(run, layer, x, wanted, **self.checkpointing)
            else:
                x = run(layer, x, wanted)
        if hidden_states is not None:
            hidden_states.append(x)
        return x

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutput:
        """[B, S, N] → its output as `last_hidden_state`."""
        return BaseModelOutput(super().forward(*args, **kwargs), past_key_values=kwargs.get("past_key_values"))


class XLMRobertaPooler(Block):
    def __init__(self, config: XLMRobertaConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = nn.Tanh()

    def rows(self, x: Tensor) -> Tensor:
        """tanh(dense(x)) of the first rows; [B, N] → [B, N]."""
        return self.activation(self.linear(self.dense, x))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, S, N] → [B, N]."""
        return self.rows(hidden_states[:, 0])


@dataclass
class Encoded:
    """The last layer's rows, [T, N], or [B, N] where only the first row of each text was asked for (`first`); beside
    them the further fields of BaseModelOutput, in the padded shape."""

    x: Tensor
    layout: Layout
    fields: dict[str, Any]
    first: bool = False

    def first_rows(self) -> Tensor:
        """h[:, 0], [B, N]."""
        return self.x if self.first else self.x[self.layout.sequences.q_starts.long()]


class XLMRobertaModel(XLMRobertaPreTrainedModel):
    """The encoder (or, with config.is_decoder, decoder) without a task head; arguments as in the reference."""

    def __init__(self, config: XLMRobertaConfig, add_pooling_layer: bool = True, **path: Any):
        super().__init__(config, **path)
        self.embeddings = XLMRobertaEmbeddings(config)
        self.encoder = XLMRobertaEncoder(config)
        self.pooler = XLMRobertaPooler(config) if add_pooling_layer else None
        self.contains = ("embeddings", "encoder", "pooler") if add_pooling_layer else ("embeddings", "encoder")
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: KeyValueCache | Any = None,
        use_cache: bool | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Ids [B, S] (or `inputs_embeds` [B, S, N]) → BaseModelOutput. Tokens whose attention_mask is 0 give zeros."""
        encoded = self.encode(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, encoder_hidden_states,
            encoder_attention_mask, past_key_values, use_cache, output_attentions=output_attentions,
            output_hidden_states=output_hidden_states, reads_first=self.pooler is not None,
        )  # fmt: skip
        pooled = None if self.pooler is None else self.pool(encoded)
        output = BaseModelOutput(encoded.layout.pad(encoded.x), pooled, **encoded.fields)
        return self.returned(output, return_dict)

    def pool(self, encoded: Encoded) -> Tensor:
        """The pooler's vectors, [B, N]."""
        if plain(self.pooler):
            return self.pooler.rows(encoded.first_rows())
        return self.pooler(encoded.layout.pad(encoded.x))

    def encode(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: KeyValueCache | Any = None,
        use_cache: bool | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        only_first: bool = False,
        **needs: Any,
    ) -> Encoded:
        """The forward pass up to the last layer's rows; `needs` (reads_first, labels, every_position) go to varlen.plan.
        With `only_first` the caller wants h[:, 0] alone, and the last layer is computed for those rows only."""
        given = check_inputs(self.config, input_ids, inputs_embeds)
        decoder = self.config.is_decoder
        self.check_settings(given.shape[1], encoder_hidden_states if decoder else None)
        use_cache = decoder and (self.config.use_cache if use_cache is None else use_cache)
        cache = KeyValueCache() if use_cache and past_key_values is None else past_key_values
        past = cache.get_seq_length() if cache is not None else 0
        positions, types = positions_and_types(
            self.config, input_ids, inputs_embeds, token_type_ids, position_ids, past
        )
        collected = self.collected(output_attentions, output_hidden_states)
        token = COLLECTED.set(collected)
        try:
            ours = all(untouched(getattr(self, name)) for name in self.contains)
            needs["every_position"] = needs.get("every_position", False) or not (self.unpad and ours)
            state = begin(
                given, attention_mask, encoder_hidden_states if decoder else None, encoder_attention_mask, cache,
                causal=decoder, dtype=self.dtype, **needs,
            )  # fmt: skip
            x = self.embed(input_ids, inputs_embeds, types, positions, state.layout)
            first = only_first and ours and not decoder and collected == Collected() and state.layout.dense is None
            if first:
                state.rows = state.layout.sequences.q_starts.long()
            x = run(self.encoder, x, state)
        finally:
            COLLECTED.reset(token)
        fields = collected.fields(state.layout.pad) | {"past_key_values": cache if use_cache else None}
        return Encoded(x, state.layout, fields, first)

    def embed(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, types: Tensor, positions: Tensor, layout: Layout
    ) -> Tensor:
        """The embeddings of the rows that are computed, [T, N]."""
        if not plain(self.embeddings):
            names = ("input_ids", "inputs_embeds", "token_type_ids", "position_ids")
            given = zip(names, (input_ids, inputs_embeds, types, positions), strict=True)
            return self.embeddings(**{name: value for name, value in given if value is not None}).flatten(0, 1)
        ids, embeds = (None if t is None else layout.unpad(t) for t in (input_ids, inputs_embeds))
        return self.embeddings.rows(ids, layout.unpad(types), layout.unpad(positions), embeds)

    def forward_packed(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        *,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Texts laid end to end: ids [T], text b being the tokens cu_seqlens[b] … cu_seqlens[b + 1] → [T, N].

        cu_seqlens [B + 1] int32 or int64; no text longer than max_seqlen. `rows` (sorted int64 [R]): only these rows of
        the last layer are computed → [R, N]. Never synchronises with the device. Every block must be ours and unhooked.
        """
        if input_ids.dim() != 1:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: forward_packed takes [tokens]")
        if not (untouched(self.embeddings) and untouched(self.encoder)):
            raise RuntimeError("forward_packed needs blocks that nobody replaced or hooked: call the model padded")
        check_packed(cu_seqlens, max_seqlen, input_ids.numel())
        check_range("input_ids", input_ids, self.config.vocab_size, "vocab_size")
        if position_ids is None:
            check_length(self.config, max_seqlen)
            position_ids = packed_positions(input_ids, cu_seqlens, self.config.pad_token_id)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        x = self.embeddings.rows(input_ids, token_type_ids, position_ids, None)
        layout = Layout(cu_seqlens.numel() - 1, max_seqlen, Sequences.packed(cu_seqlens, max_seqlen))
        causal = self.config.is_decoder
        x = self.encoder.rows(x, Pass(layout, causal, rows=None if causal else rows))
        return x[rows] if causal and rows is not None else x

    def check_settings(self, seqlen: int, encoder_hidden_states: Tensor | None) -> None:
        """Refuses what the configuration does not allow: cross attention without its layers, a chunk that leaves a rest."""
        if encoder_hidden_states is not None and not self.config.add_cross_attention:
            raise ValueError("encoder_hidden_states was given: this needs a model with config.add_cross_attention=True")
        chunk = self.config.chunk_size_feed_forward
        if chunk and seqlen % chunk:
            raise ValueError(
                f"the sequence has {seqlen} tokens: chunk_size_feed_forward {chunk} must divide it; pad it"
            )

    def collected(self, output_attentions: bool | None, output_hidden_states: bool | None) -> Collected:
        """Empty lists for what the call, or else the configuration, asks to see."""
        attentions = self.config.output_attentions if output_attentions is None else output_attentions
        hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        cross = attentions and self.config.add_cross_attention
        return Collected([] if hidden else None, [] if attentions else None, [] if cross else None)
