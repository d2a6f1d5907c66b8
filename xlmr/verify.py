"""Is the path that computes a model right? Every operation and the whole model, against float64: `xlmr verify`."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .encode import pack
from .heads import XLMRobertaForMaskedLM
from .ops import EAGER, Check, Ops, checked, checked_gradients, compare

TOP = 5


class Verdict(NamedTuple):
    """All calls of one operation, or of the model: how many, the one nearest to its bound, whether all are right."""

    operation: str
    calls: int
    worst: Check
    right: bool


@torch.no_grad()
def verify(model: XLMRobertaForMaskedLM, tokenizer: Any, texts: Sequence[str]) -> list[Verdict]:
    """Verdicts on the operations that `model` calls for `texts`, packed and padded, and on its hidden states and top-k
    words end to end. The judge is the eager path in float64; the bound is twice the eager path's own error."""
    ids = tokenizer(list(texts), truncation=True)["input_ids"]
    packed, padded = pack(ids, model.device), _padded(tokenizer, ids, model.device)
    checks: list[Check] = []
    outputs = [_outputs(one, packed, padded) for one in _judged(model, checked(model.ops, checks))]
    checks += [compare(name, *(output[name] for output in outputs)) for name in outputs[0]]
    return _verdicts(checks)


def verify_gradients(model: XLMRobertaForMaskedLM, tokenizer: Any, texts: Sequence[str]) -> list[Verdict]:
    """Verdicts on every gradient of the operations that `model` calls to learn every third token of `texts`, masked,
    and end to end on the loss and the gradients of the parameters. Judge and bound are those of `verify`."""
    batch = _padded(tokenizer, tokenizer(list(texts), truncation=True)["input_ids"], model.device)
    ids, real = batch["input_ids"], batch["attention_mask"] != 0
    masked = real & (torch.arange(ids.shape[1], device=ids.device) % 3 == 1)
    batch |= {"input_ids": ids.masked_fill(masked, tokenizer.mask_token_id), "labels": ids.masked_fill(~masked, -100)}
    checks: list[Check] = []
    losses, found = [], []
    for one in _judged(model, checked_gradients(model.ops, checks)):
        loss = one.requires_grad_()(**batch, return_logits=False).loss
        losses.append(loss.detach())
        found.append(torch.autograd.grad(loss, list(one.parameters())))
    scale = max(gradient.abs().max().item() for gradient in found[2])  # the least of them are rounding errors only
    checks.append(compare("model, loss", *losses, dtype=model.dtype))  # an fp32 number, of hidden states in that dtype
    checks += [compare("model, gradients", *gradients, scale=scale) for gradients in zip(*found, strict=True)]
    return _verdicts(checks)


def _judged(model: XLMRobertaForMaskedLM, ops: Ops) -> Iterator[XLMRobertaForMaskedLM]:
    """The model with `ops`, the same on the eager path, and that in float64, in eval mode."""
    for path, dtype in ((ops, model.dtype), (EAGER, model.dtype), (EAGER, torch.float64)):
        one = copy.deepcopy(model).to(dtype).eval()
        one.ops = path
        yield one


def _padded(tokenizer: Any, ids: list[list[int]], device: torch.device) -> dict[str, Tensor]:
    return {k: v.to(device) for k, v in tokenizer.pad({"input_ids": ids}, return_tensors="pt").items()}


def _outputs(model: XLMRobertaForMaskedLM, packed: Any, padded: dict[str, Tensor]) -> dict[str, Tensor]:
    rows = torch.arange(0, len(packed.input_ids), 3, device=model.device)
    scores, _ = model.topk_packed(*packed, rows=rows, k=TOP)
    return {
        "model, packed": model.roberta.forward_packed(*packed),
        "model, padded": model.roberta(**padded).last_hidden_state,
        f"top-{TOP} words": scores,
    }


def _verdicts(checks: list[Check]) -> list[Verdict]:
    names = dict.fromkeys(c.operation for c in checks)
    return [_verdict(name, [c for c in checks if c.operation == name]) for name in names]


def _verdict(operation: str, checks: list[Check]) -> Verdict:
    worst = max(checks, key=lambda c: c.error / c.bound if c.error == c.error else float("inf"))
    return Verdict(operation, len(checks), worst, all(c.right for c in checks))
