"""The journal of a pruning: finished blocks on disk, so that a crash costs one block and not the run.

A journal is a folder with `settings.json`, which says what is being pruned and how, and one safetensors file per
finished block with its weights and, in the metadata, its layer records and checksums. Files are brought to the disk,
and appear whole or not at all. Once the pruned model is saved elsewhere, `drop_weights` leaves the records alone.
"""

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial as partial_of
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import __version__
from ..data.batches import Windows
from ..models.blocks import find_blocks, find_linears
from ..models.durable import replacing, sync, write_text
from ..models.offload import full_tensor, full_weight
from ..records import LayerRecord

log = logging.getLogger(__name__)

VERSION = 2
RECORDS = "records.json"
ALLOCATION = "allocation.json"
RESCALING = "rescaling.safetensors"
# What a damaged file may lead to, in safetensors, in JSON or where something is missing.
_DAMAGE = (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)


class Journal:
    """Finished blocks in a folder.

    A folder that holds another pruning's journal (other settings, model or windows) is moved aside, never
    overwritten: `journal` becomes `journal.1` and so on. The model may be the dense one or the one that a
    failed pruning left in memory: its blocks are as they were, or as the journal has them.

    A block whose file is damaged counts as unfinished.

    Args:
        folder: The journal's folder; made if it does not exist.
        settings: JSON-ready description of the pruning; see `fingerprint`.
        needs_dense: Whether the finished blocks' dense weights are needed to go on, so that the model has to be the
            dense one.

    Attributes:
        moved_to: Where another pruning's journal was moved, or None.

    Raises:
        ValueError: The folder holds other files than a journal's, or the model is a partly pruned one where the dense
            one is needed.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: dict[str, Any], *, needs_dense: bool = False) -> None:
        self.folder = Path(folder)
        self.moved_to: Path | None = None
        path = self.folder / "settings.json"
        versions = {"journal": VERSION, "maiht_lightning": __version__, "torch": torch.__version__}
        # Settings are compared in the form that JSON gives them: tuples become lists.
        settings = json.loads(json.dumps({**settings, "versions": versions}))
        files = [f.name for f in self.folder.iterdir() if f.suffix != ".partial"] if self.folder.exists() else []
        if files and not path.exists():
            raise ValueError(f"{self.folder} is no journal but holds {files[0]}: name a new or empty folder for it")
        if files and not self._continues(self._read(path), settings):
            number = 1
            while (aside := self.folder.with_name(f"{self.folder.name}.{number}")).exists():
                number += 1
            self.moved_to = self.folder.rename(aside)
        elif files and needs_dense and self._read(path)["blocks"] != settings["blocks"]:
            raise ValueError(
                f"the model is partly pruned already, and to resume {self.folder} the dense one is needed, whose "
                f"outputs the layers are fitted to: load it again"
            )
        if not path.exists():
            write_text(path, json.dumps(settings, indent=2))
            sync(self.folder.absolute().parent)

    def load(self, block: int) -> tuple[dict[str, Tensor], list[LayerRecord]] | None:
        """Read a finished block: its weights (out, in) by name in the block, and its records.

        None if it is none, or if its file is damaged, which is logged.
        """
        path = block_file(self.folder, block)
        if not path.exists():
            return None
        try:
            return _read_block(path, block)
        except _DAMAGE as error:
            log.warning("%s is damaged (%s): the block is pruned again", path, error)
            return None

    def save(self, block: int, weights: dict[str, Tensor], records: list[LayerRecord]) -> None:
        """Save a finished block: its weights (out, in) by name in the block, and its records.

        Raises:
            OSError: The disk is full or cannot be written to; the blocks before this one are kept.
        """
        tensors = {name: weight.contiguous().cpu() for name, weight in weights.items()}
        text = json.dumps([asdict(record) for record in records])
        metadata = {
            "block": str(block),
            "records": text,
            "records_crc32": _text_checksum(text),
            "digest": _digest_of(tensors),
        }
        with replacing(block_file(self.folder, block)) as partial:
            # The records that `drop_weights` has left are those of an earlier pruning, and factors of other weights.
            (self.folder / RECORDS).unlink(missing_ok=True)
            (self.folder / RESCALING).unlink(missing_ok=True)
            save_file(tensors, partial, metadata=metadata)

    def allocation(self) -> dict[str, int] | None:
        """Read the zeros of each layer's units, by path, that the blocks so far were pruned with; None if unknown."""
        found = self._read(self.folder / ALLOCATION)
        return found if isinstance(found, dict) else None

    def save_allocation(self, zeros: dict[str, int]) -> None:
        """Save the zeros of each layer's units: it is decided by the dense model, which a resumed pruning has not."""
        write_text(self.folder / ALLOCATION, json.dumps(zeros, indent=2))

    def rescaling(self) -> tuple[Tensor, tuple[float, float]] | None:
        """Read the factors of all layers (in one vector), and the divergence before and after; None if there are none.

        If the file is damaged there are none, which is logged.
        """
        path = self.folder / RESCALING
        if not path.exists():
            return None
        try:
            tensors, metadata = _read_tensors(path)
            before, after = json.loads(metadata["divergence"])
            return tensors["factors"], (before, after)
        except _DAMAGE as error:
            log.warning("%s is damaged (%s): the factors are learnt again", path, error)
            return None

    def save_rescaling(self, factors: Tensor, divergence: tuple[float, float]) -> None:
        """Save the factors of all layers (in one vector), which belong to the finished blocks' weights."""
        tensors = {"factors": factors.cpu()}
        metadata = {"divergence": json.dumps(divergence), "digest": _digest_of(tensors)}
        with replacing(self.folder / RESCALING) as partial:
            save_file(tensors, partial, metadata=metadata)

    def _continues(self, found: Any, settings: dict[str, Any]) -> bool:
        # Other versions' blocks are taken over, but not those of a journal that is newer than this code.
        others = {"blocks": 0, "versions": 0}
        if not isinstance(found, dict) or {**found, **others} != {**settings, **others}:
            return False
        if found.get("versions", {"journal": 1})["journal"] > VERSION:
            return False
        # Each block of the model may be as it was when the journal was begun, or as the journal has pruned it.
        dense, now = found["blocks"], settings["blocks"]
        return len(dense) == len(now) and all(
            now[i] == dense[i] or now[i] == self._pruned_digest(i) for i in range(len(now))
        )

    def _pruned_digest(self, block: int) -> str | None:
        found = self.load(block)
        return None if found is None else _digest_of(found[0])

    @staticmethod
    def _read(path: Path) -> Any:
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError):
            return None


