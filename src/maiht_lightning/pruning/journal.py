"""The journal of a pruning: finished blocks on disk, so that a crash costs one block and not the run.

A journal is a folder with `settings.json`, which says what is being pruned and how, and one safetensors file per
finished block with its weights and, in the metadata, its layer records. Files appear whole or not at all.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial as partial_of
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..models.blocks import find_blocks, find_linears
from ..models.offload import full_tensor, full_weight
from ..records import LayerRecord


class Journal:
    """Finished blocks in a folder.

    A folder that holds another pruning's journal (other settings, model or windows) is moved aside, never
    overwritten: `journal` becomes `journal.1` and so on. The model may be the dense one or the one that a
    failed pruning left in memory: its blocks are as they were, or as the journal has them.

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
        # Settings are compared in the form that JSON gives them: tuples become lists.
        settings = json.loads(json.dumps(settings))
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
        self.folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(settings, indent=2))
            partial.replace(path)

    def load(self, block: int) -> tuple[dict[str, Tensor], list[LayerRecord]] | None:
        """Read a finished block: its weights (out, in) by name in the block, and its records; None if it is none."""
        path = block_file(self.folder, block)
        if not path.exists():
            return None
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            records = json.loads(file.metadata()["records"])
        return weights, [_record(record) for record in records]

    def save(self, block: int, weights: dict[str, Tensor], records: list[LayerRecord]) -> None:
        """Save a finished block: its weights (out, in) by name in the block, and its records."""
        partial = block_file(self.folder, block).with_suffix(".partial")
        tensors = {name: weight.contiguous().cpu() for name, weight in weights.items()}
        digest = _digest({name: partial_of(Tensor.detach, weight) for name, weight in tensors.items()})
        metadata = {"records": json.dumps([asdict(record) for record in records]), "digest": digest}
        save_file(tensors, partial, metadata=metadata)
        partial.replace(block_file(self.folder, block))

    def _continues(self, found: Any, settings: dict[str, Any]) -> bool:
        if not isinstance(found, dict) or {**found, "blocks": 0} != {**settings, "blocks": 0}:
            return False
        # Each block of the model may be as it was when the journal was begun, or as the journal has pruned it.
        dense, now = found["blocks"], settings["blocks"]
        return len(dense) == len(now) and all(now[i] in (dense[i], self._pruned_digest(i)) for i in range(len(now)))

    def _pruned_digest(self, block: int) -> str | None:
        if not block_file(self.folder, block).exists():
            return None
        with safe_open(block_file(self.folder, block), framework="pt") as file:
            return str(file.metadata().get("digest"))

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
    """Read the layer records of all finished blocks in a journal's folder; none if there is no such folder."""
    records: list[dict[str, Any]] = []
    for path in sorted(Path(folder).glob("block_*.safetensors")):
        with safe_open(path, framework="pt") as file:
            records += json.loads(file.metadata()["records"])
    return [_record(record) for record in records]


def _record(found: dict[str, Any]) -> LayerRecord:
    """A layer record from its form in JSON, which has lists for tuples."""
    tuples = {name: tuple(found[name]) for name in ("shape", "block_error") if found.get(name) is not None}
    return LayerRecord(**{**found, **tuples})


def fingerprint(model: nn.Module, windows: Tensor) -> dict[str, Any]:
    """Digest calibration windows (samples, seqlen) and a model's parameters: a journal resumes where these are equal.

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
        "windows": _digest({"": partial_of(Tensor.detach, windows)}),
    }


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
