"""Text in, answers out: `pipeline(task, model)` gives a callable that returns what transformers' pipeline does.

The texts of a call are tokenised together, sorted by length and run packed; no answer depends on the other texts.
"""

from __future__ import annotations

import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import accumulate
from os import PathLike
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from . import heads
from .config import XLMRobertaConfig
from .demo import CHECKPOINT
from .encode import BATCH_TOKENS, batches, pack
from .heads import XLMRobertaForMaskedLM, XLMRobertaForSequenceClassification
from .model import XLMRobertaModel
from .pretrained import XLMRobertaPreTrainedModel
from .tokenizer import XLMRobertaTokenizer

logger = logging.getLogger(__name__)


class Encoded(NamedTuple):
    """A text's token ids, those that attention leaves out dropped, and where the others stood among how many."""

    ids: list[int]
    kept: list[int]
    length: int


class Pipeline(ABC):
    """One task: a model, which is put into eval mode, its tokenizer, and options that calls may override."""

    task: ClassVar[str]
    model_class: ClassVar[type[XLMRobertaPreTrainedModel]]

    def __init__(self, model: XLMRobertaPreTrainedModel, tokenizer: XLMRobertaTokenizer, **options: Any) -> None:
        wanted = self.model_class
        if not isinstance(model, wanted) and not isinstance(getattr(model, "base_model", None), wanted):
            raise TypeError(f"{self.task} needs an xlmr.{wanted.__name__}, the model is a {type(model).__name__}")
        self.model: Any = model.eval()  # Any: a module's submodules have no types
        self.tokenizer = tokenizer
        self.options = self._checked(options)

    @classmethod
    def saved_class(cls, config: XLMRobertaConfig) -> type[XLMRobertaPreTrainedModel]:
        """The class that a checkpoint is loaded as."""
        return cls.model_class

    @property
    def device(self) -> torch.device:
        return self.model.device

    def __call__(self, inputs: str | Sequence[str], **options: Any) -> Any:
        """The answer for a string, the list of answers for a list of strings; `options` are those of `answers`.

        Raises TypeError for other inputs and unknown options, ValueError for a text that the task or model cannot take.
        """
        options = {**self.options, **self._checked(options)}
        if isinstance(inputs, str):
            return self.answers([inputs], **options)[0]
        if not isinstance(inputs, list | tuple) or not all(isinstance(text, str) for text in inputs):
            raise TypeError(f"inputs is {inputs!r:.80}: a string or a list of strings is needed")
        return self.answers(list(inputs), **options) if inputs else []

    @abstractmethod
    def answers(self, texts: list[str]) -> list[Any]:
        """One answer per text; the keyword parameters are the task's options."""

    def _checked(self, options: dict[str, Any]) -> dict[str, Any]:
        allowed = list(inspect.signature(self.answers).parameters)[1:]
        for name in options:
            if name not in allowed:
                raise TypeError(f"{name!r} is no option of {self.task}: allowed are {', '.join(allowed)}")
        return options

    def _encode(self, texts: list[str], tokenizer_kwargs: dict[str, Any] | None) -> list[Encoded]:
        batch = self.tokenizer(texts, **(tokenizer_kwargs or {}))
        if len(batch["input_ids"]) != len(texts):
            raise ValueError("return_overflowing_tokens cuts a text into several: a pipeline takes each text whole")
        limit = self.model.config.max_length
        masks = batch.get("attention_mask") or [[1] * len(ids) for ids in batch["input_ids"]]
        encoded = []
        for text, ids, mask in zip(texts, batch["input_ids"], masks, strict=True):
            kept = [i for i, keep in enumerate(mask) if keep]
            if len(kept) > limit:
                raise ValueError(
                    f"the text {text[:40]!r} has {len(kept)} tokens, the model takes at most {limit}: "
                    "shorten it, or truncate it with the tokenizer's option truncation=True"
                )
            encoded.append(Encoded([ids[i] for i in kept], kept, len(ids)))
        return encoded

    def _batches(self, encoded: list[Encoded], batch_size: int | None) -> Iterator[list[int]]:
        return batches([len(one.ids) for one in encoded], BATCH_TOKENS, batch_size)


