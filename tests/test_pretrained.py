"""The model as an object: what other libraries ask of it, copies, and the path that computes it."""

import copy
import pickle
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from reference import RIGHT, TINY, B, build, ids, inputs
from safetensors.torch import load_file
from torch import Tensor, nn

import xlmr
from xlmr import model as tree
from xlmr import outputs
from xlmr.ops import EAGER


def test_names_that_other_libraries_ask_for() -> None:
    reference, ours = build("ForMaskedLM")
    assert (ours.device, ours.dtype) == (reference.device, reference.dtype)
    assert ours.num_parameters() == reference.num_parameters()
    assert ours.get_memory_footprint() == reference.get_memory_footprint(return_buffers=False)
    ours.roberta.requires_grad_(False)
    reference.roberta.requires_grad_(False)
    assert ours.num_parameters(only_trainable=True) == reference.num_parameters(only_trainable=True)
    assert set(ours._no_split_modules) == reference._no_split_modules
    assert ours.base_model_prefix == reference.base_model_prefix
    assert ours.base_model is ours.roberta
    assert ours.config.get_text_config() is ours.config
    assert ours.get_input_embeddings() is ours.roberta.embeddings.word_embeddings
    assert ours.get_output_embeddings().weight is ours.get_input_embeddings().weight
    assert ours.lm_head.decoder.bias is ours.lm_head.bias
    names = [type(m).__name__ for m in ours.modules()]
    assert names.count("XLMRobertaSelfOutput") == 3
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in reference.named_parameters()]
    back = reference.load_state_dict(ours.state_dict())
    assert not back.missing_keys
    assert not back.unexpected_keys


def test_resize() -> None:
    reference, ours = build("ForMaskedLM")
    before = ours.get_input_embeddings().weight.detach().clone()
    for model in (reference, ours):
        model.resize_token_embeddings(101, pad_to_multiple_of=8)
        assert model.config.vocab_size == 104
    table = ours.get_input_embeddings()
    assert torch.equal(table.weight[:97], before)
    assert table.padding_idx == 1
    assert ours.lm_head.decoder.weight is table.weight
    assert ours.lm_head.decoder.bias is ours.lm_head.bias
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in reference.state_dict().items()}
    assert ours(torch.tensor([[0, 103, 2]])).logits.shape == (1, 3, 104)
    ours.resize_token_embeddings(50)
    assert torch.equal(ours.get_input_embeddings().weight, before[:50])


