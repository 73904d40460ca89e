"""`maiht fit`, `prune`, `validate` and `test`: LightningCLI with pruning, and a folder for the run."""

import os
import sys
from pathlib import Path
from typing import Any, ClassVar

import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from ..callbacks.compatibility import check_trainer, find_callback
from ..callbacks.plain_progress import PlainProgress
from ..callbacks.pruning import MAIHTPruning
from ..callbacks.resume_point import remove_point

# Imported so that their classes can be given by name alone, as in `--data WikiText2DataModule`.
from ..data import c4, python_docs, wikitext2  # noqa: F401
from ..models.durable import write_text
from ..reporting.loggers import log_settings
from ..reporting.summary import Summary, fresh_run_folder
from ..reporting.wandb_rows import WandbRows
from ..training.accelerator import check_accelerator
from ..training.module import CausalLMModule
from ..training.run_state import RunState, last_point, move_aside, new_wandb_id
from ..training.sparse_finetune import SparseFinetune, saved_phase, saved_pruning, sparse_finetune
from ..training.trainer import PruningTrainer
from .catalog import COMMANDS
from .parser import RunParser
from .quiet import is_plain

# Set by the first process for those that it starts.
RUN_FOLDER, RESUMES = "MAIHT_RUN_FOLDER", "MAIHT_RESUMES"


class RunConfig(SaveConfigCallback):
    """Writes the whole configuration to `config.yaml` in the run's folder, over an older one, and to the loggers."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the configuration once, on the first process."""
        if self.already_saved or not trainer.is_global_zero:
            return
        self.already_saved = True
        path = Path(trainer.default_root_dir) / "config.yaml"
        text = self.parser.dump(portable(self.config), skip_unset=False, skip_validation=True)
        write_text(path, text)
        log_settings(trainer.loggers, yaml.safe_load(text))


def portable(config: Namespace) -> Namespace:
    """A configuration without what is a single run's own: used again, it starts another and does not write over it."""
    config = config.clone()
    for key in ("output_dir", "trainer.default_root_dir", "config"):
        if key in config:
            config[key] = None
    config.fresh = False
    for settings in logger_settings(config):
        settings.save_dir = "."
    for settings in _wandb_settings(config):
        settings.id = None
    return config


def logger_settings(config: Namespace) -> list[Namespace]:
    """The settings of those configured loggers that write to a `save_dir`."""
    loggers = config.trainer.logger
    settings = [getattr(logger, "init_args", None) for logger in (loggers if isinstance(loggers, list) else [loggers])]
    return [s for s in settings if s is not None and "save_dir" in s]


def _wandb_settings(config: Namespace) -> list[Namespace]:
    """The settings of the configured W&B loggers."""
    return [settings for settings in logger_settings(config) if "project" in settings and "id" in settings]


