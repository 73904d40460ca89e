"""`MAIHTPruning`: prune the model at the end of a fit, or in the middle of it."""

from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from typing_extensions import override

from ..capture.hidden_states import Storage, check_storage
from ..data.batches import TokenBatches
from ..data.c4 import C4Calibration
from ..data.calibration import CalibrationSource
from ..evaluation.evaluation import Evaluation
from ..interrupts import interrupts
from ..models.memory import release_memory
from ..models.offload import is_sharded
from ..pruning.checks import check_windows, has_zeros
from ..records import LayerRecord, PruningReport
from ..reporting.hub import check_repo_id
from ..reporting.summary import Summary
from ..solvers import MAIHTConfig, PruningSpec
from ..validation import check_at_least
from .calibration import Calibration, TrainingWindows, check_calibration
from .compatibility import (
    check_offload,
    check_reachable,
    check_trainer,
    find_callback,
    quiet_progress_bar,
)
from .frozen import FrozenSparsity
from .language_model import find_language_model
from .monitors import reset_monitors
from .preparation import check_disk, prepare_run
from .pruning_run import PruningRun
from .resume_point import remove_point, restore_point, save_point
from .resuming import (
    Limits,
    between_batches,
    find_point,
    leave_out_training,
    lift_limits,
    reload_run,
    settle_counters,
)
from .schedule import parse_schedule
from .verification import verify_zeros, warn_of_failures, warn_of_lost_zeros


