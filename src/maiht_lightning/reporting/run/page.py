"""`report.html`: one run on one page that needs no other file and no network."""

from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from ...models.durable import write_text
from ...records import LayerRecord
from .. import formats
from ..html import picture, render
from ..summary import Summary
from .stages import stage_rows

LISTED_LAYERS = 8
CAPTIONS = {
    "stages": "What was measured at each stage.",
    "relative_error": "Relative error ‖X(W − W0)ᵀ‖² / ‖X W0ᵀ‖² of each layer on the calibration inputs: the higher, "
    "the more of the layer's output was lost.",
    "objective": "Course of the solver's objective in the layers with the least, the median and the greatest relative "
    "error, each compared with its last value.",
    "kept": "Weights that were kept, by block and by kind of layer; the dashed line is the fraction kept over all "
    "layers.",
}


class Tile(NamedTuple):
    """A number in the headline."""

    label: str
    value: str
    note: str


def write_page(
    folder: Path,
    summary: Summary,
    records: list[LayerRecord],
    figures: dict[str, Path],
    settings: dict[str, Any],
    environment: dict[str, str],
    command: str,
) -> Path:
    """Write `report.html` into a run's folder.

    Args:
        folder: The run's folder; its `config.yaml` is shown if there is one.
        summary: The run's summary.
        records: One record per layer.
        figures: PNG files by name, in the order in which to show them; see `draw_figures`.
        settings: What was asked for; nested dictionaries are fine.
        environment: See `environment`.
        command: The command that started the run; empty if there was none.

    Returns:
        The page's path.
    """
    stages = summary.stages.in_order()
    config = folder / "config.yaml"
    blocks = len({record.block for record in records})
    title = f"{formats.method_name(summary.method)}: {100 * summary.sparsity:g} % {summary.pattern}"
    page = render(
        "page.html.jinja",
        width="61rem",
        title=title,
        lead=f"{len(records)} linear layers in {blocks} decoder block{'s'[: blocks != 1]}, pruned in one shot.",
        headline=headline(summary, records),
        stages=list(stages),
        measures=stage_rows(stages),
        pictures=[picture(path, name, CAPTIONS.get(name, "")) for name, path in figures.items()],
        worst=sorted(records, key=lambda record: -record.relative_error)[:LISTED_LAYERS],
        slowest=sorted(records, key=lambda record: -record.seconds)[:LISTED_LAYERS],
        cost=cost(summary),
        environment=environment,
        settings=formats.flatten(settings),
        command=command,
        config=config.read_text() if config.exists() else "",
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def headline(summary: Summary, records: list[LayerRecord]) -> list[Tile]:
    """Say the result in a few numbers."""
    stages = summary.stages.in_order()
    zeros = sum(record.zeros for record in records)
    tiles = [Tile("zeros, counted", f"{100 * summary.measured_sparsity:.4f} %", f"{zeros:,} weights")]
    for text in stages.texts:
        values = {name: stage.perplexity[text] for name, stage in stages.items() if text in stage.perplexity}
        tiles.append(Tile(f"perplexity, {text}", " → ".join(map(formats.perplexity, values.values())), _ratio(values)))
    means = {name: mean for name, stage in stages.items() if (mean := stage.mean_accuracy) is not None}
    if means:
        course = " → ".join(f"{100 * mean:.1f}" for mean in means.values())
        tiles.append(Tile("mean accuracy of the tasks", f"{course} %", " → ".join(means)))
    if records:
        errors = [record.relative_error for record in records]
        tiles.append(
            Tile(
                "mean relative error of the layers",
                formats.error(fmean(errors)),
                f"greatest {formats.error(max(errors))}",
            )
        )
    if summary.divergence:
        before, after = (f"{nats:.3f}" for nats in summary.divergence)
        tiles.append(
            Tile(
                "divergence from the dense model's predictions",
                f"{before} → {after}",
                "nats a token, before and after factors were learnt",
            )
        )
    return tiles


def _ratio(perplexities: dict[str, float]) -> str:
    """Name the stages of a course, and by which factor the last perplexity is that of the first."""
    names, values = list(perplexities), list(perplexities.values())
    arrow = " → ".join(names)
    if len(values) < 2 or not all(map(isfinite, values)) or values[0] <= 0:
        return arrow
    return f"{arrow}: × {values[-1] / values[0]:.3g}"


def cost(summary: Summary) -> dict[str, str]:
    """Write the wall-clock time per phase, their sum, and the highest memory."""
    rows = {name: formats.duration(seconds) for name, seconds in summary.seconds_in_order.items()}
    if len(rows) > 1:
        rows["sum"] = formats.duration(sum(summary.seconds.values()))
    if summary.peak_memory_bytes:
        rows["highest memory"] = formats.memory(summary.peak_memory_bytes)
    if summary.pruning_memory_bytes:
        rows["while pruning"] = formats.memory(summary.pruning_memory_bytes)
    return rows
