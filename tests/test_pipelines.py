"""The pipelines against transformers' on one checkpoint of random weights."""

import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from reference import save_head
from torch import Tensor

import xlmr
from xlmr.demo import CHECKPOINT
from xlmr.pipelines.base import LONG_LIST

FRENCH, CHINESE = "La <mask> de la France est Paris.", "法国的首都是<mask>。"
TWICE = "The <mask> of France is <mask>."
LONG = "The <mask> of France is Paris. " * 20
TEXTS = [FRENCH, "<mask>", TWICE, CHINESE, "عاصمة <mask> هي باريس.", "The capital of France is Paris. <mask>"]


def same(ours: Any, theirs: Any) -> None:
    """Equal structure, types and strings; numbers to fp32's accuracy through this model."""
    assert type(ours) is type(theirs)
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        ours, theirs = list(ours.values()), list(theirs.values())
    if isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for our, their in zip(ours, theirs, strict=True):
            same(our, their)
    elif isinstance(theirs, Tensor):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=2e-5)
    else:
        assert ours == theirs


@pytest.fixture(scope="module")
def fill(checkpoint: Path) -> Any:
    return xlmr.pipeline("fill-mask", checkpoint, device="cpu")


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Any:
    return transformers.pipeline("fill-mask", str(checkpoint), device="cpu")


@pytest.fixture(scope="module")
def extract(checkpoint: Path) -> Any:
    return xlmr.pipeline("feature-extraction", checkpoint, device="cpu")


@pytest.fixture(scope="module")
def reference_extract(checkpoint: Path) -> Any:
    return transformers.pipeline("feature-extraction", str(checkpoint), device="cpu")


@pytest.mark.parametrize(
    ("inputs", "options"),
    [
        (FRENCH, {}),
        ([FRENCH], {}),
        (TEXTS, {}),
        (TEXTS, {"batch_size": 2, "top_k": 1}),
        (TWICE, {"top_k": 3}),
        (CHINESE, {"targets": "法"}),
        (TEXTS, {"targets": ["法", "capital", "法", "▁is", "Париж Paris"], "top_k": 3}),
        (FRENCH, {"targets": ["▁is", ""]}),
        (LONG, {"tokenizer_kwargs": {"truncation": True}, "top_k": 2}),
        (FRENCH, {"tokenizer_kwargs": {"padding": "max_length", "max_length": 40}}),
        (FRENCH, {"tokenizer_kwargs": {"add_special_tokens": False}}),
        ([], {}),
    ],
)
def test_fill_mask_gives_what_the_reference_gives(fill: Any, reference: Any, inputs: Any, options: Any) -> None:
    same(fill(inputs, **options), reference(inputs, **options) if inputs else [])
    same(xlmr.pipeline("fill-mask", fill.model, fill.tokenizer, **options)(inputs), fill(inputs, **options))


@pytest.mark.parametrize(
    ("inputs", "options"),
    [
        ("The capital of France is Paris.", {}),
        (TEXTS, {}),
        ("", {"return_tensors": True}),
        (["", "is"], {"return_tensors": True}),
        (TEXTS, {"return_tensors": True, "batch_size": 1}),
        ([LONG], {"truncation": True}),
        (LONG, {"tokenize_kwargs": {"truncation": True, "max_length": 7}}),
        (TEXTS, {"tokenize_kwargs": {"padding": True, "truncation": True}}),  # each text alone: nothing to pad to
    ],
)
def test_feature_extraction_gives_what_the_reference_gives(
    extract: Any, reference_extract: Any, inputs: Any, options: Any
) -> None:
    same(extract(inputs, **options), reference_extract(inputs, **options))


def test_features_of_padding_are_zeros(extract: Any) -> None:
    plain = extract(FRENCH, return_tensors=True)
    padded = extract(FRENCH, return_tensors=True, tokenize_kwargs={"padding": "max_length", "max_length": 40})
    assert padded.shape == (1, 40, 32)
    assert torch.equal(padded[:, : plain.shape[1]], plain)
    assert not padded[:, plain.shape[1] :].any()


