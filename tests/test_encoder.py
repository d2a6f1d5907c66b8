"""xlmr.load and Encoder, against sentence-transformers and FlagEmbedding's formulas on transformers' model."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from torch import Tensor

import xlmr
from xlmr import encoder as encoder_module
from xlmr.encode import POOLINGS
from xlmr.sentence_directory import ACTIVATIONS, OLD_POOLINGS

TEXTS = [
    "The capital of France",
    "",
    "法国的首都是巴黎。",
    "Paris is the capital. " * 20,
    "is",
    "عاصمة فرنسا هي باريس.",
]
QUERY = "La capitale de la France"
CLOSE: dict[str, float] = {"atol": 1e-5, "rtol": 1e-4}
TRANSFORMER = "sentence_transformers.base.modules.transformer.Transformer"
MOVED = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"

Write = Callable[..., Path]


@pytest.fixture
def written(checkpoint: Path, tmp_path: Path) -> Write:
    """Writes a sentence-transformers directory by hand: `files`, path → JSON, around the checkpoint."""

    def write(files: dict[str, Any]) -> Path:
        shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return tmp_path

    return write


def listed(*kinds: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (kind, path) in enumerate(kinds)]


def old(modes: tuple[str, ...], **settings: Any) -> dict[str, Any]:
    """The schema of sentence-transformers up to 5."""
    flags = {key: mode in modes for key, mode in OLD_POOLINGS.items()}
    return {
        "modules.json": listed(
            ("sentence_transformers.models.Transformer", ""), ("sentence_transformers.models.Pooling", "1_Pooling")
        ),
        "1_Pooling/config.json": {"word_embedding_dimension": 32, **flags},
        "sentence_bert_config.json": {"max_seq_length": 40, "do_lower_case": False, **settings},
    }


def new(modes: tuple[str, ...], **settings: Any) -> dict[str, Any]:
    """The schema after it."""
    return {
        "modules.json": listed((TRANSFORMER, ""), (MOVED, "1_Pooling")),
        "1_Pooling/config.json": {"embedding_dimension": 32, "pooling_mode": modes[0] if len(modes) == 1 else modes},
        "sentence_bert_config.json": {"transformer_task": "feature-extraction", **settings},
    }


def heads(directory: Path, hidden: int = 32, sparse: int = 1) -> Path:
    torch.manual_seed(1)
    torch.save(torch.nn.Linear(hidden, sparse).state_dict(), directory / "sparse_linear.pt")
    torch.save(torch.nn.Linear(hidden, 24).state_dict(), directory / "colbert_linear.pt")
    return directory


@pytest.fixture(scope="module")
def pairs(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cross-encoder that the library saved."""
    directory = tmp_path_factory.mktemp("pairs")
    CrossEncoder(str(checkpoint), num_labels=1, device="cpu").save_pretrained(str(directory))
    return directory


def reference(directory: Path) -> Any:
    return SentenceTransformer(str(directory), device="cpu")


@pytest.mark.parametrize("schema", [old, new])
@pytest.mark.parametrize("modes", [*((mode,) for mode in POOLINGS), tuple(OLD_POOLINGS.values())], ids="+".join)
def test_every_pooling_of_both_schemas(written: Write, schema: Any, modes: tuple[str, ...]) -> None:
    directory = written(schema(modes))
    theirs, ours = reference(directory), xlmr.load(directory)
    assert ours.max_length == (40 if schema is old else 48) == theirs.max_seq_length
    for include_prompt in (True, False):
        theirs.set_pooling_include_prompt(include_prompt)
        ours.recipe = replace(ours.recipe, include_prompt=include_prompt)
        want = theirs.encode(TEXTS, prompt="The query: ", batch_size=3)
        for batch_tokens in (1, 60, 8192):
            got = ours.encode(TEXTS, prompt="The query: ", batch_tokens=batch_tokens)
            np.testing.assert_allclose(got, want, **CLOSE)
        np.testing.assert_allclose(ours.encode(TEXTS[0], prompt="The query: "), want[0], **CLOSE)


