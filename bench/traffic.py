"""The traffic gate: the bytes that the kernels load and store, over the minimum that their cost() states.

`python -m bench.traffic [--json]` runs the public functions and their backward under Triton's interpreter, on a CPU, at
scaled-down XLM-R shapes, and counts every lane of every load and store that is not masked, tensor descriptors included.
Of a tensor of at most one row (weights [N], biases, a table of one type) each element counts once a launch: it stays in
cache. PyTorch's own operations between two launches are not counted. Exit status 1 where
- a bandwidth-bound kernel (LayerNorms and their backward, embedding) moves more than 1.15 × the minimum; of the others
  the ratio is for information: products read operands once a tile, and how many rows the gradients of the embedding's
  tables have, and how many partial sums, is up to the ids;
- a kernel moves less than the minimum: then cost() is wrong;
- a kernel touches memory outside its tensors, or is run by no case;
- two programs of a launch, which a GPU runs at once, meet at an element that one of them writes.

The counts depend on shapes alone, never on the machine.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import argparse
import importlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder
from triton.tools.tensor_descriptor import TensorDescriptor

from xlmr.kernels import _launch
from xlmr.ops import gradients
from xlmr.varlen import Sequences

from . import harness
from .command import exit_with

LIMIT = 1.15  # × the minimum, for the kernels that bandwidth bounds
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}  # the interpreter cannot multiply bf16


@dataclass(frozen=True)
class Case:
    name: str
    call: Callable[[], object]
    rows: int  # T: a tensor with such a dimension has more than one row
    minimum: int  # bytes
    bandwidth_bound: bool = False


class Row:
    """A tensor of at most one row: which of its elements a launch has touched."""

    def __init__(self, tensor: Tensor) -> None:
        self.start, self.itemsize = tensor.data_ptr(), tensor.element_size()
        self.touched = np.zeros(extent(tensor), dtype=bool)

    def take(self, addresses: np.ndarray) -> np.ndarray:
        """Marks the elements at `addresses`; returns the addresses that lie elsewhere."""
        elements = (addresses.astype(np.int64) - self.start) // self.itemsize
        inside = (elements >= 0) & (elements < len(self.touched))
        self.touched[elements[inside]] = True
        return addresses[~inside]


PROCESSORS = 3  # so that sums are split over several programs
NOBODY, SEVERAL = -1, -2  # beside the numbers of programs


class Storage:
    """The memory behind tensors: which program of a launch has written, and which has read, each of its bytes."""

    def __init__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.start, self.size = storage.data_ptr(), storage.nbytes()
        self.writers, self.readers = (np.full(self.size, NOBODY, np.int32) for _ in range(2))

    def holds(self, addresses: np.ndarray) -> np.ndarray:
        return (self.start <= addresses) & (addresses < self.start + self.size)

    def meet(self, addresses: np.ndarray, program: int, writes: bool) -> bool:
        """Notes that the program reads or writes there; returns whether another one does, and one of the two writes."""
        places = (addresses - self.start).astype(np.int64)
        writers, readers = self.writers[places], self.readers[places]
        if writes:
            self.writers[places] = program
        else:
            self.readers[places] = np.where((readers == NOBODY) | (readers == program), program, SEVERAL)
        strangers = [(known != NOBODY) & (known != program) for known in (writers, readers)[: 1 + writes]]
        return bool(np.logical_or.reduce(strangers).any())


def extent(tensor: Tensor) -> int:
    """Elements from the first to the last of a strided tensor."""
    steps = ((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return 1 + sum(steps) if tensor.numel() else 0


@dataclass
class Traffic:
    """Bytes that launches moved, and the kernels launched, one name a launch."""

    rows: int
    loaded: int = 0
    stored: int = 0
    once: int = 0  # of tensors of at most one row
    launches: list[str] = field(default_factory=list)

    @property
    def moved(self) -> int:
        return self.loaded + self.stored + self.once

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts the launches inside the block."""
        tables: list[Row] = []  # of the launch that is running
        memory: list[Storage] = []  # behind its tensors
        run, load, store = (
            InterpretedFunction.run,
            InterpreterBuilder.create_masked_load,
            InterpreterBuilder.create_masked_store,
        )

        def lanes(builder: Any, pointers: Any, mask: Any, writes: bool) -> int:
            """Bytes at the lanes that are on, but for those of `tables`."""
            addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
            program = int(np.ravel_multi_index(builder.grid_idx, builder.grid_dim))
            places = [(storage, storage.holds(addresses)) for storage in memory]
            if not np.logical_or.reduce([held for _, held in places]).all():
                raise IndexError(f"{self.launches[-1]} touches memory outside its tensors")
            if any(storage.meet(addresses[held], program, writes) for storage, held in places if held.any()):
                raise RuntimeError(f"programs of {self.launches[-1]} meet at an element that one of them writes")
            for table in tables:
                addresses = table.take(addresses)
            return addresses.size * pointers.get_element_ty().primitive_bitwidth // 8

        def counted_load(builder: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
            self.loaded += lanes(builder, pointers, mask, False)
            return load(builder, pointers, mask, *rest, **named)

        def counted_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
            self.stored += lanes(builder, pointers, mask, True)
            return store(builder, pointers, value, mask, *rest, **named)

        def counted_run(kernel: Any, *arguments: Any, **named: Any) -> Any:
            self.launches.append(kernel.fn.__name__)
            found = [_tensor(value) for value in (*arguments, *named.values())]
            tensors = [tensor for tensor in found if tensor is not None]
            memory[:] = {tensor.untyped_storage().data_ptr(): Storage(tensor) for tensor in tensors}.values()
            tables[:] = [Row(tensor) for tensor in tensors if self._is_row(tensor)]
            result = run(kernel, *arguments, **named)
            self.once += sum(int(table.touched.sum()) * table.itemsize for table in tables)
            return result

        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(_launch, "_processors", return_value=PROCESSORS))
            stack.enter_context(mock.patch.object(InterpretedFunction, "run", counted_run))
            stack.enter_context(mock.patch.object(InterpreterBuilder, "create_masked_load", counted_load))
            stack.enter_context(mock.patch.object(InterpreterBuilder, "create_masked_store", counted_store))
            yield

    def _is_row(self, tensor: Tensor) -> bool:
        return self.rows not in tensor.shape and (tensor.dim() <= 1 or len(tensor) == 1)


