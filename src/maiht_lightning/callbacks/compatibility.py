"""What `MAIHTPruning` asks of a Trainer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, RichProgressBar, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from ..models.offload import is_sharded
from .schedule import PruningStep

C = TypeVar("C", bound=Callback)

STRATEGIES = (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)
# They inherit from those above, but DeepSpeed may split the weights, and XLA computes lazily on devices of its own.
UNFIT_HEIRS = (DeepSpeedStrategy, XLAStrategy, SingleDeviceXLAStrategy)


def find_callback(trainer: Trainer, kind: type[C]) -> C | None:
    """The Trainer's first callback of a class."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)


def check_trainer(trainer: Trainer, pruning: Callback, *, trains_on: bool) -> None:
    """Refuse what would undo the pruning, and strategies that split a model in ways it does not know.

    Args:
        trainer: The Trainer.
        pruning: `MAIHTPruning` among its callbacks.
        trains_on: Whether there is training to come after a pruning.

    Raises:
        MisconfigurationException: See above.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for index, callback in enumerate(callbacks):
        if not isinstance(callback, StochasticWeightAveraging | WeightAveraging):
            continue
        if index > callbacks.index(pruning):
            raise MisconfigurationException(
                f"{type(callback).__name__} stands after MAIHTPruning and would overwrite the pruned weights "
                f"with dense averages: put it before MAIHTPruning in the Trainer's callbacks"
            )
        if trains_on:
            raise MisconfigurationException(
                f"{type(callback).__name__} would average the weights from before the pruning into those from "
                f"after it: leave it out, or prune at the end"
            )
    if not isinstance(trainer.strategy, STRATEGIES) or isinstance(trainer.strategy, UNFIT_HEIRS):
        raise MisconfigurationException(
            f"MAIHTPruning does not work with {type(trainer.strategy).__name__}: where the model fits on each GPU use "
            f"strategy='ddp', where it does not ModelParallelStrategy(data_parallel_size=N, tensor_parallel_size=1) "
            f"(FSDP2), or prune afterwards with `maiht prune`"
        )


def check_offload(trainer: Trainer, offload: str, *, compact: bool) -> None:
    """Raise `MisconfigurationException` where a model that is not in memory as a whole would have to be."""
    if offload == "disk" and trainer.state.fn == TrainerFn.FITTING:
        raise MisconfigurationException("offload: disk leaves blocks in files, for `maiht prune`; a fit needs them")
    if compact and (offload == "disk" or isinstance(trainer.strategy, ModelParallelStrategy)):
        raise MisconfigurationException(
            "compact files are made of a model that is in memory as a whole: leave compact out, and afterwards "
            "`maiht export --model OUTPUT_DIR/model --output FOLDER`"
        )


def check_sharded(trainer: Trainer, model: nn.Module) -> None:
    """Raise `MisconfigurationException` where a module has not done what `ModelParallelStrategy` asks of it."""
    if not isinstance(trainer.strategy, ModelParallelStrategy) or trainer.world_size == 1:
        return
    if not is_sharded(model):
        raise MisconfigurationException(
            f"under ModelParallelStrategy a model is sharded by its LightningModule, but {type(model).__name__} has no "
            f"shards: call torch.distributed.fsdp.fully_shard in configure_model, or use strategy='ddp'"
        )


def process_group(trainer: Trainer) -> dist.ProcessGroup | None:
    """All of the Trainer's processes, if there are several."""
    return dist.group.WORLD if trainer.world_size > 1 else None


def check_reachable(steps: list[PruningStep], trainer: Trainer) -> None:
    """Raise `MisconfigurationException` if a step comes after the fit's end."""
    for step in steps:
        ends = {"epoch": trainer.max_epochs, "step": trainer.estimated_stepping_batches}
        end = ends.get(step.unit)
        if end is not None and 0 <= end < step.count:
            raise MisconfigurationException(
                f"prune_at: {step.name} is never reached, since the fit ends after {end} {step.unit}s"
            )


@contextmanager
def quiet_progress_bar(trainer: Trainer) -> Iterator[None]:
    """Stop Rich's live display, which would fight with the pruning's bar for the last line of the terminal."""
    bar = trainer.progress_bar_callback
    display = bar.progress if isinstance(bar, RichProgressBar) else None
    if display is not None:
        display.stop()
    yield
    if display is not None and trainer.training and not trainer.should_stop:
        display.start()