@pytest.fixture(scope="module")
def saved(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with every module and prompts, that the library saved."""
    directory = tmp_path_factory.mktemp("saved")
    prompts = {"query": "query: ", "passage": "passage: "}
    norm = modules.LayerNorm(20)
    torch.nn.init.normal_(norm.norm.weight)
    torch.nn.init.normal_(norm.norm.bias)
    parts = [
        modules.Transformer(str(checkpoint)),
        modules.Pooling(32, ("cls", "mean")),
        modules.Dense(64, 20, activation_function=torch.nn.GELU(), use_residual=True),
        modules.Dense(20, 20, bias=False, activation_function=torch.nn.Identity(), use_residual=True),
        modules.Dropout(0.5),
        norm,
        modules.Normalize(),
    ]
    model = SentenceTransformer(modules=parts, device="cpu", prompts=prompts, default_prompt_name="passage")
    model.save_pretrained(str(directory))
    return directory


def test_dense_normalize_prompts_and_truncation_as_saved(saved: Path) -> None:
    theirs, ours = reference(saved), xlmr.load(saved)
    assert ours.dimension == 20
    for options in ({}, {"prompt_name": "passage"}, {"prompt": ""}, {"prompt": "x ", "truncate_dim": 7}):
        want = theirs.encode(TEXTS, **options)
        np.testing.assert_allclose(ours.encode(TEXTS, **options), want, **CLOSE)
        unit = theirs.encode(TEXTS, normalize_embeddings=True, **options)
        np.testing.assert_allclose(ours.encode(TEXTS, normalize=True, **options), unit, **CLOSE)
    for name in ("encode_query", "encode_document"):
        for options in ({}, {"prompt_name": "passage"}, {"prompt": "x "}):
            want = getattr(theirs, name)(TEXTS, **options)
            np.testing.assert_allclose(getattr(ours, name)(TEXTS, **options), want, **CLOSE)
    free = ours.encode(TEXTS, normalize=False)
    assert np.ptp(np.linalg.norm(free, axis=1)) > 0.1
    np.testing.assert_allclose(free / np.linalg.norm(free, axis=1)[:, None], theirs.encode(TEXTS), **CLOSE)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_torch_s(name: str) -> None:
    x = torch.linspace(-4, 4, 41)
    torch.testing.assert_close(ACTIVATIONS[name](x), getattr(torch.nn, name.rpartition(".")[2])()(x), **CLOSE)


def test_lower_case_is_applied(written: Write) -> None:
    directory = written(old(("mean",), do_lower_case=True))
    texts = ["THE CAPITAL", "ΦΡΑΝΣ. İ"]
    np.testing.assert_allclose(xlmr.load(directory).encode(texts), reference(directory).encode(texts), **CLOSE)


def test_prompts_that_nobody_gave_are_empty_and_vectors_as_long_as_asked_for(written: Write) -> None:
    """Since sentence-transformers 5 there are a query and a document prompt; truncate_dim is a default."""
    config = {"default_prompt_name": "query", "prompts": {}, "truncate_dim": 5}
    directory = written({**new(("mean",)), "config_sentence_transformers.json": config})
    theirs, ours = reference(directory), xlmr.load(directory)
    assert ours.dimension == 5
    for options in ({}, {"prompt_name": "document"}, {"truncate_dim": 3}, {"truncate_dim": 9}):
        np.testing.assert_allclose(ours.encode(TEXTS, **options), theirs.encode(TEXTS, **options), **CLOSE)


def test_a_plain_directory_is_pooled_by_its_mean_and_says_so(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours = xlmr.load(checkpoint)
    assert "does not say how to pool" in caplog.text
    np.testing.assert_allclose(ours.encode(TEXTS), reference(checkpoint).encode(TEXTS), **CLOSE)
    cls = xlmr.load(checkpoint, pooling="cls")
    model, tokenizer = cls.model, cls.tokenizer
    want = xlmr.embed(model, tokenizer, TEXTS, pooling="cls", normalize=False)
    torch.testing.assert_close(cls.encode(TEXTS, output="torch"), want)


# bge-m3


def padded(directory: Path) -> tuple[Any, Tensor]:
    """TEXTS in one padded batch, and transformers' last layer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.XLMRobertaModel.from_pretrained(directory, add_pooling_layer=False)
    batch = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        return batch, model(**batch).last_hidden_state


@pytest.fixture
def m3(written: Write) -> Path:
    files = old(("cls",)) | {"2_Normalize/config.json": {}}
    files["modules.json"] += listed(("sentence_transformers.models.Normalize", "2_Normalize"))
    files["sentence_bert_config.json"]["max_seq_length"] = 48
    return heads(written(files))


def m3_reference(directory: Path) -> dict[str, Any]:
    """FlagEmbedding's contract: relu, special ids dropped, the maximum per id; `<s>` dropped, unit vectors."""
    batch, hidden = padded(directory)
    sparse, colbert = (torch.load(directory / f"{name}_linear.pt") for name in ("sparse", "colbert"))
    weights = F.linear(hidden, **sparse).relu().squeeze(-1)
    vectors = F.normalize(F.linear(hidden[:, 1:], **colbert), dim=-1)
    lexical: list[dict[str, float]] = []
    for ids, row in zip(batch["input_ids"].tolist(), weights.tolist(), strict=True):
        kept = [(i, w) for i, w in zip(ids, row, strict=True) if i > 3 and w > 0]  # 0 … 3: <s>, <pad>, </s>, <unk>
        lexical.append({str(i): max(w for j, w in kept if j == i) for i, _ in kept})
    lens = batch["attention_mask"].sum(1).tolist()
    return {
        "dense_vecs": F.normalize(hidden[:, 0], dim=-1).numpy(),
        "lexical_weights": lexical,
        "colbert_vecs": [row[: n - 1].numpy() for row, n in zip(vectors, lens, strict=True)],
    }


@pytest.mark.parametrize("batch_tokens", [50, 8192])
def test_three_kinds_of_vectors_in_one_pass(m3: Path, batch_tokens: int) -> None:
    want, ours = m3_reference(m3), xlmr.load(m3)
    assert sum(map(len, want["lexical_weights"])) > 10
    got = ours.encode(TEXTS, batch_tokens=batch_tokens, return_sparse=True, return_colbert_vecs=True)
    np.testing.assert_allclose(got["dense_vecs"], want["dense_vecs"], **CLOSE)
    for found, wanted in zip(got["lexical_weights"], want["lexical_weights"], strict=True):
        assert found == pytest.approx(wanted, abs=1e-5)
    for vectors, wanted in zip(got["colbert_vecs"], want["colbert_vecs"], strict=True):
        np.testing.assert_allclose(vectors, wanted, **CLOSE)
    one = ours.encode(TEXTS[3], return_dense=False, return_sparse=True)
    assert one["dense_vecs"] is one["colbert_vecs"] is None
    assert one["lexical_weights"] == pytest.approx(want["lexical_weights"][3], abs=1e-5)
    for item, dense in zip(ours.encode_iter(TEXTS, return_colbert_vecs=True), want["dense_vecs"], strict=True):
        np.testing.assert_allclose(item["dense_vecs"], dense, **CLOSE)
        assert item["lexical_weights"] is None


def test_scores_of_pairs(m3: Path) -> None:
    ours, want = xlmr.load(m3), m3_reference(m3)
    first, second = [0, 2, 3], [3, 5, 0]
    given = [(TEXTS[i], TEXTS[j]) for i, j in zip(first, second, strict=True)]
    got = ours.compute_score(given, weights_for_different_modes=[0.4, 0.2, 0.5])
    for n, (i, j) in enumerate(zip(first, second, strict=True)):
        a, b = want["lexical_weights"][i], want["lexical_weights"][j]
        sparse = sum(a[token] * b[token] for token in a.keys() & b.keys())
        products = np.einsum("id,jd->ij", want["colbert_vecs"][i], want["colbert_vecs"][j])
        colbert = products.max(1).sum() / len(products)
        dense = want["dense_vecs"][i] @ want["dense_vecs"][j]
        assert got["sparse"][n] == pytest.approx(sparse, abs=1e-4)
        assert got["colbert"][n] == pytest.approx(colbert, abs=1e-4)
        assert got["dense"][n] == pytest.approx(dense, abs=1e-4)
        assert got["sparse+dense"][n] == pytest.approx((0.2 * sparse + 0.4 * dense) / 0.6, abs=1e-4)
        both = 0.5 * colbert + 0.2 * sparse + 0.4 * dense
        assert got["colbert+sparse+dense"][n] == pytest.approx(both / 1.1, abs=1e-4)
        assert ours.compute_score(given[n])["dense"] == pytest.approx(dense, abs=1e-4)
    assert ours.compute_score(iter(given)) == ours.compute_score(np.array(given))
    for wrong in (None, "ab", {"a": "b"}, [None], [("a", "b", "c")]):
        with pytest.raises(TypeError, match=r"\(query, passage\), or a list of such pairs, is needed"):
            ours.compute_score(wrong)
    for weights in ([1, 2], [0, 0, 1]):
        with pytest.raises(ValueError, match="three for dense, sparse and colbert"):
            ours.compute_score(given, weights_for_different_modes=weights)
    a, b = want["lexical_weights"][:2], want["lexical_weights"][2:]
    table = ours.compute_lexical_matching_score(a, b)
    assert table.shape == (2, 4)
    assert table[0, 1] == pytest.approx(ours.compute_lexical_matching_score(a[0], b[1]))
    assert isinstance(ours.colbert_score(want["colbert_vecs"][0], want["colbert_vecs"][1]), Tensor)
    words = ours.convert_id_to_token([{"5": 0.5, "6": 0.25}])
    assert words == [{ours.tokenizer.decode(5): 0.5, ours.tokenizer.decode(6): 0.25}]


# Cross-encoders


def test_rerank_as_cross_encoder(pairs: Path) -> None:
    theirs, ours = CrossEncoder(str(pairs), device="cpu"), xlmr.load(pairs)
    query = QUERY + " est " * 30  # longer than half of the limit
    want = theirs.predict([(query, text) for text in TEXTS])
    for batch_tokens in (1, 8192):
        options = {"truncation": "longest_first", "batch_tokens": batch_tokens}
        np.testing.assert_allclose(ours.rerank(query, TEXTS, normalize=True, **options), want, **CLOSE)
    logits = torch.logit(torch.from_numpy(want).double()).numpy()
    np.testing.assert_allclose(ours.rerank(query, TEXTS, truncation="longest_first"), logits, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("query", [QUERY, QUERY * 20])
def test_rerank_as_flag_reranker(pairs: Path, query: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(pairs)
    model = transformers.XLMRobertaForSequenceClassification.from_pretrained(pairs)
    ours, want = xlmr.load(pairs), []
    for text in TEXTS:
        q, p = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (query, text))
        q = q[: 40 * 3 // 4]
        with torch.no_grad():
            want.append(model(torch.tensor([[0, *q, 2, 2, *p[: 40 - 4 - len(q)], 2]])).logits.item())
    np.testing.assert_allclose(ours.rerank(query, TEXTS, max_length=40), want, **CLOSE)
    np.testing.assert_allclose(ours.rerank(query, TEXTS[3], max_length=40), want[3], **CLOSE)
    assert np.isfinite(ours.rerank(query, TEXTS, max_length=17)).all()
    assert ours.rerank(query, []).shape == (0,)


# Long and wrong input


def test_an_iterator_is_read_a_chunk_at_a_time(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_module, "CHUNK_TEXTS", 4)
    monkeypatch.setattr(encoder_module, "CHUNK_CHARACTERS", 700)
    read = 0

    def texts() -> Iterator[str]:
        nonlocal read
        for _ in range(3):
            for text in TEXTS:
                read += 1
                yield text

    ours = xlmr.load(checkpoint)
    want = reference(checkpoint).encode(TEXTS * 3)
    for i, vector in enumerate(ours.encode_iter(texts())):
        assert i < read <= i + 4
        np.testing.assert_allclose(vector, want[i], **CLOSE)
    np.testing.assert_allclose(ours.encode(texts()), want, **CLOSE)
    sizes = [len(chunk) for chunk in encoder_module.chunks(["x" * 300] * 5 + ["y"] * 9)]
    assert sizes == [3, 4, 4, 3]


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (None, TypeError, "NoneType"),
        (b"bytes", TypeError, "bytes"),
        (3, TypeError, "int"),
        ("a\ud800b", ValueError, r"lone surrogate U\+D800"),
    ],
)
def test_what_is_no_text_is_refused_alone_and_in_a_batch(
    checkpoint: Path, pairs: Path, wrong: Any, error: type[Exception], message: str
) -> None:
    ours, cross = xlmr.load(checkpoint), xlmr.load(pairs)
    calls = [
        lambda: ours.encode(wrong),
        lambda: ours.encode(["fine", wrong]),
        lambda: list(ours.encode_iter([wrong])),
        lambda: cross.rerank(wrong, TEXTS),
        lambda: cross.rerank(QUERY, ["fine", wrong]),
        lambda: cross.rerank(QUERY, wrong),
    ]
    for call in calls:
        with pytest.raises(error, match=message):
            call()


def test_ten_megabytes_are_truncated_alone_and_in_a_batch(checkpoint: Path) -> None:
    ours, text = xlmr.load(checkpoint), "Paris is the capital. " * 480_000
    want = ours.encode(text[:2000])
    np.testing.assert_allclose(ours.encode([text, "is"])[0], want, **CLOSE)
    assert ours.encode([]).shape == (0, 32)
    assert ours.encode([], output="torch").shape == (0, 32)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prompt_name": "question"}, ValueError, "'question': this checkpoint has 'query', 'document', 'passage'"),
        ({"prompt_name": ["query"]}, ValueError, "prompt_name is \\['query'\\]"),
        ({"prompt_name": "query", "prompt": "x"}, ValueError, "both given"),
        ({"prompt": 3}, TypeError, "prompt is a int"),
        ({"output": "list"}, ValueError, "output is 'list': allowed are 'numpy', 'torch'"),
        ({"max_length": 49}, ValueError, "allowed are 2 to 48"),
        ({"max_length": "9"}, TypeError, "max_length is '9' \\(str\\); an int is needed"),
        ({"batch_tokens": 9.5}, TypeError, "batch_tokens is 9.5"),
        ({"batch_tokens": 0}, ValueError, "batch_tokens is 0"),
        ({"truncate_dim": 21}, ValueError, "allowed are 1 to 20"),
        ({"return_dense": False}, ValueError, "all False"),
        ({"return_sparse": True}, ValueError, "no sparse_linear.pt"),
        ({"return_colbert_vecs": True}, ValueError, "no colbert_linear.pt"),
    ],
)
def test_encode_refuses(saved: Path, options: Any, error: type[Exception], message: str) -> None:
    ours = xlmr.load(saved)
    for texts in ("one", ["one", "two"]):
        with pytest.raises(error, match=message):
            ours.encode(texts, **options)