def _tensor(value: Any) -> Tensor | None:
    if isinstance(value, TensorDescriptor):
        return value.base
    return value if isinstance(value, Tensor) else None


def measure(case: Case) -> Traffic:
    traffic = Traffic(case.rows)
    with traffic.counting(), torch.no_grad():
        case.call()
    return traffic


def gate(cases: Sequence[Case], modules: Sequence[ModuleType]) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of the table, and every problem."""
    rows, problems, launched = [], [], set()
    for case in cases:
        try:
            traffic = measure(case)
        except InterpreterError as error:
            problems.append(f"{case.name}: {error}")
            continue
        launched |= set(traffic.launches)
        ratio = traffic.moved / case.minimum
        rows.append(
            {
                "case": case.name,
                "launches": len(traffic.launches),
                "loaded": traffic.loaded,
                "stored": traffic.stored,
                "once": traffic.once,
                "minimum": case.minimum,
                "ratio": round(ratio, 4),
                "limit": LIMIT if case.bandwidth_bound else "-",
            }
        )
        if case.bandwidth_bound and ratio > LIMIT:
            problems.append(f"{case.name}: moves {ratio:.3f} × its minimum, allowed is {LIMIT}")
        if traffic.moved < case.minimum:
            problems.append(f"{case.name}: moves {ratio:.3f} × its minimum: cost() states too much")
    for module in modules:
        file = module.__name__.rpartition(".")[2]
        kernels = {name for name, value in vars(module).items() if isinstance(value, InterpretedFunction)}
        missed = sorted(name for name in kernels - launched if name.endswith("_kernel"))
        problems += [f"not covered: {file}.{name} is launched by no case" for name in missed]
    return rows, problems


# ---- Scaled-down XLM-R shapes. Widths, heads and rows are such that no width equals the number of rows ----

HIDDEN = (768, 1024)  # for the row-wise kernels: as they are
ROWS = 203  # and enough for the partial sums of backward to weigh little, as they do in a real batch
T, N, F, V = 200, 128, 512, 4500  # else: rows, hidden and intermediate units, words
LENGTHS, HEADS, HEAD_DIM = [1, 70, 129], 2, 64  # T tokens in three texts


def cases(kernels: Mapping[str, ModuleType]) -> list[Case]:
    """Every public function of the modules, in each dtype."""
    return [
        case
        for (name, kernel), dtype in itertools.product(kernels.items(), DTYPES)
        for case in CASES[name](kernel, dtype, partial(_random, DTYPES[dtype]))
    ]


Random = Callable[..., Tensor]


def _random(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _trained(name: str, call: partial[Any], rows: int, minima: Sequence[int], bound: Sequence[bool]) -> Iterator[Case]:
    """The call without gradients, and its forward and backward; minima and bound of forward and of backward."""
    yield Case(name, call, rows, minima[0], bound[0])
    yield Case(f"{name}, gradients", partial(gradients, call.func, call.args), rows, sum(minima), bound[1])


def _layer_norm(kernel: ModuleType, dtype: str, random: Random) -> Iterator[Case]:
    rows, size = ROWS, DTYPES[dtype].itemsize
    for hidden in HIDDEN:
        x, w = random(rows, hidden), random(hidden)
        for name, given, residual in (("add", (x, x.clone()), True), ("gelu", (x,), False)):
            call = partial(getattr(kernel, f"{name}_layer_norm"), *given, w, w.clone(), 1e-5)
            minima = [kernel.cost(rows, hidden, size, residual, backward)[1] for backward in (False, True)]
            yield from _trained(f"{name}_layer_norm {dtype} [{rows}, {hidden}]", call, rows, minima, (True, True))


def _embedding(kernel: ModuleType, dtype: str, random: Random) -> Iterator[Case]:
    rows, pad, size = ROWS, 1, DTYPES[dtype].itemsize
    types, positions = torch.zeros(rows, dtype=torch.int64), torch.arange(rows) % 32 + 2
    ids = torch.randint(2, 50, (rows,), generator=torch.Generator().manual_seed(0))
    for hidden in HIDDEN:
        tables, w = (random(50, hidden), random(1, hidden), random(60, hidden)), random(hidden)
        call = partial(kernel.embed, ids, types, positions, *tables, w, w.clone(), 1e-5, pad)
        minima = [kernel.cost(rows, hidden, size, backward=backward)[1] for backward in (False, True)]
        yield from _trained(f"embed {dtype} [{rows}, {hidden}]", call, rows, minima, (True, False))


def _linear(kernel: ModuleType, dtype: str, random: Random) -> Iterator[Case]:
    size = DTYPES[dtype].itemsize
    x, square, bias = random(T, N), random(N, N), random(N)
    qkv = partial(kernel.qkv_projection, x, *(square.clone() for _ in range(3)), *(bias.clone() for _ in range(3)))
    minimum = kernel.cost(T, 3 * N, N, size)[1]
    yield Case(f"qkv_projection {dtype} {N} to 3 × {N}", qkv, T, minimum)
    yield Case(f"qkv_projection {dtype} {N} to 3 × {N}, sm_90", partial(_on, "sm_90", kernel, qkv), T, minimum)
    yield Case(
        f"linear_act {dtype} {N} to {F}",
        partial(kernel.linear_act, x, random(F, N), random(F)),
        T,
        kernel.cost(T, F, N, size)[1],
    )
    yield Case(
        f"linear {dtype} {F} to {N}",
        partial(kernel.linear, random(T, F), random(N, F), bias),
        T,
        kernel.cost(T, N, F, size)[1],
    )
    both = kernel.cost(T, F, N, size)[1] + kernel.cost(T, F, N, size, backward=True, gelu=True)[1]
    learnt = partial(gradients, kernel.linear_act, (x, random(F, N), random(F)))
    yield Case(f"linear_act {dtype} {N} to {F}, gradients", learnt, T, both)


def _on(target: str, kernel: ModuleType, call: Callable[[], object]) -> object:
    """The call with the configurations of a target: its tiles, and tensor descriptors where it has them."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(_launch, "REMEMBERS", False))
        for module in (_launch, kernel):
            stack.enter_context(mock.patch.object(module, "target", return_value=target))
        return call()


