"""The calls that stand for each entry of the kernels' tables when it is tuned, at the shapes of XLM-R base.

All calls of an entry are checked, and the time of the entry is the sum of what they launch with it. Row-wise kernels
have tables by the width of a row: the widths are those of the family's models where it has any.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from xlmr.ops import gradients
from xlmr.varlen import Sequences

from . import sweep
from .tables import Entry

N, HEADS, EPS = 768, 12, 1e-5
TOKENS = 8192
WORDS = 250002
SOME_WORDS = 16384  # of the vocabulary: several chunks of dz; of the word embeddings: more than a cache holds
ROWS = {"text": 40, "small": 256, "medium": 2048, "large": TOKENS, "unaligned": 1024}  # of linear's loads
WIDTHS = {512: 384, 1024: N, 4096: 2560, "wide": 10000}  # what a bucket of rows stands for, if not its largest
ELEMENTS = 1 << 24  # of the rows of LayerNorm

New = Callable[..., Tensor]  # random values of a shape


def calls(entry: Entry, device: torch.device) -> list[partial[Any]]:
    """Calls of public functions, or of their forward and backward, that launch kernels with the entry."""
    new = partial(torch.randn, dtype=sweep.DTYPES[entry.dtype], device=device)
    return LOADS[entry.file](entry, new)


def _call(backward: bool, function: Callable[..., Any], *args: Any) -> partial[Any]:
    return partial(gradients, function, args) if backward else partial(function, *args)


def _attention(entry: Entry, new: New) -> list[partial[Any]]:
    backward = entry.table == "BACKWARD_CONFIGS"
    head_dim = next(part for part in entry.parts if part in (64, 128))
    length = 64 if "short" in entry.parts else 512
    q, k, v = new(TOKENS, 3, HEADS, head_dim).unbind(1)
    ends = torch.arange(TOKENS // length + 1, dtype=torch.int32, device=q.device) * length
    dropout = 0.1 if backward or "dropout" in entry.parts else 0.0
    settings = Sequences.packed(ends, length), head_dim**-0.5, False, dropout
    return [_call(backward, entry.module.attention, q, k, v, *settings)]


def _layer(new: New, T: int, K: int) -> tuple[Tensor, Callable[[int, int], Tensor]]:
    """Input rows [T, K], and a maker of weights that keep their scale."""
    return new(T, K), lambda rows, columns: new(rows, columns).mul_(columns**-0.5)


def _linear(entry: Entry, new: New) -> list[partial[Any]]:
    load, kernel = entry.parts[-1], entry.module
    K = 770 if load == "unaligned" else N
    x, weight = _layer(new, ROWS[load], K)
    parameters = *(weight(K, K) for _ in range(3)), *(new(K) for _ in range(3))
    return [
        _call(False, kernel.linear_act, x, weight(4 * K, K), new(4 * K)),
        _call(False, kernel.qkv_projection, x, *parameters),
    ]


def _products(entry: Entry, new: New) -> list[partial[Any]]:
    from xlmr.kernels.linear import linear

    K = 770 if entry.parts[-1] == "unaligned" else N
    x, weight = _layer(new, TOKENS, K)
    wide = new(TOKENS, 4 * K)
    return [_call(True, linear, x, weight(4 * K, K), None), _call(True, linear, wide, weight(K, 4 * K), None)]


def _vocab_softmax(entry: Entry, new: New) -> list[partial[Any]]:
    kernel, backward, load = entry.module, entry.table == "DZ_CONFIGS", entry.parts[-1]
    T, words = {"few": 64, "some": 128}.get(load, 1024), SOME_WORDS if backward else WORDS
    x, weight = _layer(new, T, N)
    head = x, weight(words, N), new(words)
    loss = _call(backward, kernel.vocab_cross_entropy, *head, torch.randint(words, (T,), device=x.device))
    return [loss] if backward or load == "many" else [_call(False, kernel.vocab_topk, *head, 5), loss]


def _rows(entry: Entry) -> tuple[bool, int, int]:
    """Whether backward is wanted, the number of rows and their width."""
    width = WIDTHS.get(entry.bucket, entry.bucket)
    return entry.table == "BACKWARD_CONFIGS", ELEMENTS // width, width


def _layer_norm(entry: Entry, new: New) -> list[partial[Any]]:
    backward, T, width = _rows(entry)
    kernel, affine = entry.module, (new(width), new(width), EPS)
    return [
        _call(backward, kernel.add_layer_norm, new(T, width), new(T, width), *affine),
        _call(backward, kernel.gelu_layer_norm, new(T, width), *affine),
    ]


def _embedding(entry: Entry, new: New) -> list[partial[Any]]:
    backward, T, width = _rows(entry)
    affine = new(width), new(width), EPS, 1
    words = torch.randint(2, SOME_WORDS, (T,), device=affine[0].device)
    positions = torch.arange(T, device=words.device) % 512 + 2
    table = new(SOME_WORDS, width), new(1, width), new(514, width)
    return [_call(backward, entry.module.embed, words, torch.zeros_like(words), positions, *table, *affine)]


LOADS: dict[str, Callable[[Entry, New], list[partial[Any]]]] = {
    "attention": _attention,
    "embedding": _embedding,
    "layer_norm": _layer_norm,
    "linear": _linear,
    "_products": _products,
    "vocab_softmax": _vocab_softmax,
}
