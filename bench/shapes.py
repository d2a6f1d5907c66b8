"""What the model benchmarks measure: two sizes, batches of fixed and of real lengths, and what each has to compute."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BASE: dict[str, Any] = {
    "vocab_size": 250002, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
}  # fmt: skip
LARGE = {**BASE, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
SIZES = {"base": BASE, "large": LARGE}
LONG = 8194  # positions of a model whose texts are longer than 512 tokens, as bge-m3 has them
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PAIR = ("transformers sdpa", "xlmr eager")
ON_CPU = (*PAIR, "xlmr prepacked")
# Who is ready at once: compiling takes up to a minute a case.
QUICK = (
    "transformers sdpa", "transformers eager", "transformers flash", "xlmr eager", "xlmr triton", "xlmr triton, graph",
)  # fmt: skip
# What each kind of model returns that depends on its inputs.
HEADS = {
    "Model": ("last_hidden_state",),
    "ForMaskedLM": ("logits",),
    "ForCausalLM": ("logits",),
    "ForSequenceClassification": ("logits",),
    "ForTokenClassification": ("logits",),
    "ForQuestionAnswering": ("start_logits", "end_logits"),
    "ForMultipleChoice": ("logits",),
}
# Log-normal lengths in tokens, assumed, not fitted to any corpus: median, sigma of the logarithm, longest.
MIXES = {"queries": (10, 0.5, 64), "sentences": (30, 0.6, 128), "passages": (130, 0.5, 512)}


@dataclass(frozen=True)
class Case:
    """One batch of texts of `lens` tokens through one kind of model. `group` is what it is compared along: "headline",
    "mix", "fixed", "latency" or "head"; `providers` are measured unless others are asked for, None: all."""

    text: str
    lens: tuple[int, ...]
    dtype: str
    group: str
    size: str = "base"
    head: str = "Model"
    providers: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        """What identifies the case, but for its dtype."""
        return ", ".join([self.text, *([self.size] if self.size != "base" else [])])

    @property
    def title(self) -> str:
        return f"{self.name}, {self.dtype}"

    @property
    def sizes(self) -> dict[str, Any]:
        """The encoder's config."""
        sizes = SIZES[self.size]
        long = {"max_position_embeddings": LONG} if max(self.lens) > sizes["max_position_embeddings"] - 2 else {}
        return {**sizes, **long}

    @property
    def settings(self) -> dict[str, Any]:
        """The model's config."""
        return {**self.sizes, **({"is_decoder": True, "use_cache": False} if self.head == "ForCausalLM" else {})}

    @property
    def padding(self) -> float:
        """The share of the padded batch's positions that hold no token."""
        return 1 - sum(self.lens) / (len(self.lens) * max(self.lens))

    def flops(self) -> int:
        """Of one forward of the real tokens, a multiplication and an addition each."""
        return sum(self.work(self.lens))

    def work(self, lens: Sequence[int]) -> tuple[int, int]:
        """Flops of a forward of such texts: of the products with weights, and of attention's two products."""
        own = self.sizes
        N, M, layers = own["hidden_size"], own["intermediate_size"], own["num_hidden_layers"]
        scores = sum(n * n for n in lens) // (2 if self.head == "ForCausalLM" else 1)
        vocabulary = 2 * sum(lens) * N * (N + own["vocab_size"]) if self.head in ("ForMaskedLM", "ForCausalLM") else 0
        return layers * sum(lens) * (8 * N * N + 4 * N * M) + vocabulary, layers * 4 * N * scores


def lengths(texts: int, longest: int, fill: float, seed: int = 0) -> list[int]:
    """Log-normal lengths up to `longest`, the first exactly that, scaled to fill about `fill` of the padded batch."""
    draw = random.Random(seed)
    raw = [draw.lognormvariate(0.0, 0.55) for _ in range(texts - 1)]
    low, high = 0.0, float(longest)
    for _ in range(40):  # bisection on the scale
        scale = (low + high) / 2
        found = [longest, *(min(longest, max(4, round(x * scale))) for x in raw)]
        low, high = (scale, high) if sum(found) < fill * texts * longest else (low, scale)
    return found


