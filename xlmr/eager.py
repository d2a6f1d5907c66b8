"""Every operation in plain PyTorch: the product's path on a CPU, and the judge of every kernel.

T tokens (rows), N hidden units, H heads, D units a head, V words. A linear layer's weight is [out, in], as in torch.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

ROWS = 512  # that a CPU takes at once where no row sees another; measured


def embed(
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word: Tensor,
    token_type: Tensor,
    position: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    padding_idx: int,
    dropout_p: float = 0.0,
    pad_positions: bool = True,
) -> Tensor:
    """dropout(LayerNorm(word[input_ids] + token_type[token_type_ids] + position[position_ids])) → [T, N].

    Ids are integers [T]; tables [rows, N]. The row `padding_idx` of `word` and, with pad_positions, of `position` gets
    no gradient.
    """
    x = F.embedding(input_ids, word, padding_idx) + F.embedding(token_type_ids, token_type)
    x = x + F.embedding(position_ids, position, padding_idx if pad_positions else None)
    return F.dropout(F.layer_norm(x, weight.shape, weight, bias, eps), dropout_p)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x · weightᵀ + bias, [T, in] → [T, out]."""
    if _large(x, weight) and onednn_takes(x, weight, bias):
        return onednn_linear(x, weight, bias, "none")
    return F.linear(x, weight, bias)


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, act: str = "gelu") -> Tensor:
    """gelu(x · weightᵀ + bias) with the exact, erf form of GELU (Hendrycks & Gimpel, 2016); [T, in] → [T, out]."""
    if act != "gelu":
        raise ValueError(f"linear_act fuses 'gelu' only, not {act!r}: apply that activation to linear's result")
    if _large(x, weight) and onednn_takes(x, weight, bias):
        return onednn_linear(x, weight, bias, "gelu")
    return F.gelu(F.linear(x, weight, bias))


def qkv_projection(
    x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, bq: Tensor | None, bk: Tensor | None, bv: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (unscaled), keys and values of x [T, N]: three [T, H·D] tensors, which may be views of one buffer."""
    return linear(x, wq, bq), linear(x, wk, bk), linear(x, wv, bv)


def attention(
    q: Tensor, k: Tensor, v: Tensor, sequences: Any, softmax_scale: float, causal: bool = False, dropout_p: float = 0.0
) -> Tensor:
    """softmax(q · kᵀ · softmax_scale) · v within each sequence; q [Tq, H, D], k and v [Tk, H, D] → [Tq, H, D].

    `sequences` (xlmr.varlen.Sequences) says which rows of q and of k, v each sequence owns. With `causal` the last
    query of a sequence sees its last key. A query that sees no key gets zeros.
    """
    sequences.check(len(q), len(k))
    outputs = []
    owned = [_spans(q, [(start, count * length) for count, start, length, _, _ in sequences.runs])]
    owned += [_spans(t, [(start, count * length) for count, _, _, start, length in sequences.runs]) for t in (k, v)]
    for (count, _, q_len, _, k_len), *rows in zip(sequences.runs, *owned, strict=True):
        queries, keys, values = (
            t.unflatten(0, (count, length)).transpose(1, 2)
            for t, length in zip(rows, (q_len, k_len, k_len), strict=True)
        )
        if k_len == 0:
            out = torch.zeros_like(queries)
        elif causal and 1 < q_len != k_len:
            sees = torch.ones(q_len, k_len, dtype=torch.bool, device=q.device).tril(k_len - q_len)
            out = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=sees, dropout_p=dropout_p, scale=softmax_scale
            )
        else:
            out = F.scaled_dot_product_attention(
                queries, keys, values, dropout_p=dropout_p, is_causal=causal and q_len > 1, scale=softmax_scale
            )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs) if outputs else torch.zeros_like(q)


def _spans(t: Tensor, spans: list[tuple[int, int]]) -> tuple[Tensor, ...]:
    """t[start : start + length] of each, in ascending order; in one split, for the gradient of a slice is as large as
    t."""
    if spans == [(0, len(t))]:
        return (t,)
    bounds = [0, *(bound for start, length in spans for bound in (start, start + length)), len(t)]
    return t.split([end - start for start, end in itertools.pairwise(bounds)])[1::2]


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, softmax_scale: float, dropout_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Attention through the whole matrix of weights, for what no kernel computes: per-query masks, and the weights
    themselves. q [B, H, Q, D], k and v [B, H, K, D], additive `mask` broadcastable to [B, H, Q, K]
    → output [B, H, Q, D] and weights (after dropout, as in the reference) [B, H, Q, K]."""
    scores, device = q @ k.transpose(-1, -2) * softmax_scale, q.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))  # as autocast does for softmax on a GPU
    lowest = torch.finfo(scores.dtype).min / 2  # half of it, so that no score added to it overflows
    mask = mask.to(torch.promote_types(mask.dtype, scores.dtype)).clamp(min=lowest)
    weights = F.dropout(torch.softmax(scores + mask.to(scores.dtype), dim=-1), dropout_p)
    return weights.to(v.dtype) @ v, weights


