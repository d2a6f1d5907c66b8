"""What every test starts from: no network, fixed seeds, a deterministic hypothesis, and one tiny checkpoint."""

import importlib.util
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers and huggingface_hub are imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else the reference's tokenizer warns in forked children

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from hypothesis import settings

torch.set_num_threads(1)  # the models are tiny: a second thread only waits

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: kernels run on the CPU

KERNEL_TESTS = (
    "attention",
    "bench",
    "dropout",
    "embedding",
    "gates",
    "gelu",
    "layer_norm",
    "linear",
    "ops",
    "vocab_softmax",
)
HAS_TRITON = importlib.util.find_spec("triton") is not None
collect_ignore = [] if HAS_TRITON else [f"test_{name}.py" for name in KERNEL_TESTS]

if HAS_TRITON:
    import interpreter

    from xlmr import ops

    ops.triton()  # decorates the kernels, which reads the variable: some tests take it away, the first of a run perhaps


def pytest_report_header() -> str:
    return "kernels: tested" if HAS_TRITON else "kernels: NOT tested, Triton is missing (pip install '.[triton]')"


settings.register_profile("xlmr", derandomize=True, deadline=None, database=None)
settings.load_profile("xlmr")


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


SENTENCES = [
    "The capital of France is Paris.",
    "La capitale de la France est Paris.",
    "Столица Франции – Париж.",
    "法国的首都是巴黎。",
    "フランスの首都はパリです。",
    "عاصمة فرنسا هي باريس.",
]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory that transformers wrote: a masked language model of random weights, its own vocabulary."""
    directory = tmp_path_factory.mktemp("checkpoint")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 3), model_writer=model, vocab_size=200, hard_vocab_limit=False,
        character_coverage=1.0, normalization_rule_name="identity", num_threads=1, minloglevel=2,
    )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    special = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    learnt = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(3, len(pieces))]
    tokenizer = transformers.XLMRobertaTokenizer(vocab=[*special, *learnt, ("<mask>", 0.0)], model_max_length=48)
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = transformers.XLMRobertaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=50, type_vocab_size=1, layer_norm_eps=1e-5, initializer_range=0.5,
    )  # fmt: skip
    transformers.XLMRobertaForMaskedLM(config).save_pretrained(directory)
    return directory


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shard", metavar="I/N", help="of the tests of kernels only every N-th, from the I-th on (from 0)"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks the tests of kernels, so that `pytest -m cuda` runs them all on a GPU and nothing else."""
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker("cuda")
    if shard := config.getoption("--shard", default=None):
        first, count = map(int, shard.split("/"))
        items[:] = [item for item in items if item.get_closest_marker("cuda")][first::count]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The config of a tiny model, in XLM-R base's place in the benchmarks."""
    from bench import shapes

    small = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    monkeypatch.setitem(shapes.SIZES, "base", {**shapes.BASE, **small, "intermediate_size": 64})
    return shapes.SIZES["base"]


@pytest.fixture
def known_roofs(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 Tflop/s and 1 GB/s, and no time spent on measuring them."""
    from bench import harness

    for name in ("roofs", "measured_roofs"):
        monkeypatch.setattr(harness, name, lambda dtype, **_: (1e12, 1e9))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels are tested: a GPU where there is one, else the CPU under Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN: a kernel that leaves an element unwritten, or reads one, is found out."""
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)

        def poison(*args: Any, allocate: Any = allocate, **kwargs: Any) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(torch, name, poison)


@pytest.fixture
def ordered_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums a step's products one after the other, then adds them to those of earlier steps: one order, as on a GPU.
    The interpreter's BLAS has another for every shape, and for some places in a tile."""

    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self: Any, *operands: Any) -> Any:
        a, b, acc = (interpreter.widened(self, operand).data for operand in operands[:3])
        total = np.zeros_like(acc)
        for k in range(a.shape[1]):
            total = total + a[:, k, None].astype(total.dtype) * b[k].astype(total.dtype)
        return TensorHandle(acc + total, operands[2].dtype.scalar)

    if not torch.cuda.is_available():
        monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
