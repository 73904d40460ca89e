"""`MAIHTPruning`: prune the model at the end of a fit."""

import resource
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, RichProgressBar, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from ..capture import find_blocks, find_linears, weight_of
from ..data.c4 import C4Calibration
from ..data.calibration import CalibrationSource, check_at_least
from ..evaluation.settings import Evaluation, Measurement, context_length
from ..export import save_compact
from ..pruner import PruningReport, check_windows, prune
from ..reporting.environment import environment
from ..reporting.loggers import finish_pruning, log_block, log_figures, log_model, log_stage, start_pruning
from ..reporting.run_folder import Summary, fresh_run_folder, write_layers
from ..reporting.run_report import write_report
from ..reporting.tables import print_run
from ..solvers import MAIHTConfig, check_method, parse_pattern, resolve_config
from ..sparsity import count_zeros, measured_sparsity
from .language_model import find_language_model, find_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class MAIHTPruning(Callback):
    """Prune a causal language model in one shot when its fit ends.

    When training ends, the model is measured, pruned layer by layer from calibration text, saved, and measured
    again. Everything that can be wrong with the settings, the model or the texts is checked before the first
    training step. The pruned model, the report, the tables and the journal lie in `output_dir`; perplexities,
    accuracies, the layers' errors and the figures go to the Trainer's loggers.

    Note:
        `ModelCheckpoint`'s files were written before and stay dense: use `output_dir/model`. Averaging callbacks
        must stand before this one, or they overwrite the pruned weights; they are refused otherwise.

    Args:
        sparsity: Fraction of zeros, in [0, 1): exactly floor(sparsity · numel) in each linear layer.
        pattern: `unstructured` (compared within a layer), `row` (within an output row), or `N:M`, which keeps N
            of every M consecutive inputs.
        method: `maiht`, `aiht`, `iht`, `sparsegpt`, `admm`, `wanda` or `magnitude`.
        config: Settings of the solver, or a preset's name; the paper's by default.
        calibration: Where calibration windows come from; by default 128 from C4.
        evaluation: What the dense and the pruned model are measured by; by default perplexity on WikiText-2.
        model: Dotted path of the Hugging Face model in the LightningModule. None: it is found.
        tokenizer: Name or folder of the tokenizer. None: the LightningModule's, or the model's own.
        batch_size: Windows a calibration forward pass.
        compact: Also save the pruned model as `model_compact/`, much smaller, for `load_compact`; W&B gets it as an
            artifact.
        output_dir: The run's folder. None: a fresh one in `runs/` under the Trainer's `default_root_dir`.

    Raises:
        ValueError, TypeError: A setting is out of range.
        MisconfigurationException: The Trainer, the module or the texts do not fit; raised before training.

    Example::

        from lightning.pytorch import Trainer
        from maiht_lightning import MAIHTPruning

        trainer = Trainer(max_epochs=1, callbacks=[MAIHTPruning(sparsity=0.5)])
        trainer.fit(my_module, my_data)
    """

    def __init__(
        self,
        sparsity: float = 0.5,
        pattern: str = "unstructured",
        method: str = "maiht",
        config: MAIHTConfig | str = "paper",
        calibration: CalibrationSource | None = None,
        evaluation: Evaluation = Evaluation(),  # noqa: B008  (frozen)
        model: str | None = None,
        tokenizer: str | None = None,
        batch_size: int = 1,
        compact: bool = False,
        output_dir: str | None = None,
    ) -> None:
        self.method = check_method(method)
        self.pattern = parse_pattern(pattern, sparsity)
        self.config = resolve_config(config)
        check_at_least(1, batch_size=batch_size)
        self.calibration = C4Calibration() if calibration is None else calibration
        self.evaluation = evaluation
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.compact = compact
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.report: PruningReport | None = None
        self.summary = Summary(self.method, self.pattern.sparsity, self.pattern.name)
        self._calibration_windows: Tensor = torch.empty(0)
        self._measurement: Measurement | None = None
        self._fit_started = time.perf_counter()

    # ---- Lightning's hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse Trainers that would undo or split the pruning."""
        if stage == "fit":
            self._check_trainer(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check everything that pruning will need, and draw its texts."""
        self.report = None
        self.prepare(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the time."""
        self._fit_started = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune, while the model, its device and the loggers are alive."""
        self.summary.seconds["fit"] = time.perf_counter() - self._fit_started
        if isinstance(trainer.progress_bar_callback, RichProgressBar):
            # Its live display would fight with the pruning's bar for the last line of the terminal.
            trainer.progress_bar_callback.teardown(trainer, pl_module, "fit")
        self.run(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that the model was pruned and that its zeros are still there."""
        if self.report is None:
            raise MisconfigurationException(
                "the fit ended without pruning, since it had nothing to train (no steps or epochs left, or a "
                "finished checkpoint). The model is still dense. To prune it without training: `maiht prune`, or "
                "maiht_lightning.prune(model, windows)."
            )
        self._verify(find_language_model(pl_module, self.model))

    # ---- The work, also for `maiht prune`

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check everything that pruning will need, and draw its texts; nothing is changed.

        Raises:
            MisconfigurationException: The module or the texts do not fit.
        """
        model = find_language_model(pl_module, self.model)
        tokenizer = find_tokenizer(pl_module, model, self.tokenizer)
        try:
            blocks = find_blocks(model)
            for index, block in enumerate(blocks.modules):
                for name, linear in find_linears(block).items():
                    self.pattern.check_shape(weight_of(linear).shape, f"{blocks.path}.{index}.{name}")
            self._calibration_windows = self.calibration.windows(tokenizer, context_length(model))
            check_windows(self._calibration_windows, model)
            self._measurement = self.evaluation.load(model, tokenizer)
        except (ValueError, OSError, ModuleNotFoundError) as error:
            raise MisconfigurationException(f"pruning cannot work with these settings: {error}") from error
        if self.output_dir is None:
            self.output_dir = fresh_run_folder(Path(trainer.default_root_dir) / "runs")

    def run(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, prune, save, measure again; needs `prepare` before."""
        assert self.output_dir is not None  # set by `prepare`
        self.output_dir.mkdir(parents=True, exist_ok=True)
        model, step = find_language_model(pl_module, self.model), trainer.global_step
        # Gradients are of no more use, and as large as the model.
        pl_module.zero_grad(set_to_none=True)
        described = {"class": type(model).__name__, "name_or_path": model.config.name_or_path}
        settings = {"pruned_model": described, "pruned_with": self._settings(), "environment": environment()}
        start_pruning(trainer.loggers, settings)

        self._measure("dense", trainer, pl_module)
        with trainer.precision_plugin.forward_context():
            report = prune(
                model,
                self._calibration_windows,
                sparsity=self.pattern.sparsity,
                pattern=self.pattern.name,
                method=self.method,
                config=self.config,
                journal_dir=self.output_dir / "journal",
                batch_size=self.batch_size,
                on_block=lambda records: log_block(trainer.loggers, records, step),
            )
        # Saved first: whatever goes wrong after this, the pruned model is on disk.
        model.save_pretrained(self.output_dir / "model")
        tokenizer = find_tokenizer(pl_module, model, self.tokenizer)
        tokenizer.save_pretrained(self.output_dir / "model")
        if self.compact:
            save_compact(model, self.output_dir / "model_compact", tokenizer=tokenizer)
        self.report = report
        self.summary.measured_sparsity = report.sparsity
        self.summary.seconds["capture"] = report.capture_seconds
        self.summary.seconds["solve"] = report.solve_seconds
        write_layers(self.output_dir, report.layers)
        self._measure("pruned", trainer, pl_module)
        finish_pruning(trainer.loggers, self.summary, report.layers, step)
        log_figures(trainer.loggers, write_report(self.output_dir, self.summary, report.layers, self._settings()), step)
        if self.compact:
            log_model(trainer.loggers, self.output_dir / "model_compact")
        print_run(self.summary, report.layers, str(self.output_dir))

    def _measure(self, stage: str, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.output_dir is not None  # set by `prepare`
        assert self._measurement is not None
        start = time.perf_counter()
        model = find_language_model(pl_module, self.model)
        with trainer.precision_plugin.forward_context():
            found = self._measurement.measure(model, find_tokenizer(pl_module, model, self.tokenizer), stage=stage)
        seconds = self.summary.seconds
        seconds["evaluate"] = seconds.pop("evaluate", 0.0) + time.perf_counter() - start
        self.summary.stages[stage] = found
        self.summary.peak_memory_bytes = peak_memory_bytes()
        self.summary.write(self.output_dir)
        log_stage(trainer.loggers, stage, found, trainer.global_step)

    def _settings(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "sparsity": self.pattern.sparsity,
            "pattern": self.pattern.name,
            "config": asdict(self.config),
            "calibration": {
                "class": type(self.calibration).__name__,
                **{k: v for k, v in vars(self.calibration).items() if isinstance(v, str | int | float)},
                "windows": list(self._calibration_windows.shape),
            },
            "evaluation": asdict(self.evaluation),
        }

    def _verify(self, model: "PreTrainedModel") -> None:
        assert self.report is not None
        now = {count.name: count.zeros for count in count_zeros(model)}
        lost = [r.name for r in self.report.layers if now.get(r.name, 0) < r.zeros]
        if lost:
            raise MisconfigurationException(
                f"{len(lost)} pruned layers lost zeros after pruning, {lost[0]} first: another callback changed the "
                f"weights. The pruned model in {self.output_dir}/model is intact."
            )
        rank_zero_info(f"Zeros verified by counting: {measured_sparsity(count_zeros(model)):.4%}")

    def _check_trainer(self, trainer: Trainer) -> None:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        after = callbacks[callbacks.index(self) + 1 :]
        for callback in after:
            if isinstance(callback, StochasticWeightAveraging | WeightAveraging):
                raise MisconfigurationException(
                    f"{type(callback).__name__} stands after MAIHTPruning and would overwrite the pruned weights "
                    f"with dense averages: put it before MAIHTPruning in the Trainer's callbacks"
                )
        if trainer.world_size > 1:
            raise MisconfigurationException(
                f"MAIHTPruning prunes on one device, but the Trainer has {trainer.world_size} processes with "
                f"{type(trainer.strategy).__name__}: train without it and prune afterwards with `maiht prune`"
            )


def peak_memory_bytes() -> int:
    """Highest GPU memory allocated by this process, or its highest resident memory without a GPU, in bytes."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    # Kilobytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