def test_copies_pickles_and_threads() -> None:
    _, ours = build("ForSequenceClassification")
    tokens = ids()
    with torch.no_grad():
        expected = ours(tokens, RIGHT, output_attentions=True)
        for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert torch.equal(other(tokens, RIGHT).logits, ours(tokens, RIGHT).logits)
        restored = pickle.loads(pickle.dumps(expected))
    assert list(restored) == list(expected)
    assert torch.equal(restored.logits, expected.logits)
    results: list[bool] = []

    def work(asked: bool) -> None:
        for _ in range(20):
            with torch.no_grad():
                out = ours(tokens, RIGHT, output_attentions=asked)
            results.append(
                len(out.get("attentions", ())) == 3 * asked and torch.allclose(out.logits, expected.logits, atol=1e-5)
            )

    threads = [threading.Thread(target=work, args=(asked,)) for asked in (True, False, True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 80


def test_outputs_are_shown_as_the_references() -> None:
    shown = [repr(module.MaskedLMOutput(logits=torch.ones(2))) for module in (outputs, transformers.modeling_outputs)]
    assert shown[0] == shown[1]


def test_outputs_are_rebuilt_as_other_libraries_do() -> None:
    _, ours = build("ForMaskedLM")
    out = ours(**inputs("MaskedLM", RIGHT))
    for again in (type(out)(dict(out)), type(out)((k, out[k]) for k in out), copy.copy(out), type(out)(**out)):
        assert list(again) == ["loss", "logits"]
        assert again.logits is out.logits
        assert again[1] is out.logits
    again.attentions = (out.logits,)
    assert list(again) == ["loss", "logits", "attentions"]
    again.attentions = None
    assert list(again) == ["loss", "logits"]
    again.vectors = out.logits  # an attribute that is no field is the caller's own
    assert list(again) == ["loss", "logits"]
    again["vectors"] = out.logits
    assert list(again) == ["loss", "logits", "vectors"]
    with pytest.raises(TypeError, match="has no fields 'vectors'"):
        type(out)({"vectors": out.logits})


def test_a_model_from_a_configuration_alone() -> None:
    for library in (transformers, xlmr):
        model = library.XLMRobertaForMaskedLM._from_config(library.XLMRobertaConfig(**TINY, dtype="bfloat16"))
        assert (model.dtype, model.training) == (torch.bfloat16, True)
        how = {"attn_implementation": "eager", "torch_dtype": "float16"}
        assert library.XLMRobertaModel._from_config(model.config, dtype=torch.float64).config.dtype == torch.float64
        assert library.XLMRobertaModel._from_config(library.XLMRobertaConfig(**TINY), **how).dtype == torch.float16


def test_a_head_written_elsewhere_loads(tmp_path: Any) -> None:
    class Regressor(xlmr.XLMRobertaPreTrainedModel):
        def __init__(self, config: xlmr.XLMRobertaConfig):
            super().__init__(config)
            self.roberta = xlmr.XLMRobertaModel(config)
            self.score = nn.Linear(config.hidden_size, 1)
            self.init_weights()

        def forward(self, **given: Any) -> Tensor:
            return self.score(self.roberta(**given).pooler_output)

    _, base = build("Model")
    base.save_pretrained(tmp_path)
    model = Regressor.from_pretrained(tmp_path, backend="eager", unpad=False)
    assert not model.roberta.unpad
    assert model.roberta.backend_report() == "eager, as asked"
    assert torch.equal(model.roberta.pooler.dense.weight, base.pooler.dense.weight)
    assert model(input_ids=ids(), attention_mask=RIGHT).shape == (B, 1)


class Tagger(xlmr.XLMRobertaPreTrainedModel):
    """A head as users write them: recurrent, normalised, with a loss that weighs classes."""

    def __init__(self, config: Any, labels: int = 2):
        super().__init__(config)
        self.roberta = xlmr.XLMRobertaModel(config, add_pooling_layer=False)
        self.lstm = nn.LSTM(config.hidden_size, labels, bidirectional=True)
        self.norm = nn.BatchNorm1d(labels)
        self.transitions = nn.Parameter(torch.full((labels, labels), 0.5))
        self.loss = nn.CrossEntropyLoss(weight=torch.arange(1.0, 1 + labels))
        self.post_init()


def test_what_the_checkpoint_of_a_head_written_elsewhere_lacks_keeps_its_first_values(tmp_path: Any) -> None:
    _, base = build("Model")
    base.save_pretrained(tmp_path)
    model, info = Tagger.from_pretrained(tmp_path, 300, dtype=torch.bfloat16, output_loading_info=True)
    assert {"transitions", "norm.running_var", "loss.weight", "lstm.weight_hh_l0"} < info["missing_keys"]
    assert {t.dtype for t in model.state_dict().values()} == {torch.bfloat16, torch.int64}
    assert model.lstm.weight_ih_l0.std() > 0.01
    assert torch.equal(model.transitions, torch.full((300, 300), 0.5, dtype=torch.bfloat16))
    assert torch.equal(model.norm.running_var, torch.ones(300, dtype=torch.bfloat16))
    assert torch.equal(model.loss.weight[:3], torch.tensor([1.0, 2, 3], dtype=torch.bfloat16))


def test_a_head_written_elsewhere_comes_back_with_its_buffers(tmp_path: Any) -> None:
    _, base = build("Model")
    model = Tagger(base.config).eval()
    model.norm.num_batches_tracked += 3
    model.norm.running_mean += 0.25
    model.save_pretrained(tmp_path)
    again, info = Tagger.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def test_a_language_model_inside_another_stays_tied(tmp_path: Any) -> None:
    class Scorer(xlmr.XLMRobertaPreTrainedModel):
        def __init__(self, config: Any):
            super().__init__(config)
            self.lm = xlmr.XLMRobertaForMaskedLM(config)
            self.post_init()

    model = Scorer(xlmr.XLMRobertaConfig(**TINY))
    model.save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "decoder" in name]
    again, info = Scorer.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    for lm in (model.lm, again.lm):
        assert lm.lm_head.decoder.weight is lm.get_input_embeddings().weight
        assert lm.lm_head.decoder.bias is lm.lm_head.bias


def test_settings_reach_every_encoder_in_a_users_model() -> None:
    class Siamese(xlmr.XLMRobertaPreTrainedModel):
        def __init__(self, config: Any):
            super().__init__(config)
            self.left = xlmr.XLMRobertaModel(config)
            self.right = xlmr.XLMRobertaModel(config)
            self.post_init()

    model = Siamese(xlmr.XLMRobertaConfig(**TINY)).train()
    model.gradient_checkpointing_enable()
    calls = []
    for side in (model.left, model.right):
        side.encoder.layer[1].output.dense.register_forward_hook(lambda *_: calls.append(1))
        side(ids()).last_hidden_state.sum().backward()
    assert len(calls) == 4  # once more in each backward pass
    model.requires_grad_(False)
    model.enable_input_require_grads()
    assert all(side(ids()).last_hidden_state.requires_grad for side in (model.left, model.right))
    model.disable_input_require_grads()
    assert not model.left(ids()).last_hidden_state.requires_grad


def test_a_configuration_asks_for_checkpointing_once() -> None:
    """As files of transformers before 4.12 do; what is saved of the model no longer does."""
    model = xlmr.XLMRobertaForMaskedLM(xlmr.XLMRobertaConfig(**TINY, gradient_checkpointing=True))
    assert model.roberta.encoder.checkpointing is not None
    assert "gradient_checkpointing" not in model.config.to_dict()


def test_ties_are_named_as_in_transformers_5() -> None:
    class Scorer(xlmr.XLMRobertaForMaskedLM):
        _tied_weights_keys = ["lm_head.decoder.weight"]  # noqa: RUF012

    with pytest.raises(TypeError, match=r"_tied_weights_keys of Scorer is \['lm_head.*: give {tied: tied to}"):
        Scorer(xlmr.XLMRobertaConfig(**TINY))


@pytest.mark.parametrize("library", [transformers, xlmr])
def test_keywords_that_are_no_field_go_to_a_constructor_that_takes_any(tmp_path: Any, library: Any) -> None:
    class Scorer(library.XLMRobertaPreTrainedModel):
        def __init__(self, config: Any, num_labels: int = 2, **options: Any):
            super().__init__(config)
            self.roberta = library.XLMRobertaModel(config)
            self.options = options
            self.post_init()

    build("Model")[1].save_pretrained(tmp_path)
    model = Scorer.from_pretrained(tmp_path, num_labels=3, margin=0.5, hidden_dropout_prob=0.2)
    assert model.options == {"margin": 0.5}
    assert (model.config.num_labels, model.config.hidden_dropout_prob) == (3, 0.2)


@pytest.mark.parametrize("outer", [transformers, xlmr])
@pytest.mark.parametrize("inner", [transformers, xlmr])
def test_a_loaded_encoder_is_not_initialised_again_by_the_model_around_it(
    tmp_path: Any, outer: Any, inner: Any
) -> None:
    _, base = build("Model")
    base.save_pretrained(tmp_path)

    class Regressor(outer.XLMRobertaPreTrainedModel):
        def __init__(self, config: Any):
            super().__init__(config)
            self.encoder = inner.XLMRobertaModel.from_pretrained(tmp_path)
            self.score = nn.Linear(config.hidden_size, 1)
            self.post_init()

    model = Regressor(outer.XLMRobertaConfig(**TINY))
    assert torch.equal(model.encoder.encoder.layer[0].output.dense.weight, base.encoder.layer[0].output.dense.weight)


def test_a_model_of_transformers_around_ours_initialises_what_its_checkpoint_lacks(tmp_path: Any) -> None:
    class Regressor(transformers.XLMRobertaPreTrainedModel):
        def __init__(self, config: Any):
            super().__init__(config)
            self.roberta = xlmr.XLMRobertaModel(xlmr.XLMRobertaConfig(**TINY))
            self.post_init()

    reference, _ = build("ForMaskedLM")
    reference.save_pretrained(tmp_path)
    loaded = Regressor.from_pretrained(tmp_path).roberta
    assert torch.equal(
        loaded.encoder.layer[0].output.dense.weight, reference.roberta.encoder.layer[0].output.dense.weight
    )
    assert loaded.pooler.dense.weight.std().item() == pytest.approx(TINY["initializer_range"], rel=0.1)


def test_resized_embeddings_are_not_initialised_again() -> None:
    _, ours = build("ForMaskedLM", tie_word_embeddings=False)
    ours.resize_token_embeddings(110)
    decoder, words = ours.lm_head.decoder.weight.clone(), ours.get_input_embeddings().weight.clone()
    ours.post_init()
    assert torch.equal(ours.lm_head.decoder.weight, decoder)
    assert torch.equal(ours.get_input_embeddings().weight, words)
    with pytest.raises(ValueError, match="an integer is needed"):
        ours.resize_token_embeddings(pad_to_multiple_of=1.3)


def test_ops_are_swapped_in_one_line_and_invisible() -> None:
    _, ours = build("ForMaskedLM")
    tokens = ids()
    calls = []

    def spy(name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls.append(name)
            return getattr(EAGER, name)(*args)

        return call

    keys = list(ours.state_dict())
    expected = ours(tokens, RIGHT).logits
    ours.ops = replace(
        EAGER, **{name: spy(name) for name in ("embed", "attention", "qkv_projection", "gelu_layer_norm")}
    )
    assert torch.equal(ours(tokens, RIGHT).logits, expected)
    assert calls == ["embed", *["qkv_projection", "attention"] * 3, "gelu_layer_norm"]
    assert list(ours.state_dict()) == keys
    assert ours.backend_report() == "the ops given"
    ours.set_backend("auto")
    assert ours.ops is EAGER
    assert "eager on cpu" in ours.backend_report()
    assert tree.XLMRobertaModel(ours.config, ops=ours.ops).backend_report() == "the ops given"
    again = type(ours).from_pretrained(None, config=ours.config, state_dict=ours.state_dict(), ops=ours.ops)
    assert again.backend_report() == "the ops given"
