"""Is the path that computes a model right? Every operation and the whole model, against float64: `xlmr verify`."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .encode import pack
from .heads import XLMRobertaForMaskedLM
from .ops import EAGER, Check, checked, compare

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
    packed = pack(ids, model.device)
    padded = {k: v.to(model.device) for k, v in tokenizer.pad({"input_ids": ids}, return_tensors="pt").items()}
    checks: list[Check] = []
    watched, eager = copy.deepcopy(model), copy.deepcopy(model)
    watched.ops, eager.ops = checked(model.ops, checks), EAGER
    exact = copy.deepcopy(eager).double()
    outputs = [_outputs(one, packed, padded) for one in (watched, eager, exact)]
    checks += [compare(name, *(output[name] for output in outputs)) for name in outputs[0]]
    return [
        _verdict(name, [c for c in checks if c.operation == name])
        for name in dict.fromkeys(c.operation for c in checks)
    ]


def _outputs(model: XLMRobertaForMaskedLM, packed: Any, padded: dict[str, Tensor]) -> dict[str, Tensor]:
    rows = torch.arange(0, len(packed.input_ids), 3, device=model.device)
    scores, _ = model.topk_packed(*packed, rows=rows, k=TOP)
    return {
        "model, packed": model.roberta.forward_packed(*packed),
        "model, padded": model.roberta(**padded).last_hidden_state,
        f"top-{TOP} words": scores,
    }


def _verdict(operation: str, checks: list[Check]) -> Verdict:
    worst = max(checks, key=lambda c: c.error / c.bound if c.error == c.error else float("inf"))
    return Verdict(operation, len(checks), worst, all(c.right for c in checks))
