"""Scores of tokens to stretches of a text: named entities and answers, by the rules of transformers' pipelines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .tokenizer import XLMRobertaTokenizer

STRATEGIES = ("none", "simple", "first", "average", "max")


class Token(NamedTuple):
    """A token of a text with the score of every label; `inside`: it goes on with the word of the token before."""

    place: int
    word: str
    scores: list[float]
    start: int
    end: int
    inside: bool


def tokens_of(
    text: str, ids: Sequence[int], scores: Sequence[list[float]], offsets: Any, special: Any, words: XLMRobertaTokenizer
) -> list[Token]:
    """The tokens of one row that come from the text; an unknown one is a word of its own, as the text has it."""
    found = []
    for i, (token, (start, end)) in enumerate(zip(ids, offsets, strict=True)):
        if not special[i]:
            inside = start > 0 and " " not in text[start - 1 : start + 1]
            word = words.convert_ids_to_tokens(token)
            if token == words.unk_token_id:
                word, inside = text[start:end], False
            found.append(Token(i, word, scores[i], start, end, inside))
    return found


def entities(tokens: list[Token], strategy: str, labels: dict[int, str], words: XLMRobertaTokenizer) -> list[dict]:
    """The labels of tokens ("none"), or runs of one label ("simple"). With the others a word's tokens agree first: on
    the label of the first, of the surest ("max"), or that of the mean scores ("average")."""
    if strategy in ("none", "simple"):
        found = [_labelled([token], token.scores, token.word, labels) for token in tokens]
        if strategy == "simple":
            return _grouped(found, words)
        return [{**one, "index": token.place} for one, token in zip(found, tokens, strict=True)]
    merged = []
    for word in _words(tokens):
        text = words.convert_tokens_to_string([token.word for token in word])
        merged.append(_labelled(word, _agreed(word, strategy), text, labels))
    return _grouped(merged, words)


def _words(tokens: list[Token]) -> list[list[Token]]:
    found: list[list[Token]] = []
    for token in tokens:
        if found and token.inside:
            found[-1].append(token)
        else:
            found.append([token])
    return found


def _agreed(word: list[Token], strategy: str) -> list[float]:
    if strategy == "first":
        return word[0].scores
    if strategy == "max":
        return max((token.scores for token in word), key=max)
    return [sum(column) / len(word) for column in zip(*(token.scores for token in word), strict=True)]


def _labelled(tokens: list[Token], scores: list[float], word: str, labels: dict[int, str]) -> dict[str, Any]:
    best = max(range(len(scores)), key=scores.__getitem__)
    return {
        "entity": labels[best],
        "score": scores[best],
        "index": tokens[0].place,
        "word": word,
        "start": tokens[0].start,
        "end": tokens[-1].end,
    }


def _tag(label: str) -> tuple[bool, str]:
    """Whether the label begins an entity, and its kind: "B-PER" does; "I-PER", and a label without a mark, go on."""
    return label.startswith("B-"), label[2:] if label.startswith(("B-", "I-")) else label


def _grouped(found: list[dict[str, Any]], words: XLMRobertaTokenizer) -> list[dict[str, Any]]:
    """Neighbours of one kind as one entity, whose score is their mean."""
    runs: list[list[dict[str, Any]]] = []
    for one in found:
        begins, kind = _tag(one["entity"])
        if runs and not begins and _tag(runs[-1][-1]["entity"])[1] == kind:
            runs[-1].append(one)
        else:
            runs.append([one])
    return [
        {
            "entity_group": run[0]["entity"].split("-", 1)[-1],
            "score": sum(one["score"] for one in run) / len(run),
            "word": words.convert_tokens_to_string([one["word"] for one in run]),
            "start": run[0]["start"],
            "end": run[-1]["end"],
        }
        for run in runs
    ]


def without_overlaps(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of entities that overlap, since several windows saw them, the longest, and of equally long ones the surest."""
    kept: list[dict[str, Any]] = []
    for one in sorted(found, key=lambda one: one["start"]):
        if not kept or not kept[-1]["start"] <= one["start"] < kept[-1]["end"]:
            kept.append(one)
        elif _weight(one) > _weight(kept[-1]):
            kept[-1] = one
    return kept


def _weight(one: dict[str, Any]) -> tuple[int, float]:
    return one["end"] - one["start"], one["score"]


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
