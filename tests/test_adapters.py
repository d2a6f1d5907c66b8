"""Adapters of PEFT inside a model, held against transformers': numbers, gradients and files, in both directions."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from reference import NO_DROPOUT, assert_same, build, gradients
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import xlmr

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{words}:UserWarning")  # what peft tells those who may not have meant it
    for words in ("Setting `save_embedding_layers` to `True`", "Already found a `peft_config` attribute")
]

HEAD = "XLMRobertaForSequenceClassification"
LORA: dict[str, Any] = {"target_modules": ["query", "value"], "r": 4, "init_lora_weights": False}
METHODS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(**LORA),
    "lora and a module": lambda: peft.LoraConfig(**LORA, modules_to_save=["classifier"]),
    "pissa": lambda: peft.LoraConfig(**LORA | {"init_lora_weights": "pissa"}),
    "words": lambda: peft.LoraConfig(**LORA | {"target_modules": ["word_embeddings", "dense"]}),
    "new words": lambda: peft.LoraConfig(**LORA, trainable_token_indices=[5, 6]),
    "ia3": lambda: peft.IA3Config(
        target_modules=["key", "intermediate.dense"], feedforward_modules=["intermediate.dense"], init_ia3_weights=False
    ),
}
IDS, LABELS = torch.arange(4, 28).view(3, 8), torch.tensor([0, 2, 1])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    build("ForSequenceClassification", num_hidden_layers=2, **NO_DROPOUT)[0].save_pretrained(directory)
    return directory


def load(directory: Path) -> tuple[Any, Any]:
    """transformers' model and ours."""
    theirs = getattr(transformers, HEAD).from_pretrained(directory, attn_implementation="eager")
    return theirs, getattr(xlmr, HEAD).from_pretrained(directory)


def adapted(base: Path, method: str = "lora", name: str | None = None) -> tuple[Any, Any]:
    models = load(base)
    for model in models:
        torch.manual_seed(1)
        model.add_adapter(METHODS[method](), name)
    return models


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def same(ours: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(logits(ours), logits(other), atol=1e-5, rtol=1e-5)


def changed(directory: Path, **fields: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | fields), encoding="utf-8")


@pytest.mark.parametrize("method", METHODS)
def test_adapters_compute_train_and_are_saved_as_transformers_does(base: Path, tmp_path: Path, method: str) -> None:
    theirs, ours = adapted(base, method)
    assert ours.active_adapters() == theirs.active_adapters() == ["default"]
    trained = [{name for name, p in model.named_parameters() if p.requires_grad} for model in (ours, theirs)]
    assert trained[0] == trained[1]
    assert_same(*(gradients(model, model(IDS, labels=LABELS).loss) for model in (ours, theirs)))
    same(ours, theirs)

    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    files = [{path.name: path for path in (tmp_path / name).iterdir()} for name in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert len({there["adapter_config.json"].read_text(encoding="utf-8") for there in files}) == 1
    mine, other = (load_file(there["adapter_model.safetensors"]) for there in files)
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[key], other[key]) for key in mine)

    again, loaded = load(tmp_path / "ours")[0], load(tmp_path / "theirs")[1]
    assert torch.equal(logits(loaded), logits(ours))
    same(loaded, again)
    inside = peft.PeftModel.from_pretrained(getattr(xlmr, HEAD).from_pretrained(base), tmp_path / "ours")
    same(inside, ours)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    loaded.load_adapter(tmp_path / "ours", "second", is_trainable=True)
    assert {n.replace("second", "default") for n, p in loaded.named_parameters() if p.requires_grad} == trained[0]


