"""The pipelines against transformers' on one checkpoint of random weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import xlmr

FRENCH, CHINESE = "La <mask> de la France est Paris.", "法国的首都是<mask>。"
TWICE = "The <mask> of France is <mask>."
LONG = "The <mask> of France is Paris. " * 20
TEXTS = [FRENCH, "<mask>", TWICE, CHINESE, "عاصمة <mask> هي باريس.", "The capital of France is Paris. <mask>"]


def same(ours: Any, theirs: Any) -> None:
    """Equal structure, types and strings; numbers to fp32's accuracy through this model."""
    assert type(ours) is type(theirs)
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        ours, theirs = list(ours.values()), list(theirs.values())
    if isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for our, their in zip(ours, theirs, strict=True):
            same(our, their)
    elif isinstance(theirs, Tensor):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=2e-5)
    else:
        assert ours == theirs


@pytest.fixture(scope="module")
def fill(checkpoint: Path) -> Any:
    return xlmr.pipeline("fill-mask", checkpoint, device="cpu")


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Any:
    return transformers.pipeline("fill-mask", str(checkpoint), device="cpu")


@pytest.fixture(scope="module")
def extract(checkpoint: Path) -> Any:
    return xlmr.pipeline("feature-extraction", checkpoint, device="cpu")


@pytest.fixture(scope="module")
def reference_extract(checkpoint: Path) -> Any:
    return transformers.pipeline("feature-extraction", str(checkpoint), device="cpu")


@pytest.mark.parametrize(
    ("inputs", "options"),
    [
        (FRENCH, {}),
        ([FRENCH], {}),
        (TEXTS, {}),
        (TEXTS, {"batch_size": 2, "top_k": 1}),
        (TWICE, {"top_k": 3}),
        (CHINESE, {"targets": "法"}),
        (TEXTS, {"targets": ["法", "capital", "法", "▁is", "Париж Paris"], "top_k": 3}),
        (FRENCH, {"targets": ["▁is", ""]}),
        (LONG, {"tokenizer_kwargs": {"truncation": True}, "top_k": 2}),
        (FRENCH, {"tokenizer_kwargs": {"padding": "max_length", "max_length": 40}}),
        (FRENCH, {"tokenizer_kwargs": {"add_special_tokens": False}}),
        ([], {}),
    ],
)
def test_fill_mask_gives_what_the_reference_gives(fill: Any, reference: Any, inputs: Any, options: Any) -> None:
    same(fill(inputs, **options), reference(inputs, **options) if inputs else [])
    same(xlmr.pipeline("fill-mask", fill.model, fill.tokenizer, **options)(inputs), fill(inputs, **options))


@pytest.mark.parametrize(
    ("inputs", "options"),
    [
        ("The capital of France is Paris.", {}),
        (TEXTS, {}),
        ("", {"return_tensors": True}),
        (["", "is"], {"return_tensors": True}),
        (TEXTS, {"return_tensors": True, "batch_size": 1}),
        ([LONG], {"truncation": True}),
        (LONG, {"tokenize_kwargs": {"truncation": True, "max_length": 7}}),
    ],
)
def test_feature_extraction_gives_what_the_reference_gives(
    extract: Any, reference_extract: Any, inputs: Any, options: Any
) -> None:
    same(extract(inputs, **options), reference_extract(inputs, **options))


def test_features_of_padding_are_zeros(extract: Any) -> None:
    plain = extract(FRENCH, return_tensors=True)
    padded = extract(FRENCH, return_tensors=True, tokenize_kwargs={"padding": "max_length", "max_length": 40})
    assert padded.shape == (1, 40, 32)
    assert torch.equal(padded[:, : plain.shape[1]], plain)
    assert not padded[:, plain.shape[1] :].any()


def test_only_the_masked_rows_reach_the_vocabulary(fill: Any) -> None:
    multiplied = []

    def vocab_topk(x: Tensor, *rest: Any) -> Any:
        multiplied.append(len(x))
        return before.vocab_topk(x, *rest)

    before = fill.model.ops
    fill.model.ops = replace(before, vocab_topk=vocab_topk)
    fill(TEXTS)
    fill.model.ops = before
    assert sum(multiplied) == sum(text.count("<mask>") for text in TEXTS)


def test_an_unknown_target_is_announced(fill: Any, caplog: pytest.LogCaptureFixture) -> None:
    fill(FRENCH, targets=["Paris France"])
    assert "'Paris France' is no token of the vocabulary: its first one" in caplog.text


