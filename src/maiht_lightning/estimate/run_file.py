"""Reading what is to be predicted from a run's own configuration file, such as those in `configs/`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..solvers import MAIHTConfig

# How Lightning's precisions keep weights; in all others they are float32.
_DTYPES = {"bf16-true": "bfloat16", "16-true": "float16"}
# Where a run's file has what `Job` calls so.
_PLACES = {
    "batch_size": "pruning.batch_size",
    "method": "pruning.method",
    "pattern": "pruning.pattern",
    "sparsity": "pruning.sparsity",
    "config": "pruning.config",
    "offload": "pruning.offload",
    "samples": "pruning.calibration.samples",
    "seqlen": "pruning.calibration.seqlen",
    "train_steps": "trainer.max_steps",
    "train_batch_size": "data.batch_size",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "optimizer": "model.optimizer",
    "eval_windows": "pruning.evaluation.max_windows",
    "eval_batch_size": "pruning.evaluation.batch_size",
    "tasks": "pruning.evaluation.tasks",
    "task_limit": "pruning.evaluation.limit",
    "task_batch_size": "pruning.evaluation.task_batch_size",
}
# What a run has where its file says nothing, and `Job` something else.
_RUN_DEFAULTS = {"batch_size": 1, "gradient_checkpointing": False, "optimizer": "adamw"}


def read_run_file(path: str | Path) -> tuple[str, dict[str, Any], list[str]]:
    """Read a configuration file of `maiht fit` or `maiht prune`.

    Args:
        path: The file.

    Returns:
        The model's name; settings of a `Job` by name; and sentences on what could not be read off.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no such configuration, or has settings that do not fit.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"the configuration of a run must be a file, but found none at {path}")
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    model = _at(found, "model.name_or_path")
    if not isinstance(model, str):
        raise ValueError(f"{path} must be the configuration of a run, with model.name_or_path, but has none")
    job = {name: value for name, place in _PLACES.items() if (value := _at(found, place)) is not None}
    job = {**_RUN_DEFAULTS, **job, "dtype": _DTYPES.get(str(_at(found, "trainer.precision")), "float32")}
    if isinstance(job.get("config"), Mapping):
        job["config"] = MAIHTConfig(**job["config"])
    notes = []
    if job.get("train_steps", -1) < 0:
        job.pop("train_steps", None)
        if _at(found, "trainer.max_epochs") is not None:
            notes.append(
                "the file has epochs, whose steps depend on the data: give --train_steps to have training predicted"
            )
    else:
        # An optimizer's step may take several passes.
        job["train_steps"] *= _at(found, "trainer.accumulate_grad_batches") or 1
    return model, job, notes


def _at(settings: Any, place: str) -> Any:
    """What stands at a dotted place, also below a class's `init_args`; None where there is nothing."""
    for name in place.split("."):
        if not isinstance(settings, Mapping):
            return None
        settings = {**settings, **(settings.get("init_args") or {})}.get(name)
    return settings
