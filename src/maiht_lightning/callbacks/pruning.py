"""`MAIHTPruning`: prune the model at the end of a fit, or in the middle of it."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from weakref import proxy

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..capture.hidden_states import Storage, check_storage
from ..data.c4 import C4Calibration
from ..data.calibration import CalibrationSource
from ..estimate.plan import Job
from ..estimate.run import predict_pruning
from ..evaluation.evaluation import Evaluation, LoadedEvaluation, context_length
from ..models.blocks import find_blocks, find_linears, refuse_adapters, weight_of
from ..models.offload import full_weight
from ..models.sparsity import count_zeros, measured_sparsity
from ..pruning.journal import read_records
from ..pruning.pruner import check_windows, prune
from ..records import PruningReport
from ..reporting.recorder import RunRecorder
from ..reporting.summary import Summary, fresh_run_folder
from ..solvers import MAIHTConfig, check_method, parse_pattern, resolve_config
from ..validation import check_at_least
from .compatibility import (
    check_reachable,
    check_sharded,
    check_trainer,
    find_callback,
    process_group,
    quiet_progress_bar,
)
from .frozen import FrozenSparsity
from .language_model import find_language_model, find_tokenizer
from .monitors import reset_monitors
from .schedule import parse_schedule

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class MAIHTPruning(Callback):
    """Prune a causal language model in one shot when its fit ends, or at other times of it.

    The model is measured, pruned layer by layer from calibration text, saved, and measured again. Everything that can
    be wrong with the settings, the model or the texts is checked before the first training step. The pruned model,
    the report, the tables and the journal lie in `output_dir`; perplexities, accuracies, the layers' errors and the
    figures go to the Trainer's loggers.

    What is trained after a pruning keeps its zeros: a `FrozenSparsity` is added where there is none, checkpoint
    callbacks forget the dense model's scores, and at the end the result is measured as stage `finetuned` and saved as
    `model_finetuned/`. That is so in a fit that goes on after `prune_at`, in `sparse_finetune`, and where a
    `FrozenSparsity` stands beside this callback and the model comes with the zeros asked for.

    Note:
        `ModelCheckpoint`'s files from before the pruning are dense: use `output_dir/model`. Averaging callbacks
        must stand before this one, or they overwrite the pruned weights; they are refused otherwise, and anywhere
        if training goes on after the pruning.

    Args:
        sparsity: Fraction of zeros, in [0, 1): exactly floor(sparsity · numel) in each linear layer for
            `unstructured`, floor(sparsity · in) in each row for `row`; `N:M` fixes it.
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
        prune_at: `end`; `epoch:K` or `step:K`, after K epochs or optimizer steps, and training goes on with the zeros
            frozen; or several shots, as `{epoch:1: 0.3, epoch:2: 0.5}`, with these sparsities in place of `sparsity`.
        offload: `cpu` keeps the model in host memory while it is pruned and measured, with one block at a time on the
            GPU; `disk`, for `maiht prune`, leaves its blocks in their files; `none`: it is on the GPU as a whole.
        hidden_states: Where the calibration windows' hidden states are kept: `device`, `host`, `disk`, or `auto`, the
            first of these with room for them.
        save_dense: Also save the model as it was just before the pruning, as `model_dense/`: a teacher to distil from.
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
        prune_at: str | dict[str, float] = "end",
        offload: Literal["none", "cpu", "disk"] = "none",
        hidden_states: Storage = "auto",
        save_dense: bool = False,
        output_dir: str | None = None,
    ) -> None:
        self.method = check_method(method)
        self.schedule = parse_schedule(prune_at, parse_pattern(pattern, sparsity).sparsity)
        self.patterns = [parse_pattern(pattern, shot.sparsity) for shot in self.schedule]
        self.pattern = self.patterns[-1]
        self.config = resolve_config(config)
        check_at_least(1, batch_size=batch_size)
        self.calibration = C4Calibration() if calibration is None else calibration
        self.evaluation = evaluation
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.compact, self.save_dense = compact, save_dense
        if offload not in ("none", "cpu", "disk"):
            raise ValueError(f"offload must be none, cpu or disk, but found {offload!r}")
        check_storage(hidden_states)
        self.offload = offload
        self.hidden_states: Storage = hidden_states
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.report: PruningReport | None = None
        # How many of the shots are done, and the Trainer's step at the last of them.
        self.done = self._pruned_step = 0
        # Epochs and steps of the fits before this one, where `sparse_finetune` has begun another.
        self.earlier: dict[str, int] | None = None
        self._calibration_windows: Tensor = torch.empty(0)
        self._measurement: LoadedEvaluation | None = None
        # Made by `prepare`, which knows the run's folder and the Trainer's loggers.
        self._recorder: RunRecorder | None = None

    @property
    def pruned(self) -> bool:
        """Whether all shots are done."""
        return self.done == len(self.schedule)

    @property
    def recorder(self) -> RunRecorder:
        """Where this run's results go."""
        if self._recorder is None:
            raise RuntimeError("nothing is recorded before the run has begun: call fit, or prepare, first")
        return self._recorder

    @property
    def summary(self) -> Summary:
        """What is known of this run."""
        return self.recorder.summary

    # ---- Lightning's hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse Trainers that would undo or split the pruning; see to it that zeros are kept."""
        if stage != "fit":
            return
        check_trainer(trainer, self, trains_on=self._trains_on)
        if self.offload == "disk" and trainer.state.fn == TrainerFn.FITTING:
            raise MisconfigurationException("offload: disk leaves blocks in files, for `maiht prune`; a fit needs them")
        if self.compact and (self.offload == "disk" or isinstance(trainer.strategy, ModelParallelStrategy)):
            raise MisconfigurationException(
                "compact files are made of a model that is in memory as a whole: leave compact out, and afterwards "
                "`maiht export --model OUTPUT_DIR/model --output FOLDER`"
            )
        if self._trains_on and find_callback(trainer, FrozenSparsity) is None:
            callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
            # Right after this one, and so before `ModelCheckpoint`, which is last and shall find masked weights.
            callbacks.insert(callbacks.index(self) + 1, FrozenSparsity(self.model))
        if (frozen := find_callback(trainer, FrozenSparsity)) is not None:
            frozen.expects_pruning = self.done == 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check everything that pruning will need, and draw its texts."""
        if (frozen := find_callback(trainer, FrozenSparsity)) is not None:
            # Known only now, if the fit goes on from a checkpoint.
            frozen.expects_pruning = self.done == 0
        self.prepare(trainer, pl_module)
        if self.done:
            self._reload()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the time; see whether there is anything to prune."""
        check_reachable(self.schedule[self.done :], trainer)
        if self.done == 0 and find_callback(trainer, FrozenSparsity) is not None and self._has_the_zeros(pl_module):
            rank_zero_info("MAIHTPruning: the model has the zeros asked for; it is trained on with them and not pruned")
            self.done, self._pruned_step = len(self.schedule), trainer.global_step
            self._measure("pruned", trainer, pl_module)
        self.recorder.start_clock()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Prune before the first batch after the steps or epochs asked for.

        Not right after them, where the scores that checkpoints and early stopping see are still the dense model's.
        """
        self._prune_if_due(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune, or measure what became of the pruned model, while the model, its device and loggers are alive."""
        if self.pruned:
            if trainer.global_step > self._pruned_step:
                self.recorder.stop_clock("finetune")
                with quiet_progress_bar(trainer):
                    self._finish_finetuning(trainer, pl_module)
            return
        next_shot = self.schedule[self.done]
        if next_shot.unit != "end" and not next_shot.is_due(trainer.current_epoch, trainer.global_step):
            rank_zero_warn(f"the fit ended before {next_shot.name}: the model is pruned now")
        self.recorder.stop_clock("fit")
        for optimizer in trainer.optimizers:
            # Its moments are of no more use, and for Adam twice as large as the model.
            optimizer.state.clear()
        with quiet_progress_bar(trainer):
            self.run(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that the model was pruned and that its zeros are still there."""
        if not self.pruned:
            raise MisconfigurationException(
                "the fit ended without pruning, since it had nothing to train (no steps or epochs left, or a "
                "finished checkpoint). The model is still dense. To prune it without training: `maiht prune`, or "
                "maiht_lightning.prune(model, windows)."
            )
        self._verify(find_language_model(pl_module, self.model))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn where a dense checkpoint was loaded after the pruning, such as `ckpt_path="best"`."""
        self._warn_if_dense(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn as before validation."""
        self._warn_if_dense(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn as before validation."""
        self._warn_if_dense(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """How far the pruning is, for fits that go on from a checkpoint."""
        return {
            "done": self.done,
            "pruned_step": self._pruned_step,
            "earlier": self.earlier,
            "output_dir": None if self.output_dir is None else str(self.output_dir),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was written, and in its run's folder, unless another is given."""
        self.done, self._pruned_step = state_dict["done"], state_dict["pruned_step"]
        self.earlier = state_dict["earlier"]
        # Before the pruning there is nothing in the folder to go on with, and other settings make another run.
        if self.output_dir is None and self.done and state_dict["output_dir"] is not None:
            self.output_dir = Path(state_dict["output_dir"])

    # ---- The work, also for `maiht prune`

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check everything that pruning will need, and draw its texts; nothing is changed.

        Raises:
            MisconfigurationException: The module or the texts do not fit.
        """
        model = find_language_model(pl_module, self.model)
        tokenizer = find_tokenizer(pl_module, model, self.tokenizer)
        check_sharded(trainer, model)
        try:
            if not self.pruned:
                refuse_adapters(pl_module)
                blocks = find_blocks(model)
                for index, block in enumerate(blocks.modules):
                    for name, linear in find_linears(block).items():
                        self.pattern.check_shape(weight_of(linear).shape, f"{blocks.path}.{index}.{name}")
                windows = self.calibration.windows(tokenizer, context_length(model))
                # A source of somebody's own may draw others in every process.
                self._calibration_windows = trainer.strategy.broadcast(windows)
                check_windows(self._calibration_windows, model)
            if self._measurement is None or not self.pruned:
                self._measurement = self.evaluation.load(model, tokenizer)
        except (ValueError, OSError, ModuleNotFoundError) as error:
            raise MisconfigurationException(f"pruning cannot work with these settings: {error}") from error
        if self.output_dir is None:
            folder = fresh_run_folder(Path(trainer.default_root_dir) / "runs") if trainer.is_global_zero else None
            self.output_dir = trainer.strategy.broadcast(folder)
        assert self.output_dir is not None
        new = Summary(self.method, self.pattern.sparsity, self.pattern.name)
        # A proxy, so that who keeps this callback after the fit keeps no Trainer, and so no model, in memory.
        weak_trainer = proxy(trainer)
        self._recorder = RunRecorder(
            folder=self.output_dir,
            # A second fit, such as that of `sparse_finetune`, belongs to the same run.
            summary=new if self._recorder is None else self.summary,
            settings=self._settings(),
            loggers=trainer.loggers,
            global_step=lambda: weak_trainer.global_step,
            is_main=trainer.is_global_zero,
            compact=self.compact,
        )

    def run(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do the last shot: measure, prune, save, measure again; needs `prepare` before."""
        self.done = len(self.schedule) - 1
        report = self._prune_step(trainer, pl_module)
        # Saved first: whatever goes wrong after this, the pruned model is on disk.
        self._save(trainer, pl_module, "model")
        self.report = report
        self.recorder.pruned(report)
        if trainer.loggers and trainer.world_size == 1:
            self.summary.predicted = self._predict(find_language_model(pl_module, self.model))
        self._measure("pruned", trainer, pl_module)
        self.recorder.finish_pruning(report)
        self._settle(pl_module, trainer, back=True)

    def _prune_step(self, trainer: Trainer, pl_module: LightningModule) -> PruningReport:
        """Do the next shot, with the stage `dense` before the first."""
        model, pattern = find_language_model(pl_module, self.model), self.patterns[self.done]
        # Gradients are of no more use, and as large as the model.
        pl_module.zero_grad(set_to_none=True)
        self._settle(pl_module, trainer)
        self.recorder.begin(model)
        if "dense" not in self.summary.stages:
            if self.save_dense:
                self._save(trainer, pl_module, "model_dense")
            self._measure("dense", trainer, pl_module)
        is_last, frozen = self.done + 1 == len(self.schedule), find_callback(trainer, FrozenSparsity)
        has_frozen = frozen is not None and frozen.masks is not None
        journal = "journal" if is_last else f"journal_{self.schedule[self.done].name.replace(':', '_')}"
        with trainer.precision_plugin.forward_context():
            report = prune(
                model,
                self._calibration_windows,
                sparsity=pattern.sparsity,
                pattern=pattern.name,
                method=self.method,
                config=replace(self.config, keep_zeros=self.config.keep_zeros or has_frozen),
                journal_dir=self.recorder.folder / journal,
                batch_size=self.batch_size,
                # Of several shots, W&B has room for one set of curves over the blocks.
                on_block=self.recorder.block if is_last else None,
                device=trainer.strategy.root_device,
                hidden_states=self.hidden_states,
                process_group=process_group(trainer),
            )
        self.done, self._pruned_step = self.done + 1, trainer.global_step
        return report

    def _prune_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        while not self.pruned and self.schedule[self.done].is_due(trainer.current_epoch, trainer.global_step):
            self.recorder.stop_clock("fit")
            with quiet_progress_bar(trainer):
                if self.done + 1 == len(self.schedule):
                    self.run(trainer, pl_module)
                else:
                    self.recorder.pruned(self._prune_step(trainer, pl_module), is_last=False)
                    self._settle(pl_module, trainer, back=True)
            frozen = find_callback(trainer, FrozenSparsity)
            assert frozen is not None  # added in `setup`
            frozen.freeze(trainer, pl_module)
            reset_monitors(trainer)
            self.recorder.start_clock()

    def _finish_finetuning(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save and measure the model after it was trained on with its zeros frozen."""
        self._save(trainer, pl_module, "model_finetuned")
        model = find_language_model(pl_module, self.model)
        self.summary.measured_sparsity = measured_sparsity(count_zeros(model))
        self._measure("finetuned", trainer, pl_module)
        self.recorder.finish_finetuning([] if self.report is None else self.report.layers)

    def _save(self, trainer: Trainer, pl_module: LightningModule, name: str) -> None:
        model = find_language_model(pl_module, self.model)
        self.recorder.save(model, find_tokenizer(pl_module, model, self.tokenizer), name)

    def _settle(self, pl_module: LightningModule, trainer: Trainer, *, back: bool = False) -> None:
        """With `offload: cpu`, move the model to host memory before the work on it, and back afterwards."""
        if self.offload == "cpu" and not any(isinstance(p, DTensor) for p in pl_module.parameters()):
            pl_module.to(trainer.strategy.root_device if back and trainer.state.fn == TrainerFn.FITTING else "cpu")

    def _measure(self, stage: str, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._measurement is not None  # set by `prepare`
        model = find_language_model(pl_module, self.model)
        with self.recorder.timed("evaluate"), trainer.precision_plugin.forward_context():
            found = self._measurement.measure(
                model,
                find_tokenizer(pl_module, model, self.tokenizer),
                stage=stage,
                device=trainer.strategy.root_device,
                process_group=process_group(trainer),
            )
        self.recorder.stage(stage, found)

    def _predict(self, model: "PreTrainedModel") -> dict[str, dict[str, float]]:
        samples, seqlen = self._calibration_windows.shape
        job = Job(
            dtype=str(model.dtype).removeprefix("torch."),  # type: ignore[arg-type]
            samples=samples,
            seqlen=seqlen,
            batch_size=self.batch_size,
            method=self.method,
            pattern=self.pattern.name,
            sparsity=self.pattern.sparsity,
            config=self.config,
            offload=self.offload,
            eval_windows=0,
        )
        return predict_pruning(model, job)

    def _reload(self) -> None:
        """Read what an earlier process has written of this run, so that the stages before are not lost."""
        self.recorder.reload()
        records = read_records(self.recorder.folder / "journal")
        if self.pruned and self.report is None and records:
            self.report = PruningReport(records)

    def _settings(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "sparsity": self.pattern.sparsity,
            "pattern": self.pattern.name,
            "prune_at": {shot.name: shot.sparsity for shot in self.schedule},
            "config": asdict(self.config),
            "calibration": {
                "class": type(self.calibration).__name__,
                **{k: v for k, v in vars(self.calibration).items() if isinstance(v, str | int | float)},
                "windows": list(self._calibration_windows.shape),
            },
            "evaluation": asdict(self.evaluation),
        }

    # ---- Checks

    @property
    def _trains_on(self) -> bool:
        """Whether some training is to come after a pruning."""
        return self.done > 0 or self.schedule[0].unit != "end"

    def _has_the_zeros(self, pl_module: LightningModule) -> bool:
        blocks = find_blocks(find_language_model(pl_module, self.model))
        linears = [linear for block in blocks.modules for linear in find_linears(block).values()]
        return all(self._fits_the_pattern(full_weight(linear)) for linear in linears)

    def _fits_the_pattern(self, weight: Tensor) -> bool:
        """Whether no unit of a weight (out, in) has more left than the pattern keeps."""
        left = (self.pattern.units(weight) != 0).sum(1)
        return bool((left <= self.pattern.kept(weight.shape)).all())

    def _lost(self, model: "PreTrainedModel") -> list[str]:
        records = [] if self.report is None else self.report.layers
        now = {count.name: count.zeros for count in count_zeros(model)}
        return [r.name for r in records if now.get(r.name, 0) < r.zeros]

    def _verify(self, model: "PreTrainedModel") -> None:
        if lost := self._lost(model):
            raise MisconfigurationException(
                f"{len(lost)} pruned layers lost zeros after pruning, {lost[0]} first: another callback changed the "
                f"weights. The pruned model in {self.output_dir}/model is intact."
            )
        rank_zero_info(f"Zeros verified by counting: {measured_sparsity(count_zeros(model)):.4%}")

    def _warn_if_dense(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.report is None or trainer.state.fn == TrainerFn.FITTING:
            return
        if lost := self._lost(find_language_model(pl_module, self.model)):
            rank_zero_warn(
                f"{len(lost)} layers have fewer zeros than when they were pruned, {lost[0]} first: was a checkpoint "
                f"from before the pruning loaded? The pruned model is in {self.output_dir}/model."
            )
