"""The module tree of XLM-RoBERTa (Conneau et al., 2020): post-norm transformer layers, encoder, pooler.

Names, parameters and signatures are those of transformers' modeling_xlm_roberta. Each block's `rows` is its arithmetic
on rows [T, N] (T tokens, N hidden units, H heads of D units), where only attention looks from one row to another.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .activations import ACTIVATIONS
from .block import (
    COLLECTED,
    EVERY_POSITION,
    AttentionBlock,
    Block,
    Collected,
    Encoded,
    Pass,
    RowBlock,
    SequenceBlock,
    plain,
    rate,
    run,
    run_again,
    run_rows,
    untouched,
)
from .cache import KeyValueCache, extended
from .checkpoint import values_follow
from .config import XLMRobertaConfig
from .embeddings import XLMRobertaEmbeddings
from .inputs import Arguments, Inputs, Tables, check_packed
from .ops import Ops, dense_attention
from .outputs import BaseModelOutput
from .pretrained import XLMRobertaPreTrainedModel
from .varlen import Layout, Sequences, packed_positions, padded_places


class XLMRobertaSelfAttention(AttentionBlock):
    def __init__(self, config: XLMRobertaConfig, layer_idx: int = 0, cross: bool = False):
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
            assert state.cross is not None
            source, layout = state.cross
        else:
            source, layout = x, state.layout
        q, k, v = self.project(x, source, state.rows)
        q, k, v = (t.unflatten(-1, (-1, self.attention_head_size)) for t in (q, k, v))
        if state.cache is not None and not self.is_cross_attention:
            k, v = extended(k, v, state.cache, self.layer_idx, layout.batch)
        sequences = layout.sequences
        if state.rows is not None:  # sorted rows of x: checked where they were given, or made so
            sequences = sequences.with_queries(state.rows, state.one_each).known_to_fit(len(q), len(k))
        if layout.dense is None:
            causal = state.causal and not self.is_cross_attention
            out = self.ops.attention(q, k, v, sequences, self.scaling, causal, rate(self.dropout))
        else:
            out = self.attend_densely(q, k, v, layout.dense, layout.batch, state.collected)
        return out.flatten(-2)

    def project(self, x: Tensor, source: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of x (only of `rows`, where given), keys and values of `source`; in one fused projection where all
        three layers are plain. That projects the queries of all rows, which costs less than two more launches: they
        are a twelfth of a layer's products."""
        query, key, value = leaves = self.query, self.key, self.value
        if source is x and all(plain(leaf, nn.Linear) for leaf in leaves):
            q, k, v = self.ops.qkv_projection(x, *(m.weight for m in leaves), *(m.bias for m in leaves))
            return q if rows is None else q[rows], k, v
        x = x if rows is None else x[rows]
        return self.linear(query, x), self.linear(key, source), self.linear(value, source)

    def attend_densely(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, batch: int, collected: Collected | None
    ) -> Tensor:
        """Attention in plain PyTorch, for what no kernel computes: a mask per query, or the attention weights."""
        q, k, v = (t.unflatten(0, (batch, -1)).transpose(1, 2) for t in (q, k, v))
        out, weights = dense_attention(q, k, v, mask, self.scaling, rate(self.dropout))
        if (asked := self.collected_weights(collected)) is not None:
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

    def __init__(self, config: XLMRobertaConfig, layer_idx: int = 0, cross: bool = False):
        super().__init__()
        self.is_cross_attention = cross
        self.self = XLMRobertaSelfAttention(config, layer_idx, cross)
        self.output = XLMRobertaSelfOutput(config)
        self.layer_idx, self.is_causal = layer_idx, self.self.is_causal

    def rows(self, x: Tensor, state: Pass) -> Tensor:
        residual = x if state.rows is None else x[state.rows]
        return run_rows(self.output, state.layout, run(self.self, x, state), residual)


class XLMRobertaLayer(SequenceBlock):
    contains: tuple[str, ...] = ("attention", "intermediate", "output")

    def __init__(self, config: XLMRobertaConfig, layer_idx: int = 0):
        super().__init__()
        self.chunk_size_feed_forward = config.chunk_size_feed_forward
        self.layer_idx, self.is_causal = layer_idx, config.is_decoder
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
        x = run(self.attention, x, state, ("attention_mask",))
        if state.cross is not None:
            across = "attention_mask", "encoder_hidden_states", "encoder_attention_mask"
            x = run(self.crossattention, x, state.crossing(), across)
        if not (plain(self.intermediate) and plain(self.output)):
            return self.feed_forward(x, state.layout)
        feed_forward = partial(self.feed_forward, layout=state.layout)
        if size := self.chunk_size_feed_forward * state.layout.batch:
            # The reference cuts the sequence into chunks; rows do as well, since each is treated alone.
            return torch.cat([feed_forward(chunk) for chunk in x.split(size)])
        return self.ops.in_chunks(feed_forward, x)

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
        self.checkpoint_every = 1

    def rows(self, x: Tensor, state: Pass) -> Tensor:
        every, positional = replace(state, rows=None), ("attention_mask", "encoder_hidden_states")
        for i, layer in enumerate(self.layer):
            wanted, x = state if i == len(self.layer) - 1 else every, state.kept(x)
            if self.checkpointing is not None and self.training and i % self.checkpoint_every == 0:
                x = checkpoint(run_again, layer, x, wanted, positional, **self.checkpointing)
            else:
                x = run(layer, x, wanted, positional)
        return x if len(self.layer) or state.rows is None else x[state.rows]

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


