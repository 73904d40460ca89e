"""Where what a pruning run finds goes: to its folder, to the Trainer's loggers, and to the screen."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer

from ..models.compact import save_compact
from ..models.saving import save_model
from ..records import LayerRecord, PruningReport
from .environment import environment, peak_memory_bytes
from .loggers import finish_pruning, log_block, log_figures, log_finetuned, log_model, log_stage, start_pruning
from .run.console import print_run
from .run.report import write_report
from .summary import Summary, write_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class RunOutput:
    """A run's folder and loggers. All processes call the same; the first one writes.

    Args:
        folder: The run's folder; made here.
        trainer: Its loggers and its step are used.
        summary: What is known so far; stages and peak memory are added to it.
        settings: How the model is pruned and measured, for the report and the loggers.
        compact: Whether compact files belong to the run.
    """

    folder: Path
    trainer: Trainer
    summary: Summary
    settings: dict[str, Any]
    compact: bool

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def begin(self, model: "PreTrainedModel") -> None:
        """Tell the loggers what is pruned, how, and in which environment."""
        if self.trainer.is_global_zero:
            described = {"class": type(model).__name__, "name_or_path": model.config.name_or_path}
            start_pruning(
                self.trainer.loggers,
                {"pruned_model": described, "pruned_with": self.settings, "environment": environment()},
            )

    def block_logger(self) -> Callable[[list[LayerRecord]], None] | None:
        """Logs a finished block's records."""
        if not self.trainer.is_global_zero:
            return None
        loggers, step = self.trainer.loggers, self.trainer.global_step
        return lambda records: log_block(loggers, records, step)

    def save(self, model: "PreTrainedModel", tokenizer: Any, name: str) -> None:
        """Save the model in the folder, and unless it is the dense one its compact files."""
        save_model(model, self.folder / name, tokenizer, writes=self.trainer.is_global_zero)
        if self.compact and name != "model_dense" and self.trainer.is_global_zero:
            save_compact(model, self.folder / "model_compact", tokenizer=tokenizer)

    def add_stage(self, stage: str, found: dict[str, Any]) -> None:
        """Add what was measured at a stage to the summary, and log it."""
        self.summary.stages[stage] = found
        self.summary.peak_memory_bytes = peak_memory_bytes()
        if self.trainer.is_global_zero:
            self.summary.write(self.folder)
            self.log(stage, found)

    def log(self, stage: str, found: dict[str, Any]) -> None:
        """Log numbers of a stage, which need not be in the summary."""
        if self.trainer.is_global_zero:
            log_stage(self.trainer.loggers, stage, found, self.trainer.global_step)

    def finish_pruning(self, report: PruningReport) -> None:
        """Write and log the pruned layers, then the report."""
        if self.trainer.is_global_zero:
            write_layers(self.folder, report.layers)
            finish_pruning(
                self.trainer.loggers, self.summary, report.layers, self._rates(report), self.trainer.global_step
            )
            self._report(report.layers)

    def finish_finetuning(self, records: list[LayerRecord]) -> None:
        """Log what the fine-tuned model has come to, then write the report anew."""
        if self.trainer.is_global_zero:
            log_finetuned(self.trainer.loggers, self.summary, self.trainer.global_step)
            self._report(records)

    def _rates(self, report: PruningReport) -> dict[str, float]:
        """TFLOP/s by phase: what was predicted for a pruning, over the seconds of this one where it did just that."""
        if report.resumed or self.settings["config"]["tolerance"]:
            # Blocks from the journal took no time here, and a solver that stops early leaves iterations out.
            return {}
        # Not the summary's, which are those of all shots.
        seconds = {"capture": report.capture_seconds, "solve": report.solve_seconds}
        return {phase: found["flops"] / seconds[phase] / 1e12 for phase, found in self.summary.predicted.items()}

    def _report(self, records: list[LayerRecord]) -> None:
        figures = write_report(self.folder, self.summary, records, self.settings)
        log_figures(self.trainer.loggers, figures, self.trainer.global_step)
        if self.compact:
            log_model(self.trainer.loggers, self.folder / "model_compact")
        print_run(self.summary, records, str(self.folder))
