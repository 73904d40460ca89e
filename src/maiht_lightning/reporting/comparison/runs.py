"""Reading finished runs back from their folders."""

import csv
import json
from dataclasses import dataclass, fields
from math import nan
from pathlib import Path
from statistics import fmean

from ..formats import flatten
from ..summary import Summary

# Settings that do not change what a run's numbers mean: places, and what is only shown.
IRRELEVANT = (
    "output_dir",
    "config",
    "trainer.default_root_dir",
    "trainer.logger",
    "trainer.callbacks",
    "trainer.log_every_n_steps",
    "trainer.enable_",
)
# The dense model depends on nothing that comes after it.
AFTER_THE_DENSE, SETTING_OF_MEASURING = ("pruning.", "sparse_finetune."), "pruning.evaluation."
# These three have columns of their own.
IN_COLUMNS = ("pruning.method", "pruning.sparsity", "pruning.pattern")


@dataclass(frozen=True)
class Run:
    """A finished run, as far as comparisons need it.

    Args:
        folder: Its folder.
        summary: What `summary.json` holds.
        mean_relative_error: Mean over the layers.
        settings: The configuration by dotted names, without seeds, places and what is only shown.
        seeds: The seeds in the configuration.
    """

    folder: Path
    summary: Summary
    mean_relative_error: float
    settings: dict[str, str]
    seeds: tuple[str, ...] = ()

    @property
    def measured(self) -> dict[str, str]:
        """The settings that the dense model and its measurement depend on; runs that share them can be compared."""
        return {
            name: value
            for name, value in self.settings.items()
            if not name.startswith(AFTER_THE_DENSE) or name.startswith(SETTING_OF_MEASURING)
        }


def read_run(folder: str | Path) -> Run:
    """Read a finished run's folder.

    Raises:
        ValueError: It is no run's folder, or the run is unfinished; the message names what is missing.
    """
    import yaml

    folder = Path(folder)
    path = folder / "summary.json"
    if not folder.is_dir():
        raise ValueError(f"{folder} is no run's folder: there is no such folder")
    if not path.exists():
        begun = [name for name in ("journal", "config.yaml") if (folder / name).exists()]
        if begun:
            raise ValueError(_unfinished(folder, "summary.json"))
        raise ValueError(f"{folder} is no run's folder: it has no summary.json")
    try:
        found = json.loads(path.read_text())
        known = {field.name for field in fields(Summary)}
        summary = Summary(**{name: value for name, value in found.items() if name in known})
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a run's summary: {error}") from error
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
        configuration = _configuration(folder)
    except (ValueError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(f"the configuration in {folder} cannot be read: {error}") from error
    settings = {
        # Compared as settings: whether training went before, and whether the others are known at all.
        "command": "fit" if "fit" in summary.seconds else "prune",
        "config.yaml": "present" if (folder / "config.yaml").exists() else "absent",
        **{k: v for k, v in configuration.items() if not k.startswith(IRRELEVANT) and not _is_seed(k)},
    }
    seeds = tuple(f"{name}={value}" for name, value in configuration.items() if _is_seed(name))
    return Run(folder, summary, fmean(errors) if errors else nan, settings, seeds)


def _unfinished(folder: Path, missing: str) -> str:
    return f"the run in {folder} is unfinished: {missing} is missing. The same command with this --output_dir goes on"


def _configuration(folder: Path) -> dict[str, str]:
    """What the folder knows of the configuration, by dotted names, without method, sparsity and pattern."""
    import yaml

    path, journal = folder / "config.yaml", folder / "journal" / "settings.json"
    if path.exists():
        config = yaml.safe_load(path.read_text()) or {}
    elif journal.exists():
        # Somebody's own script: the solver's settings are all that is known.
        config = {"pruning": {"config": json.loads(journal.read_text()).get("config")}}
    else:
        config = {}
    flat = {name.replace(".init_args", "").replace(".class_path", ""): v for name, v in flatten(config).items()}
    return {
        name: json.dumps(value) if isinstance(value, list | dict) else str(value)
        for name, value in flat.items()
        if name not in IN_COLUMNS
    }


def _is_seed(name: str) -> bool:
    return name == "seed_everything" or name.endswith(".seed")
