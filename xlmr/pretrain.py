"""Masked-language-model training (Devlin et al., 2019) by RoBERTa's recipe (Liu et al., 2019), from scratch or onwards.

Texts are files of one text a line; a tab makes a line a pair, encoded as one sequence (on translations this is TLM,
Lample & Conneau, 2019). What step k computes depends on the seed and k alone: its texts, masks and dropout. So a run
that was stopped and resumed gives the same weights as one that was not, bit for bit on a CPU.
"""

import argparse
import contextlib
import json
import logging
import math
import os
import pickle
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .config import XLMRobertaConfig
from .encode import Packed, choose_device, longest, pack
from .files import write_atomically
from .heads import IGNORED, XLMRobertaForMaskedLM
from .ops import BACKENDS
from .terminal import print_json, print_table
from .tokenizer import XLMRobertaTokenizer
from .training_text import Lines, LineTokenizer, Position, read_batches, read_once

logger = logging.getLogger(__name__)

LOG, CURVE, STATE = "log.jsonl", "loss.png", "training.pt"
StrPath = str | os.PathLike[str]


def _setting(default: Any, about: str) -> Any:
    return field(default=default, metadata={"help": about})


@dataclass(frozen=True)
class Recipe:
    """Everything beside the texts and the model that decides what a run computes."""

    steps: int = _setting(10_000, "optimizer steps")
    batch_tokens: int = _setting(8192, "tokens of a batch, at most")
    accumulate: int = _setting(1, "batches whose gradients make one step")
    learning_rate: float = _setting(5e-4, "peak learning rate")
    warmup: int = _setting(500, "steps over which the learning rate rises; it then falls linearly to 0")
    weight_decay: float = _setting(0.01, "AdamW's, on matrices only (not on LayerNorm and biases)")
    clip: float = _setting(1.0, "largest norm of the gradient; 0: no clipping")
    mask_probability: float = _setting(0.15, "share of the tokens to predict")
    max_length: int = _setting(0, "tokens that longer texts are cut to; 0: the model's limit")
    seed: int = _setting(0, "decides initial weights, order of the texts, masks and dropout")
    bf16: bool = _setting(False, "compute in bfloat16 (autocast), keep weights in float32")

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch_tokens": 1, "accumulate": 1}
        for name, value in asdict(self).items():
            if not value >= least.get(name, 0):
                raise ValueError(f"{name} is {value}: at least {least.get(name, 0)} is needed")
        if self.seed >= 2**20:
            raise ValueError(f"seed is {self.seed}: at most {2**20 - 1} is allowed")
        if not 0 < self.mask_probability <= 1:
            raise ValueError(f"mask_probability is {self.mask_probability}: give a share above 0, up to 1")

    def learning_rate_at(self, step: int) -> float:
        """The rate of step 0, 1, …: linear up to the peak, then linear down, never 0 while there are steps."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        return self.learning_rate * (self.steps - step) / max(self.steps - self.warmup, 1)


def mask_tokens(
    ids: Tensor, special: Tensor, mask_id: int, vocab_size: int, probability: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """BERT's masking, as in transformers' DataCollatorForLanguageModeling: of the tokens drawn with `probability` 80 %
    become <mask>, 10 % a random token, 10 % stay; special tokens are never drawn. Ids [T] → masked ids [T] and labels
    [T], −100 where nothing is to be predicted. `special`: the special ids."""

    def drawn(share: float) -> Tensor:
        return torch.rand(ids.shape, generator=generator) < share

    chosen = drawn(probability) & ~torch.isin(ids, special)
    labels = torch.where(chosen, ids, IGNORED)
    masked = chosen & drawn(0.8)
    random = chosen & ~masked & drawn(0.5)
    words = torch.randint(vocab_size, ids.shape, generator=generator)
    return torch.where(masked, mask_id, torch.where(random, words, ids)), labels


class Masker:
    """Token ids of a batch to the arguments of `masked_loss`."""

    def __init__(self, tokenizer: XLMRobertaTokenizer, probability: float) -> None:
        self.special = torch.tensor(tokenizer.all_special_ids)
        self.mask_id, self.vocab_size = tokenizer.mask_token_id, len(tokenizer)
        self.probability = probability

    def __call__(self, ids: list[list[int]], seed: int) -> tuple[Packed, Tensor]:
        packed = pack(ids, torch.device("cpu"))
        generator = torch.Generator().manual_seed(seed)
        masked, labels = mask_tokens(
            packed.input_ids, self.special, self.mask_id, self.vocab_size, self.probability, generator
        )
        return packed._replace(input_ids=masked), labels


def masked_loss(model: XLMRobertaForMaskedLM, packed: Packed, labels: Tensor, bf16: bool) -> Tensor:
    """Mean cross entropy of the labelled tokens (at least one); the last layer is computed for them alone."""
    device = model.device
    rows = (labels != IGNORED).nonzero().squeeze(-1)
    inputs = packed._replace(input_ids=packed.input_ids.to(device), cu_seqlens=packed.cu_seqlens.to(device))
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        x = model.roberta.forward_packed(*inputs, rows=rows.to(device))
        return model.lm_head.loss(x, labels[rows].to(device))


@torch.no_grad()
def held_out_loss(
    model: XLMRobertaForMaskedLM, lines: Lines, encode: LineTokenizer, masker: Masker, recipe: Recipe
) -> float:
    """Mean cross entropy of masked tokens of `lines`; the masks are the same at every call."""
    model.eval()
    total = count = 0.0
    for number, ids in read_once(lines, encode, recipe.batch_tokens):
        packed, labels = masker(ids, number)
        size = int((labels != IGNORED).sum())
        if size:
            total += float(masked_loss(model, packed, labels, recipe.bf16)) * size
            count += size
    model.train()
    return total / count if count else math.nan


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), eps=1e-6)


class Run:
    """A training run: the model, the optimizer, and how far they have come."""

    def __init__(self, model: XLMRobertaForMaskedLM, tokenizer: XLMRobertaTokenizer, lines: Lines, recipe: Recipe):
        limit = longest(model, tokenizer)
        if recipe.max_length > limit:
            raise ValueError(f"max_length is {recipe.max_length}: this model takes at most {limit} tokens")
        least = tokenizer.num_special_tokens_to_add(pair=True) + 1
        if 0 < recipe.max_length < least:
            raise ValueError(
                f"max_length is {recipe.max_length}: at least {least} is needed, a pair of texts has so many"
            )
        self.model, self.tokenizer, self.lines, self.recipe = model, tokenizer, lines, recipe
        self.encode = LineTokenizer(tokenizer, recipe.max_length or limit)
        self.masker = Masker(tokenizer, recipe.mask_probability)
        self.optimizer = _optimizer(model, recipe)
        self.step, self.tokens, self.position = 0, 0, Position()

    def batches(self) -> Iterator[tuple[Position, list[list[int]]]]:
        """What is left to read, without end."""
        recipe = self.recipe
        return read_batches(self.lines, self.encode, self.position, seed=recipe.seed, batch_tokens=recipe.batch_tokens)

    def advance(self, source: Iterator[tuple[Position, list[list[int]]]]) -> Tensor:
        """One optimizer step on the next batches; returns its loss, the mean over all their labelled tokens."""
        seed = self.recipe.seed * 2**32 + self.step
        micro = []
        for number in range(self.recipe.accumulate):
            self.position, ids = next(source)
            micro.append(self.masker(ids, seed * 2**8 + number))
            self.tokens += micro[-1][1].numel()
        counts = [int((labels != IGNORED).sum()) for _, labels in micro]
        total = torch.zeros((), device=self.model.device)
        torch.manual_seed(seed)  # dropout's draws
        for (packed, labels), count in zip(micro, counts, strict=True):
            if count:
                loss = masked_loss(self.model, packed, labels, self.recipe.bf16) * (count / sum(counts))
                loss.backward()
                total += loss.detach()
        if self.recipe.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate_at(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return total

    def save(self, output: Path) -> None:
        """Replaces the checkpoint in `output` by one of this moment: it appears whole or not at all."""
        for stale in output.glob(".checkpoint-*"):
            shutil.rmtree(stale)
        older = _checkpoints(output)
        scratch = Path(tempfile.mkdtemp(prefix=".checkpoint-", dir=output))
        self.model.save_pretrained(scratch)
        self.tokenizer.save_pretrained(scratch)
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "position": asdict(self.position),
            "texts": self.encode.before,  # the pool that is being read will be encoded again
            "recipe": asdict(self.recipe),
            "files": self.lines.fingerprint(),
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, scratch / STATE)
        scratch.chmod(0o755)
        os.replace(scratch, output / f"checkpoint-{self.step}")
        for old in older:
            shutil.rmtree(old)

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up the state that `save` wrote; the model has been loaded from the same directory."""
        given = asdict(self.recipe) | {"files": self.lines.fingerprint()}
        before = state["recipe"] | {"files": state["files"]}
        changed = [f"{name} was {before[name]}, is {value}" for name, value in given.items() if before[name] != value]
        if changed:
            raise ValueError(f"cannot resume a run with other settings or texts: {'; '.join(changed)}")
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.tokens, self.position = state["step"], state["tokens"], Position(**state["position"])
        self.encode.texts, self.encode.cut = state["texts"]


