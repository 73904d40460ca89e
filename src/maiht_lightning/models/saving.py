"""Hugging Face folders of a model, also of one in shards or on disk."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from .checksums import checksum
from .durable import replacing
from .offload import full_tensor, is_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def save_model(
    model: "PreTrainedModel", folder: str | os.PathLike[str], tokenizer: Any = None, *, writes: bool = True
) -> None:
    """Write a Hugging Face folder of a model in memory, in the shards of FSDP2 or on disk.

    The files are read again and compared with the model, bit by bit. Then they are brought to the disk, and the folder
    appears as a whole; one of that name is replaced.

    Args:
        model: The causal language model; if it has shards, all of their processes must call this.
        folder: Where to write.
        tokenizer: Saved beside the model where one is given.
        writes: Whether this is the process that writes.

    Raises:
        OSError: The disk is full or cannot be written to, or what it gives back is not the model. The folder of that
            name is as it was.
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
        with replacing(Path(folder)) as partial:
            # A copy: `save_pretrained` takes the names of tied weights out of it.
            model.save_pretrained(partial, state_dict=None if state is None else dict(state), max_shard_size=size)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            _compare(partial, model, state)


def _compare(folder: Path, model: "PreTrainedModel", state: Mapping[str, Tensor] | None) -> None:
    """Raise `OSError` unless a folder's files hold the model's tensors, and nothing else.

    They are compared by what they hold and not by name: a checkpoint's names may be others than the modules'.
    """
    expected = dict(_contents(model) if state is None else ((name, _content(t)) for name, t in state.items()))
    written: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as handle:
                written.update({f"{name} in {file}": _content(handle.get_tensor(name)) for name in handle.keys()})  # noqa: SIM118
        except (SafetensorError, RuntimeError, ValueError) as error:
            raise OSError(f"{file} cannot be read after it was written: {error}. Is the disk at fault?") from error
    there, wanted = set(written.values()), set(expected.values())
    parameters = {name for name, _ in model.named_parameters()}
    # Buffers need not be in the files.
    wrong = [name for name, content in written.items() if content not in wanted]
    wrong += [f"{name} in {folder}" for name in sorted(parameters) if expected[name] not in there]
    if wrong:
        raise OSError(f"{wrong[0]} is not what was written, one of {len(wrong)} such tensors: is the disk at fault?")


def _contents(model: "PreTrainedModel") -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Shape, dtype, number of zeros and checksum of every parameter and buffer, read from disk where it is there."""
    for path, module in model.named_modules():
        for name in [*dict(module.named_parameters(recurse=False)), *dict(module.named_buffers(recurse=False))]:
            yield f"{path}.{name}".removeprefix("."), _content(full_tensor(module, name))


def _content(tensor: Tensor) -> tuple[Any, ...]:
    zeros = tensor.numel() - int(tensor.count_nonzero())
    return tensor.shape, tensor.dtype, zeros, checksum(tensor.cpu())
