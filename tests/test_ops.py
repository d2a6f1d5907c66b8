"""The seam: the Triton path end to end against transformers, swaps and refusals; the same text gives the same bits."""

import contextlib
import copy
import pickle
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from numerics import assert_accurate
from reference import HEADS, TINY, B, S, build, double, inputs, keep, masks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import xlmr
from xlmr.kernels import linear
from xlmr.ops import EAGER, Check, checked, resolve, traced, triton
from xlmr.varlen import Sequences

SMALL = {"num_hidden_layers": 2}  # a program costs half a millisecond in the interpreter
BY_TOKEN = ("logits", "start_logits", "end_logits", "last_hidden_state")


def on_kernels(name: str, device: torch.device, **settings: Any) -> tuple[Any, Any]:
    """transformers' model and ours on the kernels, equal weights."""
    reference, ours = build(name, **SMALL, **settings)
    ours.to(device).set_backend("triton")
    return reference, ours


def to(given: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.items()}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in [*HEADS, "Model"]), ("MaskedLM", torch.float16)],
)
def test_heads(name: str, dtype: torch.dtype, device: torch.device, poisoned: None) -> None:
    full = name if name == "Model" else f"For{name}"
    reference, ours = on_kernels(full, device, **({"is_decoder": True} if name == "CausalLM" else {}))
    truth, eager = double(reference), copy.deepcopy(ours).to(dtype)
    ours = ours.to(dtype)
    eager.ops = EAGER
    for kind in ("none", "holes") if name == "Model" else ("holes",):
        given = inputs(name, masks()[kind])
        given.pop("labels", None)
        real = keep(masks()[kind])
        with torch.no_grad():
            mine, theirs = (m(**to(given, device)) for m in (ours, eager))
            exact = truth(**given)
        for field in BY_TOKEN:
            if field in exact:
                values = [out[field].cpu() for out in (mine, theirs, exact)]
                assert_accurate(*((v[real] if v.shape[:2] == (B, S) else v) for v in values))


def test_loss_and_top_words(device: torch.device) -> None:
    reference, ours = on_kernels("ForMaskedLM", device)
    given = inputs("MaskedLM", masks()["right"])
    with torch.no_grad():
        expected = reference(**given)
        lean = ours(**to(given, device), return_logits=False)
        torch.testing.assert_close(lean.loss.cpu(), expected.loss, atol=1e-5, rtol=1e-5)
        real = keep(masks()["right"])
        lengths = real.sum(1)
        cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(device)
        rows = torch.tensor([0, 5, 14, 30], device=device)
        values, words = ours.topk_packed(given["input_ids"][real].to(device), cu_seqlens, S, rows=rows, k=3)
        best = torch.log_softmax(expected.logits[real][rows.cpu()], -1).topk(3)
    torch.testing.assert_close(values.cpu(), best.values, atol=1e-5, rtol=1e-5)
    assert torch.equal(words.cpu(), best.indices)


def test_the_same_text_gives_the_same_bits(device: torch.device, ordered_dot: None) -> None:
    """Alone, among others, in any order, packed or padded, whatever the padding holds: every row is bit for bit so."""
    _, ours = on_kernels("Model", device)
    texts = [torch.randint(4, TINY["vocab_size"], (n,), device=device) for n in (7, 1, 12, 40, 7)]

    def packed(order: list[int]) -> dict[int, Tensor]:
        chosen = [texts[i] for i in order]
        cu_seqlens = torch.tensor([0, *(len(t) for t in chosen)], device=device).cumsum(0)
        with torch.no_grad():
            hidden = ours.forward_packed(torch.cat(chosen), cu_seqlens, 40)
        return dict(zip(order, hidden.split([len(t) for t in chosen]), strict=True))

    together = packed([0, 1, 2, 3, 4])
    for order in ([3, 1, 4, 0, 2], [4, 3]):
        for i, hidden in packed(order).items():
            assert torch.equal(hidden, together[i])
    for i in range(len(texts)):
        assert torch.equal(packed([i])[i], together[i])
    padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=1)
    mask = padded != 1
    for unpad in (True, False):
        ours.unpad = unpad
        for filler in (1, 50):
            with torch.no_grad():
                hidden = ours(torch.where(mask, padded, filler), mask.long()).last_hidden_state
            for i, text in enumerate(texts):
                assert torch.equal(hidden[i, : len(text)], together[i])


