"""Compact files of a sparse model: one bit per weight, and the values that are not zero.

Background: no on-disk format for unstructured sparsity is maintained elsewhere. This one holds, for every linear layer
in the decoder blocks that it makes smaller, `NAME.mask` (uint8, eight weights per byte, the first in the highest bit)
and `NAME.values` (the kept weights, row by row, in the model's dtype); every other tensor is stored as it is. A float16
layer at 50 % takes 9/16 of its dense size. A folder has one safetensors file per block, one for the rest, and
`compact.json`.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from .blocks import find_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INDEX = "compact.json"
VERSION = 1


def check_vacant(path: str | os.PathLike[str]) -> None:
    """Raise `ValueError` if a folder holds other files than a compact model's, which would be lost."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not (path / INDEX).exists())):
        raise ValueError(f"{path} holds other files than a compact model: name a new or empty folder")


@torch.no_grad()
def save_compact(model: "PreTrainedModel", path: str | os.PathLike[str], *, tokenizer: Any = None) -> Path:
    """Write a sparse model into a folder, much smaller than `save_pretrained` does.

    One block is packed at a time, so that little memory is needed. The folder appears whole or not at all.

    Args:
        model: A Hugging Face causal language model, on any device, in any dtype.
        path: The folder, new or empty; a compact model in it is replaced.
        tokenizer: Saved beside the model where one is given.

    Returns:
        The folder.

    Raises:
        ValueError: The folder holds other files than a compact model's, or the model has no decoder blocks that could
            be packed; see `find_blocks`.
    """
    path = Path(path)
    check_vacant(path)
    blocks = find_blocks(model)
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)

    sparse = {f"{path}.weight" for path, _ in blocks.linears()}
    shapes: dict[str, list[int]] = {}
    files = []
    groups: dict[str, dict[str, Tensor]] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        # A tied head (vocabulary, hidden) is the embedding again: it is left out, since loading ties it by the config.
        key = (tensor.data_ptr(), tensor.shape)
        if key in seen and tensor.numel():
            continue
        seen.add(key)
        index = name.removeprefix(f"{blocks.path}.").partition(".")[0] if name.startswith(f"{blocks.path}.") else ""
        groups.setdefault(f"block_{int(index):05d}" if index.isdigit() else "rest", {})[name] = tensor.detach()
    for group, tensors in groups.items():
        packed: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            mask = tensor != 0
            # A bit per weight has to cost less than the zeros (out, in) take: else the layer is stored dense.
            if name in sparse and tensor.numel() + 7 < 8 * int((~mask).sum()) * tensor.element_size():
                shapes[name] = list(tensor.shape)
                packed[f"{name}.mask"], packed[f"{name}.values"] = pack_mask(mask).cpu(), tensor[mask].cpu()
            else:
                packed[name] = tensor.cpu().contiguous()
        files.append(f"{group}.safetensors")
        save_file(packed, partial / files[-1], metadata={"format": "pt"})
    model.config.save_pretrained(partial)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(partial)
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    contents = {
        "format": "maiht-compact",
        "version": VERSION,
        "dtype": str(model.dtype).removeprefix("torch."),
        "files": files,
        "shapes": shapes,
    }
    (partial / INDEX).write_text(json.dumps(contents, indent=1) + "\n")
    if path.exists():
        shutil.rmtree(path)
    return partial.rename(path)


@torch.no_grad()
def load_compact(path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> "PreTrainedModel":
    """Load what `save_compact` has written: an ordinary dense model with the same zeros and the same values.

    Args:
        path: The folder.
        dtype: Floating-point format of the weights; by default as saved.

    Returns:
        The model in eval mode, on the CPU.

    Raises:
        ValueError: The folder is no compact model, is of a newer version, or is damaged.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(path)
    if not (path / INDEX).exists():
        raise ValueError(f"{path} is no compact model: it has no {INDEX}")
    index = json.loads((path / INDEX).read_text())
    if index.get("format") != "maiht-compact" or index.get("version", 0) > VERSION:
        raise ValueError(
            f"{path / INDEX} must be of format maiht-compact, version {VERSION} or older, but found "
            f"{index.get('format')!r}, version {index.get('version')!r}: a newer maiht-lightning may read it"
        )
    config = AutoConfig.from_pretrained(path)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype or getattr(torch, index["dtype"]))
    # Names whose values no file has given yet; at the end these may only be weights tied to others.
    missing = set(model.state_dict())
    for file in index["files"]:
        if not (path / file).exists():
            raise ValueError(f"{path} is damaged: {file} is missing")
        tensors = unpack(load_file(path / file), index["shapes"], str(path / file))
        unexpected = model.load_state_dict(tensors, strict=False).unexpected_keys
        if unexpected:
            raise ValueError(f"{path / file} does not fit the config beside it: {unexpected[0]} is unknown there")
        missing -= set(tensors)
    # Tied from the start: values are copied into the parameters that the config has made one.
    tied = (
        set(model.state_dict()) - {name for name, _ in model.named_parameters()} - {n for n, _ in model.named_buffers()}
    )
    if missing - tied:
        raise ValueError(f"{path} is damaged: {min(missing - tied)} is missing")
    return model.eval()


def unpack(tensors: Mapping[str, Tensor], shapes: Mapping[str, list[int]], source: str) -> dict[str, Tensor]:
    """Unpack the tensors of a compact file into dense ones by name.

    Raises:
        ValueError: A layer's mask and values do not fit each other; the message names it.
    """
    dense: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if part == "mask" and layer in shapes:
            values, shape = tensors[f"{layer}.values"], torch.Size(shapes[layer])
            mask = unpack_mask(tensor, shape)
            if int(mask.sum()) != len(values):
                raise ValueError(f"{source} is damaged: {layer} has {len(values)} values for {int(mask.sum())} weights")
            dense[layer] = values.new_zeros(shape).masked_scatter_(mask, values)
        elif not (part == "values" and layer in shapes):
            dense[name] = tensor
    return dense


def pack_mask(mask: Tensor) -> Tensor:
    """Pack booleans of any shape into bits: uint8 (ceil(numel / 8),), the first in the highest bit of its byte."""
    bits = mask.reshape(-1).to(torch.uint8)
    bits = functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    return (bits << torch.arange(7, -1, -1, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, shape: torch.Size) -> Tensor:
    """Unpack the booleans (shape) that `pack_mask` has packed."""
    bits = packed[:, None] >> torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device) & 1
    return bits.view(-1)[: shape.numel()].bool().view(shape)
