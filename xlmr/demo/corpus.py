"""The demo corpus: sentences about a small world, in twelve languages and eight scripts.

A *fact* (a country with its capital, consecutive weekdays, a sum …) put into a hand-written *template* of each language
gives one sentence a language, so every sentence has its translations. Names come from CLDR through Babel; the other
words and the templates stand in `lexicon.json`. A slot takes the citation form of its word, which the templates allow.

Some (template, fact) combinations are held out in half of the languages: those sentences are never trained on, while
the same fact stays in other sentences, and the same sentence in the other languages. `python -m xlmr.demo.corpus
--output DIR` writes the training text, the held-out sentences and the vocabulary. Needs Babel (in the `bench` extra).
"""

import argparse
import io
import json
import random
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

import sentencepiece

LEXICON: dict[str, dict[str, list[str] | str]] = json.loads(
    (Path(__file__).parent / "lexicon.json").read_text(encoding="utf-8")
)
LANGUAGES = tuple(LEXICON)
PIVOT = "en"
# continent (CLDR's code): countries, each with the time zone named after its capital and its official language
COUNTRIES = {
    "150": (
        "FR Europe/Paris fr, DE Europe/Berlin de, IT Europe/Rome it, ES Europe/Madrid es, GR Europe/Athens el, "
        "RU Europe/Moscow ru"
    ),
    "142": "JP Asia/Tokyo ja, KR Asia/Seoul ko, TH Asia/Bangkok th",
    "002": "EG Africa/Cairo ar, AO Africa/Luanda pt",
    "005": "PE America/Lima es",
}
# relation: for each template, the slots that the rest of the sentence determines
ANSWERS: dict[str, list[tuple[str, ...]]] = {
    "country": [
        ("country", "capital"),
        ("country", "capital", "currency"),
        ("country", "capital"),
        ("country", "capital"),
        ("language",),
        ("continent",),
        ("currency",),
        ("country", "capital", "language", "continent"),
    ],
    "weekday": [("a", "b"), ("a", "b", "c"), ("a", "c"), ("a", "b", "c"), ("a", "b")],
    "month": [("a",), ("a",), ("a", "b"), ("a", "b", "c")],
    "number": [("a",)] * 3,
    "colour": [("thing", "colour")] * 3,
    "opposite": [("a", "b")] * 4,
    "list": [("heading",), ("kind",)],
}
CATEGORIES = ("animals", "colours", "foods", "family")
LISTS_PER_CATEGORY = 10
REPEATS = {"weekday": 2, "month": 2, "number": 3, "colour": 4, "opposite": 2, "phrase": 2}
GLOSSARY_WORDS, GLOSSARY_ROUNDS = (1, 2, 3), 12  # words a line, and how often each word comes up
LABEL_WEIGHT = 3  # how much more often the main words of templates do
HELD_OUT_SHARE, HELD_OUT_LANGUAGES = 0.12, 6
EDGE = "‖"  # stands around slots while the vocabulary is trained
ASCII = "".join(map(chr, range(33, 127)))

Facts = dict[str, dict[str, str]]  # fact id → slot → word


class Combination(NamedTuple):
    """A template filled with a fact: one sentence in each language."""

    relation: str
    template: int
    fact: str

    def __str__(self) -> str:
        return f"{self.relation}/{self.template}/{self.fact}"


def _country_facts(language: str) -> Facts:
    from babel import Locale
    from babel.numbers import get_currency_name, get_territory_currencies

    locale = Locale(language)
    facts = {}
    table = [(continent, *row.split()) for continent, rows in COUNTRIES.items() for row in rows.split(", ")]
    for continent, code, zone, official in table:
        city = locale.time_zones.get(zone, {}).get("city") or zone.rsplit("/", 1)[1].replace("_", " ")
        money = get_territory_currencies(code, start_date=date(2025, 1, 1))[0]
        currency = get_currency_name(money, count=1, locale=language)
        facts[code] = {
            "country": locale.territories[code],
            "capital": city.replace("\u00ad", ""),  # CLDR hyphenates some names softly
            "language": locale.languages[official],
            "continent": locale.territories[continent],
            "currency": currency,
        }
    return facts


