"""The encoder: what is computed where, positions and limits, decoding, and the tools that people apply to a model."""

import copy
import pickle
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_accurate
from reference import HEADS, LENGTHS, TINY, B, S, build, double, inputs, keep, masks
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import xlmr
from xlmr import model as tree
from xlmr.ops import EAGER

RIGHT = masks()["right"]


def ids(mask: Tensor | None = RIGHT) -> Tensor:
    return torch.randint(4, TINY["vocab_size"], (B, S)).masked_fill(~keep(mask), 1)


def same(ours: Tensor, reference: Tensor, mask: Tensor | None = None, atol: float = 3e-6) -> None:
    real = keep(mask)
    torch.testing.assert_close(ours[real], reference[real], atol=atol, rtol=1e-5)


# What is computed


def test_padding_content_does_not_matter_and_outputs_there_are_zero() -> None:
    _, ours = build("Model")
    real, tokens = keep(RIGHT), ids()
    with torch.no_grad():
        first = ours(tokens, RIGHT).last_hidden_state
        other = ours(torch.where(real, tokens, torch.randint(4, 97, (B, S))), RIGHT).last_hidden_state
    assert torch.equal(first[~real], torch.zeros_like(first[~real]))
    # The ids of padding tokens count for positions (of what comes after them: nothing), so all is equal bit for bit.
    assert torch.equal(first, other)


def test_rows_computed() -> None:
    """How many rows the layers see, by mask and by need: the decision of varlen.plan."""
    seen: list[int] = []

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(len(x))
        return EAGER.linear(x, weight, bias)

    def rows(model: Any, **given: Any) -> int:
        seen.clear()
        model.ops = replace(EAGER, linear=linear)
        with torch.no_grad():
            model(ids(), **given)
        return seen[0]

    _, base = build("Model")
    _, tagger = build("ForTokenClassification")
    _, answerer = build("ForQuestionAnswering")
    real, every, holes = sum(LENGTHS), B * S, masks()["holes"]
    assert rows(base, attention_mask=RIGHT) == real
    assert rows(base, attention_mask=masks()["bool-4d"]) == real
    assert rows(base, attention_mask=masks()["float-4d"]) == real
    assert rows(base, attention_mask=None) == every
    assert rows(base, attention_mask=RIGHT, output_attentions=True) == every
    assert rows(base, attention_mask=masks()["left"]) == every  # the pooler reads column 0
    assert rows(tagger, attention_mask=masks()["left"]) == real
    assert rows(tagger, attention_mask=holes) == int(holes.sum())
    assert rows(tagger, attention_mask=torch.cat([RIGHT[:4], torch.zeros(1, S)])) == every  # a row with no real token
    assert rows(answerer, attention_mask=RIGHT) == every
    base.unpad = False
    assert rows(base, attention_mask=RIGHT) == every


