"""What comes before a pruning run: everything that can be wrong with it is found, and what it needs is at hand."""

import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any
from weakref import proxy, ref

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from ..data.batches import Windows
from ..evaluation.evaluation import LoadedEvaluation, context_length
from ..models.blocks import find_blocks, refuse_adapters, weight_of
from ..models.rotary import restore_frequencies
from ..pruning.checks import check_weights, check_windows
from ..reporting.recorder import RunRecorder
from ..reporting.summary import Summary, fresh_run_folder
from .calibration import MissingTokenizer, describe, draw_windows
from .compatibility import check_sharded, process_group
from .language_model import find_language_model, find_tokenizer
from .pruning_run import PruningRun
from .resume_point import RESUME_POINT

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .pruning import MAIHTPruning


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
