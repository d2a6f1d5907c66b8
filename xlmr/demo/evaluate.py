"""What the demo checkpoint knows about sentences it was never trained on: `python -m xlmr.demo.evaluate`.

Filled: every word that the rest of its sentence determines (bracketed in heldout.tsv) is masked in turn, one mask for
each of its pieces, and counts as right when the most probable piece is the right one at each. Words of one piece are
asked again with <mask> typed into the text. Retrieved: the share of sentences whose nearest held-out sentence of
another language (cosine of `xlmr embed`'s vectors) is their translation, over all ordered pairs of languages, so in
both directions.
"""

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch

from xlmr import XLMRobertaForMaskedLM, XLMRobertaTokenizer
from xlmr.encode import batches, pack
from xlmr.encoder import embed

from . import CHECKPOINT, HELD_OUT

BATCH_TOKENS = 8192
ANSWER = re.compile(r"\[([^]]*)\]")


class Sentence(NamedTuple):
    """A held-out sentence; `key` is shared by its translations, `answers` are character spans of `text`."""

    key: str
    language: str
    text: str
    answers: list[tuple[int, int]]


class Question(NamedTuple):
    """A sentence with one word masked: token ids, the masked positions, the right pieces."""

    language: str
    ids: list[int]
    masked: list[int]
    pieces: list[int]


def read(path: Path) -> list[Sentence]:
    """The held-out sentences of a file of lines key, language, text with its answers in brackets."""
    sentences = []
    for line in path.read_text(encoding="utf-8").splitlines():
        key, language, marked = line.split("\t")
        spans = [(m.start() - 2 * i, m.end() - 2 * i - 2) for i, m in enumerate(ANSWER.finditer(marked))]
        sentences.append(Sentence(key, language, ANSWER.sub(r"\1", marked), spans))
    return sentences


def typed(asked: list[Question], sentences: list[Sentence], tokenizer: XLMRobertaTokenizer) -> list[Question]:
    """Of the questions `asked` those about one piece, with <mask> typed into the text: what follows begins anew."""
    spans = [(s.text, start, end) for s in sentences for start, end in s.answers]
    single = [(q, *span) for q, span in zip(asked, spans, strict=True) if len(q.pieces) == 1]
    rows = tokenizer([f"{text[:start]}{tokenizer.mask_token}{text[end:]}" for _, text, start, end in single])
    masks = [ids.index(tokenizer.mask_token_id) for ids in rows["input_ids"]]
    return [q._replace(ids=ids, masked=[m]) for (q, *_), ids, m in zip(single, rows["input_ids"], masks, strict=True)]


def questions(sentences: list[Sentence], tokenizer: XLMRobertaTokenizer) -> list[Question]:
    """Each answer of each sentence masked in turn."""
    encoded = tokenizer([s.text for s in sentences], return_offsets_mapping=True)
    asked = []
    for sentence, ids, offsets in zip(sentences, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        for start, end in sentence.answers:
            masked = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
            hidden = [tokenizer.mask_token_id if i in masked else token for i, token in enumerate(ids)]
            asked.append(Question(sentence.language, hidden, masked, [ids[i] for i in masked]))
    return asked


@torch.no_grad()
def fill(model: XLMRobertaForMaskedLM, asked: list[Question]) -> list[bool]:
    """Whether the most probable pieces at a question's masks are the right ones, for each question."""
    right = [False] * len(asked)
    for batch in batches([len(q.ids) for q in asked], BATCH_TOKENS):
        packed = pack([asked[i].ids for i in batch], model.device)
        starts = packed.cu_seqlens.tolist()
        rows = [start + p for start, i in zip(starts, batch, strict=False) for p in asked[i].masked]
        _, best = model.topk_packed(*packed, rows=torch.tensor(rows, device=model.device), k=1)
        guesses = iter(best.squeeze(-1).tolist())
        for i in batch:
            right[i] = [next(guesses) for _ in asked[i].pieces] == asked[i].pieces
    return right


def retrieve(
    model: XLMRobertaForMaskedLM, tokenizer: XLMRobertaTokenizer, sentences: list[Sentence]
) -> dict[tuple[str, str], float]:
    """For each ordered pair of languages, of the sentences whose translation is held out there too the share whose
    nearest neighbour, among all held-out sentences of the other language, is that translation."""
    texts: dict[str, dict[str, str]] = defaultdict(dict)
    for sentence in sentences:
        texts[sentence.language][sentence.key] = sentence.text
    vectors = {language: embed(model, tokenizer, list(own.values())).float() for language, own in texts.items()}
    shares = {}
    for source, own in texts.items():
        for target, others in texts.items():
            if source != target:
                nearest = (vectors[source] @ vectors[target].T).argmax(dim=1).tolist()
                found = list(others.values())
                pairs = zip(nearest, own, strict=True)
                hits = [found[i] == others[key] for i, key in pairs if key in others]
                shares[source, target] = sum(hits) / len(hits)
    return shares


def evaluate(model: XLMRobertaForMaskedLM, tokenizer: XLMRobertaTokenizer, sentences: list[Sentence]) -> dict:
    """Shares filled (of all words, and of those that are a single piece) and retrieved, also by language."""
    asked = questions(sentences, tokenizer)
    right = fill(model, asked)
    by_hand = fill(model, typed(asked, sentences, tokenizer))
    shares = retrieve(model, tokenizer, sentences)
    languages = list(dict.fromkeys(s.language for s in sentences))

    def filled(language: str | None = None, single: bool = False) -> float:
        kept = [
            hit
            for hit, q in zip(right, asked, strict=True)
            if language in (None, q.language) and not (single and len(q.pieces) > 1)
        ]
        return sum(kept) / len(kept)

    def retrieved(language: str) -> float:
        return sum(s for pair, s in shares.items() if language in pair) / (2 * (len(languages) - 1))

    return {
        "sentences": len(sentences),
        "words": len(asked),
        "filled": filled(),
        "filled_single_piece": filled(single=True),
        "filled_typed": sum(by_hand) / len(by_hand),
        "retrieved": sum(shares.values()) / len(shares),
        "languages": {
            code: {"filled": filled(code), "filled_single_piece": filled(code, True), "retrieved": retrieved(code)}
            for code in languages
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m xlmr.demo.evaluate", description="Evaluate the demo checkpoint.")
    parser.add_argument("--model", default=CHECKPOINT, help="checkpoint directory (default: the embedded one)")
    parser.add_argument("--held-out", type=Path, default=HELD_OUT, help="sentences (default: the embedded ones)")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16 … (default: the checkpoint's)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    model = XLMRobertaForMaskedLM.from_pretrained(args.model, dtype=args.dtype)
    figures = evaluate(model, XLMRobertaTokenizer.from_pretrained(args.model), read(args.held_out))
    if args.json:
        print(json.dumps(figures))
        return
    print(f"{figures['sentences']} held-out sentences, {figures['words']} words that the rest determines\n")
    print("          filled  (single piece)  retrieved")
    for name, row in {**figures["languages"], "all": figures}.items():
        print(f"{name:8}{row['filled']:8.1%}{row['filled_single_piece']:16.1%}{row['retrieved']:11.1%}")
    print(f"\nsingle pieces with <mask> typed into the text: {figures['filled_typed']:.1%}")


if __name__ == "__main__":
    main()