def block_file(folder: str | os.PathLike[str], block: int) -> Path:
    """Path of a journal's file with the pruned weights (out, in) of a block, by the layers' names in it."""
    return Path(folder) / f"block_{block:05d}.safetensors"


def read_records(folder: str | os.PathLike[str]) -> list[LayerRecord]:
    """Read the layer records in a journal's folder; none if there is no such folder.

    They are those of all finished blocks, also if `drop_weights` has dropped these; damaged files are left out.
    """
    folder, records = Path(folder), []
    try:
        if (folder / RECORDS).exists():
            return _parse_records((folder / RECORDS).read_text())
    except _DAMAGE as error:
        log.warning("%s is damaged (%s): the layers' records are lost", folder / RECORDS, error)
    for path in sorted(folder.glob("block_*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                records += _checked_records(file.metadata())
        except _DAMAGE as error:
            log.warning("%s is damaged (%s): the records of its layers are lost", path, error)
    return records


def drop_weights(folder: str | os.PathLike[str]) -> None:
    """Delete the weights in a journal's folder, which are as large as the model's, and keep settings and records.

    This is for a pruning whose model is saved elsewhere: called again, `prune` begins anew. Does nothing if there is no
    such folder.
    """
    folder = Path(folder)
    files = sorted(folder.glob("block_*.safetensors"))
    if not files:
        return
    # Written before anything is deleted: a crash in between costs no record.
    if not (folder / RECORDS).exists():
        write_text(folder / RECORDS, json.dumps([asdict(record) for record in read_records(folder)], indent=2))
    for file in [*files, folder / RESCALING]:
        file.unlink(missing_ok=True)
    sync(folder)


def _read_block(path: Path, block: int) -> tuple[dict[str, Tensor], list[LayerRecord]]:
    """Read a block's file; raises one of `_DAMAGE` unless it is as it was written."""
    weights, metadata = _read_tensors(path)
    if _has_checksums(metadata) and metadata["block"] != str(block):
        raise ValueError(f"it is the file of block {metadata['block']}")
    return weights, _checked_records(metadata)


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file's tensors by name and its metadata; raises one of `_DAMAGE` unless they are as they were written."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata: dict[str, str] = file.metadata()
    if _has_checksums(metadata) and metadata["digest"] != _digest_of(tensors):
        raise ValueError("its weights have another checksum than when they were written")
    return tensors, metadata


def _has_checksums(metadata: Mapping[str, str]) -> bool:
    # In version 1 there were these two alone, and the digest was a sum. A damaged header is none of version 1.
    return set(metadata) != {"records", "digest"}


def _checked_records(metadata: Mapping[str, str]) -> list[LayerRecord]:
    text = metadata["records"]
    if _has_checksums(metadata) and metadata["records_crc32"] != _text_checksum(text):
        raise ValueError("its records have another checksum than when they were written")
    return _parse_records(text)


def _parse_records(text: str) -> list[LayerRecord]:
    return [_record(found) for found in json.loads(text)]


def _record(found: dict[str, Any]) -> LayerRecord:
    # JSON has lists for tuples.
    tuples = {name: tuple(found[name]) for name in ("shape", "block_error") if found.get(name) is not None}
    return LayerRecord(**{**found, **tuples})


def _text_checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def fingerprint(model: nn.Module, windows: Windows) -> dict[str, Any]:
    """Digest calibration windows and a model's parameters: a journal resumes where these are equal.

    The weights that are pruned have one digest per block, in `blocks`; `model` is that of all other parameters.
    """
    blocks = [find_linears(block) for block in find_blocks(model).modules]
    ids = {id(linear.weight) for block in blocks for linear in block.values()}
    others = {
        f"{path}.{name}".removeprefix("."): partial_of(full_tensor, module, name)
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if id(parameter) not in ids
    }
    pruned = [{name: partial_of(full_weight, linear) for name, linear in block.items()} for block in blocks]
    return {
        "model": _digest(others),
        "blocks": [_digest(block) for block in pruned],
        # Where all windows are of one length, as in journals of older versions.
        "windows": _digest({str(i or ""): partial_of(Tensor.detach, group) for i, group in enumerate(windows.groups)}),
    }


def _digest_of(weights: Mapping[str, Tensor]) -> str:
    return _digest({name: partial_of(Tensor.detach, weight) for name, weight in weights.items()})


@torch.no_grad()
def _digest(tensors: Mapping[str, Callable[[], Tensor]]) -> str:
    """Digest names, shapes, dtypes and all bits of the tensors. The order in which they are given does not matter.

    They come one by one, since they may have to be read from disk or gathered. SHA-256 takes about a second and a half
    per gigabyte where processors have instructions for it, less than a sum of the bits as integers.
    """
    digest = hashlib.sha256()
    for name, make in sorted(tensors.items()):
        tensor = make().detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
