"""Decoding with XLMRobertaForCausalLM: greedy search, sampling and beam search; decoding.py chooses the words."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad as padded

from .cache import KeyValueCache
from .decoding import Search, Settings, Words, beam_search, one_by_one
from .inputs import check_length, check_tensors
from .outputs import GenerateOutput


@torch.no_grad()
def generate(
    self: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    generation_config: Any = None,
    logits_processor: Iterable[Callable[[Tensor, Tensor], Tensor]] | None = None,
    stopping_criteria: Iterable[Callable[..., Any]] | None = None,
    streamer: Any = None,
    generator: torch.Generator | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    **settings: Any,
) -> Tensor | GenerateOutput:
    """Continues prompts [B, S] by at most `max_new_tokens` (20), or up to `max_length` tokens in all; returns prompts
    and continuations [B, S + new], `num_return_sequences` for each prompt.

    settings, also in a generation_config (transformers' GenerationConfig, or a dict), and last in the checkpoint's:
        eos_token_id, pad_token_id: a text that has ended by one of the former (an int or several; by default the
            config's) is filled with the latter. None ends before min_length tokens, or min_new_tokens new ones.
        do_sample: draw words by `generator`. The `top_k` (50) best compete (0: all), of these the fewest whose
            probabilities reach `top_p`, and that have `min_p` of the best word's, at `temperature`.
        num_beams: search for the most probable text instead, among that many at once, the sums of log-probabilities
            divided by length ** `length_penalty`. early_stopping: True ends it at num_beams ended texts, False where
            better ones are unlikely, "never" where none can come.
        repetition_penalty: divides positive scores of words that are there already, multiplies negative ones;
            no_repeat_ngram_size: so many words in a row come once only.
        use_cache: False computes every text anew at each step.
        return_dict_in_generate: a GenerateOutput, with output_scores or output_logits those of each step.
    logits_processor: functions (ids, scores [B, V]) → scores.  stopping_criteria: functions (ids, None) → bool, or
    bools [B].  streamer: its put() is given the prompt, then each token [B], and end() is called.

    Raises ValueError where config.is_decoder is not set, or where a text would outgrow the positions, and TypeError for
    lists in place of tensors, and for what only transformers' generate offers, such as sampling from beams.
    """
    told = Settings.of(self.generation_config, generation_config, settings)
    check_tensors(input_ids=input_ids, attention_mask=attention_mask)
    config, tables = self.config, self.roberta.tables
    check_prompts(config, input_ids)
    if streamer is not None and told.num_beams > 1:
        raise ValueError("a streamer is told words one by one: beams change them later, use num_beams=1")
    new = told.max_new_tokens
    if new is None:
        new = 20 if told.max_length is None else told.max_length - input_ids.shape[1]
    check_length(tables, int((input_ids != tables.offset - 1).sum(1).max()) + new)
    eos = config.eos_token_id if told.eos_token_id is None else told.eos_token_id
    ends = torch.as_tensor([] if eos is None else eos, device=input_ids.device, dtype=input_ids.dtype).view(-1)
    pad = config.pad_token_id if told.pad_token_id is None else told.pad_token_id

    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    cross = {"encoder_hidden_states": encoder_hidden_states, "encoder_attention_mask": encoder_attention_mask}
    rows = max(told.num_beams, told.num_return_sequences)
    ids, mask = (t.repeat_interleave(rows, 0) for t in (input_ids, mask))
    cross = {name: None if t is None else t.repeat_interleave(rows, 0) for name, t in cross.items()}
    cache = KeyValueCache() if told.use_cache else None
    words = Words(told, mask != 0, ends, logits_processor or ())

    def follow(texts: Tensor) -> Tensor:
        whole = padded(mask, (0, texts.shape[1] - mask.shape[1]), value=1)
        step = self.prepare_inputs_for_generation(texts, cache, whole, told.use_cache, **cross)
        return self(**step, logits_to_keep=1).logits[:, -1].float()

    def stops(texts: Tensor) -> Tensor:
        found = torch.zeros(len(texts), dtype=torch.bool, device=texts.device)
        for criterion in stopping_criteria or ():
            found = found | torch.as_tensor(criterion(texts, None), device=texts.device)
        return found

    search = Search(input_ids.shape[1] + new, pad, words, follow, stops)
    if told.num_beams > 1:
        sequences, sequences_scores = beam_search(ids, search, None if cache is None else cache.reorder_cache)
    else:
        sequences, sequences_scores = one_by_one(ids, search, streamer, generator), None
    if not told.return_dict_in_generate:
        return sequences
    scores, logits = (tuple(kept) if kept else None for kept in (words.scores, words.logits))
    return GenerateOutput(sequences, sequences_scores if told.output_scores else None, scores, logits, cache)


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
