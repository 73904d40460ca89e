"""A run's folder and the files in it."""

import csv
import json
import os
import secrets
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from ..models.durable import replacing, write_text
from ..records import LayerRecord, StageResult, Stages

SUMMARY_FILE = "summary.json"
PHASE_ORDER = ("fit", "capture", "solve", "reconstruct", "rescale", "journal", "finetune", "evaluate")


def fresh_run_folder(root: str | os.PathLike[str] = "runs") -> Path:
    """Name a new run's folder by date, time and some chance, for jobs that start together. Nothing is made."""
    return Path(root) / f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


@dataclass
class Summary:
    """What `summary.json` holds.

    Args:
        method: Pruning method.
        sparsity: Fraction of zeros asked for.
        pattern: Sparsity pattern.
        measured_sparsity: Fraction of zeros counted over all pruned layers.
        stages: What was measured at each stage.
        seconds: Wall-clock time per phase: `fit`, `capture`, `solve`, `reconstruct`, `rescale`, `journal`, `finetune`
            and `evaluate`.
        peak_memory_bytes: Highest GPU memory of the process, or its highest resident memory without a GPU.
        predicted: For runs with a logger, by phase (`capture`, `solve`) what `maiht estimate` makes of this machine:
            `seconds`, `flops` and `device_bytes`.
        failures: What failed beside the pruning and was left out, each with its `phase` and `message`.
        notes: What went otherwise than asked for, and well.
        saved: The models that are whole in the run's folder.
        pruning_memory_bytes: Highest GPU memory of the process while it pruned; 0 without a GPU.
        divergence: Where the pruned model was rescaled, how far its predictions were from the dense model's before and
            after that, in nats per token; see `PruningReport`. Empty elsewhere.
    """

    method: str
    sparsity: float
    pattern: str
    measured_sparsity: float = 0.0
    stages: Stages = field(default_factory=Stages)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    predicted: dict[str, dict[str, float]] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    pruning_memory_bytes: int = 0
    divergence: list[float] = field(default_factory=list)

    def add_seconds(self, phase: str, seconds: float) -> None:
        """Add wall-clock time to a phase, which may have been at work before."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    @property
    def seconds_in_order(self) -> dict[str, float]:
        """Wall-clock time per phase, in the order in which to show them; unknown phases come last."""
        known = [phase for phase in PHASE_ORDER if phase in self.seconds]
        return {name: self.seconds[name] for name in [*known, *(name for name in self.seconds if name not in known)]}

    @classmethod
    def read(cls, folder: Path) -> "Summary":
        """Read `summary.json`. Keys that are not known are left out, and absent ones are as in a new summary.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file holds something else.
        """
        path = folder / SUMMARY_FILE
        try:
            found = json.loads(path.read_text())
            names = {each.name for each in fields(cls)}
            known = {name: value for name, value in found.items() if name in names}
            stages = Stages({name: StageResult.from_json(stage) for name, stage in found.get("stages", {}).items()})
            return cls(**{**known, "stages": stages})
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a run's summary: {error}") from error

    def write(self, folder: Path) -> None:
        """Write `summary.json`, whole or not at all."""
        stages = {name: stage.to_json() for name, stage in self.stages.items()}
        content = {**vars(self), "stages": stages, "seconds": self.seconds_in_order}
        write_text(folder / SUMMARY_FILE, json.dumps(content, indent=2) + "\n")


LAYER_COLUMNS = (
    "name",
    "block",
    "out",
    "in",
    "sparsity",
    "relative_error",
    "objective_first",
    "objective_last",
    "iterations",
    "seconds",
)


def layer_rows(records: list[LayerRecord]) -> list[list[Any]]:
    """Make one row per layer, in the order of `LAYER_COLUMNS`; objectives are empty for methods without one."""
    return [
        [
            record.name,
            record.block,
            *record.shape,
            record.sparsity,
            record.relative_error,
            record.objective[0] if record.objective else None,
            record.objective[-1] if record.objective else None,
            len(record.objective),
            record.seconds,
        ]
        for record in records
    ]


def write_layers(folder: Path, records: list[LayerRecord]) -> None:
    """Write `layers.csv`."""
    with replacing(folder / "layers.csv") as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(LAYER_COLUMNS)
        writer.writerows(layer_rows(records))