class MAIHTPruning(Callback):
    """Prune a causal language model in one shot when its fit ends, or at other times of it.

    The model is measured, pruned layer by layer from calibration text, saved, and measured again. Everything that can
    be wrong with the settings, the model or the texts is checked before the first training step. The pruned model,
    the report, the tables and the journal lie in `output_dir`; perplexities, accuracies, the layers' errors and the
    figures go to the Trainer's loggers.

    What is trained after a pruning keeps its zeros: a `FrozenSparsity` is added where there is none, checkpoint
    callbacks forget the dense model's scores, and at the end the result is measured as stage `finetuned` and saved as
    `model_finetuned/`. That is so in a fit that continues after `prune_at`, in `sparse_finetune`, and where a
    `FrozenSparsity` stands beside this callback and the model comes with the zeros asked for.

    The model as trained is on disk in `output_dir` before its first block changes, within training with the
    optimizer's state, and again after it was pruned. A process that dies after that costs no training done before: the
    next fit with the same `output_dir` takes the model from there, goes on with the first unfinished block, and repeats
    no measurement. What cannot be measured or reported is a warning, stands in `summary.json`, and costs no model.

    Note:
        `ModelCheckpoint`'s files from before the pruning are dense: use `output_dir/model`. Averaging callbacks
        must stand before this one, or they overwrite the pruned weights; they are refused otherwise, and anywhere
        if training continues after the pruning.

    Args:
        sparsity: Fraction of zeros, in [0, 1): exactly floor(sparsity · numel) in each linear layer for
            `unstructured`, floor(sparsity · in) in each row for `row`; `N:M` fixes it.
        pattern: `unstructured` (compared within a layer), `row` (within an output row), or `N:M`, which keeps N
            of every M consecutive inputs.
        method: `maiht`, `aiht`, `iht`, `sparsegpt`, `admm`, `wanda` or `magnitude`.
        config: A preset's name, `paper`, `fast`, `accurate`, `balanced` or `best`, perhaps with changes, as in
            `balanced,reconstruction_epochs=2`, or settings one by one, with those left out as in `paper`. By default
            `balanced`, and for other methods than `maiht` as they were published.
        calibration: Where calibration windows come from; by default 128 from C4. Or windows of your own: a LongTensor
            of token ids (samples, seqlen), a DataLoader or other batches (see `prune`), or `train`: what the model is
            trained on first, as the LightningModule gives it to the model, up to 262,144 tokens.
        evaluation: What the dense and the pruned model are measured by; by default perplexity on WikiText-2.
        model: Dotted path of the Hugging Face model in the LightningModule. None: it is found.
        tokenizer: Name or folder of the tokenizer. None: the LightningModule's, or the model's own. Texts and tasks
            alone need one.
        batch_size: Windows per calibration forward pass; one where blocks are reconstructed.
        compact: Also save the pruned model as `model_compact/`, much smaller, for `load_compact`; W&B gets it as an
            artifact.
        prune_at: `end`; `epoch:K` or `step:K`, after K epochs or optimizer steps, and training continues with the zeros
            frozen; or several steps, as `{epoch:1: 0.3, epoch:2: 0.5}`, with these sparsities in place of `sparsity`.
        offload: `cpu` keeps the model in host memory while it is pruned and measured, with one block at a time on the
            GPU; `disk`, for `maiht prune`, leaves its blocks in their files; `none`: it is on the GPU as a whole.
        hidden_states: Where the calibration windows' hidden states are kept: `device`, `host`, `disk`, or `auto`, the
            first of these with room for them.
        save_dense: Also save the model as it was just before the pruning, as `model_dense/`: a teacher to distil from.
        keep_journal: Keep the journal's weights, as large as the model's, when the pruned model is saved and measured.
        push_to_hub: A repository `USER/NAME` on the Hugging Face hub, private if it is made, to which the model that
            the run ends with is uploaded, with its card. An upload that fails costs nothing: `maiht push` repeats it.
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
        config: MAIHTConfig | str | None = None,
        calibration: CalibrationSource | Literal["train"] | TokenBatches | None = None,
        evaluation: Evaluation = Evaluation(),  # noqa: B008  (frozen)
        model: str | None = None,
        tokenizer: str | None = None,
        batch_size: int = 1,
        compact: bool = False,
        prune_at: str | dict[str, float] = "end",
        offload: Literal["none", "cpu", "disk"] = "none",
        hidden_states: Storage = "auto",
        save_dense: bool = False,
        keep_journal: bool = False,
        push_to_hub: str | None = None,
        output_dir: str | None = None,
    ) -> None:
        self.schedule = parse_schedule(prune_at, PruningSpec.parse(sparsity, pattern, method, config))
        check_at_least(1, batch_size=batch_size)
        self.calibration: Calibration = C4Calibration() if calibration is None else calibration
        check_calibration(self.calibration)
        self.evaluation = evaluation
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.compact, self.save_dense, self.keep_journal = compact, save_dense, keep_journal
        self.push_to_hub = None if push_to_hub is None else check_repo_id(push_to_hub)
        if offload not in ("none", "cpu", "disk"):
            raise ValueError(f"offload must be none, cpu or disk, but found {offload!r}")
        check_storage(hidden_states)
        self.offload = offload
        self.hidden_states: Storage = hidden_states
        self.output_dir = None if output_dir is None else Path(output_dir)
        # What became of the last step's layers. None until then, and after a resume from a run without a journal.
        self.report: PruningReport | None = None
        # How many steps of the schedule are done, and the Trainer's global step at the last of them.
        self.done = self._pruned_step = 0
        # Epochs and optimizer steps of the fit that pruned the model, where `sparse_finetune` has begun another one.
        self.previous_fit: dict[str, int] | None = None
        # Whether the fit has made its last step. Only resume points are written then.
        self.trained = False
        # A checkpoint from which the next fit resumes. None: from the resume point in `output_dir`, if there is one.
        self.resume_from: Path | None = None
        # Whether `sparse_finetune` follows, so that the pruned model is a point to resume from as well.
        self.expects_finetune = False
        # Whether somebody else removes the resume point, when all of a run is done.
        self.keeps_point = False
        # Whether an earlier process has begun what is done now.
        self.resumes = False
        # What the fit trains on first, where the calibration is `train`.
        self._training_windows = TrainingWindows()
        # The Trainer's limits, while they are lifted for a fit that has no step to make.
        self._limits: Limits | None = None
        # Made by `prepare`, anew in each fit.
        self._run: PruningRun | None = None

    @property
    def spec(self) -> PruningSpec:
        """How the model is pruned in the end."""
        return self.schedule[-1].spec

    @property
    def pruned(self) -> bool:
        """Whether all steps of the schedule are done."""
        return self.done == len(self.schedule)

    @property
    def run(self) -> PruningRun:
        """The model at work and its record, from `prepare` on."""
        if self._run is None:
            raise RuntimeError("nothing is known of the run before it has begun: call fit, or prepare, first")
        return self._run

    @property
    def summary(self) -> Summary:
        """What is known of the run."""
        return self.run.recorder.summary

    # ---- Lightning's hooks, in the order in which the Trainer calls them

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse Trainers that would undo or split the pruning; see to it that zeros are kept."""
        if stage != "fit":
            return
        self.trained = False
        trains_on = self.done > 0 or self.schedule[0].unit != "end"
        check_trainer(trainer, self, trains_on=trains_on)
        check_offload(trainer, self.offload, compact=self.compact)
        if trains_on and find_callback(trainer, FrozenSparsity) is None:
            callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
            # It comes right after this callback, and so before `ModelCheckpoint`, which is last and shall find
            # masked weights.
            callbacks.insert(callbacks.index(self) + 1, FrozenSparsity(self.model))
        self._tell_frozen(trainer)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume where the checkpoint was written, and in its run's folder, unless another is given."""
        self.done, self._pruned_step = state_dict["done"], state_dict["pruned_step"]
        self.previous_fit = state_dict["earlier"]
        # Absent in checkpoints of older versions.
        self.trained = state_dict.get("trained", False)
        self._training_windows.load_state_dict(state_dict.get("windows", []))
        # Before the pruning there is nothing in the folder to resume with, and other settings make another run.
        if self.output_dir is None and self.done and state_dict.get("output_dir") is not None:
            self.output_dir = Path(state_dict["output_dir"])

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check everything that pruning will need, and draw its texts; resume what an earlier process has begun."""
        if (point := find_point(self, trainer)) is not None:
            restore_point(trainer, point)
            self.resumes = True
        # Only now it is known whether the fit resumes from a checkpoint of a pruned model.
        self._tell_frozen(trainer)
        self.prepare(trainer, pl_module)
        check_disk(self, trainer, pl_module, trains=True)
        if self.resumes and (self.trained or trainer.fit_loop.done):
            self._limits = lift_limits(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the time; see whether there is anything to train, and to prune."""
        if self._limits is not None:
            leave_out_training(trainer, self._limits)
            self._limits = None
        check_reachable(self.schedule[self.done :], trainer)
        trains_sparse = self.done == 0 and find_callback(trainer, FrozenSparsity) is not None
        if trains_sparse and has_zeros(self.run.model, self.spec):
            rank_zero_info("MAIHTPruning: the model has the zeros asked for; it is trained on with them and not pruned")
            self.done, self._pruned_step = len(self.schedule), trainer.global_step
            self.run.measure("pruned")
        if self.calibration == "train" and not self.pruned:
            if trainer.should_stop:
                # The fit has made its last step before this process: what it has not kept will not come.
                self._training_windows.require()
            model = self.run.model
            self._training_windows.watch(model, partial(check_windows, model=model))
        self.run.recorder.start_clock()
        interrupts.training = True

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Prune before the first batch after the steps or epochs asked for.

        Not right after them, where the scores that checkpoints and early stopping see are still the dense model's.
        """
        while not self.pruned and self.schedule[self.done].is_due(trainer.current_epoch, trainer.global_step):
            self.run.recorder.stop_clock("fit")
            interrupts.training = False
            self._save_point_within_training(trainer)
            with quiet_progress_bar(trainer):
                if self.done + 1 == len(self.schedule):
                    self.prune_and_record(trainer, pl_module)
                else:
                    self.run.recorder.pruned(self._prune_step(trainer, pl_module), is_last=False)
                self._restore_model(trainer, pl_module)
            frozen = find_callback(trainer, FrozenSparsity)
            assert frozen is not None  # added in `setup`
            frozen.freeze(trainer, pl_module)
            reset_monitors(trainer)
            self._save_point_within_training(trainer)
            if self.pruned:
                self.run.drop_journals()
            self.run.recorder.start_clock()
            interrupts.training = True
        self._training_windows.is_listening = True

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """See that there is something to calibrate on, where that is what is trained on."""
        self._training_windows.is_listening = False
        if self.calibration == "train" and not self.pruned:
            self._training_windows.require()

    def _save_point_within_training(self, trainer: Trainer) -> None:
        """Keep all that was trained where a batch is about to begin, with the optimizers' states."""
        with between_batches(trainer):
            save_point(trainer, self.run.recorder.folder)

    @override
    def state_dict(self) -> dict[str, Any]:
        """How far the pruning is, for fits that resume from a checkpoint."""
        windows = [] if self.pruned else self._training_windows.state_dict()
        return {
            "done": self.done,
            "pruned_step": self._pruned_step,
            "earlier": self.previous_fit,
            "trained": self.trained,
            "output_dir": None if self.output_dir is None else str(self.output_dir),
            **({"windows": windows} if windows else {}),
        }

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune, or measure what became of the pruned model, while the model, its device and loggers are alive."""
        interrupts.training = False
        self._training_windows.close()
        if not (self.pruned and trainer.global_step <= self._pruned_step):
            self.run.recorder.stop_clock("finetune" if self.pruned else "fit")
            for optimizer in trainer.optimizers:
                # Its moments are of no more use, and for Adam twice as large as the model.
                optimizer.state.clear()
            # Other processes, and what asks how much is free, see it only when the allocator gives it back.
            release_memory()
            if not self.trained:
                self.trained = True
                save_point(trainer, self.run.recorder.folder)
            with quiet_progress_bar(trainer):
                if self.pruned:
                    self.run.finish_finetuning(self.report)
                else:
                    self._prune_trained(trainer, pl_module)
        if not self.keeps_point:
            remove_point(trainer, self.run.recorder.folder)

    def _prune_trained(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune at the end of a fit."""
        step = self.schedule[self.done]
        if step.unit != "end" and not step.is_due(trainer.current_epoch, trainer.global_step):
            rank_zero_warn(f"the fit ended before {step.name}: the model is pruned now")
        self.prune_and_record(trainer, pl_module)
        self._restore_model(trainer, pl_module)
        if not self.expects_finetune:
            self.run.publish()
        else:
            save_point(trainer, self.run.recorder.folder)
        self.run.drop_journals()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that the model was pruned and that its zeros are still there."""
        if not self.pruned:
            raise MisconfigurationException(
                "the fit ended without pruning, since it had nothing to train (no steps or epochs left, or a "
                "finished checkpoint). The model is still dense. To prune it without training: `maiht prune`, or "
                "maiht_lightning.prune(model, windows)."
            )
        warn_of_failures(self.summary)
        verify_zeros(self.run.model, [] if self.report is None else self.report.layers, self.run.recorder.folder)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn where a dense checkpoint was loaded after the pruning, such as `ckpt_path="best"`."""
        if self.report is not None and trainer.state.fn != TrainerFn.FITTING:
            warn_of_lost_zeros(find_language_model(pl_module, self.model), self.report.layers, self.output_dir)

    on_test_start = on_predict_start = on_validation_start

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep what is trained where the Trainer was told to stop, which it does between two batches."""
        was_training, interrupts.training = interrupts.training, False
        self._training_windows.close()
        self._limits = None
        if was_training and isinstance(exception, SIGTERMException):
            settle_counters(trainer)
            save_point(trainer, self.run.recorder.folder)

    # ---- The work, also for `maiht prune`

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check everything that pruning will need, and draw its texts; nothing is changed.

        Raises:
            MisconfigurationException: The module or the texts do not fit.
        """
        self._run = prepare_run(self, trainer, pl_module, self._run)
        self.output_dir = self._run.recorder.folder
        if self.done or self.resumes:
            reload_run(self)

    def prune_and_record(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do the last step of the schedule, whatever is done of the others: measure, prune, save, measure, report.

        `prepare` comes before.
        """
        self.done = len(self.schedule) - 1
        self.report = self._prune_step(trainer, pl_module)
        self.run.finish_pruning(self.spec, self.report)

    def _prune_step(self, trainer: Trainer, pl_module: LightningModule) -> PruningReport:
        """Do the next step of the schedule, with the stage `dense` before the first."""
        step, is_last = self.schedule[self.done], self.done + 1 == len(self.schedule)
        if self.calibration == "train":
            self.run.calibrate_on(trainer.strategy.broadcast(self._training_windows.windows()))
        # Gradients are of no more use, and as large as the model.
        pl_module.zero_grad(set_to_none=True)
        if self._moves(pl_module):
            pl_module.to("cpu")
        self.run.begin(save_dense=self.save_dense)
        frozen = find_callback(trainer, FrozenSparsity)
        has_frozen = frozen is not None and frozen.masks is not None
        report = self.run.prune(
            step.spec.keeping_zeros() if has_frozen else step.spec,
            journal="journal" if is_last else f"journal_{step.name.replace(':', '_')}",
            on_block=partial(self._after_block, trainer, is_last),
        )
        self.done, self._pruned_step = self.done + 1, trainer.global_step
        return report

    def _after_block(self, trainer: Trainer, is_last: bool, records: list[LayerRecord]) -> None:
        """Log a finished block, and stop after it where Lightning has noted SIGTERM, as it does in own code."""
        # W&B has room for one set of curves over the blocks: the last step's.
        if is_last:
            self.run.recorder.block(records)
        if trainer.received_sigterm and trainer.world_size == 1:
            raise SIGTERMException

    def _restore_model(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move a model that was pruned in host memory back to the device on which it is trained."""
        if self._moves(pl_module):
            pl_module.to(trainer.strategy.root_device)

    def _moves(self, pl_module: LightningModule) -> bool:
        """Whether the model goes to host memory to be pruned; shards stay where they are."""
        return self.offload == "cpu" and not is_sharded(pl_module)

    def _tell_frozen(self, trainer: Trainer) -> None:
        """Let a `FrozenSparsity` know whether the zeros are still to come."""
        if (frozen := find_callback(trainer, FrozenSparsity)) is not None:
            frozen.expects_pruning = self.done == 0
