"""The gates of bench/ can fail: each planted fault is reported, and a sound kernel beside it is not."""

import json
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT, python

pytest.importorskip("triton")

# Kernels that compile, but should not pass; the bucket of a configuration says what is wrong with it.
COMPILED = """
import torch
import triton
import triton.language as tl

from xlmr.kernels._dropout import keeps
from xlmr.kernels._launch import config, pick

CONFIGS = {
    "portable": {
        "sound": config(4, 3, BLOCK_M=64, BLOCK_N=64),
        "shared": config(8, 8, BLOCK_M=128, BLOCK_N=128),
        "warps": config(2, 3, BLOCK_M=64, BLOCK_N=64),
        "unused": config(4, 3, BLOCK_M=64, BLOCK_N=64),
    },
}


@triton.jit
def _product_kernel(x_ptr, w_ptr, y_ptr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    m, n, k = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[:, None], tl.arange(0, 64)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, 64):
        acc = tl.dot(tl.load(x_ptr + m * K + start + k), tl.load(w_ptr + n * K + start + k).T, acc)
    tl.store(y_ptr + m * BLOCK_N + tl.arange(0, BLOCK_N)[None, :], acc)


@triton.jit
def _waiting_kernel(x_ptr, y_ptr, seed_ptr, end):
    m, d = tl.arange(0, 64)[:, None], tl.arange(0, 64)[None, :]
    q, acc = tl.load(x_ptr + m * 64 + d), tl.zeros((64, 64), tl.float32)
    for start in range(0, end, 64):  # never, as far as the compiler knows
        k = tl.load(x_ptr + (start + m) * 64 + d, mask=start + m < end, other=0.0)
        p = tl.where(keeps(seed_ptr, tl.arange(0, 64), start, 32768, 64), tl.dot(q, k.T), 0.0)
        acc = tl.dot(p.to(k.dtype), k, acc)
    tl.store(y_ptr + m * 64 + d, acc)


@triton.jit
def _spilling_kernel(x_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    tl.store(x_ptr + offsets, x / tl.sum(x))


@triton.jit
def _forgotten_kernel(x_ptr):
    tl.store(x_ptr, 0.0)


def product(bucket):
    x, y = torch.empty(128, 1024, dtype=torch.bfloat16), torch.empty(128, 128)
    _product_kernel[(1,)](x, x, y, K=1024, **pick(CONFIGS, x.device, bucket).meta)


def waiting():
    x, seed = torch.empty(1024, 64, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int64)
    _waiting_kernel[(1,)](x, torch.empty(64, 64), seed, 1024, num_warps=4)


def spilling():
    _spilling_kernel[(1,)](torch.empty(65536), BLOCK=65536, num_warps=4)
"""
COMPILE = """
import functools, json, pathlib, sys
from bench import compile_gate
import compiled

cases = [(bucket, functools.partial(compiled.product, bucket)) for bucket in ("sound", "shared", "warps")]
cases += [("waiting", compiled.waiting), ("spilling", compiled.spilling)]
for _ in "again", "cached":
    rows, problems = compile_gate.gate(cases, [compiled], ["sm_90"], pathlib.Path(sys.argv[1]), processes=2)
    print(json.dumps({"rows": rows, "problems": problems}))
"""

INTERPRETED = """
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def _scale_kernel(x_ptr, w_ptr, y_ptr, N: tl.constexpr, BLOCK: tl.constexpr, READS: tl.constexpr):
    cols, row = tl.arange(0, BLOCK), tl.program_id(0) * N
    y = tl.load(w_ptr + cols, mask=cols < N, other=0.0)
    for _ in range(READS):
        y += tl.load(x_ptr + row + cols, mask=cols < N, other=0.0)
    tl.store(y_ptr + row + cols, y, mask=cols < N)


@triton.jit
def _copy_kernel(x, y):
    y.store([0, 0], x.load([0, 0]))


@triton.jit
def _shift_kernel(x_ptr, FROM: tl.constexpr, STEP: tl.constexpr):
    tl.store(x_ptr + tl.program_id(0) * STEP, tl.load(x_ptr + tl.program_id(0) + FROM))


@triton.jit
def _forgotten_kernel(x_ptr):
    tl.store(x_ptr, 0.0)


x, w = torch.zeros(5, 24), torch.zeros(24)


def scale(reads, rows=5):
    _scale_kernel[(rows,)](x, w, torch.empty_like(x), N=24, BLOCK=32, READS=reads)


def shift(start, step):
    _shift_kernel[(4,)](x, FROM=start, STEP=step)


def copy():
    _copy_kernel[(1,)](*(TensorDescriptor.from_tensor(t, [8, 32]) for t in (x, torch.empty_like(x))))
"""
STORES = """
import json, re
from bench import compile_cases, compile_gate
from xlmr.kernels import vocab_softmax
import triton

recorder = compile_gate.Recorder([vocab_softmax])
cases = compile_cases.cases({"vocab_softmax": vocab_softmax})
recorder.run([case for case in cases if case[0] == "vocab_cross_entropy bf16, gradients"], "sm_90", "sm_90")
for job in recorder.jobs.values():
    if job.source.fn.__name__ in ("_vocab_dz_kernel", "_sum_splits_kernel"):
        kernel = triton.compile(job.source, target=compile_gate.TARGETS["sm_90"].gpu, options=job.options)
        widths = {"b16": 2, "b32": 4, "v2.b32": 8, "v4.b32": 16}
        found = re.findall(r"st\\.global\\.(\\S+) ", kernel.asm["ptx"])
        print(json.dumps([kernel.name, max(widths[width] for width in found)]))
"""
FLIGHT = """
import json
from bench import compile_cases, compile_gate
from xlmr.kernels import vocab_softmax
import triton

recorder = compile_gate.Recorder([vocab_softmax])
cases = compile_cases.cases({"vocab_softmax": vocab_softmax})
recorder.run([case for case in cases if case[0] == "vocab_cross_entropy bf16 large 1024 rows"], "sm_90", "sm_90")
(job,) = [job for job in recorder.jobs.values() if job.source.fn.__name__ == "_vocab_partials_kernel"]
kernel = triton.compile(job.source, target=compile_gate.TARGETS["sm_90"].gpu, options=job.options)
before, *loops = kernel.asm["ttgir"].split("scf.for")
names = "ttng.warp_group_dot ", "ttg.async_copy_global_to_local", "math.exp2"
print(json.dumps([[loop.find(name) for name in names] for loop in loops]))
"""
TRAFFIC = """
import functools, json
from bench import traffic
import interpreted

row, matrix = 24 * 4, 5 * 24 * 4
cases = [
    traffic.Case("sound", functools.partial(interpreted.scale, 1), 5, 2 * matrix + row, True),
    traffic.Case("twice", functools.partial(interpreted.scale, 2), 5, 2 * matrix + row, True),
    traffic.Case("product", functools.partial(interpreted.scale, 2), 5, 2 * matrix + row),
    traffic.Case("overstated", functools.partial(interpreted.scale, 1), 5, 3 * matrix + row),
    traffic.Case("outside", functools.partial(interpreted.scale, 1, rows=6), 5, 2 * matrix + row),
    traffic.Case("descriptors", interpreted.copy, 5, 2 * matrix, True),
    traffic.Case("in place", functools.partial(interpreted.shift, 0, 1), 5, 32),
    traffic.Case("all into one", functools.partial(interpreted.shift, 5, 0), 5, 32),
    traffic.Case("from the next", functools.partial(interpreted.shift, 1, 1), 5, 32),
]
rows, problems = traffic.gate(cases, [interpreted])
print(json.dumps({"rows": rows, "problems": problems}))
"""