class Launched(TorchDispatchMode):
    """Collects what of PyTorch's operations starts a kernel on a GPU: all but views, allocations and questions."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if not (function.is_view or name in ("empty", "promote_types")):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", ["every position", "padded", "packed"])
def test_a_layer_is_seven_launches(form: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own counted too: what one layer more launches. The kernels do not run."""
    ids, mask = torch.randint(4, TINY["vocab_size"], (3, 4), device=device), torch.ones(3, 4, device=device)
    mask[1, 2:] = 0
    launched = Launched()
    monkeypatch.setattr(
        type(linear._linear_fwd_kernel), "run", lambda kernel, *_, **__: launched.names.append(kernel.fn.__name__)
    )
    calls = {
        "every position": lambda model: model(ids),
        "padded": lambda model: model(ids, mask),
        "packed": lambda model: model.forward_packed(ids.flatten(), torch.tensor([0, 4, 5, 12], device=device), 7),
    }
    counts = []
    for layers in (1, 2):
        _, ours = build("Model", num_hidden_layers=layers)
        ours.to(device).set_backend("triton")
        launched.names.clear()
        with torch.no_grad(), launched:
            calls[form](ours)
        counts.append(len(launched.names))
    assert counts[1] - counts[0] == 7


def test_swapped_one_operation_at_a_time(device: torch.device) -> None:
    _, ours = on_kernels("ForMaskedLM", device)
    given = to(inputs("MaskedLM", masks()["right"]), device)
    kernels = triton()
    ours.ops = EAGER
    with torch.no_grad():
        expected = ours(**given).logits
        for name in (
            "embed",
            "attention",
            "linear",
            "linear_act",
            "qkv_projection",
            "add_layer_norm",
            "gelu_layer_norm",
        ):
            ours.ops = replace(EAGER, **{name: getattr(kernels, name)})
            torch.testing.assert_close(ours(**given).logits, expected, atol=2e-5, rtol=1e-4)
    assert pickle.loads(pickle.dumps(ours)).ops == ours.ops
    assert copy.deepcopy(ours).ops == ours.ops


def test_checked_finds_a_wrong_operation(device: torch.device) -> None:
    _, ours = on_kernels("ForMaskedLM", device)
    given = to(inputs("MaskedLM", masks()["right"]), device)
    checks: list[Check] = []
    ours.ops = checked(triton(), checks)
    with torch.no_grad():
        ours(**given)
    assert {c.operation for c in checks} >= {"embed", "attention", "linear", "linear_act", "qkv_projection"}
    assert all(c.right for c in checks)
    checks.clear()
    ours.ops = checked(replace(triton(), linear=lambda *a: triton().linear(*a) * 1.001), checks)
    with torch.no_grad():
        ours(**given)
    assert {c.operation for c in checks if not c.right} == {"linear"}
    assert not Check("x", float("nan"), 0.0, 1.0).right


def test_traced_operations_stand_in_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of torch's profiler; of NVTX where there is a GPU and of Proton where it is imported."""
    _, model = build("ForMaskedLM", **SMALL)
    ids = torch.randint(2, 90, (2, 5))
    expected, model.ops = model(ids).logits, traced(model.ops)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profiler:
        assert torch.equal(model(ids).logits, expected)
    ranges = [event.name for event in profiler.events() if event.name.startswith("xlmr.")]
    assert ranges[:3] == ["xlmr.embed", "xlmr.qkv_projection", "xlmr.attention"]
    assert ranges[-2:] == ["xlmr.gelu_layer_norm", "xlmr.linear"]
    entered: list[str] = []

    @contextlib.contextmanager
    def planted(label: str) -> Iterator[None]:
        entered.append(label)
        yield

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range", planted)
    monkeypatch.setitem(sys.modules, "triton.profiler", SimpleNamespace(scope=planted))
    model.ops.linear(torch.ones(1, 2), torch.ones(2, 2), None)
    assert entered == ["xlmr.linear", "xlmr.linear"]


@pytest.mark.parametrize("name", ["MaskedLM", "SequenceClassification"])
def test_a_training_step(name: str, device: torch.device, poisoned: None) -> None:
    """Loss and gradients of every parameter, against eager's and float64's of transformers."""
    reference, ours = build(f"For{name}", **SMALL)
    ours.to(device)
    eager, truth = copy.deepcopy(ours), double(reference)
    ours.ops = triton()
    given = inputs(name, masks()["right"])
    losses = [m(**to(given, m.device)).loss for m in (ours, eager, truth)]
    assert_accurate(*(loss.detach().cpu() for loss in losses))
    for loss in losses:
        loss.backward()
    exact = dict(truth.named_parameters())
    scale = max(p.grad.abs().max().item() for p in exact.values())
    for (parameter, mine), theirs in zip(ours.named_parameters(), eager.parameters(), strict=True):
        # Factors of three TF32 products keep 22 bits, not 24: an ulp of theirs is four of fp32's.
        assert_accurate(mine.grad.cpu(), theirs.grad.cpu(), exact[parameter].grad, scale=scale, ulps=16)