def in_chunks(operations: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`operations`, a chain of position-wise ones, on the rows x [T, N]. On a CPU, without gradients, ROWS at a time:
    the widest temporary then stays in cache, and is no fresh memory. Else on all at once; so also where a graph is
    recorded, which would keep the number of chunks."""
    # The graph first: len would fix its number of rows.
    if _recorded() or len(x) <= ROWS or x.device.type != "cpu" or (torch.is_grad_enabled() and x.requires_grad):
        return operations(x)
    return torch.cat([operations(chunk) for chunk in x.split(ROWS)])


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout_p: float = 0.0
) -> Tensor:
    """LayerNorm(dropout(x) + residual); x and residual [T, N], weight and bias [N] → [T, N]."""
    x = F.dropout(x, dropout_p) + residual if dropout_p else x + residual
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def gelu_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm(gelu(x)) with the exact GELU; x [T, N] → [T, N]. The transform of the language-model head."""
    return F.layer_norm(F.gelu(x), weight.shape, weight, bias, eps)


def vocab_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    backward: str = "chunked",
) -> Tensor:
    """Cross entropy of softmax(x · weightᵀ + bias) against `labels` [T], with the settings of F.cross_entropy, plus
    z_loss · lse² for each label (Chowdhery et al., 2022: keeps the softmax's normaliser near 1).

    x [T, N], weight [V, N] → fp32 (or fp64), a scalar or with reduction="none" [T]. Only the rows whose label is not
    `ignore_index` are multiplied; where there is none the mean is NaN, as in torch. A label that is no word raises
    IndexError on a CPU and gives NaN elsewhere. Logits never stand in memory, in
    forward and backward, but for those of a few words at a time: `backward` "chunked" takes more, "recompute" fewer.
    """
    choices = {"reduction": (reduction, ("mean", "sum", "none")), "backward": (backward, tuple(WORDS))}
    for name, (given, allowed) in choices.items():
        if given not in allowed:
            raise ValueError(f"{name} is {given!r}: allowed are {', '.join(map(repr, allowed))}")
    if not (0.0 <= label_smoothing <= 1.0 and z_loss >= 0.0):
        raise ValueError(f"label_smoothing is {label_smoothing} and z_loss {z_loss}: allowed are 0 to 1, and 0 or more")
    if labels.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"labels has dtype {labels.dtype}: give torch.int64 or torch.int32")
    labelled = labels != ignore_index
    if labels.device.type == "cpu" and bool((labelled & ((labels < 0) | (labels >= len(weight)))).any()):
        raise IndexError(f"labels other than {ignore_index} must be words, 0 to {len(weight) - 1}: {labels}")
    x, labels = x[labelled], labels[labelled]
    words = max(1, min(WORDS[backward], LOGITS // max(len(x), 1)))
    losses = _vocab_losses(x, weight, bias, labels, label_smoothing, z_loss, words)
    if reduction == "none":
        return losses.new_zeros(labelled.shape).masked_scatter(labelled, losses)
    return losses.sum() if reduction == "sum" else losses.mean()


WORDS = {"chunked": 2048, "recompute": 256}  # whose logits vocab_cross_entropy has in memory at a time
LOGITS = 2**23  # at most so many: of more than 4,096 rows fewer words are taken


def _vocab_losses(x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    device = x.device.type
    computed_in = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if torch.compiler.is_compiling():  # the loop over the vocabulary is more than a hundred times the same graph
        torch._dynamo.graph_break()
    return _VocabCrossEntropy.apply(x, weight, bias, computed_in, *arguments)


class _VocabCrossEntropy(torch.autograd.Function):
    """The losses [T] of rows that all have a label, chunk by chunk of the vocabulary; backward computes them again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, computed_in: torch.dtype, labels: Tensor,
        smoothing: float, z_loss: float, words: int,
    ) -> Tensor:  # fmt: skip
        ctx.settings = computed_in, smoothing, z_loss, words
        exact = torch.promote_types(computed_in, torch.float32)
        lse = torch.full(x.shape[:1], -torch.inf, dtype=exact, device=x.device)
        target = torch.full_like(lse, torch.nan)  # stays where a label is no word
        total = torch.zeros_like(lse)
        for first, _, z in _logits(x, weight, bias, computed_in, words):
            lse = torch.logaddexp(lse, z.logsumexp(1))
            here, place = _in_chunk(labels, first, z.shape[1])
            target[here] = z[here, place]
            if smoothing:
                total += z.sum(1)
            del z  # before the next is made
        ctx.save_for_backward(x, weight, bias, labels, lse)
        return lse - (1 - smoothing) * target - smoothing * total / len(weight) + z_loss * lse**2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight, bias, labels, lse), (computed_in, smoothing, z_loss, words) = ctx.saved_tensors, ctx.settings
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        dx = torch.zeros(x.shape, dtype=lse.dtype, device=x.device) if of_x else None
        dw = torch.empty_like(weight) if of_weight else None
        db = torch.empty_like(bias) if of_bias and bias is not None else None
        rows = x.to(computed_in)
        for first, w, z in _logits(x, weight, bias, computed_in, words):
            dz = z.sub_(lse[:, None]).exp_()
            dz.mul_((1 + 2 * z_loss * lse)[:, None]).sub_(smoothing / len(weight))
            here, place = _in_chunk(labels, first, z.shape[1])
            dz[here, place] -= 1 - smoothing
            dz = dz.mul_(g[:, None]).to(computed_in)
            if dx is not None:
                dx += linear(dz, w.t(), None)
            if dw is not None:
                dw[first : first + words] = linear(dz.t(), rows.t(), None)
            if db is not None:
                db[first : first + words] = dz.sum(0)
            del z, dz
        return None if dx is None else dx.to(x.dtype), dw, db, None, None, None, None, None


def _logits(
    x: Tensor, weight: Tensor, bias: Tensor | None, computed_in: torch.dtype, words: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Of each chunk of the vocabulary the first word, the weights, and the logits in fp32 (or fp64), [T, words]."""
    x = x.to(computed_in)
    for first in range(0, len(weight), words):
        w = weight[first : first + words].to(computed_in)
        b = None if bias is None else bias[first : first + words].to(computed_in)
        yield first, w, linear(x, w, b).to(torch.promote_types(computed_in, torch.float32))


def _in_chunk(labels: Tensor, first: int, words: int) -> tuple[Tensor, Tensor]:
    """Which rows have their label among these words, and where."""
    here = ((labels >= first) & (labels < first + words)).nonzero().squeeze(1)
    return here, labels[here] - first


def vocab_topk(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int, targets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k most probable words of softmax(x · weightᵀ + bias) and their log-probabilities, best first.

    x [T, N], weight [V, N] → log-probabilities [T, k] (fp32 or fp64) and word ids int64 [T, k]. With `targets` [M] only
    those words compete, while the softmax stays that of the whole vocabulary.
    """
    return top_words(linear(x, weight, bias), k, targets)


def top_words(logits: Tensor, k: int, targets: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`vocab_topk` of logits [T, V] that are there."""
    scores = torch.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    if targets is None:
        values, words = scores.topk(k, dim=-1)
        return values, words
    values, indices = scores[:, targets].topk(k, dim=-1)
    return values, targets[indices].long()


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
    """act(x · weightᵀ + bias) by oneDNN itself, `act` "none" or "gelu"; the weight may lie in oneDNN's own blocks."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, act, [], "none")


def onednn_takes(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether oneDNN's own linear may be used: the same numbers as F.linear, in fp32 at up to twice MKL's speed on a
    CPU, with GELU fused. It has no derivatives, ignores autocast and cannot be traced."""
    tensors = [x, *(p for p in parameters if p is not None)]
    return (
        x.device.type == "cpu"
        and x.dtype in ONEDNN_DTYPES
        and not _recorded()
        and forward_ad._current_level < 0
        and all(t.dtype == x.dtype and t.device == x.device for t in tensors)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and not torch.is_autocast_enabled("cpu")
    )


def _large(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN pays for a weight that it has to lay in blocks first. Measured: at width 768 one row is faster
    with F.linear, eight rows with oneDNN."""
    return not _recorded() and x.numel() * len(weight) >= 2**21  # a graph keeps no decision by size


def _recorded() -> bool:
    """Whether torch.compile, torch.export or torch.jit turns this call into a graph."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _onednn_dtypes() -> frozenset[torch.dtype]:
    ops = torch.ops.mkldnn
    if not (torch.backends.mkldnn.is_available() and hasattr(ops, "_linear_pointwise")):
        return frozenset()
    half = [
        (torch.bfloat16, getattr(ops, "_is_mkldnn_bf16_supported", None)),
        (torch.float16, getattr(ops, "_is_mkldnn_fp16_supported", None)),
    ]
    return frozenset([torch.float32, *(dtype for dtype, supported in half if supported is not None and supported())])


ONEDNN_DTYPES = _onednn_dtypes()
