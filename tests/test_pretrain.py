"""xlmr.pretrain: the masking rule, the order of the texts, exact resumption, and what is refused."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given
from hypothesis import strategies as st
from reference import untrainable
from transformers import DataCollatorForLanguageModeling

from xlmr import XLMRobertaConfig, XLMRobertaForMaskedLM, XLMRobertaTokenizer, cli, pretrain, training_text
from xlmr.encode import Packed
from xlmr.pretrain import Recipe, Run, mask_tokens
from xlmr.training_text import Lines, LineTokenizer, Position, read_batches

TEXTS = [
    "The capital of France is Paris.",
    "法国的首都是巴黎。",
    "Столица Франции – Париж.",
    "La capitale de la France est Paris.",
]
TINY = Recipe(steps=6, batch_tokens=60, accumulate=2, learning_rate=1e-2, warmup=2, seed=3)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> XLMRobertaTokenizer:
    return XLMRobertaTokenizer.from_pretrained(checkpoint)


@pytest.fixture
def config(tokenizer: XLMRobertaTokenizer) -> XLMRobertaConfig:
    return XLMRobertaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=50, type_vocab_size=1,
    )  # fmt: skip


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join([*TEXTS, f"{TEXTS[0]}\t{TEXTS[3]}", TEXTS[2]]) + "\n", encoding="utf-8")
    return path


def shares(ids: torch.Tensor, masked: torch.Tensor, labels: torch.Tensor, mask_id: int) -> list[float]:
    """Shares of tokens chosen, and among those of masks, other tokens, and tokens left alone."""
    chosen = labels != -100
    kept, replaced = masked[chosen], labels[chosen]
    is_mask, same = kept == mask_id, kept == replaced
    assert torch.equal(masked[~chosen], ids[~chosen])
    assert torch.equal(labels[chosen], ids[chosen])
    return [x.float().mean().item() for x in (chosen, is_mask, ~is_mask & ~same, same)]


def test_masking_is_the_reference_s(tokenizer: XLMRobertaTokenizer) -> None:
    size, mask_id = len(tokenizer), tokenizer.mask_token_id
    special = torch.tensor(tokenizer.all_special_ids)
    ids = torch.randint(4, size - 1, (400_000,))
    ours = mask_tokens(ids, special, mask_id, size, 0.15, torch.Generator().manual_seed(0))
    collator = DataCollatorForLanguageModeling(transformers.XLMRobertaTokenizer.from_pretrained(tokenizer.name_or_path))
    theirs = [t[0] for t in collator.torch_mask_tokens(ids[None].clone(), torch.zeros(1, len(ids), dtype=torch.bool))]
    assert shares(ids, *ours, mask_id) == pytest.approx(shares(ids, *theirs, mask_id), abs=0.006)


@given(st.lists(st.sampled_from([0, 1, 2, 3, 50, 51]), max_size=30), st.integers(0, 99))
def test_special_tokens_are_never_masked(ids: list[int], seed: int) -> None:
    given_ids, special = torch.tensor(ids, dtype=torch.int64), torch.tensor([0, 1, 2, 3])
    masked, labels = mask_tokens(given_ids, special, 60, 61, 1.0, torch.Generator().manual_seed(seed))
    is_special = torch.isin(given_ids, special)
    assert torch.equal(masked[is_special], given_ids[is_special])
    assert torch.equal(labels, given_ids.masked_fill(is_special, -100))


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r\ufeff")), min_size=1))
def test_lines_are_those_of_the_file(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    texts = ["first", *texts]
    directory = tmp_path_factory.mktemp("lines")
    (directory / "a").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(texts).encode())
    (directory / "b").write_bytes("\n".join(texts).encode() + b"\n\n")
    kept = [text for text in texts if not text.encode().isspace() and text]
    assert list(Lines([directory / "a", directory / "b"])) == kept + kept


def test_an_epoch_reads_each_line_once_in_batches_of_like_lengths(
    tmp_path: Path, tokenizer: XLMRobertaTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_text, "POOL", 16)
    (tmp_path / "text").write_text("\n".join("Paris " * (1 + i % 9) + str(i) for i in range(50)), encoding="utf-8")
    lines, encode = Lines([tmp_path / "text"]), LineTokenizer(tokenizer, 48)
    stream = read_batches(lines, encode, Position(), seed=0, batch_tokens=64)
    epochs: dict[int, list[list[int]]] = {0: [], 1: []}
    batches = []
    for position, batch in stream:
        if position.epoch == 2:
            break
        assert sum(map(len, batch)) <= 64
        epochs[position.epoch] += batch
        batches.append((position, batch))
    everything = sorted(encode(list(lines)))
    assert sorted(epochs[0]) == sorted(epochs[1]) == everything
    assert epochs[0] != epochs[1]
    for i in (0, 3, 7, len(batches) - 2):  # a new stream goes on where another stopped
        assert next(read_batches(lines, encode, batches[i][0], seed=0, batch_tokens=64)) == batches[i + 1]


def test_a_step_is_the_mean_over_all_its_batches(
    text: Path, config: XLMRobertaConfig, tokenizer: XLMRobertaTokenizer
) -> None:
    model = XLMRobertaForMaskedLM(replaced(config, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).train()
    run = Run(model, tokenizer, Lines([text]), replace(TINY, clip=0.0))
    stream = run.batches()
    seed = TINY.seed * 2**32
    micro = [run.masker(ids, seed * 2**8 + i) for i, (_, ids) in enumerate([next(stream), next(stream)])]
    losses = [F.cross_entropy(dense_logits(model, packed), labels, reduction="sum") for packed, labels in micro]
    expected = sum(losses) / sum(int((labels != -100).sum()) for _, labels in micro)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    run.optimizer.step = lambda: None  # type: ignore[method-assign]
    run.optimizer.zero_grad = lambda: None  # type: ignore[method-assign]
    loss = run.advance(run.batches())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, wanted in zip((p.grad for p in model.parameters()), gradients, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)


def replaced(config: XLMRobertaConfig, **settings: float) -> XLMRobertaConfig:
    return XLMRobertaConfig.from_dict({**config.to_dict(), **settings})


def dense_logits(model: XLMRobertaForMaskedLM, packed: Packed) -> torch.Tensor:
    """Logits [T, V] of packed texts, each run alone through the padded entry."""
    edges = packed.cu_seqlens.tolist()
    return torch.cat([model(packed.input_ids[None, a:b]).logits[0] for a, b in pairwise(edges)])


def test_learning_rate_rises_then_falls_and_spares_norms_and_biases(config: XLMRobertaConfig) -> None:
    recipe = Recipe(steps=10, warmup=4, learning_rate=1.0)
    rates = [recipe.learning_rate_at(step) for step in range(10)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    model = XLMRobertaForMaskedLM(config)
    decayed, spared = pretrain._optimizer(model, recipe).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in spared["params"]} == {
        n for n in names.values() if "LayerNorm" in n or n.endswith("bias") or "layer_norm" in n
    }
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def test_a_resumed_run_equals_an_uninterrupted_one(
    text: Path,
    tmp_path: Path,
    config: XLMRobertaConfig,
    tokenizer: XLMRobertaTokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def train(output: Path, resume: bool = False) -> dict:
        return pretrain.pretrain(
            [text], output, config=config, tokenizer=tokenizer, held_out=text, recipe=TINY, save_every=2, log_every=1,
            resume=resume, progress=False,
        )  # fmt: skip

    whole = train(tmp_path / "whole")
    advance = Run.advance

    def stop_at_five(run: Run, source: object) -> torch.Tensor:
        if run.step == 5:
            raise KeyboardInterrupt
        return advance(run, source)

    monkeypatch.setattr(Run, "advance", stop_at_five)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts")
    monkeypatch.setattr(Run, "advance", advance)
    assert [path.name for path in (tmp_path / "parts").glob("checkpoint-*")] == ["checkpoint-4"]
    with pytest.raises(ValueError, match="holds a run at step 4: resume"):
        train(tmp_path / "parts")
    with (tmp_path / "parts" / "log.jsonl").open("a") as log:
        log.write('{"step": 5, "lo')  # what a kill leaves
    torch.manual_seed(99)
    parts = train(tmp_path / "parts", resume=True)
    assert whole["epochs"] >= 1  # so that the order of the texts was drawn anew on the way
    changing = {"seconds", "output"}
    assert {k: v for k, v in whole.items() if k not in changing} == {
        k: v for k, v in parts.items() if k not in changing
    }
    for name in ("model.safetensors", "log.jsonl", "config.json", "sentencepiece.bpe.model"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    with pytest.raises(ValueError, match=r"learning_rate was 0\.01, is 0\.5"):
        pretrain.pretrain([text], tmp_path / "parts", recipe=replace(TINY, learning_rate=0.5), resume=True)


def test_a_resumed_run_knows_its_settings(
    text: Path, tmp_path: Path, config: XLMRobertaConfig, tokenizer: XLMRobertaTokenizer, capsys: Any
) -> None:
    recipe = replace(TINY, steps=2, bf16=True)
    pretrain.pretrain([text], tmp_path, config=config, tokenizer=tokenizer, recipe=recipe, progress=False)
    again = ["pretrain", str(text), "--output", str(tmp_path), "--resume"]
    assert cli.main([*again, "--json", "--warmup", str(TINY.warmup), "--bf16"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 2
    assert cli.main([*again, "--learning-rate", "0.5", "--steps", "3"]) == 1
    assert capsys.readouterr().err.endswith("texts: steps was 2, is 3; learning_rate was 0.01, is 0.5\n")
    assert cli.main([*again, "--output", str(tmp_path / "new")]) == 1
    assert "new holds no checkpoint: for a new run, give" in capsys.readouterr().err


def test_command_line_trains_and_goes_on_training(
    text: Path, tmp_path: Path, config: XLMRobertaConfig, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.save_pretrained(tmp_path)
    options = [
        "--steps",
        "60",
        "--batch-tokens",
        "200",
        "--learning-rate",
        "1e-2",
        "--warmup",
        "5",
        "--json",
    ]
    first = [
        "--config",
        str(tmp_path / "config.json"),
        "--tokenizer",
        str(checkpoint),
        "--output",
        str(tmp_path / "new"),
    ]
    assert cli.main(["pretrain", str(text), "--held-out", str(text), "--max-length", "12", *first, *options]) == 0
    out, err = capsys.readouterr()
    summary = json.loads(out)
    start = math.log(config.vocab_size)
    assert summary["step"] == 60
    assert summary["loss"] < start - 1.5
    assert summary["held_out_perplexity"] == pytest.approx(math.exp(summary["held_out_loss"]))
    assert summary["texts_cut"] > 0
    assert "texts were cut to 12 tokens" in err
    assert "step/s" not in err  # no one looks: standard error is no terminal
    written = {path.name for path in (tmp_path / "new").iterdir()}
    assert {"model.safetensors", "config.json", "log.jsonl", "loss.png", "checkpoint-60"} <= written
    onward = ["--init", str(tmp_path / "new"), "--bf16", "--output", str(tmp_path / "more")]
    assert cli.main(["pretrain", str(text), *onward, *options]) == 0
    more = [json.loads(line)["loss"] for line in (tmp_path / "more/log.jsonl").read_text().splitlines()]
    assert more[-1] < summary["loss"]


def test_either_path_and_bf16(
    text: Path,
    tmp_path: Path,
    config: XLMRobertaConfig,
    tokenizer: XLMRobertaTokenizer,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernels give eager's losses, bf16 nearly those; a path that cannot run is refused before anything is
    written."""
    plain = replaced(config, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)

    def losses(name: str, bf16: bool = False, **path: Any) -> list[float]:
        recipe = replace(TINY, bf16=bf16, steps=3)
        settings = {"config": plain, "tokenizer": tokenizer, "recipe": recipe, "log_every": 1, "progress": False}
        pretrain.pretrain([text], tmp_path / name, **settings, **path)
        return [json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]

    expected = losses("eager", device="cpu", backend="eager")
    half = losses("bf16", bf16=True, device="cpu")
    assert half == pytest.approx(expected, rel=0.02)
    assert half != pytest.approx(expected, rel=1e-5)
    if untrainable(device) is None:
        assert losses("triton", device=device, backend="triton") == pytest.approx(expected, rel=1e-4)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # a model may be on its way to a GPU
    with pytest.raises(RuntimeError, match=r"backend 'triton' cannot run: .*need a GPU"):
        losses("refused", device="cpu", backend="triton")
    assert not (tmp_path / "refused").exists()


