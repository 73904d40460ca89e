"""A fit that resumes: from which checkpoint, with which loops of the Trainer, and what is known of its run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer

from ..pruning.journal import read_records
from ..records import PruningReport
from .monitors import note_saved
from .resume_point import RESUME_POINT

if TYPE_CHECKING:
    from .pruning import MAIHTPruning

# A Trainer's `max_epochs` and `max_steps`.
Limits = tuple[int | None, int]


def find_point(pruning: "MAIHTPruning", trainer: Trainer) -> Path | None:
    """The checkpoint from which a fit resumes; None where the Trainer was given one, or in a later fit."""
    if pruning.resume_from is not None:
        point, pruning.resume_from = pruning.resume_from, None
        return point
    if trainer.ckpt_path is not None or pruning.done or pruning.output_dir is None:
        return None
    point = pruning.output_dir / RESUME_POINT
    return point if point.exists() else None


def reload_run(pruning: "MAIHTPruning") -> None:
    """Read what an earlier process has written of a run, and tell the loggers of this one."""
    recorder = pruning.run.recorder
    recorder.reload(keep_finetuned=pruning.trained)
    records = read_records(recorder.folder / "journal")
    if pruning.pruned and pruning.report is None:
        pruning.report = PruningReport(records) if records else None
        recorder.begin(pruning.run.model)
        recorder.resume_finetuning(records)


# ---- The Trainer's loops


def lift_limits(trainer: Trainer) -> Limits:
    """Take the limits off a fit that has nothing to train, and return them; `leave_out_training` puts them back.

    Such a fit would be left out as a whole, and with it the hooks in which to prune.
    """
    limits = trainer.fit_loop.max_epochs, trainer.max_steps
    trainer.fit_loop.max_epochs = trainer.fit_loop.epoch_loop.max_steps = -1
    return limits


def leave_out_training(trainer: Trainer, limits: Limits) -> None:
    """Let the training loop end before its first batch, with its counters as they were when it ended."""
    loop: Any = trainer.fit_loop
    loop.max_epochs, loop.epoch_loop.max_steps = limits
    epochs = loop.epoch_progress
    if epochs.current.processed < epochs.current.started:
        # A checkpoint from the last step of a fit that ended within an epoch, which is counted as done.
        epochs.increment_processed()
        epochs.increment_completed()
    if loop.epoch_loop.restarted_on_train_batch_end:
        # One from within the step, which the loop counts when the next batch comes.
        loop.epoch_loop._batches_that_stepped += 1
    # The setter of the loop itself takes a fit that counts steps for one that goes on.
    loop.epoch_loop.restarting = False
    loop.on_iteration_done()
    trainer.should_stop = True
    note_saved(trainer)


def settle_counters(trainer: Trainer) -> None:
    """Make the counters of a loop that stops between two batches those from which it resumes with the next one."""
    loop: Any = trainer.fit_loop
    if loop.epoch_progress.current.processed == loop.epoch_progress.current.started:
        # Between two epochs; a loop that resumes would take the one before for a part of the next.
        loop.epoch_loop.batch_progress.reset_on_run()
    elif loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
        # A loop that resumes after its validation counts this batch's step by itself.
        loop.epoch_loop._batches_that_stepped -= 1


@contextmanager
def between_batches(trainer: Trainer) -> Iterator[None]:
    """Have the counters as they are before a batch, within `on_train_batch_start`: a checkpoint resumes with it."""
    loop: Any = trainer.fit_loop.epoch_loop
    progress, stepped = loop.batch_progress, loop._batches_that_stepped
    is_last = progress.is_last_batch
    for counted in (progress.total, progress.current):
        counted.ready -= 1
    progress.is_last_batch = False
    if loop._should_check_val_fx(trainer.fit_loop._data_fetcher):
        # As in `settle_counters`; an epoch's start counts as a time to validate, too.
        loop._batches_that_stepped -= 1
    try:
        yield
    finally:
        for counted in (progress.total, progress.current):
            counted.ready += 1
        progress.is_last_batch, loop._batches_that_stepped = is_last, stepped
