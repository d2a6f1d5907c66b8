"""xlmr.demo: the corpus generator, and what the committed checkpoint knows."""

import re
from pathlib import Path
from types import ModuleType

import pytest

from xlmr import XLMRobertaForMaskedLM, XLMRobertaTokenizer
from xlmr.demo import CHECKPOINT, HELD_OUT
from xlmr.demo.evaluate import evaluate, questions, read

LIMIT = 5_000_000  # bytes of everything in xlmr/demo


def test_the_demo_is_small() -> None:
    files = [path for path in CHECKPOINT.parent.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= LIMIT


def test_checkpoint_knows_sentences_it_never_saw() -> None:
    model, tokenizer = (
        XLMRobertaForMaskedLM.from_pretrained(CHECKPOINT),
        XLMRobertaTokenizer.from_pretrained(CHECKPOINT),
    )
    figures = evaluate(model, tokenizer, read(HELD_OUT))
    assert len(figures["languages"]) >= 12
    assert figures["filled"] >= 0.8
    assert figures["filled_typed"] >= 0.8
    assert figures["retrieved"] >= 0.7


def test_answers_are_the_bracketed_words(tmp_path: Path) -> None:
    (tmp_path / "sentences.tsv").write_text("k/0/a\ten\t[Paris] is the capital of [France].\n", encoding="utf-8")
    [sentence] = read(tmp_path / "sentences.tsv")
    assert sentence.text == "Paris is the capital of France."
    assert [sentence.text[a:b] for a, b in sentence.answers] == ["Paris", "France"]
    tokenizer = XLMRobertaTokenizer.from_pretrained(CHECKPOINT)
    paris, france = questions([sentence], tokenizer)
    whole = tokenizer(sentence.text)["input_ids"]
    for question, word in ((paris, "Paris"), (france, "France")):
        assert tokenizer.decode(question.pieces) == word
        restored = [*question.ids]
        for position, piece in zip(question.masked, question.pieces, strict=True):
            assert restored[position] == tokenizer.mask_token_id
            restored[position] = piece
        assert restored == whole


def test_vocabulary_has_the_ids_of_xlm_r() -> None:
    tokenizer = XLMRobertaTokenizer.from_pretrained(CHECKPOINT)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, len(tokenizer) - 1]) == [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        "<mask>",
    ]


@pytest.fixture(scope="module")
def corpus() -> ModuleType:
    pytest.importorskip("babel", reason="the corpus is made of Babel's CLDR names")
    from xlmr.demo import corpus

    return corpus


@pytest.fixture(scope="module")
def written(corpus: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    corpus.write(directory, corpus.HELD_OUT_LANGUAGES, seed=0, vocab_size=3600)
    return directory


def test_corpus_is_deterministic(corpus: ModuleType, written: Path, tmp_path: Path) -> None:
    corpus.write(tmp_path, corpus.HELD_OUT_LANGUAGES, seed=0, vocab_size=3600)
    for name in ("train.txt", "heldout.txt", "heldout.tsv"):
        assert (written / name).read_bytes() == (tmp_path / name).read_bytes()
    pieces = [vocabulary(directory / "sentencepiece.bpe.model") for directory in (written, tmp_path)]
    assert pieces[0] == pieces[1]


def test_corpus_is_the_one_the_checkpoint_was_made_of(written: Path) -> None:
    import babel

    if babel.__version__ != "2.18.0":
        pytest.skip(f"the checkpoint's names are those of Babel 2.18.0, this is {babel.__version__}")
    assert (written / "heldout.tsv").read_bytes() == HELD_OUT.read_bytes()
    assert vocabulary(written / "sentencepiece.bpe.model") == vocabulary(CHECKPOINT / "sentencepiece.bpe.model")


def test_held_out_sentences_are_never_trained_on(written: Path) -> None:
    train = {
        text for line in (written / "train.txt").read_text(encoding="utf-8").splitlines() for text in line.split("\t")
    }
    held = read(written / "heldout.tsv")
    assert not train & {sentence.text for sentence in held}
    languages = {key: {s.language for s in held if s.key == key} for key in {s.key for s in held}}
    assert {len(own) for own in languages.values()} == {6}


def test_held_out_words_are_known_from_other_sentences(written: Path) -> None:
    train = (written / "train.txt").read_text(encoding="utf-8").lower()
    for sentence in read(written / "heldout.tsv"):
        for start, end in sentence.answers:
            assert sentence.text[start:end].lower() in train


def test_languages_have_the_same_templates_and_words(corpus: ModuleType) -> None:
    pivot, *others = corpus.LEXICON.values()
    for words in others:
        for name, own in pivot.items():
            assert [shape(text) for text in listed(words[name])] == [shape(text) for text in listed(own)]
    world = corpus.World()
    assert len({len(world.words(language)) for language in corpus.LANGUAGES}) == 1


def vocabulary(path: Path) -> set[str]:
    """The pieces; sentencepiece leaves open how those of equal probability are ordered."""
    return set(XLMRobertaTokenizer(path).get_vocab())


def listed(entry: str | list[str]) -> list[str]:
    return [entry] if isinstance(entry, str) else entry


def shape(text: str) -> list[str] | int:
    """The slots of a template; for a list of words, how many."""
    return sorted(re.findall(r"{\w+}", text)) or ("," in text and len(text.split(", ")))
