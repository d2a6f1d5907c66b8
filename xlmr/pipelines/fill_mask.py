"""fill-mask: the most probable words where a word is missing."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..arguments import integer
from ..encode import Packed
from ..heads import XLMRobertaForMaskedLM
from .base import Pipeline

logger = logging.getLogger(__name__)


class FillMaskPipeline(Pipeline):
    """The most probable tokens at each mask, as transformers.FillMaskPipeline gives them."""

    task = "fill-mask"
    model_class = XLMRobertaForMaskedLM

    def __call__(self, inputs: str | Sequence[str], **options: Any) -> Any:
        """The answer for a string, the list of answers for a list of strings; of one string, its one answer, as in the
        reference. See `answers` for the options, Pipeline for the errors."""
        found = super().__call__(inputs, **options)
        return found[0] if isinstance(inputs, list | tuple) and len(inputs) == 1 else found

    @torch.no_grad()
    def answers(
        self,
        texts: list[str],
        top_k: int | None = None,
        targets: str | Sequence[str] | None = None,
        tokenizer_kwargs: dict[str, Any] | None = None,
        batch_size: int | None = None,
    ) -> list[Any]:
        """For each text `[{score, token, token_str, sequence}]`, best first; a list of such lists for several masks.

        top_k: how many, by default 5. targets: only these words compete, one of several tokens through its first.
        score: the probability among the whole vocabulary, from a softmax in fp32 or more. batch_size: the most texts
        run at once.
        """
        vocab_size = self.model.config.vocab_size
        top_k = 5 if top_k is None else top_k
        if not 1 <= integer("top_k", top_k) <= vocab_size:
            raise ValueError(f"top_k is {top_k}: allowed are 1 to {vocab_size}, the vocabulary's size")
        words = None if targets is None else self._words([targets] if isinstance(targets, str) else targets)
        k = top_k if words is None else min(top_k, len(words))
        ids = [one.ids for one in self._encode(texts, tokenizer_kwargs)]
        masks = [self._masks(text, own) for text, own in zip(texts, ids, strict=True)]
        answers: list[Any] = [None] * len(texts)
        for batch, packed in self._batches(ids, batch_size):
            best = self._best(packed, [(ids[i], masks[i]) for i in batch], k, words)
            for i in batch:
                rows = [self._row(ids[i], mask, next(best), readable=len(masks[i]) == 1) for mask in masks[i]]
                answers[i] = rows[0] if len(rows) == 1 else rows
        return answers

    def _masks(self, text: str, ids: list[int]) -> list[int]:
        """Where the masks stand among the text's ids; ValueError if nowhere."""
        masks = [i for i, token in enumerate(ids) if token == self.tokenizer.mask_token_id]
        if not masks:
            raise ValueError(
                f"the text {text[:80]!r} has no {self.tokenizer.mask_token}: put one where a word is missing"
            )
        return masks

    def _best(
        self, packed: Packed, sequences: list[tuple[list[int], list[int]]], k: int, words: Tensor | None
    ) -> Iterator[list[tuple[float, int]]]:
        """For every mask of the packed sequences (ids, masks), in their order, its k best (score, token)."""
        starts = accumulate((len(ids) for ids, _ in sequences), initial=0)
        rows = [start + mask for start, (_, masks) in zip(starts, sequences, strict=False) for mask in masks]
        where = torch.tensor(rows, device=self.device)
        scores, tokens = self.model.topk_packed(*packed, rows=where, k=k, targets=words)
        columns = zip(scores.exp().tolist(), tokens.tolist(), strict=True)
        return (list(zip(*both, strict=True)) for both in columns)

    def _row(self, ids: list[int], mask: int, best: list[tuple[float, int]], readable: bool) -> list[dict[str, Any]]:
        """The answers for one mask of a text. Where there are others, `sequence` shows them: special tokens stay."""
        row = []
        for score, token in best:
            filled = [*ids[:mask], token, *ids[mask + 1 :]]
            filled = [token for token in filled if token != self.tokenizer.pad_token_id]
            sequence = self.tokenizer.decode(filled, skip_special_tokens=readable)
            row.append(
                {"score": score, "token": token, "token_str": self.tokenizer.decode([token]), "sequence": sequence}
            )
        return row

    def _words(self, targets: Sequence[str]) -> Tensor:
        """The ids of the target words, each once."""
        vocabulary = self.tokenizer.get_vocab()
        words = set()
        for target in targets:
            if target in vocabulary:
                words.add(vocabulary[target])
                continue
            pieces = self.tokenizer(target, add_special_tokens=False)["input_ids"]
            if not pieces:
                logger.warning("the target %r has no token: it is left out", target)
                continue
            first = self.tokenizer.convert_ids_to_tokens(pieces[0])
            logger.warning(
                "the target %r is no token of the vocabulary: its first one, %r, stands for it", target, first
            )
            words.add(pieces[0])
        if not words:
            raise ValueError("targets names no word: give at least one, or None for the whole vocabulary")
        return torch.tensor(sorted(words), device=self.device)