def test_each_model_does_what_it_can(saved: Path, pairs: Path) -> None:
    ours, cross = xlmr.load(saved), xlmr.load(pairs)
    with pytest.raises(ValueError, match="cross-encoder"):
        cross.encode(TEXTS)
    with pytest.raises(ValueError, match="no head in it scores pairs"):
        ours.rerank(QUERY, TEXTS)
    with pytest.raises(ValueError, match="allowed are 17 to 48"):
        cross.rerank(QUERY, TEXTS, max_length=16)
    assert xlmr.load(pairs, pooling="cls").encode(TEXTS).shape == (6, 32)
    with pytest.raises(ValueError, match="allowed are 'only_second'"):
        cross.rerank(QUERY, TEXTS, truncation="only_first")
    ours.model.train()
    with pytest.raises(ValueError, match="training mode"):
        ours.encode(TEXTS)
    ours.recipe = replace(ours.recipe, include_prompt=False)
    ours.model.eval()
    with pytest.raises(ValueError, match="nothing is left to pool"):
        ours.encode(TEXTS, prompt="Paris " * 60)


def test_a_bar_counts_texts_where_it_is_asked_for(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = xlmr.load(checkpoint)
    ours.encode(TEXTS)
    assert "6/6" not in capsys.readouterr().err
    ours.encode(TEXTS, show_progress_bar=True, batch_tokens=50)
    assert "6/6" in capsys.readouterr().err


def test_a_bf16_model_gives_fp32_vectors_near_those_of_fp32(m3: Path) -> None:
    kinds = {"return_sparse": True, "return_colbert_vecs": True}
    half, full = (xlmr.load(m3, dtype=dtype).encode(TEXTS, **kinds) for dtype in (torch.bfloat16, torch.float32))
    assert half["dense_vecs"].dtype == half["colbert_vecs"][0].dtype == np.float32
    assert (half["dense_vecs"] * full["dense_vecs"]).sum(1).min() > 0.99
    for a, b in zip(half["colbert_vecs"], full["colbert_vecs"], strict=True):
        assert (a * b).sum(1).mean() > 0.99


# Directories that are refused

MEAN = new(("mean",))
UNKNOWN = "custom_st.Transformer"
RECURRENT = "sentence_transformers.models.LSTM"


SECOND_LAYER = {"text": {"method": "forward", "method_output_name": ["hidden_states", 1]}}
SHORT = {"text": {"max_length": 6}}


def followed(files: dict[str, Any], kind: str, **config: Any) -> dict[str, Any]:
    last = listed((f"sentence_transformers.base.modules.{kind.lower()}.{kind}", "2"))
    return {**files, "modules.json": files["modules.json"] + last, "2/config.json": config}


def changed(files: dict[str, Any], name: str, **content: Any) -> dict[str, Any]:
    return {**files, name: {**files.get(name, {}), **content}}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({**MEAN, "modules.json": listed((UNKNOWN, ""))}, "the module 'custom_st.Transformer'"),
        (
            {**MEAN, "modules.json": listed((TRANSFORMER, ""), (RECURRENT, "1"))},
            "models.LSTM",
        ),
        ({**MEAN, "modules.json": listed((TRANSFORMER, ""), (MOVED, "../1_Pooling"))}, "leaves the directory"),
        ({**MEAN, "modules.json": listed((TRANSFORMER, "/etc"), (MOVED, "1_Pooling"))}, "leaves the directory"),
        ({**MEAN, "modules.json": listed((TRANSFORMER, ""))}, "names no Pooling"),
        ({**MEAN, "modules.json": []}, "the modules none"),
        ({**MEAN, "modules.json": {}}, "an array"),
        ({**MEAN, "modules.json": [{"type": 3}]}, "must have a type and a path"),
        (changed(MEAN, "1_Pooling/config.json", pooling_mode="median"), "pooling is 'median': allowed are 'mean'"),
        (changed(MEAN, "1_Pooling/config.json", pooling_mode=[]), "pooling is 'nothing'"),
        (changed(MEAN, "1_Pooling/config.json", pooling_mode=3), "pooling_mode is 3"),
        (changed(old(("mean",)), "1_Pooling/config.json", pooling_mode_median=True), "'pooling_mode_median'"),
        (changed(MEAN, "1_Pooling/config.json", embedding_dimension=64), "for 64 hidden units, the model has 32"),
        (changed(MEAN, "sentence_bert_config.json", max_seq_length="long"), "max_seq_length is 'long'"),
        (changed(MEAN, "sentence_bert_config.json", transformer_task="fill-mask"), "transformer_task is 'fill-mask'"),
        (
            changed(MEAN, "sentence_bert_config.json", modality_config=SECOND_LAYER),
            "modality_config is .*hidden_states",
        ),
        (changed(MEAN, "sentence_bert_config.json", processing_kwargs=SHORT), "processing_kwargs is .*max_length"),
        (followed(MEAN, "Normalize", module_input_name="token_embeddings"), "module_input_name 'token_embeddings'"),
        (changed(MEAN, "config_sentence_transformers.json", prompts=["query: "]), "as prompts"),
        (changed(MEAN, "config_sentence_transformers.json", default_prompt_name="q"), "'q' as default_prompt_name"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_directories_that_are_refused(written: Write, files: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        xlmr.load(written(files))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"position_embedding_type": "rotary", "lora_adaptations": ["retrieval.query"]}, "jina-embeddings-v3"),
        ({"model_type": "jina_embeddings_v3"}, "jina-embeddings-v3 family"),
        ({"model_type": "new"}, "gte-multilingual"),
        ({"model_type": "nomic_bert"}, "nomic-embed"),
        ({"model_type": "camembert"}, "CamemBERT: its tokenizer"),
        ({"model_type": "t5"}, "T5: its attention sees relative positions"),
        ({"model_type": "roberta"}, r"is not loaded: RoBERTa: its tokenizer is .* BPE; .* xlmr.accelerate\(model\)"),
        ({"model_type": "gpt2"}, "model_type 'gpt2', where 'xlm-roberta' and 'bert' are read"),
        ({"vocab_size": 40}, "the tokenizer has 72 tokens, the model's embeddings 40 rows"),
        ({"architectures": ["XLMRobertaForSequenceClassification"]}, "lacks weights of its XLMRobertaForSeq"),
        ({"architectures": 5}, "architectures is 5; it must be a list of names"),
    ],
)
def test_other_architectures_and_missing_parts_are_refused(
    checkpoint: Path, written: Write, config: dict[str, Any], message: str
) -> None:
    settings = {**json.loads((checkpoint / "config.json").read_text()), **config}
    directory = written({"config.json": settings})
    if "vocab_size" in config:
        cut = transformers.XLMRobertaModel(transformers.XLMRobertaConfig(**settings))
        cut.save_pretrained(directory)
    with pytest.raises(ValueError, match=message):
        xlmr.load(directory)


