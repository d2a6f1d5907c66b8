"""How XLMRobertaForCausalLM.generate chooses words: its settings, what they do to scores, and two searches.

Names, defaults and results are those of transformers' GenerationConfig, logits processors and beam search. top_p is the
nucleus of Holtzman et al., 2020; no_repeat_ngram_size is from Paulus et al., 2017.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

NO_SCORE = -1e9  # below what any beam's words add up to; the reference's, which adds it once for each reason
# What a GenerationConfig tells besides, which decides nothing here …
WITHOUT_EFFECT = {"_from_model_config", "bos_token_id", "decoder_start_token_id", "synced_gpus", "transformers_version"}
# … and what transformers offers besides: allowed as the value that changes nothing, or None.
NEUTRAL = {
    "num_beam_groups": 1, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "diversity_penalty": 0.0,
    "encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0, "output_attentions": False,
    "output_hidden_states": False, "renormalize_logits": False, "remove_invalid_values": False, "guidance_scale": 1.0,
}  # fmt: skip


@dataclass
class Settings:
    """Of generate, by keyword or in a generation_config; documented there."""

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int = 0
    min_length: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    num_beams: int = 1
    num_return_sequences: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    eos_token_id: Any = None
    pad_token_id: int | None = None
    use_cache: bool = True
    return_dict_in_generate: bool = False
    output_scores: bool = False
    output_logits: bool = False

    @classmethod
    def of(cls, *sources: Any) -> "Settings":
        """From mappings and GenerationConfigs, the later before the earlier; None tells nothing. TypeError for what is
        not offered, ValueError for what makes no sense."""
        given: dict[str, Any] = {}
        for source in sources:
            told = source.to_diff_dict() if hasattr(source, "to_diff_dict") else dict(source or {})
            given |= {name: value for name, value in told.items() if value is not None and name not in WITHOUT_EFFECT}
        for name in given.keys() - {own.name for own in fields(cls)}:
            if name not in NEUTRAL:
                raise TypeError(f"generate() got an unexpected keyword argument {name!r}")
            if given[name] != NEUTRAL[name]:
                raise TypeError(f"{name} is {given[name]!r}: only {NEUTRAL[name]!r} is offered")
        settings = cls(**{name: value for name, value in given.items() if name not in NEUTRAL})
        settings.check()
        return settings

    def check(self) -> None:
        """ValueError for values that make no sense."""
        allowed = {
            "temperature": self.temperature > 0,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "min_p": 0 <= self.min_p <= 1,
            "repetition_penalty": self.repetition_penalty > 0,
            "num_beams": self.num_beams >= 1,
            "num_return_sequences": 1 <= self.num_return_sequences <= (math.inf if self.do_sample else self.num_beams),
            "early_stopping": self.early_stopping in (False, True, "never"),
            "do_sample with beams": not (self.do_sample and self.num_beams > 1),
        }
        if wrong := [name for name, fits in allowed.items() if not fits]:
            given = ", ".join(f"{name} {getattr(self, name, True)}" for name in wrong)
            raise ValueError(
                f"{given}: allowed are temperature and repetition_penalty > 0, top_k ≥ 0, top_p in (0, 1], min_p in "
                "[0, 1], early_stopping False, True or 'never', beams without do_sample, and no more "
                "num_return_sequences than num_beams, or any number with do_sample"
            )


@dataclass
class Words:
    """The words that follow. `real` [B, S]: where the prompt's mask is not 0; `ends` [E]: those that end a text;
    `processors`: the caller's own, (ids, scores) → scores. `logits`, `scores`: of each step, where they are asked for.
    """

    settings: Settings
    real: Tensor
    ends: Tensor
    processors: Iterable[Callable[[Tensor, Tensor], Tensor]] = ()
    logits: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)

    def keep(self, logits: Tensor, scores: Tensor) -> None:
        """Those of a step, for the caller of generate."""
        if self.settings.output_logits:
            self.logits.append(logits)
        if self.settings.output_scores:
            self.scores.append(scores)

    def choose(self, ids: Tensor, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """The next word [B] of each text, drawn or the best."""
        scores = self.adjusted(ids, logits)
        word = scores.argmax(-1)
        if self.settings.do_sample:
            competing, words = self.cut(scores)
            drawn = torch.multinomial(competing.softmax(-1), 1, generator=generator)
            word = words.gather(-1, drawn).squeeze(-1)
            scores = torch.full_like(scores, -math.inf).scatter(-1, words, competing)
        self.keep(logits, scores)
        return word

    def adjusted(self, ids: Tensor, scores: Tensor) -> Tensor:
        """The scores [B, V] of what follows `ids` [B, S], as the settings want them."""
        settings, size, length = self.settings, scores.shape[-1], ids.shape[1]
        if settings.repetition_penalty != 1.0:
            real = torch.nn.functional.pad(self.real, (0, length - self.real.shape[1]), value=True)
            factor = torch.where(scores < 0, settings.repetition_penalty, 1 / settings.repetition_penalty)
            scores = torch.where(marked(ids, real, size), scores * factor, scores)
        n = settings.no_repeat_ngram_size
        if 0 < n <= length:
            windows = ids.unfold(1, n, 1)
            again = (windows[..., :-1] == ids[:, None, length + 1 - n :]).all(-1)
            scores = scores.masked_fill(marked(windows[..., -1], again, size), -math.inf)
        if length < max(settings.min_length, self.real.shape[1] + settings.min_new_tokens):
            scores = scores.index_fill(-1, self.ends.long(), -math.inf)
        for processor in self.processors:
            scores = processor(ids, scores)
        return scores

    def cut(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The words that compete in sampling, best first: their scores and ids, [B, K]. −inf where one is cut off."""
        settings, size = self.settings, scores.shape[-1]
        scores, words = (scores / settings.temperature).topk(min(settings.top_k or size, size))
        probabilities = scores.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # mass of the better words: the best word always stays
        least = scores[:, :1] + math.log(settings.min_p) if settings.min_p else -math.inf
        return scores.masked_fill((before >= settings.top_p) | (scores < least), -math.inf), words


