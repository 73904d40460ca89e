"""Hugging Face folders of a model, also of one in shards or on disk."""

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .offload import is_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def save_model(
    model: "PreTrainedModel", folder: str | os.PathLike[str], tokenizer: Any = None, *, writes: bool = True
) -> None:
    """Write a Hugging Face folder, also of a model in the shards of FSDP2 or on disk.

    Args:
        model: The causal language model; if it has shards, all of their processes must call this.
        folder: Where to write.
        tokenizer: Saved beside the model where one is given.
        writes: Whether this is the process that writes.
    """
    state: dict[str, Tensor] | None = None
    if is_sharded(model):
        gathered: dict[int, Tensor] = {}
        state = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if id(tensor) not in gathered:
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                gathered[id(tensor)] = whole.detach().cpu() if writes else whole.new_empty(0)
            state[name] = gathered[id(tensor)]
    # Of what is on disk, a file's worth is read at a time.
    size = "2GB" if any(parameter.is_meta for parameter in model.parameters()) else "50GB"
    if writes:
        model.save_pretrained(folder, state_dict=state, max_shard_size=size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
