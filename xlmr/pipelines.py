"""Text in, answers out: `pipeline(task, model)` gives a callable that returns what transformers' pipeline does.

The texts of a call are tokenised together, sorted by length and run packed; no answer depends on the other texts.
"""

from __future__ import annotations

import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, chain, islice
from os import PathLike
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from . import heads
from .checkpoint import place_on
from .config import XLMRobertaConfig
from .demo import CHECKPOINT
from .encode import BATCH_TOKENS, batches, choose_device, first_logits, pack
from .encoder import Encoder, load
from .files import own_keywords
from .heads import (
    XLMRobertaForMaskedLM,
    XLMRobertaForQuestionAnswering,
    XLMRobertaForSequenceClassification,
    XLMRobertaForTokenClassification,
)
from .model import XLMRobertaModel
from .pretrained import XLMRobertaPreTrainedModel
from .spans import STRATEGIES, Window, best_spans, entities, tokens_of, without_overlaps
from .tokenizer import XLMRobertaTokenizer

logger = logging.getLogger(__name__)

STREAMED = 256  # how many texts of an iterator are read, sorted and run together
LONG_LIST = 1000  # from so many texts on, a bar on standard error shows the progress
Text = str | tuple[str, str]  # a text, or a pair of them


class Unpadded(NamedTuple):
    """A text's token ids, those that attention leaves out dropped, and where the others stood among how many."""

    ids: list[int]
    kept: list[int]
    length: int


class Pipeline(ABC):
    """One task: a model, which is put into eval mode, its tokenizer, and options that calls may override."""

    task: ClassVar[str]
    model_class: ClassVar[type[XLMRobertaPreTrainedModel]]
    takes: ClassVar[str] = "a string"

    def __init__(self, model: Any, tokenizer: Any, **options: Any) -> None:
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

    def __call__(self, inputs: Any, **options: Any) -> Any:
        """The answer for a string, the list of answers for a list of strings; `options` are those of `answers`. For an
        iterator or a torch Dataset an iterator of answers, which reads STREAMED texts ahead.

        Raises TypeError for other inputs and unknown options, ValueError for a text that the task or model cannot take.
        """
        options = {**self.options, **self._checked(options)}
        one = self._read(inputs)
        if one is not None:
            return self.answers([one], **options)[0]
        if isinstance(inputs, Dataset):
            inputs = map(inputs.__getitem__, range(len(inputs)))  # type: ignore[arg-type]
        if isinstance(inputs, Iterator):
            return chain.from_iterable(
                self._all(part, options) for part in iter(lambda: list(islice(inputs, STREAMED)), [])
            )
        return self._all(inputs, options)

    def _all(self, inputs: Any, options: dict[str, Any]) -> list[Any]:
        """The answers for a list."""
        given = [self._read(text) for text in inputs] if isinstance(inputs, list | tuple) else [None]
        if None in given:
            raise TypeError(f"inputs is {inputs!r:.80}: {self.takes}, or a list of such, is needed")
        return self.answers(given, **options) if given else []

    def _read(self, one: Any) -> Any:
        """What `answers` takes of one input; None if it is none."""
        return one if isinstance(one, str) else None

    @abstractmethod
    def answers(self, texts: list[Any]) -> list[Any]:
        """One answer per text; the keyword parameters are the task's options."""

    def _checked(self, options: dict[str, Any]) -> dict[str, Any]:
        options = own_keywords(options)
        allowed = list(inspect.signature(self.answers).parameters)[1:]
        for name in options:
            if name not in allowed:
                raise TypeError(f"{name!r} is no option of {self.task}: allowed are {', '.join(allowed)}")
        # transformers' enumerations hold the same names
        return {name: getattr(value, "value", value) for name, value in options.items()}

    def _encode(self, texts: Sequence[Text], tokenizer_kwargs: dict[str, Any] | None) -> list[Unpadded]:
        batch = self.tokenizer(list(texts), **(tokenizer_kwargs or {})) if texts else {"input_ids": []}
        if len(batch["input_ids"]) != len(texts):
            raise ValueError("return_overflowing_tokens cuts a text into several: a pipeline takes each text whole")
        masks = batch.get("attention_mask") or [[1] * len(ids) for ids in batch["input_ids"]]
        encoded = []
        for text, ids, mask in zip(texts, batch["input_ids"], masks, strict=True):
            kept = [i for i, keep in enumerate(mask) if keep]
            self._check_length(text, len(kept))
            encoded.append(Unpadded([ids[i] for i in kept], kept, len(ids)))
        return encoded

    def _check_length(self, text: Text, tokens: int) -> None:
        limit = self.model.config.max_length
        if tokens > limit:
            start = text[:40] if isinstance(text, str) else text[0][:40]
            raise ValueError(
                f"the text {start!r} has {tokens} tokens, the model takes at most {limit}: "
                "shorten it, or truncate it with the tokenizer's option truncation=True"
            )

    @property
    def _longest(self) -> int:
        """The tokens that a text is truncated to."""
        return min(self.model.config.max_length, self.tokenizer.model_max_length)

    def _batches(self, sequences: Sequence[Sequence[int]], batch_size: int | None) -> Iterator[list[int]]:
        """The indices of `sequences`, lists of token ids, batch by batch."""
        found = batches([len(ids) for ids in sequences], BATCH_TOKENS, batch_size)
        if len(sequences) < LONG_LIST:
            yield from found
            return
        from tqdm import tqdm

        with tqdm(total=len(sequences), unit="text", desc=self.task, disable=None) as bar:  # None: where no one looks
            for batch in found:
                yield batch
                bar.update(len(batch))

    def _token_logits(self, sequences: Sequence[list[int]], head: Any, batch_size: int | None) -> list[Tensor]:
        """Of each of `sequences` what `head`, a linear layer, makes of the last layer: fp32 [L, labels], on the CPU."""
        found: list[Any] = [None] * len(sequences)
        for batch in self._batches(sequences, batch_size):
            packed = pack([sequences[i] for i in batch], self.device)
            logits = self.model.linear(head, self.model.base_model.forward_packed(*packed)).float().cpu()
            for i, own in zip(batch, logits.split([len(sequences[i]) for i in batch]), strict=True):
                found[i] = own
        return found


