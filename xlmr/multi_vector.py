"""bge-m3's second and third kind of vector, both made of every token (Chen et al., 2024): lexical weights and ColBERT.

Names, shapes and formulas are those of FlagEmbedding's BGEM3FlagModel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .encode import at_least_fp32
from .sentence_directory import Find, check_shapes
from .weights import read_pickle


class Linear(NamedTuple):
    """The arguments of F.linear."""

    weight: Tensor  # [D, N]
    bias: Tensor  # [D]


class TokenHeads(NamedTuple):
    """The heads on the last layer, None where the checkpoint has none: sparse with D = 1, colbert with any D."""

    sparse: Linear | None = None
    colbert: Linear | None = None

    def to(self, like: Tensor) -> TokenHeads:
        """The heads on the device and in the dtype of `like`."""
        return TokenHeads(*(None if head is None else Linear(*(t.to(like) for t in head)) for head in self))


def read_token_heads(find: Find, hidden_size: int) -> TokenHeads:
    """The heads in sparse_linear.pt and colbert_linear.pt; ValueError for damaged or unfitting ones."""
    heads: list[Linear | None] = []
    for name in ("sparse_linear.pt", "colbert_linear.pt"):
        path = find(name, "")
        if path is None:
            heads.append(None)
            continue
        weights = read_pickle(path)
        outputs = 1 if name == "sparse_linear.pt" else weights.get("weight", torch.empty(0)).shape[0]
        check_shapes(weights, {"weight": (outputs, hidden_size), "bias": (outputs,)}, str(path))
        heads.append(Linear(weights["weight"], weights["bias"]))
    return TokenHeads(*heads)


def lexical_weights(
    x: Tensor, head: Linear | None, texts: Sequence[list[int]], unused: set[int]
) -> list[dict[str, float]]:
    """For each of `texts` (ids), from their last layer x [T, N], the largest weight of every token id, where above 0.

    The id is a str. Tokens of `unused`, the special ones, are left out.
    """
    assert head is not None
    found = []
    weights = F.linear(x, *head).squeeze(-1).cpu().split([len(ids) for ids in texts])
    for ids, of_text in zip(texts, weights, strict=True):
        best: dict[int, float] = {}
        for token, weight in zip(ids, of_text.tolist(), strict=True):
            if weight > best.get(token, 0.0):
                best[token] = weight
        found.append({str(token): weight for token, weight in best.items() if token not in unused})
    return found


def colbert_vecs(x: Tensor, head: Linear | None, lengths: Sequence[int], normalize: bool) -> list[Tensor]:
    """From the last layer [T, N] of each text the vectors of all tokens but the first: [tokens − 1, D], on the CPU."""
    assert head is not None
    vectors = F.linear(x, *head)
    vectors = vectors.to(at_least_fp32(vectors.dtype))
    vectors = F.normalize(vectors, dim=-1) if normalize else vectors
    return [of_text[1:] for of_text in vectors.cpu().split(list(lengths))]


def compute_lexical_matching_score(first: Any, second: Any) -> Any:
    """The sum of the products of the weights of common tokens: a number for two dicts, a NumPy [n, m] for lists."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return float(sum(weight * second[token] for token, weight in first.items() if token in second))
    several = [[one] if isinstance(one, Mapping) else one for one in (first, second)]
    table = [[compute_lexical_matching_score(a, b) for b in several[1]] for a in several[0]]
    return torch.tensor(table, dtype=torch.float64).numpy()


def colbert_score(query: Any, passage: Any) -> Tensor:
    """The mean, over a query's vectors [n, D], of the largest product with one of a passage's [m, D]: a 0-d tensor."""
    query, passage = torch.as_tensor(query), torch.as_tensor(passage)
    return (query @ passage.T).amax(1).mean()


def pair_scores(
    queries: Mapping[str, Any], passages: Mapping[str, Any], weights: Sequence[float]
) -> dict[str, list[float]]:
    """The scores of n pairs of a query and a passage that a bge-m3 has encoded: by each kind of vector, and the means
    of two and of all three. `weights`: of dense, sparse and ColBERT in these means."""
    if len(weights) != 3 or 0 in (weights[0] + weights[1], sum(weights)):
        raise ValueError(f"weights_for_different_modes is {weights}: three for dense, sparse and colbert are needed")
    w_dense, w_sparse, w_colbert = weights
    colbert = list(map(float, map(colbert_score, queries["colbert_vecs"], passages["colbert_vecs"])))
    sparse = list(map(compute_lexical_matching_score, queries["lexical_weights"], passages["lexical_weights"]))
    dense = (queries["dense_vecs"] * passages["dense_vecs"]).sum(1).tolist()
    two = [(s * w_sparse + d * w_dense) / (w_sparse + w_dense) for s, d in zip(sparse, dense, strict=True)]
    three = [
        (c * w_colbert + s * w_sparse + d * w_dense) / (w_colbert + w_sparse + w_dense)
        for c, s, d in zip(colbert, sparse, dense, strict=True)
    ]
    return {"colbert": colbert, "sparse": sparse, "dense": dense, "sparse+dense": two, "colbert+sparse+dense": three}
