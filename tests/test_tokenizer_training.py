"""train_new_from_iterator: a vocabulary of other texts, in a tokenizer that transformers loads."""

from pathlib import Path
from typing import Any

import pytest
import transformers

from xlmr import AddedToken, XLMRobertaTokenizer
from xlmr.demo import CHECKPOINT

TEXTS = Path(__file__).read_text(encoding="utf-8").splitlines() + ["Ｆｕｌｌ　ｗｉｄｔｈ ﬁ", "<mask>a<mask>b"] * 5


@pytest.fixture(scope="module")
def old() -> XLMRobertaTokenizer:
    tokenizer = XLMRobertaTokenizer.from_pretrained(CHECKPOINT, padding_side="left", model_max_length=30)
    tokenizer.add_tokens([AddedToken("<one>", lstrip=True), "two words"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<more>"]})
    return tokenizer


def same(ours: Any, theirs: Any) -> None:
    for text in [*TEXTS, "a <one> b two words <more><new> [MASK] c"]:
        if "＜" not in text:
            assert ours(text)["input_ids"] == theirs(text)["input_ids"]


def test_a_new_vocabulary_in_a_tokenizer_like_the_old(old: XLMRobertaTokenizer, tmp_path: Path) -> None:
    """Its rules of normalisation, its settings and added tokens, and a few of one's own."""
    given: dict[str, Any] = {"new_special_tokens": ["<new>"], "special_tokens_map": {"<mask>": "[MASK]"}}
    new = old.train_new_from_iterator([TEXTS[:20], TEXTS[20:]], 200, **given)
    assert (len(new), len(old.train_new_from_iterator(iter(TEXTS), 200))) == (200, 200)
    assert (new.padding_side, new.model_max_length, new.mask_token) == ("left", 30, "[MASK]")
    assert new.additional_special_tokens == ["<more>", "<new>"]
    assert new.added_tokens_decoder[new.convert_tokens_to_ids("<one>")] == AddedToken("<one>", lstrip=True)
    assert new.added_tokens_decoder[new.mask_token_id] == AddedToken(
        "[MASK]", lstrip=True, special=True, normalized=False
    )
    assert {"▁def", "▁Full"} <= new.get_vocab().keys() - old.get_vocab().keys()
    assert len(new.tokenize("train_new_from_iterator")) < len(old.tokenize("train_new_from_iterator"))
    assert new.tokenize("Ｆｕｌｌ <one> two words") == ["▁Full", "<one>", "two words"]
    new.save_pretrained(tmp_path)
    same(new, transformers.AutoTokenizer.from_pretrained(tmp_path))
    same(new, XLMRobertaTokenizer.from_pretrained(tmp_path))
    assert "▁def" not in old.get_vocab()


def test_what_cannot_be_learnt(old: XLMRobertaTokenizer) -> None:
    for texts, size, options, message in (
        ([], 300, {}, "cannot learn"),
        (TEXTS, 12, {}, "Vocabulary size is smaller than required_chars"),
        (TEXTS, 300, {"show_progress": True}, "unknown field name"),
        (TEXTS, -1, {}, "vocab_size is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            old.train_new_from_iterator(texts, size, **options)
