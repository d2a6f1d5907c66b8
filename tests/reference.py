"""transformers' models as oracles: the same random weights in its classes and in ours, and inputs of every kind."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from numerics import assert_accurate
from torch import Tensor, nn

import xlmr
from xlmr.ops import triton

HEADS = ["MaskedLM", "CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice"]
TINY: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 42, "type_vocab_size": 2, "layer_norm_eps": 1e-5, "initializer_range": 0.3,
    "num_labels": 3,
}  # fmt: skip
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
B, S = 5, 12
LENGTHS = (12, 3, 7, 1, 10)


def build(name: str, *, path: dict[str, Any] | None = None, **settings: Any) -> tuple[Any, Any]:
    """transformers' model and ours, equal random weights (biases and LayerNorms too), float32, eval mode."""
    settings = TINY | ({"num_labels": 2} if name == "ForQuestionAnswering" else {}) | settings
    reference_class = getattr(transformers, f"XLMRoberta{name}")
    extra = {} if name != "Model" else {"add_pooling_layer": True}
    reference = reference_class(transformers.XLMRobertaConfig(**settings, attn_implementation="eager"), **extra).eval()
    skip_without_pooler(name, reference)
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    ours = getattr(xlmr, f"XLMRoberta{name}")(xlmr.XLMRobertaConfig(**settings), **(path or {})).eval()
    missing, unexpected = ours.load_state_dict(reference.state_dict())
    assert not missing
    assert not unexpected
    return reference, ours


def skip_without_pooler(name: str, reference: Any) -> None:
    """transformers 5.0 to 5.12 builds ForMultipleChoice of XLM-R and CamemBERT without the pooler that it reads."""
    if name == "ForMultipleChoice" and reference.base_model.pooler is None:
        pytest.skip(f"transformers {transformers.__version__} builds {type(reference).__name__} without a pooler")


def save_head(checkpoint: Path, directory: Path, name: str, **config: Any) -> Path:
    """A checkpoint of transformers' head `name` on the base model of another, its own weights random and large."""
    torch.manual_seed(1)
    model = getattr(transformers, f"XLMRobertaFor{name}").from_pretrained(checkpoint, **config)
    for key, parameter in model.named_parameters():
        if key.startswith(("classifier", "qa_outputs")):
            nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(checkpoint).save_pretrained(directory)
    return directory


def double(reference: Any) -> Any:
    """The judge: the reference in float64."""
    return copy.deepcopy(reference).double()


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


def masks() -> dict[str, Tensor | None]:
    """Attention masks [B, S] or [B, 1, S, S] of every kind that means key padding."""
    right = torch.zeros(B, S, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        right[row, :length] = 1
    holes = right.clone()
    holes[0, 3:6] = 0
    holes[4, 2] = 0
    first_hidden = right.clone()
    first_hidden[0, 0] = 0
    square = right.bool()[:, None, None].expand(B, 1, S, S)
    return {
        "none": None,
        "ones": torch.ones(B, S),
        "right": right,
        "left": right.flip(1),
        "holes": holes,
        "first-hidden": first_hidden,
        "bool-4d": square,
        "float-4d": torch.zeros(B, 1, S, S).masked_fill(~square, torch.finfo(torch.float32).min),
    }


def keep(mask: Tensor | None) -> Tensor:
    """The real tokens [B, S] of one of `masks`."""
    if mask is None:
        return torch.ones(B, S, dtype=torch.bool)
    if mask.dim() == 4:
        row = mask[:, 0, 0]
        return row if row.dtype == torch.bool else row == 0
    return mask != 0


def reference_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What transformers' eager attention wants for the same mask: 4-D additive in the model's dtype."""
    if mask is None or mask.dim() == 2:
        return mask
    sees = mask if mask.dtype == torch.bool else mask == 0
    return torch.zeros_like(sees, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)


def inputs(name: str, mask: Tensor | None) -> dict[str, Any]:
    """Ids with pads where the mask is 0, and labels for the head `name`, none of them on a masked token."""
    real = keep(mask)
    ids = torch.randint(4, TINY["vocab_size"], (B, S)).masked_fill(~real, 1)
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if name in ("MaskedLM", "CausalLM", "TokenClassification"):
        classes = 3 if name == "TokenClassification" else TINY["vocab_size"]
        labels = torch.randint(0, classes, (B, S))
        predicted_from = real.roll(1, dims=1) if name == "CausalLM" else real  # the token whose logits the label scores
        given["labels"] = labels.masked_fill(~real | ~predicted_from | (torch.rand(B, S) < 0.3), -100)
    elif name == "SequenceClassification":
        given["labels"] = torch.randint(0, 3, (B,))
    elif name == "QuestionAnswering":
        given["start_positions"] = torch.tensor([0, 2, 40, 0, 3])
        given["end_positions"] = torch.tensor([[3], [2], [50], [0], [9]])
    elif name == "MultipleChoice":
        given["labels"] = torch.tensor([3])
        given = {k: v if v is None or k == "labels" else v[None] for k, v in given.items()}
    return given


def untrainable(device: torch.device) -> str | None:
    """Why nothing can be trained on the kernels here, or None where it can."""
    try:
        triton().linear(torch.ones(1, 16, device=device, requires_grad=True), torch.ones(16, 16, device=device), None)
    except (RuntimeError, ImportError) as error:
        return str(error)
    return None


RIGHT = masks()["right"]


def ids(mask: Tensor | None = RIGHT) -> Tensor:
    """Random ids [B, S], pads where the mask is 0."""
    return torch.randint(4, TINY["vocab_size"], (B, S)).masked_fill(~keep(mask), 1)


def same(ours: Tensor, reference: Tensor, mask: Tensor | None = None, atol: float = 3e-6) -> None:
    """Equal, to within rounding, at the real tokens."""
    real = keep(mask)
    torch.testing.assert_close(ours[real], reference[real], atol=atol, rtol=1e-5)