def marked(words: Tensor, where: Tensor, size: int) -> Tensor:
    """[B, size], True at those of `words` [B, S] that stand `where` [B, S] says so."""
    marks = torch.zeros(len(words), size + 1, dtype=torch.bool, device=words.device)
    return marks.scatter_(1, words.long().masked_fill(~where, size), True)[:, :size]


class Search(NamedTuple):
    """What both searches need. `limit`: the longest text in tokens; `pad`: the token behind one that has ended.

    follow: the logits [N, V] of what follows texts [N, S].  stops: whether texts are to end for another reason than
    their last word.
    """

    limit: int
    pad: int
    words: Words
    follow: Callable[[Tensor], Tensor]
    stops: Callable[[Tensor], Tensor]


def one_by_one(ids: Tensor, search: Search, streamer: Any, generator: torch.Generator | None) -> Tensor:
    """Texts [B, S] with a word after the other, greedy or drawn."""
    limit, pad, words, follow, stops = search
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    if streamer is not None:
        streamer.put(ids.cpu())
    while ids.shape[1] < limit and not bool(done.all()):
        word = words.choose(ids, follow(ids), generator).masked_fill(done, pad).to(ids.dtype)
        ids = torch.cat([ids, word[:, None]], dim=1)
        done = done | torch.isin(word, words.ends) | stops(ids)
        if streamer is not None:
            streamer.put(word.cpu())
    if streamer is not None:
        streamer.end()
    return ids


