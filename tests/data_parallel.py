"""Run by torchrun in test_trainers: every way to train in parallel, each process on its half of one batch.

Rank 0 writes the gradients of the whole parameters, by way and head, to the file named on the command line.
"""

import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import xlmr

SETTINGS: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 42, "type_vocab_size": 1, "initializer_range": 0.3, "num_labels": 3,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def model_and_batch(head: str) -> tuple[Any, dict[str, Tensor]]:
    """The same in every process: a head of random weights, and four texts, the first of them by far the longest."""
    torch.manual_seed(0)
    model = getattr(xlmr, f"XLMRobertaFor{head}")(xlmr.XLMRobertaConfig(**SETTINGS))
    mask = (torch.arange(12) < torch.tensor([12, 3, 5, 2])[:, None]).long()
    ids = torch.randint(4, 97, mask.shape).masked_fill(mask == 0, 1)
    labels = ids.masked_fill((mask == 0) | (ids % 3 != 0), -100) if head == "MaskedLM" else torch.tensor([2, 0, 1, 1])
    return model.train(), {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loss(model: Any, given: dict[str, Tensor], whole: dict[str, Tensor]) -> Tensor:
    """Of the part `given`, weighted by its share of the labels, so that the parts' losses add up to the whole's."""
    extra = {"return_logits": False} if whole["labels"].dim() > 1 else {}
    share = (given["labels"] != -100).sum() / (whole["labels"] != -100).sum()
    return model(**given, **extra).loss * share


def shard_layers(model: Any) -> nn.Module:
    for layer in model.roberta.encoder.layer:
        fully_shard(layer)
    return fully_shard(model)


WAYS: dict[str, Callable[[Any], nn.Module]] = {
    "DDP": DistributedDataParallel, "FSDP2": fully_shard, "FSDP2, layer by layer": shard_layers,
}  # fmt: skip


def gradients(wrap: Callable[[Any], nn.Module], head: str) -> dict[str, Tensor]:
    """Of the whole parameters, from this process's part of the batch and the others'."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model, whole = model_and_batch(head)
    wrapped = wrap(model)
    part = {name: tensor.chunk(world)[rank] for name, tensor in whole.items()}
    (loss(wrapped, part, whole) * world).backward()  # both ways average over the processes
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}


def main(output: str) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("error", message=".* returned a view tensor")
    dist.init_process_group("gloo")
    heads = ("MaskedLM", "SequenceClassification")
    found = {f"{way} {head}": gradients(wrap, head) for way, wrap in WAYS.items() for head in heads}
    if dist.get_rank() == 0:
        torch.save(found, output)
    dist.barrier()  # a process that leaves early breaks off what the other still does
    os._exit(0)  # not through the destructors: now and then one of gloo's finds its thread still running, and aborts


if __name__ == "__main__":
    main(sys.argv[1])
