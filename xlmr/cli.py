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
from collections.abc import Callable, Sequence
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

Command = Callable[..., argparse.ArgumentParser]  # adds the parser of a command
Parsers = tuple[argparse.ArgumentParser, ...]
PIPE_CLOSED = 141  # what a shell reports after SIGPIPE
PACKAGES = ("torch", "triton", "sentencepiece", "safetensors", "numpy", "huggingface_hub", "transformers")
SHOWN = 4  # numbers of a vector that a table shows
VERIFIED = 6  # held-out sentences that `xlmr verify` computes by default


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
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], Any], about: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about)
        sub.set_defaults(run=run, command=name)
        return sub

    words, tasks, models = _of_words(command), _of_tasks(command), _of_models(command)
    for sub in (*words, *tasks):
        about = "by default standard input, one text a line"
        sub.add_argument("texts", nargs="*", default=[], metavar="TEXT", help=about)
    for sub in (*words, *tasks, *models):
        _add_model(sub, required=sub in tasks)
    _of_files(command)
    return parser, commands.choices


def _add_model(sub: argparse.ArgumentParser, required: bool) -> None:
    """The options of every command that runs a model, `required` where the demo model, which has no task head, will not
    do."""
    about = "checkpoint directory or hub name" + ("" if required else " (default: the demo model)")
    sub.add_argument("--model", metavar="DIR|NAME", required=required, help=about)
    sub.add_argument("--device", help="cpu, cuda, cuda:1, … (default: a GPU where there is one)")
    sub.add_argument("--dtype", default="auto", help="float32, bfloat16, … (default: the checkpoint's)")
    sub.add_argument("--backend", choices=BACKENDS, default="auto", help="which path computes (default auto)")
    sub.add_argument("--json", action="store_true", help="write JSON, one object a line")


def _of_words(command: Command) -> Parsers:
    """fill-mask and embed, which every model can do."""
    fill = command("fill-mask", _fill_mask, "Fill each <mask> in the texts with the most probable words.")
    fill.add_argument("--top-k", type=int, default=5, metavar="K", help="how many words to show (default 5)")
    words = "let only this word, and others so given, compete"
    fill.add_argument("--target", action="append", metavar="WORD", help=words)
    vectors = command("embed", _embed, "Turn each text into a vector.")
    pooling = "how the tokens' vectors become one (default: as the directory says, else their mean)"
    vectors.add_argument("--pooling", choices=POOLINGS, help=pooling)
    vectors.add_argument("--no-normalize", action="store_true", help="keep the lengths of the vectors")
    limit = "truncate to N tokens (default: the model's limit)"
    vectors.add_argument("--max-length", type=int, metavar="N", help=limit)
    array = "write a NumPy array [texts, N] to this file instead"
    vectors.add_argument("--output", type=Path, metavar="FILE", help=array)
    return fill, vectors


def _of_tasks(command: Command) -> Parsers:
    """The commands on texts that need a task head."""
    classify = command("classify", _classify, "Give each text its classes.")
    classify.add_argument("--top-k", type=int, metavar="K", help="how many classes to show (default: all)")
    entities = command("ner", _ner, "Find the named entities in each text.")
    how = "how tokens become entities (default simple)"
    entities.add_argument("--aggregation", choices=STRATEGIES, default="simple", help=how)
    entities.add_argument("--stride", type=int, metavar="N", help="read long texts in windows that share N tokens")
    zero = command("zero-shot", _zero_shot, "Say which of your own labels fits each text.")
    zero.add_argument("--labels", required=True, metavar="A,B,…", help="the labels, with commas between them")
    sentence = "the sentence that a label is put into (default %(default)r)"
    zero.add_argument("--template", default="This example is {}.", help=sentence)
    zero.add_argument("--multi-label", action="store_true", help="judge each label by itself")
    answer = command("qa", _qa, "Answer a question from each text.")
    answer.add_argument("question", metavar="QUESTION")
    answer.add_argument("--top-k", type=int, default=1, metavar="K", help="how many answers to show (default 1)")
    ranks = command("rerank", _rerank, "Order passages by how well they answer a query.")
    ranks.add_argument("query", metavar="QUERY")
    ranks.add_argument("--normalize", action="store_true", help="scores from 0 to 1, by a sigmoid")
    return classify, entities, zero, answer, ranks