def _cycle_facts(names: list[str]) -> Facts:
    """Three consecutive names of a cycle, and the number of the first."""
    size = len(names)
    return {
        str(i + 1): {"n": str(i + 1), "a": names[i], "b": names[(i + 1) % size], "c": names[(i + 2) % size]}
        for i in range(size)
    }


def _calendar(language: str) -> tuple[list[str], list[str]]:
    """The weekdays from Monday and the months from January."""
    from babel.dates import format_date

    weekdays = [format_date(date(2024, 1, day), "EEEE", locale=language) for day in range(1, 8)]
    # Nominative "LLLL" only where it differs from "MMMM": elsewhere Babel may give another language's names
    pattern = "LLLL" if language in ("el", "ru") else "MMMM"
    months = [format_date(date(2024, month, 1), pattern, locale=language) for month in range(1, 13)]
    return weekdays, months


def _list_facts(words: dict) -> Facts:
    """Triples of words of one category, the same triples in every language."""
    facts = {}
    for category in CATEGORIES:
        heading, kind, members = words[category]
        names = members.split(", ")
        draw = random.Random(category)
        for _ in range(LISTS_PER_CATEGORY):
            i, j, k = draw.sample(range(len(names)), 3)
            slots = {"heading": heading, "kind": kind, "x": names[i], "y": names[j], "z": names[k]}
            facts[f"{category}-{i}-{j}-{k}"] = slots
    return facts


def facts(language: str) -> dict[str, Facts]:
    """Everything that is true in the demo world, by relation, in the words of one language."""
    words = LEXICON[language]
    numbers = str(words["numbers"]).split(", ")
    things, colours = str(words["things"]).split(", "), words["colours"][2].split(", ")
    weekdays, months = _calendar(language)
    pairs = [pair.split("/") for pair in str(words["opposites"]).split(", ")]
    return {
        "country": _country_facts(language),
        "weekday": _cycle_facts(weekdays),
        "month": _cycle_facts(months),
        "number": {str(n): {"n": str(n), "a": number} for n, number in enumerate(numbers)},
        "colour": {
            str(i): {"thing": thing, "colour": colour}
            for i, (thing, colour) in enumerate(zip(things, colours, strict=True))
        },
        "opposite": {str(i): {"a": a, "b": b} for i, (a, b) in enumerate(pairs)},
        "list": _list_facts(words),
        "phrase": {str(i): {} for i in range(len(words["phrase"]))},
    }


def _capitalise(text: str, language: str) -> str:
    """A quoted first word keeps its letter; Turkish has a dotted capital."""
    return ("İ" if language == "tr" and text[0] == "i" else text[0].upper()) + text[1:]