class FillMaskPipeline(Pipeline):
    """The most probable tokens at each mask, as transformers.FillMaskPipeline gives them."""

    task = "fill-mask"
    model_class = XLMRobertaForMaskedLM

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
        top_k = 5 if top_k is None else top_k
        words = None if targets is None else self._words([targets] if isinstance(targets, str) else targets)
        limit = self.model.config.vocab_size if words is None else len(words)
        if not 1 <= top_k <= self.model.config.vocab_size:
            raise ValueError(
                f"top_k is {top_k}: allowed are 1 to {self.model.config.vocab_size}, the vocabulary's size"
            )
        encoded = self._encode(texts, tokenizer_kwargs)
        masks = [self._masks(text, one.ids) for text, one in zip(texts, encoded, strict=True)]
        answers: list[Any] = [None] * len(texts)
        for batch in self._batches([one.ids for one in encoded], batch_size):
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
        return found[0] if isinstance(inputs, list | tuple) and len(inputs) == 1 else found

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
        """The class that wrote the checkpoint, so that no weight is missing or left over; its base model is used. That
        alone is loaded where the head computes something else than ours."""
        names = [config.kind.ours(name) for name in config.architectures or () if isinstance(name, str)]
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
        for batch in self._batches([one.ids for one in encoded], batch_size):
            packed = pack([encoded[i].ids for i in batch], self.device)
            rows = base.forward_packed(*packed).cpu()
            for i, own in zip(batch, rows.split([len(encoded[i].ids) for i in batch]), strict=True):
                features = own.new_zeros(1, encoded[i].length, own.shape[1])
                features[0, encoded[i].kept] = own
                answers[i] = features if return_tensors else features.tolist()
        return answers


