"""Attention, of equal and of mixed lengths, against torch's best: `python -m bench.bench_attention`.

Packed providers compute the real tokens only; those that need a rectangle pad mixed lengths and mask, which is what
they cost. Equal lengths are a rectangle as they lie.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from xlmr.kernels.attention import cost
from xlmr.varlen import Sequences

from . import sweep
from .command import exit_with
from .harness import Case
from .shapes import lengths

HEADS = {384: (12, 32), 768: (12, 64), 1024: (16, 64), 2560: (32, 80)}  # number and size in the models of each width
TOKENS = 16384 if sweep.GPU else 1024  # of the padded batch
LENGTHS = (128, 512, 1024, 2048, 4096, 8192) if sweep.GPU else (128, 512)
LENGTH = 512 if sweep.GPU else 128  # what stands still while the width is swept
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


def case(dtype: str, longest: int, mixed: bool, N: int = sweep.WIDTH, swept: str = "S") -> Case:
    """One point of a sweep over "S", the longest sequence, or over "N", the model's width."""
    heads, head_dim = HEADS[N]
    texts = max(1, TOKENS // longest)
    lens = lengths(texts, longest, FILL) if mixed else [longest] * texts
    ends = torch.tensor([0, *lens], device=sweep.DEVICE).cumsum(0)
    sequences = Sequences.packed(ends, max(lens))
    randn = sweep.tensors(dtype)

    def inputs() -> tuple[Any, ...]:
        return *randn(3, sum(lens), heads, head_dim).unbind(), sequences, head_dim**-0.5

    def costs(backward: bool) -> tuple[int, int]:
        return cost(lens, lens, heads, head_dim, sweep.DTYPES[dtype].itemsize, backward=backward)

    x = ("S", "longest sequence", longest) if swept == "S" else ("N", "hidden units", N)
    rest = {"N": N} if swept == "S" else {"S": longest}
    return Case(
        "attention", "attention", *x, inputs, sweep.providers("attention", WAYS), costs, wanted=(0, 1, 2),
        settings={"dtype": dtype, "lengths": "mixed" if mixed else "equal", "tokens": sum(lens), **rest,
                  "heads": heads, "head_dim": head_dim},
    )  # fmt: skip


def cases(dtype: str) -> Iterable[Case]:
    over_lengths = [case(dtype, longest, mixed) for mixed in (False, True) for longest in LENGTHS]
    return over_lengths + [case(dtype, LENGTH, False, N, swept="N") for N in sweep.WIDTHS]


if __name__ == "__main__":
    exit_with(sweep.main, "bench_attention", __doc__, cases)
