"""Decoding with XLMRobertaForCausalLM: greedy, or sampling with temperature, top-k and top-p (nucleus) cuts.

The nucleus is that of Holtzman et al., 2020.
"""

from typing import Any

import torch
from torch import Tensor

from .cache import KeyValueCache
from .inputs import check_length, check_tensors

# What transformers' generate offers besides: allowed as the value that changes nothing, or None.
NEUTRAL = {
    "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "early_stopping": False, "length_penalty": 1.0,
    "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0, "min_p": 0.0,
    "typical_p": 1.0, "output_scores": False, "output_logits": False, "output_attentions": False,
    "output_hidden_states": False, "return_dict_in_generate": False, "synced_gpus": False, "generation_config": None,
    "logits_processor": None, "stopping_criteria": None, "streamer": None,
}  # fmt: skip


@torch.no_grad()
def generate(
    self: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 50,
    top_p: float = 1.0,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
    use_cache: bool = True,
    generator: torch.Generator | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """Continues prompts [B, S] by at most `max_new_tokens` (20), or up to `max_length` tokens in all; returns prompts
    and continuations [B, S + new].

    A text that has ended (`eos_token_id`, by default the config's) is filled with `pad_token_id`. Greedy unless
    `do_sample`; then the `top_k` best tokens (0: all) compete, of these the fewest whose probabilities reach `top_p`.
    Raises ValueError where config.is_decoder is not set, or where a text would outgrow the positions, and TypeError for
    lists in place of tensors, and for what only transformers' generate offers, such as beams.
    """
    check_neutral(others)
    check_tensors(input_ids=input_ids, attention_mask=attention_mask)
    check_prompts(self.config, input_ids)
    if do_sample and not (temperature > 0 and top_k >= 0 and 0 < top_p <= 1):
        raise ValueError(f"temperature {temperature}, top_k {top_k}, top_p {top_p}: allowed are > 0, ≥ 0 and (0, 1]")
    if max_new_tokens is None:
        max_new_tokens = 20 if max_length is None else max_length - input_ids.shape[1]
    tables = self.roberta.tables
    check_length(tables, int((input_ids != tables.offset - 1).sum(1).max()) + max_new_tokens)
    eos = self.config.eos_token_id if eos_token_id is None else eos_token_id
    ends = torch.tensor([] if eos is None else eos, device=input_ids.device, dtype=input_ids.dtype).view(-1)
    pad = self.config.pad_token_id if pad_token_id is None else pad_token_id
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    cross = {"encoder_hidden_states": encoder_hidden_states, "encoder_attention_mask": encoder_attention_mask}
    cache = KeyValueCache() if use_cache else None
    done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    for _ in range(max_new_tokens):
        step = self.prepare_inputs_for_generation(input_ids, cache, mask, use_cache, **cross)
        scores = self(**step, logits_to_keep=1).logits[:, -1].float()
        token = _sample(scores, temperature, top_k, top_p, generator) if do_sample else scores.argmax(-1)
        token = token.masked_fill(done, pad)
        input_ids = torch.cat([input_ids, token[:, None].to(input_ids.dtype)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        done = done | torch.isin(token, ends)
        if bool(done.all()):
            break
    return input_ids


def check_neutral(others: dict[str, Any]) -> None:
    """Refuses what is not in NEUTRAL, or not neutral."""
    for name, value in others.items():
        if name not in NEUTRAL:
            raise TypeError(f"generate() got an unexpected keyword argument {name!r}")
        if value is not None and value != NEUTRAL[name]:
            raise TypeError(f"{name} is {value!r}: only {NEUTRAL[name]!r} is offered, greedy search or sampling")


def check_prompts(config: Any, input_ids: Tensor) -> None:
    """ValueError unless the model decodes, and the prompts are [B, S] with a token at least."""
    if not config.is_decoder:
        raise ValueError("generate needs a decoder: this model's config.is_decoder is False")
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: generate takes [batch, at least one token]")


def prepare_inputs_for_generation(
    self: Any,
    input_ids: Tensor,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    use_cache: bool | None = None,
    **model_inputs: Any,
) -> dict[str, Any]:
    """The arguments of the next forward: of `input_ids` [B, S] only the tokens that the cache does not hold yet."""
    past = past_key_values.get_seq_length() if past_key_values is not None else 0
    pad = self.roberta.tables.offset - 1
    real = (input_ids != pad).long()  # positions skip pads, with a cache as without
    positions = real.cumsum(1) * real + pad
    return {
        "input_ids": input_ids[:, past:],
        "position_ids": positions[:, past:],
        "attention_mask": attention_mask,
        "past_key_values": past_key_values,
        "use_cache": use_cache,
        **model_inputs,
    }


def _sample(scores: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None) -> Tensor:
    """One token for each row of scores [B, V]."""
    scores, tokens = (scores / temperature).topk(min(top_k or scores.shape[-1], scores.shape[-1]))
    probabilities = scores.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # mass of the better tokens: the best one always stays
    probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    return tokens.gather(-1, torch.multinomial(probabilities, 1, generator=generator)).squeeze(-1)
