"""token-classification: the named entities of a text, by the rules of transformers' pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch

from ..batch_encoding import BatchEncoding
from ..heads import XLMRobertaForTokenClassification
from ..texts import is_words
from ..tokenizer import XLMRobertaTokenizer
from .base import Pipeline

STRATEGIES = ("none", "simple", "first", "average", "max")


class TokenClassificationPipeline(Pipeline):
    """The named entities of a text, as transformers.TokenClassificationPipeline gives them."""

    task = "token-classification"
    model_class = XLMRobertaForTokenClassification

    def __call__(self, inputs: Any, *, is_split_into_words: bool = False, **options: Any) -> Any:
        """As Pipeline. With `is_split_into_words` a text is a list of words: given is one, whose answer comes in a list
        as in the reference, or a list of several."""
        if not is_split_into_words:
            return super().__call__(inputs, **options)
        texts = [inputs] if is_words(inputs) else inputs
        if not isinstance(texts, list | tuple) or not all(map(is_words, texts)):
            raise TypeError(f"inputs is {inputs!r:.80}: a list of words, or a list of such, is needed")
        return self.answers(list(texts), **{**self.options, **self._checked(options)})

    @torch.no_grad()
    def answers(
        self,
        texts: list[Any],
        aggregation_strategy: str = "none",
        ignore_labels: Sequence[str] = ("O",),
        stride: int | None = None,
        delimiter: str | None = None,
        batch_size: int | None = None,
    ) -> list[Any]:
        """For each text a list, with "none" of a {entity, score, index, word, start, end} a token, else of
        {entity_group, score, word, start, end}. start and end count characters of the text.

        aggregation_strategy: one of STRATEGIES, see `entities`. ignore_labels: are left out. stride: a longer text
        is read in windows that share so many tokens; without it, it is truncated, as in the reference. delimiter: what
        stands between the words of a text that is a list of them, by default a space.
        """
        strategy = _checked_strategy(aggregation_strategy, stride)
        batch = self._windows(texts, stride)
        logits = self._token_logits(batch["input_ids"], self.model.classifier, batch_size)
        owners = batch.get("overflow_to_sample_mapping", range(len(texts)))
        offsets = batch["offset_mapping"]
        if _of_words(texts):
            texts, offsets = _joined(texts, " " if delimiter is None else delimiter, batch, owners)
        columns = (batch["input_ids"], offsets, batch["special_tokens_mask"])
        key = "entity" if strategy == "none" else "entity_group"
        found: list[list[list[dict[str, Any]]]] = [[] for _ in texts]
        for owner, row, ids, spans, special in zip(owners, logits, *columns, strict=True):
            tokens = tokens_of(texts[owner], ids, row.softmax(-1).tolist(), spans, special, self.tokenizer)
            rows = entities(tokens, strategy, self.model.config.id2label, self.tokenizer)
            found[owner].append([one for one in rows if one[key] not in ignore_labels])
        return [without_overlaps(chain.from_iterable(own)) if len(own) > 1 else own[0] for own in found]

    def _windows(self, texts: list[Any], stride: int | None) -> BatchEncoding:
        """The texts tokenised: longer ones in windows that share `stride` tokens, or without it truncated."""
        several: dict[str, Any] = {} if stride is None else {"stride": stride, "return_overflowing_tokens": True}
        return self.tokenizer(
            texts,
            is_split_into_words=_of_words(texts),
            truncation=True,
            max_length=self._longest,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            **several,
        )


def _checked_strategy(given: Any, stride: int | None) -> str:
    strategy = str(given).lower()
    if strategy not in STRATEGIES:
        raise ValueError(f"aggregation_strategy is {given!r}: allowed are {', '.join(map(repr, STRATEGIES))}")
    if stride is not None and strategy == "none":
        raise ValueError("stride needs an aggregation_strategy that makes entities, which windows may share")
    return strategy


def _of_words(texts: list[Any]) -> bool:
    """Whether texts are lists of words."""
    return any(not isinstance(text, str) for text in texts)


def _joined(texts: Any, delimiter: str, batch: BatchEncoding, owners: Iterable[int]) -> tuple[list[str], list[list]]:
    """Texts that are lists of words as strings, and where in these the tokens of each row of `batch` stand."""
    starts = [list(accumulate((len(word) + len(delimiter) for word in words), initial=0)) for words in texts]
    offsets = []
    for row, owner in enumerate(owners):
        begins = [0 if word is None else starts[owner][word] for word in batch.word_ids(row)]
        spans = zip(begins, batch["offset_mapping"][row], strict=True)
        offsets.append([(begin + first, begin + last) for begin, (first, last) in spans])
    return [delimiter.join(words) for words in texts], offsets


class Token(NamedTuple):
    """A token of a text with the score of every label; `inside`: it goes on with the word of the token before."""

    place: int
    word: str
    scores: list[float]
    start: int
    end: int
    inside: bool


def tokens_of(
    text: str,
    ids: Sequence[int],
    scores: Sequence[list[float]],
    offsets: Any,
    special: Any,
    tokenizer: XLMRobertaTokenizer,
) -> list[Token]:
    """The tokens of one row that come from the text; an unknown one is a word of its own, as the text has it."""
    found = []
    for i, (token, (start, end)) in enumerate(zip(ids, offsets, strict=True)):
        if not special[i]:
            inside = start > 0 and " " not in text[start - 1 : start + 1]
            word = tokenizer.convert_ids_to_tokens(token)
            if token == tokenizer.unk_token_id:
                word, inside = text[start:end], False
            found.append(Token(i, word, scores[i], start, end, inside))
    return found


def entities(tokens: list[Token], strategy: str, labels: dict[int, str], tokenizer: XLMRobertaTokenizer) -> list[dict]:
    """The labels of tokens ("none"), or runs of one label ("simple"). With the others a word's tokens agree first: on
    the label of the first, of the surest ("max"), or that of the mean scores ("average")."""
    if strategy in ("none", "simple"):
        found = [_labelled([token], token.scores, token.word, labels) for token in tokens]
        return found if strategy == "none" else _grouped(found, tokenizer)
    merged = []
    for word in _words(tokens):
        text = tokenizer.convert_tokens_to_string([token.word for token in word])
        merged.append(_labelled(word, _agreed(word, strategy), text, labels))
    return _grouped(merged, tokenizer)


def _words(tokens: list[Token]) -> list[list[Token]]:
    """The tokens of each word."""
    found: list[list[Token]] = []
    for token in tokens:
        if found and token.inside:
            found[-1].append(token)
        else:
            found.append([token])
    return found


def _agreed(word: list[Token], strategy: str) -> list[float]:
    """The scores that the tokens of a word agree on."""
    if strategy == "first":
        return word[0].scores
    if strategy == "max":
        return max((token.scores for token in word), key=max)
    return [sum(column) / len(word) for column in zip(*(token.scores for token in word), strict=True)]


def _labelled(tokens: list[Token], scores: list[float], word: str, labels: dict[int, str]) -> dict[str, Any]:
    """The best of the labels for a token, or for the tokens of a word."""
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


def _grouped(found: list[dict[str, Any]], tokenizer: XLMRobertaTokenizer) -> list[dict[str, Any]]:
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
            "word": tokenizer.convert_tokens_to_string([one["word"] for one in run]),
            "start": run[0]["start"],
            "end": run[-1]["end"],
        }
        for run in runs
    ]


def without_overlaps(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Several windows may have seen an entity: of those that overlap the longest, of equally long ones the surest."""
    kept: list[dict[str, Any]] = []
    for one in sorted(found, key=lambda one: one["start"]):
        if not kept or not kept[-1]["start"] <= one["start"] < kept[-1]["end"]:
            kept.append(one)
        elif _weight(one) > _weight(kept[-1]):
            kept[-1] = one
    return kept


def _weight(one: dict[str, Any]) -> tuple[int, float]:
    return one["end"] - one["start"], one["score"]
