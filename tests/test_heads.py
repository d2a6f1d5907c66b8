"""Every head against transformers in float64: loss, outputs, attentions, gradients; packed and padded."""

from typing import Any

import pytest
import torch
from numerics import assert_accurate
from reference import HEADS, B, S, build, double, inputs, keep, masks, reference_mask
from torch import Tensor

BY_TOKEN = {"logits", "start_logits", "end_logits", "last_hidden_state", "hidden_states"}


def run(model: Any, given: dict[str, Any], **asked: Any) -> Any:
    dtype = next(model.parameters()).dtype
    if type(model).__module__.startswith("transformers"):
        mask = given["attention_mask"]
        mask = None if mask is None else reference_mask(mask, dtype)
        given = given | {"attention_mask": mask}
    return model(**given, **asked)


def compare(ours: Any, reference: Any, truth: Any, real: Tensor, packed: bool, dtype: torch.dtype) -> None:
    """Field by field; by-token fields at real tokens, where packed also zeros elsewhere."""
    assert list(ours) == list(truth)
    assert [type(v) for v in ours.to_tuple()] == [type(v) for v in truth.to_tuple()]
    for field in truth:
        values = [out[field] if isinstance(out[field], tuple) else (out[field],) for out in (ours, reference, truth)]
        assert len(values[0]) == len(values[2])
        for mine, theirs, exact in zip(*values, strict=True):
            assert mine.shape == exact.shape
            if field in ("attentions", "cross_attentions"):
                mine, theirs, exact = (t.transpose(1, 2)[real] for t in (mine, theirs, exact))
            elif field in BY_TOKEN and exact.shape[:2] == (B, S):
                if packed:
                    assert not mine[~real].any()
                mine, theirs, exact = mine[real], theirs[real], exact[real]
            assert_accurate(mine, theirs, exact, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("unpad", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("name", [*HEADS, "Model"])
def test_outputs(name: str, unpad: bool, dtype: torch.dtype) -> None:
    name = name if name == "Model" else f"For{name}"
    decoder = {"is_decoder": True} if name == "ForCausalLM" else {}
    reference, ours = build(name, path={"unpad": unpad}, **decoder)
    truth = double(reference)
    reference, ours = reference.to(dtype), ours.to(dtype)
    for kind, mask in masks().items():
        if name in ("ForCausalLM", "ForMultipleChoice") and mask is not None and mask.dim() == 4:
            continue  # a decoder's 4-D mask would be the causal one (in test_model); the reference flattens choices
        given = inputs(name.removeprefix("For"), mask)
        real = keep(mask)
        if name == "ForCausalLM":
            given["use_cache"] = False
        with torch.no_grad():
            outputs = [run(model, given, output_hidden_states=True) for model in (ours, reference, truth)]
        skips_padding = unpad and name != "ForQuestionAnswering"
        reads_first = name in ("Model", "ForSequenceClassification", "ForMultipleChoice")
        packed = skips_padding and not (reads_first and bool((~real[:, 0]).any()))
        try:
            compare(*outputs, real, packed, dtype)
        except AssertionError as error:
            raise AssertionError(f"mask {kind}: {error}") from error


@pytest.mark.parametrize("name", HEADS)
def test_attentions_tuples_and_plain_calls(name: str) -> None:
    reference, ours = build(f"For{name}", **({"is_decoder": True} if name == "CausalLM" else {}))
    truth = double(reference)
    for mask in (None, masks()["right"], masks()["holes"]):
        given = inputs(name, mask)
        with torch.no_grad():
            asked = {"output_attentions": True, "output_hidden_states": True}
            outputs = [run(m, given, **asked) for m in (ours, reference, truth)]
            compare(*outputs, keep(mask), packed=False, dtype=torch.float32)
            as_tuple, as_dict = run(ours, given, return_dict=False), run(ours, given)
        assert isinstance(as_tuple, tuple)
        assert len(as_tuple) == len(as_dict)
        assert torch.equal(as_tuple[0], as_dict.loss)
        assert torch.equal(as_dict[0], as_dict["loss"])


@pytest.mark.parametrize("unpad", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("name", [*HEADS, "Model"])
def test_gradients(name: str, unpad: bool) -> None:
    """Of the loss, and of a random combination of the outputs; a 0 in place of a gradient counts as an error."""
    full = name if name == "Model" else f"For{name}"
    reference, ours = build(full, path={"unpad": unpad}, **({"is_decoder": True} if name == "CausalLM" else {}))
    truth = double(reference)
    for mask in (masks()["right"], masks()["holes"], masks()["left"]):
        given = inputs(name, mask)
        real = keep(mask)
        weights: dict[str, Tensor] = {}
        for model in (ours, reference, truth):
            model.zero_grad()
            out = run(model, given)
            total = out.get("loss", 0.0)
            for field in ("logits", "start_logits", "last_hidden_state", "pooler_output"):
                if field in out:
                    value = out[field]
                    value = value[real] if value.shape[:2] == (B, S) else value
                    weight = weights.setdefault(field, torch.randn(value.shape, dtype=torch.double))
                    total = total + (value * weight.to(value.dtype)).sum()
            total.backward()
        grads = [dict(model.named_parameters()) for model in (ours, reference, truth)]
        largest = max(p.grad.abs().max().item() for p in grads[2].values() if p.grad is not None)
        for key, exact in grads[2].items():
            mine, theirs = grads[0][key].grad, grads[1][key].grad
            assert (mine is None) == (exact.grad is None), key
            if exact.grad is not None:
                assert_accurate(mine, theirs, exact.grad, scale=largest, ulps=32)


def test_labels_on_masked_tokens_are_computed() -> None:
    """A label where the mask is 0 makes the reference score a padding token: so do we."""
    for name, classes in (("MaskedLM", 97), ("TokenClassification", 3), ("CausalLM", 97)):
        reference, ours = build(f"For{name}", **({"is_decoder": True} if name == "CausalLM" else {}))
        given = inputs(name, masks()["right"])
        given["labels"] = torch.randint(0, classes, (B, S))
        assert torch.allclose(run(ours, given).loss, run(reference, given).loss, rtol=1e-5), name


def test_no_labels_left_gives_nan_and_loss_without_logits() -> None:
    reference, ours = build("ForMaskedLM")
    given = inputs("MaskedLM", masks()["right"])
    whole = ours(**given)
    lean = ours(**given, return_logits=False)
    assert lean.logits is None
    assert torch.allclose(lean.loss, whole.loss, rtol=1e-5)
    given["labels"] = torch.full((B, S), -100)
    assert run(reference, given).loss.isnan()
    assert ours(**given).loss.isnan()
    assert ours(**given, return_logits=False).loss.isnan()


@pytest.mark.parametrize(
    ("num_labels", "labels", "kind"),
    [
        (1, torch.randn(B), "regression"),
        (3, torch.tensor([0, 2, 1, 1, 0]), "single_label_classification"),
        (3, torch.tensor([0, 2, 1, 1, 0], dtype=torch.int32), "single_label_classification"),
        (3, torch.rand(B, 3).round(), "multi_label_classification"),
    ],
)
def test_problem_type(num_labels: int, labels: Tensor, kind: str) -> None:
    reference, ours = build("ForSequenceClassification", num_labels=num_labels)
    given = {"input_ids": torch.randint(4, 97, (B, S)), "attention_mask": masks()["right"]}
    mine = ours(**given, labels=labels)
    assert ours.config.problem_type == kind
    target = labels.long() if kind == "single_label_classification" else labels
    assert torch.allclose(mine.loss, reference(**given, labels=target).loss, rtol=1e-5)
    declared = build("ForSequenceClassification", num_labels=3, problem_type="regression")
    labels = torch.randn(B, 3)
    assert torch.allclose(*(m(**given, labels=labels).loss for m in declared), rtol=1e-5)


@pytest.mark.parametrize("name", ["MaskedLM", "TokenClassification"])
def test_labels_may_be_flat_and_bytes(name: str) -> None:
    reference, ours = build(f"For{name}")
    given = inputs(name, None)
    labels = given.pop("labels").clamp(min=0).view(-1).to(torch.uint8)
    assert torch.allclose(ours(**given, labels=labels).loss, reference(**given, labels=labels).loss, rtol=1e-5)


@pytest.mark.parametrize("hooked", ["", "roberta", "lm_head", "lm_head.decoder"])
def test_topk_packed_is_the_softmax_of_the_padded_logits(hooked: str) -> None:
    _, ours = build("ForMaskedLM")
    mask = masks()["right"]
    given = inputs("MaskedLM", mask)
    with torch.no_grad():
        scores = torch.log_softmax(ours(given["input_ids"], mask).logits, -1)[keep(mask)]
        lengths = mask.sum(1)
        cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        rows = torch.tensor([0, 3, 12, 14, 22, 32])
        targets = torch.tensor([5, 90, 17])
        packed = given["input_ids"][keep(mask)], cu_seqlens, S
        seen = []
        if hooked:
            ours.get_submodule(hooked).register_forward_hook(lambda *call: seen.append(call))
        values, words = ours.topk_packed(*packed, rows=rows, k=4)
        assert len(seen) == bool(hooked)
        assert torch.equal(words, scores[rows].topk(4).indices)
        assert torch.allclose(values, scores[rows].topk(4).values, atol=1e-5)
        values, words = ours.topk_packed(*packed, rows=rows, k=2, targets=targets)
        best = scores[rows][:, targets].topk(2)
        assert torch.equal(words, targets[best.indices])
        assert torch.allclose(values, best.values, atol=1e-5)


def test_refusals_say_what_is_allowed() -> None:
    _, ours = build("ForMaskedLM")
    ids = torch.randint(4, 97, (2, 6))
    for call, words in (
        ({"input_ids": ids.tolist(), "labels": ids}, "input_ids is a list: give a tensor"),
        ({"input_ids": ids, "labels": torch.zeros(2, 5, dtype=torch.long)}, r"labels has shape \(2, 5\)"),
        ({"input_ids": ids, "labels": torch.full((2, 6), 97)}, "labels holds 97"),
        ({"input_ids": ids, "return_logits": False}, "give labels"),
        ({"input_ids": ids, "labels": torch.zeros(2, 6)}, "labels has dtype torch.float32"),
    ):
        with pytest.raises((ValueError, TypeError, IndexError), match=words):
            ours(**call)
    for name, labels in (("ForTokenClassification", ids), ("ForSequenceClassification", ids[:, 0])):
        with pytest.raises(TypeError, match="labels is a list: give a tensor"):
            build(name)[1](ids, labels=labels.tolist())
    with pytest.raises(TypeError, match="start_positions is a list: give a tensor"):
        build("ForQuestionAnswering")[1](ids, start_positions=[1, 2], end_positions=[1, 2])
    with pytest.raises(TypeError, match="head_mask"):
        ours(ids, head_mask=None)
    assert ours(ids[:, :0]).logits.shape == (2, 0, 97)
    for name, shape in (("Model", (2, 0)), ("ForSequenceClassification", (2, 0)), ("ForMultipleChoice", (2, 3, 0))):
        with pytest.raises(ValueError, match="the sequences have no token"):
            build(name)[1](torch.zeros(shape, dtype=torch.long))
