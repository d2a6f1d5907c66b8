"""Surgery: what is not plain is called, as transformers calls it."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from reference import HEADS, LENGTHS, RIGHT, B, S, build, ids, inputs, keep, masks, same
from torch import nn
from torch.nn.utils import parametrizations, prune

from xlmr import model as tree
from xlmr.ops import EAGER


class Adapter(nn.Module):
    """A bottleneck after a block, as adapter libraries wrap them: any arguments through, the first output changed."""

    def __init__(self, block: nn.Module, size: int = 32):
        super().__init__()
        self.block = block
        self.down = nn.Linear(size, 4)
        self.up = nn.Linear(4, size)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.block(*args, **kwargs)
        first = out[0] if isinstance(out, tuple) else out
        changed = first + self.up(torch.relu(self.down(first)))
        return (changed, *out[1:]) if isinstance(out, tuple) else changed


class PlainPositions(nn.Module):
    """Embeddings of somebody's own, which number the positions from 0 where the caller gives none."""

    def __init__(self, embeddings: Any):
        super().__init__()
        self.words, self.positions = embeddings.word_embeddings, embeddings.position_embeddings

    def forward(self, input_ids: Any, position_ids: Any = None, **others: Any) -> Any:
        numbered = torch.arange(input_ids.shape[1])[None] if position_ids is None else position_ids
        return self.words(input_ids) + self.positions(numbered)


SURGERIES: dict[str, Callable[[Any], Any]] = {
    "layer dropped": lambda m: setattr(m.encoder, "layer", m.encoder.layer[:2]),
    "layer wrapped": lambda m: m.encoder.layer.__setitem__(1, Adapter(m.encoder.layer[1])),
    "attention wrapped": lambda m: setattr(m.encoder.layer[0], "attention", Adapter(m.encoder.layer[0].attention)),
    "self-attention wrapped": lambda m: setattr(
        m.encoder.layer[0].attention, "self", Adapter(m.encoder.layer[0].attention.self)
    ),
    "output wrapped": lambda m: setattr(m.encoder.layer[2], "output", Adapter(m.encoder.layer[2].output)),
    "intermediate wrapped": lambda m: setattr(
        m.encoder.layer[2], "intermediate", Adapter(m.encoder.layer[2].intermediate, 48)
    ),
    "query wrapped": lambda m: setattr(
        m.encoder.layer[1].attention.self, "query", Adapter(m.encoder.layer[1].attention.self.query)
    ),
    "norm replaced": lambda m: setattr(m.encoder.layer[1].output, "LayerNorm", nn.Identity()),
    "norm of embeddings replaced": lambda m: setattr(m.embeddings, "LayerNorm", nn.Identity()),
    "activation replaced": lambda m: setattr(m.encoder.layer[1].intermediate, "intermediate_act_fn", nn.SiLU()),
    "embeddings wrapped": lambda m: setattr(m, "embeddings", Adapter(m.embeddings)),
    "word embeddings wrapped": lambda m: m.set_input_embeddings(Adapter(m.get_input_embeddings())),
    "weights normalised": lambda m: parametrizations.weight_norm(m.encoder.layer[0].output.dense),
    "pooler wrapped": lambda m: setattr(m, "pooler", Adapter(m.pooler)),
    "weight pruned": lambda m: prune.l1_unstructured(m.encoder.layer[0].output.dense, "weight", 0.5),
    "hook changes a layer": lambda m: m.encoder.layer[0].register_forward_hook(lambda mod, i, out: out * 0.5),
    "hook changes a linear": lambda m: m.encoder.layer[0].output.dense.register_forward_hook(lambda mod, i, out: -out),
    "pre-hook changes the encoder": lambda m: m.encoder.register_forward_pre_hook(lambda mod, a: (a[0] + 1, *a[1:])),
    "hook changes what the encoder returns": lambda m: m.encoder.register_forward_hook(
        lambda mod, i, out: type(out)(**{**out, "last_hidden_state": out[0] * 0.5})
    ),
    "embeddings of another kind": lambda m: setattr(m, "embeddings", PlainPositions(m.embeddings)),
    "forward overridden": lambda m: setattr(
        m.encoder.layer[1].intermediate.dense, "forward", lambda x: x.repeat_interleave(3, dim=-1)[..., :48]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SURGERIES)
def test_surgery(name: str) -> None:
    """The same cut on transformers' model and on ours gives the same numbers and gradients."""
    reference, ours = build("Model")
    for model in (reference, ours):
        torch.manual_seed(7)
        SURGERIES[name](model)
    tokens = ids()
    for mask in (None, RIGHT, masks()["holes"]):
        for asked in ({}, {"output_attentions": True, "output_hidden_states": True}):
            mine, theirs = ours(tokens, mask, **asked), reference(tokens, mask, **asked)
            same(mine.last_hidden_state, theirs.last_hidden_state, mask, atol=1e-5)
            torch.testing.assert_close(mine.pooler_output, theirs.pooler_output, atol=1e-5, rtol=1e-5)
            assert len(mine.get("attentions", ())) == len(theirs.get("attentions", ()) or ())
            for a, b in zip(mine.get("attentions", ()), theirs.get("attentions", ()) or (), strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    for model in (ours, reference):
        model(tokens, RIGHT).pooler_output.square().sum().backward()
    expected = dict(reference.named_parameters())
    for key, parameter in ours.named_parameters():
        assert (parameter.grad is None) == (expected[key].grad is None), key
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[key].grad, atol=2e-4, rtol=1e-4)


def test_hooks_see_the_padded_shape_and_leaves_see_rows() -> None:
    _, ours = build("Model")
    shapes: dict[str, torch.Size] = {}
    watched = ("embeddings", "encoder.layer.0", "encoder.layer.1.attention.output", "encoder.layer.2.intermediate")
    for name in watched:
        ours.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: shapes.__setitem__(name, out.shape))
    expected = build("Model")[1].load_state_dict(ours.state_dict())
    ours(ids(), RIGHT)
    assert [tuple(shapes[name][:2]) for name in watched] == [(B, S)] * 4
    assert not expected.missing_keys
    _, ours = build("Model")
    ours.encoder.layer[0].output.dense.register_forward_hook(lambda m, i, out: shapes.__setitem__("leaf", out.shape))
    ours(ids(), RIGHT)
    assert tuple(shapes["leaf"]) == (sum(LENGTHS), 32)