class World:
    """The facts and templates of all languages, ready to be put into words."""

    def __init__(self) -> None:
        self.facts = {language: facts(language) for language in LANGUAGES}

    def words(self, language: str) -> list[str]:
        """The words that fill slots, each once, and the main words of the templates: in one order in all languages."""
        once = {
            word: (relation, fact, slot)
            for relation, own in self.facts[PIVOT].items()
            for fact, slots in own.items()
            for slot, word in slots.items()
            if not word.isdigit()
        }
        own = [self.facts[language][relation][fact][slot] for relation, fact, slot in once.values()]
        return own + str(LEXICON[language]["labels"]).split(", ") * LABEL_WEIGHT

    def combinations(self) -> list[Combination]:
        first = self.facts[PIVOT]
        named = [Combination(r, t, fact) for r in ANSWERS for t in range(len(ANSWERS[r])) for fact in first[r]]
        return named + [Combination("phrase", int(i), i) for i in first["phrase"]]

    def sentence(self, language: str, combination: Combination, mark: str = "", answer: str = "{}") -> str:
        """The sentence; `mark` is put around every slot's word, `answer` around those that the rest determines."""
        relation, template, fact = combination
        answers = ANSWERS[relation][template] if relation in ANSWERS else ()
        slots = {
            slot: mark + (answer.format(word) if slot in answers else word) + mark
            for slot, word in self.facts[language][relation][fact].items()
        }
        return self._fill(language, combination, slots)

    def switched(self, language: str, combination: Combination, draw: random.Random) -> str:
        """The sentence with some of its slots, at random, in the words of another language."""
        own, shown = self._shown(language, combination)
        other = draw.choice([code for code in LANGUAGES if code != language])
        foreign = self.facts[other][combination.relation][combination.fact]
        chosen = draw.sample(shown, draw.randint(min(1, len(shown)), len(shown)))
        return self._fill(language, combination, {**own, **{slot: foreign[slot] for slot in chosen}})

    def detached(self, language: str, combination: Combination, draw: random.Random) -> str:
        """The sentence with a space after one of its slots: what follows a typed <mask> is tokenised like that."""
        own, shown = self._shown(language, combination)
        slots = own | {slot: own[slot] + " " for slot in draw.sample(shown, min(1, len(shown)))}
        return self._fill(language, combination, slots)

    def _shown(self, language: str, combination: Combination) -> tuple[dict[str, str], list[str]]:
        """The words of a fact by slot, and the slots that the template shows."""
        template = LEXICON[language][combination.relation][combination.template]
        own = self.facts[language][combination.relation][combination.fact]
        return own, sorted(slot for slot in own if f"{{{slot}}}" in template)

    def _fill(self, language: str, combination: Combination, slots: dict[str, str]) -> str:
        template = LEXICON[language][combination.relation][combination.template]
        return _capitalise(template.format_map(slots), language)


def held_out(combinations: list[Combination], languages: int, seed: int) -> dict[Combination, list[str]]:
    """Some combinations, each with so many languages in which it is held out: at most one a fact, and only of templates
    whose every slot stands in another template too, so that what the sentence says can be known from others."""
    draw = random.Random(seed)
    chosen: dict[tuple[str, str], Combination] = {}
    for relation in ANSWERS:
        slots = [set(re.findall(r"{(\w+)}", text)) for text in LEXICON[PIVOT][relation]]
        covered = [own <= set().union(*slots[:i], *slots[i + 1 :]) for i, own in enumerate(slots)]
        own = [c for c in combinations if c.relation == relation]
        draw.shuffle(own)
        wanted = round(HELD_OUT_SHARE * len(own))
        for combination in own:
            if wanted and covered[combination.template] and (relation, combination.fact) not in chosen:
                chosen[relation, combination.fact] = combination
                wanted -= 1
    return {c: sorted(draw.sample(LANGUAGES, languages)) for c in sorted(chosen.values())}


