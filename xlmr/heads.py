"""The six task heads. Names, arguments, losses and outputs are those of transformers' modeling_xlm_roberta."""

import functools
import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .block import EVERY_POSITION, Block, Encoded, RowBlock, plain, plain_norm, rate, untouched
from .checkpoint import values_follow
from .config import XLMRobertaConfig
from .generation import generate, prepare_inputs_for_generation
from .inputs import Arguments, as_targets, check_positions, check_tensors, class_labels
from .model import XLMRobertaModel
from .ops import Ops, top_words
from .outputs import (
    CausalLMOutput,
    MaskedLMOutput,
    MultipleChoiceOutput,
    QuestionAnsweringOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from .pretrained import XLMRobertaPreTrainedModel
from .varlen import Layout, plan

logger = logging.getLogger(__name__)

IGNORED = -100  # the label of a token that is not to be predicted


class XLMRobertaHead(XLMRobertaPreTrainedModel):
    """Base class of the heads: the base model `roberta` below, and the one place that runs it."""

    accepts_loss_kwargs = False  # for transformers' Trainer: whether forward takes num_items_in_batch
    has_pooler = False
    dropout: nn.Module

    def __init__(
        self, config: XLMRobertaConfig, *, ops: Ops | None = None, backend: str = "auto", unpad: bool = True
    ) -> None:
        super().__init__(config, ops=ops, backend=backend, unpad=unpad)
        self.add_head(config)  # first, as in the reference: the order of the parameters and of their initialisation
        self.roberta = XLMRobertaModel(config, add_pooling_layer=self.has_pooler)
        self.post_init()

    def add_head(self, config: XLMRobertaConfig) -> None:
        """Builds the modules that stand on the base model."""
        raise NotImplementedError

    def encode(self, inputs: Arguments, **needs: Any) -> tuple[Encoded, dict[str, Any]]:
        """Runs the base model on `inputs`, or calls it where it is not plain; `needs` as in XLMRobertaModel.encode.
        Returns the last layer's rows, and the fields that every output shares."""
        encoded = self.roberta.encode(inputs, **needs) if plain(self.roberta) else self._called(inputs)
        return encoded, {name: encoded.fields.get(name) for name in ("hidden_states", "attentions")}

    def _called(self, inputs: Arguments) -> Encoded:
        """What a base model that was replaced or hooked gives when it is called, as anyone else would call it."""
        given = {name: value for name, value in inputs._asdict().items() if value is not None}
        with EVERY_POSITION.set(True):
            output = self.roberta(**given, return_dict=True)
        hidden = output.last_hidden_state
        fields = {name: value for name, value in output.items() if name != "last_hidden_state"}
        return Encoded(hidden.flatten(0, 1), plan(*hidden.shape[:2], device=hidden.device), fields)

    def dropped(self, x: Tensor) -> Tensor:
        """The head's own dropout, where it is one of torch's; else whatever stands in its place."""
        return F.dropout(x, rate(self.dropout)) if plain(self.dropout, nn.Dropout) else self.dropout(x)

    def token_logits(self, classifier: nn.Module, x: Tensor, layout: Layout) -> Tensor:
        """`classifier` of every token, [T, N] → [B, S, labels]. One that is no linear layer (an LSTM, say) may mix
        positions: it is called on the padded batch."""
        if isinstance(classifier, nn.Linear):
            return layout.pad(self.linear(classifier, x))
        return classifier(layout.pad(x))


class XLMRobertaLMHead(RowBlock):
    """dense → GELU → LayerNorm → decoder, the last tied to the word embeddings."""

    def __init__(self, config: XLMRobertaConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder: nn.Module = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def transform(self, x: Tensor) -> Tensor:
        """What the decoder reads; [T, N] → [T, N]."""
        x, norm = self.linear(self.dense, x), self.layer_norm
        if plain_norm(norm):
            return self.ops.gelu_layer_norm(x, norm.weight, norm.bias, norm.eps)
        return norm(F.gelu(x))

    def rows(self, x: Tensor) -> Tensor:
        """Logits; [T, N] → [T, V]."""
        return self.linear(self.decoder, self.transform(x))

    def padded(self, x: Tensor, layout: Layout) -> Tensor:
        """Logits [B, S, V] of the rows x [T, N]; zeros where nothing was computed. A slice of rows at a time where no
        gradient is needed, since logits are by far the largest tensor of the model."""
        if layout.indices is None or (torch.is_grad_enabled() and x.requires_grad):
            return layout.pad(self.rows(x))
        logits = None
        for rows, where in zip(x.split(256), layout.indices.split(256), strict=True):
            part = self.rows(rows)
            if logits is None:
                logits = part.new_zeros(layout.batch * layout.seqlen, part.shape[-1])
            logits[where] = part
        return layout.pad(self.rows(x)) if logits is None else logits.unflatten(0, (layout.batch, layout.seqlen))

    def loss(self, x: Tensor, labels: Tensor, **settings: Any) -> Tensor:
        """Cross entropy of the rows x [T, N] against labels [T] (−100: none), without keeping logits; `settings` (such
        as reduction) are those of ops.vocab_cross_entropy."""
        x, decoder = self.transform(x), self.decoder
        if plain(decoder, nn.Linear):
            return self.ops.vocab_cross_entropy(x, decoder.weight, decoder.bias, labels, **settings)
        return F.cross_entropy(decoder(x), labels, **settings)


class XLMRobertaLanguageModel(XLMRobertaHead):
    """What the two language models share: the LM head tied to the word embeddings."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    }

    def add_head(self, config: XLMRobertaConfig) -> None:
        with values_follow():  # the decoder is as large as the word embeddings, to which it is tied
            self.lm_head = XLMRobertaLMHead(config)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head.decoder = new_embeddings

    def _resize_output(self, size: int, mean: bool) -> None:
        old = self.lm_head.decoder
        if isinstance(old, nn.Linear):
            new = nn.Linear(old.in_features, size, device=old.weight.device, dtype=old.weight.dtype)
            self.lm_head.decoder, bias = self._like(new, old, mean), self.lm_head.bias.detach()
            fill = float(bias.float().mean()) if mean else 0.0
            bias = F.pad(bias, (0, size - len(bias)), value=fill)  # a negative padding cuts
            self.lm_head.bias = nn.Parameter(bias, requires_grad=self.lm_head.bias.requires_grad)

    def checked_labels(self, labels: Tensor | None, inputs: Arguments, return_logits: bool) -> Tensor | None:
        """The labels as int64 [B, S]; ValueError where they do not fit, or where no logits are wanted without them."""
        if labels is None and not return_logits:
            raise ValueError("return_logits=False leaves nothing to return without labels: give labels")
        return class_labels(labels, inputs.shape, self.config.vocab_size)

    def outcome(
        self,
        encoded: Encoded,
        labels: Tensor | None,
        return_logits: bool,
        items: int | Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Loss (where there are `labels` [B, S]) and logits [B, S, V] (where wanted). The loss is the mean cross
        entropy, or with `items` the sum divided by it; where there are logits it is computed from them, in `dtype`."""
        x, layout, head, ours = encoded.x, encoded.layout, self.lm_head, plain(self.lm_head)
        if labels is None:
            return None, head.padded(x, layout) if ours else head(layout.pad(x))
        labels, rows = layout.unpad(labels.to(x.device)), None
        settings: dict[str, Any] = {} if items is None else {"reduction": "sum"}
        if ours and not return_logits:
            loss = head.loss(x, labels[labels != IGNORED] if encoded.picked else labels, **settings)
        else:  # the loss reads the rows, not the padded logits: its gradient has their size
            rows = head.rows(x) if ours else layout.unpad(head(layout.pad(x)))
            loss = F.cross_entropy(rows.to(dtype=dtype), labels, **settings)
        loss = loss if items is None else loss / items
        return loss, layout.pad(rows) if return_logits and rows is not None else None


def labelled(labels: Tensor, layout: Layout) -> Tensor:
    """The rows whose label in `labels` [B, S] is not −100."""
    return (layout.unpad(labels.to(layout.sequences.q_starts.device)) != IGNORED).nonzero().squeeze(1)


class XLMRobertaForMaskedLM(XLMRobertaLanguageModel):
    """Fills masks: logits over the vocabulary at every position."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        return_logits: bool = True,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MaskedLMOutput | tuple[Any, ...]:
        """`labels` [B, S], −100 where there is none. With return_logits=False only the loss is computed, from the
        labelled rows alone, and logits is None."""
        inputs = Arguments(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_attentions,
            output_hidden_states, encoder_hidden_states, encoder_attention_mask,
        )  # fmt: skip
        labels = self.checked_labels(labels, inputs, return_logits)
        ours, wanted = untouched(self.lm_head), None
        if ours and labels is not None and not (return_logits or torch.compiler.is_compiling()):
            wanted = functools.partial(labelled, labels)  # how many rows is unknown to a compiler
        encoded, shared = self.encode(inputs, labels=labels, wanted=wanted, every_position=not ours)
        loss, logits = self.outcome(encoded, labels, return_logits)
        return self.returned(MaskedLMOutput(loss, logits, **shared), return_dict)

    def topk_packed(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        *,
        rows: Tensor,
        k: int,
        targets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The k most probable words at the tokens `rows` (sorted int64 [R]) of packed texts (as in
        XLMRobertaModel.forward_packed), best first: log-probabilities fp32 [R, k] and ids [R, k]. The head computes
        those rows only. With `targets` [M] only those words compete; the softmax stays that of the whole vocabulary."""
        if not 1 <= k <= (self.config.vocab_size if targets is None else len(targets)):
            raise ValueError(f"k is {k}: allowed are 1 to the number of words that compete")
        x, decoder = self.roberta.forward_packed(input_ids, cu_seqlens, max_seqlen, rows=rows), self.lm_head.decoder
        if not (plain(self.lm_head) and plain(decoder, nn.Linear)):
            return top_words(self.lm_head(x[None])[0], k, targets)
        return self.ops.vocab_topk(self.lm_head.transform(x), decoder.weight, decoder.bias, k, targets)


class XLMRobertaForCausalLM(XLMRobertaLanguageModel):
    """Continues texts, token by token; causal only with config.is_decoder."""

    accepts_loss_kwargs = True
    loss_type = "ForCausalLM"  # for Trainer, which then counts the items from the second label on
    generation_config: Mapping[str, Any] = MappingProxyType({})  # of generation_config.json
    generate = generate
    prepare_inputs_for_generation = prepare_inputs_for_generation

    def add_head(self, config: XLMRobertaConfig) -> None:
        if not config.is_decoder:
            logger.warning("XLMRobertaForCausalLM sees the tokens that it predicts: set config.is_decoder=True")
        super().add_head(config)

    @classmethod
    def can_generate(cls) -> bool:
        return True

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        shift_labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        return_logits: bool = True,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutput | tuple[Any, ...]:
        """The loss is that of predicting token s + 1 of `labels` [B, S] from the logits at s, or token s of
        `shift_labels` [B, S], which go before, in fp32: the mean, or with `num_items_in_batch` the sum divided by it.
        `logits_to_keep`: the last n positions, or the positions given; 0 keeps all. With return_logits=False only the
        loss is computed, from the labelled rows, and logits is None."""
        use_cache = use_cache if labels is None and shift_labels is None else False
        inputs = Arguments(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_attentions,
            output_hidden_states, encoder_hidden_states, encoder_attention_mask, past_key_values, use_cache,
        )  # fmt: skip
        labels = self.checked_labels(labels, inputs, return_logits or shift_labels is not None)
        following = self.checked_labels(shift_labels, inputs, True)
        if following is None and labels is not None:
            following = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
        part = isinstance(logits_to_keep, Tensor) or logits_to_keep != 0
        if part and following is not None:
            raise ValueError("labels score every position: leave out logits_to_keep, or labels")
        whole = part or past_key_values is not None or not untouched(self.lm_head)
        encoded, shared = self.encode(inputs, labels=None if whole else following, every_position=whole)
        if part:
            kept = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep, None)
            loss, logits = None, self.lm_head(encoded.layout.pad(encoded.x)[:, kept])
        else:
            loss, logits = self.outcome(encoded, following, return_logits, num_items_in_batch, torch.float32)
        more = {name: encoded.fields.get(name) for name in ("past_key_values", "cross_attentions")}
        output = CausalLMOutput(loss, logits, **shared, **more)
        return self.returned(output, return_dict)


class XLMRobertaClassificationHead(Block):
    """dropout → dense → tanh → dropout → out_proj, of the first token's vector."""

    def __init__(self, config: XLMRobertaConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(classifier_dropout(config))
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)

    def rows(self, x: Tensor) -> Tensor:
        """First rows [B, N] → logits [B, num_labels]."""
        x = torch.tanh(self.linear(self.dense, self.dropout(x)))
        return self.linear(self.out_proj, self.dropout(x))

    def forward(self, features: Tensor, **ignored: Any) -> Tensor:
        """[B, S, N] → [B, num_labels]."""
        return self.rows(features[:, 0])


def classifier_dropout(config: XLMRobertaConfig) -> float:
    return config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout


class XLMRobertaForSequenceClassification(XLMRobertaHead):
    """One class, several labels or one number a text; also every cross-encoder."""

    def add_head(self, config: XLMRobertaConfig) -> None:
        self.num_labels = config.num_labels
        self.classifier = XLMRobertaClassificationHead(config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """`labels` [B] (classes or numbers) or [B, num_labels] (several labels, or several numbers)."""
        asked = output_attentions, output_hidden_states
        inputs = Arguments(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, *asked)
        head, ours = self.classifier, untouched(self.classifier)
        wanted = Layout.first_rows if ours else None
        encoded, shared = self.encode(inputs, wanted=wanted, reads_first=True, every_position=not ours)
        logits = head.rows(encoded.first_rows()) if ours else head(encoded.layout.pad(encoded.x))
        loss = None if labels is None else self.loss(logits, labels)
        return self.returned(SequenceClassifierOutput(loss, logits, **shared), return_dict)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """By config.problem_type, which the first labels decide if it is None."""
        check_tensors(labels=labels)
        config, labels = self.config, labels.to(logits.device)
        if config.problem_type is None:
            integers = labels.dtype in (torch.long, torch.int)
            several = "single_label_classification" if integers else "multi_label_classification"
            config.problem_type = "regression" if self.num_labels == 1 else several
        if config.problem_type == "single_label_classification":
            labels = labels.squeeze(-1) if labels.dim() > 1 else labels
            return F.cross_entropy(logits, class_labels(labels, logits.shape[:1], self.num_labels))
        if config.problem_type == "regression":
            logits, labels = (logits.squeeze(), labels.squeeze()) if self.num_labels == 1 else (logits, labels)
            targets = as_targets(labels, logits)
            dtype = torch.promote_types(logits.dtype, targets.dtype)
            return F.mse_loss(logits.to(dtype), targets.to(dtype))  # torch 2.11 promotes them in forward only
        return F.binary_cross_entropy_with_logits(logits, as_targets(labels, logits))


class XLMRobertaForMultipleChoice(XLMRobertaHead):
    """Chooses one of C texts."""

    has_pooler = True

    def add_head(self, config: XLMRobertaConfig) -> None:
        as_classifiers = config.kind.choices_drop_as_classifiers
        self.dropout = nn.Dropout(classifier_dropout(config) if as_classifiers else config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, 1)

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MultipleChoiceOutput | tuple[Any, ...]:
        """Ids [B, C, S] (or vectors [B, C, S, N]) → logits [B, C]; `labels` [B]."""
        given = input_ids if input_ids is not None else inputs_embeds
        if not isinstance(given, Tensor) or given.dim() < 3:
            raise ValueError(
                "give input_ids [batch, choices, sequence] or inputs_embeds [batch, choices, sequence, hidden]"
            )
        asked = output_attentions, output_hidden_states
        inputs = Arguments(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, *asked)
        flat: dict[str, Any] = {k: v.flatten(0, 1) for k, v in inputs._asdict().items() if isinstance(v, Tensor)}
        labels = class_labels(labels, given.shape[:1], given.shape[1])
        encoded, shared = self.encode(inputs._replace(**flat), wanted=Layout.first_rows, reads_first=True)
        pooled = encoded.fields["pooler_output"] if "pooler_output" in encoded.fields else self.roberta.pool(encoded)
        logits = self.linear(self.classifier, self.dropped(pooled)).view(-1, given.shape[1])
        loss = None if labels is None else F.cross_entropy(logits, labels.to(logits.device))
        return self.returned(MultipleChoiceOutput(loss, logits, **shared), return_dict)


class XLMRobertaForTokenClassification(XLMRobertaHead):
    """A label for each token, such as named entities."""

    def add_head(self, config: XLMRobertaConfig) -> None:
        self.num_labels = config.num_labels
        self.dropout = nn.Dropout(classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> TokenClassifierOutput | tuple[Any, ...]:
        """`labels` [B, S], −100 where there is none."""
        asked = output_attentions, output_hidden_states
        inputs = Arguments(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, *asked)
        labels = class_labels(labels, inputs.shape, self.num_labels)
        encoded, shared = self.encode(inputs, labels=labels, every_position=not isinstance(self.classifier, nn.Linear))
        layout = encoded.layout
        logits = self.token_logits(self.classifier, self.dropped(encoded.x), layout)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(layout.unpad(logits), layout.unpad(labels.to(logits.device)))
        return self.returned(TokenClassifierOutput(loss, logits, **shared), return_dict)


class XLMRobertaForQuestionAnswering(XLMRobertaHead):
    """Where an answer begins and ends in the text."""

    def add_head(self, config: XLMRobertaConfig) -> None:
        self.num_labels = config.num_labels
        self.qa_outputs = nn.Linear(config.hidden_size, config.num_labels)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> QuestionAnsweringOutput | tuple[Any, ...]:
        """Positions [B] give the loss; one outside the sequence is ignored. Every position is computed: the softmax
        over starts and ends runs over padding too."""
        asked = output_attentions, output_hidden_states
        inputs = Arguments(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, *asked)
        encoded, shared = self.encode(inputs, every_position=True)
        logits = self.token_logits(self.qa_outputs, encoded.x, encoded.layout)
        start_logits, end_logits = (part.squeeze(-1).contiguous() for part in logits.split(1, dim=-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            check_positions("start_positions", start_positions, len(logits))
            check_positions("end_positions", end_positions, len(logits))
            loss = (self.loss(start_logits, start_positions) + self.loss(end_logits, end_positions)) / 2
        return self.returned(QuestionAnsweringOutput(loss, start_logits, end_logits, **shared), return_dict)

    @staticmethod
    def loss(scores: Tensor, positions: Tensor) -> Tensor:
        """Cross entropy of scores [B, S] against positions [B] or [B, 1]; a position ≥ S is ignored, one < 0 is 0."""
        length = scores.shape[1]
        positions = positions.to(scores.device)
        positions = (positions.squeeze(-1) if positions.dim() > 1 else positions).long().clamp(0, length)
        return F.cross_entropy(scores, positions, ignore_index=length)
