"""What the models return: the fields, their order and their tuple form are transformers'.

A field that is None is left out of the keys, of the iteration and of the tuple, so `loss, logits = model(...)[:2]` and
`model(...).logits` mean what users of the reference expect.
"""

from collections import OrderedDict
from dataclasses import dataclass, fields
from typing import Any, cast

from torch import Tensor
from torch.utils import _pytree as pytree

from .cache import KeyValueCache


class ModelOutput(OrderedDict):
    """An ordered mapping of the fields that are not None, also reachable as attributes and by position."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        pytree.register_pytree_node(
            cls,
            lambda output: (list(output.values()), list(output)),
            lambda values, keys: cls(**dict(zip(keys, values, strict=True))),
            serialized_type_name=f"xlmr.{cls.__name__}",
        )

    def __post_init__(self) -> None:
        """accelerate and DataParallel rebuild an output from one argument: a mapping, or pairs, of names and values."""
        first = next(iter(self.values()), None)
        if len(self) == 1 and not isinstance(first, Tensor):
            given = dict(cast(Any, first))
            self.clear()
            for field in fields(self):  # type: ignore[arg-type]
                setattr(self, field.name, given.pop(field.name, None))
            if given:
                raise TypeError(f"{type(self).__name__} has no fields {', '.join(map(repr, given))}")

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __setattr__(self, name: str, value: Any) -> None:
        if value is None and name in self:
            super().__delitem__(name)
        elif value is not None and (name in self or name in getattr(self, "__dataclass_fields__", ())):
            super().__setitem__(name, value)
        super().__setattr__(name, value)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        setattr(self, key, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), dict(self))

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in their order."""
        return tuple(self.values())


def _rebuild(cls: type, values: dict[str, Any]) -> ModelOutput:
    return cls(**values)


@dataclass
class BaseModelOutput(ModelOutput):
    """Of the base model. `last_hidden_state` [B, S, N]; `pooler_output` [B, N]; `hidden_states` layers + 1 × [B, S, N];
    `attentions` layers × [B, H, S, S]. Reference: BaseModelOutputWithPoolingAndCrossAttentions."""

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    past_key_values: KeyValueCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


@dataclass
class MaskedLMOutput(ModelOutput):
    """`loss` scalar; `logits` [B, S, V]."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class CausalLMOutput(ModelOutput):
    """`loss` scalar; `logits` [B, S, V]. Reference: CausalLMOutputWithCrossAttentions."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: KeyValueCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


@dataclass
class SequenceClassifierOutput(MaskedLMOutput):
    """`loss` scalar; `logits` [B, num_labels]."""


@dataclass
class TokenClassifierOutput(MaskedLMOutput):
    """`loss` scalar; `logits` [B, S, num_labels]."""


@dataclass
class MultipleChoiceOutput(MaskedLMOutput):
    """`loss` scalar; `logits` [B, choices]. Reference: MultipleChoiceModelOutput."""


@dataclass
class QuestionAnsweringOutput(ModelOutput):
    """`loss` scalar; `start_logits`, `end_logits` [B, S]. Reference: QuestionAnsweringModelOutput."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class GenerateOutput(ModelOutput):
    """Of generate. `sequences` [B, S + new]; `sequences_scores` [B], of beams; `scores`, as the settings have changed
    them, and `logits`, of each step [B, V]. Reference: GenerateDecoderOnlyOutput, GenerateBeamDecoderOnlyOutput."""

    sequences: Tensor | None = None
    sequences_scores: Tensor | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    past_key_values: KeyValueCache | None = None