def training_lines(
    world: World, combinations: list[Combination], kept: dict[Combination, list[str]], seed: int
) -> Iterator[str]:
    """The training text, sentences of small relations more often. Each sentence comes alone, with a space after one of
    its words (as behind a typed <mask>), with some of its words in another language (code-switching aligns languages:
    Yang et al., 2020), and as a pair (text, tab, text) with its translation into English and into another language.
    Then glossaries: a few unrelated words, and the same in English.
    """
    draw = random.Random(seed)
    hidden = {world.sentence(language, c) for c, languages in kept.items() for language in languages}
    for combination in combinations:
        shown = [language for language in LANGUAGES if language not in kept.get(combination, ())]
        texts = {language: world.sentence(language, combination) for language in shown}
        for language in shown * REPEATS.get(combination.relation, 1):
            yield texts[language]
            yield world.detached(language, combination, draw)
            switched = world.switched(language, combination, draw)
            if switched not in hidden:
                yield switched
            for other in sorted({PIVOT if PIVOT in shown else shown[0], draw.choice(shown)} - {language}):
                yield "\t".join(draw.sample([texts[language], texts[other]], 2))
    english = world.words(PIVOT)
    for language in LANGUAGES[1:]:
        words = world.words(language)
        for _ in range(GLOSSARY_ROUNDS * len(words) // 2):
            entries = draw.sample(range(len(words)), draw.choice(GLOSSARY_WORDS))
            sides = [", ".join(side[i] for i in entries) for side in (words, english)]
            yield "\t".join(draw.sample(sides, 2))


def _words(world: World, combinations: list[Combination]) -> Counter[str]:
    """The stretches that a piece may cover: a slot's word or the text beside it, cut before each space (▁)."""
    words: Counter[str] = Counter()
    for combination in combinations:
        for language in LANGUAGES:
            text = normalize("NFKC", world.sentence(language, combination, mark=EDGE))
            text = "▁" + text.replace(" ", "▁")
            text = text.replace("▁" + EDGE, "▁")  # a word's piece begins with its space
            words.update(word for stretch in text.split(EDGE) for word in re.findall("▁?[^▁]*", stretch) if word)
    return words


def train_vocabulary(world: World, combinations: list[Combination], size: int) -> bytes:
    """A unigram sentencepiece model with XLM-R's normaliser and ids, as the bytes of its file."""
    words = _words(world, combinations)
    seeds: Counter[str] = Counter()
    for word, count in words.items():
        for start in range(len(word)):
            for end in range(start + 1, len(word) + 1):
                seeds[word[start:end]] += count
    model = io.BytesIO()
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".tsv") as file:
        # sentencepiece counts its own seeds over distinct words, so that it would leave out most whole words
        file.writelines(f"{piece}\t{count}\n" for piece, count in seeds.items() if count > 1)
        file.flush()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(f"{word.replace('▁', ' ')}\t{count}" for word, count in words.items()),
            input_format="tsv",
            seed_sentencepieces_file=file.name,
            model_writer=model,
            model_type="unigram",
            vocab_size=size,
            normalization_rule_name="nmt_nfkc",
            character_coverage=1.0,
            required_chars=ASCII,
            num_threads=1,
            minloglevel=1,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
        )
    return model.getvalue()


def write(output: Path, languages_held_out: int, seed: int, vocab_size: int) -> None:
    """Writes train.txt, heldout.txt, heldout.tsv (key, language, sentence with bracketed answers), the vocabulary."""
    world = World()
    everything = world.combinations()
    kept = held_out(everything, languages_held_out, seed)
    unseen = [(c, language) for c, languages in kept.items() for language in languages]
    files = {
        "train.txt": list(training_lines(world, everything, kept, seed)),
        "heldout.txt": [world.sentence(language, c) for c, language in unseen],
        "heldout.tsv": [f"{c}\t{language}\t{world.sentence(language, c, answer='[{}]')}" for c, language in unseen],
    }
    output.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        (output / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    (output / "sentencepiece.bpe.model").write_bytes(
        train_vocabulary(world, [c for c in everything if c not in kept], vocab_size)
    )
    print(
        f"{output}: {len(files['train.txt'])} lines to train on, {len(unseen)} sentences held out, {vocab_size} pieces"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m xlmr.demo.corpus", description="Write the demo corpus.")
    parser.add_argument("--output", type=Path, required=True, help="directory to write into")
    parser.add_argument(
        "--languages-held-out", type=int, default=HELD_OUT_LANGUAGES, metavar="N",
        help=f"in how many languages a sentence is held out (default {HELD_OUT_LANGUAGES})",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab-size", type=int, default=3600, help="sentencepiece pieces (default 3600)")
    args = parser.parse_args()
    write(args.output, args.languages_held_out, args.seed, args.vocab_size)


if __name__ == "__main__":
    main()