def test_rows_without_a_real_token_are_finite() -> None:
    mask = torch.cat([RIGHT[:3], torch.zeros(2, S, dtype=torch.long)])
    for name in ("Model", "ForMaskedLM", "ForSequenceClassification", "ForCausalLM"):
        for attentions in (False, True):
            _, ours = build(name, **({"is_decoder": True} if name == "ForCausalLM" else {}))
            output = ours(ids(mask), mask, output_attentions=attentions)
            assert all(t.isfinite().all() for t in output.to_tuple() if isinstance(t, Tensor))
    reference, ours = build("ForMaskedLM")
    with torch.no_grad():
        tokens = ids(mask)
        mine, theirs = (m(tokens, mask).logits[:3][keep(RIGHT)[:3]] for m in (ours, reference))
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_a_mask_for_each_query() -> None:
    """Bool or float, 3-D or 4-D, for each head or for all, finite or −inf: computed by rule in plain PyTorch."""
    reference, ours = build("Model")
    tokens = ids(None)
    sees = (torch.rand(B, 1, S, S) < 0.6) | torch.eye(S, dtype=torch.bool)
    bias = torch.zeros(B, 1, S, S).masked_fill(~sees, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = reference(tokens, bias).last_hidden_state
        for mask in (sees, bias, sees[:, 0], torch.zeros(B, 1, S, S).masked_fill(~sees, -torch.inf)):
            same(ours(tokens, mask).last_hidden_state, expected)
        slopes = torch.randn(B, 4, S, S)
        same(ours(tokens, slopes).last_hidden_state, reference(tokens, slopes).last_hidden_state)


@settings(max_examples=40)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.booleans(), st.integers(0, 99))
def test_packed_entry_equals_each_text_alone(lengths: list[int], causal: bool, seed: int) -> None:
    torch.manual_seed(seed)
    _, ours = build("Model", num_hidden_layers=2, is_decoder=causal, use_cache=False)
    texts = [torch.randint(4, 97, (n,)) for n in lengths]
    for text in texts:
        text[2:3] = 1  # a pad token among the real ones takes no position
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    total = int(cu_seqlens[-1])
    rows = torch.randperm(total)[: total // 2].sort().values
    with torch.no_grad():
        packed = ours.forward_packed(torch.cat(texts), cu_seqlens, max(lengths))
        some = ours.forward_packed(torch.cat(texts), cu_seqlens.int(), 20, rows=rows)
        alone = [ours(text[None]).last_hidden_state[0] for text in texts if len(text)]
    assert torch.allclose(packed, torch.cat(alone) if alone else packed, atol=1e-5)
    assert torch.allclose(some, packed[rows], atol=1e-5)


# Positions, limits and bad input


def test_positions_types_and_embeds() -> None:
    reference, ours = build("Model")
    tokens, mask = ids(), masks()["holes"]
    tokens[0, 4] = tokens[2, 0] = 1  # pads among real tokens: positions skip them, whatever the mask
    embeds = torch.randn(B, S, 32)
    positions = torch.randint(0, 42, (B, S))
    for arguments in (
        {"input_ids": tokens},
        {"input_ids": tokens.int()},
        {"input_ids": tokens, "token_type_ids": torch.randint(0, 2, (B, S))},
        {"input_ids": tokens, "position_ids": positions},
        {"input_ids": tokens, "position_ids": positions[:1]},
        {"inputs_embeds": embeds},
        {"inputs_embeds": embeds, "position_ids": positions},
    ):
        with torch.no_grad():
            mine, theirs = (m(**arguments, attention_mask=mask).last_hidden_state for m in (ours, reference))
        same(mine, theirs, mask)


def test_the_longest_sequence() -> None:
    reference, ours = build("Model")
    tokens = torch.randint(4, 97, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens)[0], reference(tokens)[0], atol=3e-6, rtol=1e-5)
        padded = torch.nn.functional.pad(tokens, (0, 8), value=1)  # 48 columns, 40 tokens: pads take no position
        mask = (padded != 1).long()
        torch.testing.assert_close(
            ours(padded, mask)[0][:, :40], reference(padded, mask)[0][:, :40], atol=3e-6, rtol=1e-5
        )
    for call in (
        lambda: ours(torch.randint(4, 97, (2, 41))),
        lambda: ours(inputs_embeds=torch.randn(2, 41, 32)),
        lambda: ours.forward_packed(torch.randint(4, 97, (41,)), torch.tensor([0, 41]), 41),
    ):
        with pytest.raises(ValueError, match=r"41 tokens: this model takes at most 40 .*max_length=40"):
            call()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m(), "exactly one of input_ids or inputs_embeds"),
        (lambda m: m(ids(), inputs_embeds=torch.randn(B, S, 32)), "exactly one"),
        (lambda m: m(torch.tensor([[5, 97]])), r"input_ids holds 97: allowed are 0 … 96"),
        (lambda m: m(torch.tensor([[5, -1]])), r"input_ids holds -1"),
        (lambda m: m(torch.tensor([5, 6])), r"input_ids has shape \(2,\)"),
        (lambda m: m(torch.tensor([[5.0]])), "input_ids has dtype torch.float32"),
        (lambda m: m(inputs_embeds=torch.randn(2, 3, 31)), r"\[batch, sequence, 32\]"),
        (lambda m: m(ids(), torch.ones(B, S + 1)), r"attention_mask has shape \(5, 13\)"),
        (lambda m: m(ids(), torch.ones(B, 1, S, S + 1)), r"attention_mask has shape \(5, 1, 12, 13\)"),
        (lambda m: m(ids(), token_type_ids=torch.full((B, S), 2)), "token_type_ids holds 2"),
        (lambda m: m(ids(), position_ids=torch.full((B, S), 42)), "position_ids holds 42"),
        (lambda m: m.forward_packed(ids(), torch.tensor([0, 3]), 3), r"a packed batch is \[tokens\]"),
        (lambda m: m.forward_packed(ids()[0], torch.tensor([0, 9, 5, 12]), 12), "it must rise from 0 to 12"),
        (lambda m: m.forward_packed(ids()[0], torch.tensor([0, 12]), 5), "steps of at most max_seqlen = 5"),
        (lambda m: m.forward_packed(ids()[0], torch.tensor([0.0, 12.0]), 12), "int32 or int64"),
        (lambda m: m.forward_packed(ids()[0], torch.tensor([0, 12]), 12, rows=torch.tensor([7, 1])), "must be sorted"),
        (lambda m: m.forward_packed(ids()[0], torch.tensor([0, 12]), 12, rows=torch.tensor([12])), "rows holds 12"),
        (lambda m: setattr(m, "ops", nn.Linear), "give an xlmr.ops.Ops"),
        (lambda m: m.set_backend("cuda"), "allowed are 'auto', 'eager', 'triton'"),
        (lambda m: xlmr.XLMRobertaModel({"hidden_size": 8}), r"config is a builtins.dict: give an xlmr"),
        (lambda m: m.resize_token_embeddings(1), "allowed are more than 1"),
    ],
)
def test_bad_input(call: Callable[[Any], Any], words: str) -> None:
    _, ours = build("Model")
    with pytest.raises((ValueError, TypeError, IndexError), match=words):
        call(ours)


