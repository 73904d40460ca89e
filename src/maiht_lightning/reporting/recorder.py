"""Where what a pruning run finds goes: to its folder, to its loggers, and to the screen."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_warn

from ..interrupts import interrupts
from ..models.compact import save_compact
from ..models.saving import save_model
from ..records import LayerRecord, PruningReport, StageResult
from . import loggers as log
from .environment import command, environment, peak_memory_bytes
from .model_card import write_cards
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
    and `finish_finetuning`. What measurements, loggers or the report raise becomes a warning and one of the summary's
    `failures`: it never costs a pruned model.

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
    # Where the model came from.
    _base: str = field(default="", init=False)
    # Whether the loggers know the settings.
    _told: bool = field(default=False, init=False)
    # When the phase at work began, in seconds of `time.perf_counter`.
    _begun: float = field(default_factory=time.perf_counter, init=False)

    def reload(self, *, keep_finetuned: bool = False) -> None:
        """Take over what an earlier process has written of this run.

        Args:
            keep_finetuned: Whether the stage `finetuned` is one that this process goes on with, and none before it.
        """
        if not self.summary.stages and (self.folder / SUMMARY_FILE).exists():
            self.summary = Summary.read(self.folder)
        if not keep_finetuned:
            self.summary.stages.pop("finetuned", None)
            self.summary.saved = [name for name in self.summary.saved if name != "model_finetuned"]

    # ---- What fails beside the pruning

    def failed(self, phase: str, error: Exception | str) -> None:
        """Note that something failed that the run can do without, and say so, once."""
        message = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        failure = {"phase": phase, "message": message}
        if failure not in self.summary.failures:
            self.summary.failures.append(failure)
            rank_zero_warn(f"{phase} failed: {message}. The run continues without it, and its summary.json says so.")
            self._write()

    def note(self, message: str) -> None:
        """Note that something went otherwise than asked for, and say so, once."""
        if message not in self.summary.notes:
            self.summary.notes.append(message)
            rank_zero_warn(message)

    @contextmanager
    def guarded(self, phase: str) -> Iterator[None]:
        """Record what is raised inside as a failure of a phase, and go on."""
        try:
            yield
        except Exception as error:
            self.failed(phase, error)

    def _log(self, problems: list[str]) -> None:
        for problem in problems:
            self.failed("log", problem)

    def _write(self) -> None:
        if self.is_main:
            self.summary.write(self.folder)

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

    def _note_memory(self) -> None:
        self.summary.peak_memory_bytes = max(self.summary.peak_memory_bytes, peak_memory_bytes())

    # ---- The course of a run

    def begin(self, model: "PreTrainedModel") -> None:
        """Make the run's folder with its summary, and tell the loggers what is pruned and how, once a process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.is_main and not self._told:
            self._told = True
            # A pruning counts its own peak anew, and the fit's is gone after it.
            self._note_memory()
            # Another run's summary, if there is one, must not be taken for this one's from here on.
            self._write()
            self._base = model.config.name_or_path
            described = {"class": type(model).__name__, "name_or_path": self._base}
            settings = {"pruned_model": described, "pruned_with": self.settings, "environment": environment()}
            self._log(log.log_settings(self.loggers, settings))

    def save(self, model: "PreTrainedModel", tokenizer: Any, name: str) -> None:
        """Save the model in the folder, and unless it is the dense one its compact files."""
        with interrupts.held():
            save_model(model, self.folder / name, tokenizer, writes=self.is_main)
            if self.compact and name != "model_dense" and self.is_main:
                save_compact(model, self.folder / "model_compact", tokenizer=tokenizer)
            self.summary.saved.append(name)
            self._write()

    def stage(self, name: str, found: StageResult) -> None:
        """Log what was measured at a stage, add it to the summary, and write that: a stage in it is done."""
        if self.is_main:
            self._log(log.log_stage(self.loggers, name, found, self.global_step()))
        self.summary.stages[name] = found
        self._note_memory()
        self._write()

    def block(self, records: list[LayerRecord]) -> None:
        """Log a finished block."""
        if self.is_main:
            self._log(log.log_block(self.loggers, records, self.global_step()))

    def pruned(self, report: PruningReport, *, is_last: bool = True) -> None:
        """Note a pruning: its seconds, and of the last one in a run the layers and the counted sparsity."""
        self.summary.add_seconds("capture", report.capture_seconds)
        self.summary.add_seconds("solve", report.solve_seconds)
        if report.reconstruction_seconds:
            self.summary.add_seconds("reconstruct", report.reconstruction_seconds)
        if report.rescaling_seconds:
            self.summary.add_seconds("rescale", report.rescaling_seconds)
        if report.journal_seconds:
            self.summary.add_seconds("journal", report.journal_seconds)
        self.summary.pruning_memory_bytes = max(self.summary.pruning_memory_bytes, report.peak_memory_bytes)
        if is_last:
            self.summary.measured_sparsity = report.sparsity
            self.summary.divergence = list(report.divergence or ())
        if self.is_main and is_last:
            write_layers(self.folder, report.layers)
        elif self.is_main:
            self._log(log.log_sparsity(self.loggers, "pruned", report.sparsity, self.global_step()))

    def finish_pruning(self, report: PruningReport) -> None:
        """Log the pruned layers, then make the report."""
        if self.is_main:
            rates = self._rates(report)
            self._log(log.finish_pruning(self.loggers, self.summary, rates, self.global_step()))
            self._log(log.log_layers(self.loggers, self.summary, report.layers))
            self._report(report.layers)

    def resume_finetuning(self, records: list[LayerRecord]) -> None:
        """Log the pruned layers and the figures for a process that trains on what an earlier one has pruned.

        Tables and images lie in the earlier process's part of a W&B run on disk.
        """
        if self.is_main:
            figures = {path.stem: path for path in sorted((self.folder / "figures").glob("*.png"))}
            self._log(log.log_figures(self.loggers, figures, self.global_step()))
            self._log(log.log_layers(self.loggers, self.summary, records))

    def finish_finetuning(self, records: list[LayerRecord]) -> None:
        """Log what the fine-tuned model has come to, then make the report anew."""
        if self.is_main:
            self._log(log.log_finetuned(self.loggers, self.summary, self.global_step()))
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
            "rescale": report.rescaling_seconds,
        }
        return {phase: found["flops"] / seconds[phase] / 1e12 for phase, found in self.summary.predicted.items()}

    def _report(self, records: list[LayerRecord]) -> None:
        figures: dict[str, Path] = {}
        with self.guarded("figures"):
            figures = draw_figures(self.folder / "figures", self.summary, records)
        with self.guarded("report.html"):
            write_page(self.folder, self.summary, records, figures, self.settings, environment(), command())
        with self.guarded("model card"):
            write_cards(self.folder, self.summary, self._base, self.settings, environment(), command())
        self._log(log.log_figures(self.loggers, figures, self.global_step()))
        if self.compact:
            self._log(log.log_model(self.loggers, self.folder / "model_compact"))
        self._write()
        print_run(self.summary, records, self.folder)
