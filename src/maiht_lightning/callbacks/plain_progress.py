"""`PlainProgress`: how far a fit is, in a line now and then."""

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

# Between two lines, in seconds: an hour of training is 60 lines of a log.
INTERVAL = 60.0


class PlainProgress(Callback):
    """Say which step a fit is at, and its loss, once a minute: for log files, in which a progress bar is unreadable.

    The numbers are those that a progress bar would show, as `prog_bar=True` marks them.
    """

    def __init__(self) -> None:
        # When the last line was printed, in seconds of `time.monotonic`.
        self._told = 0.0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how long the fit is."""
        self._told = time.monotonic()
        rank_zero_info(f"Training: {trainer.estimated_stepping_batches} steps")

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Print a line, if the last one was a minute ago."""
        if time.monotonic() - self._told >= INTERVAL:
            self._tell(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the last step's line."""
        self._tell(trainer)

    def _tell(self, trainer: Trainer) -> None:
        self._told = time.monotonic()
        numbers = "".join(f", {name} {value:.4g}" for name, value in trainer.progress_bar_metrics.items())
        rank_zero_info(f"Training: step {trainer.global_step}, epoch {trainer.current_epoch}{numbers}")