def _of_models(command: Command) -> Parsers:
    """The commands about a model itself."""
    info = command("info", _info, "Show the environment, the device, and which path computes a model and why.")
    show = command("demo", _demo, "Show a model at work: filled masks, nearest sentences across languages.")
    about = "Compare each operation and the whole model with float64; exit 1 if one is wrong."
    check = command("verify", _verify, about)
    check.add_argument("--gradients", action="store_true", help="compare the gradients of a training step instead")
    given = f"compute this text, and others so given (default: {VERIFIED} sentences held out from the demo model)"
    check.add_argument("--text", action="append", metavar="TEXT", help=given)
    return info, show, check


def _of_files(command: Command) -> None:
    """The commands that make a checkpoint."""
    rewrite = command("convert", _convert, "Rewrite the weights of a checkpoint directory as safetensors.")
    source = "checkpoint directory: .bin or safetensors, shards too"
    rewrite.add_argument("source", type=Path, metavar="SRC", help=source)
    rewrite.add_argument("target", type=Path, metavar="DST", help="directory to make; it must be empty if it exists")
    rewrite.add_argument("--json", action="store_true", help="write JSON, one object a line")
    training = command("pretrain", pretrain.main, "Train a masked language model on text files, or go on training one.")
    pretrain.add_arguments(training)


def _fill_mask(args: argparse.Namespace) -> None:
    texts = _texts(args)
    answers = _pipeline("fill-mask", args)(texts, top_k=args.top_k, targets=args.target)
    for text, answer in zip(texts, answers if len(texts) > 1 else [answers], strict=True):
        if args.json:
            print_json({"text": text, "answers": answer})
        else:
            print(clean(text))
            _print_answers(answer)


def _print_answers(answer: list[Any]) -> None:
    masks = answer if isinstance(answer[0], list) else [answer]
    print_table(
        (f"mask {number}" if len(masks) > 1 and not rank else "", f"{a['score']:.4f}", a["token_str"], a["sequence"])
        for number, row in enumerate(masks, 1)
        for rank, a in enumerate(row)
    )


def _embed(args: argparse.Namespace) -> None:
    if args.output and args.output.is_dir():
        raise ValueError(f"--output {args.output} is a directory: give the name of a file")
    texts = _texts(args)
    found = _encoder(args, pooling=args.pooling).encode(
        texts,
        normalize=not args.no_normalize,
        max_length=args.max_length,
        show_progress_bar=sys.stderr is not None and sys.stderr.isatty(),
    )
    if args.output:
        write_atomically(args.output.parent, {args.output.name: lambda path: _save_array(path, found)})
        if args.json:
            print_json({"path": str(args.output), "vectors": len(texts), "size": found.shape[1]})
        else:
            print(f"{args.output}: {len(texts)} vectors of {found.shape[1]} numbers", file=sys.stderr)
    elif args.json:
        for text, vector in zip(texts, found.tolist(), strict=True):
            print_json({"text": text, "embedding": vector})
    else:
        print_table(
            (*(f"{number:+.4f}" for number in vector[:SHOWN].tolist()), f"… {len(vector)} numbers", text)
            for text, vector in zip(texts, found, strict=True)
        )


def _save_array(path: Path, vectors: np.ndarray) -> None:
    with path.open("wb") as file:  # given a name instead, NumPy would append .npy to it
        np.save(file, vectors)


def _classify(args: argparse.Namespace) -> None:
    texts = _texts(args)
    _print_found(args, texts, _pipeline("text-classification", args)(texts, top_k=args.top_k), ("label",))


def _ner(args: argparse.Namespace) -> None:
    texts = _texts(args)
    options = {"aggregation_strategy": args.aggregation, "stride": args.stride}
    kind = "entity" if args.aggregation == "none" else "entity_group"
    _print_found(args, texts, _pipeline("token-classification", args)(texts, **options), (kind, "word"))


