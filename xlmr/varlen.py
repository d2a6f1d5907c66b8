"""Batches of variable length: which rows are computed, and where each sequence's rows lie.

Inside the model a batch is a matrix of rows [T, N]. Packed, the rows are the tokens whose mask is not 0, one sequence
after the other; otherwise they are all B·S positions. `plan` decides which, once a forward; `Layout.unpad` and
`Layout.pad` convert; `Sequences` tells attention where each sequence begins and ends.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .values import recorded, require, tracing


@dataclass(frozen=True, eq=False)
class Sequences:
    """The rows of each of B sequences in one call of attention: int32 [B] tensors, and upper bounds on the lengths.

    Sequence b owns the queries q_starts[b] … + q_lens[b] and the keys k_starts[b] … + k_lens[b]. The queries of the
    sequences follow one another and cover all rows of q; keys may have gaps between sequences (padding).
    """

    q_starts: Tensor
    q_lens: Tensor
    k_starts: Tensor
    k_lens: Tensor
    max_q: int
    max_k: int
    _blocks: dict[tuple[int, bool], tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)
    _fits: set[tuple[int, int, bool]] = field(default_factory=set, init=False, repr=False)

    @classmethod
    def packed(cls, cu_seqlens: Tensor, max_seqlen: int) -> "Sequences":
        """Sequence b is the rows cu_seqlens[b] … cu_seqlens[b + 1] of q, k and v; cu_seqlens [B + 1] starts with 0."""
        starts = cu_seqlens.to(torch.int32)
        starts, lens = starts[:-1], starts.diff()
        return cls(starts, lens, starts, lens, max_seqlen, max_seqlen)

    def with_queries(self, rows: Tensor, one_each: bool = False) -> "Sequences":
        """The same keys for the queries `rows` only: sorted int64 [R] rows of q, which becomes q[rows]; `one_each`: one
        of every sequence."""
        bounds = torch.cat([self.q_starts, self.q_starts[-1:] + self.q_lens[-1:]])
        cut = torch.searchsorted(rows, bounds.to(rows.dtype), out_int32=True)
        queries = replace(self, q_starts=cut[:-1], q_lens=cut.diff(), max_q=rows.numel())
        if one_each and "runs" in self.__dict__ and len(self.runs) == 1:  # known without reading
            queries.__dict__["runs"] = [(count, 0, 1, k_start, k_len) for count, _, _, k_start, k_len in self.runs]
        return queries

    def known_to_fit(self, rows: int, keys: int) -> "Sequences":
        """Itself, made in a way that leaves `check` nothing to find."""
        if not recorded():  # where `check` does not look, and the numbers may be symbols, which have no hash
            self._fits.update((rows, keys, disjoint) for disjoint in (False, True))
        return self

    def check(self, rows: int, keys: int, disjoint: bool = False) -> None:
        """ValueError unless the queries are the `rows` rows of q, the keys among the `keys` rows of k and v (no key of
        two sequences where `disjoint`), and no length above its bound; on a GPU a device-side assertion that nothing
        waits for. Once for all layers; not while a graph is recorded."""
        if recorded() or (rows, keys, disjoint) in self._fits:
            return
        spans = {"q_starts": self.q_starts, "q_lens": self.q_lens}
        adjacent = self.q_lens.cumsum(0) - self.q_lens == self.q_starts
        require(
            (adjacent & (self.q_lens.clamp(0, self.max_q) == self.q_lens)).all() & (self.q_lens.sum() == rows),
            f"attention: q_starts and q_lens must cut the {rows} rows of q in adjacent sequences of 0 to {self.max_q}",
            **spans,
        )
        spans = {"k_starts": self.k_starts, "k_lens": self.k_lens}
        inside = (self.k_starts >= 0) & (self.k_starts <= keys - self.k_lens)
        require(
            (inside & (self.k_lens.clamp(0, self.max_k) == self.k_lens)).all(),
            f"attention: k_starts and k_lens must name 0 to {self.max_k} keys each of the {keys} rows of k and v",
            **spans,
        )
        if disjoint:
            starts, order = self.k_starts.masked_fill(self.k_lens == 0, keys).sort()  # those without keys come last
            require(
                (starts[:-1] + self.k_lens[order][:-1] <= starts[1:]).all(),
                "attention: k_starts and k_lens overlap; for gradients every key must be one sequence's",
                **spans,
            )
        self._fits.add((rows, keys, disjoint))

    def blocks(self, size: int, rows: int, keys: bool = False) -> tuple[Tensor, Tensor]:
        """The `rows` rows of q, or of k and v, in blocks of at most `size`, none across sequences: the sequence of each
        of rows // size + B blocks, int32, and the number of the first block of each sequence, int32 [B].

        A sequence's blocks follow one another. There may be more blocks than are needed: the last ones begin behind
        the rows of the last sequence, and are empty. Computed on the device once for all layers, in six launches;
        `rows` is q.shape[0] or k.shape[0], known on the host. The keys of two sequences must not overlap.
        """
        if (size, keys) not in self._blocks:
            lens = self.k_lens if keys else self.q_lens
            counts = (lens + (size - 1)) // size
            begins = counts.cumsum(0, dtype=torch.int32) - counts
            block = torch.arange(rows // size + lens.numel(), dtype=torch.int32, device=lens.device)
            self._blocks[size, keys] = torch.searchsorted(begins[1:], block, right=True, out_int32=True), begins
        return self._blocks[size, keys]

    @cached_property
    def runs(self) -> list[tuple[int, int, int, int, int]]:
        """(count, q_start, q_len, k_start, k_len) of each run of equally long, adjacent sequences: one batched call
        each. On the host: a synchronisation, once a forward, for the eager path only."""
        runs: list[tuple[int, int, int, int, int]] = []
        table = torch.stack([self.q_starts, self.q_lens, self.k_starts, self.k_lens], dim=1).tolist()
        for q_start, q_len, k_start, k_len in table:
            if runs:
                count, first_q, run_q, first_k, run_k = runs[-1]
                if (q_len, k_len, k_start) == (run_q, run_k, first_k + count * run_k):
                    runs[-1] = (count + 1, first_q, run_q, first_k, run_k)
                    continue
            runs.append((1, q_start, q_len, k_start, k_len))
        return runs


@dataclass(frozen=True, eq=False)
class Layout:
    """How a batch [batch, seqlen] lies in rows [T, …]. `indices` [T] are the flat positions b·seqlen + s of the rows;
    None: every position is a row. `dense`, where the kernels' masks do not suffice, is the additive mask
    [B | 1, H | 1, Q, K] of every attention. `keep` [B, K] marks the real keys, None where all are."""

    batch: int
    seqlen: int
    sequences: Sequences
    indices: Tensor | None = None
    dense: Tensor | None = None
    keep: Tensor | None = None

    def unpad(self, x: Tensor) -> Tensor:
        """[B, S, …] → [T, …]: the rows that are computed."""
        x = x.flatten(0, 1)
        return x if self.indices is None else x[self.indices]

    def first_rows(self) -> Tensor:
        """The first row of each sequence, int64 [B]."""
        return self.sequences.q_starts.long()

    def pad(self, x: Tensor) -> Tensor:
        """[T, …] → [B, S, …]: zeros at the positions that were not computed."""
        if self.indices is not None:
            out = x.new_zeros(self.batch * self.seqlen, *x.shape[1:])
            x = out.index_copy(0, self.indices, x) if x.requires_grad else out.index_copy_(0, self.indices, x)
        return x.view(self.batch, self.seqlen, *x.shape[1:])


def plan(
    batch: int,
    seqlen: int,
    mask: Tensor | None = None,
    *,
    device: torch.device,
    keys: int | None = None,
    causal: bool = False,
    every_position: bool = False,
    reads_first: bool = False,
    labels: Tensor | None = None,
    weights: bool = False,
) -> Layout:
    """Decides which rows of a batch are computed; one host read at most (two for a 4-D mask).

    mask: [B | 1, K], any dtype, non-zero keeps; or [B, S, K] / [B, 1 | H, S, K], bool (True keeps) or additive float;
    one whose query rows are all equal is a key-padding mask; None keeps all. K is `keys`: S, more with past keys, or
    the length of the other sequence in cross attention. Tokens whose mask is 0 are left out, unless the answer depends
    on one: `every_position`; `weights` (the attention weights are asked for); a per-query mask; K ≠ S; `reads_first` (a
    head reads column 0) while a row's first token is masked; a label ≠ −100 where the mask is 0; a row with no real
    token. With `causal` a query sees no later key, the last query the last key (a 4-D mask speaks for itself). Where
    values must decide nothing (see `tracing`), nothing is read: every position is computed, under a dense mask.
    """
    if reads_first and batch and not seqlen:
        raise ValueError("the sequences have no token, and the first of each is read: give <s> and </s> at least")
    keys = seqlen if keys is None else keys
    shape = _Shape(batch, seqlen, keys, causal and (mask is None or mask.dim() == 2), device)
    keep, dense = _read(mask, shape)
    if dense is not None:
        return _every_row(shape, dense)
    if tracing() or device.type == "meta":
        keep = torch.ones(batch, keys, dtype=torch.bool, device=device) if keep is None else keep
        return _every_row(shape, _dense(keep, shape))
    padding = _key_padding(keep, labels)
    if padding is None:
        return _every_row(shape, _dense(None, shape) if weights else None)
    if weights:
        return _every_row(shape, _dense(padding.keep, shape), padding.keep)
    reads_masked = padding.has_label or (reads_first and max(padding.firsts) > 0)
    if every_position or reads_masked or keys != seqlen or min(padding.lens) == 0:
        return _masked(padding, shape)
    return _packed(padding, shape)


def packed_positions(input_ids: Tensor, cu_seqlens: Tensor, padding_idx: int) -> Tensor:
    """Position ids [T] of packed ids [T]: padding_idx + 1, + 2, … within each sequence, pad tokens skipped."""
    real = (input_ids != padding_idx).long()
    count = real.cumsum(0)
    before = F.pad(count, (1, 0))[cu_seqlens[:-1].long()]
    before = before.repeat_interleave(cu_seqlens.diff().long(), output_size=input_ids.numel())
    return (count - before) * real + padding_idx


def padded_places(cu_seqlens: Tensor, seqlen: int, tokens: int) -> Tensor:
    """Where the packed tokens lie in the padded batch: flat positions b·seqlen + s, int64 [T]."""
    shift = torch.arange(cu_seqlens.numel() - 1, device=cu_seqlens.device) * seqlen - cu_seqlens[:-1]
    shift = shift.repeat_interleave(cu_seqlens.diff(), output_size=tokens)
    return torch.arange(tokens, device=shift.device) + shift


class _Shape(NamedTuple):
    """A batch before its mask: how many sequences, queries and keys of each, and whether none sees a later key."""

    batch: int
    seqlen: int
    keys: int
    causal: bool
    device: torch.device


class _KeyPadding(NamedTuple):
    """A mask that leaves keys out, and what was read of it: of each sequence the number of real keys, the first and the
    last of them; whether a masked token has a label."""

    keep: Tensor  # bool [B, K]
    lens: list[int]
    firsts: list[int]
    lasts: list[int]
    has_label: bool


def _key_padding(keep: Tensor | None, labels: Tensor | None) -> _KeyPadding | None:
    """Reads a mask [B, K], None where it leaves nothing out."""
    if keep is None or keep.numel() == 0:
        return None
    keys = keep.shape[1]
    ints = keep.to(torch.int32)
    rows = [ints.sum(1), ints.argmax(1), keys - 1 - ints.flip(1).argmax(1)]
    if labels is not None:
        rows.append(((labels.view(-1, keys).to(keep.device) != -100) & ~keep).sum(1))
    lens, firsts, lasts, *labelled = torch.stack(rows).tolist()
    if min(lens) == keys:
        return None
    return _KeyPadding(keep, lens, firsts, lasts, any(map(any, labelled)))


def _packed(padding: _KeyPadding, shape: _Shape) -> Layout:
    """The real tokens alone."""
    keep, tokens = padding.keep, sum(padding.lens)
    cu_seqlens = F.pad(keep.sum(1, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
    indices = torch.nonzero_static(keep.flatten(), size=tokens).squeeze(1)
    sequences = Sequences.packed(cu_seqlens, max(padding.lens)).known_to_fit(tokens, tokens)
    return Layout(shape.batch, shape.seqlen, sequences, indices, keep=keep)


def _masked(padding: _KeyPadding, shape: _Shape) -> Layout:
    """Every position, under a mask: by bounds on the keys where each sequence's real ones follow one another."""
    keep, lens, firsts, lasts, _ = padding
    contiguous = all(last - first + 1 == n for n, first, last in zip(lens, firsts, lasts, strict=True) if n)
    if not contiguous or (shape.causal and min(lasts) < shape.keys - 1):
        return _every_row(shape, _dense(keep, shape), keep)
    layout = _every_row(shape, keep=keep)
    starts = layout.sequences.k_starts + torch.tensor(firsts, dtype=torch.int32, device=shape.device)
    k_lens = torch.tensor(lens, dtype=torch.int32, device=shape.device)
    sequences = replace(layout.sequences, k_starts=starts, k_lens=k_lens)
    return replace(layout, sequences=sequences.known_to_fit(shape.batch * shape.seqlen, shape.batch * shape.keys))


