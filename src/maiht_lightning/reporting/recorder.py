"""Where what a pruning run finds goes: to its folder, to its loggers, and to the screen."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_warn

from ..models.compact import save_compact
from ..models.saving import save_model
from ..records import LayerRecord, PruningReport, StageResult
from . import loggers as log
from .environment import command, environment, peak_memory_bytes
from .run.console import print_run
from .run.figures import draw_figures
from .run.page import write_page
from .summary import SUMMARY_FILE, Summary, write_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class RunRecorder:
    """Keeps a run's summary, and writes and logs what becomes known of it.

    All processes of a run make the same calls; the main one writes. The order of a run is `begin`, `stage("dense")`,
    `block` for each block, `pruned`, `stage("pruned")`, `finish_pruning`, and after training on `stage("finetuned")`
    and `finish_finetuning`. What the loggers or the report raise becomes a warning: it never costs a pruned model.

    Args:
        folder: The run's folder; made when there is something to write.
        summary: What is known so far.
        settings: How the model is pruned and measured, for the report and the loggers.
        loggers: Where numbers, tables and figures are logged beside the folder.
        global_step: Gives the step at which the loggers note something.
        is_main: Whether this is the process that writes.
        compact: Whether compact files of the pruned model belong to the run.
    """

    folder: Path
    summary: Summary
    settings: dict[str, Any]
    loggers: Sequence[Logger] = ()
    global_step: Callable[[], int] = lambda: 0
    is_main: bool = True
    compact: bool = False
    # When the phase at work began, in seconds of `time.perf_counter`.
    _begun: float = field(default_factory=time.perf_counter, init=False)

    def reload(self) -> None:
        """Take over what an earlier process has written of this run, but for the stage `finetuned`: it comes anew."""
        if not self.summary.stages and (self.folder / SUMMARY_FILE).exists():
            self.summary = Summary.read(self.folder)
            self.summary.stages.pop("finetuned", None)

    # ---- Seconds

    def start_clock(self) -> None:
        """Begin a phase whose end `stop_clock` tells."""
        self._begun = time.perf_counter()

    def stop_clock(self, phase: str) -> None:
        """Count the wall-clock time since `start_clock` for a phase."""
        self.summary.add_seconds(phase, time.perf_counter() - self._begun)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Count the wall-clock time of what is done inside for a phase."""
        begun = time.perf_counter()
        yield
        self.summary.add_seconds(phase, time.perf_counter() - begun)

    # ---- The course of a run

    def begin(self, model: "PreTrainedModel") -> None:
        """Make the run's folder, and if it is new, tell the loggers what is pruned, how, and in which environment."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.is_main and not self.summary.stages:
            described = {"class": type(model).__name__, "name_or_path": model.config.name_or_path}
            log.start_pruning(
                self.loggers, {"pruned_model": described, "pruned_with": self.settings, "environment": environment()}
            )

    def save(self, model: "PreTrainedModel", tokenizer: Any, name: str) -> None:
        """Save the model in the folder, and unless it is the dense one its compact files."""
        save_model(model, self.folder / name, tokenizer, writes=self.is_main)
        if self.compact and name != "model_dense" and self.is_main:
            save_compact(model, self.folder / "model_compact", tokenizer=tokenizer)

    def stage(self, name: str, found: StageResult) -> None:
        """Add what was measured at a stage to the summary, write that, and log it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.summary.stages[name] = found
        self.summary.peak_memory_bytes = peak_memory_bytes()
        if self.is_main:
            self.summary.write(self.folder)
            log.log_stage(self.loggers, name, found, self.global_step())

    def block(self, records: list[LayerRecord]) -> None:
        """Log a finished block."""
        if self.is_main:
            log.log_block(self.loggers, records, self.global_step())

    def pruned(self, report: PruningReport, *, is_last: bool = True) -> None:
        """Note a pruning: its seconds, and of the last one in a run the layers and the counted sparsity."""
        self.summary.add_seconds("capture", report.capture_seconds)
        self.summary.add_seconds("solve", report.solve_seconds)
        if report.reconstruction_seconds:
            self.summary.add_seconds("reconstruct", report.reconstruction_seconds)
        if is_last:
            self.summary.measured_sparsity = report.sparsity
        if self.is_main and is_last:
            write_layers(self.folder, report.layers)
        elif self.is_main:
            log.log_sparsity(self.loggers, "pruned", report.sparsity, self.global_step())

    def finish_pruning(self, report: PruningReport) -> None:
        """Log the pruned layers, then make the report."""
        if self.is_main:
            log.finish_pruning(self.loggers, self.summary, report.layers, self._rates(report), self.global_step())
            self._report(report.layers)

    def finish_finetuning(self, records: list[LayerRecord]) -> None:
        """Log what the fine-tuned model has come to, then make the report anew."""
        if self.is_main:
            log.log_finetuned(self.loggers, self.summary, self.global_step())
            self._report(records)

    def _rates(self, report: PruningReport) -> dict[str, float]:
        """TFLOP/s by phase: what was predicted for a pruning, over the seconds of this one where it did just that."""
        if not self.summary.predicted or report.resumed or self.settings["config"]["tolerance"]:
            # Blocks from the journal took no time here, and a solver that stops early leaves iterations out.
            return {}
        # The summary's seconds are those of all prunings of the run, but the prediction is that of one.
        seconds = {
            "capture": report.capture_seconds,
            "solve": report.solve_seconds,
            "reconstruct": report.reconstruction_seconds,
        }
        return {phase: found["flops"] / seconds[phase] / 1e12 for phase, found in self.summary.predicted.items()}

    def _report(self, records: list[LayerRecord]) -> None:
        figures: dict[str, Path] = {}
        try:
            figures = draw_figures(self.folder / "figures", self.summary, records)
            write_page(self.folder, self.summary, records, figures, self.settings, environment(), command())
        except Exception as error:
            rank_zero_warn(f"the report in {self.folder} could not be written: {error!r}. The pruned model is saved.")
        log.log_figures(self.loggers, figures, self.global_step())
        if self.compact:
            log.log_model(self.loggers, self.folder / "model_compact")
        print_run(self.summary, records, self.folder)