def _read_state(checkpoint: Path) -> dict[str, Any]:
    """What `Run.save` wrote besides model and tokenizer."""
    path = checkpoint / STATE
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        state["recipe"] = asdict(Recipe(**state["recipe"]))
        return {key: state[key] for key in ("step", "tokens", "position", "texts", "recipe", "files", "optimizer")}
    except (pickle.UnpicklingError, EOFError, LookupError, RuntimeError, TypeError) as error:
        advice = f"go on from {checkpoint} with --init and another --output"
        raise ValueError(f"{path} is damaged ({type(error).__name__}); {advice}") from error


def _checkpoints(output: Path) -> list[Path]:
    """The checkpoints in a directory, oldest first."""
    found = [path for path in output.glob("checkpoint-*") if path.is_dir() and _step_of(path).isdecimal()]
    return sorted(found, key=lambda path: int(_step_of(path)))


def _step_of(checkpoint: Path) -> str:
    return checkpoint.name.removeprefix("checkpoint-")


def _load_tokenizer(where: StrPath | None) -> XLMRobertaTokenizer:
    if where is None:
        raise ValueError("no tokenizer: give --tokenizer DIR|NAME|FILE (sentencepiece model), or --init")
    if Path(where).is_file():
        return XLMRobertaTokenizer(str(where))
    return XLMRobertaTokenizer.from_pretrained(where)


