"""The kernel benchmarks as pytest-benchmark's: `pytest bench --benchmark-only`, grouped by shape.

On a CPU in fp32 the cases of up to 7 GFLOP, all but the whole vocabulary, in about a minute on two cores;
bench_<kernel> measures everything.
"""

import pytest
import torch

from . import bench_attention, bench_embedding, bench_layer_norm, bench_linear, bench_vocab_softmax, harness

FILES = (bench_attention, bench_embedding, bench_layer_norm, bench_linear, bench_vocab_softmax)
GPU = torch.cuda.is_available()
CASES = [case for file in FILES for case in file.cases("bf16" if GPU else "fp32") if GPU or case.cost(False)[0] <= 7e9]


@pytest.mark.benchmark(max_time=0.03, min_rounds=3)
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
        if GPU:
            torch.cuda.synchronize()

    benchmark(finished)
