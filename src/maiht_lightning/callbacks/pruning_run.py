"""What is done with a model in a pruning run; `MAIHTPruning` says when."""

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, Literal
from weakref import proxy, ref

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.distributed import ProcessGroup

from ..capture.hidden_states import Storage
from ..data.batches import Windows
from ..estimate.plan import predict_pruning
from ..evaluation.evaluation import LoadedEvaluation, context_length
from ..models.blocks import find_blocks, refuse_adapters, weight_of
from ..models.rotary import restore_frequencies
from ..models.sparsity import count_zeros, measured_sparsity
from ..pruning.checks import check_weights, check_windows
from ..pruning.journal import drop_weights
from ..pruning.pruner import prune_model
from ..records import LayerRecord, PruningReport, StageResult
from ..reporting.hub import push
from ..reporting.recorder import RunRecorder
from ..reporting.summary import Summary, fresh_run_folder
from ..solvers import PruningSpec
from .calibration import MissingTokenizer, describe, describe_windows, draw_windows
from .compatibility import check_sharded, process_group
from .language_model import find_language_model, find_tokenizer
from .resume_point import RESUME_POINT

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .pruning import MAIHTPruning


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


def prepare_run(
    pruning: "MAIHTPruning", trainer: Trainer, pl_module: LightningModule, before: PruningRun | None
) -> PruningRun:
    """Check a model and the texts for it against a callback's settings.

    Nothing is changed but rotary frequencies, which `bf16-true` has rounded in modules of other people's: they are
    restored, or the model that is trained, pruned and measured would not be the one that its saved folder holds.

    Args:
        pruning: The callback.
        trainer: Its Trainer.
        pl_module: Holds the model.
        before: The run as another fit has left it, such as the one before `sparse_finetune`; it is resumed.

    Raises:
        MisconfigurationException: The model or the texts do not fit.
    """
    model = find_language_model(pl_module, pruning.model)
    tokenizer, missing = _find_tokenizer(pruning, pl_module, model)
    check_sharded(trainer, model)
    windows, evaluation = (None, None) if before is None else (before.windows, before.evaluation)
    try:
        if restored := restore_frequencies(model):
            rank_zero_info(f"MAIHTPruning: {', '.join(restored)} has its frequencies in float32 again")
        if not pruning.pruned:
            refuse_adapters(pl_module)
            check_weights(model, find_blocks(model), pruning.spec, on_disk_allowed=True)
            if pruning.calibration == "train" and trainer.state.fn != TrainerFn.FITTING:
                raise ValueError(
                    "calibration must be a text or token batches where nothing is trained, but found train"
                )
            # A source of somebody's own may draw others in every process.
            windows = trainer.strategy.broadcast(
                draw_windows(pruning.calibration, tokenizer or missing, context_length(model))
            )
            if windows is not None:
                check_windows(windows, model)
        if evaluation is None or not pruning.pruned:
            evaluation = _load_evaluation(pruning, trainer, model, tokenizer, missing)
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        raise MisconfigurationException(f"pruning cannot work with these settings: {error}") from error
    folder = pruning.output_dir
    if folder is None:
        fresh = fresh_run_folder(Path(trainer.default_root_dir) / "runs") if trainer.is_global_zero else Path()
        folder = Path(trainer.strategy.broadcast(fresh))
    spec = pruning.spec
    recorder = RunRecorder(
        folder=folder,
        summary=Summary(spec.method, spec.sparsity, spec.pattern.name) if before is None else before.recorder.summary,
        settings=_described(pruning, windows),
        loggers=trainer.loggers,
        # Whoever keeps the callback after the fit keeps neither its Trainer nor, by the reference below, its model.
        global_step=partial(getattr, proxy(trainer), "global_step"),
        is_main=trainer.is_global_zero,
        compact=pruning.compact,
    )
    return PruningRun(
        find_model=partial(_find_again, ref(pl_module), pruning.model),
        tokenizer=tokenizer,
        windows=windows,
        evaluation=evaluation,
        recorder=recorder,
        device=trainer.strategy.root_device,
        process_group=process_group(trainer),
        batch_size=pruning.batch_size,
        hidden_states=pruning.hidden_states,
        offload=pruning.offload,
        keep_journal=pruning.keep_journal,
        push_to_hub=pruning.push_to_hub,
        forward_context=trainer.precision_plugin.forward_context,
        # Where the Trainer has no bar, as it was told or because nobody looks at a terminal, there is none at all.
        progress=trainer.progress_bar_callback is not None,
    )


