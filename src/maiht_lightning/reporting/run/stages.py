"""What was measured at each stage of a run, as rows for the terminal and for the page."""

from typing import NamedTuple

from ...records import Stages
from .. import formats


class TableRow(NamedTuple):
    """One measure of a model, and how it is written at each stage.

    Args:
        name: What was measured.
        values: One text per stage.
        is_mean: Whether this is the mean of rows above.
    """

    name: str
    values: list[str]
    is_mean: bool = False


def stage_rows(stages: Stages, decimals: int | None = None) -> list[TableRow]:
    """Write perplexities, the tasks' metrics with their standard errors, their mean, the user's own: a row per measure.

    Args:
        stages: What was measured.
        decimals: Of the perplexities; see `formats.perplexity`.
    """
    rows = [
        TableRow(
            f"perplexity, {text}",
            [
                formats.perplexity(stage.perplexity[text], decimals) if text in stage.perplexity else formats.DASH
                for stage in stages.values()
            ],
        )
        for text in stages.texts
    ]
    for task, metric in stages.metrics:
        scores = [stage.score(task, metric) for stage in stages.values()]
        rows.append(TableRow(f"{task} {metric}, %", [formats.score(*score) for score in scores]))
    means = [stage.mean_accuracy for stage in stages.values()]
    if any(mean is not None for mean in means):
        rows.append(TableRow("mean accuracy, %", [formats.score(mean) for mean in means], is_mean=True))
    for name in stages.own_metrics:
        values = [stage.metrics.get(name) for stage in stages.values()]
        rows.append(TableRow(name, [formats.DASH if value is None else formats.number(value) for value in values]))
    return rows