def test_dropout_follows_the_seed(device: torch.device) -> None:
    _, ours = build("ForMaskedLM", num_hidden_layers=1, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    ours.to(device).train().ops = triton()
    given = {k: v[1:4] for k, v in to(inputs("MaskedLM", masks()["right"]), device).items()}
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        loss = ours(**given, return_logits=False).loss
        found.append([loss.detach(), *torch.autograd.grad(loss, list(ours.parameters()))])
    again, other = ([torch.equal(a, b) for a, b in zip(found[0], step, strict=True)] for step in found[1:])
    assert all(again)
    assert not any(other)
    assert all(value.isfinite().all() for step in found for value in step)


def test_what_kernels_cannot_do_is_eager_by_rule(device: torch.device) -> None:
    reference, ours = on_kernels("Model", device)
    tokens = torch.randint(4, 97, (B, S))
    sees = (torch.rand(B, 1, S, S) < 0.6) | torch.eye(S, dtype=torch.bool)
    bias = torch.zeros(B, 1, S, S).masked_fill(~sees, torch.finfo(torch.float32).min)
    with torch.no_grad():
        mine = ours(tokens.to(device), sees.to(device), output_attentions=True)
        theirs = reference(tokens, bias, output_attentions=True)
    torch.testing.assert_close(mine[0].cpu(), theirs[0], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(mine.attentions[1].cpu(), theirs.attentions[1], atol=2e-5, rtol=1e-4)


def test_autocast_inference_mode_and_compile(device: torch.device) -> None:
    _, ours = on_kernels("Model", device)
    tokens = torch.randint(4, 97, (9,), device=device)
    cu_seqlens = torch.tensor([0, 4, 9], device=device)
    with torch.inference_mode():
        expected = ours.forward_packed(tokens, cu_seqlens, 5)
        with torch.autocast(device.type, torch.float16):
            half = ours.forward_packed(tokens, cu_seqlens, 5)
        compiled = torch.compile(ours.forward_packed, backend="eager")(tokens, cu_seqlens, 5)
    torch.testing.assert_close(half.float(), expected, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(compiled, expected)


def test_resolve_and_the_automatic_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert resolve("auto", cpu)[0] is EAGER
    assert resolve("triton", meta)[0] is triton()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="need a GPU"):
        resolve("triton", cpu)
    with pytest.raises(RuntimeError, match="need a GPU"):
        xlmr.XLMRobertaModel(xlmr.XLMRobertaConfig(**TINY), backend="triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # it may be on its way there
    waiting = xlmr.XLMRobertaModel(xlmr.XLMRobertaConfig(**TINY), backend="triton")
    assert waiting.ops is triton()
    assert "need a GPU" in waiting.backend_report()
    with pytest.raises(RuntimeError, match="need a GPU and the tensors are on 'cpu'"):
        waiting(torch.tensor([[5, 6]]))
    with pytest.raises(ValueError, match="allowed are 'auto', 'eager', 'prepacked', 'triton'"):
        resolve("cuda", cpu)


@pytest.mark.filterwarnings("ignore:Input #. requires gradient and is not a double precision")
@pytest.mark.parametrize("operation", [field for field in vars(EAGER) if field not in ("vocab_topk", "in_chunks")])
def test_gradcheck(operation: str, device: torch.device) -> None:
    """Against finite differences, on the smallest shapes; gradcheck asks for the same bits at a second backward too."""
    T, N = 2, 4
    x, residual, weight, bias = torch.randn(T, N), torch.randn(T, N), torch.randn(3, N), torch.randn(N)
    tokens, lengths = torch.tensor([2, 3]), Sequences.packed(torch.tensor([0, T], device=device), T)
    tables = torch.randn(4, N), torch.randn(2, N), torch.randn(4, N), torch.rand(N) + 0.5, bias
    given: dict[str, list[Any]] = {
        "embed": [tokens, tokens % 2, tokens, *tables, 1e-5, 1],
        "qkv_projection": [x, weight, weight.flip(0), weight.flip(1), bias[1:], bias[:3], bias[1:].flip(0)],
        "attention": [*torch.randn(3, T, 1, 8), lengths, 0.5, True],
        "linear": [x, weight, bias[1:]],
        "linear_act": [x, weight, bias[1:]],
        "add_layer_norm": [x, residual, *tables[3:], 1e-5],
        "gelu_layer_norm": [x, *tables[3:], 1e-5],
        "vocab_cross_entropy": [x, tables[0], bias, torch.tensor([3, -100])],
    }
    kernels = {"eps": 1e-2, "atol": 2e-3, "rtol": 2e-3}  # in fp32, where finite differences are coarse
    for ops, dtype, precision in ((EAGER, torch.double, {}), (triton(), torch.float, kernels)):
        operands = [a.to(device) if isinstance(a, Tensor) else a for a in given[operation]]
        for i, a in enumerate(operands):
            if isinstance(a, Tensor) and a.is_floating_point():
                operands[i] = a.to(dtype, copy=True).requires_grad_()
        assert torch.autograd.gradcheck(getattr(ops, operation), operands, **precision)