def test_hooks_see_the_references_positional_arguments() -> None:
    """A layer gets mask and encoder states by position, its attention the mask: hooks and replacements count on it."""
    for path, count in (
        ("encoder.layer.1", 3),
        ("encoder.layer.1.attention", 2),
        ("encoder.layer.1.attention.self", 1),
    ):
        seen = []
        reference, ours = build("Model")
        reference.set_attn_implementation("eager")  # whose mask is additive, as ours
        for model in (reference, ours):
            model.get_submodule(path).register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args))
            model(ids(None), RIGHT)
        assert [len(args) for args in seen] == [count] * 2
        if count > 1:
            torch.testing.assert_close(*(args[1].expand(B, 1, S, S) for args in seen))


def test_blocks_of_a_users_own_model() -> None:
    reference, ours = build("Model")
    layer, x = reference.encoder.layer[1], torch.randn(B, S, 32)
    sees = torch.zeros(B, 1, S, S).masked_fill(~RIGHT[:, None, None].bool(), -torch.inf)
    own = tree.XLMRobertaLayer(ours.config), tree.XLMRobertaAttention(ours.config), tree.XLMRobertaEncoder(ours.config)
    for block, theirs in zip(own, (layer, layer.attention, reference.encoder), strict=True):
        block.eval().load_state_dict(theirs.state_dict())
        found, expected = (block(x, sees), theirs(x, sees))
        if not isinstance(found, torch.Tensor):
            found, expected = found[0], expected[0]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_wrapped_encoder() -> None:
    class Wrapper(nn.Module):
        def __init__(self, block: nn.Module):
            super().__init__()
            self.block = block

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.block(*args, **kwargs)

    reference, ours = build("Model")
    ours.encoder = Wrapper(ours.encoder)
    tokens = ids()
    same(ours(tokens, RIGHT).last_hidden_state, reference(tokens, RIGHT).last_hidden_state, RIGHT, atol=1e-5)


def test_global_hooks_are_called() -> None:
    _, ours = build("Model")
    called = set()
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, out: called.add(type(m).__name__))
    try:
        ours(ids(), RIGHT)
    finally:
        handle.remove()
    assert {"Linear", "LayerNorm", "Embedding", "XLMRobertaLayer", "XLMRobertaSelfAttention"} <= called


