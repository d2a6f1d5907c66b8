"""Who computes a case: transformers in its ways, sentence-transformers, and this package, all with equal weights."""

import copy
import functools
import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import xlmr
from xlmr.encode import pack

from .shapes import DTYPES, HEADS, Case, batch

JUDGE = "transformers sdpa"
GRAPH = "xlmr triton, graph"
FLASH = "flash_attention_2"  # transformers' name
PER_TOKEN = ("Model", "ForMaskedLM", "ForCausalLM", "ForTokenClassification", "ForQuestionAnswering")


class NotHere(Exception):
    """Why a provider cannot compute a case on this machine."""


@dataclass(frozen=True)
class Setting:
    """What every provider of a case gets: the inputs on the device, and transformers' model, whose weights all use."""

    case: Case
    ids: Tensor  # [B, S], or [B/2, 2, S] for multiple choice
    mask: Tensor  # like ids
    reference: Any

    def read(self, output: Any) -> Tensor:
        """The numbers of an output that depend on real tokens, one after the other, in fp32; a tensor has no others."""
        if isinstance(output, Tensor):
            return output.float().flatten()
        found = [output[name] for name in HEADS[self.case.head]]
        if self.case.head in PER_TOKEN:
            found = [t[self.mask.bool()] for t in found]
        return torch.cat([t.float().flatten() for t in found])


Call = Callable[[], Any]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def prepare(case: Case) -> Setting:
    ids, mask = (t.to(device()) for t in batch(case.lens, vocabulary=case.settings["vocab_size"]))
    if case.head == "ForMultipleChoice":
        ids, mask = (t.unflatten(0, (-1, 2)) for t in (ids, mask))
    return Setting(case, ids, mask, reference(case))


@torch.inference_mode(False)  # what is kept may be used outside of it
def reference(case: Case) -> Any:
    """transformers' model with random weights that depend on the seed alone; those of the encoder are shared."""
    model = encoder(case.dtype, tuple(case.sizes.items()))
    if case.head == "Model":
        return model
    torch.manual_seed(0)
    weights = {f"roberta.{name}": tensor for name, tensor in model.state_dict().items()}
    config = transformers.XLMRobertaConfig(**case.settings, attn_implementation="sdpa")
    kind = getattr(transformers, f"XLMRoberta{case.head}")
    return kind.from_pretrained(None, config=config, state_dict=weights, dtype=DTYPES[case.dtype]).eval().to(device())


@functools.lru_cache(maxsize=1)  # drawing 250,002 rows takes seconds; the cases that share them follow one another
def encoder(dtype: str, sizes: tuple[tuple[str, Any], ...]) -> Any:
    """transformers' XLMRobertaModel."""
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = transformers.XLMRobertaConfig(**dict(sizes), attn_implementation="sdpa")
    return transformers.XLMRobertaModel(config, **_bare("Model")).eval().to(device(), DTYPES[dtype])


def _bare(head: str) -> dict[str, Any]:
    return {"add_pooling_layer": False} if head == "Model" else {}


def twin(model: Any, attention: str) -> Any:
    """The same model with another attention; the tensors are shared."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    other = copy.deepcopy(model, shared)
    other.set_attn_implementation(attention)
    return other


def padded(model: Any, given: Setting) -> Call:
    return lambda: model(given.ids, attention_mask=given.mask)


def in_transformers(attention: str, given: Setting) -> Call:
    return padded(twin(given.reference, attention), given)


def flash(given: Setting) -> Call:
    """transformers' own way without padding: the texts in one row, their ends told to flash attention."""
    _need_gpu()
    _need_package("flash_attn")
    _need_encoder(given)
    if given.case.dtype == "fp32":
        raise NotHere("flash attention has no fp32")
    model, rows = twin(given.reference, FLASH), _rows(given)
    positions = torch.cat([torch.arange(n) for n in given.case.lens]).to(given.ids.device) + 2
    ends = {f"cu_seq_lens_{which}": rows.cu_seqlens for which in "qk"}
    longest = {f"max_length_{which}": rows.max_seqlen for which in "qk"}
    return lambda: model(rows.input_ids[None], position_ids=positions[None], **ends, **longest).last_hidden_state[0]


def compiled(given: Setting) -> Call:
    torch.compiler.reset()  # after a few shapes it would go on uncompiled
    return padded(torch.compile(twin(given.reference, "sdpa"), dynamic=False), given)


def sentence_transformers(given: Setting) -> Call:
    """Its modules on the same ids; its way from texts to vectors is in bench_encode."""
    _need_package("sentence_transformers")
    _need_encoder(given)
    from . import bench_encode

    with tempfile.TemporaryDirectory() as folder:  # a tiny checkpoint, of which only the modules' order is used
        bench_encode.write_checkpoint(Path(folder), bench_encode.MODELS["tiny"], given.case.dtype, pairs=False)
        modules = bench_encode.SentenceTransformer(folder, device=str(given.ids.device))
    modules[0].model = twin(given.reference, "sdpa")

    def call() -> dict[str, Tensor]:
        found = modules({"input_ids": given.ids, "attention_mask": given.mask})
        return {"last_hidden_state": found["token_embeddings"]}

    return call


def own(backend: str, head: str, reference: Any) -> Any:
    """This package's model with the weights of transformers' one."""
    config = xlmr.XLMRobertaConfig(**reference.config.to_dict())
    with torch.device("meta"):
        model = getattr(xlmr, f"XLMRoberta{head}")(config, **_bare(head))
    model.load_state_dict(reference.state_dict(), assign=True)
    model.tie_weights()
    model.set_backend(backend)
    return model.eval()


def ours(backend: str, given: Setting) -> Call:
    if backend == "triton":
        _need_gpu()
    if backend == "prepacked" and device().type != "cpu":
        raise NotHere("packs weights for a CPU")
    return padded(own(backend, given.case.head, given.reference), given)


def graph(given: Setting) -> Call:
    """One launch for the whole forward over packed rows; the answer's rows are overwritten by the next call."""
    _need_gpu()
    _need_encoder(given)
    model, rows = own("triton", "Model", given.reference), _rows(given)
    return captured(lambda: model.forward_packed(*rows))


def captured(call: Call) -> Call:
    """`call` as a CUDA graph."""
    for _ in range(2):  # what is compiled or allocated for good comes before
        call()
    torch.cuda.synchronize()
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        out = call()

    def replay() -> Tensor:
        recorded.replay()
        return out

    return replay


def _rows(given: Setting) -> Any:
    return pack([row[:n] for row, n in zip(given.ids.tolist(), given.case.lens, strict=True)], given.ids.device)


def _need_package(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise NotHere(f"{name} is not installed")


def _need_gpu() -> None:
    if not torch.cuda.is_available():
        raise NotHere("needs a GPU")


def _need_encoder(given: Setting) -> None:
    if given.case.head != "Model":
        raise NotHere("measured for the encoder alone")


PROVIDERS: dict[str, Callable[[Setting], Call]] = {
    JUDGE: functools.partial(in_transformers, "sdpa"),
    "transformers eager": functools.partial(in_transformers, "eager"),
    "transformers compiled": compiled,
    "transformers flash": flash,
    "sentence-transformers": sentence_transformers,
    "xlmr eager": functools.partial(ours, "eager"),
    "xlmr prepacked": functools.partial(ours, "prepacked"),
    "xlmr triton": functools.partial(ours, "triton"),
    GRAPH: graph,
}
