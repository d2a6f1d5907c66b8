"""Batching by tokens, and embed against a padded loop over the reference's model."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import xlmr
from xlmr.encode import batches, pack, tokens_at_once

TEXTS = ["The capital of France", "", "法国的首都是巴黎。", "Paris " * 40, "is", "عاصمة فرنسا هي باريس."]


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 100), st.none() | st.integers(1, 5))
def test_batches_hold_every_index_once_within_the_limits(lengths: list[int], tokens: int, size: int | None) -> None:
    found = list(batches(lengths, tokens, size))
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in batch) <= tokens or len(batch) == 1 for batch in found)
    assert all(len(batch) <= (size or len(lengths)) for batch in found)
    in_order = [lengths[i] for batch in found for i in batch]
    assert in_order == sorted(lengths, reverse=True)
    for batch, following in pairwise(found):  # no batch could have taken the next one's first
        total = sum(lengths[i] for i in batch) + lengths[following[0]]
        assert total > tokens or len(batch) == size


@pytest.mark.parametrize(
    ("device", "width", "dtype", "want"),
    [
        ("meta", 1024, torch.float32, 8192),
        ("cpu", 64, torch.float32, 8192),
        ("cpu", 384, torch.float32, 3640),
        ("cpu", 768, torch.bfloat16, 3640),
    ],
)
def test_tokens_at_once(device: str, width: int, dtype: torch.dtype, want: int) -> None:
    config = SimpleNamespace(hidden_size=width)
    model = SimpleNamespace(device=torch.device(device), config=config, dtype=dtype)
    assert tokens_at_once(None, model) == want
    assert tokens_at_once(5000, model) == 5000


def test_a_batch_on_a_cpu_is_bounded_in_bytes(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = loaded
    row = 3 * model.config.hidden_size * 4
    seen, forward = [], xlmr.XLMRobertaModel.forward_packed

    def watched(self: Any, input_ids: Tensor, *others: Any, **keywords: Any) -> Tensor:
        seen.append(len(input_ids))
        return forward(self, input_ids, *others, **keywords)

    monkeypatch.setattr(xlmr.XLMRobertaModel, "forward_packed", watched)
    monkeypatch.setattr("xlmr.encode.CPU_BATCH_BYTES", 100 * row)
    xlmr.embed(model, tokenizer, ["Paris " * 40] * 5)
    assert len(seen) > 1
    assert max(seen) <= 100


def test_pack_lays_sequences_end_to_end() -> None:
    packed = pack([[0, 5, 2], [0, 2]], torch.device("cpu"))
    assert packed.input_ids.tolist() == [0, 5, 2, 0, 2]
    assert packed.cu_seqlens.tolist() == [0, 3, 5]
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.max_seqlen == 3


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> tuple[Any, Any]:
    return xlmr.XLMRobertaForMaskedLM.from_pretrained(checkpoint), xlmr.XLMRobertaTokenizer.from_pretrained(checkpoint)


def expected(checkpoint: Path, pooling: str, max_length: int) -> Tensor:
    """One padded batch through transformers, pooled by the formula."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    model = transformers.XLMRobertaModel.from_pretrained(checkpoint, add_pooling_layer=False)
    batch = tokenizer(TEXTS, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    return hidden[:, 0] if pooling == "cls" else (hidden * mask).sum(1) / mask.sum(1)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("max_length", [None, 5])
def test_embed_pools_the_last_layer(loaded: Any, checkpoint: Path, pooling: str, max_length: int | None) -> None:
    want = expected(checkpoint, pooling, max_length or 48)
    for batch_tokens in (1, 20, 8192):
        options = {"pooling": pooling, "max_length": max_length, "batch_tokens": batch_tokens}
        got = xlmr.embed(*loaded, TEXTS, normalize=False, **options)
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
        unit = xlmr.embed(*loaded, TEXTS, **options)
        torch.testing.assert_close(unit, torch.nn.functional.normalize(want), atol=2e-5, rtol=1e-4)


def test_embed_takes_any_iterable_of_texts(loaded: Any) -> None:
    want = xlmr.embed(*loaded, TEXTS)
    for texts in (np.array(TEXTS), iter(TEXTS), dict.fromkeys(TEXTS).keys()):
        assert torch.equal(xlmr.embed(*loaded, texts), want)


def test_embed_gives_fp32_that_training_may_use(loaded: Any, checkpoint: Path) -> None:
    half = xlmr.XLMRobertaForMaskedLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    vectors = xlmr.embed(half, loaded[1], TEXTS)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(TEXTS)))
    (vectors @ torch.ones(32, 1, requires_grad=True)).sum().backward()
    assert xlmr.embed(*loaded, []).shape == (0, 32)


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ("one", {}, "texts is a single string"),
        (["one"], {"pooling": "median"}, "pooling is 'median': allowed are 'mean', 'cls'"),
        (["one"], {"pooling": []}, "pooling is 'nothing'"),
        (["one"], {"max_length": 49}, "max_length is 49: allowed are 2 to 48"),
        (["one"], {"batch_tokens": 0}, "batch_tokens is 0"),
    ],
)
def test_embed_refuses(loaded: Any, texts: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        xlmr.embed(*loaded, texts, **options)


@pytest.mark.parametrize("cls", [xlmr.XLMRobertaModel, xlmr.XLMRobertaForMaskedLM])
def test_embed_takes_a_wrapped_model(cls: Any, loaded: Any, checkpoint: Path) -> None:
    model, adapters = cls.from_pretrained(checkpoint), peft.LoraConfig(target_modules=["query", "value"])
    want = xlmr.embed(*loaded, TEXTS)
    for wrapped in (torch.compile(model), peft.get_peft_model(model, adapters).eval()):
        torch.testing.assert_close(xlmr.embed(wrapped, loaded[1], TEXTS), want, atol=1e-5, rtol=1e-5)


def test_embed_refuses_what_is_no_model_and_one_with_dropout_on(loaded: Any) -> None:
    model = loaded[0].train()
    with pytest.raises(TypeError, match="the model is a XLMRobertaTokenizer: one of xlmr's is needed"):
        xlmr.embed(*reversed(loaded), ["one"])
    with pytest.raises(ValueError, match="training mode"):
        xlmr.embed(model, loaded[1], ["one"])
    model.eval()