def _load_config(where: XLMRobertaConfig | StrPath | None) -> XLMRobertaConfig:
    if isinstance(where, XLMRobertaConfig):
        return where
    if where is None:
        raise ValueError(
            "no model: give --config FILE|DIR|NAME to start from scratch, or --init DIR|NAME to go on training"
        )
    return XLMRobertaConfig.from_json_file(where) if Path(where).is_file() else XLMRobertaConfig.from_pretrained(where)


def _load_model(
    init: StrPath | None, config: XLMRobertaConfig | StrPath | None, tokenizer: XLMRobertaTokenizer
) -> XLMRobertaForMaskedLM:
    """The model to go on training, else a new one: on the CPU, so that the seed gives the same weights everywhere."""
    if init is not None:
        model = XLMRobertaForMaskedLM.from_pretrained(init, dtype=torch.float32)
        _check_vocabulary(model.config, tokenizer)
        return model
    parsed = _load_config(config)
    _check_vocabulary(parsed, tokenizer)
    return XLMRobertaForMaskedLM(parsed)


def _check_vocabulary(config: XLMRobertaConfig, tokenizer: XLMRobertaTokenizer) -> None:
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens but the config says vocab_size {config.vocab_size}: "
            f"set vocab_size to {len(tokenizer)}"
        )
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        ours, theirs = getattr(config, name), getattr(tokenizer, name)
        if ours != theirs:
            raise ValueError(f"{name} is {ours} in the config, {theirs} in the tokenizer: make them equal")


