"""XLMRobertaConfig against transformers' class: fields, files, labels, refusals."""

import inspect
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

import xlmr
from xlmr import XLMRobertaConfig
from xlmr.activations import ACTIVATIONS
from xlmr.config import ACTIVATIONS as ALLOWED

# config.json of xlm-roberta-base as transformers 4.x left it on the hub, and further keys that files of 4.x have
RELEASED = {
    "_name_or_path": "somewhere",
    "architectures": ["XLMRobertaForMaskedLM"],
    "attention_probs_dropout_prob": 0.1,
    "bos_token_id": 0,
    "classifier_dropout": None,
    "eos_token_id": 2,
    "gradient_checkpointing": False,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "id2label": {"0": "no", "1": "maybe", "2": "yes"},
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "label2id": {"no": 0, "maybe": 1, "yes": 2},
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 514,
    "model_type": "xlm-roberta",
    "nested": {"a": [1, {"b": None}]},
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "output_past": True,
    "pad_token_id": 1,
    "position_embedding_type": "absolute",
    "problem_type": "multi_label_classification",
    "torch_dtype": "float16",
    "transformers_version": "4.17.0.dev0",
    "type_vocab_size": 1,
    "use_cache": True,
    "vocab_size": 250002,
}


def common(config: Any) -> dict[str, Any]:
    """What must be equal in our configuration and in transformers'."""
    return {k: v for k, v in config.to_dict().items() if k not in ("transformers_version", "_name_or_path")}


def write(path: Path, values: Any) -> Path:
    path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
    return path


def test_defaults_are_the_references() -> None:
    assert common(XLMRobertaConfig()) == common(transformers.XLMRobertaConfig())
    for config in (XLMRobertaConfig(ours=1), transformers.XLMRobertaConfig(ours=1)):
        assert [name in config for name in ("hidden_size", "ours", "theirs")] == [True, True, False]


def test_a_file_of_4x_reads_as_transformers_reads_it_and_is_written_back(tmp_path: Path) -> None:
    write(tmp_path / "config.json", RELEASED)
    config = XLMRobertaConfig.from_pretrained(tmp_path)
    assert common(config) == common(transformers.XLMRobertaConfig.from_pretrained(tmp_path))
    assert (config.dtype, config.num_labels, config.nested) == (torch.float16, 3, RELEASED["nested"])
    config.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again/config.json").read_text(encoding="utf-8"))
    expected = {**RELEASED, "dtype": "float16", "tie_word_embeddings": True, "is_decoder": False}
    expected["add_cross_attention"] = False
    del expected["torch_dtype"], expected["_name_or_path"]
    assert written == expected
    assert XLMRobertaConfig.from_pretrained(tmp_path / "again") == config


fields = st.fixed_dictionaries(
    {},
    optional={
        "vocab_size": st.integers(2, 10**6),
        "num_attention_heads": st.sampled_from([1, 2, 12]),
        "num_hidden_layers": st.integers(0, 48),
        "hidden_act": st.sampled_from(ALLOWED),
        "hidden_dropout_prob": st.sampled_from([0, 0.25, 1.0]),
        "classifier_dropout": st.none() | st.floats(0, 1),
        "layer_norm_eps": st.floats(1e-12, 1e-3),
        "eos_token_id": st.none() | st.integers(0, 9) | st.lists(st.integers(0, 9), min_size=1, max_size=3),
        "is_decoder": st.booleans(),
        "tie_word_embeddings": st.booleans(),
        "output_hidden_states": st.booleans(),
        "return_dict": st.booleans(),
        "chunk_size_feed_forward": st.integers(0, 8),
        "dtype": st.sampled_from([None, "float32", "bfloat16"]),
        "num_labels": st.integers(2, 5),
        "problem_type": st.sampled_from([None, "regression", "single_label_classification"]),
        "architectures": st.just(["XLMRobertaModel"]),
        "a key of nobody": st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x, max_size=3)),
    },
)


@given(fields)
def test_both_libraries_read_what_the_other_writes(values: dict[str, Any]) -> None:
    ours, theirs = XLMRobertaConfig(**values), transformers.XLMRobertaConfig(**values)
    assert common(ours) == common(theirs)
    texts = [json.loads(c.to_json_string()) for c in (ours, theirs)]
    assert texts[0] == {k: v for k, v in texts[1].items() if k != "transformers_version"}
    assert XLMRobertaConfig.from_dict(texts[0]) == ours
    assert json.loads(ours.to_json_string(use_diff=False)) == json.loads(json.dumps(ours.to_dict()))


def test_the_presets_have_the_released_models_sizes() -> None:
    """Parameters with the pooler, as counted for the released checkpoints (bge-m3 for the long one)."""
    presets = XLMRobertaConfig.base, XLMRobertaConfig.large, XLMRobertaConfig.long
    with torch.device("meta"):
        counts = [xlmr.XLMRobertaModel(preset()).num_parameters() for preset in presets]
    assert counts == [278_043_648, 559_890_432, 567_754_752]
    assert [preset().max_length for preset in presets] == [512, 512, 8192]
    assert XLMRobertaConfig.long(vocab_size=9, num_labels=7).num_labels == 7


