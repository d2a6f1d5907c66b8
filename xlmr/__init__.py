"""XLM-RoBERTa on PyTorch: a fast drop-in for transformers' classes.

Each public name is imported from its module at first use (PEP 562), so `import xlmr` itself loads nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import XLMRobertaConfig
    from .encoder import Encoder, embed, load
    from .heads import (
        XLMRobertaForCausalLM,
        XLMRobertaForMaskedLM,
        XLMRobertaForMultipleChoice,
        XLMRobertaForQuestionAnswering,
        XLMRobertaForSequenceClassification,
        XLMRobertaForTokenClassification,
    )
    from .integrations import TrainerMixin, accelerate, patch_transformers, register_attention, unpatch
    from .model import XLMRobertaModel
    from .pipelines import pipeline
    from .pretrained import XLMRobertaPreTrainedModel
    from .tokenizer import AddedToken, BatchEncoding, XLMRobertaTokenizer, XLMRobertaTokenizerFast

__version__ = "0.1.0"

__all__ = [
    "AddedToken",
    "BatchEncoding",
    "Encoder",
    "TrainerMixin",
    "XLMRobertaConfig",
    "XLMRobertaForCausalLM",
    "XLMRobertaForMaskedLM",
    "XLMRobertaForMultipleChoice",
    "XLMRobertaForQuestionAnswering",
    "XLMRobertaForSequenceClassification",
    "XLMRobertaForTokenClassification",
    "XLMRobertaModel",
    "XLMRobertaPreTrainedModel",
    "XLMRobertaTokenizer",
    "XLMRobertaTokenizerFast",
    "__version__",
    "accelerate",
    "embed",
    "load",
    "patch_transformers",
    "pipeline",
    "register_attention",
    "unpatch",
]

_MODULES = {
    "AddedToken": "tokenizer",
    "BatchEncoding": "tokenizer",
    "Encoder": "encoder",
    "TrainerMixin": "integrations",
    "XLMRobertaConfig": "config",
    "XLMRobertaModel": "model",
    "XLMRobertaPreTrainedModel": "pretrained",
    "XLMRobertaTokenizer": "tokenizer",
    "XLMRobertaTokenizerFast": "tokenizer",
    "accelerate": "integrations",
    "embed": "encoder",
    "load": "encoder",
    "patch_transformers": "integrations",
    "pipeline": "pipelines",
    "register_attention": "integrations",
    "unpatch": "integrations",
}  # the rest, the task heads, are in heads


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'xlmr' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES.get(name, 'heads')}", __name__), name)
    globals()[name] = value  # the next access is an ordinary one
    return value


def __dir__() -> list[str]:
    return __all__
