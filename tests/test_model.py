"""The base model: what is computed where, positions and limits, bad input, tracing."""

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import LENGTHS, RIGHT, B, S, assert_same, build, gradients, ids, keep, masks, reference_mask, same
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import xlmr
from xlmr.ops import EAGER

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
        for dtype in (torch.float16, torch.bfloat16):  # narrower than the model
            same(ours(tokens, bias.clamp(torch.finfo(dtype).min).to(dtype)).last_hidden_state, expected)
        slopes = torch.randn(B, 4, S, S)
        same(ours(tokens, slopes).last_hidden_state, reference(tokens, slopes).last_hidden_state)


def test_a_mask_for_all_texts() -> None:
    reference, ours = build("Model")
    tokens = ids(None)
    same(ours(tokens, torch.ones(1, S))[0], reference(tokens, torch.ones(1, S))[0])
    assert torch.equal(ours(tokens, RIGHT[1:2])[0], ours(tokens, RIGHT[1:2].expand(B, S))[0])  # transformers refuses it


@settings(max_examples=40)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.booleans(), st.booleans(), st.integers(0, 99))
def test_packed_entry_equals_each_text_alone(lengths: list[int], causal: bool, hooked: bool, seed: int) -> None:
    """Also where a hook sees the sequences, padded."""
    torch.manual_seed(seed)
    _, ours = build("Model", num_hidden_layers=2, is_decoder=causal, use_cache=False)
    seen = []
    if hooked:
        ours.encoder.layer[0].register_forward_hook(lambda module, args, output: seen.append(args[0].dim()))
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
    assert {*seen} == ({3} if hooked else set())
    assert torch.allclose(packed, torch.cat(alone) if alone else packed, atol=1e-5)
    assert torch.allclose(some, packed[rows], atol=1e-5)


def test_hidden_states_are_in_the_graph() -> None:
    for mask in (None, RIGHT):
        _, ours = build("Model")
        out = ours(ids(), mask, output_hidden_states=True)
        assert out.hidden_states[-1] is out.last_hidden_state
        gradients = torch.autograd.grad(out.last_hidden_state.square().sum(), out.hidden_states)
        assert all(g.any() for g in gradients)


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


@pytest.mark.parametrize("hooked", [False, True])
def test_masks_in_float64(hooked: bool) -> None:
    """Whose range is beyond that of the masks' own fp32."""
    reference, ours = (model.double() for model in build("Model"))
    if hooked:
        ours.encoder.layer[1].register_forward_hook(lambda *_: None)
    sees = (torch.rand(B, 1, S, S) < 0.6) | torch.eye(S, dtype=torch.bool)
    tokens = ids(None)
    with torch.no_grad():
        for mask in (sees, masks()["holes"]):
            expected = reference(tokens, reference_mask(mask, torch.float64))[0]
            found = ours(tokens, mask, output_attentions=True)[0]
            real = mask == 1 if mask.dim() == 2 else ...
            torch.testing.assert_close(found[real], expected[real], atol=1e-12, rtol=1e-12)


def test_attention_weights_under_autocast() -> None:
    """fp32, as the softmax that gives them, and as numpy needs them."""
    reference, ours = build("Model")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for mine, theirs in zip(
            *(m(ids(), RIGHT, output_attentions=True).attentions for m in (ours, reference)), strict=True
        ):
            assert mine.dtype == theirs.dtype == torch.float32


# Positions, limits and bad input


@pytest.mark.parametrize("mask", [None, RIGHT, RIGHT[:, None].expand(B, S, S)])
@pytest.mark.parametrize("name", ["Model", "ForMaskedLM", "ForSequenceClassification"])
def test_shapes_without_values(name: str, mask: Tensor | None) -> None:
    """On the meta device, and of fake tensors, from which tools tell memory and time before they take them."""
    models = build(name)
    expected = [t.shape for t in models[0](ids(None)).to_tuple()]
    meta = None if mask is None else mask.to("meta")
    assert [t.shape for t in models[1].to("meta")(ids(None).to("meta"), meta).to_tuple()] == expected
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        model = type(models[1])(models[1].config)
        found = model(fake.from_tensor(ids(None)), None if mask is None else fake.from_tensor(mask))
    assert [t.shape for t in found.to_tuple()] == expected