def pretrain(
    texts: Sequence[StrPath],
    output: StrPath,
    *,
    config: XLMRobertaConfig | StrPath | None = None,
    tokenizer: XLMRobertaTokenizer | StrPath | None = None,
    init: StrPath | None = None,
    held_out: StrPath | None = None,
    recipe: Recipe | dict[str, Any] | None = None,
    save_every: int = 1000,
    log_every: int = 50,
    device: str | torch.device | None = None,
    backend: str = "auto",
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains a masked language model on `texts` (files, one text a line, a tab inside making it a pair).

    Either `config` (a new model, with `tokenizer`) or `init` (a checkpoint to go on from, which brings its tokenizer).
    recipe: or some of its settings; the others are a resumed run's own, which none may contradict, else the defaults.
    Writes to `output`: every `save_every` steps `checkpoint-<step>` (model and state of the run, in place of the one
    before), every `log_every` steps a line of log.jsonl, at the end the model, the tokenizer and, where matplotlib is
    installed, loss.png. With `resume` a run in `output` is taken up at its checkpoint. progress: a bar on standard
    error, where that is a terminal. Returns what `xlmr pretrain --json` prints. ValueError for settings, texts or files
    that do not fit, OSError for what cannot be read, RuntimeError for a loss that is not finite.
    """
    for name, steps in (("save_every", save_every), ("log_every", log_every)):
        if steps < 1:
            raise ValueError(f"{name} is {steps}: at least 1 is needed")
    output = Path(output)
    found = _checkpoints(output)
    if found and not resume:
        raise ValueError(
            f"{output} holds a run at step {_step_of(found[-1])}: resume it (--resume), or choose another --output"
        )
    state = _read_state(found[-1]) if found else None
    before = state["recipe"] if state else {}
    recipe = Recipe(**before | (asdict(recipe) if isinstance(recipe, Recipe) else recipe or {}))
    if state:
        init = tokenizer = found[-1]
    elif resume and config is None and init is None:
        raise ValueError(f"{output} holds no checkpoint: for a new run, give what it starts from (--config or --init)")
    elif config is not None and init is not None:
        raise ValueError("config and init are both given: a new model has a config, one to go on from has its own")
    lines, held = Lines(texts), Lines([held_out]) if held_out else None
    if not isinstance(tokenizer, XLMRobertaTokenizer):
        tokenizer = _load_tokenizer(tokenizer if tokenizer is not None else init)
    torch.manual_seed(recipe.seed)
    model = _load_model(init, config, tokenizer)
    model.to(choose_device(device)).set_backend(backend)
    run = Run(model.train(), tokenizer, lines, recipe)
    if state:
        run.restore(state)
    return _train(run, output, held, save_every, log_every, progress)


def _train(
    run: Run, output: Path, held: Lines | None, save_every: int, log_every: int, progress: bool
) -> dict[str, Any]:
    """Runs the remaining steps, writing log and checkpoints; returns the summary."""
    recipe, began = run.recipe, time.monotonic()
    log = [entry for entry in _read_log(output / LOG) if entry["step"] <= run.step]
    write_atomically(output, {LOG: "".join(map(_log_line, log))})
    source = run.batches()
    losses: list[Tensor] = []
    with _bar(progress, recipe.steps, run.step) as bar, open(output / LOG, "a", encoding="utf-8") as file:
        while run.step < recipe.steps:
            losses.append(run.advance(source))
            saving = run.step == recipe.steps or run.step % save_every == 0
            if saving or run.step % log_every == 0:
                log.append(_log_entry(run, losses) | (_held_out(run, held) if saving and held else {}))
                losses = []
                file.write(_log_line(log[-1]))
                file.flush()
                bar.set_postfix({k: f"{v:.3f}" for k, v in log[-1].items() if "loss" in k}, refresh=False)
            if saving:
                run.save(output)
            bar.update()
    run.model.eval().save_pretrained(output)
    run.tokenizer.save_pretrained(output)
    _draw(log, output / CURVE)
    seconds = round(time.monotonic() - began, 1)
    return (log[-1] if log else {}) | _summary(run) | {"seconds": seconds, "output": str(output)}


def _summary(run: Run) -> dict[str, Any]:
    return {
        "epochs": run.position.epoch,
        "texts": run.encode.texts,
        "texts_cut": run.encode.cut,
        "max_length": run.encode.max_length,
        "parameters": run.model.num_parameters(),
    }


def _log_entry(run: Run, losses: list[Tensor]) -> dict[str, Any]:
    loss = float(torch.stack(losses).mean())
    if not math.isfinite(loss):
        raise RuntimeError(
            f"the loss became {loss} before step {run.step}: lower the learning rate, or raise the warm-up; "
            "the last checkpoint stands"
        )
    return {
        "step": run.step,
        "loss": loss,
        "learning_rate": run.recipe.learning_rate_at(run.step - 1),
        "tokens": run.tokens,
    }


def _read_log(path: Path) -> list[dict[str, Any]]:
    """The entries, without a line that a kill cut short."""
    entries = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            entries.append(json.loads(line))
    return entries


def _log_line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"


def _held_out(run: Run, held: Lines) -> dict[str, float]:
    encode = LineTokenizer(run.tokenizer, run.encode.max_length)
    loss = held_out_loss(run.model, held, encode, run.masker, run.recipe)
    if not math.isfinite(loss):  # NaN: of so little text no token was masked
        return {}
    return {"held_out_loss": loss, "held_out_perplexity": math.exp(min(loss, 700))}  # JSON has no infinity


def _bar(progress: bool, total: int, initial: int) -> Any:
    from tqdm import tqdm

    hidden = None if progress else True  # None: where no one looks
    return tqdm(total=total, initial=initial, unit="step", disable=hidden)


def _draw(log: list[dict[str, Any]], path: Path) -> None:
    """The loss curve as PNG, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("no %s: matplotlib is not installed (pip install matplotlib)", path.name)
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="masked cross entropy (nats)")
    for name, label in (("loss", "training"), ("held_out_loss", "held out")):
        points = [(entry["step"], entry[name]) for entry in log if name in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=label)
    axes.legend()
    figure.savefig(path, dpi=120)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `xlmr pretrain`."""
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="text file, one text a line; a tab makes a pair")
    parser.add_argument("--output", required=True, metavar="DIR", help="where checkpoints and the model are written")
    parser.add_argument("--config", metavar="FILE|DIR|NAME", help="configuration of a new model")
    parser.add_argument("--init", metavar="DIR|NAME", help="checkpoint to go on training, instead of --config")
    parser.add_argument("--tokenizer", metavar="DIR|NAME|FILE", help="tokenizer (default: that of --init)")
    parser.add_argument("--held-out", metavar="TEXT", help="text file whose perplexity is measured at each checkpoint")
    about = "take up the run in --output at its checkpoint, with its settings"
    parser.add_argument("--resume", action="store_true", help=about)
    for setting in fields(Recipe):
        option, about = "--" + setting.name.replace("_", "-"), setting.metadata["help"]
        if isinstance(setting.default, bool):
            parser.add_argument(option, action="store_true", default=None, help=about)
        else:
            about = f"{about} (default {setting.default})"
            parser.add_argument(option, type=type(setting.default), metavar="N", help=about)
    for option, steps, about in (("--save-every", 1000, "checkpoints"), ("--log-every", 50, "lines of log.jsonl")):
        about = f"steps between {about} (default {steps})"
        parser.add_argument(option, type=int, default=steps, metavar="N", help=about)
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: a GPU where there is one)")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="which path computes (default auto)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, which only a terminal shows anyway")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def main(args: argparse.Namespace) -> int:
    """Train a masked language model on text files, or go on training one."""
    given = {setting.name: getattr(args, setting.name) for setting in fields(Recipe)}
    summary = pretrain(
        args.texts,
        args.output,
        config=args.config,
        tokenizer=args.tokenizer,
        init=args.init,
        held_out=args.held_out,
        recipe={name: value for name, value in given.items() if value is not None},
        save_every=args.save_every,
        log_every=args.log_every,
        device=args.device,
        backend=args.backend,
        resume=args.resume,
        progress=not args.quiet,
    )
    if args.json:
        print_json(summary)
    else:
        shown = ((name, f"{value:.6g}" if isinstance(value, float) else value) for name, value in summary.items())
        print_table((name.replace("_", " "), value) for name, value in shown)
    if summary["texts_cut"]:
        print(f"{summary['texts_cut']} texts were cut to {summary['max_length']} tokens", file=sys.stderr)
    return 0
