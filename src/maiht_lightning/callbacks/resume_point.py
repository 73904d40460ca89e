"""A run's resume point: a checkpoint of a fit that has made its last step, on disk before its model is changed."""

import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from ..interrupts import interrupts
from ..models.durable import put_in_place

RESUME_POINT = "resume.ckpt"


class _StreamingIO(TorchCheckpointIO):
    """Writes a checkpoint straight to its file: Lightning's own makes two copies of it in memory first."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        torch.save(checkpoint, path)


def save_point(trainer: Trainer, folder: Path) -> None:
    """Write the resume point into a run's folder, whole or not at all, and wait until it is on the disk.

    It is Lightning's checkpoint of all that the Trainer holds, in the weights' dtype; all processes call this.
    """
    path, partial = folder / RESUME_POINT, folder / f"{RESUME_POINT}.partial"
    strategy = trainer.strategy
    folder.mkdir(parents=True, exist_ok=True)
    with interrupts.held():
        if isinstance(strategy, ModelParallelStrategy):
            # A folder with each process's shards.
            trainer.save_checkpoint(partial)
        else:
            usual, strategy.checkpoint_io = strategy.checkpoint_io, _StreamingIO()
            try:
                trainer.save_checkpoint(partial)
            finally:
                strategy.checkpoint_io = usual
        if trainer.is_global_zero:
            put_in_place(partial, path)
        strategy.barrier("save_point")


def restore_point(trainer: Trainer, path: Path) -> None:
    """Restore all that a checkpoint holds, within `on_fit_start`; all processes call this."""
    rank_zero_info(f"MAIHTPruning: the run resumes from {path}")
    # As the Trainer does for `ckpt_path`, which a callback can no longer give it.
    trainer._checkpoint_connector.restore(path, weights_only=True)


def remove_point(trainer: Trainer, folder: Path) -> None:
    """Remove the resume point of a run that needs none any more."""
    path = folder / RESUME_POINT
    if trainer.is_global_zero:
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
