"""backend="prepacked": eager's numbers from packed weights, which follow every change of the parameters."""

import copy
import pickle
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from reference import HEADS, build, inputs, masks
from torch import nn

import xlmr
from xlmr import eager, prepacked
from xlmr.ops import EAGER, resolve
from xlmr.prepacked import PackedLinear

PACK = torch.ops.mkldnn._reorder_linear_weight


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> Iterator[mock.Mock]:
    """Counts how often a weight is packed, however small."""
    monkeypatch.setattr(prepacked, "TINY", 0)
    with mock.patch.object(torch.ops.mkldnn, "_reorder_linear_weight", side_effect=PACK) as counted:
        yield counted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", [name for name in HEADS if name != "CausalLM"])
def test_heads(name: str, dtype: torch.dtype, packings: mock.Mock) -> None:
    _, ours = build(f"For{name}")
    given = inputs(name, masks()["holes"])
    ours.to(dtype).set_backend("eager")
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    with torch.no_grad():
        expected = ours(**given).to_tuple()
        ours.set_backend("prepacked")
        first = ours(**given).to_tuple()
        for mine, theirs in zip(first, expected, strict=True):
            torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance)
        count = packings.call_count
        assert count >= 4 * ours.config.num_hidden_layers  # every linear layer of every layer, queries to values in one
        for again, mine in zip(ours(**given).to_tuple(), first, strict=True):
            assert torch.equal(again, mine)
    assert packings.call_count == count


def test_a_changed_weight_is_packed_again(packings: mock.Mock) -> None:
    layer, packed, x = nn.Linear(16, 24), PackedLinear(), torch.randn(5, 16)
    changes: list[Callable[[nn.Linear], object]] = [
        lambda layer: None,
        lambda layer: layer.weight.add_(1.0),
        lambda layer: layer.load_state_dict({"weight": torch.randn(24, 16), "bias": torch.randn(24)}),
        lambda layer: setattr(layer.weight, "data", torch.randn(24, 16)),
        lambda layer: layer.to(torch.bfloat16),
    ]
    with torch.no_grad():
        for i, change in enumerate(changes):
            change(layer)
            found = packed.linear(x.to(layer.weight.dtype), layer.weight, layer.bias)
            torch.testing.assert_close(found, layer(x.to(layer.weight.dtype)), atol=0.05 if i == 4 else 1e-6, rtol=0.02)
            assert packings.call_count == i + 1
    del layer
    assert not packed._packed


def test_queries_keys_and_values_are_packed_as_one(packings: mock.Mock) -> None:
    leaves, packed, x = [nn.Linear(16, out) for out in (16, 16, 24)], PackedLinear(), torch.randn(5, 16)
    weights, biases = [leaf.weight for leaf in leaves], [leaf.bias for leaf in leaves]
    with torch.no_grad():
        for changed in (None, weights[2], biases[1]):
            if changed is not None:
                changed.mul_(2.0)
            for leaf, found in zip(leaves, packed.qkv_projection(x, *weights, *biases), strict=True):
                torch.testing.assert_close(found, leaf(x))
        assert packings.call_count == 3
        for _ in range(2):  # the queries alone, as where few rows are computed: both are kept
            torch.testing.assert_close(packed.linear(x, weights[0], biases[0]), leaves[0](x))
            packed.qkv_projection(x, *weights, *biases)
        assert packings.call_count == 4
        q, _, _ = packed.qkv_projection(x, *weights, biases[0], None, biases[2])
        torch.testing.assert_close(q, leaves[0](x))


@pytest.mark.parametrize("look", ["before the step", "after it", "never"])
def test_a_step_of_an_optimizer_is_followed(look: str, packings: mock.Mock) -> None:
    """torch's fused ones, a Trainer's default, change weights without a trace."""
    layer, packed, x = nn.Linear(16, 24), PackedLinear(), torch.randn(5, 16)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)

    @torch.no_grad()
    def check() -> None:
        torch.testing.assert_close(packed.linear(x, layer.weight, layer.bias), layer(x))

    for _ in range(2):
        check()
        packed.linear(x, layer.weight, layer.bias).square().sum().backward()
        if look == "before the step":
            check()
        optimizer.step()
        if look == "after it":
            check()
        optimizer.zero_grad()
    check()
    assert packings.called


