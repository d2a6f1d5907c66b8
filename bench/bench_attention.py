"""Attention, of equal and of mixed lengths, against torch's best: `python -m bench.bench_attention`.

Packed providers compute the real tokens only; those that need a rectangle pad mixed lengths and mask, which is what
they cost. Equal lengths are a rectangle as they lie.
"""

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from xlmr.kernels.attention import cost
from xlmr.varlen import Sequences

from . import sweep
from .harness import Case
from .shapes import lengths

HEADS, HEAD_DIM = 12, 64
TOKENS = 16384 if sweep.GPU else 1024  # of the padded batch
LENGTHS = (128, 512, 1024, 2048, 4096, 8192) if sweep.GPU else (128, 512)
FILL = 0.4  # of the batches of mixed lengths


@functools.lru_cache(maxsize=1)  # what a model knows once a forward
def rectangle(sequences: Sequences) -> tuple[Tensor, Tensor]:
    """Where the rows stand in the padded batch, int64 [T], and which of its positions are theirs, [B, S]."""
    real = torch.arange(sequences.max_q, device=sequences.q_lens.device) < sequences.q_lens[:, None]
    return real.flatten().nonzero().squeeze(1), real


@functools.lru_cache(maxsize=1)
def bounds(sequences: Sequences) -> Tensor:
    """cu_seqlens, int32 [B + 1]."""
    return F.pad(sequences.q_lens.cumsum(0, dtype=torch.int32), (1, 0))


def padded(backend: SDPBackend | None) -> Callable[..., Tensor]:
    """scaled_dot_product_attention on the padded rectangle, forced to a backend or as torch chooses."""

    def attention(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float) -> Tensor:
        indices, real = rectangle(sequences)
        full = len(indices) == real.numel()
        rows = [t if full else t.new_zeros(real.numel(), *t.shape[1:]).index_copy(0, indices, t) for t in (q, k, v)]
        rows = [t.unflatten(0, real.shape).transpose(1, 2) for t in rows]
        with sdpa_kernel(list(SDPBackend.__members__.values()) if backend is None else backend):
            out = F.scaled_dot_product_attention(*rows, attn_mask=None if full else real[:, None, None], scale=scale)
        out = out.transpose(1, 2).flatten(0, 1)
        return out if full else out[indices]

    return attention


def varlen(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    ends = bounds(sequences)
    return varlen_attn(q, k, v, ends, ends, sequences.max_q, sequences.max_k, scale=scale)


WAYS = {"torch sdpa, padded": padded(None)}
if sweep.GPU:
    WAYS |= {
        "torch flash, padded": padded(SDPBackend.FLASH_ATTENTION),
        "torch cuDNN, padded": padded(SDPBackend.CUDNN_ATTENTION),
        "torch varlen_attn": varlen,
    }


def case(dtype: str, longest: int, mixed: bool) -> Case:
    texts = max(1, TOKENS // longest)
    lens = lengths(texts, longest, FILL) if mixed else [longest] * texts
    ends = torch.tensor([0, *lens], device=sweep.DEVICE).cumsum(0)
    sequences = Sequences.packed(ends, max(lens))
    randn = sweep.tensors(dtype)

    def inputs() -> tuple[Any, ...]:
        return *randn(3, sum(lens), HEADS, HEAD_DIM).unbind(), sequences, HEAD_DIM**-0.5

    def costs(backward: bool) -> tuple[int, int]:
        return cost(lens, lens, HEADS, HEAD_DIM, sweep.DTYPES[dtype].itemsize, backward=backward)

    return Case(
        "attention", "attention", "S", "longest sequence", longest, inputs, sweep.providers("attention", WAYS), costs,
        wanted=(0, 1, 2), settings={"dtype": dtype, "lengths": "mixed" if mixed else "equal", "tokens": sum(lens)},
    )  # fmt: skip


def cases(dtype: str) -> Iterable[Case]:
    return (case(dtype, longest, mixed) for mixed in (False, True) for longest in LENGTHS)


if __name__ == "__main__":
    sys.exit(sweep.main("bench_attention", __doc__, cases))
