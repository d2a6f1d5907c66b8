"""What `xlmr demo` shows of a model: words filled and translations found in sentences that it was never trained on."""

from __future__ import annotations

import random
from typing import Any

import torch

from xlmr import XLMRobertaForMaskedLM, XLMRobertaTokenizer
from xlmr.encode import pack
from xlmr.encoder import embed

from .evaluate import Question, Sentence, questions

PARTNER = 5  # a language is compared with the fifth after it: mostly one of another script


def filled(
    model: XLMRobertaForMaskedLM, tokenizer: XLMRobertaTokenizer, sentences: list[Sentence]
) -> list[dict[str, Any]]:
    """For each language the most probable word at one masked word, of those that are one piece of the vocabulary."""
    chosen: dict[str, tuple[Question, str, str]] = {}
    for sentence in random.Random(0).sample(sentences, len(sentences)):
        start, end = sentence.answers[-1]
        question = questions([sentence], tokenizer)[-1]
        if len(question.pieces) == 1:
            text = sentence.text[:start] + tokenizer.mask_token + sentence.text[end:]
            chosen[sentence.language] = question, text, sentence.text[start:end]
    packed = pack([question.ids for question, _, _ in chosen.values()], model.device)
    starts = zip(packed.cu_seqlens.tolist(), chosen.values(), strict=False)
    rows = torch.tensor([start + question.masked[0] for start, (question, _, _) in starts], device=model.device)
    scores, best = model.topk_packed(*packed, rows=rows, k=1)
    return [
        {
            "language": language,
            "text": text,
            "expected": word,
            "answer": tokenizer.decode([token]).strip(),
            "score": score,
            "right": token == question.pieces[0],
        }
        for (language, (question, text, word)), score, token in zip(
            chosen.items(), scores[:, 0].exp().tolist(), best[:, 0].tolist(), strict=True
        )
    ]


def nearest(
    model: XLMRobertaForMaskedLM, tokenizer: XLMRobertaTokenizer, sentences: list[Sentence]
) -> list[dict[str, Any]]:
    """For the sentences of each language whose translation is held out in another, the nearest there by cosine."""
    languages = list(dict.fromkeys(s.language for s in sentences))
    own = {language: [s for s in sentences if s.language == language] for language in languages}
    vectors = embed(model, tokenizer, [s.text for language in languages for s in own[language]])
    by_language = dict(zip(languages, vectors.split([len(own[language]) for language in languages]), strict=True))
    rows = []
    for number, language in enumerate(languages):
        other = languages[(number + PARTNER) % len(languages)]
        keys = {sentence.key for sentence in own[other]}
        indices = (by_language[language] @ by_language[other].T).argmax(dim=1).tolist()
        for sentence, found in zip(own[language], (own[other][i] for i in indices), strict=True):
            if sentence.key in keys:
                rows.append(
                    {
                        "language": language,
                        "text": sentence.text,
                        "other": other,
                        "nearest": found.text,
                        "right": found.key == sentence.key,
                    }
                )
    return rows
