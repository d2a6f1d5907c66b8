"""From token ids to vectors and scores: packed batches of so many tokens, longest first; poolings; logits.

Packing happens on the host, from the lengths the tokenizer gives, so no forward waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import integer
from .checkpoint import to_device
from .model import XLMRobertaModel

POOLINGS = ("mean", "cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")  # sentence-transformers' names
BATCH_TOKENS = 8192
CPU_BATCH_BYTES = 2**24


class Packed(NamedTuple):
    """The arguments of a model's `forward_packed`."""

    input_ids: Tensor  # int64 [T]
    cu_seqlens: Tensor  # int32 [B + 1]
    max_seqlen: int


def pack(sequences: Sequence[Sequence[int]], device: torch.device) -> Packed:
    """Sequences of token ids, at least one, laid one after the other."""
    lengths = [len(ids) for ids in sequences]
    input_ids = torch.tensor([token for ids in sequences for token in ids], dtype=torch.long)
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Packed(input_ids.to(device, non_blocking=True), cu_seqlens.to(device, non_blocking=True), max(lengths))


def batches(lengths: Sequence[int], batch_tokens: int, batch_size: int | None = None) -> Iterator[list[int]]:
    """The indices of `lengths`, longest first, in batches of at most `batch_tokens` tokens and `batch_size` sequences.

    A sequence longer than `batch_tokens` is a batch of its own. Attention runs fastest on batches of like lengths.
    """
    for name, value in (("batch_tokens", batch_tokens), ("batch_size", batch_size)):
        if value is not None:
            integer(name, value, least=1)
    batch: list[int] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (tokens + lengths[index] > batch_tokens or len(batch) == batch_size):
            yield batch
            batch, tokens = [], 0
        batch.append(index)
        tokens += lengths[index]
    if batch:
        yield batch


def tokens_at_once(batch_tokens: int | None, model: Any) -> int:
    """The tokens of a batch: `batch_tokens`, by default 8,192. On a CPU fewer where queries, keys and values would take
    more than 16 MiB together (at width 384 in fp32 that are 3,640 tokens): glibc takes blocks above 32 MiB from the
    system anew each time, page by page."""
    if batch_tokens is not None:
        return batch_tokens
    if model.device.type != "cpu":
        return BATCH_TOKENS
    return min(BATCH_TOKENS, max(1, CPU_BATCH_BYTES // (3 * model.config.hidden_size * model.dtype.itemsize)))


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def check_pooling(pooling: str | Sequence[str]) -> tuple[str, ...]:
    """The modes that `pooling` names; ValueError for an unknown one, or none."""
    modes = (pooling,) if isinstance(pooling, str) else tuple(pooling)
    for mode in modes or ("nothing",):
        if mode not in POOLINGS:
            raise ValueError(f"pooling is {mode!r}: allowed are {', '.join(map(repr, POOLINGS))}")
    return modes


def base_of(model: Any) -> XLMRobertaModel:
    """The base model in a model, also where peft or torch.compile has wrapped it; TypeError for what has none."""
    base = model
    while not isinstance(base, XLMRobertaModel):
        base, outer = getattr(base, "base_model", None), base
        if base is None or base is outer:
            kind = type(model).__name__
            raise TypeError(f"the model is a {kind}: one of xlmr's is needed, which xlmr.load and from_pretrained give")
    return base


def check_eval(model: Any) -> None:
    if model.training:
        raise ValueError("the model is in training mode, so dropout would change the result: call model.eval() first")


def longest(model: Any, tokenizer: Any) -> int:
    """The tokens that a text is truncated to: what the model has positions for, or less where the tokenizer says so."""
    return min(model.base_model.tables.longest, tokenizer.model_max_length)


def check_length(max_length: int | None, most: int, least: int = 2) -> int:
    """`max_length`, by default `most`; ValueError for fewer than `least` tokens, or more than `most`."""
    if max_length is None:
        return most
    if not least <= integer("max_length", max_length) <= most:
        raise ValueError(f"max_length is {max_length}: allowed are {least} to {most} tokens with this model")
    return max_length


def choose_device(device: int | str | torch.device | None) -> torch.device:
    """By default a GPU where there is one; else as checkpoint.to_device."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return to_device(device)


def first_logits(model: Any, packed: Packed) -> Tensor:
    """The logits [B, labels] of a ForSequenceClassification: of the last layer only the first tokens are computed."""
    first = model.base_model.forward_packed(*packed, rows=rows_read(packed, ["cls"]))
    return model.classifier(first[:, None])


def rows_read(packed: Packed, modes: Sequence[str]) -> Tensor | None:
    """The rows of the last layer that a pooling reads, where that is one a text: sorted int64 [B]; else None."""
    if list(modes) == ["cls"]:
        return packed.cu_seqlens[:-1].long()
    return packed.cu_seqlens[1:].long() - 1 if list(modes) == ["lasttoken"] else None


def pool(x: Tensor, packed: Packed, modes: Sequence[str], skip: int = 0) -> Tensor:
    """One vector a text from the last layer, [T, N] or only its `rows_read` → [B, len(modes)·N], fp32 or more.

    As sentence-transformers' Pooling: "cls", the first token; "lasttoken"; "max"; "mean"; "mean_sqrt_len_tokens", the
    sum over √n; "weightedmean", token i weighing i. The first `skip` tokens of each text, a prompt, are left out (they
    count in i); a text that has no others keeps its last one.
    """
    x = x.to(at_least_fp32(x.dtype))
    if len(modes) == 1 and len(x) == packed.cu_seqlens.numel() - 1:
        return x
    starts, lens = packed.cu_seqlens[:-1].long(), packed.cu_seqlens.diff().long()
    left_out = (lens - 1).clamp(max=skip)
    sections = torch.stack([left_out, lens - left_out], dim=1).flatten()  # of each text what is left out, what is kept
    kept = (lens - left_out).to(x.dtype)[:, None]

    def reduce(values: Tensor, how: str) -> Tensor:
        return torch.segment_reduce(values, how, lengths=sections, axis=0, unsafe=True)[1::2]  # unsafe: unchecked

    def weighted() -> Tensor:
        first = starts.repeat_interleave(lens, output_size=len(x))
        weight = (torch.arange(1, len(x) + 1, device=x.device) - first).to(x.dtype)[:, None]
        return reduce(x * weight, "sum") / reduce(weight, "sum")

    found = {
        "cls": lambda: x[starts + left_out],
        "lasttoken": lambda: x[starts + lens - 1],
        "max": lambda: reduce(x, "max"),
        "mean": lambda: reduce(x, "sum") / kept,
        "mean_sqrt_len_tokens": lambda: reduce(x, "sum") / kept.sqrt(),
        "weightedmean": weighted,
    }
    return torch.cat([found[mode]() for mode in modes], dim=1)