def test_a_classifier_of_several_labels_is_no_cross_encoder(pairs: Path, tmp_path: Path) -> None:
    shutil.copytree(pairs, tmp_path, dirs_exist_ok=True)
    config = transformers.XLMRobertaConfig.from_pretrained(pairs, num_labels=3)
    transformers.XLMRobertaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has 3 labels.*text-classification"):
        xlmr.load(tmp_path)


class Opens:
    """A pickle that would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def test_hostile_and_wrong_heads_are_refused(m3: Path, tmp_path: Path) -> None:
    trap = tmp_path / "opened"
    torch.save({"weight": Opens(trap)}, m3 / "sparse_linear.pt")
    with pytest.raises(ValueError, match="asks to run code"):
        xlmr.load(m3)
    assert not trap.exists()
    for wrong in ({"hidden": 31}, {"sparse": 2}):
        with pytest.raises(ValueError, match=r"linear\.pt holds the weights .* of shapes"):
            xlmr.load(heads(m3, **wrong))


def test_a_dense_that_does_not_fit_is_refused(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "2_Dense/config.json"
    good = json.loads(path.read_text())
    for wrong, message in [
        ({"activation_function": "os.system"}, "the activation 'os.system'"),
        ({"out_features": 21}, "holds the weights"),
        ({"module_input_name": "token_embeddings"}, "module_input_name 'token_embeddings'"),
    ]:
        path.write_text(json.dumps({**good, **wrong}))
        with pytest.raises(ValueError, match=message):
            xlmr.load(tmp_path)
    path.write_text(json.dumps(good))
    with pytest.raises(ValueError, match="takes vectors of 64 numbers, those before it have 32"):
        xlmr.load(tmp_path, pooling="cls")


def test_a_bert_tree_with_xlm_r_s_tokenizer(written: Write) -> None:
    """multilingual-e5-small, paraphrase-multilingual-MiniLM: positions from 0, two token types, pad_token_id 0."""
    directory = written(new(("mean",)))
    for name in ("model.safetensors", "config.json"):
        (directory / name).unlink()
    config = transformers.BertConfig(
        vocab_size=80, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=48, initializer_range=0.5,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(directory)
    ours = xlmr.load(directory)
    assert ours.max_length == 48
    np.testing.assert_allclose(ours.encode(TEXTS), reference(directory).encode(TEXTS), **CLOSE)
