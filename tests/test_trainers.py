"""What other libraries wrap around a model to train it: PEFT, Trainer, Accelerate, DDP and FSDP2."""

import copy
import itertools
import sys
from pathlib import Path
from typing import Any

import data_parallel
import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from processes import ROOT, run
from reference import HEADS, RIGHT, assert_same, gradients, inputs, trained
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainingArguments

import xlmr


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
CHECKPOINTING = "activation_checkpointing"
if CHECKPOINTING not in TrainingArguments.__dataclass_fields__:
    CHECKPOINTING = "gradient_checkpointing"  # its name up to transformers 5.17
DATA = {
    "SequenceClassification": ROWS, "TokenClassification": TOKEN_ROWS, "QuestionAnswering": QUESTION_ROWS,
    "MultipleChoice": CHOICE_ROWS, "MaskedLM": WORD_ROWS, "CausalLM": WORD_ROWS,
}  # fmt: skip


class SavingTrainer(xlmr.TrainerMixin, Trainer):
    pass


def trainer(
    model: Any, rows: list[dict[str, Tensor]], output: Path, kind: type[Trainer] = Trainer, **settings: Any
) -> Trainer:
    chosen = {"per_device_train_batch_size": 6, "max_steps": 8, "save_strategy": "no", **settings}
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True}
    arguments = TrainingArguments(str(output), learning_rate=3e-3, logging_steps=1, **quiet, **chosen)
    return kind(model, arguments, train_dataset=rows)


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
        {"per_device_train_batch_size": 12, CHECKPOINTING: True},
    ):
        torch.manual_seed(0)
        _, ours = trained(name)
        curves.append(losses(trainer(ours, rows, tmp_path, **settings)))
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


@pytest.mark.parametrize("name", ["SequenceClassification", "MaskedLM"])
def test_trainer_saves_and_resumes(name: str, tmp_path: Path) -> None:
    """With the mixin: resumed, it goes on as if never stopped, and both libraries load what it saved; tied weights are
    there once."""
    torch.manual_seed(0)
    _, whole = trained(name)
    first = copy.deepcopy(whole)
    expected = losses(trainer(whole, DATA[name], tmp_path / "whole"))
    trainer(first, DATA[name], tmp_path, kind=SavingTrainer, save_strategy="steps", save_steps=4).train()
    resumed = trainer(trained(name)[1], DATA[name], tmp_path, kind=SavingTrainer)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [entry["loss"] for entry in resumed.state.log_history if "loss" in entry] == expected
    resumed.save_model(tmp_path / "end")
    for directory in (tmp_path / "checkpoint-8", tmp_path / "end"):
        for library in (xlmr, transformers):
            loaded = getattr(library, f"XLMRobertaFor{name}").from_pretrained(directory)
            assert_equal_states(loaded, whole)


def test_without_the_mixin_there_is_no_config(tmp_path: Path) -> None:
    """Trainer writes it for transformers' own classes only; the error says so."""
    _, model = trained("SequenceClassification")
    trainer(model, ROWS, tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    directory, cls = tmp_path / "checkpoint-1", xlmr.XLMRobertaForSequenceClassification
    with pytest.raises(FileNotFoundError, match=r"no config.json in .*TrainerMixin only: give the model's config=…"):
        cls.from_pretrained(directory)
    assert_equal_states(cls.from_pretrained(directory, config=model.config), model)
    reference, _ = trained("SequenceClassification")
    trainer(reference, ROWS, tmp_path / "theirs", kind=SavingTrainer, max_steps=1).save_model()
    assert_equal_states(type(reference).from_pretrained(tmp_path / "theirs"), reference)


def assert_equal_states(found: Any, expected: Any) -> None:
    state = found.state_dict()
    assert state.keys() == expected.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in expected.state_dict().items())


