"""question-answering: where a context answers a question, by the rules of transformers 4's pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import integer
from ..batch_encoding import Encoding
from ..heads import XLMRobertaForQuestionAnswering
from .base import Pipeline


class QuestionAnsweringPipeline(Pipeline):
    """Answers found in a context, as transformers 4's QuestionAnsweringPipeline gave them."""

    task = "question-answering"
    model_class = XLMRobertaForQuestionAnswering
    takes = "{'question': …, 'context': …}"

    def __call__(self, inputs: Any = None, question: Any = None, context: Any = None, **options: Any) -> Any:
        """The answer for a dict of question and context, a list for a list of several; or for `question` and
        `context`, strings, or lists of as many, one context serving all questions. Two strings may be given by place.
        """
        if isinstance(inputs, str):
            inputs, question, context = None, inputs, question if context is None else context
        inputs = _asked(question, context) if inputs is None else inputs
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
        tokens. handle_impossible_answer: "" competes too. align_to_words: answers are whole words. A context without a
        token gives "".
        """
        for name, value in (("top_k", top_k), ("max_answer_len", max_answer_len)):
            integer(name, value, least=1)
        size = min(self._longest, 384) if max_seq_len is None else min(self._longest, max_seq_len)
        batch = self.tokenizer(
            texts,
            truncation="only_second",
            max_length=size,
            stride=min(size // 2, 128) if doc_stride is None else doc_stride,
            return_overflowing_tokens=True,
        )
        logits = self._token_logits(batch["input_ids"], self.model.qa_outputs, batch_size)
        candidates = 2 * top_k + 10 if align_to_words else top_k  # several may become one answer
        found: list[list[tuple[Encoding, Window]]] = [[] for _ in texts]
        for owner, row, own in zip(batch["overflow_to_sample_mapping"], batch.encodings, logits, strict=True):
            allowed = [sequence == 1 for sequence in row.sequence_ids]
            found[owner].append((row, best_spans(own, allowed, candidates, max_answer_len)))
        answers: list[Any] = []
        for (_, context), windows in zip(texts, found, strict=True):
            rows = _merged(context, windows, align_to_words)
            if handle_impossible_answer or not rows:
                none = min(window.none for _, window in windows) if handle_impossible_answer else 0.0
                rows.append({"score": none, "start": 0, "end": 0, "answer": ""})
            best = sorted(rows, key=lambda row: -row["score"])[:top_k]
            answers.append(best[0] if len(best) == 1 else best)
        return answers


def _asked(question: Any, context: Any) -> Any:
    """The inputs that questions and their contexts, or one context of all, make."""
    if not isinstance(question, list | tuple):
        return {"question": question, "context": context}
    contexts = [context] * len(question) if isinstance(context, str) else list(context or ())
    if len(contexts) != len(question):
        raise ValueError(f"there are {len(question)} questions and {len(contexts)} contexts: as many needed")
    return [{"question": q, "context": c} for q, c in zip(question, contexts, strict=True)]


class Window(NamedTuple):
    """The best stretches of tokens (first, last, score) in a window, and the score of there being no answer."""

    spans: list[tuple[int, int, float]]
    none: float


def best_spans(logits: Tensor, allowed: Sequence[bool], k: int, longest: int) -> Window:
    """The k best answers by logits [L, 2] of starts and ends, at most `longest` tokens long, of `allowed` tokens only.

    The softmax of either runs over the allowed tokens and the first one, `<s>`, which stands for no answer.
    """
    outside = torch.tensor([not (ok or i == 0) for i, ok in enumerate(allowed)])
    start, end = logits.float().masked_fill(outside[:, None], -1e4).softmax(0).unbind(1)
    none = float(start[0] * end[0])
    scores = (start[:, None] * end).triu().tril(longest - 1)
    scores[0], scores[:, 0] = 0, 0
    values, places = scores.flatten().topk(min(k, scores.numel()))
    spans = []
    for value, place in zip(values.tolist(), places.tolist(), strict=True):
        first, last = divmod(place, len(allowed))
        if allowed[first] and allowed[last] and first <= last < first + longest:
            spans.append((first, last, value))
    return Window(spans, none)


def _merged(context: str, windows: list[tuple[Encoding, Window]], align_to_words: bool) -> list[dict[str, Any]]:
    """The answers that all windows of a context hold; the scores of equal ones add up."""
    by_text: dict[str, dict[str, Any]] = {}
    for row, window in windows:
        for first, last, score in window.spans:
            start, end = _characters(row, first, last, align_to_words)
            text = context[start:end]
            one = {"score": 0.0, "start": start, "end": end, "answer": text}
            by_text.setdefault(text.lower(), one)["score"] += score
    return list(by_text.values())


def _characters(row: Any, first: int, last: int, align_to_words: bool) -> tuple[int, int]:
    """Where tokens first … last of a window stand in the context."""
    if not align_to_words:
        return row.offsets[first][0], row.offsets[last][1]
    start, end = (row.word_to_chars(row.token_to_word(token), 1) for token in (first, last))
    return start[0], end[1]