@pytest.mark.parametrize("mask", [None, RIGHT])
def test_gradients_of_each_text_alone_in_one_pass(mask: Tensor | None) -> None:
    """torch.func.vmap of grad, as for differential privacy."""
    _, ours = build("ForSequenceClassification", num_hidden_layers=1)
    weights = {name: parameter.detach() for name, parameter in ours.named_parameters()}
    tokens, labels = ids(mask), torch.randint(0, 3, (B,))

    def loss(weights: dict[str, Tensor], tokens: Tensor, label: Tensor, mask: Tensor | None) -> Tensor:
        given = {
            "input_ids": tokens[None],
            "labels": label[None],
            "attention_mask": None if mask is None else mask[None],
        }
        return torch.func.functional_call(ours, weights, (), given).loss

    over = (None, 0, 0, None if mask is None else 0)
    found = torch.func.vmap(torch.func.grad(loss), in_dims=over)(weights, tokens, labels, mask)
    for i in range(B):
        expected = gradients(
            ours, ours(tokens[i, None], None if mask is None else mask[i, None], labels=labels[i, None]).loss
        )
        assert_same({name: gradient[i] for name, gradient in found.items()}, expected)


@pytest.mark.parametrize("pad", [5, 96, None])
def test_a_configuration_changed_later_moves_no_position(pad: int | None) -> None:
    """As in the reference: `config.pad_token_id = tokenizer.pad_token_id` does nothing, tables count as they are."""
    models = build("Model")
    given = {"input_ids": ids(), "attention_mask": RIGHT, "token_type_ids": torch.full((B, S), 3)}
    with torch.no_grad():
        for model in models:
            model.config.pad_token_id = pad
            model.embeddings.token_type_embeddings.weight = nn.Parameter(torch.arange(4.0)[:, None].repeat(1, 32))
        reference, ours = (model(**given).last_hidden_state for model in models)
        same(ours, reference, RIGHT)
        first = {key: given[key][0, : LENGTHS[0]] for key in ("input_ids", "token_type_ids")}
        packed = models[1].forward_packed(**first, cu_seqlens=torch.tensor([0, LENGTHS[0]]), max_seqlen=LENGTHS[0])
        torch.testing.assert_close(packed, reference[0, : LENGTHS[0]], atol=3e-6, rtol=1e-5)


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
        (lambda m: m(), "neither of input_ids and inputs_embeds is given: exactly one is needed"),
        (lambda m: m(ids(), inputs_embeds=torch.randn(B, S, 32)), "both of input_ids and inputs_embeds"),
        (lambda m: m([[5, 7]]), "input_ids is a list: give a tensor.*return_tensors='pt'"),
        (lambda m: m(ids(), RIGHT.tolist()), "attention_mask is a list: give a tensor"),
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
        (lambda m: m.forward_packed(ids()[0], torch.tensor([0, 9, 5, 12]), 12), r"got cu_seqlens \[0, 9, 5, 12\]"),
        (lambda m: m.forward_packed(ids()[0], torch.tensor([0, 12]), 5), "steps of at most max_seqlen = 5"),
        (lambda m: m.forward_packed(ids()[0], torch.tensor([0.0, 12.0]), 12), "int32 or int64"),
        (lambda m: m.forward_packed(ids()[0], torch.tensor([0, 12]), 12, rows=torch.tensor([7, 1])), "must be sorted"),
        (lambda m: m.forward_packed(ids()[0], torch.tensor([0, 12]), 12, rows=torch.tensor([12])), "rows holds 12"),
        (lambda m: m.forward_packed(ids()[0], [0, 12], 12), "cu_seqlens is a list: give a tensor"),
        (lambda m: setattr(m, "ops", nn.Linear), "give an xlmr.ops.Ops"),
        (lambda m: m.set_backend("cuda"), "allowed are 'auto', 'eager', 'prepacked', 'triton'"),
        (lambda m: xlmr.XLMRobertaModel({"hidden_size": 8}), r"config is a builtins.dict: give an xlmr"),
        (lambda m: m.resize_token_embeddings(1), "allowed are more than 1"),
        (lambda m: m.resize_token_embeddings("100"), "new_num_tokens is '100': an integer is needed"),
    ],
)
def test_bad_input(call: Callable[[Any], Any], words: str) -> None:
    _, ours = build("Model")
    with pytest.raises((ValueError, TypeError, IndexError), match=words):
        call(ours)