@pytest.mark.parametrize("name", ["SequenceClassification", "MaskedLM"])
def test_accelerate(name: str, tmp_path: Path) -> None:
    """Prepared for bf16: the losses of plain autocast, outputs in fp32; what it saves is whole, a tied pair too."""
    _, ours = trained(name)
    plain = copy.deepcopy(ours)
    given = [inputs(name, RIGHT)] * 6
    AcceleratorState._reset_state(reset_partial_state=True)  # which a Trainer of another test has set up
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    prepared, optimizer = accelerator.prepare(ours, torch.optim.AdamW(ours.parameters(), lr=3e-3))
    assert prepared(**given[0]).logits.dtype == torch.float32
    mine = train(prepared, given, optimizer, accelerator.backward)
    plain.forward = torch.autocast("cpu", torch.bfloat16)(plain.forward)
    assert mine == train(plain, given)
    assert mine[-1] < mine[0] - 0.1
    accelerator.save_model(prepared, tmp_path)
    saved = type(ours).from_pretrained(tmp_path, config=ours.config).state_dict()
    assert all(torch.equal(saved[key], value) for key, value in ours.state_dict().items())


def test_a_sharded_model_is_saved_from_a_gathered_state(tmp_path: Path) -> None:
    """FSDP2's, which exchanges the class."""
    _, ours = trained("MaskedLM")
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        expected = copy.deepcopy(ours)
        fully_shard(ours)
        with pytest.raises(ValueError, match=r"is sharded over processes: .* give these as state_dict=…"):
            ours.save_pretrained(tmp_path)
        gathered = get_model_state_dict(ours, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    finally:
        torch.distributed.destroy_process_group()
    ours.save_pretrained(tmp_path, state_dict=gathered)
    assert_equal_states(xlmr.XLMRobertaForMaskedLM.from_pretrained(tmp_path), expected)
    assert xlmr.XLMRobertaConfig.from_pretrained(tmp_path).architectures == ["XLMRobertaForMaskedLM"]


# Several processes


@pytest.fixture(scope="module")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """What two processes computed: see data_parallel.py."""
    output = tmp_path_factory.mktemp("parallel") / "gradients.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    worker = Path(__file__).parent / "data_parallel.py"
    run(*command, worker, output, path=(ROOT,), timeout=120)
    return torch.load(output)


@pytest.mark.parametrize("head", ["MaskedLM", "SequenceClassification"])
@pytest.mark.parametrize("way", ["DDP", "FSDP2", "FSDP2, layer by layer"])
def test_two_processes_give_one_s_gradients(way: str, head: str, parallel: dict[str, dict[str, Tensor]]) -> None:
    model, given = data_parallel.model_and_batch(head)
    assert_same(parallel[f"{way} {head}"], gradients(model, data_parallel.loss(model, given, given)))


def test_a_checkpoint_of_a_trainer_holds_the_adapter(tmp_path: Path) -> None:
    """Beside all weights, from which training goes on: from_pretrained loads it with its base model."""
    peft = pytest.importorskip("peft")
    _, base = trained("SequenceClassification")
    base.save_pretrained(tmp_path / "base")
    runs = []
    for steps in (2, 4):
        torch.manual_seed(1)
        model = type(base).from_pretrained(tmp_path / "base").train()
        model.add_adapter(peft.LoraConfig(target_modules=["query"], modules_to_save=["classifier"]))
        saving = {"max_steps": steps, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
        runs.append((model, trainer(model, ROWS, tmp_path / "run", kind=SavingTrainer, **saving)))
    runs[0][1].train()
    loaded = type(base).from_pretrained(tmp_path / "run/checkpoint-2").eval()
    ids = ROWS[0]["input_ids"][None]
    assert torch.equal(loaded(ids).logits, runs[0][0].eval()(ids).logits)
    runs[1][1].train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert runs[1][1].state.global_step == 4
    assert not torch.equal(runs[1][0].eval()(ids).logits, loaded(ids).logits)
