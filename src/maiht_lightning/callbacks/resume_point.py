"""A run's resume point: a checkpoint of a fit that has made its last step, on disk before its model is changed."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from ..interrupts import interrupts
from ..models.durable import naming, put_in_place, remove

RESUME_POINT = "resume.ckpt"


class _StreamingIO(TorchCheckpointIO):
    """Writes a checkpoint straight to its file: Lightning's own makes two copies of it in memory first."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        torch.save(checkpoint, path)


def save_point(trainer: Trainer, folder: Path) -> None:
    """Write the resume point into a run's folder, whole or not at all, and wait until it is on the disk.

    It is Lightning's checkpoint of all that the Trainer holds, in the weights' dtype; all processes call this.

    Raises:
        OSError: The disk is full or cannot be written to; an older resume point is as it was.
    """
    path, partial = folder / RESUME_POINT, folder / f"{RESUME_POINT}.partial"
    with interrupts.held(), naming(path):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            _save(trainer, partial)
            if trainer.is_global_zero:
                put_in_place(partial, path)
        except Exception:
            if trainer.is_global_zero:
                remove(partial)
            raise
        trainer.strategy.barrier("save_point")


def _save(trainer: Trainer, path: Path) -> None:
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        # A folder with each process's shards.
        trainer.save_checkpoint(path, weights_only=False)
        return
    usual, strategy.checkpoint_io = strategy.checkpoint_io, _StreamingIO()
    try:
        trainer.save_checkpoint(path, weights_only=False)
    finally:
        strategy.checkpoint_io = usual


def restore_point(trainer: Trainer, path: Path) -> None:
    """Restore all that a checkpoint holds, within `on_fit_start`; all processes call this."""
    rank_zero_info(f"MAIHTPruning: the run resumes from {path}")
    # As the Trainer does for `ckpt_path`, which a callback can no longer give it.
    trainer._checkpoint_connector.restore(path, weights_only=True)


def remove_point(trainer: Trainer, folder: Path) -> None:
    """Remove the resume point of a run that needs none any more."""
    path = folder / RESUME_POINT
    if trainer.is_global_zero:
        remove(path)