def test_long_texts_are_cut_and_counted(tokenizer: XLMRobertaTokenizer) -> None:
    short = tokenizer("Paris")["input_ids"]
    encode = LineTokenizer(tokenizer, len(short))
    rows = encode([TEXTS[0], "Paris", f"{TEXTS[0]}\t{TEXTS[3]}", "Paris\t"])
    assert (encode.texts, encode.cut) == (4, 2)
    assert [len(row) for row in rows] == [len(short)] * 4
    assert rows[1] == rows[3] == short
    assert rows[2] == tokenizer(TEXTS[0], TEXTS[3], truncation=True, max_length=len(short))["input_ids"]
    assert LineTokenizer(tokenizer, 48)(["Paris\tFrance"]) == [tokenizer("Paris", "France")["input_ids"]]


def test_bad_input_is_named(
    text: Path, tmp_path: Path, config: XLMRobertaConfig, tokenizer: XLMRobertaTokenizer
) -> None:
    def train(texts: Path = text, **settings: object) -> None:
        settings = {"config": config, "tokenizer": tokenizer, "recipe": TINY, **settings}
        pretrain.pretrain([texts], tmp_path / "out", progress=False, **settings)

    (tmp_path / "empty").touch()
    (tmp_path / "blank").write_text("\n \n")
    (tmp_path / "latin1").write_bytes("café\n".encode("latin-1") * 9)
    wrong = [
        ({"texts": tmp_path / "empty"}, "empty is empty: give text files"),
        ({"texts": tmp_path / "blank"}, "blank holds blank lines only"),
        ({"texts": tmp_path / "latin1"}, "latin1 is not UTF-8 in the line at byte"),
        ({"tokenizer": None}, "no tokenizer: give --tokenizer"),
        ({"config": None}, "no model: give --config"),
        ({"config": replaced(config, vocab_size=9)}, "config says vocab_size 9: set vocab_size to"),
        ({"config": replaced(config, pad_token_id=0)}, "pad_token_id is 0 in the config, 1 in the tokenizer"),
        ({"recipe": replace(TINY, max_length=49)}, "max_length is 49: this model takes at most 48"),
        ({"recipe": replace(TINY, max_length=4)}, "max_length is 4: at least 5 is needed"),
        ({"save_every": 0}, "save_every is 0: at least 1 is needed"),
        ({"log_every": -5}, "log_every is -5: at least 1 is needed"),
        ({"init": tmp_path}, "config and init are both given"),
    ]
    for settings, message in wrong:
        with pytest.raises(ValueError, match=message):
            train(**settings)
    with pytest.raises(ValueError, match=r"mask_probability is 2\.0: give a share"):
        replace(TINY, mask_probability=2.0)
    for setting in ({"steps": 0}, {"clip": math.nan}, {"learning_rate": math.nan}):
        [(name, value)] = setting.items()
        with pytest.raises(ValueError, match=f"{name} is {value}: at least"):
            replace(TINY, **setting)
    with pytest.raises(RuntimeError, match="the loss became nan before step 6: lower the learning rate"):
        train(recipe=replace(TINY, learning_rate=1e30))
    assert not (tmp_path / "out" / "model.safetensors").exists()
    with pytest.raises(NotADirectoryError, match="empty: it is a file, a directory is needed"):
        pretrain.pretrain([text], tmp_path / "empty", config=config, tokenizer=tokenizer, recipe=TINY)


