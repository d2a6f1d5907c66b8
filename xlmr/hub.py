"""Uploading to the Hugging Face hub, by huggingface_hub: what save_pretrained writes is what the repository gets."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

KEYWORDS = (
    "repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr", "license", "tags",
)  # fmt: skip
PIPELINE_TAGS = {
    "XLMRobertaModel": "feature-extraction",
    "XLMRobertaForMaskedLM": "fill-mask",
    "XLMRobertaForCausalLM": "text-generation",
    "XLMRobertaForSequenceClassification": "text-classification",
    "XLMRobertaForTokenClassification": "token-classification",
    "XLMRobertaForQuestionAnswering": "question-answering",
    "XLMRobertaForMultipleChoice": "multiple-choice",
}
CARD = """---
{metadata}
---

# {title}

A `{cls}`{base}, as [transformers](https://huggingface.co/docs/transformers) and xlmr read it:

```python
from xlmr import {cls}  # or: from transformers import …

model = {cls}.from_pretrained("{repo_id}")
```
"""


class Pushable:
    """Base of whatever has a save_pretrained."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        license: str | None = None,
        tags: list[str] | None = None,
        **saving: Any,
    ) -> Any:
        """Write this into a temporary directory and upload that in one commit; return huggingface_hub's CommitInfo.

        repo_id: of a model repository, made if missing.  commit_message: by default "Upload", and the class.  private:
        of a new repository; None is its owner's default.  token: by default that of `hf auth login`.  revision: a
        branch, made if missing.  create_pr: opens a pull request with the commit.  license, tags: of the model card.
        saving: keywords of save_pretrained.

        Other files of the repository stay. A model gets a model card, README.md, unless the repository has one.
        ImportError without huggingface_hub, whose errors pass through.
        """
        try:
            from huggingface_hub import HfApi
        except ImportError as error:
            raise ImportError("uploading needs huggingface_hub: pip install 'xlmr[hub]'") from error
        hub = HfApi(token=token)
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory, **saving)  # type: ignore[attr-defined]
            repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not revision.startswith("refs/"):
                hub.create_branch(repo_id, branch=revision, exist_ok=True)
            cls = next((cls.__name__ for cls in type(self).__mro__ if cls.__name__ in PIPELINE_TAGS), None)
            if cls and not hub.file_exists(repo_id, "README.md", revision=revision):
                card = model_card(self, cls, repo_id, license=license, tags=tags)
                Path(directory, "README.md").write_text(card, encoding="utf-8")
            return hub.upload_folder(
                repo_id=repo_id, folder_path=directory, revision=revision, create_pr=create_pr,
                commit_message=commit_message or f"Upload {type(self).__name__}", commit_description=commit_description,
            )  # fmt: skip


def model_card(model: Any, cls: str, repo_id: str, **metadata: Any) -> str:
    """A short README.md of a model, or of the adapter in it, with what the hub is to know; `cls`: our class's name."""
    from huggingface_hub import ModelCardData

    library, where = "peft" if model._hf_peft_config_loaded else "transformers", model.config.name_or_path
    base = where if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", where) and not Path(where).exists() else None
    data = ModelCardData(library_name=library, base_model=base, pipeline_tag=PIPELINE_TAGS[cls], **metadata)
    made_from = f" made from [{base}](https://huggingface.co/{base})" if base else ""
    title = repo_id.rpartition("/")[2]
    return CARD.format(metadata=data.to_yaml(), title=title, cls=cls, base=made_from, repo_id=repo_id)


def take_keywords(options: dict[str, Any], save_directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The keywords of push_to_hub among those of save_pretrained, which loses them; the repository is by default called
    as the directory is."""
    taken = {name: options.pop(name) for name in KEYWORDS if name in options}
    return {**taken, "repo_id": taken.get("repo_id") or Path(save_directory).absolute().name}
