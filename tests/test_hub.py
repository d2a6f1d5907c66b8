"""push_to_hub: what is uploaded, and how, by huggingface_hub; the hub is a stub with the signatures of its HfApi."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import huggingface_hub
import pytest
import torch

import xlmr
from xlmr.demo import CHECKPOINT

SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 30}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """An HfApi that puts what it is given into tmp_path / "uploaded"."""
    api = create_autospec(huggingface_hub.HfApi, instance=True)
    api.file_exists.return_value = False
    api.create_repo.side_effect = lambda repo_id, **_: SimpleNamespace(repo_id=f"me/{repo_id}")
    api.upload_folder.side_effect = lambda folder_path, **_: Path(folder_path).rename(tmp_path / "uploaded") and "made"
    monkeypatch.setattr(huggingface_hub, "HfApi", create_autospec(huggingface_hub.HfApi, return_value=api))
    return api


def things() -> dict[str, Any]:
    config = xlmr.XLMRobertaConfig(**SIZES)
    return {
        "config": config,
        "model": xlmr.XLMRobertaForMaskedLM(config),
        "tokenizer": xlmr.XLMRobertaTokenizer.from_pretrained(CHECKPOINT),
    }


def contents(directory: Path) -> dict[str, bytes]:
    """The files but the model card."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "README.md"}


@pytest.mark.parametrize("kind", ["config", "model", "tokenizer"])
def test_what_is_uploaded_is_what_is_saved(hub: Any, tmp_path: Path, kind: str) -> None:
    thing = things()[kind]
    thing.save_pretrained(tmp_path / "saved")
    assert thing.push_to_hub("mine") == "made"
    assert contents(tmp_path / "uploaded") == contents(tmp_path / "saved")
    hub.create_repo.assert_called_once_with("mine", private=None, exist_ok=True)
    hub.create_branch.assert_not_called()
    given = hub.upload_folder.call_args.kwargs
    assert (given["repo_id"], given["revision"], given["create_pr"]) == ("me/mine", None, False)
    assert given["commit_message"] == f"Upload {type(thing).__name__}"
    assert not Path(given["folder_path"]).exists()


@pytest.mark.parametrize("kind", ["config", "model", "tokenizer"])
def test_saving_may_upload_besides(hub: Any, tmp_path: Path, kind: str) -> None:
    thing, saved = things()[kind], tmp_path / "name"
    thing.save_pretrained(saved, push_to_hub=True, commit_message="Better", private=True, token="t", revision="new")
    assert contents(tmp_path / "uploaded") == contents(saved)
    huggingface_hub.HfApi.assert_called_once_with(token="t")
    hub.create_repo.assert_called_once_with("name", private=True, exist_ok=True)
    hub.create_branch.assert_called_once_with("me/name", branch="new", exist_ok=True)
    given = hub.upload_folder.call_args.kwargs
    assert (given["repo_id"], given["revision"], given["commit_message"]) == ("me/name", "new", "Better")


def test_how_a_model_is_saved_holds_for_what_is_uploaded(hub: Any, tmp_path: Path) -> None:
    model = things()["model"]
    how = {"variant": "fp16", "max_shard_size": "4KB", "state_dict": model.half().state_dict()}
    model.save_pretrained(tmp_path / "a", push_to_hub=True, repo_id="you/b", create_pr=True, **how)
    assert contents(tmp_path / "uploaded") == contents(tmp_path / "a")
    assert "model.safetensors.index.fp16.json" in contents(tmp_path / "a")
    assert hub.create_repo.call_args.args == ("you/b",)
    assert hub.upload_folder.call_args.kwargs["create_pr"]


def test_nothing_is_made_where_nothing_can_be_saved(hub: Any, tmp_path: Path) -> None:
    model = things()["model"]
    model.save_pretrained(tmp_path / "a", False, push_to_hub=True)  # another process is the main one
    with pytest.raises(TypeError, match=r"tp_plan is 'auto': this is not offered"):
        model.push_to_hub("mine", tp_plan="auto")
    with pytest.raises(ValueError, match="is on the meta device"):
        model.to(torch.device("meta")).push_to_hub("mine")
    assert not hub.mock_calls
    assert not list(tmp_path.iterdir())


def uploaded(hub: Any, tmp_path: Path, thing: Any, **options: Any) -> str | None:
    """The model card that is uploaded with it."""
    thing.push_to_hub("mine", **options)
    path = tmp_path / "uploaded/README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else None
    shutil.rmtree(tmp_path / "uploaded")
    return text


def test_a_model_gets_a_card_unless_there_is_one(hub: Any, tmp_path: Path) -> None:
    model = things()["model"]
    model.config.name_or_path = "FacebookAI/xlm-roberta-base"
    text = uploaded(hub, tmp_path, model, license="mit", tags=["a"], revision="new")
    hub.file_exists.assert_called_once_with("me/mine", "README.md", revision="new")
    card = huggingface_hub.ModelCard(text)
    base = "FacebookAI/xlm-roberta-base"
    expected = {"license": "mit", "tags": ["a"], "base_model": base, "pipeline_tag": "fill-mask"}
    assert card.data.to_dict() == {**expected, "library_name": "transformers"}
    assert f"A `XLMRobertaForMaskedLM` made from [{base}](https://huggingface.co/{base}), as" in card.content
    assert 'XLMRobertaForMaskedLM.from_pretrained("me/mine")' in card.content

    class Mine(xlmr.XLMRobertaModel):
        pass

    for where in ("", str(tmp_path), "/no/such/place"):  # of which nobody else knows
        config = xlmr.XLMRobertaConfig(**SIZES)
        config.name_or_path = where
        expected = {"library_name": "transformers", "pipeline_tag": "feature-extraction"}
        card = huggingface_hub.ModelCard(uploaded(hub, tmp_path, Mine(config)))
        assert card.data.to_dict() == expected
        assert "A `XLMRobertaModel`, as" in card.content
    hub.file_exists.return_value = True
    assert uploaded(hub, tmp_path, model) is None


def test_an_adapter_is_uploaded_alone(hub: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = things()["model"]
    model.add_adapter(peft.LoraConfig(target_modules=["query"]))
    card = huggingface_hub.ModelCard(uploaded(hub, tmp_path, model))
    assert card.data.to_dict() == {"library_name": "peft", "pipeline_tag": "fill-mask"}
    model.push_to_hub("mine")
    assert contents(tmp_path / "uploaded").keys() == {"adapter_config.json", "adapter_model.safetensors"}


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"uploading needs huggingface_hub: pip install 'xlmr\[hub\]'"):
        xlmr.XLMRobertaConfig().push_to_hub("mine")