@pytest.mark.parametrize("name", [*HEADS, "Model"])
def test_a_watched_base_model_changes_nothing(name: str) -> None:
    """A hook that does nothing on `roberta`, or on a head, makes the heads call it: with every position computed."""
    for watched in ("roberta", "lm_head", "classifier"):
        for kind in ("left", "right", "holes"):
            settings = {"is_decoder": True, "use_cache": False} if name == "CausalLM" else {}
            reference, ours = build(name if name == "Model" else f"For{name}", **settings)
            if hasattr(ours, watched):
                getattr(ours, watched).register_forward_hook(lambda *a: None)
            given = inputs(name, masks()[kind])
            real = keep(masks()[kind])
            for mine, theirs in zip(*(m(**given).to_tuple() for m in (ours, reference)), strict=True):
                if theirs.shape[:2] == (B, S):
                    mine, theirs = mine[real], theirs[real]
                torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "surgery"),
    [
        ("Model", lambda m: m.set_input_embeddings(nn.Embedding(97, 32))),
        ("Model", lambda m: m.set_input_embeddings(nn.Embedding(97, 32, padding_idx=1, max_norm=0.5))),
        (
            "Model",
            lambda m: setattr(m.encoder.layer[1].output, "LayerNorm", nn.LayerNorm(32, elementwise_affine=False)),
        ),
        ("Model", lambda m: setattr(m.encoder.layer[1].attention.self, "query", nn.LayerNorm(32))),
        ("Model", lambda m: setattr(m.encoder.layer[1].intermediate, "intermediate_act_fn", nn.LayerNorm(48))),
        ("Model", lambda m: setattr(m.encoder.layer[1].attention.self, "dropout", nn.Identity())),
        ("ForMaskedLM", lambda m: setattr(m, "lm_head", nn.Linear(32, 97))),
        ("Model", lambda m: m.get_input_embeddings().register_forward_hook(lambda mod, i, out: out + out[:, :1])),
        ("Model", lambda m: m.encoder.layer.append(m.encoder.layer[0])),
    ],
)
def test_a_leaf_or_block_of_another_kind(name: str, surgery: Callable[[Any], Any]) -> None:
    reference, ours = build(name)
    for model in (reference, ours):
        torch.manual_seed(7)
        surgery(model)
    tokens = ids()
    with torch.no_grad():
        same(ours(tokens, RIGHT)[0], reference(tokens, RIGHT)[0], RIGHT, atol=1e-5)
    for model in (ours, reference):
        model(tokens, RIGHT)[0][keep(RIGHT)].square().sum().backward()
    expected = dict(reference.named_parameters())
    for key, parameter in ours.named_parameters():
        if "word_embeddings" in key:
            torch.testing.assert_close(parameter.grad, expected[key].grad, atol=2e-4, rtol=1e-4)


def test_layers_added_later_follow_the_ops() -> None:
    _, ours = build("Model")
    calls = []
    ours.ops = replace(EAGER, attention=lambda *a: calls.append(1) or EAGER.attention(*a))
    ours.encoder.layer.append(tree.XLMRobertaLayer(ours.config, 3))
    ours(ids(), RIGHT)
    assert len(calls) == 4


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks transformers' model
@pytest.mark.parametrize("targets", [["query", "value"], ["query", "key", "value", "dense"]])
@pytest.mark.parametrize("name", ["ForSequenceClassification", "ForTokenClassification", "ForMaskedLM"])
def test_lora(name: str, targets: list[str]) -> None:
    """PEFT's LoRA: same numbers, same gradients, packed; merged and saved as on transformers."""
    peft = pytest.importorskip("peft")
    kinds = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
    settings = peft.LoraConfig(task_type=kinds.get(name), target_modules=targets, r=4, init_lora_weights=False)
    wrapped = []
    for model in build(name):
        torch.manual_seed(3)
        wrapped.append(peft.get_peft_model(model, settings).eval())
    reference, ours = wrapped
    ours.load_state_dict(reference.state_dict())
    given = inputs(name.removeprefix("For"), RIGHT)
    mine, theirs = (model(**given) for model in (ours, reference))
    torch.testing.assert_close(mine.loss, theirs.loss)
    if name != "ForSequenceClassification":
        same(mine.logits, theirs.logits, RIGHT, atol=1e-5)
    mine.loss.backward()
    theirs.loss.backward()
    expected = {k: p for k, p in reference.named_parameters() if p.requires_grad}
    assert {k for k, p in ours.named_parameters() if p.requires_grad} == set(expected)
    for key, parameter in expected.items():
        torch.testing.assert_close(ours.get_parameter(key).grad, parameter.grad, atol=1e-5, rtol=1e-3)
    with torch.no_grad():
        merged = ours.merge_and_unload()
        torch.testing.assert_close(merged(**given).loss, mine.loss.detach(), atol=1e-5, rtol=1e-5)


def test_dynamic_quantisation_is_not_bypassed() -> None:
    _, ours = build("Model")
    tokens = ids()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao announces its move to torchao
        quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(ours), {nn.Linear}, dtype=torch.qint8)
        with torch.no_grad():
            difference = (quantised(tokens, RIGHT)[0] - ours(tokens, RIGHT)[0]).abs().max()
    assert 1e-4 < difference < 1