def _attention(kernel: ModuleType, dtype: str, random: Random) -> Iterator[Case]:
    size = DTYPES[dtype].itemsize
    q, k, v = random(T, 3, HEADS, HEAD_DIM).unbind(1)
    bounds = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
    texts = Sequences.packed(bounds, max(LENGTHS))
    for causal in (False, True):
        name = f"attention {dtype}, {T} rows of {len(LENGTHS)} texts{', causal' * causal}"
        call = partial(kernel.attention, q, k, v, texts, HEAD_DIM**-0.5, causal)
        costs = [kernel.cost(LENGTHS, LENGTHS, HEADS, HEAD_DIM, size, causal, backward) for backward in (False, True)]
        yield from _trained(name, call, T, [moved for _, moved in costs], (False, False))
    first = bounds[:-1].long()
    yield Case(
        f"attention {dtype}, the first row of each text",
        partial(kernel.attention, q[first], k, v, texts.with_queries(first), HEAD_DIM**-0.5),
        T,
        kernel.cost([1] * len(LENGTHS), LENGTHS, HEADS, HEAD_DIM, size)[1],
    )


def _vocab_softmax(kernel: ModuleType, dtype: str, random: Random) -> Iterator[Case]:
    rows, k, size = 40, 5, DTYPES[dtype].itemsize
    head = (random(rows, N), random(V, N), random(V))
    yield Case(
        f"vocab_topk {dtype}, {rows} rows, {V} words",
        partial(kernel.vocab_topk, *head, k),
        rows,
        kernel.cost(rows, N, V, size, k)[1],
    )
    yield Case(
        f"vocab_cross_entropy {dtype}, {rows} rows, {V} words",
        partial(kernel.vocab_cross_entropy, *head, torch.arange(rows)),
        rows,
        kernel.cost(rows, N, V, size)[1],
    )
    both = kernel.cost(rows, N, V, size)[1] + kernel.cost(rows, N, V, size, backward=True)[1]
    learnt = partial(gradients, kernel.vocab_cross_entropy, (*head, torch.arange(rows)))
    yield Case(f"vocab_cross_entropy {dtype}, {rows} rows, {V} words, gradients", learnt, rows, both)


CASES = {
    "layer_norm": _layer_norm,
    "embedding": _embedding,
    "linear": _linear,
    "attention": _attention,
    "vocab_softmax": _vocab_softmax,
}
COLUMNS = ["case", "launches", "loaded", "stored", "once", "minimum", "ratio", "limit"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.traffic", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--kernel", nargs="+", choices=CASES, default=list(CASES), help="files of kernels/; default: all"
    )
    parser.add_argument("--json", action="store_true", help="the table and the problems as JSON")
    given = parser.parse_args(arguments)
    kernels = {name: importlib.import_module(f"xlmr.kernels.{name}") for name in given.kernel}
    rows, problems = gate(cases(kernels), list(kernels.values()))
    if given.json:
        print(json.dumps({"rows": rows, "problems": problems}, indent=1))
    else:
        print(harness.table(rows, COLUMNS))
        print(f"\n{len(rows)} cases, {len(problems)} problems; counts in bytes")
        print(*problems, sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    exit_with(main)
