"""Training: gradients against transformers and float64, and everything that people wrap around a training step."""

import copy
import itertools
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import data_parallel
import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from numerics import assert_accurate
from reference import HEADS, TINY, B, S, build, double, inputs, masks, untrainable
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint as recomputed
from transformers import Trainer, TrainingArguments

import xlmr
from xlmr import demo, pretrain
from xlmr.demo.evaluate import read
from xlmr.pretrain import Lines, Position, Recipe, Run, read_batches

RIGHT = masks()["right"]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LANGUAGE_MODELS = ["MaskedLM", "CausalLM"]


def trained(name: str, **settings: Any) -> tuple[Any, Any]:
    """transformers' head and ours, equal weights, in training mode; without dropout but for what `settings` say."""
    decoder = {"is_decoder": True} if name == "CausalLM" else {}
    reference, ours = build(f"For{name}", **{"num_hidden_layers": 2, **NO_DROPOUT, **decoder, **settings})
    return reference.train(), ours.train()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Of all parameters that got one, by name; those of the model itself are left empty."""
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_gradients(
    ours: dict[str, Tensor], reference: dict[str, Tensor], truth: dict[str, Tensor], **precision: Any
) -> None:
    assert ours.keys() == truth.keys()
    largest = max(g.abs().max().item() for g in truth.values())
    for name, exact in truth.items():
        try:
            assert_accurate(ours[name], reference[name], exact, scale=largest, ulps=32, **precision)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-5) -> None:
    """To within `rtol` of the largest gradient of all."""
    assert ours.keys() == expected.keys()
    largest = max(g.abs().max().item() for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=rtol * largest, msg=lambda m, n=name: f"{n}: {m}")


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


def test_hidden_states_beside_the_loss() -> None:
    _, ours = trained("MaskedLM")
    given = inputs("MaskedLM", RIGHT)
    lean = ours(**given, return_logits=False, output_hidden_states=True, output_attentions=True)
    whole = ours(**given, output_hidden_states=True, output_attentions=True)
    assert list(lean) == ["loss", "hidden_states", "attentions"]
    for mine, expected in zip(
        lean.hidden_states + lean.attentions, whole.hidden_states + whole.attentions, strict=True
    ):
        assert torch.equal(mine, expected)
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
        theirs = gradients(reference, reference(**given).loss)
        assert_gradients(gradients(ours, ours(**given).loss), theirs, exact, dtype=dtype)
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


# Less memory: accumulation, recomputation, frozen parts


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


# Around the model


def test_compiled_training_step() -> None:
    """Forward and backward through Dynamo and AOTAutograd, whose graphs then run as they are."""
    _, ours = trained("MaskedLM", num_hidden_layers=1)
    given = inputs("MaskedLM", RIGHT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's compiler warns of itself
        loss = torch.compile(ours, backend="aot_eager")(**given, return_logits=False).loss
    assert_same(gradients(ours, loss), gradients(ours, ours(**given).loss), rtol=1e-6)


def train(model: Any, batches: list[dict[str, Any]], optimizer: Any = None, backward: Any = None) -> list[float]:
    """The loss at each step."""
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        (backward or Tensor.backward)(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks transformers' model
def test_lora_trains() -> None:
    """On query and value, beside a frozen model: transformers' losses at every step, and only the adapters move."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["query", "value"], r=4, lora_dropout=0.0)
    wrapped = []
    for model in trained("MaskedLM"):
        torch.manual_seed(3)
        wrapped.append(peft.get_peft_model(model, settings).train())
    reference, ours = wrapped
    before = copy.deepcopy(ours.state_dict())
    given = [inputs("MaskedLM", RIGHT)] * 12
    losses = train(ours, [batch | {"return_logits": False} for batch in given])
    assert losses == pytest.approx(train(reference, given), rel=1e-5)
    assert losses[-1] < losses[0] - 0.2
    moved = {key for key, value in ours.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {key for key, p in ours.named_parameters() if p.requires_grad}
    assert all("lora_" in key for key in moved)


ROWS = [
    {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor(int(ids[1]) % 3)}
    for ids in torch.randint(4, 97, (24, 8), generator=torch.Generator().manual_seed(0))
]
TOKEN_ROWS = [row | {"labels": row["input_ids"] % 3} for row in ROWS]
QUESTION_ROWS = [
    {"input_ids": row["input_ids"], "start_positions": row["labels"], "end_positions": row["labels"] + 2}
    for row in ROWS
]
CHOICE_ROWS = [
    {"input_ids": torch.stack([a["input_ids"], b["input_ids"]]), "labels": a["labels"] % 2}
    for a, b in itertools.pairwise(ROWS)
]
WORD_ROWS = [row | {"labels": row["input_ids"]} for row in ROWS]
DATA = {
    "SequenceClassification": ROWS, "TokenClassification": TOKEN_ROWS, "QuestionAnswering": QUESTION_ROWS,
    "MultipleChoice": CHOICE_ROWS, "MaskedLM": WORD_ROWS, "CausalLM": WORD_ROWS,
}  # fmt: skip


def trainer(model: Any, rows: list[dict[str, Tensor]], output: Path, **settings: Any) -> Trainer:
    chosen = {"per_device_train_batch_size": 6, "max_steps": 8, "save_strategy": "no", **settings}
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True}
    arguments = TrainingArguments(str(output), learning_rate=3e-3, logging_steps=1, **quiet, **chosen)
    return Trainer(model, arguments, train_dataset=rows)


