"""The command line: what stands on standard output, what on standard error, and the exit status."""

import errno
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from reference import save_head

import xlmr
from xlmr import __main__, cli, terminal

TEXTS = ["La <mask> de la France est Paris.", "法国的首都是<mask>。", "The <mask> of France is <mask>."]


@pytest.fixture(autouse=True)
def _as_users_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # set for the kernels' tests


@pytest.fixture
def run(checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command on the tiny checkpoint; gives (exit status, standard output, standard error)."""

    def run(command: str, *args: object, stdin: bytes = b"", model: object = checkpoint) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()  # what transformers wrote while it made the checkpoint
        status = cli.main([command, *map(str, args), "--model", str(model), "--device", "cpu"])
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def fill(checkpoint: Path) -> Any:
    return xlmr.pipeline("fill-mask", checkpoint, device="cpu")


def test_fill_mask_writes_the_pipelines_answers_as_json(run: Any, fill: Any) -> None:
    status, out, err = run("fill-mask", "--json", "--top-k", 2, "--target", "法", "--target", "capital", *TEXTS)
    assert (status, err) == (0, "")
    answers = fill(TEXTS, top_k=2, targets=["法", "capital"])
    want = [{"text": text, "answers": answer} for text, answer in zip(TEXTS, answers, strict=True)]
    assert [json.loads(line) for line in out.splitlines()] == want


def test_fill_mask_writes_a_table_for_people(run: Any, fill: Any) -> None:
    status, out, _ = run("fill-mask", "--top-k", 3, *TEXTS)
    lines = out.splitlines()
    assert status == 0
    assert [line for line in lines if line[0] != " "] == TEXTS
    rows = [answer for answers in fill(TEXTS[:2], top_k=3) for answer in answers]
    rows += [answer for answers in fill(TEXTS[2], top_k=3) for answer in answers]
    shown = [line for line in lines if line[0] == " "]
    for line, answer in zip(shown, rows, strict=True):
        assert f"{answer['score']:.4f}" in line
        assert line.endswith(answer["sequence"])
    assert [line.split("  ")[1] for line in shown[6:]] == ["mask 1", "", "", "mask 2", "", ""]


@pytest.mark.parametrize("text", ["中文字", "ｶﾞ", "हिन्दी", "e\u0301te\u0301", "ascii"])
def test_tables_align_by_cells_not_by_characters(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_table([(text, "|"), ("longer than all", "|")])
    first, second = capsys.readouterr().out.splitlines()
    cells = {"中文字": 6, "ｶﾞ": 2, "हिन्दी": 5, "e\u0301te\u0301": 3, "ascii": 5}[text]
    assert second.index("|") == len("  longer than all  ")
    assert first == f"  {text}{' ' * (15 - cells)}  |"


def test_control_characters_do_not_reach_the_terminal(run: Any) -> None:
    status, out, _ = run("fill-mask", "\x1b[31m<mask>\x07")
    assert status == 0
    assert "\x1b" not in out
    assert "\x07" not in out


def test_json_is_one_line_whatever_ends_one(run: Any) -> None:
    text = "a\u2028b\u2029c\x85d\x9be"
    status, out, _ = run("embed", "--json", stdin=text.encode())
    assert status == 0
    [line] = out.splitlines()
    assert json.loads(line)["text"] == text
    assert line.isprintable()


@pytest.mark.parametrize("stdin", ["a b\n\nc\n", "a b\r\n\r\nc\r\n", "\ufeffa b\n\nc"])
def test_embed_reads_one_text_a_line_and_writes_one_vector_a_line(run: Any, fill: Any, stdin: str) -> None:
    status, out, err = run("embed", "--json", stdin=stdin.encode())
    assert (status, err) == (0, "")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["text"] for row in rows] == ["a b", "", "c"]
    want = xlmr.embed(fill.model, fill.tokenizer, ["a b", "", "c"])
    torch.testing.assert_close(torch.tensor([row["embedding"] for row in rows]), want)


def test_embed_makes_vectors_as_the_directory_says(run: Any, checkpoint: Path, tmp_path: Path) -> None:
    """Pooling and lower case of a sentence-transformers directory; --pooling overrules the first."""
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    kinds = (("Transformer", ""), ("Pooling", "1_Pooling"))
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in kinds]
    (tmp_path / "1_Pooling").mkdir()
    for name, content in (
        ("modules.json", modules),
        ("1_Pooling/config.json", {"word_embedding_dimension": 32, "pooling_mode_cls_token": True}),
        ("sentence_bert_config.json", {"max_seq_length": 40, "do_lower_case": True}),
    ):
        (tmp_path / name).write_text(json.dumps(content))
    for options in ({}, {"pooling": "max"}):
        line = [word for name, value in options.items() for word in (f"--{name}", value)]
        status, out, err = run("embed", "--json", *line, "LA France", "c", model=tmp_path)
        assert (status, err) == (0, "")
        want = xlmr.load(tmp_path, device="cpu", **options).encode(["la france", "c"], normalize=True)
        np.testing.assert_allclose([json.loads(row)["embedding"] for row in out.splitlines()], want, atol=1e-6)


def test_embed_writes_an_array_or_leaves_the_old_one(run: Any, fill: Any, tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "new" / "vectors.bin"
    options = ["--pooling", "cls", "--no-normalize", "--max-length", 6, "--output", path]
    status, out, err = run("embed", *options, *TEXTS)
    assert (status, out, err) == (0, "", f"{path}: 3 vectors of 32 numbers\n")
    want = xlmr.embed(fill.model, fill.tokenizer, TEXTS, pooling="cls", normalize=False, max_length=6)
    np.testing.assert_allclose(np.load(path), want.numpy(), rtol=1e-5, atol=1e-6)

    def fail(file: Any, array: Any) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "disk full", "file.write")

    assert json.loads(run("embed", "--json", "--output", path, "a")[1]) == {"path": str(path), "vectors": 1, "size": 32}
    run("embed", *options, *TEXTS)
    monkeypatch.setattr(np, "save", fail)
    assert run("embed", "--output", path, "a") == (1, "", f"xlmr embed: [Errno 28] disk full: '{path.parent}'\n")
    assert np.load(path).shape == (3, 32)
    assert list(path.parent.iterdir()) == [path]


def test_embed_shows_the_beginning_of_each_vector(run: Any) -> None:
    status, out, _ = run("embed", "a b", "c")
    assert status == 0
    assert [line.endswith(f"… 32 numbers  {text}") for line, text in zip(out.splitlines(), ["a b", "c"], strict=True)]


@pytest.fixture(scope="module")
def heads(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes directories of the tiny checkpoint with another head of `count` labels."""

    def make(name: str, count: int, labels: Any = None) -> Path:
        options = {} if labels is None else {"id2label": dict(enumerate(labels))}
        return save_head(checkpoint, tmp_path_factory.mktemp("head"), name, num_labels=count, **options)

    return make


@pytest.mark.parametrize(
    ("task", "head", "labels", "before", "options"),
    [
        ("classify", "SequenceClassification", ["a", "b"], ["--top-k", 1], {"top_k": 1}),
        ("ner", "TokenClassification", ["B-X", "I-X", "O"], [], {"aggregation_strategy": "simple"}),
        ("zero-shot", "SequenceClassification", ["entails", "b"], ["--labels", "is,Paris"], {}),
        ("qa", "QuestionAnswering", ["start", "end"], ["--top-k", 2, "Paris ?"], {"top_k": 2}),
    ],
)
def test_heads_write_the_pipelines_answers(
    run: Any, heads: Any, task: str, head: str, labels: list[str], before: list[Any], options: Any
) -> None:
    model, texts = heads(head, len(labels), labels), ["La France", "The capital is Paris."]
    name = {"classify": "text-classification", "qa": "question-answering", "zero-shot": "zero-shot-classification"}
    pipe = xlmr.pipeline(name.get(task, task), model, device="cpu")
    if task == "zero-shot":
        answers = [
            [{"label": label, "score": score} for label, score in zip(one["labels"], one["scores"], strict=True)]
            for one in pipe(texts, "is,Paris")
        ]
    else:
        given = [{"question": "Paris ?", "context": text} for text in texts] if task == "qa" else texts
        answers = [one if isinstance(one, list) else [one] for one in pipe(given, **options)]
    status, out, err = run(task, "--json", *before, stdin="\n".join(texts).encode(), model=model)
    assert (status, err) == (0, "")
    want = [{"text": text, "answers": answer} for text, answer in zip(texts, answers, strict=True)]
    assert [json.loads(line) for line in out.splitlines()] == want
    assert run(task, *before, *texts, model=model)[1].splitlines()[0] == texts[0]


def test_rerank_orders_passages(run: Any, heads: Any) -> None:
    model, passages = heads("SequenceClassification", 1), ["La France", "Paris is", "a"]
    status, out, err = run("rerank", "--json", "--normalize", "capital ?", *passages, model=model)
    assert (status, err) == (0, "")
    rows = [json.loads(line) for line in out.splitlines()]
    scores = xlmr.load(model, device="cpu").rerank("capital ?", [row["text"] for row in rows], normalize=True)
    assert [row["score"] for row in rows] == pytest.approx(sorted(scores.tolist(), reverse=True))
    assert {row["text"] for row in rows} == set(passages)
    assert run("rerank", "capital ?", *passages, model=model)[1].count("\n") == 3


@pytest.mark.parametrize("line", ["A B --top-k 2", "--top-k 2 A B", "A --top-k 2 B", "A --json B --top-k=2"])
def test_options_stand_where_people_put_them(line: str) -> None:
    args = cli._parsed(["qa", "--model", "m", *line.split()])
    assert (args.command, args.question, args.texts, args.top_k) == ("qa", "A", ["B"], 2)


def test_texts_may_begin_with_a_dash() -> None:
    args = cli._parsed(["qa", "--model", "m", "--top-k", "2", "--", "-A", "-B", "--json"])
    assert (args.command, args.question, args.texts, args.top_k) == ("qa", "-A", ["-B", "--json"], 2)
    assert cli._parsed(["embed", "--json", "--", "-A"]).texts == ["-A"]


def test_options_around_a_question_leave_the_texts_to_standard_input(run: Any, heads: Any) -> None:
    model, stdin = heads("SequenceClassification", 1), b"La France\nParis is"
    found = [
        run("rerank", *line, stdin=stdin, model=model) for line in (["capital ?", "--json"], ["--json", "capital ?"])
    ]
    assert found[0] == found[1]
    assert found[0][0] == 0
    assert found[0][1].count("\n") == 2
    mixed = run("rerank", "capital ?", "--json", "La France", "--normalize", "Paris is", model=model)
    assert mixed[1].count("\n") == 2


def test_convert_rewrites_a_directory_whole_or_not_at_all(
    checkpoint: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    source, target = tmp_path / "source", tmp_path / "new" / "target"
    model = xlmr.XLMRobertaForMaskedLM.from_pretrained(checkpoint)
    model.save_pretrained(source, safe_serialization=False, max_shard_size="20KB")
    (source / "1_Pooling").mkdir()
    for name in ("tokenizer.json", "1_Pooling/pytorch_model.bin"):
        (source / name).write_bytes(b"{}")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("xlmr.convert.write_weights", fail)
        assert cli.main(["convert", str(source), str(target)]) == 1
        assert capsys.readouterr() == ("", f"xlmr convert: [Errno 5] disk full: '{target.parent}'\n")
        assert list(target.parent.iterdir()) == []
    assert cli.main(["convert", str(source), str(target)]) == 0
    assert list(target.parent.iterdir()) == [target]
    written = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert written == {"config.json", "model.safetensors", "tokenizer.json", "1_Pooling/pytorch_model.bin"}
    found = transformers.XLMRobertaForMaskedLM.from_pretrained(target).state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, found[name])
    for again in (target, source / "inside"):
        capsys.readouterr()
        assert cli.main(["convert", str(source), str(again)]) == 1
        assert capsys.readouterr().err.startswith(f"xlmr convert: {again} ")


def test_convert_leaves_out_large_files_and_names_them(
    checkpoint: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(checkpoint, source)
    (source / "model.onnx").write_bytes(bytes(2**17))
    monkeypatch.setattr("xlmr.convert.COPIED", 2**16)
    assert cli.main(["convert", str(source), str(target)]) == 0
    assert capsys.readouterr().err.startswith(f"{source / 'model.onnx'} is not copied: ")
    assert {path.name for path in source.iterdir()} - {path.name for path in target.iterdir()} == {"model.onnx"}


def test_convert_follows_links_to_files_and_no_others(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    """Links to directories may form a loop, and a pipe is never at its end."""
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(checkpoint, source)
    (source / "tokenizer.json").rename(tmp_path / "blob")
    (source / "tokenizer.json").symlink_to(tmp_path / "blob")
    for name in ("a", "b"):
        (source / name).symlink_to(source)
    (source / "none").symlink_to("nothing")
    os.mkfifo(source / "pipe")
    assert cli.main(["convert", str(source), str(target)]) == 0
    told = sorted(capsys.readouterr().err.splitlines())
    assert told == [f"{source / name} is not copied: it is no file" for name in ("a", "b", "none", "pipe")]
    left_out = {"a", "b", "none", "pipe"}
    assert {path.name for path in source.iterdir()} - {path.name for path in target.iterdir()} == left_out
    assert (target / "tokenizer.json").read_bytes() == (tmp_path / "blob").read_bytes()


def test_info_says_which_path_computes_and_why(run: Any, fill: Any) -> None:
    status, out, _ = run("info", "--json")
    facts = json.loads(out)
    assert status == 0
    assert all(name.isidentifier() for name in facts)
    assert facts["xlmr"] == xlmr.__version__
    assert facts["path"] == fill.model.backend_report()
    assert facts["parameters"] == fill.model.num_parameters()
    assert facts["longest_text"] == 48
    assert facts["triton_kernels"] == "Triton kernels need a GPU and the tensors are on 'cpu'"
    status, out, _ = run("info")
    assert status == 0
    assert fill.model.backend_report() in out


def test_demo_shows_the_embedded_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--json", "--device", "cpu"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert len({row["language"] for row in shown["filled"]}) >= 12
    assert sum(row["right"] for row in shown["filled"]) >= 0.6 * len(shown["filled"])
    assert sum(row["right"] for row in shown["nearest"]) >= 0.6 * len(shown["nearest"])
    assert shown["seconds"] < 20
    assert cli.main(["demo", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "filled right" in shown
    assert "The two paths compared: Triton kernels need a GPU and the tensors are on 'cpu'" in shown


@pytest.mark.parametrize(
    ("args", "stdin", "message"),
    [
        (["fill-mask", "no mask"], b"", "xlmr fill-mask: the text 'no mask' has no <mask>: put one"),
        (["fill-mask", "<mask>", "--top-k", 0], b"", "xlmr fill-mask: top_k is 0: allowed are 1 to"),
        (["fill-mask", "<mask> a" * 99], b"", "xlmr fill-mask: the text '<mask> a"),
        (["embed"], b"", "xlmr embed: there is no text: give texts as arguments, or one a line on standard input"),
        (["embed"], None, "xlmr embed: there is no text: give texts as arguments, or one a line on standard input"),
        (["embed"], b"caf\xe9\n", "xlmr embed: standard input is not UTF-8 text: "),
        (["embed", "a", "--max-length", 1000], b"", "xlmr embed: max_length is 1000: allowed are 2 to 48"),
        (["embed", "a", "--output", "/"], b"", "xlmr embed: --output / is a directory"),
        (["embed", "a \udcff"], b"", "xlmr embed: "),
        (["embed", "a", "--dtype", "int4"], b"", "xlmr embed: dtype is 'int4'"),
        pytest.param(
            ["embed", "a", "--backend", "triton"], b"", "xlmr embed: backend 'triton' cannot run",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there it runs"),
        ),
        (["info", "--device", "gpu"], b"", "xlmr info: device is 'gpu': allowed are cpu, cuda"),
        (["rerank", "a", "b", "--device", "gpu"], b"", "xlmr rerank: device is 'gpu': allowed are cpu, cuda"),
    ],
)  # fmt: skip
def test_a_users_mistake_is_one_line_and_status_1(
    checkpoint: Path, capsys: Any, monkeypatch: Any, args: list[Any], stdin: bytes | None, message: str
) -> None:
    monkeypatch.setattr(sys, "stdin", None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin)))
    assert cli.main([*map(str, args), "--model", str(checkpoint)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(message)
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", [["embed"], ["fill-mask"], ["rerank", "a"], ["info"]], ids=" ".join)
def test_a_missing_checkpoint_is_named(run: Any, tmp_path: Path, command: list[str]) -> None:
    """Also the empty name: of a variable that is not set, say."""
    for model in (tmp_path / "nowhere", ""):
        texts = [] if command == ["info"] else ["<mask>"]
        status, out, err = run(*command, *texts, model=model)
        assert (status, out) == (1, "")
        assert f"{str(model)!r} is neither a" in err


@pytest.mark.parametrize(
    "args", [[], ["fly"], ["embed", "--pooling", "most"], ["zero-shot", "a"], ["pretrain"], ["qa"]]
)
def test_wrong_usage_is_status_2(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(args)
    assert exit.value.code == 2
    assert "usage: xlmr" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["classify", "ner", "zero-shot --labels a,b", "qa Q", "rerank Q"])
def test_a_model_is_required_where_the_demo_model_has_no_head(command: str, capsys: Any) -> None:
    """And texts are not: they may be on standard input."""
    with pytest.raises(SystemExit):
        cli.main(command.split())
    assert capsys.readouterr().err.endswith("required: --model\n")


def test_an_interrupt_is_status_130(monkeypatch: Any, capsys: Any) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "pipeline", interrupted)
    monkeypatch.setattr(sys, "argv", ["xlmr", "fill-mask", "<mask>"])
    assert (__main__.main(), *capsys.readouterr()) == (130, "", "")


def test_an_interrupt_while_torch_is_imported_is_quiet_too(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    path = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-m", "xlmr", "info"], env=os.environ | path, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_a_closed_pipe_ends_quietly(checkpoint: Path) -> None:
    options = ["--json", "--pooling", "mean", "--model", str(checkpoint)]
    command = [sys.executable, "-m", "xlmr", "embed", *options]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate(b"a\n" * 500)
    assert (process.returncode, err) == (141, b"")


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_closed_streams_are_none(run: Any, monkeypatch: Any, closed: str) -> None:
    """`>&-` in a shell: Python has no stream then."""
    monkeypatch.setattr(sys, closed, None)
    assert cli.main(["embed", "a", "--device", "cpu"]) == 0
    assert cli.main(["fill-mask", "no mask", "--device", "cpu"]) == 1