def test_chunked_feed_forward() -> None:
    reference, ours = build("Model", chunk_size_feed_forward=4)
    with torch.no_grad():
        tokens = ids()
        same(ours(tokens, RIGHT)[0], reference(tokens, RIGHT)[0], RIGHT)
        expected = ours(tokens, RIGHT)[0]
        ours.config.chunk_size_feed_forward = 0
        for layer in ours.encoder.layer:
            layer.chunk_size_feed_forward = 0
        ours.ops = replace(EAGER, rows_at_once=lambda x: 7)
        torch.testing.assert_close(ours(tokens, RIGHT)[0], expected, atol=1e-6, rtol=1e-5)
    _, ours = build("Model", chunk_size_feed_forward=4)
    with pytest.raises(ValueError, match="11 tokens: chunk_size_feed_forward 4 must divide it"):
        ours(tokens[:, :11])


# Decoding


def test_decoder_steps_with_a_cache() -> None:
    """Prompt, then one token, then two: as in one pass, and as transformers with its own cache; left padding too."""
    reference, ours = build("ForCausalLM", is_decoder=True)
    tokens, mask = ids(None), torch.ones(B, S, dtype=torch.long)
    mask[1, :3] = 0
    tokens[1, :3] = 1
    with torch.no_grad():
        for cache in (None, transformers.DynamicCache()):
            past, theirs, at = cache, None, 0
            for n in (9, 1, 2):
                part, seen = tokens[:, at : at + n], mask[:, : at + n]
                mine = ours(part, seen, past_key_values=past, use_cache=True)
                other = reference(part, seen, past_key_values=theirs, use_cache=True)
                past, theirs, at = mine.past_key_values, other.past_key_values, at + n
                real = seen[:, -n:].bool()
                torch.testing.assert_close(mine.logits[real], other.logits[real], atol=1e-5, rtol=1e-5)
        kept = ours(tokens, mask, logits_to_keep=2, use_cache=False).logits
        assert torch.allclose(kept, ours(tokens, mask, use_cache=False).logits[:, -2:], atol=1e-5)


def test_cross_attention() -> None:
    reference, ours = build("ForCausalLM", is_decoder=True, add_cross_attention=True)
    truth = double(reference)
    states, seen = torch.randn(B, 7, 32), torch.ones(B, 7)
    seen[1, 4:] = seen[2, 2] = 0
    for asked in ({}, {"output_attentions": True}):
        given = {"input_ids": ids(), "attention_mask": RIGHT, "encoder_attention_mask": seen, "use_cache": False}
        with torch.no_grad():
            outs = [
                m(**given, encoder_hidden_states=states.to(next(m.parameters()).dtype), **asked)
                for m in (ours, reference, truth)
            ]
        real = keep(RIGHT)
        assert_accurate(*(o.logits[real] for o in outs))
        if asked:
            assert len(outs[0].cross_attentions) == 3
            for layer in zip(*(o.cross_attentions for o in outs), strict=True):
                assert_accurate(*(w.transpose(1, 2)[real] for w in layer))
    _, encoder = build("ForCausalLM", is_decoder=True)
    with pytest.raises(ValueError, match="add_cross_attention=True"):
        encoder(ids(), encoder_hidden_states=states)


