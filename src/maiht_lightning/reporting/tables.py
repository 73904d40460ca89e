"""The tables a person sees at the end of a run."""

from statistics import geometric_mean

from rich.console import Console
from rich.table import Table

from ..journal import LayerRecord
from .run_folder import Summary


def print_run(summary: Summary, records: list[LayerRecord], folder: str) -> None:
    """Print the stages, the layers by kind, and where the files are."""
    console = Console()
    console.print()
    console.print(_stages(summary))
    console.print(_kinds(records))
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in summary.seconds.items())
    console.print(f"Time: {seconds}. Peak memory: {summary.peak_memory_bytes / 2**30:.1f} GiB.")
    console.print(f"Files: {folder} (model/ loads with from_pretrained)", soft_wrap=True)


def _stages(summary: Summary) -> Table:
    texts = sorted({text for stage in summary.stages.values() for text in stage.get("perplexity", {})})
    title = f"{summary.method}, {summary.pattern}: {summary.measured_sparsity:.4%} zeros, counted"
    table = Table("stage", title=title, min_width=len(title) + 2)
    for text in texts:
        table.add_column(f"perplexity {text}", justify="right")
    for name, stage in summary.stages.items():
        table.add_row(name, *(f"{stage['perplexity'][text]:.3f}" for text in texts))
    return table


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
