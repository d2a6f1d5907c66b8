"""text-classification: the classes of a text, or of a pair of texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..heads import XLMRobertaForSequenceClassification
from .base import Pipeline, Text

SCORES: dict[str, Any] = {
    "sigmoid": torch.sigmoid,
    "softmax": lambda logits: logits.softmax(-1),
    "none": lambda logits: logits,
}


class TextClassificationPipeline(Pipeline):
    """The classes of a text or pair of texts, as transformers.TextClassificationPipeline gives them."""

    task = "text-classification"
    model_class = XLMRobertaForSequenceClassification
    takes = "a string, a pair (text, text) or {'text': …, 'text_pair': …}"

    def __call__(self, inputs: Any, **options: Any) -> Any:
        """As Pipeline; of one string, without `top_k` in the call, the answer in a list, as in the reference."""
        found = super().__call__(inputs, **options)
        return [found] if isinstance(inputs, str) and "top_k" not in options else found

    def _read(self, one: Any) -> Text | None:
        if isinstance(one, Mapping) and "text" in one and one.keys() <= {"text", "text_pair"}:
            one = one["text"], one.get("text_pair")
        if isinstance(one, tuple) and len(one) == 2 and isinstance(one[0], str):
            text, pair = one
            return text if pair in (None, "") else one if isinstance(pair, str) else None
        return one if isinstance(one, str) else None

    @torch.no_grad()
    def answers(
        self,
        texts: list[Text],
        top_k: Any = "best",
        function_to_apply: str | None = None,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        tokenizer_kwargs: dict[str, Any] | None = None,
        batch_size: int | None = None,
    ) -> list[Any]:
        """For each text its best {label, score}; with `top_k` a list of that many, None all of them, best first.

        function_to_apply: what makes scores of logits, "sigmoid", "softmax" or "none"; by default that of the
        configuration's problem_type, else sigmoid for one label and softmax for several. padding, truncation and
        max_length are the tokenizer's; padding changes no score.
        """
        if top_k is not None and top_k != "best" and (not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f"top_k is {top_k!r}: allowed are 1, 2, … and None, which is all labels")
        score = SCORES.get((function_to_apply or self._function()).lower())
        if score is None:
            raise ValueError(f"function_to_apply is {function_to_apply!r}: allowed are {', '.join(map(repr, SCORES))}")
        own = {"padding": padding, "truncation": truncation, "max_length": max_length, **(tokenizer_kwargs or {})}
        singles = [i for i, text in enumerate(texts) if isinstance(text, str)]
        pairs = [i for i, text in enumerate(texts) if not isinstance(text, str)]
        ids = [one.ids for kind in (singles, pairs) for one in self._encode([texts[i] for i in kind], own)]
        found = score(self._text_logits(ids, batch_size)).tolist()
        answers: list[Any] = [None] * len(texts)
        for i, scores in zip(singles + pairs, found, strict=True):
            rows = [{"label": self.model.config.id2label[j], "score": value} for j, value in enumerate(scores)]
            rows.sort(key=lambda row: -row["score"])
            answers[i] = rows[0] if top_k == "best" else rows[:top_k]
        return answers

    def _function(self) -> str:
        """The name in SCORES that the configuration asks for."""
        config = self.model.config
        if config.problem_type == "regression":
            return "none"
        several = config.problem_type == "multi_label_classification"
        return "sigmoid" if several or config.num_labels == 1 else "softmax"
