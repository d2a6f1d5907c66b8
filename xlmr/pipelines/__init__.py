"""Text in, answers out: `pipeline(task, model)` gives a callable that returns what transformers' pipeline does.

A task has a file of its own here; base.py is what they share.
"""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch

from ..checkpoint import place_on
from ..demo import CHECKPOINT
from ..encode import choose_device
from ..encoder import Encoder
from ..pretrained import XLMRobertaPreTrainedModel
from ..tokenizer import XLMRobertaTokenizer
from .base import Pipeline
from .feature_extraction import FeatureExtractionPipeline
from .fill_mask import FillMaskPipeline
from .question_answering import QuestionAnsweringPipeline
from .sentence_similarity import SentenceSimilarityPipeline
from .text_classification import TextClassificationPipeline
from .token_classification import TokenClassificationPipeline
from .zero_shot_classification import ZeroShotClassificationPipeline

PIPELINES: dict[str, type[Pipeline]] = {
    cls.task: cls
    for cls in (
        FillMaskPipeline,
        FeatureExtractionPipeline,
        TextClassificationPipeline,
        TokenClassificationPipeline,
        QuestionAnsweringPipeline,
        ZeroShotClassificationPipeline,
        SentenceSimilarityPipeline,
    )
}
ALIASES = {"ner": "token-classification", "sentiment-analysis": "text-classification"}


def pipeline(
    task: str,
    model: str | PathLike[str] | XLMRobertaPreTrainedModel | Encoder | None = None,
    tokenizer: str | PathLike[str] | XLMRobertaTokenizer | None = None,
    *,
    device: int | str | torch.device | None = None,
    device_map: Any = None,
    dtype: str | torch.dtype = "auto",
    torch_dtype: str | torch.dtype | None = None,
    model_kwargs: dict[str, Any] | None = None,
    backend: str = "auto",
    revision: str | None = None,
    token: str | bool | None = None,
    **options: Any,
) -> Pipeline:
    """A callable that takes texts, and returns what transformers' pipeline of the same task does.

    Args:
        task: one of PIPELINES, or "ner" or "sentiment-analysis".
        model: a checkpoint directory, a hub name or a model (for sentence-similarity an Encoder, too); None is the
            embedded demo model.
        tokenizer: by default the one beside the model's weights.
        device: by default a GPU where there is one, but a model that is given stays where it is; a number is that of a
            GPU, -1 the CPU.
        backend: as in `xlmr.load`.
        device_map, dtype, torch_dtype, revision, token: as in from_pretrained; model_kwargs: more of its keywords.
        options: defaults for the options of a call, which `answers` of the task's class documents.

    Raises ValueError or TypeError for an unknown task, option or kind of model, OSError for a checkpoint that cannot be
    read.
    """
    task = ALIASES.get(task, task)
    if task not in PIPELINES:
        raise ValueError(f"{task!r} is no task: allowed are {', '.join(map(repr, [*PIPELINES, *ALIASES]))}")
    cls = PIPELINES[task]
    path = dict(model_kwargs or {})
    where = ("cache_dir", "local_files_only", "subfolder")  # of the tokenizer too
    hub = {"revision": revision, "token": token, **{name: path.pop(name) for name in where if name in path}}
    device = device if device_map is None else place_on(device, device_map)
    source: Any = CHECKPOINT if model is None else model
    if isinstance(source, (str, PathLike)):
        path = {"dtype": dtype if torch_dtype is None else torch_dtype, "backend": backend, **path}
        beside, source = source, cls.from_checkpoint(source, hub, device=choose_device(device), **path)
        if tokenizer is None and not isinstance(source, Encoder):  # which has its own
            tokenizer = beside
    elif isinstance(source, torch.nn.Module):
        source = source if device is None else source.to(choose_device(device))
        if tokenizer is None:
            raise ValueError("a model was given without its tokenizer: pass tokenizer=, a tokenizer or its directory")
    if isinstance(tokenizer, (str, PathLike)):
        tokenizer = XLMRobertaTokenizer.from_pretrained(tokenizer, **hub)
    return cls(source, tokenizer, **options)