class FillMaskPipeline(Pipeline):
    """The most probable tokens at each mask, as transformers.FillMaskPipeline gives them."""

    task = "fill-mask"
    model_class = XLMRobertaForMaskedLM

    @torch.no_grad()
    def answers(
        self,
        texts: list[str],
        top_k: int = 5,
        targets: str | Sequence[str] | None = None,
        tokenizer_kwargs: dict[str, Any] | None = None,
        batch_size: int | None = None,
    ) -> list[Any]:
        """For each text `[{score, token, token_str, sequence}]`, best first; a list of such lists for several masks.

        top_k: how many. targets: only these words compete, one of several tokens through its first. score: the
        probability among the whole vocabulary, from a softmax in fp32 or more. batch_size: the most texts run at once.
        """
        words = None if targets is None else self._words([targets] if isinstance(targets, str) else targets)
        limit = self.model.config.vocab_size if words is None else len(words)
        if not 1 <= top_k <= self.model.config.vocab_size:
            raise ValueError(
                f"top_k is {top_k}: allowed are 1 to {self.model.config.vocab_size}, the vocabulary's size"
            )
        encoded = self._encode(texts, tokenizer_kwargs)
        masks = [self._masks(text, one.ids) for text, one in zip(texts, encoded, strict=True)]
        answers: list[Any] = [None] * len(texts)
        for batch in self._batches(encoded, batch_size):
            scores, tokens = self._best([(encoded[i].ids, masks[i]) for i in batch], min(top_k, limit), words)
            for i in batch:
                rows = [
                    self._row(encoded[i].ids, mask, next(scores), next(tokens), readable=len(masks[i]) == 1)
                    for mask in masks[i]
                ]
                answers[i] = rows[0] if len(rows) == 1 else rows
        return answers

    def __call__(self, inputs: str | Sequence[str], **options: Any) -> Any:
        """The answer for a string, the list of answers for a list of strings; of one string, its one answer, as in the
        reference. See `answers` for the options, Pipeline for the errors."""
        found = super().__call__(inputs, **options)
        return found[0] if not isinstance(inputs, str) and len(inputs) == 1 else found

    def _masks(self, text: str, ids: list[int]) -> list[int]:
        masks = [i for i, token in enumerate(ids) if token == self.tokenizer.mask_token_id]
        if not masks:
            raise ValueError(
                f"the text {text[:80]!r} has no {self.tokenizer.mask_token}: put one where a word is missing"
            )
        return masks

    def _best(
        self, sequences: list[tuple[list[int], list[int]]], k: int, words: Tensor | None
    ) -> tuple[Iterator[list[float]], Iterator[list[int]]]:
        """The k best scores and tokens of every mask, in the order of the masks of the sequences (ids, masks)."""
        packed = pack([ids for ids, _ in sequences], self.device)
        starts = accumulate((len(ids) for ids, _ in sequences), initial=0)
        rows = [start + mask for start, (_, masks) in zip(starts, sequences, strict=False) for mask in masks]
        where = torch.tensor(rows, device=self.device)
        scores, tokens = self.model.topk_packed(*packed, rows=where, k=k, targets=words)
        return iter(scores.exp().tolist()), iter(tokens.tolist())

    def _row(
        self, ids: list[int], mask: int, scores: list[float], tokens: list[int], readable: bool
    ) -> list[dict[str, Any]]:
        """The answers for one mask of a text. Where there are others, `sequence` shows them: special tokens stay."""
        row = []
        for score, token in zip(scores, tokens, strict=True):
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