class SequencePipeline(Pipeline):
    """What the tasks of a ForSequenceClassification share."""

    model_class = XLMRobertaForSequenceClassification

    def _logits(self, encoded: Sequence[Unpadded], batch_size: int | None) -> Tensor:
        """fp32 [len(encoded), labels], on the CPU. Of the last layer only the first tokens are computed."""
        out = torch.empty(len(encoded), self.model.config.num_labels)
        for batch in self._batches([one.ids for one in encoded], batch_size):
            packed = pack([encoded[i].ids for i in batch], self.device)
            out[batch] = first_logits(self.model, packed).float().cpu()
        return out


class TextClassificationPipeline(SequencePipeline):
    """The classes of a text or pair of texts, as transformers.TextClassificationPipeline gives them."""

    task = "text-classification"
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
        score = SCORES.get(function_to_apply or self._function())
        if score is None:
            raise ValueError(f"function_to_apply is {function_to_apply!r}: allowed are {', '.join(map(repr, SCORES))}")
        own = {"padding": padding, "truncation": truncation, "max_length": max_length}
        given = {**own, **(tokenizer_kwargs or {})}
        singles = [i for i, text in enumerate(texts) if isinstance(text, str)]
        pairs = [i for i, text in enumerate(texts) if not isinstance(text, str)]
        encoded = [one for kind in (singles, pairs) for one in self._encode([texts[i] for i in kind], given)]
        answers: list[Any] = [None] * len(texts)
        for i, scores in zip(singles + pairs, score(self._logits(encoded, batch_size)).tolist(), strict=True):
            rows = [{"label": self.model.config.id2label[j], "score": value} for j, value in enumerate(scores)]
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