def test_adapters_are_switched_and_deleted(base: Path, tmp_path: Path) -> None:
    theirs, ours = adapted(base, "lora and a module")
    plain = load(base)[1]
    for model in (theirs, ours):
        torch.manual_seed(2)
        settings = LORA | {"target_modules": ["key"], "modules_to_save": ["classifier"]}
        model.add_adapter(peft.LoraConfig(**settings), "second")
    ours.add_adapter(METHODS["lora"](), "third")  # without that module, which transformers does not take
    ours.set_adapter("default")
    ours.delete_adapter("third")
    one = logits(load(base)[1])
    for names in ("default", "second", ["default"]):
        for model in (theirs, ours):
            model.set_adapter(names)
        same(ours, theirs)
    before = logits(ours)
    ours.disable_adapters()
    torch.testing.assert_close(logits(ours), one, atol=1e-5, rtol=1e-5)
    ours.enable_adapters()
    assert torch.equal(logits(ours), before)
    state, other = ours.get_adapter_state_dict("second"), theirs.get_adapter_state_dict("second")
    assert state.keys() == other.keys()
    assert all(torch.equal(state[key], other[key]) for key in state)
    ours.set_adapter("second")
    ours.delete_adapter("default")
    assert (ours.active_adapters(), list(ours.peft_config)) == (["second"], ["second"])
    ours.delete_adapter(["second"])
    assert ours.state_dict().keys() == plain.state_dict().keys()  # unlike transformers', which saves no model after it
    ours.save_pretrained(tmp_path)
    same(load(tmp_path)[0], plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_beside_its_base_model_in_one_directory(base: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """adapter_config.json names another base model, which nobody looks for; the dtypes are transformers'."""
    ours = adapted(base)[1]
    load(base)[1].save_pretrained(tmp_path)
    ours.save_pretrained(tmp_path)
    changed(tmp_path, base_model_name_or_path="no/such")
    for name, cls in (("ours", getattr(xlmr, HEAD)), ("theirs", getattr(transformers, HEAD))):
        loaded = cls.from_pretrained(tmp_path, dtype=dtype, adapter_name=name)
        assert list(loaded.peft_config) == [name]
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
        torch.testing.assert_close(
            logits(loaded).float(), logits(ours), atol=1e-5 if dtype.itemsize > 2 else 0.2, rtol=0
        )
    assert logits(load(tmp_path)[1]).equal(logits(ours))


def test_an_adapter_by_its_hub_name(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, asked = adapted(base)[1], []
    ours.save_pretrained(tmp_path)

    def download(name: str, filename: str, **options: Any) -> str:
        assert options["force_download"]
        asked.append((name, filename, options["revision"]))
        return str(tmp_path / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    loaded = getattr(xlmr, HEAD).from_pretrained("some/adapter", adapter_kwargs={"revision": "v2"}, force_download=True)
    assert logits(loaded).equal(logits(ours))
    files = ("adapter_config.json", "adapter_config.json", "adapter_model.safetensors")
    assert asked == [("some/adapter", name, "v2") for name in files]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "megatron_config would have peft open files"),
        ({"peft_type": "XLORA", "adapters": {"a": "/etc"}}, "adapters would have peft open files, or import modules"),
        ({"r": 10**9}, "a rank of 1000000000, where the weights have 32 rows at most"),
        ({"rank_pattern": {"query": 33}}, "a rank of 33"),
        ({"peft_type": "BEST"}, "no adapter that peft .* knows"),
        ({"r": "4"}, "no adapter that peft .* knows"),
        ({"target_modules": ["query", "key"]}, "the adapter lacks weights for this model: roberta.encoder.layer.0.att"),
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"base_model_name_or_path": "ITSELF"}, "which is an adapter too"),
    ],
)
def test_a_hostile_adapter_is_refused(base: Path, tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    adapted(base)[1].save_pretrained(tmp_path)
    changed(tmp_path, **{key: str(tmp_path) if value == "ITSELF" else value for key, value in fields.items()})
    with pytest.raises(ValueError, match=message):
        getattr(xlmr, HEAD).from_pretrained(tmp_path)
    assert "antigravity" not in sys.modules
    model = load(base)[1]
    names = model.state_dict().keys()
    if "base_model_name_or_path" not in fields:
        with pytest.raises(ValueError, match=message):
            model.load_adapter(tmp_path)
        assert model.state_dict().keys() == names
        assert not hasattr(model, "peft_config")


def test_a_base_model_that_the_file_names_is_not_looked_at_where_there_is_one(base: Path, tmp_path: Path) -> None:
    """Neither when it is loaded into a model, nor when that is saved."""
    adapted(base)[1].save_pretrained(tmp_path / "a")
    changed(tmp_path / "a", base_model_name_or_path=str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/config.json").write_text("never read", encoding="utf-8")
    model = load(base)[1]
    model.load_adapter(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    written = json.loads((tmp_path / "b/adapter_config.json").read_text(encoding="utf-8"))
    assert written["base_model_name_or_path"] == str(base)


def test_weights_of_no_use_are_told(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(base)[1]
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({**load_file(path), "base_model.model.more": torch.ones(1)}, path)
    result = load(base)[1].load_adapter(tmp_path)
    assert (result.missing_keys, result.unexpected_keys) == ([], ["more"])
    assert "the adapter default holds weights of no use here: more" in caplog.text
    torch.save(load_file(path), tmp_path / "adapter_model.bin")
    path.unlink()
    pickled = load(base)[1]
    pickled.load_adapter(tmp_path)
    same(pickled, model)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_model.bin").exists()


def test_what_is_no_adapter(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(base)[1]
    for ask in (model.active_adapters, model.enable_adapters, model.disable_adapters, model.get_adapter_state_dict):
        with pytest.raises(ValueError, match="there are no adapters in this model"):
            ask()
    with pytest.raises(TypeError, match="adapter_config is a dict: give one of peft, such as LoraConfig"):
        model.add_adapter(LORA)
    with pytest.raises(ValueError, match="prompt learning"):
        model.add_adapter(peft.PromptTuningConfig(num_virtual_tokens=2, task_type="SEQ_CLS"))
    assert not model._hf_peft_config_loaded
    model.add_adapter(METHODS["lora"](), "one")
    with pytest.raises(ValueError, match="there is an adapter 'one': give adapter_name another name"):
        model.load_adapter(peft_config=METHODS["lora"](), adapter_state_dict={}, adapter_name="one")
    with pytest.raises(ValueError, match="there is no adapter two; there are one"):
        model.set_adapter(["one", "two"])
    with pytest.raises(FileNotFoundError, match=r"there is no adapter_config\.json in"):
        model.load_adapter(tmp_path)
    with pytest.raises(ValueError, match="there is no adapter to load"):
        model.load_adapter()
    with pytest.raises(TypeError, match="hotswap is True: this is not offered"):
        model.load_adapter(tmp_path, hotswap=True)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is an adapter of PEFT alone"):
        xlmr.load(tmp_path)
    with pytest.raises(ValueError, match="Target modules"):
        model.add_adapter(peft.LoraConfig(target_modules=["no such"]), "two")
    model.add_adapter(METHODS["lora"](), "two")
    model.set_adapter(["one", "two"])
    with pytest.raises(ValueError, match="2 adapters are active: save one at a time"):
        model.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    for ask in (lambda: model.add_adapter(None), lambda: getattr(xlmr, HEAD).from_pretrained(tmp_path)):
        with pytest.raises(ImportError, match="adapters need the library peft: pip install peft"):
            ask()


@pytest.mark.parametrize(
    ("name", "task"), [("ForMaskedLM", None), ("ForTokenClassification", None), ("ForTokenClassification", "SEQ_CLS")]
)
def test_all_linear_means_what_it_means_for_transformers_own_classes(name: str, task: str | None) -> None:
    """Not the decoder, which is tied to the word embeddings; also beside another adapter."""
    chosen = []
    for model in build(name, num_hidden_layers=1):
        for adapter in ("one", "two"):
            model.add_adapter(peft.LoraConfig(target_modules="all-linear", task_type=task), adapter)
        chosen.append([set(config.target_modules) for config in model.peft_config.values()])
    assert chosen[0] == chosen[1]
    assert "lm_head.decoder" not in chosen[1][0]