@pytest.mark.parametrize(
    ("bounds", "rows", "wrong"),
    [
        ([0, 5, 5, 12], [0, 5, 11], None),
        ([0, 9, 5, 12], [0], "cu_seqlens must rise from 0 to 12"),
        ([1, 12], [0], "cu_seqlens must rise"),
        ([0, 11], [0], "cu_seqlens must rise"),
        ([0, 12], [7, 1], "rows must be sorted"),
        ([0, 12], [7, 12], "below 12"),
        ([0, 12], [-1, 7], "below 12"),
    ],
)
def test_values_on_a_gpu_are_asserted_there(
    bounds: list[int], rows: list[int], wrong: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without waiting for it. A CPU, which stands in for one here, raises at once."""
    for module in ("values", "inputs"):
        monkeypatch.setattr(f"xlmr.{module}.readable", lambda values: False)
    _, ours = build("Model")
    refused = pytest.raises(RuntimeError, match=wrong) if wrong else contextlib.nullcontext()
    with refused:
        ours.forward_packed(ids()[0], torch.tensor(bounds), 12, rows=torch.tensor(rows))


def test_chunked_feed_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, ours = build("Model", chunk_size_feed_forward=4)
    with torch.no_grad():
        tokens = ids()
        same(ours(tokens, RIGHT)[0], reference(tokens, RIGHT)[0], RIGHT)
        expected = ours(tokens, RIGHT)[0]
        ours.config.chunk_size_feed_forward = 0
        for layer in ours.encoder.layer:
            layer.chunk_size_feed_forward = 0
        monkeypatch.setattr("xlmr.eager.ROWS", 7)
        torch.testing.assert_close(ours(tokens, RIGHT)[0], expected, atol=1e-6, rtol=1e-5)
    _, ours = build("Model", chunk_size_feed_forward=4)
    with pytest.raises(ValueError, match="11 tokens: chunk_size_feed_forward 4 must divide it"):
        ours(tokens[:, :11])


# Traced and compiled


def test_traced_for_other_lengths() -> None:
    class Wrapper(nn.Module):
        def __init__(self, model: nn.Module):
            super().__init__()
            self.model = model

        def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
            return self.model(tokens, mask).last_hidden_state

    reference, ours = build("Model", num_hidden_layers=1)
    tokens, mask = ids(masks()["left"]), masks()["left"]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing announces each of its assumptions, and its own retirement
        graph = torch.jit.trace(Wrapper(ours), (ids(), RIGHT), check_trace=False)
        same(graph(tokens, mask), reference(tokens, mask)[0], mask, atol=1e-5)


@pytest.mark.parametrize(("strict", "dims"), [(False, ()), (False, (0,)), (False, (1,)), (True, (0, 1))])
def test_exported_for_other_shapes(strict: bool, dims: tuple[int, ...]) -> None:
    """Strict export goes through Dynamo. No size that is asked to stay a symbol may become a number."""
    if strict and torch.__version__ < "2.13":
        pytest.skip("Dynamo of torch 2.11 does not trace torch.amp.is_autocast_available")
    reference, ours = build("Model", num_hidden_layers=1)
    shapes = dict.fromkeys(("input_ids", "attention_mask"), dict.fromkeys(dims, torch.export.Dim.DYNAMIC))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Dynamo's of its own imports
        graph = torch.export.export(ours, (ids(), RIGHT), strict=strict, dynamic_shapes=shapes).module()
        mask = masks()["left"].repeat(1 + (0 in dims), 1 + (1 in dims))
        tokens = ids().repeat(1 + (0 in dims), 1 + (1 in dims))
        same(graph(tokens, mask)[0], reference(tokens, mask)[0], mask, atol=1e-5)


@pytest.mark.parametrize("name", ["Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("mask", [(), (RIGHT,)])
def test_traced_as_it_is(name: str, grad: bool, mask: tuple[Tensor, ...]) -> None:
    """With jit's own check, which traces again without gradients; then on more rows than are computed at once."""
    _, ours = build(name, num_hidden_layers=1)
    example = (ids(), *mask)
    inputs = [t.repeat(12, 1) for t in example]
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch.jit.trace(ours, example, strict=False)(*inputs)
    expected = ours(*inputs)
    assert found.keys() == expected.keys()
    real = (...,) if not mask or name == "ForSequenceClassification" else inputs[1].bool()
    torch.testing.assert_close(found[next(iter(found))][real], expected[0][real], atol=1e-4, rtol=1e-4)


def test_compiled_by_inductor() -> None:
    _, ours = build("Model", num_hidden_layers=1)
    tokens = ids()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's compiler warns of itself
        torch.testing.assert_close(torch.compile(ours)(tokens, RIGHT)[0], ours(tokens, RIGHT)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["Model", "ForMaskedLM", "ForSequenceClassification"])
def test_without_a_mask_forward_is_one_graph(name: str) -> None:
    """Of every length from the second on."""
    _, ours = build(name, num_hidden_layers=1)
    graphs: list[Any] = []
    with torch.no_grad():
        compiled = torch.compile(ours, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
        for length in (S, S - 1, S - 3):
            tokens = ids(None)[:, :length]
            torch.testing.assert_close(compiled(tokens)[0], ours(tokens)[0], atol=1e-6, rtol=1e-6)
    assert len(graphs) == 2


def test_compiled_packed_entry() -> None:
    """Dynamo traces the packed entry and the numbers stay eager's, up to another GEMM; a CPU may break the graph."""
    _, ours = build("Model")
    tokens = ids()[RIGHT.bool()]
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0)
    with torch.no_grad():
        compiled = torch.compile(ours.forward_packed, backend="eager")(tokens, cu_seqlens, S)
        torch.testing.assert_close(compiled, ours.forward_packed(tokens, cu_seqlens, S), atol=1e-6, rtol=1e-6)
