"""Writing a pruning to Lightning's loggers: W&B gets curves over the blocks, tables and figures, others get metrics.

Logging must never cost a pruned model: what a logger raises is returned, a message per logger, and the others go on.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from ..records import LayerRecord, StageResult, Stages
from .summary import LAYER_COLUMNS, Summary, layer_rows


def log_settings(loggers: Sequence[Logger], settings: dict[str, Any]) -> list[str]:
    """Log settings as hyperparameters; nested dictionaries are fine."""
    return _each(loggers, lambda logger: logger.log_hyperparams(settings))


def log_block(loggers: Sequence[Logger], records: list[LayerRecord], global_step: int) -> list[str]:
    """Log a finished block: its error, that of each layer, and the solver's time in seconds; in W&B over the blocks."""
    block = records[0].block
    metrics: dict[str, float] = {
        "prune/block": block,
        "prune/relative_error": fmean(record.relative_error for record in records),
        "prune/seconds": sum(record.seconds for record in records),
        **{f"prune/relative_error/{record.layer}": record.relative_error for record in records},
    }
    if records[0].block_error is not None:
        before, after = records[0].block_error
        metrics |= {"prune/block_error/before": before, "prune/block_error/after": after}

    def write(logger: Logger) -> None:
        if isinstance(logger, WandbLogger):
            # W&B must see its step rise, so that the blocks are an axis of their own. Its pattern `prune/*` would end
            # at the next slash, before the names of layers.
            for name in metrics:
                logger.experiment.define_metric(name, step_metric=None if name == "prune/block" else "prune/block")
            logger.log_metrics(metrics, step=global_step)
        else:
            logger.log_metrics(metrics, step=block)

    return _each(loggers, write)


def log_sparsity(loggers: Sequence[Logger], name: str, sparsity: float, global_step: int) -> list[str]:
    """Log the fraction of zeros at a stage as `STAGE/sparsity`."""
    return _each(loggers, lambda logger: logger.log_metrics({f"{name}/sparsity": sparsity}, step=global_step))


def log_stage(loggers: Sequence[Logger], name: str, stage: StageResult, global_step: int) -> list[str]:
    """Log what was measured at a stage.

    The names are `STAGE/perplexity/TEXT`, `STAGE/tasks/TASK/METRIC`, `STAGE/mean_accuracy` and `STAGE/metrics/NAME`.
    """
    metrics = {f"{name}/perplexity/{text}": value for text, value in stage.perplexity.items()}
    for task, found in stage.tasks.items():
        metrics |= {f"{name}/tasks/{task}/{metric}": value for metric, value in found.items()}
    if stage.mean_accuracy is not None:
        metrics[f"{name}/mean_accuracy"] = stage.mean_accuracy
    metrics |= {f"{name}/metrics/{metric}": value for metric, value in stage.metrics.items()}
    if not metrics:
        return []
    return _each(loggers, lambda logger: logger.log_metrics(metrics, step=global_step))


def finish_pruning(
    loggers: Sequence[Logger],
    summary: Summary,
    tflops: dict[str, float],
    global_step: int,
) -> list[str]:
    """Log the counted sparsity, divergence, times, memory and TFLOP/s by phase."""

    def finish(logger: Logger) -> None:
        metrics = {
            "pruned/sparsity": summary.measured_sparsity,
            **{f"seconds/{phase}": seconds for phase, seconds in summary.seconds.items()},
            "peak_memory_bytes": float(summary.peak_memory_bytes),
            **({"prune/peak_memory_bytes": float(peak)} if (peak := summary.pruning_memory_bytes) else {}),
            **dict(zip(("prune/divergence/before", "prune/divergence/after"), summary.divergence, strict=False)),
            **{f"predicted/{phase}_seconds": found["seconds"] for phase, found in summary.predicted.items()},
            **{f"tflops/{phase}": rate for phase, rate in tflops.items()},
        }
        logger.log_metrics(metrics, step=global_step)
        logger.save()

    return _each(loggers, finish)


def log_layers(loggers: Sequence[Logger], summary: Summary, records: list[LayerRecord]) -> list[str]:
    """Log the tables of layers and tasks to W&B, and what a run is listed by there."""
    columns, rows = task_table(summary.stages)

    def write(logger: Logger) -> None:
        if isinstance(logger, WandbLogger):
            logger.log_table("prune/layers", columns=list(LAYER_COLUMNS), data=layer_rows(records))
            if rows:
                logger.log_table("tasks", columns=columns, data=rows)
            logger.experiment.summary.update(
                {"method": summary.method, "pattern": summary.pattern, "sparsity": summary.sparsity}
            )

    return _each(loggers, write)


def log_finetuned(loggers: Sequence[Logger], summary: Summary, global_step: int) -> list[str]:
    """Log the counted sparsity and times after training on with frozen zeros, and the table of tasks anew."""
    columns, rows = task_table(summary.stages)

    def finish(logger: Logger) -> None:
        seconds = {f"seconds/{phase}": value for phase, value in summary.seconds.items()}
        logger.log_metrics({"finetuned/sparsity": summary.measured_sparsity, **seconds}, step=global_step)
        if isinstance(logger, WandbLogger) and rows:
            logger.log_table("tasks", columns=columns, data=rows)
        logger.save()

    return _each(loggers, finish)


def task_table(stages: Stages) -> tuple[list[str], list[list[Any]]]:
    """Make a table of the tasks: one row per task and metric, a value and its standard error per stage."""
    columns = ["task", "metric", *(f"{name}{suffix}" for name in stages for suffix in ("", "_stderr"))]
    rows = [
        [task, metric, *(number for stage in stages.values() for number in stage.score(task, metric))]
        for task, metric in stages.metrics
    ]
    return columns, rows


def log_figures(loggers: Sequence[Logger], figures: dict[str, Path], global_step: int) -> list[str]:
    """Log PNG files by name as `figures/NAME` to the loggers that take images."""

    def draw(logger: Logger) -> None:
        if isinstance(logger, WandbLogger):
            for name, path in figures.items():
                logger.log_image(f"figures/{name}", [str(path)])
        elif isinstance(logger, TensorBoardLogger):
            from matplotlib.image import imread

            for name, path in figures.items():
                logger.experiment.add_image(f"figures/{name}", imread(path), global_step, dataformats="HWC")

    return _each(loggers, draw)


def log_model(loggers: Sequence[Logger], folder: Path) -> list[str]:
    """Log a model's folder to W&B as an artifact."""

    def upload(logger: Logger) -> None:
        if isinstance(logger, WandbLogger):
            import wandb

            artifact = wandb.Artifact(f"pruned-{logger.experiment.id}", type="model")
            artifact.add_dir(str(folder))
            logger.experiment.log_artifact(artifact)

    return _each(loggers, upload)


def _each(loggers: Sequence[Logger], action: Callable[[Logger], None]) -> list[str]:
    """Do something with each logger; returns what they raise. The others get their turn."""
    problems = []
    for logger in loggers:
        try:
            action(logger)
        except Exception as error:
            problems.append(f"{type(logger).__name__} could not log the pruning: {type(error).__name__}: {error}")
    return problems
