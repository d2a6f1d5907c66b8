"""What the base model and every head share: loading and saving, tied weights, and the choice of the path (`ops`).

The names are those of transformers' PreTrainedModel, so that PEFT, trainers and users' code find what they call.
"""

import logging
import os
from collections.abc import Mapping
from numbers import Integral
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from . import checkpoint
from .adapters import Adaptable, save_adapter
from .block import Block
from .checkpoint import INITIALISED
from .config import XLMRobertaConfig
from .files import own_keywords, refuse_unknown, to_dtype
from .hub import Pushable, take_keywords
from .ops import Ops, resolve
from .outputs import ModelOutput

Output = TypeVar("Output", bound=ModelOutput)

logger = logging.getLogger(__name__)


def check_config(config: Any, cls: type) -> None:
    """TypeError unless `config` is ours (transformers' class has the same name), ValueError where a model of its kind
    computes something else under the head `cls`."""
    if not isinstance(config, XLMRobertaConfig):
        given = f"{type(config).__module__}.{type(config).__qualname__}"
        raise TypeError(f"config is a {given}: give an xlmr.XLMRobertaConfig, such as .from_dict(config.to_dict())")
    for base in cls.__mro__:
        if reason := config.kind.refused.get(base.__name__):
            theirs = config.kind.theirs(base.__name__)
            raise ValueError(
                f"{base.__name__} does not take model_type {config.model_type!r}: {reason}. Put {theirs}'s head on an "
                "XLMRobertaModel, which does, or keep that class and patch it: xlmr.accelerate"
            )