def _every_row(shape: _Shape, dense: Tensor | None = None, keep: Tensor | None = None) -> Layout:
    """Every position; under the additive mask `dense`, if any."""
    batch, seqlen, keys, _, device = shape

    def every(length: int) -> tuple[Tensor, Tensor]:
        rows = torch.arange(0, batch * length + 1, max(length, 1), dtype=torch.int32, device=device)
        starts = rows[:batch] if length else rows.expand(batch)
        return starts, torch.full_like(starts, length)

    sequences = Sequences(*every(seqlen), *every(keys), seqlen, keys).known_to_fit(batch * seqlen, batch * keys)
    sequences.__dict__["runs"] = [(batch, 0, seqlen, 0, keys)]  # the cached property: known without reading
    return Layout(batch, seqlen, sequences, dense=dense, keep=keep)


def _read(mask: Tensor | None, shape: _Shape) -> tuple[Tensor | None, Tensor | None]:
    """The mask of `plan` as key padding, bool [B, K], or else as an additive mask [B | 1, H | 1, Q, K]; two None where
    there is none. ValueError for another shape."""
    batch, seqlen, keys, *_ = shape
    dense = None
    if mask is not None and mask.dim() > 2:
        mask, dense = _reduce(mask, batch, seqlen, keys)
    if mask is None:
        return None, dense
    keep = mask.to(shape.device) != 0
    if keep.shape not in ((1, keys), (batch, keys)):
        raise ValueError(
            f"attention_mask has shape {tuple(keep.shape)}: allowed are [batch | 1, keys] = {(batch, keys)}, "
            f"[batch, 1 | heads, {seqlen}, {keys}] and None"
        )
    return keep.expand(batch, keys), None


