"""Compact files of a sparse model: one bit per weight, and the values that are not zero.

Background: no on-disk format for unstructured sparsity is maintained elsewhere. This one holds, for every linear layer
in the decoder blocks that it makes smaller, `NAME.mask` (uint8, eight weights per byte, the first in the highest bit)
and `NAME.values` (the kept weights, row by row, in the model's dtype); every other tensor is stored as it is. A float16
layer at 50 % takes 9/16 of its dense size. A folder has one safetensors file per block, one for the rest, and
`compact.json` with a checksum for each tensor; docs/compact_format.md describes it.
"""

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial as partial_of
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .blocks import find_blocks
from .checksums import agrees, checksum, file_checksum
from .compact_index import INDEX, CompactFileError, CompactIndex, StoredTensor, damaged, read_index
from .durable import replacing
from .packing import pack, packed_bytes, unpack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

# Tensors that are read at a time. Checksums and unpacking run beside each other, where there are processors for them.
READERS = min(4, os.cpu_count() or 1)


def check_vacant(path: str | os.PathLike[str]) -> None:
    """Raise `ValueError` if a folder holds other files than a compact model's, which would be lost."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not (path / INDEX).exists())):
        raise ValueError(f"{path} holds other files than a compact model: name a new or empty folder")


@torch.no_grad()
def save_compact(model: "PreTrainedModel", path: str | os.PathLike[str], *, tokenizer: Any = None) -> Path:
    """Write a sparse model into a folder, much smaller than `save_pretrained` does.

    One block is packed at a time, so that little memory is needed. The folder is read again, brought to the disk, and
    then appears whole or not at all.

    Args:
        model: A Hugging Face causal language model, on any device, in any dtype.
        path: The folder, new or empty; a compact model in it is replaced.
        tokenizer: Saved beside the model where one is given.

    Returns:
        The folder.

    Raises:
        ValueError: The folder holds other files than a compact model's, or the model has no decoder blocks that could
            be packed; see `find_blocks`.
        CompactFileError: What was written is not what comes back when it is read: the disk is at fault.
        OSError: The disk is full or cannot be written to.
    """
    path = Path(path)
    check_vacant(path)
    blocks = find_blocks(model)
    sparse = {f"{path}.weight" for path, _ in blocks.linears()}
    groups: dict[str, dict[str, Tensor]] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        # A tied head (vocabulary, hidden) is the embedding again: it is left out, since loading ties it by the config.
        key = (tensor.data_ptr(), tensor.shape)
        if key in seen and tensor.numel():
            continue
        seen.add(key)
        index = name.removeprefix(f"{blocks.path}.").partition(".")[0] if name.startswith(f"{blocks.path}.") else ""
        group = f"block_{int(index):05d}" if index.isdigit() else "rest"
        groups.setdefault(f"{group}.safetensors", {})[name] = tensor.detach()
    with replacing(path) as partial:
        partial.mkdir()
        _write(partial, model, groups, sparse, tokenizer)
    return path


def _write(
    folder: Path, model: "PreTrainedModel", groups: dict[str, dict[str, Tensor]], sparse: set[str], tokenizer: Any
) -> None:
    """Write all files of a compact model into an empty folder, and read its tensors again.

    Args:
        folder: The folder.
        model: The model.
        groups: By the file's name the tensors that go into it.
        sparse: Names of those weights (out, in) that may be packed.
        tokenizer: Saved as well, unless it is None.
    """
    stored = []
    for file, tensors in groups.items():
        packed: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            dense = tensor.cpu().contiguous()
            parts = {name: dense}
            zeros = tensor.numel() - int(tensor.count_nonzero()) if name in sparse else 0
            # A bit per weight has to cost less than the zeros (out, in) take: else the layer is stored dense.
            if tensor.numel() + 7 < 8 * zeros * tensor.element_size():
                parts = dict(zip((f"{name}.mask", f"{name}.values"), pack(dense), strict=True))
            checksums = {part: checksum(values) for part, values in parts.items()}
            stored.append(StoredTensor(name, file, tensor.dtype, tuple(tensor.shape), checksums))
            packed.update(parts)
        save_file(packed, folder / file, metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    configs = {file.name: file_checksum(file) for file in sorted(folder.glob("*config.json"))}
    CompactIndex(model.dtype, stored, configs).write(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for _ in _read_tensors(folder, read_index(folder), unpacked=False):
        pass


@torch.no_grad()
def load_compact(path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> "PreTrainedModel":
    """Load what `save_compact` has written: an ordinary dense model with the same zeros and the same values.

    Each tensor is compared with its checksum and unpacked into the model, so that no second copy of the weights is
    made. Files of version 1 have no checksums; that is logged.

    Args:
        path: The folder.
        dtype: Floating-point format of the weights; by default as saved.

    Returns:
        The model in eval mode, on the CPU.

    Raises:
        CompactFileError: The folder is no compact model or is of a newer version, or one of its files is damaged,
            missing or another model's. It is a `ValueError`.
    """
    folder = Path(path)
    index = read_index(folder)
    if index.version == 1:
        log.warning(
            "%s has no checksums, since an older version wrote it: damage could go unseen. save_compact adds them",
            folder,
        )
    model = _empty_model(folder, index, dtype)
    targets = model.state_dict(keep_vars=True)
    given: set[int] = set()
    for stored, tensor in _read_tensors(folder, index, dtype):
        target = targets.get(stored.name)
        if target is None or target.shape != tensor.shape:
            found = "unknown" if target is None else f"of shape {tuple(target.shape)}"
            raise damaged(
                folder / stored.file,
                f"{stored.name} of shape {stored.shape} does not fit config.json, for which it is {found}",
            )
        # Tied weights are one parameter, which has new values thereby under all of its names.
        target.data = tensor
        given.add(id(target))
    for name, target in targets.items():
        if id(target) not in given:
            raise damaged(folder, f"{name} is missing")
    return model.eval()


def _empty_model(folder: Path, index: CompactIndex, dtype: torch.dtype | None) -> "PreTrainedModel":
    """The model that the config describes, with weights that have no values yet."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.initialization import no_init_weights

    for name, expected in index.files.items():
        if not (folder / name).is_file():
            raise damaged(folder, f"{name} is missing")
        if not agrees(folder / name, expected):
            raise damaged(
                folder / name,
                f"it is not as it was written. If you have changed it on purpose, take its line out of {INDEX}",
            )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype or index.dtype, trust_remote_code=False)
        # What begins without values begins untied as well.
        model.tie_weights()
        if (folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    except Exception as error:
        raise CompactFileError(f"{folder / 'config.json'} gives no model: {error}") from error
    return model


def _read_tensors(
    folder: Path, index: CompactIndex, dtype: torch.dtype | None = None, *, unpacked: bool = True
) -> Iterator[tuple[StoredTensor, Tensor]]:
    """Read and check one file's tensors after another; each is new memory, in the dtype asked for.

    Args:
        folder: Of the compact model.
        index: What is there.
        dtype: Floating-point format; by default as stored.
        unpacked: Whether the tensors are made; else they are checked alone, and each is empty.

    Raises:
        CompactFileError: A file is not what the index says.
    """
    with ThreadPoolExecutor(READERS, "compact-reader") as readers:
        for file, tensors in index.by_file().items():
            mapped = _map_file(folder / file, {part for stored in tensors for part in stored.checksums})
            read = partial_of(_read_tensor, mapped, folder / file, dtype=dtype, unpacked=unpacked)
            yield from zip(tensors, readers.map(read, tensors), strict=True)


def _map_file(path: Path, expected: set[str]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, which must have these names, in memory that is mapped to it."""
    if not path.is_file():
        raise damaged(path.parent, f"{path.name} is missing")
    try:
        with safe_open(path, framework="pt") as handle:
            there = set(handle.keys())
            if there != expected:
                name = min(there ^ expected)
                raise damaged(path, f"{name} is {'unknown to ' + INDEX if name in there else 'missing'}")
            return {name: handle.get_tensor(name) for name in there}
    # What else its header may lead to: a dtype that PyTorch does not have is an AttributeError, for one.
    except (SafetensorError, OSError, RuntimeError, TypeError, AttributeError) as error:
        raise damaged(path, str(error)) from error


@torch.no_grad()
def _read_tensor(
    mapped: dict[str, Tensor], path: Path, stored: StoredTensor, dtype: torch.dtype | None, unpacked: bool
) -> Tensor:
    parts = []
    # Sorted, the bits come before the values.
    for name, expected in sorted(stored.checksums.items()):
        tensor = mapped[name]
        weights = torch.Size(stored.shape).numel()
        kind, shape = stored.dtype, stored.shape
        if name == f"{stored.name}.mask":
            kind, shape = torch.uint8, (packed_bytes(weights),)
        elif stored.packed:
            shape = (min(weights, tensor.numel()),)
        if tensor.dtype != kind or tensor.shape != shape:
            raise damaged(path, f"{name} is {tensor.dtype} {tuple(tensor.shape)}, but {INDEX} says {kind} {shape}")
        if expected is not None and not agrees(tensor, expected):
            raise damaged(path, f"{name} has another checksum than {INDEX} says")
        parts.append(tensor)
    if not unpacked:
        return torch.empty(0)
    wanted = stored.dtype if dtype is None or not stored.dtype.is_floating_point else dtype
    if not stored.packed:
        return parts[0].to(wanted, copy=True)
    out = torch.empty(stored.shape, dtype=wanted)
    try:
        unpack(parts[0], parts[1].to(wanted), out)
    except ValueError as error:
        raise damaged(path, f"{stored.name} has {error}") from error
    return out
