"""`load(directory)` → Encoder: texts to vectors, queries and passages to scores, as the checkpoint's directory says.

What SentenceTransformer, CrossEncoder, BGEM3FlagModel and FlagReranker do with such a directory, on packed batches.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import adapters
from .arguments import integer
from .encode import (
    at_least_fp32,
    base_of,
    batches,
    check_eval,
    check_length,
    check_pooling,
    choose_device,
    first_logits,
    longest,
    pack,
    pool,
    rows_read,
    tokens_at_once,
)
from .files import read_json, resolve
from .heads import XLMRobertaForSequenceClassification
from .model import XLMRobertaModel
from .multi_vector import (
    TokenHeads,
    colbert_score,
    colbert_vecs,
    compute_lexical_matching_score,
    lexical_weights,
    pair_scores,
    read_token_heads,
)
from .ops import for_inference
from .pretrained import XLMRobertaPreTrainedModel
from .sentence_directory import Dense, LayerNorm, Recipe, check_architecture, l2_normalize, read_recipe
from .tokenizer import XLMRobertaTokenizer

logger = logging.getLogger(__name__)

CHUNK_TEXTS = 8192  # how many texts, or characters, are tokenised and sorted together: what bounds the memory taken
CHUNK_CHARACTERS = 2**23
KEYS = ("dense_vecs", "lexical_weights", "colbert_vecs")
OUTPUTS = ("numpy", "torch")
TRUNCATIONS = ("only_second", "longest_first")
LEAST_PAIR = 17  # tokens: with fewer, ¾ of them and the four special tokens leave a passage no room


class Encoder:
    """A model in eval mode, its tokenizer, and the recipe that turns its last layer into vectors; made by `load`.

    With recipe.pooling it encodes; without, the model is a cross-encoder (a ForSequenceClassification with one label),
    which reranks. max_length: the tokens that a text is truncated to, the least of what positions, tokenizer and
    directory allow. dimension: of the vectors. ValueError where the parts do not fit each other.
    """

    def __init__(
        self, model: Any, tokenizer: XLMRobertaTokenizer, recipe: Recipe | None = None, heads: TokenHeads | None = None
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.recipe = recipe or Recipe()
        self.heads = heads or TokenHeads()
        config = model.config
        if len(tokenizer) > config.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens, the model's embeddings {config.vocab_size} rows: they do "
                "not belong together; put the tokenizer of this checkpoint into its directory"
            )
        limit = longest(model, tokenizer)
        self.max_length = min(limit, self.recipe.max_length or limit)
        self.dimension: int | None = None
        if self.recipe.pooling:
            self._width = _width(self.recipe, config.hidden_size)
            self.dimension = min(self._width, self.recipe.truncate_dim or self._width)
        elif config.num_labels != 1:
            raise ValueError(
                f"the model has {config.num_labels} labels, a cross-encoder has one: for a classifier there is "
                "xlmr.pipeline('text-classification', …)"
            )

    def __repr__(self) -> str:
        pooling = "+".join(self.recipe.pooling)
        what = f"pooling={pooling}, dimension={self.dimension}" if pooling else "scores pairs"
        return f"Encoder({self.model.config.name_or_path!r}, {what}, max_length={self.max_length})"

    def encode(
        self,
        texts: str | Iterable[str],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_tokens: int | None = None,
        max_length: int | None = None,
        normalize: bool | None = None,
        truncate_dim: int | None = None,
        show_progress_bar: bool | None = None,
        output: str = "numpy",
        return_dense: bool = True,
        return_sparse: bool = False,
        return_colbert_vecs: bool = False,
    ) -> Any:
        """The vectors of texts, in their order: fp32 (fp64 for a float64 model) [n, D]; of a single string [D].

        prompt_name, prompt: a prompt of the directory by name, or the text itself, put before each text; by default the
            directory's default prompt.
        batch_tokens: tokens computed at once; by default 8,192, fewer on a CPU (xlmr.encode.tokens_at_once).
        max_length: tokens a text is truncated to, its prompt and the special tokens included.
        normalize: whether vectors have unit length; None: what the directory says.
        truncate_dim: how many numbers of each vector to keep.
        show_progress_bar: on standard error; None: where the logger xlmr.encoder is at INFO.
        output: "numpy", or "torch" for tensors on the CPU.
        return_dense, return_sparse, return_colbert_vecs: asking a bge-m3 for one of the last two makes the result a
            dict, None standing for what was not asked for: dense_vecs; lexical_weights, {token id as a str: weight} a
            text; colbert_vecs, [tokens − 1, D'] a text.

        Any iterable will do: some thousand texts are held at a time. A text's result does not depend on the others.
        Raises TypeError for what is no text, ValueError for wrong options and for a lone surrogate.
        """
        if not self.recipe.pooling:
            raise ValueError("this is a cross-encoder, which gives pairs a score: call rerank(query, passages)")
        self._check(output)
        asked = dict(zip(KEYS, (return_dense, return_sparse, return_colbert_vecs), strict=True))
        wanted = self._check_heads([key for key, on in asked.items() if on])
        prefix = self._prompt(prompt_name, prompt)
        max_length = check_length(max_length, self.max_length)
        skip = self._prompt_tokens(prefix, max_length)
        finish = self._finish(normalize, truncate_dim)
        found: dict[str, Any] = {key: [] for key in wanted}
        with progress(show_progress_bar, texts) as advance:
            for chunk in chunks(texts):
                ids = self._tokenize([prefix + text for text in chunk], max_length)
                part = self._run(ids, wanted, batch_tokens, skip, normalize is not False, advance)
                if return_dense:
                    part["dense_vecs"] = [finish(torch.stack(part["dense_vecs"])).cpu()]
                for key in wanted:
                    found[key] += part[key]
        if return_dense:
            none = torch.empty(0, truncate_dim or self.dimension or 0, dtype=at_least_fp32(self.model.dtype))
            found["dense_vecs"] = torch.cat(found["dense_vecs"] or [none])
        return self._answer(found, isinstance(texts, str), output)

    def encode_query(self, texts: str | Iterable[str], **options: Any) -> Any:
        """`encode` with the prompt "query", unless `options` name another: sentence-transformers' name for queries."""
        return self._encode_as(["query"], texts, options)

    def encode_document(self, texts: str | Iterable[str], **options: Any) -> Any:
        """`encode` with the first there is of the prompts "document", "passage" and "corpus", unless `options` name
        another: sentence-transformers' name for what is searched."""
        return self._encode_as(["document", "passage", "corpus"], texts, options)

    def encode_iter(self, texts: Iterable[str], **options: Any) -> Iterator[Any]:
        """What `encode` gives for each text, one after the other: for more vectors than fit into memory."""
        if isinstance(texts, str):
            raise TypeError("texts is a single string: an iterable of strings is needed")
        for chunk in chunks(texts):
            found = self.encode(chunk, **options)
            if isinstance(found, dict):
                for i in range(len(chunk)):
                    yield {key: None if value is None else value[i] for key, value in found.items()}
            else:
                yield from found

    def rerank(
        self,
        query: str,
        passages: str | Iterable[str],
        *,
        normalize: bool = False,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_tokens: int | None = None,
        max_length: int | None = None,
        truncation: str = "only_second",
        show_progress_bar: bool | None = None,
        output: str = "numpy",
    ) -> Any:
        """How well each passage answers the query, fp32 [n] in the order of `passages`; of a single string one number.

        normalize: logits through a sigmoid (CrossEncoder's default), else as they are (FlagReranker's).
        prompt_name, prompt: put before the query, as in `encode`.
        truncation: "only_second" cuts the query to ¾ of max_length, then the passage to what is left, as FlagReranker;
            "longest_first" takes from the longer of the two, as CrossEncoder.
        max_length: tokens of a pair, special tokens included; the model's limit by default.
        """
        if self.recipe.pooling:
            raise ValueError("this model turns texts into vectors, no head in it scores pairs: call encode(texts)")
        self._check(output)
        if truncation not in TRUNCATIONS:
            raise ValueError(f"truncation is {truncation!r}: allowed are {', '.join(map(repr, TRUNCATIONS))}")
        max_length = check_length(max_length, self.max_length, least=LEAST_PAIR)
        cut: dict[str, Any] = {"max_length": max_length, "truncation": truncation}
        (query,) = next(chunks([query], "query"))
        question = self._ids([self._prompt(prompt_name, prompt) + query])[0]
        if truncation == "only_second":
            question = question[: max_length * 3 // 4]
        scores = [torch.empty(0, dtype=at_least_fp32(self.model.dtype))]
        with progress(show_progress_bar, passages) as advance:
            for chunk in chunks(passages, "passages"):
                pairs = [self.tokenizer.prepare_for_model(question, ids, **cut) for ids in self._ids(chunk)]
                scores.append(self._score([pair["input_ids"] for pair in pairs], batch_tokens, advance))
        found = torch.cat(scores)
        found = found.sigmoid() if normalize else found
        return _converted(found[0] if isinstance(passages, str) else found, output)

    def compute_score(
        self,
        pairs: Iterable[Any],
        *,
        weights_for_different_modes: Sequence[float] = (1.0, 1.0, 1.0),
        max_query_length: int | None = None,
        max_passage_length: int | None = None,
        batch_tokens: int | None = None,
    ) -> dict[str, Any]:
        """bge-m3's scores of pairs (query, passage): lists under colbert, sparse, dense, sparse+dense and
        colbert+sparse+dense; of a single pair numbers. The weights of dense, sparse and colbert make the means."""
        given = _listed(pairs)
        one = bool(given) and isinstance(given[0], str)
        given = [given] if one else [*map(_listed, given)]
        if any(len(pair) != 2 for pair in given):
            raise TypeError(f"pairs is {pairs!r:.80}: (query, passage), or a list of such pairs, is needed")

        def encoded(side: int, max_length: int | None) -> dict[str, Any]:
            options: dict[str, Any] = {"max_length": max_length, "batch_tokens": batch_tokens, "output": "torch"}
            return self.encode([pair[side] for pair in given], return_sparse=True, return_colbert_vecs=True, **options)

        queries, passages = encoded(0, max_query_length), encoded(1, max_passage_length)
        scores = pair_scores(queries, passages, weights_for_different_modes)
        return {name: values[0] for name, values in scores.items()} if one else scores

    # FlagEmbedding has these two as methods of the model
    compute_lexical_matching_score = staticmethod(compute_lexical_matching_score)
    colbert_score = staticmethod(colbert_score)

    def convert_id_to_token(self, lexical_weights: Any) -> Any:
        """The lexical_weights of a text, or a list of them, with the words that the ids stand for."""
        if isinstance(lexical_weights, Mapping):
            return {self.tokenizer.decode([int(token)]): weight for token, weight in lexical_weights.items()}
        return [self.convert_id_to_token(one) for one in lexical_weights]

    # What a call needs

    def _encode_as(self, names: Sequence[str], texts: Any, options: dict[str, Any]) -> Any:
        """`encode` with the first of the prompts `names` that there is, unless the options choose one."""
        chosen = [name for name in names if name in self.recipe.prompts][:1]
        if chosen and options.get("prompt") is None and options.get("prompt_name") is None:
            options["prompt_name"] = chosen[0]
        return self.encode(texts, **options)

    def _check(self, output: str) -> None:
        check_eval(self.model)
        if output not in OUTPUTS:
            raise ValueError(f"output is {output!r}: allowed are {', '.join(map(repr, OUTPUTS))}")

    def _check_heads(self, wanted: list[str]) -> list[str]:
        if not wanted:
            raise ValueError("return_dense, return_sparse and return_colbert_vecs are all False: ask for one of them")
        for key, head in (("lexical_weights", "sparse"), ("colbert_vecs", "colbert")):
            if key in wanted and getattr(self.heads, head) is None:
                raise ValueError(f"the checkpoint has no {head}_linear.pt, so it gives no {key}: this takes a bge-m3")
        return wanted

    def _prompt(self, name: str | None, prompt: str | None) -> str:
        prompts = self.recipe.prompts
        if name is not None and prompt is not None:
            raise ValueError("prompt_name and prompt are both given: give one of them")
        if name is not None and name not in [*prompts]:
            raise ValueError(f"prompt_name is {name!r}: this checkpoint has {', '.join(map(repr, prompts)) or 'none'}")
        if not isinstance(prompt, (str, type(None))):
            raise TypeError(f"prompt is a {type(prompt).__name__}: a str is needed")
        name = name or self.recipe.default_prompt_name
        return prompt if prompt is not None else prompts[name] if name else ""

    def _prompt_tokens(self, prompt: str, max_length: int) -> int:
        """The first tokens of a text that the pooling leaves out: `<s>` and the prompt's, where the recipe says so."""
        if self.recipe.include_prompt or not prompt:
            return 0
        tokens = len(self._tokenize([prompt], max_length)[0])
        if tokens >= max_length:
            raise ValueError(f"the prompt takes all {max_length} tokens of max_length: nothing is left to pool")
        return tokens - 1

    def _finish(self, normalize: bool | None, truncate_dim: int | None) -> Callable[[Tensor], Tensor]:
        """What is done to pooled vectors: the recipe's steps, but for the last normalisation if that is not wanted."""
        if truncate_dim is not None and not 1 <= integer("truncate_dim", truncate_dim) <= self._width:
            raise ValueError(f"truncate_dim is {truncate_dim}: allowed are 1 to {self._width}, the size of a vector")
        steps = self.recipe.steps
        if normalize is False and steps and steps[-1] is l2_normalize:
            steps = steps[:-1]

        def finish(x: Tensor) -> Tensor:
            for step in steps:
                x = step(x)
            x = x[:, : truncate_dim or self.dimension]
            return l2_normalize(x) if normalize else x

        return finish

    @staticmethod
    def _answer(found: dict[str, Any], one: bool, output: str) -> Any:
        answer: dict[str, Any] = dict.fromkeys(KEYS)
        for key, values in found.items():
            rows = values if isinstance(values, Tensor) else [_converted(value, output) for value in values]
            answer[key] = _converted(rows[0] if one else rows, output)
        return answer["dense_vecs"] if list(found) == ["dense_vecs"] else answer

    # What computes

    def _tokenize(self, texts: list[str], max_length: int) -> list[list[int]]:
        return self.tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    @torch.no_grad()
    def _run(
        self,
        ids: list[list[int]],
        wanted: list[str],
        batch_tokens: int | None,
        skip: int,
        normalize: bool,
        advance: Callable[[int], Any],
    ) -> dict[str, list[Any]]:
        """For each text of `ids` what is wanted: pooled vectors as they come from the last layer, the rest finished."""
        modes, tokenizer = self.recipe.pooling, self.tokenizer
        unused = {tokenizer.cls_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
        found: dict[str, list[Any]] = {key: [None] * len(ids) for key in wanted}
        for batch in batches([len(one) for one in ids], tokens_at_once(batch_tokens, self.model)):
            texts = [ids[i] for i in batch]
            packed = pack(texts, self.model.device)
            rows = rows_read(packed, modes) if wanted == ["dense_vecs"] and not skip else None
            x = self.model.forward_packed(*packed, rows=rows)
            heads = self.heads.to(x)
            if "dense_vecs" in found:
                _put(found["dense_vecs"], batch, pool(x, packed, modes, skip))
            if "lexical_weights" in found:
                _put(found["lexical_weights"], batch, lexical_weights(x, heads.sparse, texts, unused))
            if "colbert_vecs" in found:
                vectors = colbert_vecs(x, heads.colbert, [len(text) for text in texts], normalize)
                _put(found["colbert_vecs"], batch, vectors)
            advance(len(batch))
        return found

    @torch.no_grad()
    def _score(self, ids: list[list[int]], batch_tokens: int | None, advance: Callable[[int], Any]) -> Tensor:
        """The logits of pairs, fp32 or more [n], on the CPU."""
        out = torch.empty(len(ids), dtype=at_least_fp32(self.model.dtype))
        for batch in batches([len(one) for one in ids], tokens_at_once(batch_tokens, self.model)):
            packed = pack([ids[i] for i in batch], self.model.device)
            out[batch] = first_logits(self.model, packed)[:, 0].to(out)
            advance(len(batch))
        return out


def chunks(texts: str | Iterable[str], name: str = "texts") -> Iterator[list[str]]:
    """The texts in lists of up to CHUNK_TEXTS; a list ends with the text that brings it to CHUNK_CHARACTERS.

    A single string is one text. TypeError, with its place, for what is none.
    """
    if isinstance(texts, (bytes, bytearray, Mapping)) or not isinstance(texts, Iterable):
        raise TypeError(f"{name} is a {type(texts).__name__}: a str or an iterable of str is needed")
    chunk: list[str] = []
    characters = 0
    for number, text in enumerate([texts] if isinstance(texts, str) else texts):
        if not isinstance(text, str):
            raise TypeError(f"{name}[{number}] is a {type(text).__name__}: a str is needed")
        chunk.append(text)
        characters += len(text)
        if len(chunk) == CHUNK_TEXTS or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


@contextlib.contextmanager
def progress(show: bool | None, texts: Any) -> Iterator[Callable[[int], Any]]:
    """A bar on standard error, as the function that moves it on; `show` None: where the logger is at INFO."""
    if not (logger.isEnabledFor(logging.INFO) if show is None else show):
        yield lambda count: None
        return
    from tqdm import tqdm

    total = 1 if isinstance(texts, str) else len(texts) if isinstance(texts, Sized) else None
    with tqdm(total=total, unit="text") as bar:
        yield bar.update


def _put(values: list[Any], places: list[int], given: Iterable[Any]) -> None:
    for place, value in zip(places, given, strict=True):
        values[place] = value


def _listed(value: Any) -> list[Any]:
    """What is in a list, an array or an iterator; of anything else itself."""
    return list(value) if isinstance(value, Iterable) and not isinstance(value, (str, Mapping)) else [value]


def _converted(value: Any, output: str) -> Any:
    return value.numpy() if output == "numpy" and isinstance(value, Tensor) else value


def _width(recipe: Recipe, hidden_size: int) -> int:
    """The size of a whole vector; ValueError where the modules of a directory do not follow one another."""
    if recipe.hidden_size not in (None, hidden_size):
        raise ValueError(f"the Pooling is for {recipe.hidden_size} hidden units, the model has {hidden_size}")
    size = len(recipe.pooling) * hidden_size
    for step in recipe.steps:
        if isinstance(step, (Dense, LayerNorm)):
            inputs, kind = step.weight.shape[-1], type(step).__name__
            if inputs != size:
                raise ValueError(f"a {kind} module takes vectors of {inputs} numbers, those before it have {size}")
            size = len(step.weight)
    return size


def embed(
    model: XLMRobertaPreTrainedModel,
    tokenizer: XLMRobertaTokenizer,
    texts: Iterable[str],
    *,
    pooling: str | Sequence[str] = "mean",
    normalize: bool = True,
    batch_tokens: int | None = None,
    max_length: int | None = None,
    progress: bool = False,
) -> Tensor:
    """One vector per text: fp32 (fp64 for a float64 model) [len(texts), N], on the CPU, in the order of `texts`.

    pooling: one of xlmr.encode.POOLINGS, see `pool` there; or several, whose vectors are joined.
    normalize: whether each vector is divided by its Euclidean length.
    batch_tokens, max_length: as in `Encoder.encode`.  progress: a bar on standard error.

    Raises TypeError for what is no model of ours, ValueError for an unknown pooling, a wrong max_length, a single
    string, and a model in training mode, whose dropout is random.
    """
    if isinstance(texts, str):
        raise ValueError("texts is a single string: pass a list of strings")
    base = base_of(model)
    check_eval(base)
    encoder = Encoder(base, tokenizer, Recipe(pooling=check_pooling(pooling)))
    options: dict[str, Any] = {"batch_tokens": batch_tokens, "max_length": max_length, "normalize": normalize}
    return encoder.encode(texts, show_progress_bar=progress, output="torch", **options)


def load(
    name_or_dir: str | os.PathLike[str],
    *,
    pooling: str | Sequence[str] | None = None,
    dtype: str | torch.dtype = "auto",
    device: int | str | torch.device | None = None,
    backend: str = "auto",
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Encoder:
    """An Encoder from a directory, or hub name, of sentence-transformers, FlagEmbedding or transformers.

    pooling: modes of xlmr.encode.pool, instead of the directory's.
    dtype: "auto" is the checkpoint's.
    device: by default a GPU where there is one.
    backend: "auto" is the kernels on a GPU and "prepacked" on a CPU: the linear layers' weights are in memory twice
        (see xlmr.prepacked); "eager" keeps them once.
    revision, cache_dir, token, local_files_only: the hub's, see xlmr.files.resolve.

    A directory without modules.json is a cross-encoder if its model is a ForSequenceClassification; a bge-m3 ("cls",
    normalised) if it has bge-m3's heads; else its vectors are the mean, as in sentence-transformers, and a warning says
    so.

    Raises OSError where there is no such checkpoint, or a file is missing; ValueError for another architecture, unknown
    modules and poolings, parts that do not fit each other, missing weights, damaged or hostile files.
    """
    source: dict[str, Any] = {
        "revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only,
    }  # fmt: skip

    def find(filename: str, folder: str) -> Path | None:
        return resolve(name_or_dir, filename, subfolder=folder, **source)

    recipe = read_recipe(find)
    folder = recipe.folder if recipe else ""
    inside = {**source, "subfolder": folder}
    path = find("config.json", folder)
    if path is None:
        if adapters.find(name_or_dir, **inside):
            raise ValueError(
                f"{name_or_dir} is an adapter of PEFT alone: XLMRobertaModel.from_pretrained loads it with its base "
                "model, for xlmr.embed; or merge the two (peft's merge_and_unload), and save that"
            )
        raise FileNotFoundError(f"there is no config.json in {os.path.join(name_or_dir, folder)}")
    config = read_json(path)
    check_architecture(config, name_or_dir)
    lower_case = recipe is not None and recipe.lower_case
    tokenizer = XLMRobertaTokenizer.from_pretrained(name_or_dir, do_lower_case=lower_case, **inside)
    device = choose_device(device)
    settings: dict[str, Any] = {"dtype": dtype, "device": device, "backend": for_inference(backend, device)}
    if _scores_pairs(config, recipe, pooling):
        model = _load_whole(XLMRobertaForSequenceClassification, name_or_dir, **settings, **inside)
        return Encoder(model, tokenizer, recipe or Recipe(pooling=(), prompts={}))
    model = _load_whole(XLMRobertaModel, name_or_dir, add_pooling_layer=False, **settings, **inside)
    heads = read_token_heads(find, model.config.hidden_size)
    recipe = recipe or _default_recipe(heads, pooling, name_or_dir)
    if pooling is not None:
        recipe = replace(recipe, pooling=check_pooling(pooling))
    return Encoder(model, tokenizer, recipe, heads)


def _scores_pairs(config: dict[str, Any], recipe: Recipe | None, pooling: Any) -> bool:
    """Whether the model is a cross-encoder: where no pooling is asked for, modules.json or else config.json says so."""
    if pooling is not None:
        return False
    if recipe is not None:
        return not recipe.pooling
    architectures = config.get("architectures")
    named = architectures if isinstance(architectures, list) else []
    return any(str(name).endswith("ForSequenceClassification") for name in named)


def _load_whole(cls: Any, name_or_dir: str | os.PathLike[str], **options: Any) -> Any:
    """cls.from_pretrained; ValueError where the checkpoint lacks weights."""
    model, info = cls.from_pretrained(name_or_dir, output_loading_info=True, **options)
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"]))
        raise ValueError(f"{name_or_dir} lacks weights of its {cls.__name__}: {missing}")
    return model


def _default_recipe(heads: TokenHeads, pooling: Any, where: Any) -> Recipe:
    """Of a directory without modules.json: bge-m3's if it has its heads, else the mean, like sentence-transformers."""
    if heads.sparse is not None or heads.colbert is not None:
        return Recipe(pooling=("cls",), steps=(l2_normalize,))
    if pooling is None:
        logger.warning("%s does not say how to pool (no modules.json): the mean is taken; load(…, pooling=…)", where)
    return Recipe()
