"""The look-alikes of XLM-RoBERTa: the architectures that are computed here, and those that are refused, each by name.

The one table that configurations, checkpoints, pipelines and the encoders inside other libraries read.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, field
from typing import Any

OURS = "XLMRoberta"  # how the names of our classes begin


@dataclass(frozen=True)
class Kind:
    """An architecture with XLM-RoBERTa's module tree, and what sets it apart.

    classes: how the names of transformers' classes begin.  renamed: heads whose name ends otherwise than in XLM-R.
    prefix: of the base model's weights in files of a head.  defaults: of configuration fields whose default differs.
    positions_follow_pad: whether positions are counted from pad_token_id + 1, pad tokens skipped; else from 0, every
    token counted.  choices_drop_as_classifiers: whether ForMultipleChoice has the dropout of the other classifiers, not
    hidden_dropout_prob.  refused: heads that compute something else, and why.  tokenizer: why it is none of XLM-R's.
    """

    classes: str
    prefix: str = "roberta"
    positions_follow_pad: bool = True
    choices_drop_as_classifiers: bool = False
    defaults: dict[str, Any] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    tokenizer: str | None = None

    def named(self, part: str) -> str:
        """transformers' name of a class: ForMaskedLM → CamembertForMaskedLM."""
        return self.classes + self.renamed.get(part, part)

    def theirs(self, ours: str) -> str:
        """transformers' name for one of our classes; somebody's own class keeps its name."""
        return self.named(ours.removeprefix(OURS)) if ours.startswith(OURS) else ours

    def ours(self, theirs: str) -> str | None:
        """The reverse, by which our classes are found; None where ours computes something else."""
        if not theirs.startswith(self.classes):
            return None
        part = theirs.removeprefix(self.classes)
        ours = OURS + next((own for own, renamed in self.renamed.items() if renamed == part), part)
        return None if ours in self.refused else ours


BERT_LM = "its language-model head has other weights (cls.predictions) and the activation of config.hidden_act"
KINDS = {
    "xlm-roberta": Kind(OURS),
    "roberta": Kind("Roberta", defaults={"vocab_size": 50265}, tokenizer="RoBERTa: its tokenizer is a byte-level BPE"),
    "camembert": Kind("Camembert", tokenizer="CamemBERT: its tokenizer's special tokens have other ids"),
    "bert": Kind(  # with XLM-R's tokenizer: multilingual-e5-small, MiniLM
        "Bert",
        prefix="bert",
        positions_follow_pad=False,
        choices_drop_as_classifiers=True,
        defaults={"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None},
        renamed={"ForCausalLM": "LMHeadModel"},
        refused={
            "XLMRobertaForMaskedLM": BERT_LM,
            "XLMRobertaForCausalLM": BERT_LM,
            "XLMRobertaForSequenceClassification": "its classifier is a single linear layer on the pooler's vector",
        },
    ),
}
REFUSED = {
    "albert": "ALBERT: its layers share their weights, and its embeddings are projected",
    "big_bird": "BigBird: its attention is sparse",
    "data2vec-text": "data2vec: its weights have other names",
    "deberta": "DeBERTa: its attention sees relative positions",
    "deberta-v2": "DeBERTa v2 and v3: their attention sees relative positions",
    "distilbert": "DistilBERT: it has no token types, and its modules other names",
    "electra": "ELECTRA: its embeddings are projected, and it has no pooler",
    "ernie": "ERNIE: it adds embeddings of the task",
    "eurobert": "EuroBERT: rotary positions and normalisation before each block",
    "jina_embeddings_v3": "the jina-embeddings-v3 family: rotary positions and an adapter per task",
    "longformer": "Longformer: its attention sees a window and global tokens",
    "megatron-bert": "Megatron-BERT: its layers normalise before attention and feed-forward, not after",
    "modernbert": "ModernBERT: rotary positions, local attention and gated feed-forward layers",
    "mpnet": "MPNet: its attention sees relative positions",
    "new": "the gte-multilingual family: rotary positions and gated feed-forward layers",
    "nomic_bert": "the nomic-embed family: rotary positions and gated feed-forward layers or mixtures of experts",
    "roberta-prelayernorm": "its layers normalise before attention and feed-forward, not after",
    "roformer": "RoFormer: rotary positions",
    "t5": "T5: its attention sees relative positions",
    "xlm": "an older architecture with language embeddings",
    "xlm-roberta-xl": "its layers normalise before attention and feed-forward, not after",
    "xmod": "X-MOD: its layers have an adapter for each language",
}


def kind_of(model_type: Any) -> Kind:
    """The kind of a configuration's model_type; ValueError, with the reason where it is known, for one not taken."""
    if isinstance(model_type, str) and model_type in KINDS:
        return KINDS[model_type]
    reason = REFUSED.get(model_type, "another architecture") if isinstance(model_type, str) else "not a name"
    raise ValueError(f"model_type is {reprlib.repr(model_type)} ({reason}); allowed: {', '.join(map(repr, KINDS))}")
