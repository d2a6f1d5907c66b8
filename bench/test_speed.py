"""The kernel benchmarks as pytest-benchmark's: `pytest bench --benchmark-only`, grouped by shape."""

import pytest
import torch

from . import bench_attention, bench_embedding, bench_layer_norm, bench_linear, bench_vocab_softmax, harness

FILES = (bench_attention, bench_embedding, bench_layer_norm, bench_linear, bench_vocab_softmax)
CASES = [case for file in FILES for case in file.cases("bf16" if torch.cuda.is_available() else "fp32")]


@pytest.mark.parametrize(
    ("case", "provider", "mode"),
    [
        pytest.param(case, provider, mode, id=f"{case.operation}-{mode}-{provider}-{case.shape}".replace(" ", ""))
        for case in CASES
        for mode in (harness.MODES if case.wanted else ("forward",))
        for provider in case.providers
    ],
)
def test_speed(case: harness.Case, provider: str, mode: str, benchmark: pytest.FixtureRequest) -> None:
    """A provider that is wrong fails before it is timed."""
    assert harness.check(case, case.providers[provider], mode).right
    call = harness.timed(case.providers[provider], case, mode)
    benchmark.group = f"{case.operation}, {mode}: {case.shape}"

    def finished() -> None:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    benchmark(finished)
