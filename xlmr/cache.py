"""Keys and values of past tokens, for decoding one token at a time with XLMRobertaForCausalLM."""

from typing import Any

from torch import Tensor, cat


class KeyValueCache:
    """Keys and values of every layer, each [B, H, past, D]; the methods are those of transformers' DynamicCache."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Appends `key` and `value` [B, H, new, D] to layer `layer_idx`; returns all of them, [B, H, past + new, D]."""
        if layer_idx in self.layers:
            past_key, past_value = self.layers[layer_idx]
            key, value = cat([past_key, key], dim=2), cat([past_value, value], dim=2)
        self.layers[layer_idx] = key, value
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens layer `layer_idx` remembers."""
        return self.layers[layer_idx][0].shape[2] if layer_idx in self.layers else 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keeps the rows `beam_idx` [B'] of the batch, in that order."""
        for i, (key, value) in self.layers.items():
            self.layers[i] = key[beam_idx.to(key.device)], value[beam_idx.to(value.device)]

    def __len__(self) -> int:
        return len(self.layers)


def extended(k: Tensor, v: Tensor, cache: Any, layer_idx: int, batch: int) -> tuple[Tensor, Tensor]:
    """Adds a layer's keys and values [B·S, H, D] to a cache, ours or one of transformers'; returns all that it holds of
    the layer, [B·(past + S), H, D]."""
    k, v = (t.unflatten(0, (batch, -1)).transpose(1, 2) for t in (k, v))
    k, v = getattr(cache, "self_attention_cache", cache).update(k, v, layer_idx)
    return k.transpose(1, 2).flatten(0, 1), v.transpose(1, 2).flatten(0, 1)
