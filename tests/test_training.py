"""Training steps: gradients against transformers and float64, dropout, recomputation, loss curves, bad input."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from numerics import assert_accurate
from reference import (
    HEADS,
    NO_DROPOUT,
    RIGHT,
    TINY,
    B,
    S,
    assert_gradients,
    assert_same,
    build,
    double,
    gradients,
    ids,
    inputs,
    masks,
    trained,
    untrainable,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint as recomputed

import xlmr
from xlmr import demo, pretrain
from xlmr.demo.evaluate import read
from xlmr.pretrain import Lines, Recipe, Run

LANGUAGE_MODELS = ["MaskedLM", "CausalLM"]


# The language models' loss without logits


class Widest(TorchDispatchMode):
    """The most rows that any tensor as wide as the vocabulary has had, but for the embedding, transposed."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            shape = tensor.shape if isinstance(tensor, Tensor) else ()
            if len(shape) > 1 and shape[-1] == TINY["vocab_size"] and shape[0] != TINY["hidden_size"]:
                self.rows = max(self.rows, tensor.numel() // TINY["vocab_size"])
        return out


@pytest.mark.parametrize("kind", ["none", "right", "holes", "left"])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_loss_without_logits(name: str, kind: str) -> None:
    """The reference's loss and gradients from the labelled rows alone, packed or not, summed over many batches too."""
    reference, ours = trained(name)
    truth = double(reference)
    given = inputs(name, masks()[kind])
    few = torch.rand(B, S) < 0.3
    given["labels"] = given["labels"].masked_fill(~few, -100)
    for extra in ({}, {"num_items_in_batch": torch.tensor(50)}) if name == "CausalLM" else ({},):
        with Widest() as widest:
            lean = ours(**given, **extra, return_logits=False)
            mine = gradients(ours, lean.loss)
        assert list(lean) == ["loss"]
        labelled = given["labels"][:, 1:] if name == "CausalLM" else given["labels"]
        # The decoder's own weight gradient is [V, N]; N is not V.
        assert 0 < widest.rows <= int((labelled != -100).sum()) < B * S // 3
        losses = [m(**given, **extra).loss for m in (reference, truth)]
        assert_accurate(lean.loss, losses[0], losses[1])
        assert_gradients(mine, gradients(reference, losses[0]), gradients(truth, losses[1]))
        assert_gradients(
            gradients(ours, ours(**given, **extra).loss), gradients(reference, reference(**given, **extra).loss),
            gradients(truth, truth(**given, **extra).loss),
        )  # fmt: skip


def test_labels_that_are_shifted_already() -> None:
    """They go before labels, as in the reference, and need none here; what is masked is computed where they ask."""
    reference, ours = trained("CausalLM")
    given = inputs("CausalLM", RIGHT)
    shifted = torch.nn.functional.pad(given["labels"][:, 1:], (0, 1), value=-100)
    for mask in (RIGHT, None):
        given |= {"attention_mask": mask, "shift_labels": shifted, "labels": torch.zeros_like(shifted)}
        expected = reference(**given).loss
        assert_same(gradients(ours, ours(**given).loss), gradients(reference, expected))
        for labels in (given["labels"], None):
            for extra in ({}, {"num_items_in_batch": int((shifted != -100).sum())}):
                lean = ours(**{**given, "labels": labels}, **extra, return_logits=False)
                torch.testing.assert_close(lean.loss, expected.detach(), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="labels score every position"):
        ours(given["input_ids"], shift_labels=shifted, logits_to_keep=2)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_the_loss_beside_logits_needs_no_padded_gradient(name: str) -> None:
    _, ours = trained(name)
    out = ours(**inputs(name, RIGHT))
    assert out.logits.shape == (B, S, TINY["vocab_size"])
    with Widest() as widest:
        out.loss.backward()
    assert widest.rows == int(RIGHT.sum())


@pytest.mark.parametrize("field", ["hidden_states", "attentions"])
def test_what_else_is_asked_for_beside_the_loss(field: str) -> None:
    _, ours = trained("MaskedLM")
    given = inputs("MaskedLM", RIGHT) | {f"output_{field}": True}
    lean, whole = ours(**given, return_logits=False), ours(**given)
    assert list(lean) == ["loss", field]
    assert all(map(torch.equal, lean[field], whole[field]))
    torch.testing.assert_close(lean.loss, whole.loss)


def test_a_decoder_that_was_replaced_is_called() -> None:
    reference, ours = trained("MaskedLM")
    given = inputs("MaskedLM", RIGHT)
    for model in (reference, ours):
        model.lm_head.decoder.register_forward_hook(lambda m, i, out: 2 * out)
    torch.testing.assert_close(ours(**given, return_logits=False).loss, reference(**given).loss)


# Half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", HEADS)
def test_gradients_under_autocast(name: str, dtype: torch.dtype) -> None:
    reference, ours = trained(name, initializer_range=0.1)
    given = inputs(name, RIGHT)
    truth = double(reference)
    exact = gradients(truth, truth(**given).loss)
    with torch.autocast("cpu", dtype):
        outputs = ours(**given), reference(**given)
        assert [t.dtype for t in outputs[0].to_tuple()] == [t.dtype for t in outputs[1].to_tuple()]
        theirs = gradients(reference, outputs[1].loss)
        assert_gradients(gradients(ours, outputs[0].loss), theirs, exact, dtype=dtype)
        if name in LANGUAGE_MODELS:
            assert_gradients(gradients(ours, ours(**given, return_logits=False).loss), theirs, exact, dtype=dtype)
    assert all(g.dtype == torch.float32 for g in theirs.values())


def test_grad_scaler() -> None:
    """fp16 under a scaler: small gradients survive, and a step whose gradients overflow is left out."""
    _, ours = trained("MaskedLM")
    given = inputs("MaskedLM", RIGHT)
    expected = gradients(ours, ours(**given).loss)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    before = copy.deepcopy(ours.state_dict())
    for scale, overflows in ((2.0**10, False), (2.0**120, True)):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        with torch.autocast("cpu", torch.float16):
            loss = ours(**given, return_logits=False).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if not overflows:
            assert_same({n: p.grad for n, p in ours.named_parameters()}, expected, rtol=0.02)
            optimizer.zero_grad()
            continue
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == scale / 2
    assert all(torch.equal(before[name], value) for name, value in ours.state_dict().items())


# Dropout


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


# Accumulation, recomputation, frozen parts


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_accumulated_gradients_are_those_of_one_batch(name: str) -> None:
    _, ours = trained(name)
    given = inputs(name, RIGHT)
    whole = gradients(ours, ours(**given, return_logits=False).loss)
    labels = given["labels"][:, 1:] if name == "CausalLM" else given["labels"]
    count = int((labels != -100).sum())
    for part in (slice(0, 1), slice(1, 4), slice(4, 5)):
        piece = {key: value[part] for key, value in given.items()}
        if name == "CausalLM":
            loss = ours(**piece, num_items_in_batch=count, return_logits=False).loss
        else:
            loss = ours(**piece, return_logits=False).loss * (int((labels[part] != -100).sum()) / count)
        loss.backward()
    assert_same({n: p.grad for n, p in ours.named_parameters()}, whole)


@pytest.mark.parametrize("way", ["enabled", "every second layer", "reentrant", "torch.utils.checkpoint"])
@pytest.mark.parametrize("name", ["MaskedLM", "SequenceClassification"])
def test_recomputing_replays_dropout(name: str, way: str) -> None:
    """The same seed gives the same gradients, whether activations are kept or computed again."""
    _, ours = trained(name, num_hidden_layers=3, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    given = inputs(name, RIGHT)

    def step(seed: int, call: Callable[..., Any] = ours) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return gradients(ours, call(**given).loss)

    kept, other = step(11), step(12)
    call: Callable[..., Any] = ours
    if way == "torch.utils.checkpoint":
        call = lambda **given: recomputed(ours, **given, use_reentrant=False)  # noqa: E731
    elif way == "every second layer":
        ours.gradient_checkpointing_enable(every_n_layers=2)
    else:
        ours.activation_checkpointing_enable({"use_reentrant": way == "reentrant"})
    again = step(11, call)
    assert_same(again, kept, rtol=1e-6)
    assert any(not torch.allclose(again[name], other[name]) for name in kept)
    assert ours.is_gradient_checkpointing == (way != "torch.utils.checkpoint")
    ours.gradient_checkpointing_disable()
    assert not ours.is_activation_checkpointing


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


class Products(TorchDispatchMode):
    """How many matrix products ran."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
        return func(*args, **(kwargs or {}))


def test_frozen_parts_cost_nothing() -> None:
    """No gradient is computed that nobody asked for: in backward, two products a linear layer (its weight's gradient
    and its input's), none below the lowest layer that trains, and no weight's where it is frozen."""
    _, ours = trained("SequenceClassification", num_hidden_layers=3)
    given = inputs("SequenceClassification", RIGHT)

    def products(train: Callable[[str], bool]) -> int:
        for key, parameter in ours.named_parameters():
            parameter.requires_grad_(train(key))
        ours.zero_grad()
        loss = ours(**given).loss
        with Products() as products:
            loss.backward()
        assert {key for key, p in ours.named_parameters() if p.grad is not None} == set(filter(train, names))
        return products.count

    names = [key for key, _ in ours.named_parameters()]
    head, layer = 2 * 2, 2 * 6
    assert products(lambda key: True) == head + 3 * layer
    assert products(lambda key: "embeddings" not in key) == head + 3 * layer - 3  # q, k, v of the lowest layer
    assert products(lambda key: "classifier" in key) == head - 1
    assert products(lambda key: "layer.2" in key or "classifier" in key) == head + layer - 3
    assert products(lambda key: "layer.0.attention.self.query.bias" in key) == head // 2 + 2 * layer // 2 + 3


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


# Around the model


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_training_step(checkpointing: bool) -> None:
    """Forward and backward through Dynamo and AOTAutograd, whose graphs then run as they are."""
    torch._dynamo.reset()  # it compiles each function for a few models only
    _, ours = trained("MaskedLM", num_hidden_layers=1)
    if checkpointing:
        ours.gradient_checkpointing_enable()
    given = inputs("MaskedLM", RIGHT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's compiler warns of itself
        loss = torch.compile(ours, backend="aot_eager")(**given, return_logits=False).loss
    assert_same(gradients(ours, loss), gradients(ours, ours(**given).loss), rtol=1e-6)


# Loss curves


def padded_loss(model: Any, packed: Any, labels: Tensor, bf16: bool) -> Tensor:
    """pretrain.masked_loss for transformers' model."""
    lengths = packed.cu_seqlens.diff()
    ids, labels = (
        pad_sequence(t.split(lengths.tolist()), batch_first=True, padding_value=p)
        for t, p in ((packed.input_ids, 1), (labels, -100))
    )
    return model(ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long(), labels=labels).loss


def curve(model: Any, tokenizer: Any, lines: Lines, recipe: Recipe) -> list[float]:
    """The losses of `xlmr pretrain`'s loop."""
    run = Run(model.train(), tokenizer, lines, recipe)
    source = run.batches()
    return [float(run.advance(source)) for _ in range(recipe.steps)]


@pytest.fixture
def curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[float]]]:
    """transformers' curve and ours: same initial weights, same batches and masks of the demo's text, same recipe."""
    (tmp_path / "text").write_text("\n".join(s.text for s in read(demo.HELD_OUT)), encoding="utf-8")
    ours_loss = pretrain.masked_loss

    def either_loss(model: Any, *args: Any) -> Tensor:
        return (ours_loss if isinstance(model, xlmr.XLMRobertaForMaskedLM) else padded_loss)(model, *args)

    monkeypatch.setattr(pretrain, "masked_loss", either_loss)

    def run(
        where: Path, recipe: Recipe, device: Any = "cpu", backend: str = "eager", **settings: Any
    ) -> list[list[float]]:
        lines, tokenizer = Lines([tmp_path / "text"]), xlmr.XLMRobertaTokenizer.from_pretrained(where)
        config = xlmr.XLMRobertaConfig.from_pretrained(where, **NO_DROPOUT, initializer_range=0.02, **settings)
        ours = xlmr.XLMRobertaForMaskedLM(config)
        reference = transformers.XLMRobertaForMaskedLM(transformers.XLMRobertaConfig(**config.to_dict()))
        reference.base_model.tables = ours.base_model.tables  # what Run asks for the longest text
        reference.load_state_dict(ours.state_dict())
        ours.to(device).set_backend(backend)
        return [curve(model, tokenizer, lines, recipe) for model in (reference, ours)]

    return run


def test_loss_curve_of_the_demo(curves: Callable[..., list[list[float]]]) -> None:
    """200 steps: as far apart as rounding alone drives transformers' curve from its own in float64, 1.3e-5."""
    recipe = Recipe(steps=200, batch_tokens=96, learning_rate=1e-3, warmup=20)
    expected, found = curves(demo.CHECKPOINT, recipe)
    assert found == pytest.approx(expected, abs=5e-5)
    assert sum(found[-20:]) < sum(found[:20]) - 20


# On the kernels


@pytest.fixture
def on_kernels(device: torch.device) -> Callable[[Any], Any]:
    """Puts a model on the kernels; skips where they are missing or have no gradients."""
    if why := untrainable(device):
        pytest.skip(why)

    def place(model: Any) -> Any:
        model.to(device).set_backend("triton")
        return model

    return place


@pytest.mark.parametrize("name", HEADS)
def test_gradients_of_every_head_on_the_kernels(name: str, on_kernels: Callable[[Any], Any], poisoned: None) -> None:
    """Of the loss and of a random combination of the logits, against transformers in float64."""
    reference, ours = trained(name)
    truth = double(reference)
    on_kernels(ours)
    given = inputs(name, masks()["holes"])
    dy: dict[str, Tensor] = {}

    def total(model: Any) -> Tensor:
        given_there = {k: v if v is None else v.to(model.device) for k, v in given.items()}
        out = model(**given_there)
        first = next(key for key in out if "logits" in key)
        weight = dy.setdefault(first, torch.randn(out[first].shape, dtype=torch.double))
        if out[first].shape[:2] == (B, S):
            weight = weight * (given["attention_mask"] != 0).unflatten(1, (S, *[1] * (weight.dim() - 2)))
        return out.loss + (out[first] * weight.to(out[first])).sum()

    grads = [gradients(model, total(model)) for model in (ours, reference, truth)]
    assert_gradients({k: g.cpu() for k, g in grads[0].items()}, *grads[1:])


def test_loss_without_logits_on_the_kernels(on_kernels: Callable[[Any], Any]) -> None:
    for name in LANGUAGE_MODELS:
        reference, ours = trained(name)
        truth = double(reference)
        given = {k: v[:3] for k, v in inputs(name, RIGHT).items()}
        grads = [gradients(model, model(**given).loss) for model in (reference, truth)]
        on_kernels(ours)
        lean = ours(**{k: v.to(ours.device) for k, v in given.items()}, return_logits=False)
        assert_gradients({k: g.cpu() for k, g in gradients(ours, lean.loss).items()}, *grads)


def test_recomputing_replays_dropout_on_the_kernels(on_kernels: Callable[[Any], Any]) -> None:
    _, ours = trained("MaskedLM", hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3, num_attention_heads=2)
    on_kernels(ours)
    given = {k: v[:3].to(ours.device) for k, v in inputs("MaskedLM", RIGHT).items()}

    def step(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return gradients(ours, ours(**given, return_logits=False).loss)

    kept, again, other = step(11), step(11), step(12)
    ours.activation_checkpointing_enable()
    recomputed = step(11)
    for name, gradient in kept.items():
        assert torch.equal(gradient, again[name])
        assert torch.equal(gradient, recomputed[name])
    assert any(not torch.allclose(kept[name], other[name]) for name in kept)


def test_loss_curve_on_the_kernels(
    curves: Callable[..., list[list[float]]], checkpoint: Path, device: torch.device, on_kernels: Callable[[Any], Any]
) -> None:
    recipe = Recipe(steps=20, batch_tokens=48, learning_rate=1e-3, warmup=5)
    small = {"num_hidden_layers": 1, "num_attention_heads": 2}
    expected, found = curves(checkpoint, recipe, device, "triton", **small)
    assert found == pytest.approx(expected, abs=5e-5)


# Bad input


def test_wrong_labels_are_named() -> None:
    """In every head: of a wrong shape, out of range, of a dtype that is no integer where classes are meant."""
    long, real = torch.long, torch.float32
    wrong: list[tuple[str, dict[str, Tensor], str]] = [
        *(
            (name, {"labels": torch.full((B, S), value, dtype=dtype)}, words)
            for name, classes in (("MaskedLM", 97), ("CausalLM", 97), ("TokenClassification", 3))
            for value, dtype, words in (
                (classes, long, f"labels holds {classes}: allowed are 0 … {classes - 1}"),
                (-1, long, "labels holds -1: .*; −100 stands for none"),
                (1, real, "labels has dtype torch.float32: give torch.long"),
                (1, torch.bool, "labels has dtype torch.bool"),
            )
        ),
        ("SequenceClassification", {"labels": torch.full((B,), 3)}, "labels holds 3: allowed are 0 … 2"),
        ("SequenceClassification", {"labels": torch.zeros(B + 1, dtype=long)}, r"shape \(6,\): it must be \(5,\)"),
        ("SequenceClassification", {"labels": torch.zeros(B, 3, dtype=long)}, r"shape \(5, 3\): it must be \(5,\)"),
        ("SequenceClassification", {"labels": torch.zeros(B)}, r"shape \(5,\): it must be \(5, 3\)"),
        ("MultipleChoice", {"labels": torch.tensor([5])}, "labels holds 5: allowed are 0 … 4"),
        ("MultipleChoice", {"labels": torch.tensor([1.0])}, "labels has dtype torch.float32"),
        *(
            ("QuestionAnswering", {"start_positions": good, "end_positions": bad}, words)
            for good in (torch.zeros(B, dtype=long),)
            for bad, words in ((good.float(), "end_positions has dtype"), (good[1:], r"end_positions has shape \(4,\)"))
        ),
    ]
    for name, labels, words in wrong:
        _, ours = trained(name)
        given = {k: v for k, v in inputs(name, RIGHT).items() if k in ("input_ids", "attention_mask")}
        with pytest.raises((ValueError, TypeError, IndexError), match=words):
            ours(**given, **labels)
    with pytest.raises(ValueError, match="leave out logits_to_keep, or labels"):
        trained("CausalLM")[1](**inputs("CausalLM", RIGHT), logits_to_keep=1)


@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_whole_numbers_serve_as_targets(kind: str) -> None:
    """Of any dtype, also where transformers needs floating point."""
    reference, ours = trained("SequenceClassification", problem_type=kind)
    given = inputs("SequenceClassification", RIGHT)
    for dtype in (torch.long, torch.bool, torch.float64, torch.float32):
        labels = torch.tensor([[1, 0, 1]] * B, dtype=dtype)
        mine = gradients(ours, ours(**given | {"labels": labels}).loss)
        assert_same(mine, gradients(reference, reference(**given | {"labels": labels.float()}).loss))


@pytest.mark.parametrize("name", [*LANGUAGE_MODELS, "TokenClassification", "SequenceClassification"])
def test_all_labels_ignored(name: str) -> None:
    """NaN and no gradient, as in torch; a sum over other batches' labels too gets 0 from this one."""
    reference, ours = trained(name)
    given = inputs(name, RIGHT)
    given["labels"] = torch.full_like(given["labels"], -100)
    extras: list[dict[str, Any]] = [{}]
    if name in LANGUAGE_MODELS:
        extras += [{"return_logits": False}]
    for extra in extras:
        loss = ours(**given, **extra).loss
        assert loss.isnan()
        mine = gradients(ours, loss)
        assert mine.keys() == gradients(reference, reference(**given).loss).keys()
        assert not any(g.any() for g in mine.values())
    if name == "CausalLM":
        for extra in extras:
            assert ours(**given, **extra, num_items_in_batch=7).loss == 0


@pytest.mark.parametrize("name", ["Model", "MaskedLM", "SequenceClassification"])
def test_upstream_gradients_that_are_not_finite_pass_through(name: str) -> None:
    """Into every parameter that a text's result depends on, and not into another text's hidden vectors."""
    full = name if name == "Model" else f"For{name}"
    _, ours = build(full)
    embeds, layer = torch.randn(B, S, 32, requires_grad=True), ours.base_model.encoder.layer[0]
    out = ours(inputs_embeds=embeds, attention_mask=RIGHT)[0]
    for bad in (torch.nan, torch.inf):
        dy = torch.zeros_like(out)
        dy[1, 0] = bad
        dx, dw = torch.autograd.grad(out, [embeds, layer.output.dense.weight], dy, retain_graph=True)
        assert not dx[1, : int(RIGHT[1].sum())].isfinite().any()
        assert not dw.isfinite().any()
        assert not dx[[0, 2, 3, 4]].any()


def test_a_second_backward_is_torch_s_error() -> None:
    for name in ("MaskedLM", "SequenceClassification"):
        _, ours = trained(name)
        loss = ours(**inputs(name, RIGHT)).loss
        loss.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()