def test_a_text_that_is_too_long_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """By the error: the tokenizer, which knows the limit, does not warn as well."""
    with pytest.raises(ValueError, match=r"^the text 'a <mask>.*' has \d+ tokens, the model takes at most 128"):
        xlmr.pipeline("fill-mask")("a <mask>" * 128)
    assert not caplog.records


def test_a_pipeline_shows_what_it_is(fill: Any, checkpoint: Path) -> None:
    assert repr(fill) == f"FillMaskPipeline({str(checkpoint)!r}, XLMRobertaForMaskedLM, cpu)"


def test_only_the_masked_rows_reach_the_vocabulary(fill: Any) -> None:
    multiplied = []

    def vocab_topk(x: Tensor, *rest: Any) -> Any:
        multiplied.append(len(x))
        return before.vocab_topk(x, *rest)

    before = fill.model.ops
    fill.model.ops = replace(before, vocab_topk=vocab_topk)
    fill(TEXTS)
    fill.model.ops = before
    assert sum(multiplied) == sum(text.count("<mask>") for text in TEXTS)


def test_an_unknown_target_is_announced(fill: Any, caplog: pytest.LogCaptureFixture) -> None:
    fill(FRENCH, targets=["Paris France"])
    assert "'Paris France' is no token of the vocabulary: its first one" in caplog.text


