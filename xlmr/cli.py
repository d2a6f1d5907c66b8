"""The command `xlmr`. Answers go to standard output; progress, warnings and errors to standard error.

Exit status: 0, or 1 where the job failed, 2 for wrong usage, 130 if interrupted, 141 if the reader of the output left.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import __version__, demo, pretrain
from .convert import convert
from .demo import show
from .demo.evaluate import Sentence, read
from .encode import POOLINGS
from .encoder import Encoder, load
from .files import write_atomically
from .kernels._launch import unsupported
from .ops import BACKENDS
from .pipelines import Pipeline, pipeline
from .pipelines.token_classification import STRATEGIES
from .terminal import clean, print_json, print_table
from .verify import Verdict, verify, verify_gradients

PIPE_CLOSED = 141  # what a shell reports after SIGPIPE
PACKAGES = ("torch", "triton", "sentencepiece", "safetensors", "numpy", "huggingface_hub", "transformers")
SHOWN = 4  # numbers of a vector that a table shows
VERIFIED = 6  # held-out sentences that `xlmr verify` computes by default

Run = Callable[[argparse.Namespace], "int | None"]  # what a command does; returns the exit status, None for 0
Add = Callable[[argparse.ArgumentParser], Any]  # adds arguments to the parser of a command
Rows = Iterable[Sequence[Any]]  # of a table
COMMANDS: dict[str, tuple[Run, tuple[Add, ...]]] = {}  # filled by the decorator `command`, in the order of this file


def command(name: str, *arguments: Add) -> Callable[[Run], Run]:
    """Makes the function below it a sub-command, with its docstring as the help."""

    def register(run: Run) -> Run:
        COMMANDS[name] = run, arguments
        return run

    return register


def argument(*names: str, **settings: Any) -> Add:
    """An argument of a command, as argparse's add_argument takes it."""
    return lambda parser: parser.add_argument(*names, **settings)


