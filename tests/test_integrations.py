"""Our encoder inside transformers: equal answers and gradients, shared parameters, undone without a trace."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers

from xlmr import integrations
from xlmr.demo import CHECKPOINT

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 40, "initializer_range": 0.3, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
FAMILY = ("XLMRoberta", "Roberta", "Camembert", "Bert")


@pytest.fixture(autouse=True)
def _undone() -> Iterator[None]:
    yield
    integrations.unpatch()


def build(family: str, head: str = "ForSequenceClassification") -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, pad_token_id=0 if family == "Bert" else 1)
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


def test_accelerate_shares_and_is_undone() -> None:
    host = build("XLMRoberta", "Model")
    parameters, kinds = list(map(id, host.parameters())), [type(m) for m in host.modules()]
    assert integrations.accelerate(host) is host
    host(**batch())
    assert list(map(id, host.parameters())) == parameters
    assert [type(m) for m in host.modules()] != kinds
    integrations.unpatch(host)
    assert [type(m) for m in host.modules()] == kinds
    assert not {"view", "every_position"} & vars(host.encoder).keys()


def test_hidden_states_and_attentions_are_the_hosts() -> None:
    host = build("XLMRoberta", "Model")
    host.set_attn_implementation("eager")
    ours = integrations.accelerate(copy.deepcopy(host))
    asked = {"output_hidden_states": True, "output_attentions": True}
    for a, b in zip(host(**batch(), **asked).values(), ours(**batch(), **asked).values(), strict=True):
        torch.testing.assert_close(b, a)


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


def test_training_follows_the_hosts_curve_and_learns(tmp_path: Any) -> None:
    """HF Trainer on the demo checkpoint, unpatched and accelerated: one curve, and a task learnt."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for i in range(96):
        ids = torch.randint(20, 200, (int(torch.randint(5, 14, (), generator=generator)),), generator=generator)
        ids[0], ids[-1], ids[1 + i % 3] = 0, 2, 300 + i % 2  # the class is told by a token
        rows.append({"input_ids": ids.tolist(), "attention_mask": [1] * len(ids), "labels": i % 2})

    def collate(chosen: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in chosen)
        pad = {"input_ids": 1, "attention_mask": 0}
        padded = {k: torch.tensor([r[k] + [v] * (longest - len(r[k])) for r in chosen]) for k, v in pad.items()}
        return {**padded, "labels": torch.tensor([row["labels"] for row in chosen])}

    curves = []
    for change in (lambda model: model, integrations.accelerate):
        torch.manual_seed(0)
        load = transformers.XLMRobertaForSequenceClassification.from_pretrained
        model = change(load(CHECKPOINT, dtype=torch.float32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
        arguments = transformers.TrainingArguments(
            tmp_path, num_train_epochs=4, per_device_train_batch_size=8, learning_rate=1e-3, logging_steps=1,
            report_to=[], save_strategy="no", disable_tqdm=True, seed=0, use_cpu=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, collate, train_dataset=rows)
        trainer.train()
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(curves[0]) == 48
    torch.testing.assert_close(torch.tensor(curves[1]), torch.tensor(curves[0]), rtol=1e-3, atol=1e-3)
    whole = {k: v.to(model.device) for k, v in collate(rows).items()}
    right = model.eval()(**whole).logits.argmax(1) == whole["labels"]
    assert right.float().mean() >= 0.95


def test_attn_implementation_masks_padding() -> None:
    host = build("XLMRoberta", "Model")
    want = host(**batch()).last_hidden_state
    integrations.register_attention()
    host.set_attn_implementation("xlmr")
    torch.testing.assert_close(host(**batch()).last_hidden_state, want, rtol=1e-4, atol=1e-5)


def test_another_mathematics_is_refused_by_name() -> None:
    config = transformers.DebertaV2Config(**{**SIZES, "num_hidden_layers": 1}, relative_attention=True)
    with pytest.raises(TypeError, match="holds a deberta-v2 model: its attention has relative positions"):
        integrations.accelerate(transformers.DebertaV2Model(config))
    with pytest.raises(TypeError, match="model is a str"):
        integrations.accelerate("xlm-roberta-base")
