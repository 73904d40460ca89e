"""Each row of numbers once in a W&B run, however often its process dies and is started again.

W&B writes a run's file in pieces, and what has not been written is lost when the process is killed; what a resumed fit
does again, such as steps after its last checkpoint, is logged a second time. So the rows are kept beside the run as
well: a process that resumes hands on those that W&B has not, and leaves out those that it has.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from ..interrupts import interrupts
from ..models.durable import write_text

_OF_A_PROCESS = ("seconds/", "predicted/", "tflops/")


class WandbRows:
    """Stands before a `WandbLogger`'s `log_metrics`.

    Args:
        logger: The logger.
        path: A file of the run, with a line of JSON per row.

    Attributes:
        problem: Why rows are not kept any more, or None.
    """

    def __init__(self, logger: WandbLogger, path: Path) -> None:
        self.logger, self.path = logger, path
        self.problem: str | None = None
        # Rows of earlier processes.
        self.rows = _read(path)
        self._known = {_identity(row["metrics"], row["step"]) for row in self.rows}
        # How many rows W&B has of this run; None until it was asked.
        self._count: int | None = None
        self._log: Callable[..., None] = logger.log_metrics
        self._log_settings: Callable[..., None] = logger.log_hyperparams
        logger.log_metrics = self.log_metrics  # type: ignore[method-assign]
        logger.log_hyperparams = self.log_hyperparams  # type: ignore[method-assign, assignment]

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log a row, unless an earlier process has. Tables and images are no numbers and logged always."""
        count = self._hand_on()
        numbers = {name: _number(value) for name, value in metrics.items()}
        if all(value is not None for value in numbers.values()):
            if _identity(numbers, step) in self._known:
                return
            # Written before W&B gets it, so that it is lost in no case.
            self._keep(json.dumps({"row": count, "step": step, "metrics": numbers}) + "\n")
        self._log(metrics, step)
        self._count = count + 1

    @rank_zero_only
    def log_hyperparams(self, settings: Any) -> None:
        """Log settings, with which a process begins."""
        self._hand_on()
        self._log_settings(settings)

    def _keep(self, line: str) -> None:
        """Write a row to the file. Where that fails no training is to end, since W&B gets the row all the same."""
        if self.problem is not None:
            # A row after one that is missing would be taken for that.
            return
        try:
            with interrupts.held():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a") as file:
                    file.write(line)
        except OSError as error:
            self.problem = (
                f"{self.path} could not be written: {error}. From here on W&B alone has the rows: those that it loses, "
                f"should the process die, are lost"
            )
            rank_zero_warn(self.problem)

    def _hand_on(self) -> int:
        """Log the rows that W&B has lost, once; returns how many it has."""
        if self._count is None:
            self._count = self._log_lost()
        return self._count

    def _log_lost(self) -> int:
        experiment: Any = self.logger.experiment
        # W&B's server says what it has. A run on disk begins a new file, which is to hold all of the run.
        count = int(getattr(experiment, "starting_step", 0) or 0)
        for row in self.rows:
            if row["row"] >= count:
                self._log(row["metrics"], row["step"])
        if getattr(experiment, "offline", False):
            _set_aside(Path(experiment.dir).parent, experiment.id)
        return max(count, self.rows[-1]["row"] + 1) if self.rows else count


def _read(path: Path) -> list[dict[str, Any]]:
    """Read the rows; of the last line there may be a part alone, which is cut off."""
    if not path.exists():
        return []
    whole, newline, rest = path.read_text().rpartition("\n")
    if rest:
        write_text(path, whole + newline)
    return [json.loads(line) for line in whole.splitlines()]


def _identity(metrics: Mapping[str, Any], step: int | None) -> tuple[int | None, Any, frozenset[str]]:
    # The blocks of a pruning are all of one step, and their rows have the same names. How fast a phase was, a process
    # that resumes it cannot say: its row for the same has other names of that kind.
    names = frozenset(name for name in metrics if not name.startswith(_OF_A_PROCESS))
    return step, metrics.get("prune/block"), names


def _number(value: Any) -> float | None:
    value = value.item() if hasattr(value, "item") else value
    return value if isinstance(value, int | float) else None


def _set_aside(current: Path, run_id: str) -> None:
    """Move a run's older offline folders out of the way of `wandb sync`: the current one holds what they do."""
    for folder in current.parent.glob(f"offline-run-*-{run_id}"):
        if folder != current:
            aside = current.parent / "superseded"
            aside.mkdir(exist_ok=True)
            folder.rename(aside / folder.name)
