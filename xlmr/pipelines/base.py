"""What the pipelines share: reading a call's inputs, tokenising them, and running them packed, longest first.

The texts of a call are tokenised together, sorted by length and run packed; no answer depends on the other texts.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..config import XLMRobertaConfig
from ..encode import BATCH_TOKENS, batches, first_logits, pack
from ..files import own_keywords
from ..pretrained import XLMRobertaPreTrainedModel

STREAMED = 256  # how many texts of an iterator are read, sorted and run together
LONG_LIST = 1000  # from so many texts on, a bar on standard error shows the progress
Text = str | tuple[str, str]  # a text, or a pair of them


class Unpadded(NamedTuple):
    """A text's token ids, those that attention leaves out dropped, and where the others stood among how many."""

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

    @classmethod
    def saved_class(cls, config: XLMRobertaConfig) -> type[XLMRobertaPreTrainedModel]:
        """The class that a checkpoint is loaded as."""
        return cls.model_class

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
        """The answers for a list."""
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
        options = own_keywords(options)
        allowed = list(inspect.signature(self.answers).parameters)[1:]
        for name in options:
            if name not in allowed:
                raise TypeError(f"{name!r} is no option of {self.task}: allowed are {', '.join(allowed)}")
        # transformers' enumerations hold the same names
        return {name: getattr(value, "value", value) for name, value in options.items()}

    def _encode(self, texts: Sequence[Text], tokenizer_kwargs: dict[str, Any] | None) -> list[Unpadded]:
        batch = self.tokenizer(list(texts), **(tokenizer_kwargs or {})) if texts else {"input_ids": []}
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
            start = text[:40] if isinstance(text, str) else text[0][:40]
            raise ValueError(
                f"the text {start!r} has {tokens} tokens, the model takes at most {limit}: "
                "shorten it, or truncate it with the tokenizer's option truncation=True"
            )

    @property
    def _longest(self) -> int:
        """The tokens that a text is truncated to."""
        return min(self.model.config.max_length, self.tokenizer.model_max_length)

    def _batches(self, sequences: Sequence[Sequence[int]], batch_size: int | None) -> Iterator[list[int]]:
        """The indices of `sequences`, lists of token ids, batch by batch."""
        found = batches([len(ids) for ids in sequences], BATCH_TOKENS, batch_size)
        if len(sequences) < LONG_LIST:
            yield from found
            return
        from tqdm import tqdm

        with tqdm(total=len(sequences), unit="text", desc=self.task, disable=None) as bar:  # None: where no one looks
            for batch in found:
                yield batch
                bar.update(len(batch))

    def _text_logits(self, encoded: Sequence[Unpadded], batch_size: int | None) -> Tensor:
        """What a ForSequenceClassification makes of each text: fp32 [len(encoded), labels], on the CPU. Of the last
        layer only the first tokens are computed."""
        out = torch.empty(len(encoded), self.model.config.num_labels)
        for batch in self._batches([one.ids for one in encoded], batch_size):
            packed = pack([encoded[i].ids for i in batch], self.device)
            out[batch] = first_logits(self.model, packed).float().cpu()
        return out

    def _token_logits(self, sequences: Sequence[list[int]], head: Any, batch_size: int | None) -> list[Tensor]:
        """Of each of `sequences` what `head`, a linear layer, makes of the last layer: fp32 [L, labels], on the CPU."""
        found: list[Any] = [None] * len(sequences)
        for batch in self._batches(sequences, batch_size):
            packed = pack([sequences[i] for i in batch], self.device)
            logits = self.model.linear(head, self.model.base_model.forward_packed(*packed)).float().cpu()
            for i, own in zip(batch, logits.split([len(sequences[i]) for i in batch]), strict=True):
                found[i] = own
        return found