def mixed(kind: str, texts: int) -> tuple[int, ...]:
    """Lengths of so many texts of one of the MIXES."""
    median, sigma, longest = MIXES[kind]
    draw = random.Random(0)
    return tuple(min(longest, max(4, round(median * draw.lognormvariate(0.0, sigma)))) for _ in range(texts))


def batch(lens: Sequence[int], vocabulary: int = BASE["vocab_size"]) -> tuple[Tensor, Tensor]:
    """Random ids [B, S] with pads to the right, and their mask."""
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(max(lens)) < torch.tensor(lens)[:, None]).long()
    ids = torch.randint(4, vocabulary - 2, mask.shape, generator=generator)
    return ids.masked_fill(mask == 0, 1), mask


def cases(gpu: bool) -> list[Case]:
    """What a GPU, or a CPU, measures; the most telling first."""
    return _gpu_cases() if gpu else _cpu_cases()


def _headline(dtype: str, providers: tuple[str, ...] | None = None) -> list[Case]:
    lens = tuple(lengths(32, 128, 0.4))
    fill = sum(lens) / (len(lens) * max(lens))
    texts = {f"32 texts, {fill:.0%} fill": lens, "1 text of 32": (32,)}
    return [Case(text, lens, dtype, "headline", providers=providers) for text, lens in texts.items()]


def _gpu_cases() -> list[Case]:
    """Batches of about 16,384 tokens, and single texts."""
    every = tuple(2**i for i in range(5, 14))
    counts = {"queries": 1024, "sentences": 512, "passages": 128}
    found = [case for dtype in DTYPES for case in _headline(dtype)]
    for dtype in DTYPES:
        for size in SIZES:
            found += [_mix(kind, count, dtype, size) for kind, count in counts.items()]
            found += [_fixed(16384 // S, S, dtype, size, QUICK) for S in every]
            found += [_single(S, dtype, size, QUICK) for S in (32, 128, 512, 8192) if (S, size) != (32, "base")]
        found += _heads(32, 128, dtype, QUICK)
    return found


def _cpu_cases() -> list[Case]:
    """Batches of about 1,024 tokens, some of every kind first, for a round ends before the last; all providers in one
    of them, for some take a minute to prepare."""
    mixes = {"passages": 8, "queries": 64}
    found = _headline("bf16", ON_CPU)
    found += [_single(S, "bf16", "base", ON_CPU) for S in (128, 512)]
    found += [_fixed(max(1, 1024 // S), S, "bf16", "base", ON_CPU) for S in (512, 128, 32)]
    found += [_mix(kind, count, "bf16", "base", ON_CPU) for kind, count in mixes.items()]
    found += [_mix("sentences", 32, "bf16", "base"), *_heads(8, 64, "bf16", ON_CPU)]
    found += [_fixed(1, 2048, "bf16", "base", ON_CPU)]
    found += [_single(32, "bf16", "large", ON_CPU), _fixed(1, 512, "bf16", "large", ON_CPU)]
    found += _headline("fp32", ON_CPU)
    found += [_mix(kind, count, "fp32", "base", ON_CPU) for kind, count in {"sentences": 32, **mixes}.items()]
    found.append(_mix("sentences", 32, "bf16", "large", ON_CPU))
    return found + [_fixed(1, 8192, "bf16", size, ON_CPU) for size in SIZES]


def _mix(kind: str, texts: int, dtype: str, size: str, providers: tuple[str, ...] | None = None) -> Case:
    return Case(f"{kind}, {texts:,} texts", mixed(kind, texts), dtype, "mix", size, providers=providers)


def _fixed(texts: int, S: int, dtype: str, size: str, providers: tuple[str, ...] | None = None) -> Case:
    return Case(f"fixed, {texts} × {S:,}", (S,) * texts, dtype, "fixed", size, providers=providers)


def _single(S: int, dtype: str, size: str, providers: tuple[str, ...] | None = None) -> Case:
    return Case(f"1 text of {S:,}", (S,), dtype, "latency", size, providers=providers)


def _heads(texts: int, longest: int, dtype: str, providers: tuple[str, ...] | None = None) -> list[Case]:
    lens = tuple(lengths(texts, longest, 0.4))
    return [
        Case(f"{head}, {texts} texts", lens, dtype, "head", head=head, providers=providers)
        for head in HEADS
        if head != "Model"
    ]