def _find_tokenizer(
    pruning: "MAIHTPruning", pl_module: LightningModule, model: "PreTrainedModel"
) -> "tuple[PreTrainedTokenizerBase | None, MissingTokenizer]":
    """The tokenizer, if there is one, and what stands in for it; one that was named must be there."""
    try:
        return find_tokenizer(pl_module, model, pruning.tokenizer), MissingTokenizer("")
    except MisconfigurationException as error:
        if pruning.tokenizer is not None:
            raise MisconfigurationException(f"no tokenizer: {error}") from error
        return None, MissingTokenizer(str(error))


def _load_evaluation(
    pruning: "MAIHTPruning",
    trainer: Trainer,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    missing: MissingTokenizer,
) -> LoadedEvaluation:
    """Load what the model is measured by, the same in all processes."""
    if tokenizer is None and pruning.evaluation.needs_tokenizer:
        raise ValueError(
            f"no tokenizer for the texts and tasks of the evaluation: {missing.reason} Or measure on batches of your "
            f"own, with evaluation=Evaluation(perplexity={{'mine': loader}}), or nothing, with perplexity=[]."
        )
    loaded = pruning.evaluation.load(model, tokenizer)
    own = {name: windows for name, windows in loaded.windows.items() if isinstance(windows, Windows)}
    for windows in own.values():
        check_windows(windows, model)
    # Every process has loaders of its own, which may shuffle in their own ways.
    return replace(loaded, windows={**loaded.windows, **trainer.strategy.broadcast(own)})


def check_disk(pruning: "MAIHTPruning", trainer: Trainer, pl_module: LightningModule, *, trains: bool) -> None:
    """Refuse a run whose folder cannot be written or has no room for all that comes, before it has cost anything.

    Args:
        pruning: The callback, after `prepare`.
        trainer: Its Trainer.
        pl_module: Holds the model.
        trains: Whether the model is trained first, and so kept as it is then.

    Raises:
        MisconfigurationException: It cannot be written, or there is too little room; the message has the sum.
    """
    folder = pruning.run.recorder.folder
    module = sum(p.numel() * p.element_size() for p in pl_module.parameters())
    model = pruning.run.model
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    weights = [weight_of(linear) for _, linear in find_blocks(model).linears()]
    blocks = sum(weight.numel() * weight.element_size() for weight in weights)
    results = {RESUME_POINT: module} if trains else {}
    results |= {"journal": blocks, "model": size}
    if pruning.save_dense:
        results["model_dense"] = size
    if pruning.compact:
        bitmasks = sum(weight.numel() for weight in weights) // 8
        results["model_compact"] = size - int(pruning.spec.sparsity * blocks) + bitmasks
    if pruning.expects_finetune or len(pruning.schedule) > 1 or pruning.schedule[0].unit != "end":
        results["model_finetuned"] = size
    needed = {name: count for name, count in results.items() if not (folder / name).exists()}
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    # The first process writes all of it; on other nodes its disk may not be there.
    problem = trainer.strategy.broadcast(_writing_problem(existing) if trainer.is_global_zero else None)
    if problem is not None:
        raise MisconfigurationException(
            f"output_dir {folder} cannot be written ({problem}): give one that can, or make it so"
        )
    free = trainer.strategy.broadcast(shutil.disk_usage(existing).free)
    if sum(needed.values()) > free:
        parts = " + ".join(f"{name} {count / 1e9:.2f} GB" for name, count in needed.items())
        raise MisconfigurationException(
            f"the run needs {sum(needed.values()) / 1e9:.2f} GB in {folder} ({parts}), but its disk has "
            f"{free / 1e9:.2f} GB left: make room, or give another output_dir"
        )


def _writing_problem(folder: Path) -> str | None:
    """Why no file can be written in a folder, found by writing one that has no name; None if it can."""
    try:
        with TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return str(error)


def _find_again(module: "ref[LightningModule]", name: str | None) -> "PreTrainedModel":
    found = module()
    if found is None:
        raise RuntimeError("the LightningModule whose model is pruned is gone")
    return find_language_model(found, name)


def _described(pruning: "MAIHTPruning", windows: Windows | None) -> dict[str, Any]:
    """How the model is pruned and measured, for the report and the loggers."""
    return {
        "method": pruning.spec.method,
        "sparsity": pruning.spec.sparsity,
        "pattern": pruning.spec.pattern.name,
        "prune_at": {step.name: step.spec.sparsity for step in pruning.schedule},
        "config": asdict(pruning.spec.config),
        "calibration": describe(pruning.calibration, windows),
        "evaluation": pruning.evaluation.description,
    }