class MAIHTCLI(LightningCLI):
    """LightningCLI with sections `pruning` and `sparse_finetune` and a folder for the run.

    Attributes:
        folder: The folder of the run that is at work in this process.
    """

    folder: ClassVar[Path | None] = None

    def __init__(self, args: list[str] | None = None) -> None:
        # Whether an earlier process has begun the run, and what is known to have failed in it.
        self.resumes, self.failures = False, list[dict[str, str]]()
        self.rows: list[WandbRows] = []
        MAIHTCLI.folder = None
        super().__init__(
            CausalLMModule,
            # Of any kind, and not required: `prune` has no use for it.
            datamodule_class=None,
            trainer_class=PruningTrainer,
            save_config_callback=RunConfig,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_class=RunParser,
            parser_kwargs={
                "prog": "maiht",
                **{name: {"description": COMMANDS[name].purpose} for name in self.subcommands()},
            },
            args=args,
        )

    @override
    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The commands, with the arguments that the CLI itself gives to each."""
        evaluation = {"model", "dataloaders", "datamodule"}
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "prune": {"model", "datamodule"},
            "validate": evaluation,
            "test": evaluation,
        }

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run's folder and the pruning section."""
        parser.add_argument(
            "--output_dir",
            type=str | None,
            default=None,
            help="Folder of the run (default: a fresh one in runs/).",
        )
        parser.add_argument(
            "--fresh",
            action="store_true",
            help="Start over where output_dir holds a run; its folder is renamed, as to NAME.1.",
        )
        parser.add_lightning_class_args(MAIHTPruning, "pruning")
        parser.link_arguments("output_dir", "pruning.output_dir")
        parser.add_class_arguments(SparseFinetune, "sparse_finetune")

    @override
    def before_instantiate_classes(self) -> None:
        """Put the run and its loggers into the run's folder, and see what is done of it."""
        config = self.config[self.subcommand]
        if config.data is None and self.subcommand != "prune":
            raise MisconfigurationException(
                "missing: --data, such as WikiText2DataModule, or PythonDocsDataModule, which needs no network"
            )
        saved = saved_pruning(config.ckpt_path) if self.subcommand == "fit" and config.ckpt_path else None
        check_accelerator(config.trainer.accelerator)
        # A fit that continues after its pruning does so in the folder in which that left its report.
        going_on = saved["output_dir"] if saved and saved["done"] else None
        folder = config.output_dir or going_on or _folder_of_all_processes()
        if config.sparse_finetune.distillation:
            config.pruning.save_dense = True
        if self.subcommand in ("fit", "prune"):
            self._find_state(config, Path(folder))
        config.output_dir = config.trainer.default_root_dir = config.pruning.output_dir = folder
        for settings in logger_settings(config):
            if settings.save_dir in (None, "."):
                # Absolute, since W&B's own process may have been started in another folder.
                settings.save_dir = str(Path(folder).absolute())

    def _find_state(self, config: Namespace, folder: Path) -> None:
        """Compare the run with the one in its folder, and go on with that.

        Raises:
            MisconfigurationException: The folder's run is another one.
        """
        if config.fresh and is_first_process() and folder.exists():
            print(f"maiht: the run in {folder} is now in {move_aside(folder)}", file=sys.stderr)
        text = self._parser(self.subcommand).dump(portable(config), skip_unset=False, skip_validation=True)
        asked = RunState(str(self.subcommand), yaml.safe_load(text))
        # Whoever names a checkpoint to fit from knows better than the folder.
        found = None if self.subcommand == "fit" and config.ckpt_path else RunState.read(folder)
        if found is None:
            found = asked
        elif differences := found.differences(asked):
            raise MisconfigurationException(
                f"the run in {folder} has other settings: {'; '.join(differences)}. Give it those that it has, or "
                f"another --output_dir, or --fresh to start over"
            )
        else:
            self.resumes = not found.finished
        if is_first_process():
            os.environ[RESUMES] = str(int(self.resumes))
        else:
            # What the first process has written since is nothing to resume.
            self.resumes = os.environ.get(RESUMES, "0") == "1"
        for index, settings in enumerate(_wandb_settings(config)):
            if index == len(found.wandb_ids):
                found.wandb_ids.append(settings.id or settings.version or new_wandb_id())
            settings.id = found.wandb_ids[index]
        self.state = found

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the Trainer, with lines in place of bars where nobody looks at a terminal and nothing else was asked."""
        if is_plain() and self._get(self.config, "trainer").enable_progress_bar is None:
            kwargs["enable_progress_bar"] = False
        trainer = super().instantiate_trainer(**kwargs)
        if trainer.progress_bar_callback is None:
            trainer.callbacks.insert(0, PlainProgress())  # type: ignore[attr-defined]
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and logger._wandb_init.get("anonymous", "") is None:
                # Lightning hands on that nothing was chosen, of which W&B warns as of a choice.
                del logger._wandb_init["anonymous"]
        return trainer

    def fit(self, model: LightningModule, ckpt_path: str | None = None, **data: Any) -> None:
        """Train and prune, and train on if asked to; a run that was begun resumes where it was."""
        settings: SparseFinetune = self.config_init[self.subcommand].sparse_finetune
        pruning = find_callback(self.trainer, MAIHTPruning)
        assert pruning is not None  # a section of the configuration
        pruning.expects_finetune, pruning.keeps_point = settings.wanted, True
        going_on = ckpt_path is not None and saved_phase(ckpt_path) is not None
        point = last_point(Path(self.trainer.default_root_dir)) if self.resumes else None
        if point is not None:
            print(f"maiht: the run resumes after step {point.step}, from {point.path}", file=sys.stderr)
            going_on = point.is_sparse
            ckpt_path = str(point.path) if going_on else None
            pruning.resume_from = None if going_on else point.path
        if going_on and not settings.wanted:
            raise MisconfigurationException(
                f"{ckpt_path} was written by a sparse fine-tune: to go on, give its max_epochs or max_steps"
            )
        weights_only = data.pop("weights_only", None)
        if not going_on:
            if settings.wanted:
                # Known now, and not only when the first phase is over.
                check_trainer(self.trainer, pruning, trains_on=True)
            self.trainer.fit(model, ckpt_path=ckpt_path, weights_only=weights_only, **data)
            ckpt_path = None
        if settings.wanted:
            sparse_finetune(self.trainer, model, settings, ckpt_path=ckpt_path, **data)
        self._finish(pruning)

    def prune(self, model: LightningModule, **data: Any) -> None:
        """Prune without training; a run that was begun resumes where it was."""
        pruning = find_callback(self.trainer, MAIHTPruning)
        assert pruning is not None  # a section of the configuration
        pruning.resumes = self.resumes
        self.trainer.prune(model, **data)  # type: ignore[attr-defined]
        self._finish(pruning)

    def _finish(self, pruning: MAIHTPruning) -> None:
        """Note that the run is done, and what of it failed."""
        folder = Path(self.trainer.default_root_dir)
        for rows in self.rows:
            if rows.problem is not None:
                pruning.run.recorder.failed("W&B rows", rows.problem)
        if self.trainer.is_global_zero:
            self.state.finished = True
            self.state.write(folder)
        remove_point(self.trainer, folder)
        self.failures = pruning.summary.failures

    @override
    def after_instantiate_classes(self) -> None:
        """Make the run's folder, now that the settings are known to be right."""
        folder = Path(self.trainer.default_root_dir)
        # Where it is missing, W&B may write to the system's temporary folder instead.
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MisconfigurationException(f"output_dir {folder} cannot be made ({error}): give another") from error
        if self.subcommand not in ("fit", "prune"):
            return
        if self.state.finished:
            failures = Summary.read(folder).failures
            print(f"maiht: the run in {folder} is finished; --fresh starts it over", file=sys.stderr)
            raise SystemExit(report_failures(failures))
        MAIHTCLI.folder = folder
        if is_first_process():
            self.state.write(folder)
        for logger in self.trainer.loggers:
            if isinstance(logger, WandbLogger):
                self.rows.append(WandbRows(logger, folder / f"wandb-{logger.version}.jsonl"))


def report_failures(failures: list[dict[str, str]]) -> int:
    """Print what failed beside the pruning; returns the exit status."""
    for failure in failures:
        print(f"maiht: failed: {failure['phase']}: {failure['message']}", file=sys.stderr)
    return 1 if failures else 0


def is_first_process() -> bool:
    """Whether this is the process that has started all others of the run, as far as the environment tells."""
    return all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK"))


def _folder_of_all_processes() -> str:
    """A fresh folder, the same in the processes that Lightning starts from this one."""
    if os.environ.get("LOCAL_RANK", "0") == "0" and "TORCHELASTIC_RUN_ID" not in os.environ:
        os.environ[RUN_FOLDER] = str(fresh_run_folder())
    if RUN_FOLDER not in os.environ:
        raise MisconfigurationException("several processes that were started by themselves need the same --output_dir")
    return os.environ[RUN_FOLDER]
