"""What is done with a model in a pruning run; `MAIHTPruning` says when."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.distributed import ProcessGroup

from ..capture.hidden_states import Storage
from ..data.batches import Windows
from ..estimate.plan import predict_pruning
from ..evaluation.evaluation import LoadedEvaluation
from ..models.blocks import find_blocks
from ..models.sparsity import count_zeros, measured_sparsity
from ..pruning.journal import drop_weights
from ..pruning.pruner import prune_model
from ..records import LayerRecord, PruningReport, StageResult
from ..reporting.hub import push
from ..reporting.recorder import RunRecorder
from ..solvers import PruningSpec
from .calibration import describe_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(kw_only=True)
class PruningRun:
    """A model that is measured, pruned, saved and reported, with all that this takes at hand.

    Args:
        find_model: Finds the Hugging Face causal language model, which a run does not keep in memory.
        tokenizer: Its tokenizer, if there is one.
        windows: Calibration windows; None for a model that is pruned already, and until they have been trained on.
        evaluation: What the model is measured by.
        recorder: Where the results go.
        device: Where to compute; by default where the model is.
        process_group: The processes that share the work; None for one.
        batch_size: Windows per calibration forward pass; one where blocks are reconstructed.
        hidden_states: Where the hidden states of the windows are kept; see `prune`.
        offload: `cpu` keeps the model in host memory while it is at work; `disk` leaves its blocks in files.
        keep_journal: Whether the journal's weights stay when the pruned model is saved.
        push_to_hub: Repository on the hub for what the run ends with; None for none.
        forward_context: Opens the context in which the model runs, such as autocast.
        progress: Show progress bars; otherwise a line for each block and for each measurement.
    """

    find_model: Callable[[], "PreTrainedModel"]
    tokenizer: "PreTrainedTokenizerBase | None"
    windows: Windows | None
    evaluation: LoadedEvaluation
    recorder: RunRecorder
    device: torch.device | None = None
    process_group: ProcessGroup | None = None
    batch_size: int = 1
    hidden_states: Storage = "auto"
    offload: Literal["none", "cpu", "disk"] = "none"
    keep_journal: bool = False
    push_to_hub: str | None = None
    forward_context: Callable[[], AbstractContextManager[None]] = nullcontext
    progress: bool = True

    @property
    def model(self) -> "PreTrainedModel":
        """The Hugging Face causal language model."""
        return self.find_model()

    def begin(self, *, save_dense: bool = False) -> None:
        """Measure the model as it is before the first pruning, and save it if asked to."""
        self.recorder.begin(self.model)
        if "dense" not in self.recorder.summary.stages:
            if save_dense:
                self.save("model_dense")
            self.measure("dense")

    def calibrate_on(self, windows: Windows) -> None:
        """Set the windows that have been trained on."""
        self.windows = windows
        self.recorder.settings["calibration"] |= describe_windows(windows)

    def prune(
        self, spec: PruningSpec, *, journal: str, on_block: Callable[[list[LayerRecord]], None] | None = None
    ) -> PruningReport:
        """Prune the model, with a journal of that name in the run's folder; see `prune_model`."""
        assert self.windows is not None
        count = len(find_blocks(self.model).modules)

        def tell(records: list[LayerRecord]) -> None:
            if not self.progress:
                worst = max(records, key=lambda record: record.relative_error)
                rank_zero_info(
                    f"Pruned block {worst.block + 1} of {count}: relative error {worst.relative_error:.4f} at most, in "
                    f"{worst.layer}"
                )
            if on_block is not None:
                on_block(records)

        with self.forward_context():
            return prune_model(
                self.model,
                self.windows,
                spec,
                journal_dir=self.recorder.folder / journal,
                batch_size=self.batch_size,
                on_block=tell,
                progress=self.progress,
                device=self.device,
                hidden_states=self.hidden_states,
                process_group=self.process_group,
                on_retry=self.recorder.note,
            )

    def finish_pruning(self, spec: PruningSpec, report: PruningReport) -> None:
        """Save, measure and report the pruned model."""
        # Saved first: whatever goes wrong after this, the pruned model is on disk.
        self.save("model")
        self.recorder.pruned(report)
        if self.recorder.loggers and self.process_group is None:
            with self.recorder.guarded("predict"):
                self.recorder.summary.predicted = self._predict(spec)
        self.measure("pruned")
        self.recorder.finish_pruning(report)

    def drop_journals(self) -> None:
        """Delete the journals' weights unless they are to stay, once a run resumes without them."""
        # A model on disk reads its pruned weights from the journal.
        if self.recorder.is_main and not self.keep_journal and self.offload != "disk":
            for folder in (self.recorder.folder / "journal", *self.recorder.folder.glob("journal_*")):
                drop_weights(folder)

    def finish_finetuning(self, report: PruningReport | None) -> None:
        """Save, measure and report the model after it was trained on with its zeros frozen."""
        self.save("model_finetuned")
        self.recorder.summary.measured_sparsity = measured_sparsity(count_zeros(self.model))
        self.measure("finetuned")
        self.recorder.finish_finetuning([] if report is None else report.layers)
        self.publish()

    def publish(self) -> None:
        """Upload the newest model to the hub, where that was asked for; what fails is recorded, and costs nothing."""
        if self.push_to_hub is not None and self.recorder.is_main:
            with self.recorder.guarded("push to hub"):
                rank_zero_info(f"Pushed: {push(self.recorder.folder, self.push_to_hub)}")

    def save(self, name: str) -> None:
        """Save the model in the run's folder, unless an earlier process of the run has done so."""
        if name not in self.recorder.summary.saved:
            # A tokenizer of another library's knows no such folders.
            tokenizer = self.tokenizer if hasattr(self.tokenizer, "save_pretrained") else None
            self.recorder.save(self.model, tokenizer, name)

    def measure(self, stage: str) -> None:
        """Measure the model, and record the figures as a stage of the run, unless an earlier process has done so.

        What fails is recorded and left out.
        """
        if stage in self.recorder.summary.stages:
            return
        found = StageResult()
        if not self.progress:
            rank_zero_info(f"Measuring the {stage} model")
        with self.recorder.timed("evaluate"), self.recorder.guarded(f"evaluate {stage}"), self.forward_context():
            found = self.evaluation.measure(
                self.model,
                self.tokenizer,
                stage=stage,
                progress=self.progress,
                device=self.device,
                process_group=self.process_group,
                on_failure=lambda what, error: self.recorder.failed(f"evaluate {stage}, {what}", error),
                on_retry=self.recorder.note,
            )
        self.recorder.stage(stage, found)

    def _predict(self, spec: PruningSpec) -> dict[str, dict[str, float]]:
        assert self.windows is not None
        samples, seqlen = self.windows.samples, max(1, round(self.windows.tokens / self.windows.samples))
        return predict_pruning(
            self.model, spec, samples=samples, seqlen=seqlen, batch_size=self.batch_size, offload=self.offload
        )