class XLMRobertaModel(XLMRobertaPreTrainedModel):
    """The encoder (or, with config.is_decoder, decoder) without a task head; arguments as in the reference."""

    def __init__(
        self,
        config: XLMRobertaConfig,
        add_pooling_layer: bool = True,
        *,
        ops: Ops | None = None,
        backend: str = "auto",
        unpad: bool = True,
    ) -> None:
        super().__init__(config, ops=ops, backend=backend, unpad=unpad)
        with values_follow():
            self.embeddings = XLMRobertaEmbeddings(config)
            self.encoder = XLMRobertaEncoder(config)
            self.pooler: Any = XLMRobertaPooler(config) if add_pooling_layer else None
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
        """Ids [B, S] (or `inputs_embeds` [B, S, N]) → BaseModelOutput. Tokens whose attention_mask is 0 give zeros.

        attention_mask: [B, S], or one of those that varlen.plan takes. token_type_ids, position_ids: integers [B, S],
        by default 0, and counted from config.position_offset on. encoder_hidden_states [B, K, N] and their mask are for
        cross attention, past_key_values and use_cache for decoding, of a decoder. TypeError, ValueError and IndexError
        for what does not fit: see xlmr.inputs.
        """
        inputs = Arguments(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_attentions,
            output_hidden_states, encoder_hidden_states, encoder_attention_mask, past_key_values, use_cache,
        )  # fmt: skip
        encoded = self.encode(inputs, reads_first=self.pooler is not None)
        pooled = None if self.pooler is None else self.pool(encoded)
        states = encoded.fields["hidden_states"]
        hidden = states[-1] if states else encoded.layout.pad(encoded.x)
        output = BaseModelOutput(hidden, pooled, **encoded.fields)
        return self.returned(output, return_dict)

    @property
    def tables(self) -> Tables:
        """What the inputs are checked against and numbered by."""
        return Tables.of(self.embeddings, self.config)

    def pool(self, encoded: Encoded) -> Tensor:
        """The pooler's vectors, [B, N]."""
        if plain(self.pooler):
            return self.pooler.rows(encoded.first_rows())
        return self.pooler(encoded.layout.pad(encoded.x))

    def encode(
        self,
        inputs: Arguments,
        *,
        wanted: Callable[[Layout], Tensor] | None = None,
        every_position: bool = False,
        reads_first: bool = False,
        labels: Tensor | None = None,
    ) -> Encoded:
        """The forward pass up to the last layer's rows; varlen.plan says what the last three arguments mean. `wanted`
        gives the rows (sorted int64 [R]) that the caller reads of the last layer: where nobody sees the others, they
        are not computed there."""
        if getattr(self.encoder, "checkpointing", None) is not None and self.training:
            inputs = inputs.without_cache()
        given = Inputs(self.config, self.tables, inputs)
        collected = given.collected()
        with COLLECTED.set(collected):
            ours = all(untouched(block) for block in (self.embeddings, self.encoder, self.pooler) if block is not None)
            whole = every_position or EVERY_POSITION.get() or not (self.unpad and ours)
            self.hand_to_new_layers()
            state = given.begin(every_position=whole, reads_first=reads_first, labels=labels)
            picks = ours and not state.causal and collected.nothing and state.layout.dense is None
            if picks and wanted is not None:
                state.rows, state.one_each = wanted(state.layout), wanted is Layout.first_rows
            x = state.kept(run(self.encoder, self.embed(given, state.layout), state))
        fields = collected.fields() | {"past_key_values": given.cache if given.use_cache else None}
        return Encoded(x, state.layout, fields, picked=state.rows is not None)

    def embed(self, given: Inputs, layout: Layout) -> Tensor:
        """The embeddings of the rows that are computed, [T, N]."""
        if untouched(self.embeddings):
            ids, types, positions, embeds = (None if t is None else layout.unpad(t) for t in given.to_embed.values())
            return self.embeddings.rows(ids, types, positions, embeds)
        return self.embeddings(**given.as_given).flatten(0, 1)

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
        the last layer are computed → [R, N]. Never synchronises with the device, but where somebody replaced or hooked
        a block: then all are called padded, as in `forward`.
        """
        tables = self.tables
        check_packed(tables, input_ids, cu_seqlens, max_seqlen, rows)
        sequences = Sequences.packed(cu_seqlens, max_seqlen).known_to_fit(input_ids.numel(), input_ids.numel())
        layout = Layout(cu_seqlens.numel() - 1, max_seqlen, sequences)
        if not (plain(self) and untouched(self.embeddings) and untouched(self.encoder)):
            seqlen = max(max_seqlen, 1)
            layout = replace(layout, seqlen=seqlen, indices=padded_places(cu_seqlens, seqlen, input_ids.numel()))
            given = input_ids, torch.ones_like(input_ids), token_type_ids, position_ids
            x = layout.unpad(self(*(None if t is None else layout.pad(t) for t in given))[0])
            return x if rows is None else x[rows]
        self.hand_to_new_layers()
        if position_ids is None:
            position_ids = packed_positions(input_ids, cu_seqlens, tables.offset - 1)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        x = self.embeddings.rows(input_ids, token_type_ids, position_ids)
        causal = self.config.is_decoder
        x = self.encoder.rows(x, Pass(layout, causal, rows=None if causal else rows))
        return x[rows] if causal and rows is not None else x

    def hand_to_new_layers(self) -> None:
        """Gives the ops to layers that were put into the encoder after the model was built."""
        if any(isinstance(layer, Block) and layer.ops is not self.ops for layer in getattr(self.encoder, "layer", ())):
            self._hand_down(self._ops, self._why)
