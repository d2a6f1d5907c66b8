"""Our encoder inside transformers: equal answers and gradients, shared parameters, undone without a trace."""

import copy
import importlib.util
import pickle
import re
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer import modules as sentence_modules
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions as Output

import xlmr
from xlmr import integrations, ops, prepacked
from xlmr.demo import CHECKPOINT
from xlmr.family import KINDS, REFUSED

VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
SIZES = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 40, "initializer_range": 0.3, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
FAMILY = ("XLMRoberta", "Roberta", "Camembert", "Bert")


class Wrapped(torch.nn.Module):
    """A module around another that calls it, as wrappers of parallel training are."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **keywords: Any) -> Any:
        return self.module(*args, **keywords)


@pytest.fixture(autouse=True)
def _undone() -> Iterator[None]:
    yield
    integrations.unpatch()


def build(family: str, head: str = "ForSequenceClassification", **settings: Any) -> Any:
    torch.manual_seed(0)
    settings = {**SIZES, "pad_token_id": 0 if family == "Bert" else 1, **settings}
    config = getattr(transformers, f"{family}Config")(**settings)
    return getattr(transformers, f"{family}{head}")(config).eval()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 60, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(9) < torch.tensor([[9], [4], [6]])).long()
    return {"input_ids": ids.where(mask > 0, 1), "attention_mask": mask}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILY)
def test_accelerate_gives_the_hosts_logits_and_gradients(family: str, implementation: str) -> None:
    host = build(family)
    host.set_attn_implementation(implementation)
    ours = integrations.accelerate(copy.deepcopy(host))
    losses = [m(**batch(), labels=torch.tensor([0, 1, 1])).loss for m in (host, ours)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    for loss in losses:
        loss.backward()
    assert list(ours.state_dict()) == list(host.state_dict())
    for (name, a), b in zip(host.named_parameters(), ours.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_padding_is_not_computed() -> None:
    ours = integrations.accelerate(build("XLMRoberta", "Model"))
    rows = []
    ours.encoder.layer[1].output.dense.register_forward_hook(lambda m, x, y: rows.append(y.shape[0]))
    ours(**batch())
    assert rows == [9 + 4 + 6]


def test_no_random_number_is_drawn_beside_the_hosts() -> None:
    ours = integrations.accelerate(build("XLMRoberta", "Model"))
    copied, given = copy.deepcopy(ours), batch()
    state = torch.get_rng_state()
    want = ours(**given).pooler_output
    assert torch.equal(torch.get_rng_state(), state)
    parameters, _ = torch.func.stack_module_state([copied, copied])  # vmap refuses to draw unless it is told how

    def called(own: Any) -> torch.Tensor:
        return torch.func.functional_call(copied, own, kwargs=given).pooler_output

    torch.testing.assert_close(torch.vmap(called)(parameters), torch.stack([want, want]), rtol=1e-4, atol=1e-5)


def test_accelerate_shares_and_is_undone() -> None:
    host = build("XLMRoberta", "Model")
    parameters, kinds = list(map(id, host.parameters())), [type(m) for m in host.modules()]
    assert integrations.accelerate(host) is host
    host(**batch())
    assert list(map(id, host.parameters())) == parameters
    assert [type(m) for m in host.modules()] != kinds
    integrations.unpatch(host)
    assert [type(m) for m in host.modules()] == kinds
    assert not {"view", "every_position", "backend"} & vars(host.encoder).keys()


@pytest.mark.parametrize("how", ["accelerate", "patch_transformers"])
def test_packed_weights_inside_a_host(how: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepacked, "TINY", 0)
    host = build("XLMRoberta", "Model")
    host.save_pretrained(tmp_path)
    if how == "accelerate":
        ours = integrations.accelerate(copy.deepcopy(host), backend="prepacked")
    else:
        integrations.patch_transformers(backend="eager")
        integrations.patch_transformers(backend="prepacked")  # the last word counts
        ours = transformers.XLMRobertaModel.from_pretrained(tmp_path).eval()
    kept = batch()["attention_mask"] > 0
    for _ in range(2):
        with torch.no_grad():
            a, b = (model(**batch()).last_hidden_state[kept] for model in (host, ours))
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
        operation = ours.encoder.__dict__["view"][0].layer[0].output.ops.linear
        assert len(operation.__self__._packed) == 4 * host.config.num_hidden_layers
        for model in (host, ours):  # as a training step does
            with torch.no_grad():
                model.encoder.layer[1].output.dense.weight.mul_(1.5)
    integrations.accelerate(ours)
    ours(**batch())
    assert ours.encoder.__dict__["view"][0].layer[0].output.ops is ops.EAGER
    with pytest.raises(ValueError, match="allowed are 'auto', 'eager'"):
        integrations.accelerate(ours, backend="fast")


def test_single_operations_inside_a_host() -> None:
    """Exchanged, as any model's: here by one that counts."""
    host, called = build("XLMRoberta", "Model"), []

    def attention(*args: Any, **kwargs: Any) -> torch.Tensor:
        called.append(args)
        return ops.EAGER.attention(*args, **kwargs)

    expected = host(**batch()).last_hidden_state
    integrations.accelerate(host, backend=replace(ops.EAGER, attention=attention))
    kept = batch()["attention_mask"] > 0
    torch.testing.assert_close(host(**batch()).last_hidden_state[kept], expected[kept], rtol=1e-4, atol=1e-5)
    assert len(called) == host.config.num_hidden_layers


