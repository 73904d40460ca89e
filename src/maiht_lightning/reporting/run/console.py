"""The tables that a person sees at the end of a run."""

from pathlib import Path
from statistics import geometric_mean

from rich.console import Console
from rich.table import Table

from ...records import LayerRecord, Stages
from ..summary import Summary
from .stages import stage_rows


def print_run(summary: Summary, records: list[LayerRecord], folder: Path) -> None:
    """Print the stages, the layers by kind, and where the files are."""
    console = Console()
    console.print()
    title = f"{summary.method}, {summary.pattern}: {summary.measured_sparsity:.4%} zeros, counted"
    console.print(stage_table(summary.stages, title))
    console.print(layer_table(records))
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in summary.seconds_in_order.items())
    peak, pruning = (each / 2**30 for each in (summary.peak_memory_bytes, summary.pruning_memory_bytes))
    of_it = f", while pruning {pruning:.1f} GiB" if pruning else ""
    console.print(f"Time: {seconds}. Peak memory: {peak:.1f} GiB{of_it}.", soft_wrap=True)
    if summary.predicted:
        seconds = ", ".join(f"{name} {found['seconds']:.0f} s" for name, found in summary.predicted.items())
        console.print(f"Predicted for this machine: {seconds}.", soft_wrap=True)
    loads = "; model/ loads with from_pretrained" if (folder / "model").is_dir() else ""
    console.print(f"Files: {folder} (report.html to look at{loads})", soft_wrap=True)


def stage_table(stages: Stages, title: str) -> Table:
    """Show what was measured, one row per measure and one column per stage: it fits the terminal whatever it is."""
    table = Table("measure", title=title, min_width=len(title) + 2)
    for name in stages:
        table.add_column(name, justify="right")
    for row in stage_rows(stages, decimals=3):
        table.add_row(row.name, *row.values, style="bold" if row.is_mean else None)
    return table


def layer_table(records: list[LayerRecord]) -> Table:
    """Show the relative errors and the solver's time, one row per kind of layer."""
    table = Table("layers", title="Relative error ‖X(W − W0)ᵀ‖² / ‖X W0ᵀ‖²")
    for heading in ("count", "geometric mean", "worst", "in block", "solver s"):
        table.add_column(heading, justify="right")
    kinds: dict[str, list[LayerRecord]] = {}
    for record in records:
        kinds.setdefault(record.layer, []).append(record)
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
