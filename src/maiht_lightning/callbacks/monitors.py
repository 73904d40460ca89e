"""Callbacks that remember scores: what they know of the dense model must not be held against the sparse one."""

from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint


def reset_monitors(trainer: Trainer, folder: Path | None = None) -> None:
    """Make the Trainer's `ModelCheckpoint`s and `EarlyStopping`s forget every score so far.

    A dense model has the lower loss: it would stay the best for ever, and stop a sparse fit early. Files written
    before stay where they are.

    Args:
        trainer: The Trainer.
        folder: Where checkpoints go from now on. None: where they went before.
    """
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            _forget_checkpoints(callback)
            if folder is not None:
                callback.dirpath = str(folder)
    for stopping in trainer.early_stopping_callbacks:
        if isinstance(stopping, EarlyStopping):
            stopping.wait_count = stopping.stopped_epoch = 0
            stopping.best_score = torch.tensor(torch.inf if stopping.mode == "min" else -torch.inf)


def note_saved(trainer: Trainer) -> None:
    """Let `ModelCheckpoint`s know that this step was saved: they do not remember it when they are restored."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.last_model_path:
            callback._last_global_step_saved = trainer.global_step
            callback._last_checkpoint_saved = callback.last_model_path


def _forget_checkpoints(callback: ModelCheckpoint) -> None:
    callback.best_k_models = {}
    callback.best_model_path = callback.kth_best_model_path = callback.last_model_path = ""
    callback.best_model_score = callback.current_score = None
    callback.kth_value = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)
    # `ModelCheckpoint` saves nothing while `global_step` is that of the last save. A pruning changes the weights
    # without a step, and what it leaves must be saved.
    callback._last_global_step_saved = 0
    callback._last_checkpoint_saved = ""