def test_hidden_states_and_attentions_are_the_hosts() -> None:
    host = build("XLMRoberta", "Model")
    host.set_attn_implementation("eager")
    ours = integrations.accelerate(copy.deepcopy(host))
    asked = {"output_hidden_states": True, "output_attentions": True}
    for a, b in zip(host(**batch(), **asked).values(), ours(**batch(), **asked).values(), strict=True):
        torch.testing.assert_close(b, a)


@pytest.mark.parametrize("which", [True, -2], ids=["all", "one"])
def test_hidden_states_are_recorded_without_padding(which: Any) -> None:
    """What COMET and flair pool: every layer's states, and gradients through each of them."""
    if which is not True and not hasattr(pytest.importorskip(integrations.CAPTURING), "selected_hidden_states"):
        pytest.skip("this transformers records all or none")
    host = build("XLMRoberta", "Model")
    ours = integrations.accelerate(copy.deepcopy(host))
    rows, kept = [], batch()["attention_mask"] > 0
    ours.encoder.layer[1].output.dense.register_forward_hook(lambda m, x, y: rows.append(y.shape[:-1]))
    for model in (host, ours):
        model.states = model(**batch(), output_hidden_states=which).hidden_states
        sum(x[kept].square().sum() for x in model.states if x is not None).backward()
    for a, b in zip(host.states, ours.states, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b[kept], a[kept], rtol=1e-4, atol=1e-5)
    for (name, a), b in zip(host.named_parameters(), ours.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-4, msg=name)
    if VERSION < (5, 0) or importlib.util.find_spec(integrations.CAPTURING):  # 5.0 records in another way
        assert rows == [(9 + 4 + 6,)]


def test_an_exchanged_leaf_is_used() -> None:
    host = build("XLMRoberta", "Model")
    ours = integrations.accelerate(copy.deepcopy(host))
    ours(**batch())  # builds the view, which must not go stale
    for model in (host, ours):
        torch.manual_seed(1)
        model.encoder.layer[0].attention.self.query = torch.nn.Linear(32, 32)
    kept = batch()["attention_mask"] > 0
    a, b = (model(**batch()).last_hidden_state[kept] for model in (host, ours))
    torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


