"""What the pipelines share: reading a call's inputs, tokenising them, and running them packed, longest first.

The texts of a call are tokenised together, sorted by length and run packed; no answer depends on the other texts.
"""

from __future__ import annotations

import inspect
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from os import PathLike
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..config import XLMRobertaConfig
from ..encode import Packed, batches, first_logits, longest, pack, tokens_at_once
from ..files import own_keywords
from ..ops import for_inference
from ..pretrained import XLMRobertaPreTrainedModel

STREAMED = 256  # how many texts of an iterator are read, sorted and run together
LONG_LIST = 1000  # from so many texts on, a bar on standard error shows the progress
Text = str | tuple[str, str]  # a text, or a pair of them


class Unpadded(NamedTuple):
    """A text's token ids, but for masked ones; `kept`: where they stood among `length` tokens."""

    ids: list[int]
    kept: list[int]
    length: int


class Pipeline(ABC):
    """One task: a model, which is put into eval mode, its tokenizer, and options that calls may override."""

    task: ClassVar[str]
    model_class: ClassVar[type[XLMRobertaPreTrainedModel]]
    takes: ClassVar[str] = "a string"

    def __init__(self, model: Any, tokenizer: Any, **options: Any) -> None:
        wanted = self.model_class
        if not isinstance(model, wanted) and not isinstance(getattr(model, "base_model", None), wanted):
            raise TypeError(f"{self.task} needs an xlmr.{wanted.__name__}, the model is a {type(model).__name__}")
        self.model: Any = model.eval()  # Any: a module's submodules have no types
        self.tokenizer = tokenizer
        self.options = self._checked(options)

    def __repr__(self) -> str:
        name = getattr(self.tokenizer, "name_or_path", "")
        return f"{type(self).__name__}({name!r}, {type(self.model).__name__}, {self.device})"

    @classmethod
    def saved_class(cls, config: XLMRobertaConfig) -> type[XLMRobertaPreTrainedModel]:
        """The class that a checkpoint is loaded as."""
        return cls.model_class

    @classmethod
    def from_checkpoint(
        cls, where: str | PathLike[str], hub: dict[str, Any], *, device: torch.device, backend: str, **path: Any
    ) -> Any:
        """What the constructor takes as `model`, read from a directory or the hub (`hub`: what finds its files);
        ValueError if it lacks the weights of the head that the task needs."""
        path.update(device=device, backend=for_inference(backend, device))
        config = XLMRobertaConfig.from_pretrained(where, **hub)
        kind = cls.saved_class(config)
        model, info = kind.from_pretrained(where, output_loading_info=True, **hub, **path)
        missing = sorted(name for name in info["missing_keys"] if "pooler." not in name)
        if missing:
            raise ValueError(
                f"{where} holds {' or '.join(config.architectures or ['a base model'])}, and lacks "
                f"{', '.join(missing[:4])}: for {cls.task} give a checkpoint of an xlmr.{kind.__name__}"
            )
        return model

    @property
    def device(self) -> torch.device:
        return self.model.device

    def __call__(self, inputs: Any, **options: Any) -> Any:
        """The answer for a string, the list of answers for a list of strings; `options` are those of `answers`. For an
        iterator or a torch Dataset an iterator of answers, which reads STREAMED texts ahead.

        Raises TypeError for other inputs and unknown options, ValueError for a text that the task or model cannot take.
        """
        options = {**self.options, **self._checked(options)}
        one = self._read(inputs)
        if one is not None:
            return self.answers([one], **options)[0]
        if isinstance(inputs, Dataset):
            inputs = map(inputs.__getitem__, range(len(inputs)))  # type: ignore[arg-type]
        if isinstance(inputs, Iterator):
            return chain.from_iterable(
                self._all(part, options) for part in iter(lambda: list(islice(inputs, STREAMED)), [])
            )
        return self._all(inputs, options)

    def _all(self, inputs: Any, options: dict[str, Any]) -> list[Any]:
        """The answers for a list; TypeError for what is none, or holds what is no input."""
        given = [self._read(text) for text in inputs] if isinstance(inputs, list | tuple) else [None]
        if None in given:
            raise TypeError(f"inputs is {inputs!r:.80}: {self.takes}, or a list of such, is needed")
        return self.answers(given, **options) if given else []

    def _read(self, one: Any) -> Any:
        """What `answers` takes of one input; None if it is none."""
        return one if isinstance(one, str) else None

    @abstractmethod
    def answers(self, texts: list[Any]) -> list[Any]:
        """One answer per text; the keyword parameters are the task's options."""

    def _checked(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options that `answers` takes; TypeError for any other."""
        options = own_keywords(options)
        allowed = list(inspect.signature(self.answers).parameters)[1:]
        for name in options:
            if name not in allowed:
                raise TypeError(f"{name!r} is no option of {self.task}: allowed are {', '.join(allowed)}")
        # transformers' enumerations hold the same names
        return {name: getattr(value, "value", value) for name, value in options.items()}

    def _encode(self, texts: Sequence[Text], tokenizer_kwargs: dict[str, Any] | None) -> list[Unpadded]:
        """The texts tokenised; ValueError for one that the model cannot take whole."""
        options = {"verbose": False, **(tokenizer_kwargs or {})}  # the error below says more than its warning
        batch = self.tokenizer(list(texts), **options) if texts else {"input_ids": []}
        if len(batch["input_ids"]) != len(texts):
            raise ValueError("return_overflowing_tokens cuts a text into several: a pipeline takes each text whole")
        masks = batch.get("attention_mask") or [[1] * len(ids) for ids in batch["input_ids"]]
        encoded = []
        for text, ids, mask in zip(texts, batch["input_ids"], masks, strict=True):
            kept = [i for i, keep in enumerate(mask) if keep]
            self._check_length(text, len(kept))
            encoded.append(Unpadded([ids[i] for i in kept], kept, len(ids)))
        return encoded

    def _check_length(self, text: Text, tokens: int) -> None:
        limit = self.model.config.max_length
        if tokens > limit:
            start = reprlib.repr(text if isinstance(text, str) else text[0])
            raise ValueError(
                f"the text {start} has {tokens} tokens, the model takes at most {limit}: "
                "shorten it, or truncate it with the tokenizer's option truncation=True"
            )

    @property
    def _longest(self) -> int:
        """The tokens that a text is truncated to."""
        return longest(self.model, self.tokenizer)

    def _batches(self, sequences: Sequence[list[int]], batch_size: int | None) -> Iterator[tuple[list[int], Packed]]:
        """`sequences`, lists of token ids, batch by batch: their indices, and themselves packed on the device."""
        found = batches([len(ids) for ids in sequences], tokens_at_once(None, self.model), batch_size)
        packed = ((batch, pack([sequences[i] for i in batch], self.device)) for batch in found)
        if len(sequences) < LONG_LIST:
            yield from packed
            return
        from tqdm import tqdm

        with tqdm(total=len(sequences), unit="text", desc=self.task, disable=None) as bar:  # None: where no one looks
            for batch in packed:
                yield batch
                bar.update(len(batch[0]))

    def _text_logits(self, sequences: Sequence[list[int]], batch_size: int | None) -> Tensor:
        """What a ForSequenceClassification makes of each of `sequences`: fp32 [len(sequences), labels], on the CPU. Of
        the last layer only the first tokens are computed."""
        out = torch.empty(len(sequences), self.model.config.num_labels)
        for batch, packed in self._batches(sequences, batch_size):
            out[batch] = first_logits(self.model, packed).float().cpu()
        return out

    def _token_rows(
        self, sequences: Sequence[list[int]], compute: Callable[[Packed], Tensor], batch_size: int | None
    ) -> Iterator[tuple[int, Tensor]]:
        """For each of `sequences` its index and its rows [L, …], on the CPU, of what `compute` makes of a packed batch,
        [T, …]."""
        for batch, packed in self._batches(sequences, batch_size):
            rows = compute(packed).cpu()
            yield from zip(batch, rows.split([len(sequences[i]) for i in batch]), strict=True)

    def _token_logits(self, sequences: Sequence[list[int]], head: Any, batch_size: int | None) -> list[Tensor]:
        """`head`, a linear layer, on the last layer of each of `sequences`: fp32 [L, labels], on the CPU."""

        def logits(packed: Packed) -> Tensor:
            return self.model.linear(head, self.model.base_model.forward_packed(*packed)).float()

        found = dict(self._token_rows(sequences, logits, batch_size))
        return [found[i] for i in range(len(sequences))]
