"""The tables a person sees at the end of a run."""

from statistics import geometric_mean
from typing import Any

from rich.console import Console
from rich.table import Table

from ...records import LayerRecord
from ..summary import Summary, task_table


def print_run(summary: Summary, records: list[LayerRecord], folder: str) -> None:
    """Print the stages, the layers by kind, and where the files are."""
    console = Console()
    console.print()
    console.print(_stages(summary))
    console.print(_kinds(records))
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in summary.seconds.items())
    console.print(f"Time: {seconds}. Peak memory: {summary.peak_memory_bytes / 2**30:.1f} GiB.")
    if summary.predicted:
        seconds = ", ".join(f"{name} {found['seconds']:.0f} s" for name, found in summary.predicted.items())
        console.print(f"Predicted for this machine: {seconds}.")
    console.print(f"Files: {folder} (report.html to look at; model/ loads with from_pretrained)", soft_wrap=True)


def _stages(summary: Summary) -> Table:
    title = f"{summary.method}, {summary.pattern}: {summary.measured_sparsity:.4%} zeros, counted"
    return stage_table(summary.stages, title)


def stage_table(stages: dict[str, dict[str, Any]], title: str) -> Table:
    """What was measured, a row a measure and a column a stage, which fits the terminal whatever is measured."""
    table = Table("measure", title=title, min_width=len(title) + 2)
    for name in stages:
        table.add_column(name, justify="right")
    for text in dict.fromkeys(text for stage in stages.values() for text in stage.get("perplexity", {})):
        values = [stage.get("perplexity", {}).get(text) for stage in stages.values()]
        table.add_row(f"perplexity {text}", *("" if value is None else f"{value:.3f}" for value in values))
    _, rows = task_table(stages)
    for task, metric, *values in rows:
        scores = zip(values[::2], values[1::2], strict=True)
        table.add_row(f"{task} {metric}, %", *map(_score, scores))
    if any("mean_accuracy" in stage for stage in stages.values()):
        means = [stage.get("mean_accuracy") for stage in stages.values()]
        table.add_row("mean acc, %", *(_score((mean, None)) for mean in means), style="bold")
    return table


def _score(score: tuple[float | None, float | None]) -> str:
    value, deviation = score
    if value is None:
        return ""
    return f"{100 * value:.2f}" if deviation is None else f"{100 * value:.2f} ± {100 * deviation:.2f}"


def _kinds(records: list[LayerRecord]) -> Table:
    table = Table("layers", title="Relative error ‖X(W − W0)ᵀ‖² / ‖X W0ᵀ‖²")
    for heading in ("count", "geometric mean", "worst", "in block", "solver s"):
        table.add_column(heading, justify="right")
    kinds: dict[str, list[LayerRecord]] = {}
    for record in records:
        kinds.setdefault(kind_of(record), []).append(record)
    for kind, members in kinds.items():
        worst = max(members, key=lambda record: record.relative_error)
        positive = [record.relative_error for record in members if record.relative_error > 0]
        table.add_row(
            kind,
            str(len(members)),
            f"{geometric_mean(positive):.5f}" if positive else "0",
            f"{worst.relative_error:.5f}",
            str(worst.block),
            f"{sum(record.seconds for record in members):.1f}",
        )
    return table


def kind_of(record: LayerRecord) -> str:
    """The layer's name within its block, such as `self_attn.q_proj`."""
    return record.name.split(f".{record.block}.", 1)[-1]