def test_a_damaged_state_is_named(
    text: Path, tmp_path: Path, config: XLMRobertaConfig, tokenizer: XLMRobertaTokenizer
) -> None:
    recipe = replace(TINY, steps=1)
    pretrain.pretrain([text], tmp_path, config=config, tokenizer=tokenizer, recipe=recipe, progress=False)
    state = tmp_path / "checkpoint-1" / "training.pt"
    whole = state.read_bytes()
    torch.save([1], state)
    other = state.read_bytes()
    torch.save({"step": 1}, state)
    for damaged in (other, state.read_bytes(), whole[:-100], b"x", b""):
        state.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"training\.pt is damaged .*; go on from .*checkpoint-1 with --init"):
            pretrain.pretrain([text], tmp_path, recipe=recipe, resume=True, progress=False)


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1e4])
def test_what_is_logged_of_held_out_text_is_json(monkeypatch: pytest.MonkeyPatch, loss: float) -> None:
    """Also where no token was masked, and where the perplexity is past the largest number."""
    monkeypatch.setattr(pretrain, "held_out_loss", lambda *args: loss)
    run = SimpleNamespace(model=None, tokenizer=None, masker=None, recipe=TINY, encode=SimpleNamespace(max_length=9))
    found = pretrain._held_out(run, None)  # type: ignore[arg-type]
    assert set(found) == ({"held_out_loss", "held_out_perplexity"} if math.isfinite(loss) else set())
    json.dumps(found, allow_nan=False)