def _zero_shot(args: argparse.Namespace) -> None:
    texts = _texts(args)
    options = {
        "candidate_labels": args.labels,
        "hypothesis_template": args.template,
        "multi_label": args.multi_label,
    }
    found = _pipeline("zero-shot-classification", args)(texts, **options)
    rows = [
        [{"label": label, "score": score} for label, score in zip(one["labels"], one["scores"], strict=True)]
        for one in found
    ]
    _print_found(args, texts, rows, ("label",))


def _qa(args: argparse.Namespace) -> None:
    texts = _texts(args)
    asked = [{"question": args.question, "context": text} for text in texts]
    pipe = _pipeline("question-answering", args)
    found = pipe(asked, top_k=args.top_k)
    found = [found] if len(texts) == 1 else found
    _print_found(args, texts, [[one] if isinstance(one, dict) else one for one in found], ("answer",))


def _rerank(args: argparse.Namespace) -> None:
    texts = _texts(args)
    scores = _encoder(args).rerank(args.query, texts, normalize=args.normalize).tolist()
    ranked = sorted(zip(scores, texts, strict=True), key=lambda row: -row[0])
    if args.json:
        for score, text in ranked:
            print_json({"text": text, "score": score})
    else:
        print_table((f"{score:.4f}", text) for score, text in ranked)


def _print_found(
    args: argparse.Namespace, texts: list[str], found: list[list[dict[str, Any]]], shown: tuple[str, ...]
) -> None:
    """For each text its answers; of each answer a table has the score and the fields `shown`."""
    for text, rows in zip(texts, found, strict=True):
        if args.json:
            print_json({"text": text, "answers": rows})
        else:
            print(clean(text))
            print_table((f"{row['score']:.4f}", *(row[field] for field in shown)) for row in rows)


def _info(args: argparse.Namespace) -> None:
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
    if args.json:
        print_json(facts)
    else:
        print_table((name, _shown(value)) for name, value in facts.items())


def _shown(fact: Any) -> str:
    return ", ".join(fact) or "none" if isinstance(fact, list) else "not installed" if fact is None else str(fact)


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _verify(args: argparse.Namespace) -> int:
    if args.backend == "auto" and unsupported(torch.device(args.device or "cpu")) is None:
        args.backend = "triton"  # under the interpreter: "auto" would stay eager on a CPU, which needs no proof
    pipe = _pipeline("fill-mask", args)
    texts = args.text or [sentence.text for sentence in read(demo.HELD_OUT)[:VERIFIED]]
    verdicts = (verify_gradients if args.gradients else verify)(pipe.model, pipe.tokenizer, texts)
    if args.json:
        for verdict in verdicts:
            facts = {"bound": verdict.worst.bound, "calls": verdict.calls, "right": verdict.right}
            print_json(asdict(verdict.worst) | facts)
    else:
        print(f"{pipe.model.backend_report()}; {str(pipe.model.dtype).removeprefix('torch.')}, {len(texts)} texts")
        _print_verdicts(verdicts)
    return 0 if all(verdict.right for verdict in verdicts) else 1


def _print_verdicts(verdicts: list[Verdict]) -> None:
    errors = ((v.worst.error, v.worst.twin_error, v.worst.bound) for v in verdicts)
    rows = (
        (v.operation, v.calls, *(f"{x:.1e}" for x in found), "" if v.right else "WRONG")
        for v, found in zip(verdicts, errors, strict=True)
    )
    print_table([("operation", "calls", "error", "eager's error", "bound", ""), *rows])


@torch.inference_mode()
def _demo(args: argparse.Namespace) -> None:
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
        _print_verdicts(verify(model, fill.tokenizer, [sentence.text for sentence in sentences]))


def _share(rows: list[dict[str, Any]]) -> str:
    return f"{sum(row['right'] for row in rows)} of {len(rows)}"


def _convert(args: argparse.Namespace) -> None:
    done = convert(args.source, args.target)
    for path in done.left_out:
        reason = "large, and no weights that xlmr reads" if path.is_file() else "no file"
        print(f"{path} is not copied: it is {reason}", file=sys.stderr)
    if args.json:
        print_json({"path": str(args.target), "weights": done.weights, "bytes": done.size})
    else:
        print(f"{args.target}: {done.weights} weights, {done.size:,} bytes")


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
