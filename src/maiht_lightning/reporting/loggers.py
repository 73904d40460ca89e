"""Writing a pruning to Lightning's loggers: W&B with curves over the blocks and a table, others with metrics.

Logging must never cost a pruned model: what a logger raises is turned into a warning.
"""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn

from ..journal import LayerRecord
from .run_folder import LAYER_COLUMNS, Summary, layer_rows
from .tables import kind_of


def log_settings(loggers: Sequence[Logger], settings: dict[str, Any]) -> None:
    """Log settings as hyperparameters; nested dictionaries are fine."""
    _each(loggers, lambda logger: logger.log_hyperparams(settings))


def start_pruning(loggers: Sequence[Logger], settings: dict[str, Any]) -> None:
    """Tell the loggers the settings, and W&B that pruning has an x axis of its own."""

    def start(logger: Logger) -> None:
        if isinstance(logger, WandbLogger):
            logger.experiment.define_metric("prune/block")
            logger.experiment.define_metric("prune/*", step_metric="prune/block")

    _each(loggers, start)
    log_settings(loggers, {"pruned_with": settings})


def log_block(loggers: Sequence[Logger], records: list[LayerRecord], global_step: int) -> None:
    """Log a finished block: its error, that of each layer, and the solver's time in seconds."""
    block = records[0].block
    metrics: dict[str, float] = {
        "prune/block": block,
        "prune/relative_error": fmean(record.relative_error for record in records),
        "prune/seconds": sum(record.seconds for record in records),
        **{f"prune/relative_error/{kind_of(record)}": record.relative_error for record in records},
    }

    def write(logger: Logger) -> None:
        # W&B must see its step rise and has `prune/block` for the axis; other loggers have only the step.
        logger.log_metrics(metrics, step=global_step if isinstance(logger, WandbLogger) else block)

    _each(loggers, write)


def log_stage(loggers: Sequence[Logger], name: str, stage: dict[str, Any], global_step: int) -> None:
    """Log the perplexities of a stage as `STAGE/perplexity/TEXT`."""
    metrics = {f"{name}/perplexity/{text}": value for text, value in stage.get("perplexity", {}).items()}
    if metrics:
        _each(loggers, lambda logger: logger.log_metrics(metrics, step=global_step))


def finish_pruning(loggers: Sequence[Logger], summary: Summary, records: list[LayerRecord], global_step: int) -> None:
    """Log the counted sparsity and, once, the table of layers."""

    def finish(logger: Logger) -> None:
        logger.log_metrics({"pruned/sparsity": summary.measured_sparsity}, step=global_step)
        if isinstance(logger, WandbLogger):
            logger.log_table("prune/layers", columns=list(LAYER_COLUMNS), data=layer_rows(records))
        logger.save()

    _each(loggers, finish)


def _each(loggers: Sequence[Logger], action: Callable[[Logger], None]) -> None:
    for logger in loggers:
        try:
            action(logger)
        except Exception as error:
            rank_zero_warn(f"{type(logger).__name__} could not log the pruning: {error!r}. The run goes on.")
