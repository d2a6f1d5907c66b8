"""RoBERTa, CamemBERT and BERT in our classes, against transformers' own; what differs in mathematics is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from reference import assert_gradients, assert_same, double, gradients, skip_without_pooler
from safetensors.torch import load_file, save_file
from torch import Tensor

import xlmr
from xlmr import eager
from xlmr.demo import CHECKPOINT

KINDS = {"roberta": "Roberta", "camembert": "Camembert", "bert": "Bert"}
HEADS = {
    "Roberta": ["MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice"],
    "Bert": ["TokenClassification", "QuestionAnswering", "MultipleChoice"],
}
HEADS["Camembert"] = HEADS["Roberta"]
SIZES: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 16, "type_vocab_size": 2, "initializer_range": 0.3, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
B, S = 4, 12
CLOSE: dict[str, float] = {"atol": 1e-5, "rtol": 1e-5}
MASKS = {
    "right": torch.tensor([[1] * 12, [1] * 3 + [0] * 9, [1] * 7 + [0] * 5, [1] + [0] * 11]),
    "left": torch.tensor([[1] * 12, [0] * 9 + [1] * 3, [0] * 5 + [1] * 7, [0] * 11 + [1]]),
    "holes": torch.tensor([[1] * 3 + [0] * 4 + [1] * 5, [1, 0] * 6, [1] * 12, [1] * 2 + [0] * 10]),
}
EVERY_HEAD = [(kind, head) for kind, classes in KINDS.items() for head in HEADS[classes]]
Save = Callable[..., tuple[Any, Path]]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """transformers' model of a kind, all of its weights random, and the directory that it saved."""

    def saved(kind: str, name: str = "Model", **settings: Any) -> tuple[Any, Path]:
        config = getattr(transformers, f"{KINDS[kind]}Config")(**{**SIZES, **settings}, attn_implementation="eager")
        model = getattr(transformers, f"{KINDS[kind]}{name}")(config).eval()
        skip_without_pooler(name, model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(tmp_path / "theirs")
        return model, tmp_path / "theirs"

    return saved


def ids_of(model: Any, mask: Tensor) -> Tensor:
    """Random ids [B, S], those of pad where the mask is 0."""
    return torch.randint(5, SIZES["vocab_size"], (B, S)).masked_fill(mask == 0, model.config.pad_token_id)


def labels_of(head: str) -> dict[str, Tensor]:
    if head == "QuestionAnswering":
        return {"start_positions": torch.tensor([0, 1, 2, 0]), "end_positions": torch.tensor([3, 2, 5, 0])}
    if head in ("MaskedLM", "TokenClassification"):
        return {"labels": torch.randint(0, 2, (B, S)).masked_fill(MASKS["right"] == 0, -100)}
    return {"labels": torch.tensor([1, 0] if head == "MultipleChoice" else [1, 0, 0, 1])}


def given_to(head: str, **inputs: Tensor) -> dict[str, Tensor]:
    """The inputs; two texts of four each where choices are wanted."""
    return {k: v.unflatten(0, (2, 2)) for k, v in inputs.items()} if head == "MultipleChoice" else inputs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unpad", [True, False])
def test_the_encoder(save: Save, kind: str, unpad: bool) -> None:
    theirs, directory = save(kind)
    ours = xlmr.XLMRobertaModel.from_pretrained(directory, unpad=unpad)
    assert ours.config.model_type == kind
    for name, mask in MASKS.items():
        for types in (None, torch.randint(0, 2, (B, S))):
            given = {"input_ids": ids_of(theirs, mask), "attention_mask": mask, "token_type_ids": types}
            with torch.no_grad():
                expected, found = theirs(**given), ours(**given)
            real = mask.bool()
            torch.testing.assert_close(found[0][real], expected[0][real], **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
            torch.testing.assert_close(found[1], expected[1], **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_for_words_and_positions_given(save: Save, kind: str) -> None:
    theirs, directory = save(kind)
    ours = xlmr.XLMRobertaModel.from_pretrained(directory)
    vectors, positions = torch.randn(B, S, 32), torch.randint(2, 16, (B, S))
    with torch.no_grad():
        for given in ({"inputs_embeds": vectors}, {"inputs_embeds": vectors, "position_ids": positions}):
            torch.testing.assert_close(ours(**given)[0], theirs(**given)[0], **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_texts_are_those_of_the_padded_batch(save: Save, kind: str) -> None:
    theirs, directory = save(kind)
    ours = xlmr.XLMRobertaModel.from_pretrained(directory)
    mask, types = MASKS["right"], torch.randint(0, 2, (B, S))
    ids, real = ids_of(theirs, mask), mask.bool()
    ids[0, 4] = theirs.config.pad_token_id  # a token like any other to BERT, without a position to RoBERTa
    cu_seqlens = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask, token_type_ids=types)[0][real]
        found = ours.forward_packed(ids[real], cu_seqlens, S, token_type_ids=types[real])
    torch.testing.assert_close(found, expected, **CLOSE)


def test_bert_continues_behind_its_cache(save: Save) -> None:
    theirs, directory = save("bert", is_decoder=True)
    ours = xlmr.XLMRobertaModel.from_pretrained(directory)
    vectors, ids = torch.randn(B, S, 32), torch.randint(0, 60, (B, S))
    for name, whole in (("inputs_embeds", vectors), ("input_ids", ids)):
        with torch.no_grad():
            past = ours(**{name: whole[:, :7]}).past_key_values
            found = ours(**{name: whole[:, 7:]}, past_key_values=past)[0]
            torch.testing.assert_close(found, theirs(**{name: whole})[0][:, 7:], **CLOSE)


def named(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """By our names; the tied table has one of two, which depends on the order of modules."""
    words = {"lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight"}
    return {words.get(name, re.sub("^bert", "roberta", name)): gradient for name, gradient in gradients.items()}


@pytest.mark.parametrize(("kind", "head"), EVERY_HEAD)
def test_a_head_its_loss_and_gradients(save: Save, kind: str, head: str) -> None:
    theirs, directory = save(kind, f"For{head}")
    ours, info = getattr(xlmr, f"XLMRobertaFor{head}").from_pretrained(directory, output_loading_info=True)
    assert not any(info.values())
    mask = MASKS["right"]
    inputs = given_to(head, input_ids=ids_of(theirs, mask), attention_mask=mask, token_type_ids=1 - mask)
    given = inputs | labels_of(head)
    judge = double(theirs)
    found, expected, truth = (model(**given) for model in (ours, theirs, judge))
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-5, rtol=1e-5)
    runs = ((ours, found), (theirs, expected), (judge, truth))
    assert_gradients(*(named(gradients(model, output.loss)) for model, output in runs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", ["TokenClassification", "MultipleChoice"])
@pytest.mark.parametrize("rate", [None, 0.25])
def test_the_dropout_of_a_head(save: Save, kind: str, head: str, rate: float | None) -> None:
    theirs, directory = save(kind, f"For{head}", hidden_dropout_prob=0.125, classifier_dropout=rate)
    ours = getattr(xlmr, f"XLMRobertaFor{head}").from_pretrained(directory)
    assert ours.dropout.p == theirs.dropout.p


def test_bert_learns_the_position_of_its_pad_id(save: Save) -> None:
    """Row 0 of the positions is where every text begins, not a pad's: it learns; row 0 of the words does not."""
    theirs, directory = save("bert")
    ours = xlmr.XLMRobertaModel.from_pretrained(directory)
    ids = torch.randint(0, 60, (B, S))
    ids[:, 5] = 0
    dy = torch.randn(B, S, 32)
    expected = gradients(theirs, (theirs(ids)[0] * dy).sum())
    found = gradients(ours, (ours(ids)[0] * dy).sum())
    assert_same(found, expected)
    assert found["embeddings.position_embeddings.weight"][0].abs().max() > 0.1
    assert not found["embeddings.word_embeddings.weight"][0].any()


def test_the_kernel_trains_every_position() -> None:
    embedding = pytest.importorskip("xlmr.kernels.embedding")
    ids, positions = torch.tensor([0, 3, 2, 0]), torch.arange(4)
    dy = torch.randn(4, 16)

    def learnt(embed: Callable[..., Tensor], pad_positions: bool) -> list[Tensor]:
        torch.manual_seed(0)
        leaves = [torch.randn(shape).requires_grad_() for shape in ((5, 16), (2, 16), (6, 16), (16,), (16,))]
        y = embed(ids, torch.zeros_like(ids), positions, *leaves, 1e-5, 0, 0.0, pad_positions)
        return list(torch.autograd.grad(y, leaves, dy))

    for pad_positions in (True, False):
        found, expected = learnt(embedding.embed, pad_positions), learnt(eager.embed, pad_positions)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert bool(found[2][0].any()) is not pad_positions
        assert not found[0][0].any()


@pytest.mark.parametrize(("kind", "head"), [*((kind, None) for kind in KINDS), *EVERY_HEAD])
def test_transformers_loads_what_is_saved(save: Save, tmp_path: Path, kind: str, head: str | None) -> None:
    theirs, directory = save(kind, f"For{head}" if head else "Model")
    ours = getattr(xlmr, f"XLMRobertaFor{head}" if head else "XLMRobertaModel").from_pretrained(directory)
    ours.save_pretrained(tmp_path / "ours")
    auto = getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel")
    again, info = auto.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert type(again) is type(theirs)
    assert not any(info.values())
    state = again.state_dict()
    assert state.keys() == theirs.state_dict().keys()
    assert [name for name, weight in theirs.state_dict().items() if not torch.equal(weight, state[name])] == []
    configs = [json.loads((tmp_path / side / "config.json").read_text()) for side in ("theirs", "ours")]
    assert configs[0]["architectures"] == configs[1]["architectures"]
    added = again.config.to_dict().keys() ^ theirs.config.to_dict().keys()
    assert added <= {"tie_word_embeddings"}  # which CamembertConfig does not name before transformers 5.4


def test_bert_as_google_wrote_it(save: Save, tmp_path: Path) -> None:
    """LayerNorm.gamma and beta, the prefix and a head's weights, and a configuration that leaves pad_token_id out."""
    theirs, directory = save("bert", "ForPreTraining")
    state = {}
    for name, weight in load_file(directory / "model.safetensors").items():
        state[name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")] = weight
    assert "bert.embeddings.LayerNorm.gamma" in state
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    values = json.loads((directory / "config.json").read_text())
    kept = {name: value for name, value in values.items() if not name.endswith("_token_id")}
    (directory / "config.json").write_text(json.dumps(kept))
    ours, info = xlmr.XLMRobertaModel.from_pretrained(directory, output_loading_info=True)
    assert {name.split(".")[0] for name in info.pop("unexpected_keys")} == {"cls"}
    assert not any(info.values())
    assert (ours.config.pad_token_id, ours.config.bos_token_id, ours.config.max_length) == (0, None, 16)
    ids = torch.randint(0, 60, (B, 16))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids)[0], theirs.bert(ids)[0], **CLOSE)
    with pytest.raises(ValueError, match=r"a sequence has 17 tokens: this model takes at most 16 .*16 − 0"):
        ours(torch.ones(1, 17, dtype=torch.long))


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        ("SequenceClassification", "a single linear layer on the pooler's vector. Put BertForSequenceClassification's"),
        ("MaskedLM", "cls.predictions"),
        ("CausalLM", "cls.predictions.*Put BertLMHeadModel's"),
    ],
)
def test_heads_that_compute_something_else_are_refused(save: Save, head: str, reason: str) -> None:
    cls = getattr(xlmr, f"XLMRobertaFor{head}")
    _, directory = save("bert")
    for build in (lambda: cls.from_pretrained(directory), lambda: cls(xlmr.XLMRobertaConfig(model_type="bert"))):
        with pytest.raises(ValueError, match=f"XLMRobertaFor{head} does not take model_type 'bert'.*{reason}"):
            build()

    class Own(cls):  # type: ignore[misc, valid-type]
        pass

    with pytest.raises(ValueError, match="does not take model_type 'bert'"):
        Own(xlmr.XLMRobertaConfig(model_type="bert"))


JINA = {"AutoModel": "jinaai/xlm-roberta-flash-implementation--modeling_lora.XLMRobertaLoRA"}


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"model_type": "xlm-roberta-xl"}, "normalise before attention"),
        ({"model_type": "deberta-v2"}, "relative positions"),
        ({"model_type": "modernbert"}, "rotary"),
        ({"model_type": "mpnet"}, "MPNet.*relative positions"),
        ({"model_type": "distilbert"}, "no token types"),
        ({"model_type": "new"}, "gte-multilingual"),
        ({"model_type": "llama"}, "another architecture.*allowed: 'xlm-roberta', 'roberta', 'camembert', 'bert'"),
        ({"model_type": "bert", "position_embedding_type": "relative_key"}, "'relative_key'; allowed: 'absolute'"),
        ({"model_type": "roberta", "position_embedding_type": "relative_key_query"}, "allowed: 'absolute'"),
        ({"auto_map": JINA, "position_embedding_type": "rotary"}, "the repository's own code.*jina-embeddings-v3"),
        ({"model_type": "bert", "pad_token_id": None}, "pad_token_id is None"),
        ({"model_type": "bert", "max_position_embeddings": 0}, "max_position_embeddings is 0"),
    ],
)
def test_other_mathematics_is_refused_by_name(save: Save, values: dict[str, Any], reason: str) -> None:
    _, directory = save("bert")
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    with pytest.raises(ValueError, match=reason):
        xlmr.XLMRobertaModel.from_pretrained(directory)