def test_generate() -> None:
    reference, ours = build("ForCausalLM", is_decoder=True, pad_token_id=1)
    prompt = torch.randint(4, 97, (3, 5))
    expected = prompt  # transformers 5's own generate counts positions from 0 instead of pad + 1: its forward is right
    for _ in range(9):
        expected = torch.cat([expected, reference(expected, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(ours.generate(prompt, max_new_tokens=9), expected)
    padded = torch.nn.functional.pad(prompt, (3, 0), value=1)
    assert torch.equal(ours.generate(padded, padded != 1, max_new_tokens=9)[:, 3:], expected)
    assert torch.equal(ours.generate(prompt, max_new_tokens=9, use_cache=False), expected)
    end = int(expected[0, 6])
    stopped = ours.generate(prompt, max_new_tokens=9, eos_token_id=end)
    assert (stopped[0, 7:] == 1).all()
    draw = [
        ours.generate(prompt, do_sample=True, top_p=0.9, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    ]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    assert torch.equal(ours.generate(prompt, max_new_tokens=9, do_sample=True, top_k=1), expected)
    assert torch.equal(ours.generate(prompt, max_length=14), expected)
    with pytest.raises(ValueError, match="45 tokens: this model takes at most 40"):
        ours.generate(prompt, max_new_tokens=40)
    _, encoder = build("ForCausalLM")
    with pytest.raises(ValueError, match="is_decoder is False"):
        encoder.generate(prompt)


# Surgery: what is not plain is called


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


def test_hidden_states_are_in_the_graph() -> None:
    for mask in (None, RIGHT):
        _, ours = build("Model")
        out = ours(ids(), mask, output_hidden_states=True)
        assert out.hidden_states[-1] is out.last_hidden_state
        gradients = torch.autograd.grad(out.last_hidden_state.square().sum(), out.hidden_states)
        assert all(g.any() for g in gradients)


def test_traced_and_exported_for_other_lengths() -> None:
    class Wrapper(nn.Module):
        def __init__(self, model: nn.Module):
            super().__init__()
            self.model = model

        def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
            return self.model(tokens, mask).last_hidden_state

    reference, ours = build("Model", num_hidden_layers=1)
    example, tokens, mask = (ids(), RIGHT), ids(masks()["left"]), masks()["left"]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing announces each of its assumptions, and its own retirement
        for graph in (
            torch.jit.trace(Wrapper(ours), example, check_trace=False),
            torch.export.export(Wrapper(ours), example).module(),
        ):
            same(graph(tokens, mask), reference(tokens, mask)[0], mask, atol=1e-5)


def test_compiled_by_inductor() -> None:
    _, ours = build("Model", num_hidden_layers=1)
    tokens = ids()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's compiler warns of itself
        torch.testing.assert_close(torch.compile(ours)(tokens, RIGHT)[0], ours(tokens, RIGHT)[0], atol=1e-5, rtol=1e-5)


def test_no_layers_at_all() -> None:
    reference, ours = build("ForSequenceClassification", num_hidden_layers=0)
    tokens = ids()
    torch.testing.assert_close(ours(tokens, RIGHT).logits, reference(tokens, RIGHT).logits, atol=1e-5, rtol=1e-5)


def test_a_masked_query_stays_finite_in_half_precision() -> None:
    _, ours = build("Model", initializer_range=1.0)
    sees = torch.rand(B, 1, S, S) < 0.6
    sees[:, :, 3] = False
    with torch.no_grad():
        assert ours.half()(ids(None), sees).last_hidden_state.isfinite().all()


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


# Training


def test_dropout_is_on_in_training_and_can_be_switched_alone() -> None:
    _, ours = build("Model", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    tokens = ids()

    def draws() -> tuple[Tensor, Tensor]:
        return ours(tokens, RIGHT)[0], ours(tokens, RIGHT)[0]

    assert torch.equal(*draws())
    for names in (["attention.self"], ["attention.output"], ["output"], ["embeddings"]):
        ours.eval()
        for name, module in ours.named_modules():
            if isinstance(module, nn.Dropout) and any(f"{n}.dropout" in name for n in names):
                module.train()
        assert not torch.equal(*draws()), names
    ours.train()
    first, second = draws()
    assert not torch.equal(first, second)
    mean = torch.stack([ours(tokens, RIGHT)[0] for _ in range(300)]).mean(0)
    ours.eval()
    assert (mean - ours(tokens, RIGHT)[0]).abs().mean() < 0.2  # dropout's mean stays near the undropped output


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    _, ours = build("ForMaskedLM", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    given = inputs("MaskedLM", RIGHT)
    ours.train()
    gradients = []
    for enabled in (False, True):
        if enabled:
            ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
            assert ours.is_gradient_checkpointing
        torch.manual_seed(11)
        ours.zero_grad()
        ours(**given).loss.backward()
        gradients.append([p.grad.clone() for p in ours.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)
    ours.gradient_checkpointing_disable()
    assert not ours.is_gradient_checkpointing


def test_checkpointing_a_decoder_and_collecting() -> None:
    """A cache would remember layers that are computed twice; hooks and attention weights come along."""
    _, ours = build("ForCausalLM", is_decoder=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ours.roberta.encoder.layer[0].register_forward_hook(lambda *a: None)
    tokens = ids(None)
    gradients = []
    for asked in ({}, {"output_attentions": True}):
        for every in (0, 1, 2):
            ours.train()
            if every:
                ours.gradient_checkpointing_enable(every_n_layers=every)
            else:
                ours.gradient_checkpointing_disable()
            ours.zero_grad()
            ours(tokens, **asked).logits.square().mean().backward()
            gradients.append(ours.roberta.encoder.layer[0].attention.self.query.weight.grad.clone())
    for other in gradients[1:]:
        torch.testing.assert_close(gradients[0], other, atol=1e-5, rtol=1e-3)
    ours.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="leave out past_key_values"):
        ours(tokens, past_key_values=transformers.DynamicCache())


def test_padding_row_gets_no_gradient_and_frozen_parts_none() -> None:
    _, ours = build("ForSequenceClassification")
    tokens = ids(None)
    tokens[:, 5] = 1  # a pad that is attended to
    ours(tokens).logits.square().sum().backward()
    embeddings = ours.roberta.embeddings
    assert not embeddings.word_embeddings.weight.grad[1].any()
    assert not embeddings.position_embeddings.weight.grad[1].any()
    assert embeddings.word_embeddings.weight.grad[tokens[0, 0]].any()
    ours.zero_grad()
    for parameter in ours.roberta.parameters():
        parameter.requires_grad_(False)
    ours.enable_input_require_grads()
    ours(tokens).logits.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in ours.roberta.parameters())
    ours.disable_input_require_grads()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    reference, ours = build("ForMaskedLM")
    given = inputs("MaskedLM", RIGHT)
    truth = double(reference)(**given).loss
    with torch.autocast("cpu", dtype):
        mine, theirs = ours(**given), reference(**given)
    assert mine.logits.dtype == theirs.logits.dtype
    assert_accurate(mine.loss, theirs.loss, truth, dtype=dtype)


# The model as an object


def test_names_that_other_libraries_ask_for() -> None:
    reference, ours = build("ForMaskedLM")
    assert (ours.device, ours.dtype) == (reference.device, reference.dtype)
    assert ours.num_parameters() == reference.num_parameters()
    ours.roberta.requires_grad_(False)
    reference.roberta.requires_grad_(False)
    assert ours.num_parameters(only_trainable=True) == reference.num_parameters(only_trainable=True)
    assert ours.base_model_prefix == reference.base_model_prefix
    assert ours.base_model is ours.roberta
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
    with pytest.raises(TypeError, match="has no fields 'vectors'"):
        type(out)({"vectors": out.logits})


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


def test_compiled_packed_entry() -> None:
    """Dynamo traces the packed entry and the numbers stay eager's; graph breaks are allowed on a CPU."""
    _, ours = build("Model")
    tokens = ids()[RIGHT.bool()]
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0)
    with torch.no_grad():
        compiled = torch.compile(ours.forward_packed, backend="eager")(tokens, cu_seqlens, S)
        assert torch.equal(compiled, ours.forward_packed(tokens, cu_seqlens, S))
