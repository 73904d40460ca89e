"""`sparse_finetune`: a second fit after the pruning, in the same run, with the zeros frozen."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from ..callbacks.compatibility import check_trainer, find_callback
from ..callbacks.distillation import Distillation
from ..callbacks.monitors import reset_monitors
from ..callbacks.pruning import MAIHTPruning
from ..validation import check_at_least
from .checkpoint import read_checkpoint


@dataclass(frozen=True)
class SparseFinetune:
    """Train the pruned model on with its zeros frozen, in the same run; only where max_epochs or max_steps is given.

    Args:
        max_epochs: Epochs after the pruning.
        max_steps: Optimizer steps after the pruning.
        learning_rate: Highest learning rate; by default the LightningModule's.
        warmup_fraction: Share of the steps over which the learning rate rises; by default the LightningModule's.
        distillation: Weight, in [0, 1], of the divergence from the model as it was before the pruning; the loss has
            the rest. 0 for none; else that model is saved and held in memory, too.
        temperature: Of the distillation.
    """

    max_epochs: int | None = None
    max_steps: int | None = None
    learning_rate: float | None = None
    warmup_fraction: float | None = None
    distillation: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("max_epochs", "max_steps"):
            if getattr(self, name) is not None:
                check_at_least(1, **{name: getattr(self, name)})
        for name, highest in (("learning_rate", inf), ("warmup_fraction", 1.0), ("distillation", 1.0)):
            value = getattr(self, name)
            if value is not None and not (0 <= value <= highest and value < inf):
                raise ValueError(f"{name} must lie between 0 and {highest:g}, but found {value!r}")
        if not 0 < self.temperature < inf:
            raise ValueError(f"temperature must be a positive number, but found {self.temperature!r}")

    @property
    def wanted(self) -> bool:
        """Whether there is anything to do."""
        return self.max_epochs is not None or self.max_steps is not None


def sparse_finetune(
    trainer: Trainer,
    module: LightningModule,
    settings: SparseFinetune,
    *,
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    datamodule: LightningDataModule | None = None,
    ckpt_path: str | None = None,
) -> None:
    """Fit once more with the Trainer that has pruned the model, with the zeros frozen.

    The optimizer and its schedule are new, the loggers and their step axis go on, and checkpoints go to
    `sparse_checkpoints/` in the run's folder. At the end the model is saved as `model_finetuned/` and measured as
    stage `finetuned`.

    Args:
        trainer: A Trainer with `MAIHTPruning` whose fit has ended. With `ckpt_path` it may be new.
        module: The LightningModule. The learning rate and warm-up are set as its attributes of these names.
        settings: How long, and how.
        train_dataloaders: As for `Trainer.fit`; so are the next two.
        val_dataloaders: See there.
        datamodule: See there.
        ckpt_path: A checkpoint of such a fit, which is resumed.

    Raises:
        MisconfigurationException: Nothing was pruned yet, the module has no such attribute, or there is no model to
            distil from; raised before anything is changed.

    Example::

        trainer = Trainer(max_epochs=1, callbacks=[MAIHTPruning(sparsity=0.6)])
        trainer.fit(module, data)
        sparse_finetune(trainer, module, SparseFinetune(max_epochs=1, learning_rate=1e-5), datamodule=data)
    """
    pruning = find_callback(trainer, MAIHTPruning)
    if pruning is None or not settings.wanted:
        raise MisconfigurationException(
            "sparse_finetune needs a Trainer with MAIHTPruning, and max_epochs or max_steps"
        )
    state = None if ckpt_path is None else saved_phase(ckpt_path)
    if state is None and (not pruning.pruned or ckpt_path is not None):
        raise MisconfigurationException(
            "sparse_finetune continues a Trainer whose fit has pruned the model, or a checkpoint that it has written "
            f"itself, but found {ckpt_path or 'a Trainer that has pruned nothing'}"
        )
    check_trainer(trainer, pruning, trains_on=True)
    folder = Path(state["output_dir"]) if state and pruning.output_dir is None else pruning.output_dir
    assert folder is not None  # set when the model was pruned
    changed = _attributes(module, settings)
    distillation = _distillation(folder, pruning.model, settings)
    # All is checked: from here on things are changed.
    if state is not None:
        pruning.load_state_dict(state)
    else:
        pruning.previous_fit = {"epochs": trainer.current_epoch, "steps": trainer.global_step}
    assert pruning.previous_fit is not None
    epochs, steps = pruning.previous_fit["epochs"], pruning.previous_fit["steps"]
    for name, value in changed.items():
        setattr(module, name, value)
    if hasattr(module, "previous_steps"):
        module.previous_epochs, module.previous_steps = epochs, steps  # type: ignore[assignment]
    trainer.fit_loop.max_epochs = -1 if settings.max_epochs is None else epochs + settings.max_epochs
    trainer.fit_loop.epoch_loop.max_steps = -1 if settings.max_steps is None else steps + settings.max_steps
    trainer.should_stop = False
    reset_monitors(trainer, folder / "sparse_checkpoints")
    rank_zero_info(f"Fine-tuning the pruned model with its zeros frozen, from step {trainer.global_step or steps}")
    # By the callback, so that also a fit which has made its last step is finished.
    pruning.resume_from = None if ckpt_path is None else Path(ckpt_path)
    with _added_after(trainer, pruning, distillation):
        trainer.fit(module, train_dataloaders, val_dataloaders, datamodule)


def saved_pruning(ckpt_path: str) -> dict[str, Any] | None:
    """What a checkpoint says of the pruning in its fit; None if it says nothing or is no file."""
    if not Path(ckpt_path).is_file():
        return None
    # Mapped: the weights are not read here.
    checkpoint = read_checkpoint(ckpt_path, mmap=True)
    return checkpoint.get("callbacks", {}).get(MAIHTPruning.__qualname__)


def saved_phase(ckpt_path: str) -> dict[str, Any] | None:
    """What a checkpoint says of the sparse fine-tune that has written it; None if it is of another fit."""
    state = saved_pruning(ckpt_path)
    return state if state and state["earlier"] else None


def _attributes(module: LightningModule, settings: SparseFinetune) -> dict[str, float]:
    """The module's attributes that the settings change, all of them there."""
    values = {name: getattr(settings, name) for name in ("learning_rate", "warmup_fraction")}
    changed = {name: value for name, value in values.items() if value is not None}
    for name, value in changed.items():
        if not hasattr(module, name):
            raise MisconfigurationException(
                f"{name}={value} cannot be set: {type(module).__name__} has no attribute of that name, from which its "
                f"configure_optimizers would take it"
            )
    return changed


def _distillation(folder: Path, model: str | None, settings: SparseFinetune) -> Distillation | None:
    """The callback that distils from the model as it was before the pruning, if that is asked for."""
    if not settings.distillation:
        return None
    teacher = folder / "model_dense"
    if not teacher.is_dir():
        raise MisconfigurationException(
            f"distillation needs the model from before the pruning in {teacher}: use MAIHTPruning(save_dense=True)"
        )
    return Distillation(str(teacher), settings.distillation, settings.temperature, model)


@contextmanager
def _added_after(trainer: Trainer, pruning: MAIHTPruning, callback: Callback | None) -> Iterator[None]:
    """One more callback for one fit, whatever becomes of it: the next one may be another."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    if callback is not None:
        callbacks.insert(callbacks.index(pruning) + 1, callback)
    try:
        yield
    finally:
        if callback is not None:
            callbacks.remove(callback)