class ZeroShotClassificationPipeline(SequencePipeline):
    """Which of any labels fit a text, by a model of entailment, as transformers.ZeroShotClassificationPipeline."""

    task = "zero-shot-classification"

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
        scores sum to one. A text is truncated until it fits beside the longest hypothesis.
        """
        labels = candidate_labels
        labels = [label.strip() for label in labels.split(",")] if isinstance(labels, str) else list(labels)
        labels = [label for label in labels if label]
        if not labels or not all(isinstance(label, str) for label in labels):
            raise ValueError(f"candidate_labels is {candidate_labels!r:.80}: at least one label, a string, is needed")
        if "" in texts:
            raise ValueError("a text is empty: zero-shot-classification needs something to judge")
        hypotheses = [hypothesis_template.format(label) for label in labels]
        if hypotheses[0] == hypothesis_template:
            raise ValueError(f"hypothesis_template is {hypothesis_template!r}: it needs a {{}} where the label goes")
        pairs: list[Text] = [(text, hypothesis) for text in texts for hypothesis in hypotheses]
        encoded = self._encode(pairs, {"truncation": "only_first", "max_length": self._longest})
        logits = self._logits(encoded, batch_size).unflatten(0, (len(texts), len(labels)))
        entails = self._entailment()
        if multi_label or len(labels) == 1:
            contradicts = -1 if entails == 0 else 0
            scores = logits[..., [contradicts, entails]].softmax(-1)[..., 1]
        else:
            scores = logits[..., entails].softmax(-1)
        values, order = scores.sort(descending=True)
        return [
            {"sequence": text, "labels": [labels[i] for i in places], "scores": best}
            for text, places, best in zip(texts, order.tolist(), values.tolist(), strict=True)
        ]

    def _entailment(self) -> int:
        labels = self.model.config.id2label
        found = [i for i, label in labels.items() if label.lower().startswith("entail")]
        if not found:
            raise ValueError(
                f"no label begins with 'entail' among {', '.join(labels.values())}: zero-shot-classification needs a "
                "model of entailment (NLI); if it is one, name its labels in config.id2label"
            )
        return found[0]


class TokenClassificationPipeline(Pipeline):
    """The named entities of a text, as transformers.TokenClassificationPipeline gives them."""

    task = "token-classification"
    model_class = XLMRobertaForTokenClassification

    @torch.no_grad()
    def answers(
        self,
        texts: list[str],
        aggregation_strategy: str = "none",
        ignore_labels: Sequence[str] = ("O",),
        stride: int | None = None,
        batch_size: int | None = None,
    ) -> list[Any]:
        """For each text a list, with "none" of a {entity, score, index, word, start, end} a token, else of
        {entity_group, score, word, start, end}. start and end count characters of the text.

        aggregation_strategy: one of STRATEGIES, see spans.entities. ignore_labels: are left out. stride: a longer text
        is read in windows that share so many tokens; without it, it is truncated, as in the reference.
        """
        strategy = str(aggregation_strategy).lower()
        if strategy not in STRATEGIES:
            allowed = ", ".join(map(repr, STRATEGIES))
            raise ValueError(f"aggregation_strategy is {aggregation_strategy!r}: allowed are {allowed}")
        if stride is not None and strategy == "none":
            raise ValueError("stride needs an aggregation_strategy that makes entities, which windows may share")
        windows: dict[str, Any] = {} if stride is None else {"stride": stride, "return_overflowing_tokens": True}
        batch = self.tokenizer(
            texts,
            truncation=True,
            max_length=self._longest,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            **windows,
        )
        logits = self._token_logits(batch["input_ids"], self.model.classifier, batch_size)
        owners = batch.get("overflow_to_sample_mapping", range(len(texts)))
        columns = (batch["input_ids"], batch["offset_mapping"], batch["special_tokens_mask"])
        found: list[list[list[dict[str, Any]]]] = [[] for _ in texts]
        for owner, row, ids, offsets, special in zip(owners, logits, *columns, strict=True):
            tokens = tokens_of(texts[owner], ids, row.softmax(-1).tolist(), offsets, special, self.tokenizer)
            rows = entities(tokens, strategy, self.model.config.id2label, self.tokenizer)
            key = "entity" if strategy == "none" else "entity_group"
            found[owner].append([one for one in rows if one[key] not in ignore_labels])
        return [without_overlaps(chain.from_iterable(own)) if len(own) > 1 else own[0] for own in found]


class QuestionAnsweringPipeline(Pipeline):
    """Answers found in a context, as transformers 4's QuestionAnsweringPipeline gave them."""

    task = "question-answering"
    model_class = XLMRobertaForQuestionAnswering
    takes = "{'question': …, 'context': …}"

    def __call__(self, inputs: Any = None, question: Any = None, context: Any = None, **options: Any) -> Any:
        """The answer for a dict of question and context, a list for a list of several; or for `question` and
        `context`, strings, or lists of as many, one context serving all questions."""
        if inputs is None:
            if isinstance(question, list | tuple):
                contexts = [context] * len(question) if isinstance(context, str) else list(context or ())
                if len(contexts) != len(question):
                    raise ValueError(
                        f"there are {len(question)} questions and {len(contexts)} contexts: as many needed"
                    )
                inputs = [{"question": q, "context": c} for q, c in zip(question, contexts, strict=True)]
            else:
                inputs = {"question": question, "context": context}
        found = super().__call__(inputs, **options)
        return found[0] if isinstance(inputs, list | tuple) and len(inputs) == 1 else found

    def _read(self, one: Any) -> tuple[str, str] | None:
        if not isinstance(one, Mapping) or not {"question", "context"} <= one.keys():
            return None
        question, context = one["question"], one["context"]
        if not isinstance(question, str) or not isinstance(context, str):
            return None
        for name, text in (("question", question), ("context", context)):
            if not text:
                raise ValueError(f"the {name} is empty: question-answering needs both")
        return question, context

    @torch.no_grad()
    def answers(
        self,
        texts: list[tuple[str, str]],
        top_k: int = 1,
        max_answer_len: int = 15,
        max_seq_len: int | None = None,
        doc_stride: int | None = None,
        handle_impossible_answer: bool = False,
        align_to_words: bool = True,
        batch_size: int | None = None,
    ) -> list[Any]:
        """For each (question, context) its {score, start, end, answer}, several as a list, best first.

        start and end count characters of the context. max_seq_len: tokens of a window, by default the model's limit, at
        most 384. doc_stride: how many of them neighbours share, by default half, at most 128. max_answer_len: in
        tokens. handle_impossible_answer: "" competes too. align_to_words: answers are whole words.
        """
        for name, value in (("top_k", top_k), ("max_answer_len", max_answer_len)):
            if value < 1:
                raise ValueError(f"{name} is {value}: at least 1 is needed")
        size = min(self._longest, 384) if max_seq_len is None else min(self._longest, max_seq_len)
        batch = self.tokenizer(
            texts,
            truncation="only_second",
            max_length=size,
            stride=min(size // 2, 128) if doc_stride is None else doc_stride,
            return_overflowing_tokens=True,
        )
        logits = self._token_logits(batch["input_ids"], self.model.qa_outputs, batch_size)
        found: list[list[tuple[int, Window]]] = [[] for _ in texts]
        for row, owner in enumerate(batch["overflow_to_sample_mapping"]):
            allowed = [sequence == 1 for sequence in batch.sequence_ids(row)]
            found[owner].append((row, best_spans(logits[row], allowed, top_k, max_answer_len)))
        answers = []
        for (_, context), windows in zip(texts, found, strict=True):
            own = self._merged(context, windows, batch, align_to_words)
            if handle_impossible_answer:
                none = min(window.none for _, window in windows)
                own.append({"score": none, "start": 0, "end": 0, "answer": ""})
            own = sorted(own, key=lambda one: -one["score"])[:top_k]
            answers.append(own[0] if len(own) == 1 else own)
        return answers

    def _merged(
        self, context: str, windows: list[tuple[int, Window]], batch: Any, align_to_words: bool
    ) -> list[dict[str, Any]]:
        """The answers of all windows (row of the batch, best spans) of a context; the scores of equal ones add up."""
        by_text: dict[str, dict[str, Any]] = {}
        for row, window in windows:
            for first, last, score in window.spans:
                start, end = self._characters(batch[row], first, last, align_to_words)
                text = context[start:end]
                one = {"score": 0.0, "start": start, "end": end, "answer": text}
                by_text.setdefault(text.lower(), one)["score"] += score
        return list(by_text.values())

    @staticmethod
    def _characters(row: Any, first: int, last: int, align_to_words: bool) -> tuple[int, int]:
        """Where tokens first … last of a window stand in the context."""
        if not align_to_words:
            return row.offsets[first][0], row.offsets[last][1]
        start, end = (row.word_to_chars(row.token_to_word(token), 1) for token in (first, last))
        return start[0], end[1]


class SentenceSimilarityPipeline(Pipeline):
    """The cosines between a sentence and others, as the hub's inference service gives them."""

    task = "sentence-similarity"
    takes = "{'source_sentence': …, 'sentences': […]}"

    def __init__(self, encoder: Encoder, tokenizer: Any = None, **options: Any) -> None:
        if not isinstance(encoder, Encoder):
            raise TypeError(f"{self.task} needs an Encoder, as xlmr.load gives it; this is a {type(encoder).__name__}")
        if not encoder.recipe.pooling:
            raise ValueError(f"{self.task} needs a model that gives vectors, this is a cross-encoder: use xlmr rerank")
        self.encoder = encoder
        self.model, self.tokenizer = encoder.model, encoder.tokenizer
        self.options = self._checked(options)

    def _read(self, one: Any) -> tuple[str, list[str]] | None:
        if not isinstance(one, Mapping) or one.keys() != {"source_sentence", "sentences"}:
            return None
        source, others = one["source_sentence"], one["sentences"]
        strings = isinstance(others, list | tuple) and all(isinstance(text, str) for text in (source, *others))
        return (source, list(others)) if strings else None

    def answers(self, texts: list[tuple[str, list[str]]], batch_tokens: int = BATCH_TOKENS) -> list[Any]:
        """For each source and its sentences the list of their cosines. batch_tokens: tokens computed at once."""
        flat = [text for source, others in texts for text in (source, *others)]
        show = None if len(flat) < LONG_LIST else True
        vectors = self.encoder.encode(
            flat, normalize=True, output="torch", batch_tokens=batch_tokens, show_progress_bar=show
        )
        own = vectors.split([1 + len(others) for _, others in texts])
        return [(rows[1:] @ rows[0]).tolist() for rows in own]


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
    model: str | PathLike[str] | XLMRobertaPreTrainedModel | None = None,
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
    """The pipeline of `task`, one of PIPELINES, on a checkpoint directory, a hub name or a model.

    model: None is the embedded demo. tokenizer: by default the one beside the model's weights. device: by default a GPU
    where there is one, while a model that is given stays where it is; a number is a GPU's, -1 the CPU. device_map,
    dtype, torch_dtype, backend, revision and token are from_pretrained's, model_kwargs more of its keywords. options:
    defaults for those of the task's calls. Raises ValueError and TypeError for an unknown task, option or kind of
    model, OSError for a checkpoint that cannot be read.
    """
    task = ALIASES.get(task, task)
    if task not in PIPELINES:
        raise ValueError(f"{task!r} is no task: allowed are {', '.join(map(repr, [*PIPELINES, *ALIASES]))}")
    cls = PIPELINES[task]
    hub: dict[str, Any] = {"revision": revision, "token": token}
    device = device if device_map is None else place_on(device, device_map)
    path = {"dtype": dtype if torch_dtype is None else torch_dtype, "backend": backend, **(model_kwargs or {})}
    source: Any = CHECKPOINT if model is None else model
    if isinstance(source, Encoder) or (cls is SentenceSimilarityPipeline and isinstance(source, (str, PathLike))):
        if isinstance(source, (str, PathLike)):
            source = load(source, device=choose_device(device), **own_keywords(path), **hub)
        return cls(source, None, **options)
    words = source if tokenizer is None else tokenizer
    if isinstance(source, (str, PathLike)):
        source = _load(cls, source, device=choose_device(device), **path, **hub)
    elif device is not None:
        source = source.to(choose_device(device))
    if isinstance(words, XLMRobertaPreTrainedModel):
        raise ValueError("a model was given without its tokenizer: pass tokenizer=, a tokenizer or its directory")
    if isinstance(words, (str, PathLike)):
        words = XLMRobertaTokenizer.from_pretrained(words, **hub)
    if cls is SentenceSimilarityPipeline and isinstance(source, XLMRobertaModel):
        source = Encoder(source, words)
    return cls(source, words, **options)


def _load(cls: type[Pipeline], where: Any, *, revision: Any, token: Any, **path: Any) -> Any:
    """The model in a directory; ValueError if the head that the task needs is not in it."""
    hub = {"revision": revision, "token": token}
    config = XLMRobertaConfig.from_pretrained(where, **hub)
    kind = cls.saved_class(config)
    model, info = kind.from_pretrained(where, output_loading_info=True, **path, **hub)
    missing = sorted(name for name in info["missing_keys"] if "pooler." not in name)
    if missing:
        raise ValueError(
            f"{where} holds a {' or '.join(config.architectures or ['base model'])}, {cls.task} needs the weights of "
            f"an xlmr.{kind.__name__}: it lacks {', '.join(missing[:4])}"
        )
    return model