@pytest.mark.parametrize(
    ("inputs", "options", "error", "message"),
    [
        (["a <mask>", "no mask"], {}, ValueError, "the text 'no mask' has no <mask>: put one"),
        (LONG, {}, ValueError, r"has \d+ tokens, the model takes at most 48: .*truncation=True"),
        (FRENCH, {"topk": 3}, TypeError, "'topk' is no option of fill-mask: allowed are top_k, targets"),
        (FRENCH, {"top_k": 0}, ValueError, r"top_k is 0: allowed are 1 to \d+"),
        (FRENCH, {"top_k": 10**6}, ValueError, "top_k is 1000000: allowed are 1 to"),
        (FRENCH, {"targets": []}, ValueError, "targets names no word"),
        (FRENCH, {"batch_size": 0}, ValueError, "batch_size is 0"),
        (7, {}, TypeError, "inputs is 7: a string or a list of strings is needed"),
        ([FRENCH, 7], {}, TypeError, "a string or a list of strings is needed"),
        (
            LONG,
            {"tokenizer_kwargs": {"truncation": True, "return_overflowing_tokens": True}},
            ValueError,
            "each text whole",
        ),
    ],
)
def test_fill_mask_refuses(fill: Any, inputs: Any, options: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        fill(inputs, **options)


def test_pipeline_refuses(fill: Any, extract: Any, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'fill' is no task: allowed are 'fill-mask', 'feature-extraction'"):
        xlmr.pipeline("fill", checkpoint)
    with pytest.raises(TypeError, match=r"fill-mask needs an xlmr\.XLMRobertaForMaskedLM"):
        xlmr.pipeline("fill-mask", extract.model.base_model, extract.tokenizer)
    with pytest.raises(ValueError, match="a model was given without its tokenizer"):
        xlmr.pipeline("fill-mask", fill.model)
    with pytest.raises(TypeError, match="'top_n' is no option of fill-mask"):
        xlmr.pipeline("fill-mask", checkpoint, top_n=3)
    with pytest.raises(ValueError, match="truncation is given twice"):
        extract("a", truncation=True, tokenize_kwargs={"truncation": True})
    with pytest.raises(OSError, match="nowhere"):
        xlmr.pipeline("fill-mask", tmp_path / "nowhere")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
@pytest.mark.parametrize("device", [0, "cuda", torch.device("cuda", 1)])
def test_pipeline_refuses_a_gpu_that_is_not_there(checkpoint: Path, device: Any) -> None:
    with pytest.raises(ValueError, match="PyTorch sees no GPU here"):
        xlmr.pipeline("fill-mask", checkpoint, device=device)


@pytest.mark.parametrize("problem", [None, "multi_label_classification", "regression"])
@pytest.mark.parametrize("options", [{}, {"top_k": 1}, {"top_k": None}, {"top_k": 2, "function_to_apply": "none"}])
def test_text_classification_answers_as_the_reference(
    checkpoint: Path, tmp_path: Path, problem: Any, options: Any
) -> None:
    head = transformers.XLMRobertaForSequenceClassification
    head.from_pretrained(checkpoint, num_labels=3, problem_type=problem).save_pretrained(tmp_path)
    words = transformers.AutoTokenizer.from_pretrained(checkpoint)
    words.save_pretrained(tmp_path)
    theirs = transformers.pipeline("text-classification", str(tmp_path), device="cpu")
    ours = xlmr.pipeline("text-classification", tmp_path, device="cpu")
    for inputs in ("La France", ["Paris", "La capitale de la France", "a"]):
        want, got = theirs(inputs, **options), ours(inputs, **options)
        for a, b in zip(flat(want), flat(got), strict=True):
            assert a["label"] == b["label"]
            assert b["score"] == pytest.approx(a["score"], rel=1e-4, abs=1e-5)
        assert shape(got) == shape(want)
    with pytest.raises(ValueError, match="function_to_apply is 'max': allowed are 'sigmoid', 'softmax', 'none'"):
        ours("a", function_to_apply="max")


def flat(answer: Any) -> list[dict[str, Any]]:
    return [answer] if isinstance(answer, dict) else [row for part in answer for row in flat(part)]


def shape(answer: Any) -> Any:
    return "row" if isinstance(answer, dict) else [shape(part) for part in answer]