def test_an_activation_that_somebody_exchanged_or_hooked_is_used() -> None:
    host = build("XLMRoberta", "Model")
    ours, kept = integrations.accelerate(copy.deepcopy(host)), batch()["attention_mask"] > 0
    ours(**batch())
    for model in (host, ours):
        model.encoder.layer[0].intermediate.intermediate_act_fn = torch.nn.ReLU()
    a, b = (model(**batch()).last_hidden_state[kept] for model in (host, ours))
    torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
    for model in (host, ours):
        model.encoder.layer[1].intermediate.intermediate_act_fn.register_forward_hook(lambda module, x, y: 2 * y)
    a, b = (model(**batch()).last_hidden_state[kept] for model in (host, ours))
    torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILY)
def test_patch_transformers_reaches_what_is_built_afterwards(family: str, tmp_path: Any) -> None:
    host = build(family)
    host.save_pretrained(tmp_path)
    integrations.patch_transformers()
    ours = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert ours.base_model.encoder.host_class is type(host.base_model.encoder)
    torch.testing.assert_close(ours(**batch()).logits, host(**batch()).logits, rtol=1e-5, atol=1e-6)
    integrations.unpatch()
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(again.base_model.encoder) is type(host.base_model.encoder)


def test_patching_leaves_namesakes_alone() -> None:
    integrations.patch_transformers()
    megatron = transformers.MegatronBertModel._from_config(transformers.MegatronBertConfig(**SIZES))
    generation = transformers.BertGenerationEncoder._from_config(transformers.BertGenerationConfig(**SIZES))
    assert not [model for model in (megatron, generation) if hasattr(model.encoder, "host_class")]