@pytest.mark.parametrize(
    ("inputs", "options", "error", "message"),
    [
        (["a <mask>", "no mask"], {}, ValueError, "the text 'no mask' has no <mask>: put one"),
        (LONG, {}, ValueError, r"has \d+ tokens, the model takes at most 48: .*truncation=True"),
        (FRENCH, {"topk": 3}, TypeError, "'topk' is no option of fill-mask: allowed are top_k, targets"),
        (FRENCH, {"top_k": "3"}, TypeError, r"top_k is '3' \(str\); an int is needed"),
        (FRENCH, {"top_k": 0}, ValueError, r"top_k is 0: allowed are 1 to \d+"),
        (FRENCH, {"top_k": 10**6}, ValueError, "top_k is 1000000: allowed are 1 to"),
        (FRENCH, {"targets": []}, ValueError, "targets names no word"),
        (FRENCH, {"batch_size": 0}, ValueError, "batch_size is 0"),
        (7, {}, TypeError, "inputs is 7: a string, or a list of such, is needed"),
        ([FRENCH, 7], {}, TypeError, "a string, or a list of such, is needed"),
        (
            LONG,
            {"tokenizer_kwargs": {"truncation": True, "return_overflowing_tokens": True}},
            ValueError,
            "each text whole",
        ),
    ],
)
def test_fill_mask_refuses(fill: Any, inputs: Any, options: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        fill(inputs, **options)


def test_pipeline_refuses(fill: Any, extract: Any, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'fill' is no task: allowed are 'fill-mask', 'feature-extraction'"):
        xlmr.pipeline("fill", checkpoint)
    with pytest.raises(TypeError, match=r"fill-mask needs an xlmr\.XLMRobertaForMaskedLM"):
        xlmr.pipeline("fill-mask", extract.model.base_model, extract.tokenizer)
    with pytest.raises(ValueError, match="a model was given without its tokenizer"):
        xlmr.pipeline("fill-mask", fill.model)
    with pytest.raises(TypeError, match="'top_n' is no option of fill-mask"):
        xlmr.pipeline("fill-mask", checkpoint, top_n=3)
    with pytest.raises(ValueError, match="truncation is given twice"):
        extract("a", truncation=True, tokenize_kwargs={"truncation": True})
    with pytest.raises(OSError, match="nowhere"):
        xlmr.pipeline("fill-mask", tmp_path / "nowhere")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
@pytest.mark.parametrize("device", [0, "cuda", torch.device("cuda", 1)])
def test_pipeline_refuses_a_gpu_that_is_not_there(checkpoint: Path, device: Any) -> None:
    with pytest.raises(ValueError, match="PyTorch sees no GPU here"):
        xlmr.pipeline("fill-mask", checkpoint, device=device)


@pytest.mark.parametrize("problem", [None, "multi_label_classification", "regression"])
@pytest.mark.parametrize("options", [{}, {"top_k": 1}, {"top_k": None}, {"top_k": 2, "function_to_apply": "none"}])
def test_text_classification_answers_as_the_reference(
    checkpoint: Path, tmp_path: Path, problem: Any, options: Any
) -> None:
    head = save_head(checkpoint, tmp_path, "SequenceClassification", num_labels=3, problem_type=problem)
    ours, theirs = both("text-classification", head)
    for inputs in ("La France", ["Paris", "La capitale de la France", "a"]):
        same(ours(inputs, **options), theirs(inputs, **options))
    with pytest.raises(ValueError, match="function_to_apply is 'max': allowed are 'sigmoid', 'softmax', 'none'"):
        ours("a", function_to_apply="max")


NLI = {0: "contradiction", 1: "neutral", 2: "entailment"}
BIO = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC", 4: "I-LOC"}


def both(task: str, directory: Path) -> tuple[Any, Any]:
    return xlmr.pipeline(task, directory, device="cpu"), transformers.pipeline(task, str(directory), device="cpu")


def plain(value: Any) -> Any:
    """NumPy's numbers, which the reference's scores are, as Python's."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list) else getattr(value, "tolist", lambda: value)()


@pytest.fixture(scope="module")
def nli(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_head(
        checkpoint, tmp_path_factory.mktemp("nli"), "SequenceClassification", num_labels=3, id2label=NLI,
        label2id={label: i for i, label in NLI.items()},
    )  # fmt: skip


@pytest.fixture(scope="module")
def ner(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    config = {"num_labels": 5, "id2label": BIO, "label2id": {label: i for i, label in BIO.items()}}
    return both("ner", save_head(checkpoint, tmp_path_factory.mktemp("ner"), "TokenClassification", **config))


@pytest.fixture(scope="module")
def qa(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = save_head(checkpoint, tmp_path_factory.mktemp("qa"), "QuestionAnswering")
    return xlmr.pipeline("question-answering", directory, device="cpu")


@pytest.mark.parametrize("task", ["ner", "text-classification"])
def test_their_pipelines_run_our_model_and_tokenizer(ner: Any, nli: Path, task: str) -> None:
    ours = ner[0] if task == "ner" else xlmr.pipeline(task, nli, device="cpu")
    theirs = transformers.pipeline(task, model=ours.model, tokenizer=ours.tokenizer, device="cpu")
    same(ours(["La France", "Paris"]), plain(theirs(["La France", "Paris"])))


def test_text_classification_takes_pairs(nli: Path) -> None:
    ours, theirs = both("text-classification", nli)
    pair = {"text": "La France", "text_pair": "Paris is the capital"}
    for inputs in (pair, [pair, {"text": "Paris"}, "is", {"text": "is", "text_pair": ""}]):
        for options in ({}, {"top_k": None}, {"truncation": True, "max_length": 8}):
            same(ours(inputs, **options), theirs(inputs, **options))
    assert ours(tuple(pair.values())) == ours(pair) != ours("La France")[0]
    made = {"top_k": 2}
    theirs = transformers.pipeline("text-classification", str(nli), device="cpu", **made)
    same(xlmr.pipeline("text-classification", nli, device="cpu", **made)("Paris"), theirs("Paris"))


@pytest.mark.parametrize("strategy", ["none", "simple", "first", "average", "max"])
@pytest.mark.parametrize("ignored", [None, []])
def test_token_classification_answers_as_the_reference(ner: Any, strategy: str, ignored: Any) -> None:
    ours, theirs = ner
    options = {"aggregation_strategy": strategy} | ({} if ignored is None else {"ignore_labels": ignored})
    texts = ["La capitale de la France est Paris.", "Z\u0301 Zzyx, Paris!", "", "日本の首都はパリです。", LONG]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the reference's: that words are guessed
        expected = [plain(theirs(text, **options)) for text in texts]
    same(ours(texts, **options), expected)
    same(ours(texts[0], **options), expected[0])
    assert any(expected)


@pytest.mark.parametrize(
    "options", [{}, {"aggregation_strategy": "max"}, {"aggregation_strategy": "simple", "stride": 9}]
)
@pytest.mark.parametrize("delimiter", [{}, {"delimiter": ""}, {"delimiter": ", "}])
def test_words_are_found_where_they_stand_when_joined(ner: Any, options: Any, delimiter: Any) -> None:
    ours, theirs = ner
    options = {**options, **delimiter, "is_split_into_words": True, "ignore_labels": []}
    one, long = ["La", "capitale", "de la", "France", "", "Paris.", "日本"], LONG.split()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        same(ours(one, **options), plain(theirs(one, **options)))
        same(ours([long, one], **options), [plain(theirs([words], **options))[0] for words in (long, one)])


@pytest.mark.parametrize("strategy", ["simple", "average"])
def test_entities_of_a_long_text_come_from_windows(ner: Any, strategy: str) -> None:
    ours, theirs = ner
    options = {"aggregation_strategy": strategy, "stride": 9, "ignore_labels": ["I-LOC", "O"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        expected = plain(theirs(LONG, **options))
    same(ours([LONG, "Paris"], **options)[0], expected)
    assert expected[-1]["end"] > len(LONG) - 40


@pytest.mark.parametrize("options", [{}, {"multi_label": True}, {"hypothesis_template": "is {}"}])
@pytest.mark.parametrize("labels", [["Paris", "France", "capital"], "Paris , France,", ["Paris"]])
def test_zero_shot_answers_as_the_reference(nli: Path, labels: Any, options: Any) -> None:
    ours, theirs = both("zero-shot-classification", nli)
    for inputs in ("La France", ["The capital", LONG]):
        same(ours(inputs, labels, **options), theirs(inputs, labels, **options))
    named = {"sequences": "La France", "candidate_labels": labels}
    same(ours(**named, **options), theirs(**named, **options))


def qa_contract(
    pipe: Any, question: str, context: str, top_k: int, longest: int, size: int, stride: int, impossible: bool
) -> Any:
    """Version 4's question-answering, written out plainly on transformers' model and tokenizer."""
    directory = pipe.model.config.name_or_path
    model = transformers.XLMRobertaForQuestionAnswering.from_pretrained(directory).eval()
    words = transformers.AutoTokenizer.from_pretrained(directory)
    rows = words(
        question, context, truncation="only_second", max_length=size, stride=stride, return_overflowing_tokens=True
    )
    found: dict[str, Any] = {}
    null = 1.0
    for row, ids in enumerate(rows["input_ids"]):
        with torch.no_grad():
            output = model(torch.tensor([ids]))
        inside = [sequence == 1 for sequence in rows.sequence_ids(row)]
        read = torch.tensor([True, *inside[1:]])
        starts, ends = (
            torch.where(read, logits[0], -10000.0).softmax(0).tolist()
            for logits in (output.start_logits, output.end_logits)
        )
        null = min(null, starts[0] * ends[0])
        spans = [
            (starts[i] * ends[j], i, j)
            for i in range(len(ids))
            for j in range(i, min(i + longest, len(ids)))
            if inside[i] and inside[j]
        ]
        for score, i, j in sorted(spans, reverse=True)[: 2 * top_k + 10]:  # some are one answer, once whole words
            start = rows.word_to_chars(row, rows.token_to_word(row, i), sequence_index=1)[0]
            end = rows.word_to_chars(row, rows.token_to_word(row, j), sequence_index=1)[1]
            text = context[start:end]
            entry = found.setdefault(text.lower(), {"score": 0.0, "start": start, "end": end, "answer": text})
            entry["score"] += score
    answers = list(found.values())
    if impossible:
        answers.append({"score": null, "start": 0, "end": 0, "answer": ""})
    answers = sorted(answers, key=lambda one: -one["score"])[:top_k]
    return answers[0] if len(answers) == 1 else answers


@pytest.mark.parametrize(
    ("top_k", "longest", "size", "stride", "impossible"),
    [(1, 15, 48, 24, False), (3, 15, 48, 24, True), (4, 2, 30, 5, False), (50, 3, 20, 1, True)],
)
def test_question_answering_answers_as_version_4(
    qa: Any, top_k: int, longest: int, size: int, stride: int, impossible: bool
) -> None:
    context = "La capitale de la France est Paris. The capital of France is Paris. " * 3
    for text in (context, "Paris est la capitale"):
        given = {"question": "capitale ?", "context": text}
        ours = qa(
            given, top_k=top_k, max_answer_len=longest, max_seq_len=size, doc_stride=stride,
            handle_impossible_answer=impossible,
        )  # fmt: skip
        same(ours, qa_contract(qa, *given.values(), top_k, longest, size, stride, impossible))
    best = qa(question="capitale ?", context=context)
    assert best["answer"] == context[best["start"] : best["end"]]
    assert qa(question=["capitale ?", "Paris ?"], context=context)[0] == best == qa("capitale ?", context)
    assert qa([{"question": "capitale ?", "context": context}]) == best
    assert qa(question="capitale ?", context="  ") == {"score": 0.0, "start": 0, "end": 0, "answer": ""}


def test_sentence_similarity_is_the_cosine_of_the_vectors(checkpoint: Path) -> None:
    encoder = xlmr.load(checkpoint, pooling="mean", device="cpu")
    pipe = xlmr.pipeline("sentence-similarity", encoder)
    others = ["La France", "capital"]
    source, *rest = encoder.encode(["Paris", *others], normalize=False, output="torch")
    expected = [float(torch.cosine_similarity(source, one, dim=0)) for one in rest]
    given = {"source_sentence": "Paris", "sentences": others}
    assert pipe(given) == pytest.approx(expected)
    assert pipe([given, {**given, "sentences": []}])[1] == []
    assert xlmr.pipeline("sentence-similarity", checkpoint, device="cpu")(given) == pytest.approx(expected)
    for model in (checkpoint, encoder):
        assert xlmr.pipeline("sentence-similarity", model, checkpoint, device="cpu")(given) == pytest.approx(expected)
        with pytest.raises(ValueError, match="they do not belong together"):
            xlmr.pipeline("sentence-similarity", model, CHECKPOINT, device="cpu")
    with pytest.raises(TypeError, match="'source_sentence': …, 'sentences': "):
        pipe("Paris")


def test_no_bar_is_drawn_where_no_one_looks(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many = {"source_sentence": "a", "sentences": ["a"] * LONG_LIST}
    xlmr.pipeline("sentence-similarity", checkpoint, device="cpu")(many)
    xlmr.pipeline("feature-extraction", checkpoint, device="cpu")(many["sentences"])
    assert capsys.readouterr().err.count("text/s") == 0


def test_new_tasks_refuse_what_they_cannot_take(ner: Any, qa: Any, nli: Path, checkpoint: Path) -> None:
    for inputs in ("Paris", [["Paris"], "is"], [3], None):
        with pytest.raises(TypeError, match="a list of words, or a list of such"):
            ner[0](inputs, is_split_into_words=True)
    zero = xlmr.pipeline("zero-shot-classification", nli, device="cpu")
    message = (
        "holds XLMRobertaForMaskedLM, and lacks classifier.* for token-classification give a checkpoint of an xlmr"
    )
    with pytest.raises(ValueError, match=message):
        xlmr.pipeline("ner", checkpoint)
    with pytest.raises(ValueError, match="at least one label"):
        zero("a", [])
    for template in ("is", "is {label}", "is {1}", "{", "{} is {.x}"):
        with pytest.raises(ValueError, match=r"needs a {} where the label goes"):
            zero("a", ["b"], hypothesis_template=template)
    with pytest.raises(ValueError, match="a text is empty"):
        zero(["a", ""], ["b"])
    with pytest.raises(ValueError, match="aggregation_strategy is 'mean': allowed are 'none', 'simple'"):
        ner[0]("a", aggregation_strategy="mean")
    with pytest.raises(ValueError, match="stride needs an aggregation_strategy"):
        ner[0]("a", stride=3)
    with pytest.raises(ValueError, match="max_answer_len is 0; it must be at least 1"):
        qa(question="a", context="b", max_answer_len=0)
    with pytest.raises(ValueError, match="the context is empty"):
        qa(question="a", context="")
    for pipe, given in ((ner[0], None), (ner[0], b"a"), (zero, None), (qa, {"question": "a"}), (qa, b"a")):
        with pytest.raises(TypeError, match=r"inputs is .* is needed"):
            pipe(given)


def test_a_stream_is_answered_as_it_is_read(
    fill: Any, reference: Any, qa: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xlmr.pipelines.base.STREAMED", 2)
    read = []

    def stream() -> Any:
        for text in TEXTS:
            read.append(text)
            yield text

    answers = fill(stream(), batch_size=2)
    first = next(answers)
    assert len(read) == 2
    same([first, *answers], list(reference(stream())))
    same(list(fill(transformers.pipelines.pt_utils.KeyDataset([{"text": FRENCH}] * 3, "text"))), [first] * 3)
    assert len(list(qa(iter([{"question": "who?", "context": "Paris is."}])))) == 1
    with pytest.raises(TypeError, match="a string, or a list of such, is needed"):
        list(fill(iter([3])))


def test_the_references_enumerations(ner: Any, nli: Path) -> None:
    tagger, classifier = ner[0], both("text-classification", nli)[0]
    simple = transformers.pipelines.token_classification.AggregationStrategy.SIMPLE
    sigmoid = transformers.pipelines.text_classification.ClassificationFunction.SIGMOID
    same(tagger(FRENCH, aggregation_strategy=simple), tagger(FRENCH, aggregation_strategy="simple"))
    for written in (sigmoid, "SIGMOID"):
        same(classifier(FRENCH, function_to_apply=written), classifier(FRENCH, function_to_apply="sigmoid"))


def test_the_references_keywords(checkpoint: Path, reference: Any) -> None:
    told = {"torch_dtype": "float32", "device_map": "cpu", "trust_remote_code": False, "framework": "pt"}
    fill = xlmr.pipeline("fill-mask", checkpoint, **told, model_kwargs={"attn_implementation": "sdpa"})
    same(fill(FRENCH, num_workers=0, top_k=None), reference(FRENCH, num_workers=0, top_k=None))
    assert xlmr.pipeline("fill-mask", checkpoint, torch_dtype="bfloat16").model.dtype == torch.bfloat16


@pytest.mark.parametrize("task", ["fill-mask", "sentence-similarity"])
def test_a_checkpoint_in_the_cache_that_is_named(checkpoint: Path, tmp_path: Path, task: str) -> None:
    repository = tmp_path / "models--org--model"
    shutil.copytree(checkpoint, repository / "snapshots/c0ffee")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("c0ffee", encoding="utf-8")
    pipe = xlmr.pipeline(task, "org/model", model_kwargs={"cache_dir": tmp_path, "local_files_only": True})
    assert len(pipe.tokenizer if task == "fill-mask" else pipe.encoder.tokenizer) == pipe.model.config.vocab_size