@dataclass
class Beams:
    """The best texts of each prompt, [B, K, S]: those that go on and, kept from the best to the worst, those that have
    ended, with their scores and lengths."""

    running: Tensor
    running_scores: Tensor  # sums of log-probabilities
    ended: Tensor
    ended_scores: Tensor  # divided by length ** length_penalty
    lengths: Tensor
    full: Tensor  # whether an ended text stands there at all

    @classmethod
    def of(cls, ids: Tensor, beams: int, limit: int, pad: int) -> "Beams":
        """Of prompts [B·K, S]; at the start the beams of a prompt are one text, so the first alone counts."""
        running = torch.nn.functional.pad(ids, (0, limit - ids.shape[1]), value=pad).unflatten(0, (-1, beams))
        scores = torch.full(running.shape[:2], NO_SCORE, device=ids.device)
        lengths = torch.full_like(scores, ids.shape[1], dtype=torch.long)
        first = scores.index_fill(1, lengths.new_zeros(1), 0.0)
        return cls(running, first, running, scores, lengths, torch.zeros_like(scores, dtype=torch.bool))

    def go_on(self, log_probabilities: Tensor, length: int, keep: int) -> tuple[Tensor, Tensor, Tensor]:
        """The best `keep` texts of length + 1 [B, keep, S], their scores and the beams that they come from, given the
        log-probabilities [B·K, V] of what follows."""
        batch, beams = self.running_scores.shape
        scores = log_probabilities.view(batch, beams, -1) + self.running_scores[..., None]
        scores, index = scores.flatten(1).topk(keep)
        beam, word = index // log_probabilities.shape[-1], index % log_probabilities.shape[-1]
        texts = take(self.running, beam)
        texts[..., length] = word
        return texts, scores, beam


def take(tensor: Tensor, index: Tensor) -> Tensor:
    """Those of [B, K, …] that `index` [B, L] names, [B, L, …]."""
    return tensor.gather(1, index.view(*index.shape, *[1] * (tensor.dim() - 2)).expand(-1, -1, *tensor.shape[2:]))


def beam_search(ids: Tensor, search: Search, reorder: Callable[[Tensor], None] | None) -> tuple[Tensor, Tensor]:
    """The best texts of prompts [B·K, S], a row for each of num_return_sequences, and their scores; `reorder` tells a
    cache which rows [B·K] go on."""
    limit, pad, words, follow, stops = search
    told, start = words.settings, ids.shape[1]
    count, penalty = told.num_beams, told.length_penalty
    keep = max(2, 1 + len(words.ends)) * count  # so that enough are left where the best of all end
    best = Beams.of(ids, count, limit, pad)
    open_ = torch.ones(len(best.running), 1, dtype=torch.bool, device=ids.device)  # whether a better text can come
    for length in range(start, limit):
        so_far = best.running[..., :length].flatten(0, 1)
        logits = follow(so_far)
        log_probabilities = words.adjusted(so_far, logits.log_softmax(-1))
        words.keep(logits, log_probabilities)
        texts, scores, beam = best.go_on(log_probabilities, length, keep)
        new = texts[..., : length + 1]
        ends = torch.isin(new[..., -1], words.ends) | stops(new.flatten(0, 1)).view(scores.shape)
        ends |= length + 1 == limit

        going, chosen = (scores + ends * NO_SCORE).topk(count)
        if reorder is not None:
            first_rows = torch.arange(0, len(so_far), count, device=ids.device)[:, None]
            reorder((beam.gather(1, chosen) + first_rows).flatten())

        may_end = ends & (torch.arange(keep, device=ids.device) < count)
        closed = best.full.all(-1, keepdim=True) & (told.early_stopping is True)
        scores = scores / (length + 1 - start) ** penalty
        scores = scores + closed * NO_SCORE + ~open_ * NO_SCORE + ~may_end * NO_SCORE
        merged, order = torch.cat([best.ended_scores, scores], 1).topk(count)
        best = Beams(
            running=take(texts, chosen),
            running_scores=going,
            ended=take(torch.cat([best.ended, texts], 1), order),
            ended_scores=merged,
            lengths=torch.cat([best.lengths, torch.full_like(beam, length + 1)], 1).gather(1, order),
            full=torch.cat([best.full, may_end], 1).gather(1, order),
        )
        longest = limit if told.early_stopping == "never" and penalty > 0 else length + 1
        hope = going[:, :1] / (longest - start) ** penalty
        worst = torch.where(best.full, merged.min(1, keepdim=True).values, NO_SCORE)
        open_ = open_ & (hope > worst).any(-1, keepdim=True)
        if ends.all() or not open_.any() or (told.early_stopping is True and best.full.all()):
            break
    returned = told.num_return_sequences
    texts = best.ended[:, :returned].flatten(0, 1)
    return texts[:, : best.lengths[:, :returned].max()], best.ended_scores[:, :returned].flatten()