def run(directory: Path, module: str, source: str, script: str) -> list[dict[str, Any]]:
    """The JSON lines that `script` prints; in a process of its own, as a gate decides how kernels are defined."""
    (directory / f"{module}.py").write_text(source, encoding="utf-8")
    lines = python(script, directory / "cache", cwd=directory, path=(ROOT, directory)).splitlines()
    return [json.loads(line) for line in lines]


def test_compile_gate_reports_what_is_planted(tmp_path: Path) -> None:
    first, cached = run(tmp_path, "compiled", COMPILED, COMPILE)
    assert first == cached
    problems = {row["for"]: row["problems"] for row in first["rows"]}
    assert problems["sound"] == []
    assert problems["shared"] == ["256 KiB of shared memory, 227 are there"]
    assert problems["warps"] == ["a dot without wgmma", "a dot on mma.sync"]
    assert problems["waiting"] == ["wgmma one after the other (ptxas' remark C7515)"]
    assert len(problems["spilling"]) == 1
    assert problems["spilling"][0].startswith("a stack of ")
    of_the_run = [problem for problem in first["problems"] if not problem.startswith("compiled._")]
    assert of_the_run == [
        "not covered: compiled.CONFIGS['portable']['unused'] is chosen by no case",
        "not covered: compiled._forgotten_kernel is launched by no case",
    ]
    assert len(first["problems"]) == len(of_the_run) + 5


def test_traffic_gate_reports_what_is_planted(tmp_path: Path) -> None:
    (found,) = run(tmp_path, "interpreted", INTERPRETED, TRAFFIC)
    rows = {row["case"]: row for row in found["rows"]}
    row, matrix = 24 * 4, 5 * 24 * 4
    sound = rows["sound"]
    assert (sound["loaded"], sound["stored"], sound["once"]) == (matrix, matrix, row)  # not the 8 masked lanes
    descriptors = rows["descriptors"]
    assert (descriptors["loaded"], descriptors["stored"], descriptors["once"]) == (matrix, matrix, 0)
    assert found["problems"] == [
        "twice: moves 1.455 × its minimum, allowed is 1.15",
        "overstated: moves 0.688 × its minimum: cost() states too much",
        "outside: IndexError('_scale_kernel touches memory outside its tensors')",
        "all into one: RuntimeError('programs of _shift_kernel meet at an element that one of them writes')",
        "from the next: RuntimeError('programs of _shift_kernel meet at an element that one of them writes')",
        "not covered: interpreted._forgotten_kernel is launched by no case",
    ]


def test_what_a_chunk_of_words_leaves_is_stored_sixteen_bytes_at_a_time(tmp_path: Path) -> None:
    """Its last chunk has an odd number of words, whose rows begin anywhere."""
    *whole, dz, db = run(tmp_path, "stores", "", STORES)
    assert whole == [["_vocab_dz_kernel", 16], ["_sum_splits_kernel", 16]]
    assert (dz, db) == (["_vocab_dz_kernel", 4], ["_sum_splits_kernel", 2])


def test_the_next_tiles_loads_fly_during_the_losss_exponentials(tmp_path: Path) -> None:
    """One loop over the steps of all tiles: in it products and loads stand before a finished tile's exponentials."""
    (loops,) = run(tmp_path, "flight", "", FLIGHT)
    ((product, load, exponential),) = loops
    assert 0 < product < load < exponential