def test_every_activation_that_is_allowed_exists() -> None:
    assert set(ALLOWED) == set(ACTIVATIONS)


@pytest.mark.parametrize(
    "values",
    [{"num_labels": 3}, {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}, {}],
)
def test_labels_follow_num_labels_as_in_the_reference(values: dict[str, Any]) -> None:
    ours, theirs = XLMRobertaConfig(**values), transformers.XLMRobertaConfig(**values)
    for config in (ours, theirs):
        config.num_labels = 3  # keeps the names of three labels
    assert (ours.id2label, ours.label2id) == (theirs.id2label, theirs.label2id)
    for config in (ours, theirs):
        config.num_labels = 4
    assert (ours.id2label, ours.label2id) == (theirs.id2label, theirs.label2id)


def test_labels_that_disagree(caplog: pytest.LogCaptureFixture) -> None:
    assert XLMRobertaConfig(id2label={0: "a", 1: "b"}).label2id == {"a": 0, "b": 1}
    assert not caplog.records
    assert XLMRobertaConfig(id2label={0: "a", 1: "b"}, num_labels=3).id2label[2] == "LABEL_2"
    assert XLMRobertaConfig(id2label={0: "a", 1: "b"}, label2id={"a": 1, "b": 0}).label2id == {"a": 1, "b": 0}
    assert XLMRobertaConfig(id2label={1: "a", 2: "b"}).num_labels == 2
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 3


class OwnConfig(XLMRobertaConfig):
    def __init__(self, crf: bool = False, **rest: Any):
        super().__init__(**rest)
        self.crf = crf