JSON = argument("--json", action="store_true", help="write JSON, one object a line")
COMPUTING = (
    argument("--device", help="cpu, cuda, cuda:1, … (default: a GPU where there is one)"),
    argument("--dtype", default="auto", help="float32, bfloat16, … (default: the checkpoint's)"),
    argument("--backend", choices=BACKENDS, default="auto", help="which path computes (default auto)"),
    JSON,
)
SOURCE = "checkpoint directory or hub name"
MODEL = argument("--model", metavar="DIR|NAME", help=f"{SOURCE} (default: the demo model)"), *COMPUTING
TEXTS = argument("texts", nargs="*", default=[], metavar="TEXT", help="by default standard input, one text a line")
TASK = TEXTS, argument("--model", metavar="DIR|NAME", required=True, help=SOURCE), *COMPUTING  # needs a task head


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line, `sys.argv` by default; returns the exit status."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # a lone surrogate is shown
    args = _parsed(sys.argv[1:] if argv is None else list(argv))
    try:
        status = args.run(args) or 0
        print(end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains while it exits
        return PIPE_CLOSED
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        print(f"xlmr {args.command}: {error}", file=sys.stderr)
        return 1
    return status


def _parsed(argv: list[str]) -> argparse.Namespace:
    """The command line. Options may stand before, between and after texts, with `--` (texts that begin with a dash
    follow) only before them. Exits where it is wrong."""
    parser, commands = _parsers()
    if argv and argv[0] in commands and "--" not in argv:  # argparse mixes only without sub-commands and `--`
        return commands[argv[0]].parse_intermixed_args(argv[1:])
    return parser.parse_args(argv)


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """That of the whole, and those of the commands by name."""
    parser = argparse.ArgumentParser(prog="xlmr", description="XLM-RoBERTa from the command line.")
    parser.add_argument("--version", action="version", version=f"xlmr {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (run, arguments) in COMMANDS.items():
        sub = subparsers.add_parser(name, help=run.__doc__, description=run.__doc__)
        sub.set_defaults(run=run, command=name)
        for add in arguments:
            add(sub)
    return parser, subparsers.choices


# What every model can do


@command(
    "fill-mask",
    argument("--top-k", type=int, default=5, metavar="K", help="how many words to show (default 5)"),
    argument("--target", action="append", metavar="WORD", help="let only this word, and others so given, compete"),
    TEXTS,
    *MODEL,
)
def _fill_mask(args: argparse.Namespace) -> None:
    """Fill each <mask> in the texts with the most probable words."""
    texts = _texts(args)
    answers = _pipeline("fill-mask", args)(texts, top_k=args.top_k, targets=args.target)
    _print_answers(args, texts, answers if len(texts) > 1 else [answers], _by_mask)


def _by_mask(answer: list[Any]) -> Iterator[Sequence[Any]]:
    masks = answer if isinstance(answer[0], list) else [answer]
    for number, row in enumerate(masks, 1):
        for rank, a in enumerate(row):
            mask = f"mask {number}" if len(masks) > 1 and not rank else ""
            yield mask, f"{a['score']:.4f}", a["token_str"], a["sequence"]


@command(
    "embed",
    argument(
        "--pooling",
        choices=POOLINGS,
        help="how the tokens' vectors become one (default: as the directory says, else their mean)",
    ),
    argument("--no-normalize", action="store_true", help="keep the lengths of the vectors"),
    argument("--max-length", type=int, metavar="N", help="truncate to N tokens (default: the model's limit)"),
    argument("--output", type=Path, metavar="FILE", help="write a NumPy array [texts, N] to this file instead"),
    TEXTS,
    *MODEL,
)
def _embed(args: argparse.Namespace) -> None:
    """Turn each text into a vector."""
    if args.output and args.output.is_dir():
        raise ValueError(f"--output {args.output} is a directory: give the name of a file")
    texts = _texts(args)
    vectors = _encoder(args, pooling=args.pooling).encode(
        texts,
        normalize=not args.no_normalize,
        max_length=args.max_length,
        show_progress_bar=sys.stderr is not None and sys.stderr.isatty(),
    )
    if args.output:
        _write_vectors(args, vectors)
        return
    pairs = list(zip(texts, vectors, strict=True))
    _print(
        args,
        ({"text": text, "embedding": vector.tolist()} for text, vector in pairs),
        ((*(f"{x:+.4f}" for x in vector[:SHOWN]), f"… {len(vector)} numbers", text) for text, vector in pairs),
    )


def _write_vectors(args: argparse.Namespace, vectors: np.ndarray) -> None:
    def save(path: Path) -> None:
        with path.open("wb") as file:  # given a name instead, NumPy would append .npy to it
            np.save(file, vectors)

    write_atomically(args.output.parent, {args.output.name: save})
    count, size = vectors.shape
    if args.json:
        print_json({"path": str(args.output), "vectors": count, "size": size})
    else:
        print(f"{args.output}: {count} vectors of {size} numbers", file=sys.stderr)


# What needs a task head


@command(
    "classify",
    argument("--top-k", type=int, metavar="K", help="how many classes to show (default: all)"),
    *TASK,
)
def _classify(args: argparse.Namespace) -> None:
    """Give each text its classes."""
    texts = _texts(args)
    _print_answers(args, texts, _pipeline("text-classification", args)(texts, top_k=args.top_k), _scored("label"))


@command(
    "ner",
    argument("--aggregation", choices=STRATEGIES, default="simple", help="how tokens become entities (default simple)"),
    argument("--stride", type=int, metavar="N", help="read long texts in windows that share N tokens"),
    *TASK,
)
def _ner(args: argparse.Namespace) -> None:
    """Find the named entities in each text."""
    texts = _texts(args)
    options = {"aggregation_strategy": args.aggregation, "stride": args.stride}
    kind = "entity" if args.aggregation == "none" else "entity_group"
    _print_answers(args, texts, _pipeline("token-classification", args)(texts, **options), _scored(kind, "word"))


@command(
    "zero-shot",
    argument("--labels", required=True, metavar="A,B,…", help="the labels, with commas between them"),
    argument(
        "--template",
        default="This example is {}.",
        help="the sentence that a label is put into (default %(default)r)",
    ),
    argument("--multi-label", action="store_true", help="judge each label by itself"),
    *TASK,
)
def _zero_shot(args: argparse.Namespace) -> None:
    """Say which of your own labels fits each text."""
    texts = _texts(args)
    settings = {"candidate_labels": args.labels, "hypothesis_template": args.template, "multi_label": args.multi_label}
    answers = [
        [{"label": label, "score": score} for label, score in zip(one["labels"], one["scores"], strict=True)]
        for one in _pipeline("zero-shot-classification", args)(texts, **settings)
    ]
    _print_answers(args, texts, answers, _scored("label"))


@command(
    "qa",
    argument("question", metavar="QUESTION"),
    argument("--top-k", type=int, default=1, metavar="K", help="how many answers to show (default 1)"),
    *TASK,
)
def _qa(args: argparse.Namespace) -> None:
    """Answer a question from each text."""
    texts = _texts(args)
    asked = [{"question": args.question, "context": text} for text in texts]
    found = _pipeline("question-answering", args)(asked, top_k=args.top_k)
    answers = [found] if len(texts) == 1 else found
    _print_answers(args, texts, [[one] if isinstance(one, dict) else one for one in answers], _scored("answer"))


@command(
    "rerank",
    argument("query", metavar="QUERY"),
    argument("--normalize", action="store_true", help="scores from 0 to 1, by a sigmoid"),
    *TASK,
)
def _rerank(args: argparse.Namespace) -> None:
    """Order passages by how well they answer a query."""
    texts = _texts(args)
    scores = _encoder(args).rerank(args.query, texts, normalize=args.normalize).tolist()
    ranked = sorted(zip(scores, texts, strict=True), key=lambda row: -row[0])
    _print(
        args,
        ({"text": text, "score": score} for score, text in ranked),
        ((f"{score:.4f}", text) for score, text in ranked),
    )


# About a model itself


@command("info", *MODEL)
def _info(args: argparse.Namespace) -> None:
    """Show the environment, the device, and which path computes a model and why."""
    model = _pipeline("feature-extraction", args).model
    facts: dict[str, Any] = {
        "xlmr": __version__,
        "python": platform.python_version(),
        **{name: _installed(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "triton_kernels": unsupported(model.device) or f"can run on {model.device}",
        "model": str(args.model or demo.CHECKPOINT),
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "longest_text": model.config.max_length,
        "path": model.backend_report(),
    }
    _print(args, [facts], ((name, _shown(value)) for name, value in facts.items()))


def _shown(fact: Any) -> str:
    return ", ".join(fact) or "none" if isinstance(fact, list) else "not installed" if fact is None else str(fact)


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@command("demo", *MODEL)
@torch.inference_mode()
def _demo(args: argparse.Namespace) -> None:
    """Show a model at work: filled masks, nearest sentences across languages."""
    started = time.perf_counter()
    sentences = read(demo.HELD_OUT)
    fill = _pipeline("fill-mask", args)
    filled = show.filled(fill.model, fill.tokenizer, sentences)
    nearest = show.nearest(fill.model, fill.tokenizer, sentences)
    seconds = time.perf_counter() - started
    if args.json:
        print_json({"filled": filled, "nearest": nearest, "seconds": seconds})
        return
    print(f"{args.model or 'The embedded demo model'}: {fill.model.num_parameters():,} parameters, on {fill.device}")
    print("The sentences were held out when the demo model was trained.")
    print(f"\nA word masked in a sentence of each language: {_share(filled)} filled right")
    print_table(
        (row["language"], row["text"], row["answer"], f"{row['score']:.2f}", "" if row["right"] else row["expected"])
        for row in filled
    )
    print(f"\nThe nearest held-out sentence of another language: {_share(nearest)} translations, for instance")
    instances = {row["language"]: row for row in nearest}.values()
    print_table((row["language"], row["text"], row["other"], row["nearest"]) for row in instances)
    _compare(fill, sentences[:1])
    print(f"\n{time.perf_counter() - started:.1f} s")


def _compare(fill: Pipeline, sentences: list[Sentence]) -> None:
    """The two paths on the sentences, where the kernels can run."""
    why = unsupported(fill.model.device)
    print(f"\nThe two paths compared: {why or 'the largest errors of the kernels and of PyTorch against float64'}")
    if why is None:
        model = copy.deepcopy(fill.model)
        model.set_backend("triton")
        print_table(_verdict_rows(verify(model, fill.tokenizer, [sentence.text for sentence in sentences])))


def _share(rows: list[dict[str, Any]]) -> str:
    return f"{sum(row['right'] for row in rows)} of {len(rows)}"


@command(
    "verify",
    argument("--gradients", action="store_true", help="compare the gradients of a training step instead"),
    argument(
        "--text",
        action="append",
        metavar="TEXT",
        help=f"compute this text, and others so given (default: {VERIFIED} sentences held out from the demo model)",
    ),
    *MODEL,
)
def _verify(args: argparse.Namespace) -> int:
    """Compare each operation and the whole model with float64; exit 1 if one is wrong."""
    if args.backend == "auto" and unsupported(torch.device(args.device or "cpu")) is None:
        args.backend = "triton"  # under the interpreter: "auto" would stay eager on a CPU, which needs no proof
    pipe = _pipeline("fill-mask", args)
    texts = args.text or [sentence.text for sentence in read(demo.HELD_OUT)[:VERIFIED]]
    verdicts = (verify_gradients if args.gradients else verify)(pipe.model, pipe.tokenizer, texts)
    if not args.json:
        print(f"{pipe.model.backend_report()}; {str(pipe.model.dtype).removeprefix('torch.')}, {len(texts)} texts")
    _print(args, map(_verdict_record, verdicts), _verdict_rows(verdicts))
    return 0 if all(verdict.right for verdict in verdicts) else 1


def _verdict_record(verdict: Verdict) -> dict[str, Any]:
    return asdict(verdict.worst) | {"bound": verdict.worst.bound, "calls": verdict.calls, "right": verdict.right}


def _verdict_rows(verdicts: list[Verdict]) -> Iterator[Sequence[Any]]:
    yield "operation", "calls", "error", "eager's error", "bound", ""
    for v in verdicts:
        errors = (f"{x:.1e}" for x in (v.worst.error, v.worst.twin_error, v.worst.bound))
        yield v.operation, v.calls, *errors, "" if v.right else "WRONG"


# What makes a checkpoint


@command(
    "convert",
    argument("source", type=Path, metavar="SRC", help="checkpoint directory: .bin or safetensors, shards too"),
    argument("target", type=Path, metavar="DST", help="directory to make; it must be empty if it exists"),
    JSON,
)
def _convert(args: argparse.Namespace) -> None:
    """Rewrite the weights of a checkpoint directory as safetensors."""
    done = convert(args.source, args.target)
    for path in done.left_out:
        reason = "large, and no weights that xlmr reads" if path.is_file() else "no file"
        print(f"{path} is not copied: it is {reason}", file=sys.stderr)
    if args.json:
        print_json({"path": str(args.target), "weights": done.weights, "bytes": done.size})
    else:
        print(f"{args.target}: {done.weights} weights, {done.size:,} bytes")


command("pretrain", pretrain.add_arguments)(pretrain.main)


# What the commands share


def _encoder(args: argparse.Namespace, **options: Any) -> Encoder:
    where = demo.CHECKPOINT if args.model is None else args.model
    return load(where, device=args.device, dtype=args.dtype, backend=args.backend, **options)


def _pipeline(task: str, args: argparse.Namespace) -> Pipeline:
    return pipeline(task, args.model, device=args.device, dtype=args.dtype, backend=args.backend)


def _texts(args: argparse.Namespace) -> list[str]:
    if args.texts:
        return args.texts
    if sys.stdin and sys.stdin.isatty():
        print("one text a line, then end of file (Ctrl-D):", file=sys.stderr)
    try:
        given = sys.stdin.buffer.read().decode("utf-8-sig") if sys.stdin else ""  # None where it was closed
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8 text: {error}") from None
    if not given:
        raise ValueError("there is no text: give texts as arguments, or one a line on standard input")
    return given.replace("\r\n", "\n").removesuffix("\n").split("\n")


def _print(args: argparse.Namespace, records: Iterable[dict[str, Any]], table: Rows) -> None:
    """The records where JSON is asked for, else the table."""
    if args.json:
        for record in records:
            print_json(record)
    else:
        print_table(table)


def _print_answers(
    args: argparse.Namespace, texts: list[str], answers: list[Any], table: Callable[[Any], Rows]
) -> None:
    """Each text and its answer, of which `table` makes the rows that people see."""
    for text, answer in zip(texts, answers, strict=True):
        if args.json:
            print_json({"text": text, "answers": answer})
        else:
            print(clean(text))
            print_table(table(answer))


def _scored(*fields: str) -> Callable[[list[dict[str, Any]]], Rows]:
    """A table of answers: the score, and these fields."""
    return lambda answers: ((f"{one['score']:.4f}", *(one[field] for field in fields)) for one in answers)