class FeatureExtractionPipeline(Pipeline):
    """The last layer of every token, as transformers.FeatureExtractionPipeline gives it."""

    task = "feature-extraction"
    model_class = XLMRobertaModel

    @classmethod
    def saved_class(cls, config: XLMRobertaConfig) -> type[XLMRobertaPreTrainedModel]:
        """The class that wrote the checkpoint, so that no weight is missing or left over; its base model is used."""
        named = (vars(heads).get(name) for name in config.architectures or ())
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

        Positions that `tokenize_kwargs` pads are zeros. batch_size: the most texts run at once.
        """
        tokenize_kwargs = dict(tokenize_kwargs or {})
        if truncation is not None:
            if "truncation" in tokenize_kwargs:
                raise ValueError("truncation is given twice, as an option and in tokenize_kwargs: give it once")
            tokenize_kwargs["truncation"] = truncation
        encoded = self._encode(texts, tokenize_kwargs)
        base = self.model.base_model
        answers: list[Any] = [None] * len(texts)
        for batch in self._batches(encoded, batch_size):
            packed = pack([encoded[i].ids for i in batch], self.device)
            rows = base.forward_packed(*packed).cpu()
            for i, own in zip(batch, rows.split([len(encoded[i].ids) for i in batch]), strict=True):
                features = own.new_zeros(1, encoded[i].length, own.shape[1])
                features[0, encoded[i].kept] = own
                answers[i] = features if return_tensors else features.tolist()
        return answers


class TextClassificationPipeline(Pipeline):
    """The classes of a text, as transformers.TextClassificationPipeline gives them."""

    task = "text-classification"
    model_class = XLMRobertaForSequenceClassification

    def __call__(self, inputs: str | Sequence[str], **options: Any) -> Any:
        """As Pipeline; of one string without `top_k`, its best class in a list, as in the reference."""
        found = super().__call__(inputs, **options)
        return [found] if isinstance(found, dict) else found

    @torch.no_grad()
    def answers(
        self,
        texts: list[str],
        top_k: Any = "best",
        function_to_apply: str | None = None,
        tokenizer_kwargs: dict[str, Any] | None = None,
        batch_size: int | None = None,
    ) -> list[Any]:
        """For each text its best {label, score}; with `top_k` a list of that many, None all of them, best first.

        function_to_apply: what makes scores of logits, "sigmoid", "softmax" or "none"; by default that of the
        configuration's problem_type, else sigmoid for one label and softmax for several.
        """
        if top_k is not None and top_k != "best" and (not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f"top_k is {top_k!r}: allowed are 1, 2, … and None, which is all labels")
        score = SCORES.get(function_to_apply or self._function())
        if score is None:
            raise ValueError(f"function_to_apply is {function_to_apply!r}: allowed are {', '.join(map(repr, SCORES))}")
        encoded = self._encode(texts, tokenizer_kwargs)
        answers: list[Any] = [None] * len(texts)
        for batch in self._batches(encoded, batch_size):
            packed = pack([encoded[i].ids for i in batch], self.device)
            first = self.model.base_model.forward_packed(*packed, rows=packed.cu_seqlens[:-1].long())
            for i, scores in zip(batch, score(self.model.classifier.rows(first).float()).tolist(), strict=True):
                labels = self.model.config.id2label
                rows = [{"label": labels[j], "score": value} for j, value in enumerate(scores)]
                rows.sort(key=lambda row: -row["score"])
                answers[i] = rows[0] if top_k == "best" else rows[:top_k]
        return answers

    def _function(self) -> str:
        config = self.model.config
        if config.problem_type == "regression":
            return "none"
        several = config.problem_type == "multi_label_classification"
        return "sigmoid" if several or config.num_labels == 1 else "softmax"


SCORES: dict[str, Any] = {
    "sigmoid": torch.sigmoid,
    "softmax": lambda logits: logits.softmax(-1),
    "none": lambda logits: logits,
}
PIPELINES: dict[str, type[Pipeline]] = {
    cls.task: cls for cls in (FillMaskPipeline, FeatureExtractionPipeline, TextClassificationPipeline)
}


def pipeline(
    task: str,
    model: str | PathLike[str] | XLMRobertaPreTrainedModel | None = None,
    tokenizer: str | PathLike[str] | XLMRobertaTokenizer | None = None,
    *,
    device: int | str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    backend: str = "auto",
    revision: str | None = None,
    token: str | bool | None = None,
    **options: Any,
) -> Pipeline:
    """The pipeline of `task`, one of PIPELINES, on a checkpoint directory, a hub name or a model.

    model: None is the embedded demo. tokenizer: by default the one beside the model's weights. device: by default a GPU
    where there is one, while a model that is given stays where it is; a number is a GPU's, -1 the CPU. dtype, backend,
    revision and token are from_pretrained's. options: defaults for those of the task's calls. Raises ValueError and
    TypeError for an unknown task, option or kind of model, OSError for a checkpoint that cannot be read.
    """
    if task not in PIPELINES:
        raise ValueError(f"{task!r} is no task: allowed are {', '.join(map(repr, PIPELINES))}")
    cls = PIPELINES[task]
    hub: dict[str, Any] = {"revision": revision, "token": token}
    source = CHECKPOINT if model is None else model
    words = source if tokenizer is None else tokenizer
    if isinstance(source, (str, PathLike)):
        kind = cls.saved_class(XLMRobertaConfig.from_pretrained(source, **hub))
        source = kind.from_pretrained(source, device=_device(device), dtype=dtype, backend=backend, **hub)
    elif device is not None:
        source = source.to(_device(device))
    if isinstance(words, XLMRobertaPreTrainedModel):
        raise ValueError("a model was given without its tokenizer: pass tokenizer=, a tokenizer or its directory")
    if isinstance(words, (str, PathLike)):
        words = XLMRobertaTokenizer.from_pretrained(words, **hub)
    return cls(source, words, **options)


def _device(device: int | str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(device, int):
        device = "cpu" if device < 0 else f"cuda:{device}"
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(
            f"device is {device!r}: allowed are cpu, cuda, cuda:1, … and PyTorch's other devices"
        ) from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}: PyTorch sees no GPU here; give cpu")
    return found
