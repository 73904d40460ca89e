"""What `maiht` keeps of a run beside its results, so that the same command resumes it: `run.json`."""

import json
import secrets
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from ..callbacks.pruning import MAIHTPruning
from ..callbacks.resume_point import RESUME_POINT
from ..models.durable import write_text
from .checkpoint import read_checkpoint

RUN_FILE = "run.json"
# Settings that change nothing of what a run comes to.
FREE = ("trainer.enable_progress_bar", "trainer.enable_model_summary")


@dataclass
class RunState:
    """A run's command and settings, and how far it is.

    Args:
        command: `fit` or `prune`.
        settings: The whole configuration.
        wandb_ids: The ids of its W&B runs, in the order of the loggers.
        finished: Whether all of it is done.
    """

    command: str
    settings: dict[str, Any]
    wandb_ids: list[str] = field(default_factory=list)
    finished: bool = False

    @classmethod
    def read(cls, folder: Path) -> "RunState | None":
        """Read `run.json`; None if the folder has none.

        Raises:
            ValueError: The file holds something else.
        """
        path = folder / RUN_FILE
        if not path.exists():
            return None
        try:
            return cls(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is not a run's state: {error}; --fresh starts the run anew") from error

    def write(self, folder: Path) -> None:
        """Write `run.json`, whole or not at all."""
        write_text(folder / RUN_FILE, json.dumps(asdict(self), indent=2) + "\n")

    def differences(self, other: "RunState") -> list[str]:
        """What another run is asked for and this one was not, such as `trainer.max_steps: 3, now 6`."""
        before, now = _flat(self.settings), _flat(other.settings)
        found = [] if self.command == other.command else [f"command: {self.command}, now {other.command}"]
        for name in dict.fromkeys([*before, *now]):
            one, two = before.get(name), now.get(name)
            if one != two and name not in FREE:
                found.append(f"{name}: {json.dumps(one)}, now {json.dumps(two)}")
        return found


def new_wandb_id() -> str:
    """Make an id for a W&B run, of its own form: eight small letters and digits."""
    return "".join(secrets.choice("abcdefghijklmnopqrstuvwxyz0123456789") for _ in range(8))


def move_aside(folder: Path) -> Path:
    """Rename a run's folder by a number, as `NAME.1`, so that another run can begin there."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return folder.rename(aside)


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint from which a run can resume, and what it says of itself.

    Args:
        path: The file, or the folder of shards.
        pruning: `MAIHTPruning`'s state in it.
        step: Optimizer steps done.
    """

    path: Path
    pruning: dict[str, Any]
    step: int

    @property
    def is_sparse(self) -> bool:
        """Whether it was written by the sparse fine-tune."""
        return bool(self.pruning.get("earlier"))


def last_point(folder: Path) -> ResumePoint | None:
    """The checkpoint in a run's folder that has most of the run behind it; None if there is none."""
    found = []
    for path in folder.rglob("*.ckpt"):
        try:
            source = path / "meta.pt" if path.is_dir() else path
            # Mapped: the weights are not read here.
            content = read_checkpoint(source, mmap=not path.is_dir())
            if "optimizer_states" not in content and not path.is_dir():
                continue
            pruning = content["callbacks"][MAIHTPruning.__qualname__]
            point = ResumePoint(path, pruning, content["global_step"])
        except Exception as error:
            rank_zero_warn(f"{path} cannot be resumed from: {type(error).__name__}: {error}")
            continue
        is_ours = path == folder / RESUME_POINT
        found.append((point.is_sparse, point.step, pruning["done"], is_ours, path.stat().st_mtime_ns, point))
    return max(found, key=lambda each: each[:-1])[-1] if found else None


def resume_command(args: Sequence[str], folder: str) -> str:
    """The command that resumes a run which was started with some arguments."""
    kept = [arg for arg in args if arg != "--fresh"]
    if not any(arg == "--output_dir" or arg.startswith("--output_dir=") for arg in kept):
        kept += ["--output_dir", folder]
    return shlex.join(["maiht", *kept])


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names; lists stay whole where they hold no dictionaries."""
    if isinstance(settings, list) and any(isinstance(each, dict) for each in settings):
        settings = {str(index): each for index, each in enumerate(settings)}
    if not isinstance(settings, dict) or not settings:
        return {prefix: settings}
    return {
        name: value
        for key, part in settings.items()
        for name, value in _flat(part, f"{prefix}.{key}" if prefix else str(key)).items()
    }
