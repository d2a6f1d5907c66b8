"""torch.compile traces the packed entry on the kernels into one graph, as it would on a GPU, of which none is needed.

A process in which Triton is not interpreted pretends to have an H200. Dynamo traces the model, AOTAutograd splits it
into forward and backward and finds out which arguments each kernel writes; then the graphs are counted, not run.
"""

import json
from typing import Any

import pytest
from processes import python

pytest.importorskip("triton")

SCRIPT = """
import json
import sys
import warnings
from functools import lru_cache
from types import SimpleNamespace
from unittest import mock

import torch
import torch._dynamo
import torch._higher_order_ops.triton_kernel_wrap as wrap
import torch.utils._triton
import triton
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

import xlmr
from xlmr.ops import triton as kernels

NOTHING = lambda *args: None
kernels()
warnings.filterwarnings("error", message=".*lru_cache")
interpreted = SimpleNamespace(environ={"TRITON_INTERPRET": "1"})  # to _launch alone: the kernels can run on a CPU
pretended = {
    "os": interpreted, "_target": lru_cache(lambda device: "sm_90"), "_processors": lru_cache(lambda device: 132),
    "_check_ids": NOTHING,  # made on a CPU only
}
for name, module in list(sys.modules.items()):
    for attribute, value in pretended.items():
        if name.startswith("xlmr.kernels.") and hasattr(module, attribute):
            mock.patch.object(module, attribute, value).start()
mock.patch.object(torch.utils._triton, "has_triton", lambda: True).start()
h200 = triton.backends.compiler.GPUTarget("cuda", 90, 32)
triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: h200, get_current_device=lambda: 0))

found = {}  # case -> kernels of each graph
written = {}  # kernel -> arguments


def analysed(index, *args, analyse=wrap.get_mutated_tensors):
    arguments = analyse(index, *args)
    kernel = wrap.kernel_side_table.get_kernel(index)
    while hasattr(kernel.fn, "fn"):
        kernel = kernel.fn
    written.setdefault(kernel.fn.__name__, set()).update(arguments)
    return arguments


mock.patch.object(wrap, "get_mutated_tensors", analysed).start()


def counted(graph, inputs):
    found[case].append(sum("triton_kernel" in str(node.target) for node in graph.graph.nodes))
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    values = [getattr(node, "meta", {}).get("val") for node in output.args[0]]
    return make_boxed_func(lambda *args: [None if v is None else torch.zeros(v.shape, dtype=v.dtype) for v in values])


config = xlmr.XLMRobertaConfig(
    vocab_size=100, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256
)
model = xlmr.XLMRobertaForMaskedLM(config, backend="triton")
packed = torch.randint(4, 99, (300,)), torch.tensor([0, 100, 300], dtype=torch.int32), 200
rows = torch.tensor([3, 20])
cases = {
    "encoder": lambda: model.roberta.forward_packed(*packed),
    "some rows": lambda: model.roberta.forward_packed(*packed, rows=rows),
    "words": lambda: model.topk_packed(*packed, rows=rows, k=5)[0],
    "training": lambda: model.roberta.forward_packed(*packed),
}
for case, call in cases.items():
    torch._dynamo.reset()
    found[case] = []
    model.train(case == "training").to(torch.float32 if case == "some rows" else torch.bfloat16)
    with torch.set_grad_enabled(case == "training"), torch.autocast("cpu", torch.bfloat16, enabled=case == "words"):
        backend = aot_autograd(fw_compiler=counted, bw_compiler=counted)
        result = torch.compile(call, backend=backend, fullgraph=True)()
    if case == "training":
        result.sum().backward()
    del model.roberta.encoder.layer[1:]  # two layers are one graph: of what follows the first layer tells enough
print(json.dumps([found, {kernel: sorted(names) for kernel, names in written.items()}]))
"""

WRITTEN = {
    "_attention_fwd_kernel": {"out_ptr", "lse_ptr"},
    "_attention_bwd_dq_kernel": {"delta_ptr", "dq_ptr"},
    "_attention_bwd_dkv_kernel": {"dk_ptr", "dv_ptr"},
    "_embed_fwd_kernel": {"y_ptr", "mean_ptr", "rstd_ptr"},
    "_embed_bwd_kernel": {"dh_ptr", "dw_ptr", "db_ptr"},
    "_layer_norm_fwd_kernel": {"y_ptr", "mean_ptr", "rstd_ptr"},
    "_layer_norm_bwd_kernel": {"dx_ptr", "dr_ptr", "dw_ptr", "db_ptr"},
    "_linear_fwd_kernel": {"y_ptr"},
    "_linear_dz_kernel": {"dz_ptr", "db_ptr"},
    "_dx_kernel": {"dx_ptr"},
    "_dw_kernel": {"dw_ptr"},
    "_vocab_partials_kernel": {"max_ptr", "sum_ptr", "z_ptr", "column_ptr"},
    "_vocab_topk_kernel": {"log_prob_ptr", "best_ptr", "last_z_ptr"},
}


@pytest.fixture(scope="module")
def traced() -> Any:
    return json.loads(python(SCRIPT, TRITON_INTERPRET="0"))


def test_packed_entry_is_one_graph(traced: Any) -> None:
    """fullgraph=True raises at a graph break; and seven kernels a layer at most, behind those of the embedding."""
    graphs, _ = traced
    assert {case: len(kernels) for case, kernels in graphs.items()} == {
        "encoder": 1, "some rows": 1, "words": 1, "training": 2
    }  # fmt: skip
    assert graphs["encoder"] == [1 + 2 * 7]
    assert graphs["some rows"] == [1 + 7]
    assert graphs["training"][0] == 1 + 7


def test_no_kernel_seems_to_write_what_it_reads(traced: Any) -> None:
    """What a kernel seems to write is copied before and after it, and cannot be kept for the backward pass."""
    _, written = traced
    assert {kernel: set(written[kernel]) for kernel in WRITTEN} == WRITTEN
