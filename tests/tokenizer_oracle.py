"""The tokenizer's two judges: a small sentencepiece model, and transformers' tokenizer with the same vocabulary."""

import functools
import io
import re
from typing import Any

import sentencepiece
import transformers
from hypothesis import strategies as st

LINES = """
the quick brown fox jumps over the lazy dog
Paris is the capital of France and Berlin is the capital of Germany
el perro y el gato duermen en la casa grande
le chat est sur la table et le chien dort
der Hund schläft im großen Haus und die Katze spielt
собака спит в большом доме а кошка играет на столе
η γάτα κοιμάται στο σπίτι
القط نائم على الطاولة
החתול ישן על השולחן
बिल्ली मेज पर सो रही है
แมวนอนอยู่บนโต๊ะ
猫在桌子上睡觉 狗在大房子里
猫がテーブルの上で寝ています ガギグゲゴ
고양이가 테이블 위에서 자고 있다
con mèo ngủ trên bàn tiếng Việt
1234567890 12.5 % $ € 👍 ! ? , . : ; ' " ( ) [ ] { } < > / | @ # & * _ - + =
""".strip().splitlines()

# Everything that normalisation, segmentation or an offset could stumble over, and some that no vocabulary holds.
NASTY = [
    *("\u0301", "\u0302", "\u0323", "e\u0301", "é", "a\u0302\u0301", "e\u0323\u0302", "\u200d", "\ufe0f", "각"),
    *("ᄀ\u1161\u11a8", "👩\u200d👩\u200d👧", "🏳\ufe0f\u200d🌈", "👍🏽", "ｶﾞ", "ﾊﾟ", "ガ", "ก\u0e47", "ก\u0e4d\u0e32"),
    *("क\u094dष", "\u0640", "ﬁ", "㍿", "½", "Å", "①", "ﷺ", "İ", "ß", "ſ", "ℌ", "𝒳", "𐍈", "漢字", "＜s＞", "ａｂｃ"),
    *("１２", "…", "—", "“", "<s", "<", ">", "%", "▁", "▁▁", " ", "  ", "\t", "\n", "\r\n", "\x00", "\x01", "\x1f"),
    *("\x7f", "\x85", "\xa0", "\xad", "\u200b", "\u2028", "\u3000", "\ufeff", "\ufffd", "\U0010ffff"),
]
SPECIAL = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
WORDS = " ".join(LINES[:12]).split()

nasty_texts = st.lists(st.sampled_from(NASTY) | st.sampled_from(WORDS) | st.text(max_size=3), max_size=12).map("".join)
ordinary_words = st.sampled_from([*WORDS, "Zürich", "東京", "<mask>", "x<mask>", "</s>y", "xyzzy"])
ordinary_texts = st.lists(ordinary_words, max_size=9).map(" ".join)  # the two judges agree on these


@functools.cache
def proto() -> bytes:
    """A sentencepiece model with the settings of the real one."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 3), model_writer=model, vocab_size=400, hard_vocab_limit=False,
        character_coverage=0.98, normalization_rule_name="nmt_nfkc", num_threads=1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


@functools.cache
def judge() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=proto())


def reference(**settings: Any) -> transformers.XLMRobertaTokenizer:
    """transformers' tokenizer; made anew, since tests change it."""
    data, sp = proto(), judge()
    start = data.index(b"\x08nmt_nfkc\x12") + 10  # the charsmap stands behind a length in three bytes
    size = data[start] & 127 | (data[start + 1] & 127) << 7 | data[start + 2] << 14
    return transformers.XLMRobertaTokenizer(
        vocab=[
            *((token, 0.0) for token in SPECIAL),
            *((sp.id_to_piece(i), sp.get_score(i)) for i in range(3, len(sp))),
            ("<mask>", 0.0),
        ],
        _spm_precompiled_charsmap=data[start + 3 : start + 3 + size],
        mask_token=transformers.AddedToken("<mask>", lstrip=True, special=True),
        **settings,
    )


def expected_ids(text: str) -> list[int]:
    """What the definition says: sentencepiece's ids of each stretch between special tokens, in fairseq's numbering."""
    sp, ids, end = judge(), [], 0
    for match in [*re.finditer(r"<s>|<pad>|</s>|<unk>|\s*<mask>", text), None]:
        stretch = text[end : match.start() if match else len(text)]
        ids += [index + 1 if index else 3 for index in sp.encode(stretch)]
        if match:
            ids.append(SPECIAL.get(match[0], len(sp) + 1))
            end = match.end()
    return [0, *ids, 2]
