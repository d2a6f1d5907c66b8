"""The embeddings of the module tree: words, positions and token types, summed and normalised."""

from typing import Any

import torch
from torch import Tensor, nn

from .block import Block, plain, plain_embedding, plain_norm, rate
from .config import XLMRobertaConfig
from .inputs import Tables, positions_and_types


class XLMRobertaEmbeddings(Block):
    def __init__(self, config: XLMRobertaConfig):
        super().__init__()
        self.config, self.padding_idx = config, config.pad_token_id
        self.require_grads = False  # enable_input_require_grads: for adapters in a frozen model
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=self.padding_idx)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.position_offset = config.position_offset
        self.position_padding_idx = self.position_offset - 1 if self.position_offset else None
        self.position_embeddings = nn.Embedding(
            config.max_position_embeddings, config.hidden_size, padding_idx=self.position_padding_idx
        )

    def leaves_plain(self) -> bool:
        tables = self.word_embeddings, self.token_type_embeddings, self.position_embeddings
        pads = [table.padding_idx for table in tables if isinstance(table, nn.Embedding)]
        ours = all(map(plain_embedding, tables)) and pads == [self.padding_idx, None, self.position_padding_idx]
        return ours and plain_norm(self.LayerNorm) and plain(self.dropout, nn.Dropout)

    def rows(self, input_ids: Tensor | None, types: Any, positions: Any, embeds: Tensor | None = None) -> Tensor:
        """Ids [T], or in their stead word vectors `embeds` [T, N], with token types and positions [T] → [T, N]."""
        word, token_type, position = self.word_embeddings, self.token_type_embeddings, self.position_embeddings
        if embeds is not None:
            x = self.add_layer_norm(self.LayerNorm, None, embeds + token_type(types), position(positions))
            return self.dropout(x)
        tables = word.weight, token_type.weight, position.weight, self.LayerNorm.weight, self.LayerNorm.bias
        settings = self.LayerNorm.eps, self.padding_idx, rate(self.dropout), self.position_padding_idx is not None
        x = self.ops.embed(input_ids, types, positions, *tables, *settings)
        return x.requires_grad_(True) if self.require_grads and torch.is_grad_enabled() else x

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values_length: int = 0,
    ) -> Tensor:
        """Ids [B, S] or vectors [B, S, N] → [B, S, N]; each leaf that is not plain is called on [B, S]."""
        tables = Tables.of(self, self.config)
        positions, types = positions_and_types(
            tables, input_ids, inputs_embeds, token_type_ids, position_ids, past_key_values_length
        )
        if self.leaves_plain():
            ids, embeds = (None if t is None else t.flatten(0, 1) for t in (input_ids, inputs_embeds))
            return self.rows(ids, types.flatten(), positions.flatten(), embeds).unflatten(0, positions.shape)
        x = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        x = x + self.token_type_embeddings(types) + self.position_embeddings(positions)
        return self.dropout(self.LayerNorm(x))