def test_a_step_is_followed_whatever_is_packed_together(packings: mock.Mock) -> None:
    leaves, packed, x = [nn.Linear(16, 16).requires_grad_(False) for _ in range(3)], PackedLinear(), torch.randn(5, 16)
    weights, biases = [leaf.weight for leaf in leaves], [leaf.bias for leaf in leaves]
    learning = weights[1], biases[1]
    optimizer = torch.optim.AdamW(leaves[1].requires_grad_(True).parameters(), lr=0.1, fused=True)
    for together in (True, False):
        for _ in range(2):
            with torch.no_grad():
                for leaf, found in zip(leaves, packed.qkv_projection(x, *weights, *biases), strict=True):
                    torch.testing.assert_close(found, leaf(x))
                torch.testing.assert_close(packed.linear(x, *learning), leaves[1](x))
            learns = (
                packed.qkv_projection(x, *weights, *biases)[1] if together else packed.linear(x, weights[1], biases[1])
            )
            learns.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()


def test_a_model_made_in_inference_mode_is_packed(packings: mock.Mock) -> None:
    with torch.inference_mode():
        layer, packed, x = nn.Linear(16, 24), PackedLinear(), torch.randn(5, 16)
        for _ in range(2):
            torch.testing.assert_close(packed.linear(x, layer.weight, layer.bias), layer(x))
    assert packings.call_count == 1


def test_what_is_not_packed_is_eager(packings: mock.Mock) -> None:
    layer, packed, x = nn.Linear(16, 24), PackedLinear(), torch.randn(5, 16)
    packed.linear(x, layer.weight, layer.bias).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert packed.linear(x, layer.weight, layer.bias).dtype == torch.bfloat16
        packed.linear(x, layer.weight.clone(), layer.bias)  # a temporary
        packed.linear(x.double(), nn.Parameter(layer.weight.double()), layer.bias.double())
        torch.compile(packed.linear, backend="eager", fullgraph=True)(x, layer.weight, layer.bias)
        with mock.patch.object(prepacked, "TINY", 5 * 16 * 24 + 1):
            packed.linear(x, layer.weight, layer.bias)
    assert packings.call_count == 0
    with pytest.raises(ValueError, match="fuses 'gelu' only"), torch.no_grad():
        packed.linear_act(x, layer.weight, layer.bias, "relu")


def test_copies_pack_their_own() -> None:
    _, ours = build("Model")
    ours.set_backend("prepacked")
    tokens = torch.tensor([[0, 7, 2]])
    with torch.no_grad():
        expected = ours(tokens)[0]
        for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert other.ops is not ours.ops
            torch.testing.assert_close(other(tokens)[0], expected)
            other.encoder.layer[0].output.dense.weight.mul_(2.0)
            assert not torch.allclose(other(tokens)[0], expected)
            torch.testing.assert_close(ours(tokens)[0], expected)


def test_where_it_runs(monkeypatch: pytest.MonkeyPatch, checkpoint: str) -> None:
    with pytest.raises(RuntimeError, match="packed for a CPU, and the parameters are on 'cuda'"):
        resolve("prepacked", torch.device("cuda"))
    assert "packed" in xlmr.load(checkpoint).model.backend_report()
    assert xlmr.load(checkpoint, backend="eager").model.ops is EAGER
    assert "packed" in xlmr.pipeline("feature-extraction", checkpoint).model.backend_report()
    monkeypatch.setattr(eager, "ONEDNN_DTYPES", frozenset())
    with pytest.raises(RuntimeError, match="has no oneDNN"):
        resolve("prepacked", torch.device("cpu"))
    assert xlmr.load(checkpoint).model.ops is EAGER
