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
    """Write a Hugging Face folder of a model in memory, in the shards of FSDP2 or on disk.

    Args:
        model: The causal language model; if it has shards, all of their processes must call this.
        folder: Where to write.
        tokenizer: Saved beside the model where one is given.
        writes: Whether this is the process that writes.
    """
    state: dict[str, Tensor] | None = None
    if is_sharded(model):
        # PyTorch's `get_model_state_dict` would gather a tied head (vocabulary, hidden) a second time, and
        # `save_pretrained` would then write it beside the embedding that it is.
        gathered: dict[int, Tensor] = {}
        state = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if id(tensor) not in gathered:
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                gathered[id(tensor)] = whole.detach().cpu() if writes else whole.new_empty(0)
            state[name] = gathered[id(tensor)]
    # Weights on disk are read into memory by one file of the folder at a time, so that small files need little of it.
    size = "2GB" if any(parameter.is_meta for parameter in model.parameters()) else "50GB"
    if writes:
        model.save_pretrained(folder, state_dict=state, max_shard_size=size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
