"""What the compile gate compiles: the kernels' public functions, and their backward, at the shapes of XLM-R.

Every case costs time: it is here for a configuration, a dtype or a branch.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from xlmr.ops import gradients
from xlmr.varlen import Sequences

Case = tuple[str, Callable[[], object]]  # a name, and a call of a public function
Empty = Callable[..., Tensor]  # (dtype's name, *shape)

MODELS = {"base": (768, 3072), "large": (1024, 4096)}  # hidden and intermediate units
# Rows: one text … a full batch: every load of the tables, and "medium" by pointers and by descriptors.
LOADS = (("base", 40), ("base", 1024), ("base", 2560), ("large", 8192))
OTHER_WIDTHS = (96, 256, 384, 2048, 4096, 10000)  # what else the row-wise kernels have configurations for
VOCABULARY = 250002
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DROPOUT = 0.1


def cases(kernels: Mapping[str, ModuleType]) -> list[Case]:
    """Those of the modules, by name. All tensors of floats are views of one memory, reserved and never touched."""
    memory = torch.empty(VOCABULARY * 1024 * 4, dtype=torch.uint8)

    def empty(dtype: str, *shape: int) -> Tensor:
        return memory[: math.prod(shape) * DTYPES[dtype].itemsize].view(DTYPES[dtype]).view(shape)

    return [case for name, kernel in kernels.items() for case in KERNELS[name](kernel, empty)]


def _trained(name: str, call: partial[Any]) -> Iterator[Case]:
    """The call without gradients, and its forward and backward."""
    yield name, call
    yield f"{name}, gradients", _step(call)


def _step(call: partial[Any]) -> partial[Any]:
    """Forward and backward of a call."""
    return partial(gradients, call.func, call.args)


def _layer_norm(kernel: ModuleType, empty: Empty) -> Iterator[Case]:
    def add(name: str, weight: str, N: int, *dropout: float) -> partial[Any]:
        x, vector = empty(name, 512, N), empty(weight, N)
        return partial(kernel.add_layer_norm, x, x, vector, vector, 1e-5, *dropout)

    def gelu(name: str, N: int) -> partial[Any]:
        return partial(kernel.gelu_layer_norm, empty(name, 512, N), empty(name, N), empty(name, N), 1e-5)

    for dtype, N in (("bf16", 768), ("fp32", 1024)):
        yield from _trained(f"add_layer_norm {dtype} {N}", add(dtype, dtype, N))
        yield from _trained(f"gelu_layer_norm {dtype} {N}", gelu(dtype, N))
    for N in OTHER_WIDTHS:
        yield f"add_layer_norm fp32 {N}, dropout", _step(add("fp32", "fp32", N, DROPOUT))
    yield "gelu_layer_norm fp32 10000", _step(gelu("fp32", 10000))
    yield "add_layer_norm bf16 768, fp32 weights", _step(add("bf16", "fp32", 768))  # autocast
    yield "add_layer_norm fp16 768", add("fp16", "fp16", 768)


def _embedding(kernel: ModuleType, empty: Empty) -> Iterator[Case]:
    def embed(dtype: str, N: int, *dropout: float) -> partial[Any]:
        ids, vector = torch.zeros(512, dtype=torch.int64), empty(dtype, N)
        tables = [empty(dtype, rows, N) for rows in (514, 1, 514)]
        return partial(kernel.embed, ids, ids, ids, *tables, vector, vector, 1e-5, 1, *dropout)

    for dtype, N in (("bf16", 768), ("fp32", 1024)):
        yield from _trained(f"embed {dtype} {N}", embed(dtype, N))
    for N in OTHER_WIDTHS:
        yield f"embed fp32 {N}, dropout", _step(embed("fp32", N, DROPOUT))
    yield "embed fp16 768", embed("fp16", 768)


def _linear(kernel: ModuleType, empty: Empty) -> Iterator[Case]:
    for dtype, (model, T) in itertools.product(("bf16", "fp32"), LOADS):
        new, (N, F) = partial(empty, dtype), MODELS[model]
        label, x = f"{dtype} {model} {T} rows", new(T, N)
        yield f"qkv_projection {label}", partial(kernel.qkv_projection, x, *[new(N, N)] * 3, *[new(N)] * 3)
        yield f"linear_act {label}", partial(kernel.linear_act, x, new(F, N), new(F))  # linear needs less: no GELU
    for dtype in ("bf16", "fp32"):  # what no tensor descriptor can express: few columns, rows at odd addresses
        x = empty(dtype, 1024, 768)
        yield f"linear {dtype} to 3", partial(kernel.linear, x, empty(dtype, 3, 768), None)
        narrow = empty(dtype, 2560, 384), empty(dtype, 384, 384), empty(dtype, 384)
        yield f"linear {dtype} from 384", partial(kernel.linear, *narrow)  # by descriptors, and yet "small"
        odd = empty(dtype, 1024, 770), empty(dtype, 768, 770), empty(dtype, 768)
        yield f"linear {dtype} from 770", partial(kernel.linear, *odd)
    for dtype in ("bf16", "fp32"):
        x, w, b = (empty(dtype, *shape) for shape in ((1024, 768), (768, 768), (768,)))
        yield f"qkv_projection {dtype}, gradients", _step(partial(kernel.qkv_projection, x, w, w, w, b, b, b))
        yield f"linear_act {dtype}, gradients", _step(partial(kernel.linear_act, x, w, b))
        odd = empty(dtype, 1024, 770), empty(dtype, 770, 770), empty(dtype, 770)
        yield f"linear {dtype} from 770, gradients", _step(partial(kernel.linear, *odd))
    yield "linear fp16", partial(kernel.linear, *(empty("fp16", *shape) for shape in ((1024, 768), (768, 768), (768,))))


def _attention(kernel: ModuleType, empty: Empty) -> Iterator[Case]:
    texts = 4

    def attention(dtype: str, queries: int, keys: int, D: int, causal: bool, dropout: float) -> partial[Any]:
        q, k, v = empty(dtype, texts * keys, 3, 12, D).unbind(1)
        sequences = Sequences.packed(torch.arange(texts + 1, dtype=torch.int32) * keys, keys)
        if queries < keys:  # the last layer of a classifier
            sequences, q = sequences.with_queries(torch.arange(texts) * keys), empty(dtype, texts, 12, D)
        return partial(kernel.attention, q, k, v, sequences, D**-0.5, causal, dropout)

    for dtype, D in itertools.product(("bf16", "fp32"), (64, 80)):
        for queries, keys in ((1, 512), (512, 512)):
            yield f"attention {dtype} {queries}×{keys} head_dim {D}", attention(dtype, queries, keys, D, False, 0.0)
        for queries, causal, dropout in ((512, False, 0.0), (64, False, DROPOUT), (64, True, DROPOUT))[2 * (D > 64) :]:
            label = f"attention {dtype} head_dim {D}{', causal' * causal}{', dropout' * (dropout > 0)}, gradients"
            yield label, _step(attention(dtype, queries, queries, D, causal, dropout))
    yield "attention fp16", attention("fp16", 512, 512, 64, False, 0.0)


def _vocab_softmax(kernel: ModuleType, empty: Empty) -> Iterator[Case]:
    for dtype, (model, T) in itertools.product(("bf16", "fp32"), (("base", 40), ("large", 128), ("large", 1024))):
        N = MODELS[model][0]
        label = f"{dtype} {model} {T} rows"
        head = (empty(dtype, T, N), empty(dtype, VOCABULARY, N), empty(dtype, VOCABULARY))
        yield f"vocab_topk {label}", partial(kernel.vocab_topk, *head, 5)
        labels = torch.zeros(T, dtype=torch.int64)
        yield f"vocab_cross_entropy {label}", partial(kernel.vocab_cross_entropy, *head, labels)
        if (dtype, model) == ("bf16", "base"):
            yield f"vocab_topk {label}, k = 50", partial(kernel.vocab_topk, *head, 50)
            yield f"vocab_topk {label}, 100 targets", partial(kernel.vocab_topk, *head, 5, torch.arange(100))
        if (dtype, model) == ("bf16", "large"):
            yield f"vocab_topk {label}, k = 50", partial(kernel.vocab_topk, *head, 50)
            yield f"vocab_topk {label}, 10 of 100 targets", partial(kernel.vocab_topk, *head, 10, torch.arange(100))
    for dtype in ("bf16", "fp32"):
        V = kernel.words_at_once(1024, "chunked") + 18  # one whole chunk of words, and a last one of odd length
        head = empty(dtype, 1024, 768), empty(dtype, V, 768), empty(dtype, V)
        loss = partial(kernel.vocab_cross_entropy, label_smoothing=0.1)
        yield f"vocab_cross_entropy {dtype}, gradients", partial(gradients, loss, (*head, torch.zeros(1024).long()))
    head = (empty("fp16", 40, 768), empty("fp16", VOCABULARY, 768), empty("fp16", VOCABULARY))
    yield "vocab_topk fp16", partial(kernel.vocab_topk, *head, 5)


KERNELS = {
    "attention": _attention,
    "embedding": _embedding,
    "layer_norm": _layer_norm,
    "linear": _linear,
    "vocab_softmax": _vocab_softmax,
}