def test_question_answering_reads_padding_as_the_host_does(tmp_path: Any) -> None:
    host = build("XLMRoberta", "ForQuestionAnswering")
    host.save_pretrained(tmp_path)
    integrations.patch_transformers()
    patched = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path)
    spans = {"start_positions": torch.tensor([1, 2, 3]), "end_positions": torch.tensor([2, 3, 5])}
    wrapped = integrations.accelerate(copy.deepcopy(host))
    wrapped.roberta.encoder = Wrapped(wrapped.roberta.encoder)
    for ours in (patched, integrations.accelerate(copy.deepcopy(host)), wrapped):
        for a, b in zip(host(**batch(), **spans).values(), ours(**batch(), **spans).values(), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", ["ForTokenClassification", "ForMaskedLM"])
def test_labels_on_masked_tokens_count_as_in_the_host(head: str) -> None:
    host = build("Roberta", head)
    ours = integrations.accelerate(copy.deepcopy(host))
    labels = torch.ones(3, 9, dtype=torch.long)
    for given in (labels, labels.masked_fill(batch()["attention_mask"] == 0, -100)):
        a, b = (model(**batch(), labels=given).loss for model in (host, ours))
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("family", FAMILY)
def test_a_causal_language_model_reads_padding_as_the_host_does(family: str, decoder: bool, tmp_path: Any) -> None:
    """Its labels are those of the next tokens; where one of them is masked, and where none is."""
    host = build(family, "LMHeadModel" if family == "Bert" else "ForCausalLM", is_decoder=decoder)
    host.save_pretrained(tmp_path)
    integrations.patch_transformers()
    patched = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert hasattr(patched.base_model.encoder, "host_class")
    ids, mask = batch().values()
    for labels in (ids, ids.masked_fill(mask == 0, -100)):
        want = host(**batch(), labels=labels)
        for ours in (patched, integrations.accelerate(copy.deepcopy(host))):
            found = ours(**batch(), labels=labels)
            torch.testing.assert_close(found.loss, want.loss, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found.logits, want.logits, rtol=1e-4, atol=1e-5)


def test_masked_positions_are_zeros_unless_asked_for() -> None:
    host, masked = build("XLMRoberta", "Model"), batch()["attention_mask"] == 0
    ours = integrations.accelerate(copy.deepcopy(host))
    assert not ours(**batch()).last_hidden_state[masked].any()
    whole = integrations.accelerate(ours, unpad=False)(**batch()).last_hidden_state
    torch.testing.assert_close(whole, host(**batch()).last_hidden_state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILY)
def test_a_masked_token_that_fills_queries_up_is_computed(family: str) -> None:
    """ColBERT reads the [MASK]s that fill up its queries, and lets no token attend to them. Tokens of several kinds
    behind the end are left over, and left out."""
    host, mask = build(family, "Model"), batch()["attention_mask"]
    filled = batch()["input_ids"].where(mask > 0, 7)
    left_over = filled + (torch.arange(9) % 2) * (1 - mask)
    expected, rows = host(filled, mask)[0], []
    integrations.accelerate(host)
    host.encoder.layer[0].output.dense.register_forward_hook(lambda m, x, y: rows.append(y.shape[:-1].numel()))
    for found in host(filled, mask), host(attention_mask=mask, input_ids=filled):
        torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(host(left_over, mask)[0][mask > 0], expected[mask > 0], rtol=1e-4, atol=1e-5)
    assert rows == [27, 27, 9 + 4 + 6]


def zeros(module: Any, inputs: Any, output: Any) -> Any:
    """A hook on a layer, which gives a tuple in transformers 4."""
    return (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks transformers' model
def test_an_adapter_for_each_text() -> None:
    """peft tells each layer the texts' adapters through hooks; rows laid end to end have lost their texts."""
    host = build("XLMRoberta", "Model")
    lora = peft.LoraConfig(target_modules=["query"], init_lora_weights=False)
    model = peft.get_peft_model(integrations.accelerate(host), lora, adapter_name="one")
    model.add_adapter("two", lora)
    names = {"adapter_names": ["one", "two", "__base__"]}
    found = model.eval()(**batch(), **names).last_hidden_state
    integrations.unpatch(model)
    torch.testing.assert_close(found, model(**batch(), **names).last_hidden_state)


def test_recording_once_does_not_slow_what_follows() -> None:
    """transformers leaves its hooks on the layers: they are not taken for somebody's own."""
    ours = integrations.accelerate(build("XLMRoberta", "Model"))
    ours(**batch(), output_hidden_states=True)
    rows = []
    ours.encoder.layer[1].output.dense.register_forward_hook(lambda m, x, y: rows.append(y.shape[0]))
    ours(**batch())
    assert rows == [9 + 4 + 6]
    assert len(ours(**batch(), output_hidden_states=True).hidden_states) == 3
    ours.encoder.layer[0].register_forward_hook(zeros)
    assert len(rows) == 2
    ours.encoder.layer[1].register_forward_hook(zeros)
    assert not ours(**batch()).last_hidden_state.any()  # somebody's own hooks are called


def test_arithmetic_that_somebody_changed_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scaling, a forward of the host's classes, and a layer of somebody's own."""
    host = build("XLMRoberta", "Model")
    ours, kept = integrations.accelerate(copy.deepcopy(host)), batch()["attention_mask"] > 0

    def same() -> None:
        a, b = (model(**batch()).last_hidden_state[kept] for model in (host, ours))
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)

    same()  # builds the view, which must not go stale
    if VERSION >= (5,):  # before, it is no attribute
        for model in (host, ours):
            model.encoder.layer[0].attention.self.scaling = 0.01
        same()
    with monkeypatch.context() as patch:
        patch.setattr(type(host.encoder.layer[0].output), "forward", lambda self, x, residual: 2 * residual)
        same()
    with monkeypatch.context() as patch:
        patch.setattr(type(host.encoder), "forward", lambda self, x, *args, **kw: Output(2 * x))
        same()
    for model in (host, ours):
        model.encoder.layer[1] = OwnLayer()  # in training mode
    same()


class OwnLayer(torch.nn.Module):
    def forward(self, x: torch.Tensor, *args: Any, **kw: Any) -> Any:
        return 2 * x if VERSION >= (5,) else (2 * x,)


def test_hooks_on_every_module_see_the_hosts_own() -> None:
    """As FlopCounterMode registers them."""
    host = build("XLMRoberta", "Model")
    ours, seen = integrations.accelerate(copy.deepcopy(host)), []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, x, y: seen.append(type(module).__name__))
    try:
        a, b = (model(**batch()).last_hidden_state for model in (host, ours))
    finally:
        hook.remove()
    torch.testing.assert_close(b, a)
    assert sum(name == "XLMRobertaLayer" for name in seen) == 2 * host.config.num_hidden_layers


def moved(model: Any, how: str) -> Any:
    if how == "compile":
        return torch.compile(model, backend="eager")
    if how == "lora":
        lora = peft.LoraConfig(target_modules=["query", "value"], init_lora_weights=False, lora_dropout=0.0)
        torch.manual_seed(2)
        return peft.get_peft_model(model, lora)
    if how == "checkpointing":
        model.gradient_checkpointing_enable()
        return model.train()
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))
    return model.to(torch.float64) if how == "to" else copy.deepcopy(model)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")
@pytest.mark.parametrize("how", ["compile", "lora", "checkpointing", "pickle", "to", "deepcopy"])
def test_what_people_do_to_models_still_works(how: str) -> None:
    host = build("XLMRoberta")
    ours = integrations.accelerate(copy.deepcopy(host))
    ours(**batch())  # builds the view, which must follow
    models = [moved(model, how) for model in (host, ours)]
    losses = [model(**batch(), labels=torch.tensor([0, 1, 1])).loss for model in models]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    for loss in losses:
        loss.backward()
    (gradients, others) = ([p.grad for p in model.parameters() if p.requires_grad] for model in models)
    for a, b in zip(gradients, others, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)
    assert any(hasattr(module, "host_class") for module in models[1].modules())
    integrations.unpatch()
    assert not any(hasattr(module, "host_class") for module in models[1].modules())


@pytest.mark.parametrize("how", ["half", "autocast"])
def test_low_precision_is_as_near_as_the_hosts(how: str) -> None:
    host = build("XLMRoberta")
    exact = host(**batch()).logits
    logits = []
    for model in (copy.deepcopy(host), integrations.accelerate(copy.deepcopy(host))):
        model = model.half() if how == "half" else model
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            logits.append(model(**batch()).logits)
    assert logits[0].dtype == logits[1].dtype == (torch.half if how == "half" else torch.bfloat16)
    errors = [(x.float() - exact).abs().max() for x in logits]
    assert errors[1] <= 2 * errors[0] + 4 * torch.finfo(logits[0].dtype).eps * exact.abs().max()


def test_saved_weights_are_the_hosts(tmp_path: Any) -> None:
    host = build("XLMRoberta")
    integrations.accelerate(copy.deepcopy(host)).save_pretrained(tmp_path / "ours")
    host.save_pretrained(tmp_path / "host")
    names = "model.safetensors", "config.json"
    assert all((tmp_path / "ours" / n).read_bytes() == (tmp_path / "host" / n).read_bytes() for n in names)


def test_patching_leaves_no_trace(tmp_path: Any) -> None:
    host = build("Bert", "ForQuestionAnswering")
    host.save_pretrained(tmp_path)
    modules = [integrations._host_module(model_type) for model_type in KINDS]
    before = [dict(vars(module)) for module in modules]
    forward = type(host).__dict__["forward"]
    integrations.patch_transformers()
    integrations.patch_transformers()  # a second time changes nothing
    for ours in (type(host).from_pretrained(tmp_path), type(host)(host.config).eval()):
        ours.load_state_dict(host.state_dict())
        assert hasattr(ours.bert.encoder, "host_class")
        torch.testing.assert_close(ours(**batch()).start_logits, host(**batch()).start_logits, rtol=1e-4, atol=1e-5)
    integrations.unpatch()
    assert [dict(vars(module)) for module in modules] == before
    assert type(host).__dict__["forward"] is forward
    assert type(ours.bert.encoder) is type(host.bert.encoder)


def test_unpatch_leaves_what_others_have_put_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    head = transformers.XLMRobertaForMaskedLM
    monkeypatch.setattr(head, "forward", head.forward)  # put back afterwards
    host = build("XLMRoberta", "ForMaskedLM")
    want = host(**batch()).logits
    integrations.accelerate(host)
    inner = head.forward
    head.forward = theirs = lambda *args, **kw: inner(*args, **kw)
    integrations.unpatch()
    assert head.forward is theirs
    torch.testing.assert_close(host(**batch()).logits, want)


def sentence_directory(model: Any, directory: Any) -> str:
    model.save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(CHECKPOINT, model_max_length=64).save_pretrained(directory)
    return str(directory)


TEXTS = ["One.", "A much longer sentence about the days of the week and the months of the year.", "", "Two words"] * 2


def test_sentence_transformers_patched_and_accelerated(tmp_path: Any) -> None:
    host = transformers.XLMRobertaModel.from_pretrained(CHECKPOINT, dtype=torch.float32, add_pooling_layer=False)
    transformer = sentence_modules.Transformer(sentence_directory(host, tmp_path))
    pooling = sentence_modules.Pooling(host.config.hidden_size, "mean")
    want = SentenceTransformer(modules=[transformer, pooling], device="cpu")
    want.save(str(tmp_path / "st"))
    vectors = want.encode(TEXTS)
    integrations.patch_transformers()
    patched = SentenceTransformer(str(tmp_path / "st"), device="cpu")
    assert hasattr(patched[0].auto_model.encoder, "host_class")
    np.testing.assert_allclose(patched.encode(TEXTS), vectors, atol=1e-4)
    integrations.unpatch()
    np.testing.assert_array_equal(patched.encode(TEXTS), vectors)
    assert integrations.accelerate(patched) is patched
    np.testing.assert_allclose(patched.encode(TEXTS), vectors, atol=1e-4)


def test_cross_encoder_patched_and_accelerated(tmp_path: Any) -> None:
    torch.manual_seed(0)
    load = transformers.XLMRobertaForSequenceClassification.from_pretrained
    head = load(CHECKPOINT, dtype=torch.float32, num_labels=1)
    for p in head.classifier.parameters():
        torch.nn.init.normal_(p, std=0.3)
    directory = sentence_directory(head, tmp_path)
    pairs = [("Which day is it?", text) for text in TEXTS]
    scores = CrossEncoder(directory, device="cpu").predict(pairs)
    assert np.ptp(scores) > 0.01  # they tell the texts apart
    integrations.patch_transformers()
    patched = CrossEncoder(directory, device="cpu")
    np.testing.assert_allclose(patched.predict(pairs), scores, atol=1e-4)
    integrations.unpatch()
    np.testing.assert_array_equal(patched.predict(pairs), scores)
    np.testing.assert_allclose(integrations.accelerate(patched).predict(pairs), scores, atol=1e-4)


WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"]
MONTHS = ["January", "March", "April", "June", "October"]
FRAMES = [
    "We met in the town on a {}.",
    "{} was cold.",
    "The bread of {} is good, and so is the water of the river.",
    "I remember {} well.",
    "She said that {} was the best of all for a journey to the sea.",
    "It is {}.",
]


def task(held_out: bool) -> list[dict[str, Any]]:
    """Sentences about a weekday or a month; two frames are held out."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(CHECKPOINT)
    frames = FRAMES[-2:] if held_out else FRAMES[:-2]
    named = [(word, label) for label, words in enumerate((WEEKDAYS, MONTHS)) for word in words]
    return [{**tokenizer(f.format(word)), "labels": label} for f in frames for word, label in named]


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    pad = {"input_ids": 1, "attention_mask": 0}
    padded = {k: torch.tensor([r[k] + [v] * (longest - len(r[k])) for r in rows]) for k, v in pad.items()}
    return {**padded, "labels": torch.tensor([row["labels"] for row in rows])}


def accuracy(model: Any) -> float:
    rows = collate(task(held_out=True))
    with torch.no_grad():
        return (model.eval()(**rows).logits.argmax(1) == rows["labels"]).float().mean().item()


STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def trainer_curve(folder: Any) -> tuple[list[float], float]:
    torch.manual_seed(0)
    load = transformers.XLMRobertaForSequenceClassification.from_pretrained
    model = load(CHECKPOINT, dtype=torch.float32, **STILL)
    arguments = transformers.TrainingArguments(
        folder, num_train_epochs=6, per_device_train_batch_size=8, learning_rate=1e-3, logging_steps=1,
        report_to=[], save_strategy="no", disable_tqdm=True, seed=0, use_cpu=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, collate, train_dataset=task(held_out=False))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], accuracy(model)


def test_trainer_learns_patched_on_the_hosts_curve(tmp_path: Any) -> None:
    want, right = trainer_curve(tmp_path)
    integrations.patch_transformers()
    curve, ours = trainer_curve(tmp_path)
    assert len(curve) == 30
    torch.testing.assert_close(torch.tensor(curve), torch.tensor(want), rtol=1e-3, atol=1e-3)
    assert min(right, ours) >= 0.95


def test_a_plain_loop_learns_with_our_class() -> None:
    torch.manual_seed(0)
    model = xlmr.XLMRobertaForSequenceClassification.from_pretrained(CHECKPOINT, dtype=torch.float32, **STILL).train()
    optimizer, rows = torch.optim.AdamW(model.parameters(), lr=1e-3), task(held_out=False)
    for _ in range(6):
        order = torch.randperm(len(rows)).tolist()
        for start in range(0, len(rows), 8):
            optimizer.zero_grad()
            model(**collate([rows[i] for i in order[start : start + 8]])).loss.backward()
            optimizer.step()
    assert accuracy(model) >= 0.95


@pytest.mark.parametrize(("beyond", "heads"), [("position_bias", 2), ("softcap", 2), ("s_aux", 2), ("key heads", 1)])
def test_an_attention_of_another_architecture_is_refused(beyond: str, heads: int) -> None:
    """T5, Gemma, GPT-OSS and Llama call what attn_implementation names with these."""
    x = torch.randn(1, 2, 5, 8)
    given = {} if heads == 1 else {beyond: torch.ones(1)}
    with pytest.raises(ValueError, match=f"^Linear.*{beyond}.*load it without attn_implementation='xlmr'"):
        integrations.attention_forward(torch.nn.Linear(1, 1), x, x[:, :heads], x[:, :heads], None, **given)


def test_attention_is_causal_where_the_module_or_the_call_says_so() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 2, 5, 8)
    causal = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True).transpose(1, 2)
    module = torch.nn.Module()
    module.is_causal = False
    got, _ = integrations.attention_forward(module, x, x, x, None, is_causal=True)
    torch.testing.assert_close(got, causal)
    module.is_causal = True
    torch.testing.assert_close(integrations.attention_forward(module, x, x, x, None)[0], causal)
    full = integrations.attention_forward(module, x, x, x, None, is_causal=False)[0]
    assert not torch.allclose(full, causal)