class XLMRobertaPreTrainedModel(Block, Pushable, Adaptable):
    """Base class of XLMRobertaModel and the heads."""

    config_class = XLMRobertaConfig
    base_model_prefix = "roberta"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["XLMRobertaEmbeddings", "XLMRobertaLayer"]  # wrapped by FSDP
    _tied_weights_keys: ClassVar[dict[str, str]] = {}
    _keys_to_ignore_on_save = None  # read by a Trainer that resumes and finds tied weights missing

    def __init__(
        self, config: XLMRobertaConfig, *, ops: Ops | None = None, backend: str = "auto", unpad: bool = True
    ) -> None:
        """A model with random weights; `from_pretrained` loads one.

        backend: which path computes: "auto" (resolved from the device of the parameters, again whenever they move),
            "eager", "prepacked" (eager with packed weights, on a CPU: xlmr.prepacked) or "triton".
        ops: instead of a backend any xlmr.ops.Ops, which then stays; `model.ops` may also be set at any moment.
        unpad: whether tokens whose mask is 0 are left out of the computation (their outputs are zeros) where no answer
            depends on them.
        """
        super().__init__()
        check_config(config, type(self))
        self.config = config
        self._unpad = unpad
        self._backend = None if ops is not None else backend
        self._ops, self._why = resolve(backend if ops is None else ops, torch.device("meta"))

    def post_init(self) -> None:
        """Initialises what is not yet, ties the weights and hands the ops to every block: the end of a constructor."""
        for module in self.modules():
            if not module.__dict__.get(INITIALISED) and not any(p.is_meta for p in module.parameters(recurse=False)):
                self._init_weights(module)
                module.__dict__[INITIALISED] = True
        self.tie_weights()
        self._choose_path()
        if getattr(self.config, "gradient_checkpointing", False):  # of an old file: done, and not to be saved again
            self.activation_checkpointing_enable()
            delattr(self.config, "gradient_checkpointing")

    # The path

    @property
    def ops(self) -> Ops:
        """The operations that compute this model."""
        return self._ops

    @ops.setter
    def ops(self, ops: Ops) -> None:
        if not isinstance(ops, Ops):
            raise TypeError(
                f"ops is a {type(ops).__name__}: give an xlmr.ops.Ops, such as EAGER or replace(model.ops, …)"
            )
        self._backend = None
        self._hand_down(ops, "the ops given")

    def set_backend(self, backend: str) -> None:
        """Takes another path, one of xlmr.ops.BACKENDS; RuntimeError where it cannot run."""
        resolve(backend, self.device)
        self._backend = backend
        self._choose_path()

    @property
    def unpad(self) -> bool:
        """Whether tokens whose mask is 0 are left out where no answer depends on them."""
        return self._unpad

    @unpad.setter
    def unpad(self, unpad: bool) -> None:
        for module in self.modules():
            if isinstance(module, XLMRobertaPreTrainedModel):
                module._unpad = unpad

    def set_attn_implementation(self, attn_implementation: str | None) -> None:
        """For code written for transformers; only noted in the configuration, since `ops` computes attention here."""
        self.config._attn_implementation = attn_implementation

    def backend_report(self) -> str:
        """Which path computes this model, and why, in words."""
        return self._why

    def _choose_path(self) -> None:
        ops, why = (self._ops, self._why) if self._backend is None else resolve(self._backend, self.device)
        if why != self._why:
            logger.info("%s: %s", type(self).__name__, why)
        self._hand_down(ops, why)

    def _hand_down(self, ops: Ops, why: str) -> None:
        for module in self.modules():
            if isinstance(module, XLMRobertaPreTrainedModel):
                module._ops, module._why, module._backend, module._unpad = ops, why, self._backend, self._unpad
            elif isinstance(module, Block):
                module.ops = ops

    def _apply(self, fn: Any, recurse: bool = True) -> "XLMRobertaPreTrainedModel":
        super()._apply(fn, recurse)
        self._choose_path()
        return self

    # Loading, saving, initialisation

    from_pretrained = classmethod(checkpoint.from_pretrained)

    @classmethod
    def _from_config(
        cls, config: XLMRobertaConfig, *, dtype: Any = None, torch_dtype: Any = None, **options: Any
    ) -> Any:
        """A model with random weights in `dtype`, by default the configuration's (which becomes `dtype`): what
        transformers' AutoModel.from_config calls."""
        dtype = next((given for given in (dtype, torch_dtype, config.dtype) if given is not None), None)
        config.dtype = None if dtype is None else to_dtype(dtype)
        return cls(config, **own_keywords(options)).to(config.dtype)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        *,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        safe_serialization: bool = True,
        variant: str | None = None,
        **upload: Any,
    ) -> None:
        """Writes config.json and the weights, atomically; xlmr.checkpoint.save_model says what the keywords mean. Of a
        model with adapters, the active one alone: see xlmr.adapters.save_adapter.

        is_main_process: nothing is written where this is False.  push_to_hub: the files are uploaded as well; `upload`
        are its keywords, of which repo_id is by default the directory's name.
        """
        hub = take_keywords(upload, save_directory)
        refuse_unknown("save_pretrained", upload)
        if not is_main_process:
            return
        saving: dict[str, Any] = {
            "state_dict": state_dict, "max_shard_size": max_shard_size, "safe_serialization": safe_serialization,
            "variant": variant,
        }  # fmt: skip
        if self._hf_peft_config_loaded:
            save_adapter(self, save_directory, state_dict)
        else:
            checkpoint.save_model(self, save_directory, **saving)
        if push_to_hub:
            self.push_to_hub(**hub, **saving)

    def init_weights(self) -> None:
        """The reference's name for post_init."""
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The reference's initialisation of one module: normal(0, initializer_range), biases and pad rows 0."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.normal_(0.0, self.config.initializer_range)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()
        elif isinstance(module, nn.LayerNorm):
            module.weight.fill_(1.0)
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter):
            bias.zero_()

    @property
    def all_tied_weights_keys(self) -> dict[str, str]:
        """What is tied to what in this model and in those inside it, where config.tie_word_embeddings says so."""
        ties: dict[str, str] = {}
        for path, module in self.named_modules():
            if isinstance(module, XLMRobertaPreTrainedModel) and module.config.tie_word_embeddings:
                own, prefix = module._tied_weights_keys or {}, f"{path}." if path else ""
                if not isinstance(own, Mapping):  # as in transformers 4
                    raise TypeError(f"_tied_weights_keys of {type(module).__name__} is {own}: give {{tied: tied to}}")
                ties |= {prefix + tied: prefix + source for tied, source in own.items()}
        return ties

    def tie_weights(self) -> None:
        """Makes each key of `all_tied_weights_keys` the same Parameter as its value."""
        for tied, source in self.all_tied_weights_keys.items():
            module, _, name = tied.rpartition(".")
            setattr(self.get_submodule(module), name, self.get_parameter(source))

    def returned(self, output: Output, return_dict: bool | None) -> Output | tuple[Any, ...]:
        """`output`, or its tuple where the call, or else the configuration, asks for that."""
        as_dict = self.config.use_return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    # What other libraries ask of a model

    @property
    def base_model(self) -> Any:
        return getattr(self, self.base_model_prefix, self)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    @property
    def name_or_path(self) -> str:
        return self.config.name_or_path

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many numbers the parameters hold; a tied parameter counts once."""
        excluded = {m.weight for m in self.modules() if isinstance(m, nn.Embedding)} if exclude_embeddings else set()
        return sum(
            p.numel() for p in self.parameters() if p not in excluded and (p.requires_grad or not only_trainable)
        )

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """The bytes of the parameters, and of the buffers too; a tied parameter counts once."""
        tensors = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(tensor.nbytes for tensor in tensors)

    def get_input_embeddings(self) -> Any:
        return self.base_model.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base_model.embeddings.word_embeddings = value

    def get_output_embeddings(self) -> Any:
        return None

    @classmethod
    def can_generate(cls) -> bool:
        return False

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Gives the vocabulary `new_num_tokens` rows (rounded up to a multiple of `pad_to_multiple_of`): old rows are
        kept, new ones are their mean (or, with mean_resizing=False, freshly initialised), the decoder and its bias
        follow, ties stay. Returns the word embeddings."""
        old = self.get_input_embeddings()
        size = old.num_embeddings if new_num_tokens is None else new_num_tokens
        for name, value in (("new_num_tokens", new_num_tokens), ("pad_to_multiple_of", pad_to_multiple_of)):
            if not isinstance(value, Integral | None):
                raise ValueError(f"{name} is {value!r}: an integer is needed")
        if pad_to_multiple_of:
            size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
        padding_idx = old.padding_idx
        if size <= (padding_idx or 0):
            raise ValueError(f"new_num_tokens is {size}: allowed are more than {padding_idx}, the id of the pad token")
        if size == old.num_embeddings:
            return old
        new = nn.Embedding(size, old.embedding_dim, padding_idx, device=old.weight.device, dtype=old.weight.dtype)
        self.set_input_embeddings(self._like(new, old, mean_resizing))
        self._resize_output(size, mean_resizing)
        self.config.vocab_size = size
        self.tie_weights()
        return new

    def _resize_output(self, size: int, mean: bool) -> None:
        """Gives the decoder `size` words, where a head has one."""

    @torch.no_grad()
    def _like(self, new: nn.Module, old: nn.Module, mean: bool) -> nn.Module:
        """`new` with the rows that `old` has, the further ones their mean or initialised; trainable as `old` is."""
        self._init_weights(new)
        for name, parameter in old.named_parameters():
            target = new.get_parameter(name)
            kept = min(len(target), len(parameter))
            target[:kept] = parameter[:kept]
            if mean:
                target[kept:] = parameter.float().mean(0).to(target.dtype)
            target.requires_grad_(parameter.requires_grad)
        new.__dict__[INITIALISED] = True
        return new.train(old.training)

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recomputes every n-th layer in the backward pass instead of keeping its activations."""
        if offload or every_n_layers < 1:
            raise ValueError(f"every_n_layers {every_n_layers}, offload {offload}: allowed are at least 1, and False")
        for encoder in self._owners("checkpointing"):
            encoder.checkpointing = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
            encoder.checkpoint_every = every_n_layers

    def activation_checkpointing_disable(self) -> None:
        for encoder in self._owners("checkpointing"):
            encoder.checkpointing = None

    @property
    def is_activation_checkpointing(self) -> bool:
        return any(encoder.checkpointing is not None for encoder in self._owners("checkpointing"))

    def _owners(self, setting: str) -> list[Any]:
        """The blocks with that attribute: one as a rule, more where somebody put several base models into his own."""
        return [module for module in self.modules() if isinstance(module, Block) and setting in vars(module)]

    # The names before transformers 5.23, which PEFT and most code still use.

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **settings: Any
    ) -> None:
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **settings)

    def gradient_checkpointing_disable(self) -> None:
        self.activation_checkpointing_disable()

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.is_activation_checkpointing

    def enable_input_require_grads(self) -> None:
        """Makes the embeddings' output require gradients, so that a frozen model passes them on to adapters."""
        for embeddings in self._owners("require_grads"):
            embeddings.require_grads = True

    def disable_input_require_grads(self) -> None:
        for embeddings in self._owners("require_grads"):
            embeddings.require_grads = False