def _reduce(mask: Tensor, batch: int, seqlen: int, keys: int) -> tuple[Tensor | None, Tensor | None]:
    """A 3-D or 4-D mask as a key-padding mask [B, K] where it is one, else as an additive mask [B | 1, H | 1, Q, K]."""
    mask = mask[:, None] if mask.dim() == 3 else mask
    if mask.dim() != 4 or mask.shape[0] not in (1, batch) or mask.shape[2] not in (1, seqlen) or mask.shape[3] != keys:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}: allowed are [{batch}, {keys}], "
            f"[{batch}, {seqlen}, {keys}] and [{batch}, 1 | heads, {seqlen}, {keys}]"
        )
    if not mask.is_floating_point():
        mask = additive(mask != 0, torch.float32)
    lowest = torch.finfo(mask.dtype).min
    mask = mask.to(torch.promote_types(mask.dtype, torch.float32))  # which holds the bounds of any dtype of scores
    if tracing() or mask.is_meta:
        return None, mask
    row = mask[:, :1, :1]
    binary = (row == 0) | (row <= lowest / 2)
    if bool(((mask == row) & binary).all()):
        return (row[:, 0, 0] == 0).expand(batch, -1), None
    return None, mask


def _dense(keep: Tensor | None, shape: _Shape) -> Tensor:
    """The additive mask [B | 1, 1, Q | 1, K], fp32, of a key-padding mask [B, K] and, where asked, causality."""
    _, seqlen, keys, causal, device = shape
    sees = torch.ones(1, 1, 1, keys, dtype=torch.bool, device=device) if keep is None else keep[:, None, None]
    if causal:
        sees = sees & torch.ones(seqlen, keys, dtype=torch.bool, device=device).tril(keys - seqlen)
    return additive(sees, torch.float32)


def additive(sees: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `sees` is True, the lowest finite number elsewhere."""
    return torch.zeros_like(sees, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min)
