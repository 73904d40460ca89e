"""A run's folder and the files in it."""

import csv
import json
import os
import secrets
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from ..records import LayerRecord


def fresh_run_folder(root: str | os.PathLike[str] = "runs") -> Path:
    """A name for a new run's folder: date, time and some chance, for jobs that start together. Nothing is made."""
    return Path(root) / f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


@dataclass
class Summary:
    """What `summary.json` holds; stages that were not run are absent.

    Args:
        method: Pruning method.
        sparsity: Fraction of zeros asked for.
        pattern: Sparsity pattern.
        measured_sparsity: Fraction of zeros counted over all pruned layers.
        stages: By stage (`dense`, `pruned`, `finetuned`): `{"perplexity": {text: value}, "tasks": {task: {metric:
            value}}, "mean_accuracy": fraction}`.
        seconds: Wall-clock time of `fit`, `capture`, `solve` and `evaluate`.
        peak_memory_bytes: Highest GPU memory of the process, or its highest resident memory without a GPU.
        predicted: For runs with a logger, by phase (`capture`, `solve`) what `maiht estimate` makes of this machine:
            `seconds`, `flops` and `device_bytes`.
    """

    method: str
    sparsity: float
    pattern: str
    measured_sparsity: float = 0.0
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    predicted: dict[str, dict[str, float]] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write `summary.json`, whole or not at all."""
        partial = folder / "summary.json.partial"
        partial.write_text(json.dumps(vars(self), indent=2) + "\n")
        partial.replace(folder / "summary.json")


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
    """One row a layer, in the order of `LAYER_COLUMNS`; objectives are empty for methods without one."""
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
    with (folder / "layers.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(LAYER_COLUMNS)
        writer.writerows(layer_rows(records))


def task_table(stages: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Headings and rows of the zero-shot results: a row a task and metric, a value and its standard error a stage."""
    tasks_of = {name: stage.get("tasks", {}) for name, stage in stages.items()}
    measured = dict.fromkeys(
        (task, metric)
        for tasks in tasks_of.values()
        for task, metrics in tasks.items()
        for metric in metrics
        if not metric.endswith("_stderr")
    )
    columns = ["task", "metric", *(f"{name}{suffix}" for name in tasks_of for suffix in ("", "_stderr"))]
    rows = [
        [
            task,
            metric,
            *(tasks.get(task, {}).get(metric + suffix) for tasks in tasks_of.values() for suffix in ("", "_stderr")),
        ]
        for task, metric in measured
    ]
    return columns, rows
