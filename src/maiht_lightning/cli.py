"""`maiht`: LightningCLI with pruning.

Commands: `fit` (train, then prune), `prune` (no training), `validate` and `test`, which have a Trainer; `evaluate`,
`report`, `export` and `estimate`, which have none (see `commands`).
"""

import os

# Before torch is loaded, and inherited by processes that are started: OpenMP's threads wait at barriers by spinning,
# beside other work for whole time slices, so that a small layer takes many times as long. Whoever sets this decides.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import sys
import warnings
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from .callbacks.compatibility import check_trainer, find_callback
from .callbacks.pruning import MAIHTPruning
from .commands import COMMANDS

# Imported so that their classes can be given by name alone, as in `--data WikiText2DataModule`.
from .data import c4, python_docs, wikitext2  # noqa: F401
from .reporting.loggers import log_settings
from .reporting.summary import fresh_run_folder
from .training.module import CausalLMModule
from .training.sparse_finetune import SparseFinetune, saved_phase, saved_pruning, sparse_finetune
from .training.trainer import PruningTrainer

# Set by the first process for those that it starts.
RUN_FOLDER = "MAIHT_RUN_FOLDER"

USER_ERRORS = (MisconfigurationException, ValueError, TypeError, OSError, ModuleNotFoundError)


class RunConfig(SaveConfigCallback):
    """Writes the whole configuration to `config.yaml` in the run's folder, over an older one, and to the loggers."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the configuration once, on the first process."""
        if self.already_saved or not trainer.is_global_zero:
            return
        self.already_saved = True
        config = self.config.clone()
        # Used again, the configuration starts a run of its own and does not write over this one.
        for key in ("output_dir", "trainer.default_root_dir", "config"):
            if key in config:
                config[key] = None
        for settings in logger_settings(config):
            settings.save_dir = "."
        path = Path(trainer.default_root_dir) / "config.yaml"
        self.parser.save(config, str(path), skip_unset=False, overwrite=True, multifile=False, skip_validation=True)
        log_settings(trainer.loggers, yaml.safe_load(path.read_text()))


def logger_settings(config: Namespace) -> list[Namespace]:
    """The settings of those configured loggers that write to a `save_dir`."""
    loggers = config.trainer.logger
    settings = [getattr(logger, "init_args", None) for logger in (loggers if isinstance(loggers, list) else [loggers])]
    return [s for s in settings if s is not None and "save_dir" in s]


class MAIHTCLI(LightningCLI):
    """LightningCLI with sections `pruning` and `sparse_finetune` and a folder for the run."""

    def __init__(self, args: list[str] | None = None) -> None:
        super().__init__(
            CausalLMModule,
            LightningDataModule,
            subclass_mode_data=True,
            trainer_class=PruningTrainer,
            save_config_callback=RunConfig,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={
                "prog": "maiht",
                "description": "Fine-tune a causal language model and prune it in one shot. Beside the subcommands "
                "below: `maiht evaluate --help` measures any model, `maiht report --help` compares runs, `maiht export "
                "--help` writes compact files, `maiht estimate --help` predicts memory and time.",
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
        parser.add_lightning_class_args(MAIHTPruning, "pruning")
        parser.link_arguments("output_dir", "pruning.output_dir")
        parser.add_class_arguments(SparseFinetune, "sparse_finetune")

    @override
    def before_instantiate_classes(self) -> None:
        """Put the run and its loggers into the run's folder."""
        config = self.config[self.subcommand]
        saved = saved_pruning(config.ckpt_path) if self.subcommand == "fit" and config.ckpt_path else None
        # A fit that continues after its pruning does so in the folder in which that left its report.
        going_on = saved["output_dir"] if saved and saved["done"] else None
        folder = config.output_dir or going_on or _folder_of_all_processes()
        if config.sparse_finetune.distillation:
            config.pruning.save_dense = True
        config.output_dir = config.trainer.default_root_dir = config.pruning.output_dir = folder
        for settings in logger_settings(config):
            if settings.save_dir in (None, "."):
                # Absolute, since W&B's own process may have been started in another folder.
                settings.save_dir = str(Path(folder).absolute())

    def fit(self, model: LightningModule, ckpt_path: str | None = None, **data: Any) -> None:
        """Train and prune, and train on if asked to; a checkpoint is continued in the phase that has written it."""
        settings: SparseFinetune = self.config_init[self.subcommand].sparse_finetune
        going_on = ckpt_path is not None and saved_phase(ckpt_path) is not None
        if going_on and not settings.wanted:
            raise MisconfigurationException(
                f"{ckpt_path} was written by a sparse fine-tune: to go on, give its max_epochs or max_steps"
            )
        if not going_on:
            pruning = find_callback(self.trainer, MAIHTPruning)
            if pruning is not None and settings.wanted:
                # Known now, and not only when the first phase is over.
                check_trainer(self.trainer, pruning, trains_on=True)
            weights_only = data.pop("weights_only", None)
            self.trainer.fit(model, ckpt_path=ckpt_path, weights_only=weights_only, **data)
            ckpt_path = None
        if settings.wanted:
            data.pop("weights_only", None)
            sparse_finetune(self.trainer, model, settings, ckpt_path=ckpt_path, **data)

    @override
    def after_instantiate_classes(self) -> None:
        """Make the run's folder, now that the settings are known to be right."""
        # Where it is missing, W&B may write to the system's temporary folder instead.
        Path(self.trainer.default_root_dir).mkdir(parents=True, exist_ok=True)


def main(args: list[str] | None = None) -> None:
    """Run `maiht`. What the user can mend ends with one line and exit status 2, not with a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # The windows lie in memory: workers would only cost time.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Between Lightning and torch, and for neither of them the user's to mend.
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    given = sys.argv[1:] if args is None else args
    try:
        if given and given[0] in COMMANDS:
            COMMANDS[given[0]](given[1:])
        else:
            MAIHTCLI(args)
    except USER_ERRORS as error:
        if os.environ.get("MAIHT_TRACEBACK") or _is_internal(error):
            raise
        print(f"maiht: error: {error}\n(MAIHT_TRACEBACK=1 shows where.)", file=sys.stderr)
        raise SystemExit(2) from error


def _folder_of_all_processes() -> str:
    """A fresh folder, the same in the processes that Lightning starts from this one."""
    if os.environ.get("LOCAL_RANK", "0") == "0" and "TORCHELASTIC_RUN_ID" not in os.environ:
        os.environ[RUN_FOLDER] = str(fresh_run_folder())
    if RUN_FOLDER not in os.environ:
        raise MisconfigurationException("several processes that were started by themselves need the same --output_dir")
    return os.environ[RUN_FOLDER]


def _is_internal(error: BaseException) -> bool:
    """Whether an error comes from deep inside a library, where its message alone would not help."""
    if isinstance(error, MisconfigurationException | OSError):
        return False
    traceback, raised_in = error.__traceback__, ""
    while traceback is not None:
        raised_in = traceback.tb_frame.f_globals.get("__name__", "")
        traceback = traceback.tb_next
    return raised_in.split(".")[0] not in ("maiht_lightning", "jsonargparse")


if __name__ == "__main__":
    main()
