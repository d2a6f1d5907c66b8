"""Tokenizer files: what transformers wrote, what it reads, and what nobody should have written."""

import contextlib
import copy
import json
import pickle
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_oracle import LINES, WORDS, judge, nasty_texts, ordinary_texts, proto, reference

from xlmr import XLMRobertaTokenizer
from xlmr.sentencepiece_model import SentencePieceModel
from xlmr.tokenizer import AddedToken

MODEL, TOKENIZER, CONFIG = "sentencepiece.bpe.model", "tokenizer.json", "tokenizer_config.json"
TEXTS = [*LINES, "", "a <mask> b</s>c", "ｶﾞ ﬁ e\u0301 漢字", "new <tag> newer"]


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / MODEL
    path.write_bytes(proto())
    return path


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A directory that transformers 5 wrote: tokenizer.json and tokenizer_config.json."""
    reference(model_max_length=512).save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[XLMRobertaTokenizer, XLMRobertaTokenizer]:
    """The same tokenizer from a sentencepiece model and from a tokenizer.json."""
    directory = tmp_path_factory.mktemp("both")
    (directory / MODEL).write_bytes(proto())
    reference().save_pretrained(directory)
    return XLMRobertaTokenizer(directory / MODEL), XLMRobertaTokenizer(tokenizer_file=directory / TOKENIZER)


@given(text=nasty_texts | ordinary_texts)
@settings(max_examples=300)
def test_a_tokenizer_json_alone_gives_sentencepieces_ids(both: Any, text: str) -> None:
    from_model, from_json = both
    assert dict(from_json(text, return_offsets_mapping=True)) == dict(from_model(text, return_offsets_mapping=True))


@given(text=nasty_texts | ordinary_texts)
@settings(max_examples=100)
def test_a_tokenizer_json_without_rules_of_normalisation(both: Any, text: str) -> None:
    """As transformers 5.0 to 5.2 wrote it: the rules are lost, white space alone separates words."""
    _, whole = both
    ends = [{"id": i, "content": token} for i, token in ((0, "<s>"), (2, "</s>"))]
    content = whole._model.to_tokenizer_json(ends, "<s>", "</s>") | {"added_tokens": [], "post_processor": None}
    lost = {"type": "Replace", "pattern": {"String": " {2,}"}, "content": "▁"}
    strip = {"type": "Strip", "strip_left": False, "strip_right": True}
    content["normalizer"] = {"type": "Sequence", "normalizers": [strip, lost]}
    theirs = tokenizers.Tokenizer.from_str(json.dumps(content))
    text = re.sub("[\0<▁]", "", text)  # no names of special tokens, which are split off before, and no ▁ but for spaces
    ours = SentencePieceModel.from_tokenizer_json(content)
    assert ours.encode([text]) == [theirs.encode(text).ids]


@pytest.fixture(scope="module")
def lower(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """transformers' tokenizer with sentence-transformers' do_lower_case, ours of what it saved, and where."""
    theirs = reference()
    engine = theirs.backend_tokenizer
    rules = [tokenizers.normalizers.Lowercase(), engine.normalizer]
    engine.normalizer = tokenizers.normalizers.Sequence(rules)
    directory = tmp_path_factory.mktemp("lower")
    theirs.save_pretrained(directory)
    return theirs, XLMRobertaTokenizer.from_pretrained(directory), directory


cased_words = st.sampled_from([*WORDS, *map(str.upper, WORDS), *map(str.title, WORDS), "İIİ", "ΣΑΣ", "Å", "<mask>"])


@given(text=st.lists(cased_words, max_size=9).map(" ".join))
@settings(max_examples=100)
def test_lower_case_gives_the_reference_s_ids_and_offsets(lower: Any, text: str) -> None:
    theirs, ours, _ = lower
    assert dict(ours(text, return_offsets_mapping=True)) == dict(theirs(text, return_offsets_mapping=True))


def test_lower_case_is_saved(lower: Any, model_file: Path, tmp_path: Path) -> None:
    """In tokenizer.json alone: a sentencepiece model, which would be read in its stead, cannot say it."""
    theirs, _, directory = lower
    texts = ["PARIS İ", "ΣΑΣ <mask> Dog"]
    expected = theirs(texts).input_ids
    ours = XLMRobertaTokenizer(model_file, do_lower_case=True)
    assert ours(texts).input_ids == pickle.loads(pickle.dumps(ours))(texts).input_ids == expected
    (tmp_path / "saved").mkdir()
    shutil.copy(model_file, tmp_path / "saved")
    paths = ours.save_pretrained(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [TOKENIZER, CONFIG]
    assert sorted(paths) == [str(tmp_path / "saved" / name) for name in (TOKENIZER, CONFIG)]
    engine = tokenizers.Tokenizer.from_file(paths[0])
    assert [encoding.ids for encoding in engine.encode_batch(texts)] == expected
    assert XLMRobertaTokenizer.from_pretrained(tmp_path / "saved")(texts).input_ids == expected
    shutil.copy(directory / TOKENIZER, model_file.parent)  # both, as transformers 4 wrote them
    for config in ({}, {"added_tokens_decoder": {}}):
        (model_file.parent / CONFIG).write_text(json.dumps(config))
        assert XLMRobertaTokenizer.from_pretrained(model_file.parent)(texts).input_ids == expected


def test_a_tokenizer_json_gives_back_the_model(both: Any) -> None:
    from_model, from_json = both
    assert from_json.get_vocab() == from_model.get_vocab()
    rebuilt = sentencepiece.SentencePieceProcessor(model_proto=from_json._model.proto)
    pieces = range(len(judge()))
    assert [rebuilt.get_score(i) for i in pieces] == [judge().get_score(i) for i in pieces]
    assert [rebuilt.is_control(i) for i in pieces] == [judge().is_control(i) for i in pieces]


# There and back


def test_transformers_reads_what_is_saved(model_file: Path, tmp_path: Path) -> None:
    ours = XLMRobertaTokenizer(model_file, model_max_length=64, truncation_side="left", bos_token="[BOS]")
    ours.add_tokens(["new", AddedToken("newer", lstrip=True, normalized=False)])
    ours.add_special_tokens({"additional_special_tokens": ["<tag>"]})
    paths = ours.save_pretrained(tmp_path / "saved")
    assert sorted(Path(path).name for path in paths) == [MODEL, TOKENIZER, CONFIG]
    for theirs in (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "saved"),
        transformers.XLMRobertaTokenizer.from_pretrained(tmp_path / "saved"),
    ):
        assert len(theirs) == len(ours)
        assert (theirs.model_max_length, theirs.truncation_side) == (64, "left")
        assert theirs.special_tokens_map == ours.special_tokens_map
        assert theirs.all_special_tokens == ours.all_special_tokens
        texts = [text for text in TEXTS if "ｶﾞ" not in text]
        calls = [((texts,), {}), ((texts, texts[::-1]), {"truncation": True, "padding": True})]
        for arguments, options in calls:
            assert dict(ours(*arguments, **options)) == dict(theirs(*arguments, **options))
    (tmp_path / "saved" / MODEL).unlink()
    for twin in (
        XLMRobertaTokenizer.from_pretrained(tmp_path / "saved"),
        XLMRobertaTokenizer.from_pretrained(str(tmp_path / "saved")),
    ):
        assert dict(twin(TEXTS)) == dict(ours(TEXTS))


def test_what_transformers_saved_loads(tmp_path: Path) -> None:
    theirs = reference(model_max_length=77, padding_side="left")
    theirs.add_tokens(["new", transformers.AddedToken("newer", lstrip=True, normalized=False)])
    theirs.add_special_tokens({"extra_special_tokens": ["<tag>"], "sep_token": "<sep>"})
    theirs.save_pretrained(tmp_path)
    ours = XLMRobertaTokenizer.from_pretrained(tmp_path)
    assert (ours.model_max_length, ours.padding_side) == (77, "left")
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.extra_special_tokens == ["<tag>"]
    assert {i: vars(t) for i, t in ours.added_tokens_decoder.items()} == {
        i: {name: getattr(t, name) for name in vars(AddedToken("x"))} for i, t in theirs.added_tokens_decoder.items()
    }
    texts = [text for text in TEXTS if "ｶﾞ" not in text]
    assert dict(ours(texts, padding=True)) == dict(theirs(texts, padding=True))


def test_saving_again_changes_nothing_and_removes_what_is_stale(theirs: Path, tmp_path: Path) -> None:
    config = json.loads((theirs / CONFIG).read_text())
    (theirs / CONFIG).write_text(json.dumps({**config, "some_key": {"kept": True}, "mask_token": "[M]"}))
    (theirs / "special_tokens_map.json").write_text(json.dumps({"mask_token": {"content": "[M]", "lstrip": False}}))
    first = XLMRobertaTokenizer.from_pretrained(theirs)
    assert first.mask_token_id == len(first) - 1
    first.save_pretrained(theirs)
    assert not (theirs / "special_tokens_map.json").exists()
    assert json.loads((theirs / CONFIG).read_text())["some_key"] == {"kept": True}
    contents = {path.name: path.read_bytes() for path in theirs.iterdir()}
    second = XLMRobertaTokenizer.from_pretrained(theirs)
    assert dict(second(TEXTS)) == dict(first(TEXTS))
    second.save_pretrained(theirs)
    assert {path.name: path.read_bytes() for path in theirs.iterdir()} == contents


def test_directories_of_transformers_4(model_file: Path) -> None:
    """A bare config, and what was added in files of its own; the model file may come with a tokenizer.json or not."""
    directory, size = model_file.parent, len(judge()) + 2
    (directory / CONFIG).write_text(json.dumps({"model_max_length": 512, "sp_model_kwargs": {}}))
    mask = {"content": "<mask>", "lstrip": True, "normalized": True, "rstrip": False, "single_word": False}
    (directory / "special_tokens_map.json").write_text(
        json.dumps({"mask_token": mask, "cls_token": "<s>", "additional_special_tokens": ["<tag>"]})
    )
    (directory / "added_tokens.json").write_text(json.dumps({"<tag>": size, "new": size + 1, "<mask>": size - 1}))
    tokenizer = XLMRobertaTokenizer.from_pretrained(directory)
    assert (len(tokenizer), tokenizer.vocab_size, tokenizer.model_max_length) == (size + 2, size, 512)
    assert tokenizer.added_tokens_decoder[size - 1] == AddedToken(**mask, special=True)
    assert tokenizer.decode(tokenizer("new <tag> <mask>").input_ids, skip_special_tokens=True) == "new"
    added = [{"id": i, **vars(token)} for i, token in tokenizer.added_tokens_decoder.items()]
    described = tokenizer._model.to_tokenizer_json(added, "<s>", "</s>")
    (directory / "added_tokens.json").unlink()
    (directory / TOKENIZER).write_text(json.dumps(described))
    assert repr(XLMRobertaTokenizer.from_pretrained(directory)) == repr(tokenizer)


@pytest.mark.parametrize(
    ("declared", "config", "limit"),
    [
        (512, None, 512),
        (None, None, 10**30),
        (int(1e30), {"model_type": "xlm-roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        (None, {"model_type": "xlm-roberta", "max_position_embeddings": 8194}, 8192),
        (514, {"model_type": "xlm-roberta", "max_position_embeddings": 514}, 512),
        (128, {"model_type": "xlm-roberta", "max_position_embeddings": 514}, 128),
        (None, {"model_type": "bert", "max_position_embeddings": 512}, 10**30),
    ],
)
def test_the_limit_is_what_the_model_can_take(model_file: Path, declared: Any, config: Any, limit: int) -> None:
    directory = model_file.parent
    (directory / CONFIG).write_text(json.dumps({"model_max_length": declared}))
    if config:
        (directory / "config.json").write_text(json.dumps(config))
    loaded = XLMRobertaTokenizer.from_pretrained(directory).model_max_length
    assert loaded == limit or loaded > 10**20 < limit
    assert XLMRobertaTokenizer.from_pretrained(directory, model_max_length=99).model_max_length == 99


@pytest.mark.parametrize("declared", [{}, {"padding_side": "right"}, {"truncation_side": "left"}])
@pytest.mark.parametrize("left", [["padding"], ["truncation"], ["padding", "truncation"]])
def test_sides_are_those_of_the_tokenizer_json_unless_declared(
    theirs: Path, left: list[str], declared: dict[str, str]
) -> None:
    content = json.loads((theirs / TOKENIZER).read_text())
    cut = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    fill = {"direction": "Right", "strategy": {"Fixed": 9}, "pad_to_multiple_of": None, "pad_id": 1, "pad_type_id": 0}
    content |= {"truncation": cut, "padding": {**fill, "pad_token": "<pad>"}}
    for name in left:
        content[name]["direction"] = "Left"
    (theirs / TOKENIZER).write_text(json.dumps(content))
    (theirs / CONFIG).write_text(json.dumps({"model_max_length": 512, **declared}))
    ours = XLMRobertaTokenizer.from_pretrained(theirs)
    reference = transformers.XLMRobertaTokenizer.from_pretrained(theirs)
    for side in ("padding_side", "truncation_side"):
        assert getattr(ours, side) == getattr(reference, side)


# Files that nobody should have written

Change = Callable[[dict[str, Any]], Any]


def put(*path: Any) -> Change:
    """The change that sets content[path[0]][path[1]]… to the last of `path`."""

    def change(content: Any) -> None:
        *keys, last, value = path
        for key in keys:
            content = content[key]
        content[last] = value

    return change


def in_turn(*normalizers: Any) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": normalizers}


HOSTILE: list[tuple[Change, str]] = [
    (put("model", None), "model.vocab must be a list"),
    (put("model", "type", "BPE"), "is a BPE, XLM-R's is a Unigram"),
    (put("model", {"type": "WordPiece", "vocab": {}}), r"WordPiece, XLM-R's is a Unigram: .*xlmr.accelerate\(model\)"),
    (put("model", "byte_fallback", True), "must be a Unigram without byte fallback"),
    (put("model", "vocab", {}), "model.vocab must be a list"),
    (put("model", "vocab", []), "must be a list"),
    (put("model", "vocab", [0] * (2**20 + 1)), "holds 1048577 pieces: at most 1048576 are read"),
    (put("model", "vocab", 9, ["x"]), r"model.vocab\[9\] is \['x'\]"),
    (put("model", "vocab", 9, ["x", "y"]), r"model.vocab\[9\] is \['x', 'y'\]"),
    (put("model", "vocab", 9, [None, 0.5]), r"model.vocab\[9\]"),
    (put("model", "vocab", 9, ["x", 1e300]), r"model.vocab\[9\]"),
    (put("model", "vocab", 9, ["", -1.0]), "sentencepiece refuses the model"),
    (put("model", "vocab", 9, ["▁", -1.0]), "holds a piece twice"),
    (put("model", "vocab", 9, ["<pad>", -1.0]), "holds a piece twice"),
    (put("model", "vocab", 9, ["\ud800", -1.0]), "surrogate"),
    (put("model", "vocab", 1, ["[PAD]", 0.0]), "must start with <s>, <pad>, </s>, <unk>"),
    (put("model", "unk_id", 0), "unk_id 3"),
    (put("normalizer", {"type": "NFKC"}), "its normalizer has .*NFKC.*, which XLM-R does not use"),
    (lambda x: put("normalizer", in_turn(x["normalizer"], {"type": "Lowercase"}))(x), "normalizer has .*Lowercase"),
    (put("normalizer", {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "x"}), "normalizer has .*Replace"),
    (put("normalizer", {"type": "Replace", "pattern": {"String": " "}, "content": ""}), "normalizer has .*Replace"),
    (put("normalizer", "Precompiled"), "which is no component"),
    (put("normalizer", {"type": "Precompiled", "precompiled_charsmap": "*"}), "is not base64"),
    (put("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "sentencepiece refuses the model"),
    (put("pre_tokenizer", {"type": "ByteLevel"}), "its pre_tokenizer has .*ByteLevel"),
    (put("pre_tokenizer", {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never"}), "pre_tokenizer has"),
    (put("added_tokens", {}), "added_tokens must be a list"),
    (put("added_tokens", 4, "id", 10**12), r"'<mask>' id 1000000000000, but its id is"),
    (put("added_tokens", 4, "id", 3), "two added tokens the id 3"),
    (put("added_tokens", 4, "id", [3]), r"the id \[3\]; an integer"),
    (put("added_tokens", 4, "id", -1), "the id -1; an integer from 0 up"),
    (put("added_tokens", 4, "id", "4" * 5000), "the id '4444.*; an integer from 0 up"),
    (put("added_tokens", 4, "id", "\u0664"), "the id '\u0664'; an integer from 0 up"),
    (put("added_tokens", 4, "content", "x y"), "'x y' id .*, but the next free id is"),
    (put("added_tokens", 4, "content", ""), "a non-empty str is needed"),
    (put("added_tokens", 4, "content", ["x"]), "a non-empty str is needed"),
    (put("added_tokens", 4, "lstrip", "no"), "lstrip of the added token '<mask>' must be true or false"),
    (put("added_tokens", 3, {"id": 3}), "allowed: a str, an AddedToken or a dict"),
]


@pytest.mark.parametrize(("change", "message"), HOSTILE)
def test_a_hostile_tokenizer_json_is_refused(theirs: Path, change: Change, message: str) -> None:
    content = json.loads((theirs / TOKENIZER).read_text())
    change(content)
    (theirs / TOKENIZER).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        XLMRobertaTokenizer.from_pretrained(theirs)
    assert "\n" not in str(caught.value)


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"model_max_length": "many"}, r"gives 'many' \(str\) as model_max_length, which is of another type"),
    ({"model_max_length": -5}, "gives -5 as model_max_length"),
    ({"model_max_length": True}, r"gives True \(bool\) as model_max_length, which is of another type"),
    ({"add_prefix_space": False}, "add_prefix_space is False: XLM-R was trained with"),
    ({"padding_side": "middle"}, "padding_side is 'middle'"),
    ({"mask_token": 5}, "a token is 5; allowed"),
    ({"added_tokens_decoder": {"x": "y"}}, "the id 'x'; an integer"),
    ({"added_tokens_decoder": {"99999999999": {"content": "far"}}}, "id 99999999999, but the next free id is"),
    ({"added_tokens_decoder": {"0": {"content": "</s>"}}}, "'</s>' id 0, but its id is 2"),
    ({"added_tokens_decoder": {"0": {"content": "<s>"}, "00": {"content": "<s>"}}}, "two added tokens the id 00"),
    ({"added_tokens_decoder": {"0": {"content": "<s>"}, "1": {"content": "<s>"}}}, "'<s>' id 1, but its id is 0"),
    ({"added_tokens_decoder": []}, r"gives \[\] \(list\) as added_tokens_decoder"),
    ({"additional_special_tokens": 3}, r"gives 3 \(int\) as additional_special_tokens"),
    ({"additional_special_tokens": [3]}, "a token is 3; allowed"),
    ({"model_input_names": 3}, r"gives 3 \(int\) as model_input_names"),
]


@pytest.mark.parametrize(("config", "message"), CONFIGS)
def test_a_hostile_tokenizer_config_is_refused(model_file: Path, config: dict[str, Any], message: str) -> None:
    (model_file.parent / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        XLMRobertaTokenizer.from_pretrained(model_file.parent)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("special_tokens_map.json", {"additional_special_tokens": 3}, "as additional_special_tokens"),
        ("special_tokens_map.json", {"mask_token": {"text": "<mask>"}}, "a token is .*; allowed: a str"),
        ("added_tokens.json", {"new": [1]}, r"the id \[1\]; an integer"),
        ("added_tokens.json", {"new": 5}, "'new' id 5, but the next free id is"),
        ("added_tokens.json", [], "holds a JSON list"),
        (CONFIG, [], "holds a JSON list"),
    ],
)
def test_hostile_old_files_are_refused(model_file: Path, name: str, content: Any, message: str) -> None:
    (model_file.parent / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        XLMRobertaTokenizer.from_pretrained(model_file.parent)


def test_damaged_models_are_refused(model_file: Path) -> None:
    data = proto()
    unlike = data.replace(b"\x05<unk>", b"\x05<UNK>", 1)
    for damaged in (
        b"",
        b"\x00",
        data[:1000],
        data[: len(data) // 2],
        b"\x0a\xff\xff\xff\xff\x7f",
        b"\x80" * 10**6,
        b"{}" * 50,
        unlike,
    ):
        model_file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"sentencepiece") as caught:
            XLMRobertaTokenizer(model_file)
        assert str(model_file) in str(caught.value)
    generator = random.Random(0)
    for _ in range(200):  # one bit among the pieces: refused with a reason, or a model like any other
        position = generator.randrange(3000)
        model_file.write_bytes(
            data[:position] + bytes([data[position] ^ 1 << generator.randrange(8)]) + data[position + 1 :]
        )
        with contextlib.suppress(ValueError):
            XLMRobertaTokenizer(model_file)("la casa")
    model_file.write_bytes(b"\x0a" * (64 * 2**20 + 1))
    with pytest.raises(ValueError, match="larger than 67108864 bytes"):
        XLMRobertaTokenizer(model_file)


def test_a_stale_tokenizer_json_is_told(theirs: Path, model_file: Path) -> None:
    content = json.loads((theirs / TOKENIZER).read_text())
    content["model"]["vocab"].insert(-1, ["stale", -9.0])
    (theirs / TOKENIZER).write_text(json.dumps(content))
    model_file.rename(theirs / MODEL)
    with pytest.raises(ValueError, match="remove the one that is stale"):
        XLMRobertaTokenizer.from_pretrained(theirs)


def test_nothing_to_load(tmp_path: Path, theirs: Path) -> None:
    with pytest.raises(OSError, match=r"has neither sentencepiece.bpe.model nor tokenizer.json.*xlmr.acc"):
        XLMRobertaTokenizer.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="no-such-organisation/no-such-model"):
        XLMRobertaTokenizer.from_pretrained("no-such-organisation/no-such-model")
    with pytest.raises(TypeError, match="no_such_setting"):
        XLMRobertaTokenizer.from_pretrained(theirs, no_such_setting=1)
    with pytest.raises(ValueError, match="give vocab_file"):
        XLMRobertaTokenizer()


def test_a_save_that_fails_leaves_the_old_files(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = XLMRobertaTokenizer(model_file)
    tokenizer.save_pretrained(tmp_path / "saved")
    before = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    changed = copy.deepcopy(tokenizer)
    changed.add_tokens(["new"])
    changed.init_kwargs["odd"] = object()
    with pytest.raises(TypeError, match="JSON"):
        changed.save_pretrained(tmp_path / "saved")
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == before


def test_what_transformers_is_told_about_its_tokenizers(model_file: Path, tmp_path: Path) -> None:
    path = {"pretrained_model_name_or_path": model_file.parent}
    how = {"use_fast": False, "trust_remote_code": True, "sp_model_kwargs": {}, "do_lower_case": False, "legacy": True}
    how |= {"add_prefix_space": True, "from_slow": True, "verbose": False, "use_auth_token": None}
    elsewhere = {"max_length": 3, "padding": True, "truncation": True, "return_tensors": "pt", "config": None}
    tokenizer = XLMRobertaTokenizer.from_pretrained(**path, **how, **elsewhere)
    assert tokenizer("Paris").input_ids == XLMRobertaTokenizer.from_pretrained(model_file.parent)("Paris").input_ids
    tokenizer.save_pretrained(tmp_path / "saved", legacy_format=False, push_to_hub=False)
    assert not any(name in (tmp_path / "saved" / CONFIG).read_text() for name in how)
    with pytest.raises(ValueError, match="add_prefix_space is False: "):
        XLMRobertaTokenizer.from_pretrained(**path, add_prefix_space=False)
    with pytest.raises(TypeError, match="unexpected keyword argument 'legacy_formats'"):
        tokenizer.save_pretrained(tmp_path / "saved", legacy_formats=False)
