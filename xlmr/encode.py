"""Texts to vectors: tokenised, sorted by length, packed into batches of so many tokens, pooled, put back in order.

Packing happens on the host, from the lengths the tokenizer gives, so no forward waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .pretrained import XLMRobertaPreTrainedModel
from .tokenizer import XLMRobertaTokenizer

POOLINGS = ("mean", "cls")
BATCH_TOKENS = 8192


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
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}: at least 1 is needed")
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


@torch.no_grad()
def embed(
    model: XLMRobertaPreTrainedModel,
    tokenizer: XLMRobertaTokenizer,
    texts: Sequence[str],
    *,
    pooling: str = "mean",
    normalize: bool = True,
    batch_tokens: int = BATCH_TOKENS,
    max_length: int | None = None,
    progress: bool = False,
) -> Tensor:
    """One vector per text: fp32 (fp64 for a float64 model) [len(texts), N], on the CPU, in the order of `texts`.

    pooling: "mean" of the last layer over all tokens of a text, or "cls", the last layer of its first token.
    normalize: divide by the Euclidean length. max_length: tokens a text is truncated to (the model's limit by default).
    progress: a bar on standard error. The vector of a text does not depend on the other texts. Raises ValueError for an
    unknown pooling, a wrong max_length, a single string, and a model in training mode, whose dropout is random.
    """
    if isinstance(texts, str):
        raise ValueError("texts is a single string: pass a list of strings")
    if pooling not in POOLINGS:
        raise ValueError(f"pooling is {pooling!r}: allowed are {', '.join(map(repr, POOLINGS))}")
    if model.training:
        raise ValueError("the model is in training mode, so dropout would change the vectors: call model.eval() first")
    base: Any = model.base_model
    longest = min(base.config.max_length, tokenizer.model_max_length)
    if max_length is not None and not 2 <= max_length <= longest:
        raise ValueError(f"max_length is {max_length}: allowed are 2 to {longest} tokens with this model")
    ids = tokenizer(list(texts), truncation=True, max_length=max_length or longest)["input_ids"] if texts else []
    out = torch.empty(len(ids), base.config.hidden_size, dtype=torch.promote_types(base.dtype, torch.float32))
    loop: Iterable[list[int]] = list(batches([len(one) for one in ids], batch_tokens))
    if progress:
        from tqdm import tqdm

        loop = tqdm(loop, unit="batch")
    for batch in loop:
        pooled = _pool(base, pack([ids[i] for i in batch], base.device), pooling).to(out.dtype)
        out[batch] = (F.normalize(pooled) if normalize else pooled).to(out.device)
    return out


def _pool(base: Any, packed: Packed, pooling: str) -> Tensor:
    """[B, N]: for "cls" the last layer is computed for the first rows alone."""
    if pooling == "cls":
        return base.forward_packed(*packed, rows=packed.cu_seqlens[:-1].long())
    x = base.forward_packed(*packed)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.segment_reduce(x, "mean", lengths=packed.cu_seqlens.diff().long(), axis=0)
