"""Reading finished runs back from their folders."""

import csv
import json
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from ..formats import flatten
from ..summary import SUMMARY_FILE, Summary

# Settings, by the beginnings of their names, that do not change what a run's numbers mean: paths, and what is only
# shown.
IRRELEVANT = (
    "output_dir",
    "config",
    "trainer.default_root_dir",
    "trainer.logger",
    "trainer.callbacks",
    "trainer.log_every_n_steps",
    "trainer.enable_",
)
# Settings of what is done after the dense model was measured: they cannot change that measurement ...
AFTER_THE_DENSE = ("pruning.", "sparse_finetune.")
# ... except these, which say how it is measured.
MEASURING = "pruning.evaluation."
# These three have columns of their own in a comparison, and are no further distinctions.
IN_COLUMNS = ("pruning.method", "pruning.sparsity", "pruning.pattern")


@dataclass(frozen=True)
class Run:
    """A finished run, as far as comparisons need it.

    Args:
        folder: Its folder.
        summary: What `summary.json` holds.
        mean_relative_error: Mean over the layers; None where that is no number.
        settings: The configuration by dotted names, without seeds, paths and what is only shown.
        seeds: The seeds in the configuration.
        trained_before: Whether the model was trained in the run before it was pruned.
        config_known: Whether the run has a `config.yaml`.
        wandb_project: The W&B project that the configuration names, if it names one.
    """

    folder: Path
    summary: Summary
    mean_relative_error: float | None
    settings: dict[str, str]
    seeds: tuple[str, ...] = ()
    trained_before: bool = False
    config_known: bool = True
    wandb_project: str | None = None

    @property
    def distinctions(self) -> dict[str, str]:
        """All in which runs of one method, pattern and sparsity may differ, by the names that a report shows."""
        return {
            "command": "fit" if self.trained_before else "prune",
            "config.yaml": "present" if self.config_known else "absent",
            **self.settings,
        }

    @property
    def measurement_settings(self) -> dict[str, str]:
        """What the dense model and its measurement depend on; runs that share it can be compared."""
        return {
            name: value
            for name, value in self.distinctions.items()
            if not name.startswith(AFTER_THE_DENSE) or name.startswith(MEASURING)
        }


def read_run(folder: str | Path) -> Run:
    """Read a finished run's folder.

    Raises:
        ValueError: It is no run's folder, or the run is unfinished; the message names what is missing.
    """
    import yaml

    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no run's folder: there is no such folder")
    if not (folder / SUMMARY_FILE).exists():
        begun = [name for name in ("journal", "config.yaml") if (folder / name).exists()]
        if begun:
            raise ValueError(_unfinished(folder, SUMMARY_FILE))
        raise ValueError(f"{folder} is no run's folder: it has no summary.json")
    summary = Summary.read(folder)
    if "pruned" not in summary.stages:
        raise ValueError(_unfinished(folder, "the stage `pruned` in summary.json"))
    if not (folder / "layers.csv").exists():
        raise ValueError(_unfinished(folder, "layers.csv"))
    try:
        with (folder / "layers.csv").open(newline="") as file:
            errors = [float(row["relative_error"]) for row in csv.DictReader(file)]
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{folder / 'layers.csv'} is not a run's table of layers: {error!r}") from error
    try:
        config = _read_config(folder)
        configuration, project = _flat(config), _wandb_project(config)
    except (ValueError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(f"the configuration in {folder} cannot be read: {error}") from error
    mean_error = fmean(errors) if errors else inf
    return Run(
        folder=folder,
        summary=summary,
        mean_relative_error=mean_error if isfinite(mean_error) else None,
        settings={k: v for k, v in configuration.items() if not k.startswith(IRRELEVANT) and not _is_seed(k)},
        seeds=tuple(f"{name}={value}" for name, value in configuration.items() if _is_seed(name)),
        trained_before="fit" in summary.seconds,
        config_known=(folder / "config.yaml").exists(),
        wandb_project=project,
    )


def _unfinished(folder: Path, missing: str) -> str:
    return f"the run in {folder} is unfinished: {missing} is missing. Its command with this --output_dir resumes it"


def _read_config(folder: Path) -> dict[str, Any]:
    """Read what the folder knows of the configuration."""
    import yaml

    path, journal = folder / "config.yaml", folder / "journal" / "settings.json"
    if path.exists():
        return yaml.safe_load(path.read_text()) or {}
    if journal.exists():
        # The run was made by a script and not by `maiht`: the journal knows the solver's settings and nothing else.
        return {"pruning": {"config": json.loads(journal.read_text()).get("config")}}
    return {}


def _flat(config: dict[str, Any]) -> dict[str, str]:
    """A configuration by dotted names, without method, sparsity and pattern."""
    flat = {name.replace(".init_args", "").replace(".class_path", ""): v for name, v in flatten(config).items()}
    return {
        name: json.dumps(value) if isinstance(value, list | dict) else str(value)
        for name, value in flat.items()
        if name not in IN_COLUMNS
    }


def _wandb_project(config: dict[str, Any]) -> str | None:
    loggers = (config.get("trainer") or {}).get("logger")
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        # A logger may also be true or false.
        if isinstance(logger, dict) and str(logger.get("class_path")).endswith("WandbLogger"):
            return (logger.get("init_args") or {}).get("project")
    return None


def _is_seed(name: str) -> bool:
    return name == "seed_everything" or name.endswith(".seed")