def losses(trainer: Trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("name", HEADS)
def test_trainer(name: str, tmp_path: Path) -> None:
    """Every head under transformers' Trainer: its own model's losses at every step, and they fall."""
    reference, ours = trained(name)
    mine = losses(trainer(ours, DATA[name], tmp_path))
    assert mine == pytest.approx(losses(trainer(reference, DATA[name], tmp_path)), rel=1e-4)
    assert min(mine[-2:]) < mine[0] - 0.1


@pytest.mark.parametrize("name", ["SequenceClassification", "CausalLM"])
def test_trainer_accumulates(name: str, tmp_path: Path) -> None:
    """Two batches a step are one of twice the size, also where labels are fewer in one of them. (transformers' own
    heads but the causal one are given num_items_in_batch, ignore it, and so train on twice the gradient.)"""
    rows = DATA[name]
    if name == "CausalLM":
        some = [torch.arange(8) >= number % 7 for number in range(len(rows))]
        rows = [row | {"labels": row["labels"].where(kept, -100)} for row, kept in zip(rows, some, strict=True)]
    curves = []
    for settings in (
        {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 12, "activation_checkpointing": True},
    ):
        torch.manual_seed(0)
        _, ours = trained(name)
        curves.append(losses(trainer(ours, rows, tmp_path, **settings)))
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_trainer_saves_and_resumes(tmp_path: Path) -> None:
    """A head without a tied pair is saved by Trainer itself: resumed, it goes on as if never stopped. Beside the
    weights stands no config.json, which Trainer writes for transformers' own classes only."""
    torch.manual_seed(0)
    _, whole = trained("SequenceClassification")
    first = copy.deepcopy(whole)
    expected = losses(trainer(whole, ROWS, tmp_path / "whole"))
    losses(trainer(first, ROWS, tmp_path, save_strategy="steps", save_steps=4))
    resumed = trainer(trained("SequenceClassification")[1], ROWS, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [entry["loss"] for entry in resumed.state.log_history if "loss" in entry] == expected
    loaded = xlmr.XLMRobertaForSequenceClassification.from_pretrained(tmp_path / "checkpoint-8", config=whole.config)
    for key, value in whole.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


def test_accelerate(tmp_path: Path) -> None:
    """Prepared for bf16: the losses of plain autocast, outputs in fp32; saved, a head without a tied pair is whole."""
    _, ours = trained("SequenceClassification")
    plain = copy.deepcopy(ours)
    given = [inputs("SequenceClassification", RIGHT)] * 6
    AcceleratorState._reset_state(reset_partial_state=True)  # which a Trainer of another test has set up
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    optimizer = torch.optim.AdamW(ours.parameters(), lr=3e-3)
    prepared, prepared_optimizer = accelerator.prepare(ours, optimizer)
    assert prepared(**given[0]).logits.dtype == torch.float32
    mine = train(prepared, given, prepared_optimizer, accelerator.backward)
    plain.forward = torch.autocast("cpu", torch.bfloat16)(plain.forward)
    assert mine == train(plain, given)
    assert mine[-1] < mine[0] - 0.1
    accelerator.save_model(prepared, tmp_path)
    saved = xlmr.XLMRobertaForSequenceClassification.from_pretrained(tmp_path, config=ours.config)
    assert torch.equal(saved.classifier.dense.weight, ours.classifier.dense.weight)


# Several processes


@pytest.fixture(scope="module")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """What two processes computed: see data_parallel.py."""
    output = tmp_path_factory.mktemp("parallel") / "gradients.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    worker = Path(__file__).parent / "data_parallel.py"
    done = subprocess.run([*command, str(worker), str(output)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return torch.load(output)


@pytest.mark.parametrize("head", ["MaskedLM", "SequenceClassification"])
@pytest.mark.parametrize("way", ["DDP", "FSDP2", "FSDP2, layer by layer"])
def test_two_processes_give_one_s_gradients(way: str, head: str, parallel: dict[str, dict[str, Tensor]]) -> None:
    model, given = data_parallel.model_and_batch(head)
    assert_same(parallel[f"{way} {head}"], gradients(model, data_parallel.loss(model, given, given)))


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
    source = read_batches(run.lines, run.encode, recipe, Position())
    return [float(run.advance(source)) for _ in range(recipe.steps)]


@pytest.fixture
def curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[float]]]:
    """transformers' curve and ours: same initial weights, same batches and masks of the demo's text, same recipe."""
    (tmp_path / "text").write_text("\n".join(s.text for s in read(demo.HELD_OUT)), encoding="utf-8")
    ours_loss = pretrain.masked_loss

    def either_loss(model: Any, *args: Any) -> Tensor:
        return (ours_loss if isinstance(model, xlmr.XLMRobertaForMaskedLM) else padded_loss)(model, *args)

    monkeypatch.setattr(pretrain, "masked_loss", either_loss)

    def run(where: Path, recipe: Recipe, device: Any = "cpu", backend: str = "eager") -> list[list[float]]:
        lines, tokenizer = Lines([tmp_path / "text"]), xlmr.XLMRobertaTokenizer.from_pretrained(where)
        config = xlmr.XLMRobertaConfig.from_pretrained(where, **NO_DROPOUT, initializer_range=0.02)
        ours = xlmr.XLMRobertaForMaskedLM(config)
        reference = transformers.XLMRobertaForMaskedLM(transformers.XLMRobertaConfig(**config.to_dict()))
        reference.config.max_length = config.max_length
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
        given = inputs(name, RIGHT)
        grads = [gradients(model, model(**given).loss) for model in (reference, truth)]
        on_kernels(ours)
        lean = ours(**{k: v.to(ours.device) for k, v in given.items()}, return_logits=False)
        assert_gradients({k: g.cpu() for k, g in gradients(ours, lean.loss).items()}, *grads)


def test_recomputing_replays_dropout_on_the_kernels(on_kernels: Callable[[Any], Any]) -> None:
    _, ours = trained("MaskedLM", hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    on_kernels(ours)
    given = {k: v.to(ours.device) for k, v in inputs("MaskedLM", RIGHT).items()}

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
    expected, found = curves(checkpoint, recipe, device, "triton")
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
