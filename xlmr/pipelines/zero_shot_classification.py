"""zero-shot-classification: which of any labels fit a text, by a model of entailment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..heads import XLMRobertaForSequenceClassification
from .base import Pipeline, Text


class ZeroShotClassificationPipeline(Pipeline):
    """Which of any labels fit a text, by a model of entailment, as transformers.ZeroShotClassificationPipeline."""

    task = "zero-shot-classification"
    model_class = XLMRobertaForSequenceClassification

    def __call__(
        self,
        inputs: Any = None,
        candidate_labels: str | Sequence[str] | None = None,
        *,
        sequences: Any = None,
        **options: Any,
    ) -> Any:
        """As Pipeline; `sequences` is the reference's name of `inputs`. `candidate_labels` may be given here, or when
        the pipeline is made."""
        if candidate_labels is not None:
            options["candidate_labels"] = candidate_labels
        return super().__call__(sequences if inputs is None else inputs, **options)

    @torch.no_grad()
    def answers(
        self,
        texts: list[str],
        candidate_labels: str | Sequence[str] = (),
        hypothesis_template: str = "This example is {}.",
        multi_label: bool = False,
        batch_size: int | None = None,
    ) -> list[Any]:
        """For each text {sequence, labels, scores}, best first.

        candidate_labels: a list, or a string with commas. hypothesis_template: the label goes to its {}.
        multi_label: each label is judged by itself, entailed or contradicted (as a single one always is); else the
        scores sum to one. A text is truncated to what fits beside the hypothesis.
        """
        labels = _labels(candidate_labels)
        if "" in texts:
            raise ValueError("a text is empty: zero-shot-classification needs something to judge")
        hypotheses = _hypotheses(hypothesis_template, labels)
        pairs: list[Text] = [(text, hypothesis) for text in texts for hypothesis in hypotheses]
        encoded = self._encode(pairs, {"truncation": "only_first", "max_length": self._longest})
        logits = self._text_logits([one.ids for one in encoded], batch_size).unflatten(0, (len(texts), len(labels)))
        scores, order = self._scores(logits, multi_label or len(labels) == 1).sort(descending=True)
        return [
            {"sequence": text, "labels": [labels[i] for i in places], "scores": best}
            for text, places, best in zip(texts, order.tolist(), scores.tolist(), strict=True)
        ]

    def _scores(self, logits: Tensor, each_by_itself: bool) -> Tensor:
        """Logits [texts, labels, classes] → [texts, labels]: against a label's contradiction, or the other labels."""
        entails = self._entailment()
        if each_by_itself:
            contradicts = -1 if entails == 0 else 0
            return logits[..., [contradicts, entails]].softmax(-1)[..., 1]
        return logits[..., entails].softmax(-1)

    def _entailment(self) -> int:
        """The class that says yes."""
        labels = self.model.config.id2label
        found = [i for i, label in labels.items() if label.lower().startswith("entail")]
        if not found:
            raise ValueError(
                f"no label begins with 'entail' among {', '.join(labels.values())}: zero-shot-classification needs a "
                "model of entailment (NLI); if it is one, name its labels in config.id2label"
            )
        return found[0]


def _hypotheses(template: str, labels: list[str]) -> list[str]:
    """The sentences that say that a label fits; ValueError for a template that takes none."""
    try:
        found = [template.format(label) for label in labels]
    except (LookupError, ValueError, AttributeError):  # {label}, a lone brace, {.x}
        found = [template]
    if found[0] == template:
        raise ValueError(f"hypothesis_template is {template!r}: it needs a {{}} where the label goes, no other brace")
    return found


def _labels(given: str | Sequence[str]) -> list[str]:
    """The labels in a list, or between the commas of a string; ValueError if there is none."""
    labels = [label.strip() for label in given.split(",")] if isinstance(given, str) else list(given)
    labels = [label for label in labels if label]
    if not labels or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"candidate_labels is {given!r:.80}: at least one label, a string, is needed")
    return labels