@pytest.mark.skipif(VERSION < (5,), reason="transformers 4's encoders take no attention by name")
def test_attn_implementation_masks_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    host, calls, attention = build("XLMRoberta", "Model"), [], integrations.attention_forward
    want = host(**batch()).last_hidden_state
    monkeypatch.setattr(integrations, "attention_forward", lambda *a, **k: calls.append(1) or attention(*a, **k))
    integrations.register_attention()
    host.set_attn_implementation("xlmr")
    torch.testing.assert_close(host(**batch()).last_hidden_state, want, rtol=1e-4, atol=1e-5)
    assert len(calls) == 2
    integrations.unpatch()
    assert "xlmr" not in [*transformers.AttentionInterface(), *transformers.AttentionMaskInterface()]
    with pytest.raises(KeyError, match="xlmr"):
        host(**batch())
    host.set_attn_implementation("sdpa")
    torch.testing.assert_close(host(**batch()).last_hidden_state, want)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # DeBERTa's modules in transformers 5.0
@pytest.mark.parametrize("name", ["DebertaV2", "MPNet", "XLMRobertaXL"])
def test_another_mathematics_is_refused_by_name(name: str) -> None:
    config = getattr(transformers, f"{name}Config")(**{**SIZES, "num_hidden_layers": 1}, pad_token_id=1)
    reason = re.escape(f"holds a model of type {config.model_type} ({REFUSED[config.model_type]}); supported are xlm-r")
    with pytest.raises(TypeError, match=reason):
        integrations.accelerate(getattr(transformers, f"{name}Model")(config))


