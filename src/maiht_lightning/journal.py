"""The journal of a pruning: finished blocks on disk, so that a crash costs one block and not the run.

A journal is a folder with `settings.json`, which says what is being pruned and how, and one safetensors file a
finished block with its weights and, in the metadata, its layer records. Files appear whole or not at all.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


@dataclass
class LayerRecord:
    """What happened to one linear layer.

    Args:
        name: Dotted path in the model.
        block: Index of its decoder block.
        shape: (out, in).
        zeros: Weights that are exactly 0, counted after rounding to the model's dtype.
        relative_error: ‖X(W − W0)ᵀ‖² / ‖X W0ᵀ‖² on the calibration inputs.
        objective: The solver's objective, iteration by iteration; empty where it does not iterate.
        accelerated: The monitor's choices; see `LayerResult`.
        seconds: Wall-clock time of the solver.
    """

    name: str
    block: int
    shape: tuple[int, int]
    zeros: int
    relative_error: float
    objective: list[float] = field(default_factory=list)
    accelerated: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return self.zeros / (self.shape[0] * self.shape[1])


class Journal:
    """Finished blocks in a folder.

    A folder that holds another pruning's journal (other settings, model or windows) is moved aside, never
    overwritten: `journal` becomes `journal.1` and so on.

    Args:
        folder: Where to keep it; made if it does not exist.
        settings: JSON-ready description of the pruning; see `fingerprint`.

    Attributes:
        moved_to: Where another pruning's journal was moved, or None.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.moved_to: Path | None = None
        path = self.folder / "settings.json"
        settings = json.loads(json.dumps(settings))
        if self.folder.exists() and any(self.folder.iterdir()) and self._read(path) != settings:
            number = 1
            while (aside := self.folder.with_name(f"{self.folder.name}.{number}")).exists():
                number += 1
            self.moved_to = self.folder.rename(aside)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(settings, indent=2))
            partial.replace(path)

    def load(self, block: int) -> tuple[dict[str, Tensor], list[LayerRecord]] | None:
        """Weights (out, in) by name in the block, and records, of a finished block; else None."""
        path = self._path(block)
        if not path.exists():
            return None
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            records = json.loads(file.metadata()["records"])
        return weights, [LayerRecord(**{**record, "shape": tuple(record["shape"])}) for record in records]

    def save(self, block: int, weights: dict[str, Tensor], records: list[LayerRecord]) -> None:
        """Note a finished block."""
        partial = self._path(block).with_suffix(".partial")
        tensors = {name: weight.contiguous().cpu() for name, weight in weights.items()}
        save_file(tensors, partial, metadata={"records": json.dumps([asdict(record) for record in records])})
        partial.replace(self._path(block))

    def _path(self, block: int) -> Path:
        return self.folder / f"block_{block:05d}.safetensors"

    @staticmethod
    def _read(path: Path) -> Any:
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError):
            return None


@torch.no_grad()
def fingerprint(model: nn.Module, windows: Tensor) -> dict[str, str]:
    """Short digests of a model's parameters and of calibration windows: equal ones continue a journal."""
    digest = hashlib.sha256()
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, parameter in model.named_parameters():
        # Sums of the bit patterns, taken on the device: any training step changes them.
        total = int(parameter.detach().view(bits[parameter.element_size()]).sum(dtype=torch.int64))
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {total}\n".encode())
    tokens = hashlib.sha256(windows.cpu().contiguous().numpy().tobytes()).hexdigest()
    return {"model": digest.hexdigest()[:16], "windows": tokens[:16]}
