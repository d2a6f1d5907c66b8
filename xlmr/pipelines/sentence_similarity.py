"""sentence-similarity: the cosines between a sentence and others."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from os import PathLike
from typing import Any

from ..encoder import Encoder, load
from ..files import own_keywords
from ..model import XLMRobertaModel
from .base import LONG_LIST, Pipeline


class SentenceSimilarityPipeline(Pipeline):
    """The cosines between a sentence and others, as the hub's inference service gives them."""

    task = "sentence-similarity"
    model_class = XLMRobertaModel
    takes = "{'source_sentence': …, 'sentences': […]}"

    def __init__(self, model: Any, tokenizer: Any = None, **options: Any) -> None:
        if isinstance(model, XLMRobertaModel):
            model = Encoder(model, tokenizer)
        elif isinstance(model, Encoder) and tokenizer is not None:  # instead of its own
            model = Encoder(model.model, tokenizer, model.recipe, model.heads)
        if not isinstance(model, Encoder):
            raise TypeError(f"{self.task} needs an Encoder, as xlmr.load gives it; this is a {type(model).__name__}")
        if not model.recipe.pooling:
            raise ValueError(f"{self.task} needs a model that gives vectors, this is a cross-encoder: use xlmr rerank")
        self.encoder = model
        super().__init__(model.model, model.tokenizer, **options)

    @classmethod
    def from_checkpoint(cls, where: str | PathLike[str], hub: dict[str, Any], **keywords: Any) -> Encoder:
        return load(where, **hub, **own_keywords(keywords))

    def _read(self, one: Any) -> tuple[str, list[str]] | None:
        if not isinstance(one, Mapping) or one.keys() != {"source_sentence", "sentences"}:
            return None
        source, others = one["source_sentence"], one["sentences"]
        strings = isinstance(others, list | tuple) and all(isinstance(text, str) for text in (source, *others))
        return (source, list(others)) if strings else None

    def answers(self, texts: list[tuple[str, list[str]]], batch_tokens: int | None = None) -> list[Any]:
        """For each source and its sentences the list of their cosines. batch_tokens: tokens computed at once."""
        flat = [text for source, others in texts for text in (source, *others)]
        show = len(flat) >= LONG_LIST and sys.stderr is not None and sys.stderr.isatty()
        vectors = self.encoder.encode(
            flat, normalize=True, output="torch", batch_tokens=batch_tokens, show_progress_bar=show
        )
        own = vectors.split([1 + len(others) for _, others in texts])
        return [(rows[1:] @ rows[0]).tolist() for rows in own]