def test_help_shows_the_fields_that_may_be_given() -> None:
    shown, own = inspect.signature(XLMRobertaConfig).parameters, inspect.signature(OwnConfig).parameters
    assert shown["vocab_size"].default == 30522
    assert [*shown][:2] == ["model_type", "vocab_size"]
    assert [*own] == ["crf", "rest"]


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path / "config.json", RELEASED)
    read = XLMRobertaConfig.from_pretrained
    assert read(path, num_labels=5).num_labels == 5
    assert read(path, id2label={0: "x"}).label2id == {"x": 0}
    assert read(path, torch_dtype="bfloat16").dtype == read(path, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert read(path, output_past=False).output_past is False
    assert XLMRobertaConfig.from_dict({"max_length": 20}).max_length == 510  # a setting of text generation is dropped
    with pytest.raises(TypeError, match="'num_layers' is no field of XLMRobertaConfig; is 'num_labels' meant"):
        read(path, num_layers=3)
    with pytest.raises(TypeError, match="'rest' is no field of OwnConfig"):
        OwnConfig.from_pretrained(path, rest=2)
    for kind in (transformers.XLMRobertaConfig, XLMRobertaConfig):
        config, unused = kind.from_pretrained(path, return_unused_kwargs=True, rest=2, hidden_dropout_prob=0.3)
        assert (config.hidden_dropout_prob, unused) == (0.3, {"rest": 2})
    own = OwnConfig.from_pretrained(path, crf=True)
    own.save_pretrained(tmp_path / "own")
    assert own.crf is OwnConfig.from_pretrained(tmp_path / "own").crf is True
    values = {"nested": {"a": []}}
    XLMRobertaConfig(**values).nested["a"].append(1)
    assert values == {"nested": {"a": []}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": "768"}, "hidden_size is '768'; it must be an integer from 1"),
        ({"hidden_size": -768}, "hidden_size is -768"),
        ({"hidden_size": 768.0}, "hidden_size is 768.0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"vocab_size": 10**1000}, "vocab_size is 1000"),
        ({"hidden_size": 770}, "hidden_size 770 is not a multiple of num_attention_heads 12"),
        ({"pad_token_id": None}, "pad_token_id is None"),
        ({"pad_token_id": 40_000}, "pad_token_id 40000 is outside of a vocabulary of 30522"),
        ({"max_position_embeddings": 2}, "max_position_embeddings is 2"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id is"),
        ({"hidden_act": "gelu_11"}, "hidden_act is 'gelu_11'; allowed: 'gelu', "),
        ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob is 1.5"),
        ({"is_decoder": 1}, "is_decoder is 1; allowed: True, False"),
        ({"dtype": "int8"}, "dtype is 'int8'; allowed: float32"),
        ({"torch_dtype": 16}, "dtype is 16"),
        ({"num_labels": -1}, "num_labels is -1"),
        ({"num_labels": 10**12}, "num_labels is 1000000000000"),
        ({"id2label": ["a"]}, "id2label is"),
        ({"id2label": {"0": "a"}, "label2id": "a"}, "label2id is 'a'"),
        ({"id2label": {"one": "a"}}, "id2label has 'one': 'a'"),
        ({"id2label": {"0": ["a"]}}, "id2label has '0'"),
        ({"problem_type": "multi"}, "problem_type is 'multi'"),
        ({"num_labels": 1, "problem_type": "single_label_classification"}, "needs num_labels > 1"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'; allowed: 'absolute'"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads is"),
        ({"use_return_dict": True}, "'use_return_dict' cannot be a configuration key"),
        ({"to_dict": 1}, "'to_dict' cannot be a configuration key"),
        ({"__class__": 1}, "'__class__' cannot be a configuration key"),
        ({"model_type": "xlm-roberta-xl"}, "model_type is 'xlm-roberta-xl'.*normalise before attention"),
        ({"model_type": "gpt2"}, "model_type is 'gpt2' .another architecture.; allowed: 'xlm-roberta', 'roberta'"),
        ({"model_type": ["xlm-roberta"]}, "model_type is"),
        ({"architectures": True}, "architectures is True; it must be a list of names"),
        ({"architectures": ["XLMRobertaModel", 1]}, "architectures is"),
    ],
)
def test_a_wrong_value_is_refused_by_its_name(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        XLMRobertaConfig(**values)
    path = write(tmp_path / "config.json", values)
    with pytest.raises(ValueError, match=message) as caught:
        XLMRobertaConfig.from_pretrained(tmp_path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_keys_that_mean_nothing_here_are_kept_whatever_they_are(tmp_path: Path) -> None:
    given = {"self": 1, "cls": 2, "values": 3, "overrides": 4, "": 5, "a b": 6, "auto_map": 7}
    write(tmp_path / "config.json", given)
    assert XLMRobertaConfig.from_pretrained(tmp_path).to_dict().items() >= given.items()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_numbers_are_finite(value: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"layer_norm_eps is (inf|nan)"):
        XLMRobertaConfig(layer_norm_eps=value)
    with pytest.raises(ValueError, match="Out of range float"):
        XLMRobertaConfig(extra=value).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_invalid_change_is_not_saved(tmp_path: Path) -> None:
    config = XLMRobertaConfig()
    config.save_pretrained(tmp_path)
    config.hidden_size = "768"  # type: ignore[assignment]
    with pytest.raises(ValueError, match="hidden_size is '768'"):
        config.save_pretrained(tmp_path)
    assert XLMRobertaConfig.from_pretrained(tmp_path) == XLMRobertaConfig()


def test_how_transformers_computes_attention_is_taken_and_not_written() -> None:
    config = XLMRobertaConfig(attn_implementation="eager")
    assert (config._attn_implementation, XLMRobertaConfig()._attn_implementation) == ("eager", "sdpa")
    assert XLMRobertaConfig.from_dict({}, attn_implementation="eager")._attn_implementation == "eager"
    assert "attn" not in config.to_json_string(use_diff=False)
    assert config._commit_hash is None  # what transformers 4's pipelines read
    assert "_commit_hash" not in XLMRobertaConfig.from_dict({"_commit_hash": "1f"}).to_dict()
    assert config == XLMRobertaConfig()
    model = xlmr.XLMRobertaModel(XLMRobertaConfig(hidden_size=12, num_hidden_layers=0))
    model.set_attn_implementation("flash_attention_2")
    assert model.config._attn_implementation == "flash_attention_2"


def test_no_configuration_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no config\.json in"):
        XLMRobertaConfig.from_pretrained(tmp_path)
    write(tmp_path / "config.json", "{" + '"a":{' * 3000 + "}" * 3001)
    with pytest.raises(ValueError, match=r"nested too deeply|not valid JSON"):
        XLMRobertaConfig.from_pretrained(tmp_path)
    write(tmp_path / "config.json", {})  # model_type may be missing
    assert XLMRobertaConfig.from_pretrained(tmp_path) == XLMRobertaConfig()


def test_methods_and_keywords_of_the_reference(tmp_path: Path) -> None:
    found = []
    for kind in (transformers.XLMRobertaConfig, XLMRobertaConfig):
        config = kind(vocab_size=99)
        config.update({"hidden_size": 24, "num_labels": 3})
        config.to_json_file(tmp_path / f"{kind.__module__}.json")
        config.save_pretrained(save_directory=tmp_path, push_to_hub=False)
        how = {
            "finetuning_task": "ner",
            "trust_remote_code": True,
            "attn_implementation": "sdpa",
            "force_download": False,
        }
        config = kind.from_pretrained(pretrained_model_name_or_path=tmp_path, **how)
        assert not hasattr(config, "trust_remote_code")
        found.append((config.hidden_size, config.num_labels, config.vocab_size))
    assert found[0] == found[1]
    assert XLMRobertaConfig.from_json_file(tmp_path / "xlmr.config.json") == XLMRobertaConfig.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="unexpected keyword argument 'push'"):
        XLMRobertaConfig().save_pretrained(tmp_path, push=True)