def test_own_code_of_a_tokenizer_alone_is_no_hindrance(save: Save) -> None:
    _, directory = save("bert")
    path = directory / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "auto_map": {"AutoTokenizer": "x.Tokenizer"}}))
    xlmr.XLMRobertaModel.from_pretrained(directory)
    path.write_text(json.dumps({**values, "auto_map": JINA}))
    xlmr.XLMRobertaModel.from_pretrained(directory, auto_map=None)


def test_a_configuration_that_names_another_kind_lacks_the_weights(save: Save) -> None:
    _, directory = save("bert", "ForTokenClassification")
    with pytest.raises(ValueError, match="less than half"):
        xlmr.XLMRobertaModel.from_pretrained(directory, model_type="roberta", pad_token_id=1)


WORDS = xlmr.XLMRobertaConfig.from_pretrained(CHECKPOINT).vocab_size
BASE_ONLY = ["Model", "ForMaskedLM", "ForSequenceClassification", "ForPreTraining", "LMHeadModel"]


@pytest.mark.parametrize(("kind", "head"), [*EVERY_HEAD, *(("bert", name) for name in BASE_ONLY)])
def test_pipelines_load_the_class_that_was_saved(save: Save, kind: str, head: str) -> None:
    """Or, where its head computes something else than ours, its base model."""
    given = head if head in BASE_ONLY else f"For{head}"
    theirs, directory = save(kind, given, vocab_size=WORDS)
    pipe = xlmr.pipeline("feature-extraction", directory, CHECKPOINT, device="cpu")
    assert type(pipe.model).__name__ == ("XLMRobertaModel" if head in BASE_ONLY else f"XLMRoberta{given}")
    ids = torch.tensor([pipe.tokenizer("is Paris")["input_ids"]])
    with torch.no_grad():
        expected = theirs.base_model(ids)[0]
    torch.testing.assert_close(pipe("is Paris", return_tensors=True), expected, **CLOSE)


def test_a_pipeline_needs_a_head_that_computes_the_same(save: Save) -> None:
    for kind in ("roberta", "camembert"):
        _, directory = save(kind, "ForSequenceClassification", vocab_size=WORDS)
        assert xlmr.pipeline("text-classification", directory, CHECKPOINT, device="cpu")("is Paris")[0]["score"] > 0.5
    _, directory = save("bert", "ForSequenceClassification", vocab_size=WORDS)
    with pytest.raises(ValueError, match=r"a single linear layer on the pooler's vector. Put BertForSequence"):
        xlmr.pipeline("text-classification", directory, CHECKPOINT, device="cpu")