def test_what_is_no_encoder_of_the_family_is_refused() -> None:
    foreign = torch.nn.Linear(1, 1)  # as jina-v3's: code of its own under our name
    foreign.config = transformers.XLMRobertaConfig()
    with pytest.raises(TypeError, match="calls itself xlm-roberta but has no encoder of transformers"):
        integrations.accelerate(foreign)
    relative = build("XLMRoberta", "Model")
    relative.encoder.config.position_embedding_type = "relative_key"
    with pytest.raises(TypeError, match="position_embedding_type is 'relative_key': only 'absolute'"):
        integrations.accelerate(relative)
    with pytest.raises(TypeError, match="model is a str: give a torch module"):
        integrations.accelerate("xlm-roberta-base")
    with pytest.raises(TypeError, match=r"model is a SimpleNamespace: give the torch module in it, \.model_body"):
        integrations.accelerate(SimpleNamespace(model_body=relative, batch_size=8))  # as FlagEmbedding's and SetFit's
    with pytest.raises(TypeError, match="holds no encoder of the family"):
        integrations.accelerate(torch.nn.Linear(1, 1))


@pytest.mark.skipif(VERSION >= (5,), reason="transformers 5's encoders know absolute positions only")
@pytest.mark.parametrize("family", FAMILY)
def test_relative_positions_are_left_to_the_host(family: str) -> None:
    host = build(family, position_embedding_type="relative_key")
    integrations.patch_transformers()
    ours = type(host)(host.config).eval()
    ours.load_state_dict(host.state_dict())
    assert hasattr(ours.base_model.encoder, "host_class")
    torch.testing.assert_close(ours(**batch()).logits, host(**batch()).logits)


@pytest.mark.skipif(VERSION >= (5,), reason="transformers 5 knows no head_mask")
def test_a_head_mask_is_left_to_the_host() -> None:
    host = build("XLMRoberta")
    ours, mask = integrations.accelerate(copy.deepcopy(host)), torch.tensor([1.0, 0.0, 1.0, 1.0])
    torch.testing.assert_close(ours(**batch(), head_mask=mask).logits, host(**batch(), head_mask=mask).logits)
    assert not torch.equal(ours(**batch()).logits, ours(**batch(), head_mask=mask).logits)


@pytest.mark.parametrize(
    ("call", "version", "least"),
    [
        (integrations.patch_transformers, "4.56.2", "4.57"),
        (lambda: integrations.accelerate(torch.nn.Linear(1, 1)), "4.9.0", "4.57"),
        (integrations.register_attention, "4.57.6", "5.0"),
    ],
)
def test_versions_that_are_not_supported_are_named(
    monkeypatch: pytest.MonkeyPatch, call: Any, version: str, least: str
) -> None:
    monkeypatch.setattr(transformers, "__version__", version)
    with pytest.raises(ImportError, match=f"transformers {version} is not supported: install {least} or later"):
        call()
