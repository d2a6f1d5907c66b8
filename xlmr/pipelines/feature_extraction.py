"""feature-extraction: the last layer of every token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import heads
from ..config import XLMRobertaConfig
from ..encode import Packed
from ..model import XLMRobertaModel
from ..pretrained import XLMRobertaPreTrainedModel
from .base import Pipeline


class FeatureExtractionPipeline(Pipeline):
    """The last layer of every token, as transformers.FeatureExtractionPipeline gives it."""

    task = "feature-extraction"
    model_class = XLMRobertaModel

    @classmethod
    def saved_class(cls, config: XLMRobertaConfig) -> type[XLMRobertaPreTrainedModel]:
        """The class that wrote the checkpoint, so that no weight is missing or left over; its base model is used. That
        alone is loaded where the head computes something else than ours."""
        names = [config.kind.ours(name) for name in config.architectures or ()]
        named = (vars(heads).get(name) for name in names if name)
        return next((c for c in named if isinstance(c, type) and issubclass(c, heads.XLMRobertaHead)), cls.model_class)

    @torch.no_grad()
    def answers(
        self,
        texts: list[str],
        truncation: bool | str | None = None,
        tokenize_kwargs: dict[str, Any] | None = None,
        return_tensors: bool = False,
        batch_size: int | None = None,
    ) -> list[Any]:
        """For each text a nested list (1, L, N), or with `return_tensors` a tensor [1, L, N] on the CPU.

        Positions that `tokenize_kwargs` pads are zeros; each text is padded by itself. batch_size: the most texts run
        at once.
        """
        tokenize_kwargs = dict(tokenize_kwargs or {})
        if truncation is not None:
            if "truncation" in tokenize_kwargs:
                raise ValueError("truncation is given twice, as an option and in tokenize_kwargs: give it once")
            tokenize_kwargs["truncation"] = truncation
        alone = tokenize_kwargs.get("padding") in (True, "longest")  # the reference: to its own length
        parts = [[text] for text in texts] if alone else [texts]
        encoded = [one for part in parts for one in self._encode(part, tokenize_kwargs)]
        answers: list[Any] = [None] * len(texts)
        for i, rows in self._token_rows([one.ids for one in encoded], self._last_layer, batch_size):
            features = rows.new_zeros(1, encoded[i].length, rows.shape[1])
            features[0, encoded[i].kept] = rows
            answers[i] = features if return_tensors else features.tolist()
        return answers

    def _last_layer(self, packed: Packed) -> Tensor:
        return self.model.base_model.forward_packed(*packed)
