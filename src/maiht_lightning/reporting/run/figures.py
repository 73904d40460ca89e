"""The figures of a run: PNG files drawn with matplotlib's objects, without pyplot and its global state."""

from collections.abc import Callable, Sequence
from math import ceil, isfinite, nan
from pathlib import Path
from typing import TYPE_CHECKING

from ...records import LayerRecord, Stages
from ..figure_style import BLUE, GREEN, INK, ORANGE, PURPLE, SKY, VERMILLION, WIDTH, blank_figure, save_png, tidy
from ..formats import error, perplexity
from ..summary import Summary
from .objective import objective_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STAGE_COLOURS = {"dense": "#7A7A7A", "pruned": BLUE, "finetuned": ORANGE}


def draw_figures(folder: Path, summary: Summary, records: list[LayerRecord]) -> dict[str, Path]:
    """Draw what there is to show of a run.

    Args:
        folder: Where the PNG files go; made if it does not exist.
        summary: The run's summary.
        records: One record per layer.

    Returns:
        Path by the figure's name: `stages`, `relative_error`, `objective` and `kept`. A figure is absent where
        the run has nothing for it, such as `objective` for methods that do not iterate.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawings: dict[str, Callable[[], Figure | None]] = {
        "stages": lambda: stages_figure(summary),
        "relative_error": lambda: relative_error_figure(records),
        "objective": lambda: objective_figure(records),
        "kept": lambda: kept_figure(records),
    }
    paths = {}
    for name, draw in drawings.items():
        if (figure := draw()) is not None:
            paths[name] = save_png(figure, folder / f"{name}.png")
    return paths


# ---- Relative error


def relative_error_figure(records: list[LayerRecord]) -> "Figure | None":
    """Draw a heat map of the relative errors, block by kind of layer; logarithmic where they span a decade."""
    if not records:
        return None
    import numpy as np
    from matplotlib.colors import LogNorm, Normalize

    blocks, kinds = sorted({record.block for record in records}), _kinds(records)
    table = np.full((len(kinds), blocks[-1] - blocks[0] + 1), nan)
    for record in records:
        table[kinds.index(record.layer), record.block - blocks[0]] = record.relative_error
    positive = [r.relative_error for r in records if r.relative_error > 0 and isfinite(r.relative_error)] or [1.0]
    low, high = min(positive), max(positive)
    logarithmic = high > 10 * low
    norm = LogNorm(low, high) if logarithmic else Normalize(0, high)
    # A layer without any error has no logarithm: it gets the lowest colour.
    shown = np.clip(table, low, high) if logarithmic else table

    columns = table.shape[1]
    figure = blank_figure(min(WIDTH, 4.2 + 0.55 * columns), 1.5 + 0.34 * len(kinds))
    axes = figure.add_subplot()
    mesh = axes.pcolormesh(
        np.arange(blocks[0], blocks[-1] + 2) - 0.5,
        np.arange(len(kinds) + 1) - 0.5,
        shown,
        norm=norm,
        cmap="viridis",
        edgecolors="white",
        linewidth=0.6 if columns <= 40 else 0.25,
    )
    tidy(axes, grid="", xlabel="decoder block", title="Relative error of each layer")
    axes.spines[:].set_visible(False)
    axes.set_facecolor("#F2F2F2")
    axes.set_yticks(range(len(kinds)), kinds)
    axes.tick_params(length=0)
    axes.invert_yaxis()
    _whole_numbers(axes)
    bar = figure.colorbar(mesh, ax=axes, pad=0.015)
    bar.set_label("relative error" + (" (log)" if logarithmic else ""), color=INK, fontsize=9)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=INK, labelsize=8)
    if columns <= 8:
        # Few enough cells to be read as a table.
        for (row, column), value in np.ndenumerate(table):
            axes.text(
                blocks[0] + column,
                row,
                "" if np.isnan(value) else error(value),
                ha="center",
                va="center",
                fontsize=8,
                color="white" if norm(shown[row, column]) < 0.6 else "black",
            )
    return figure


def _kinds(records: list[LayerRecord]) -> list[str]:
    """List the kinds of layers, such as `mlp.down_proj`, in the order in which they first appear."""
    return list(dict.fromkeys(record.layer for record in records))


def _whole_numbers(axes: "Axes") -> None:
    """Number the blocks along the axis, without fractions and without crowding."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True, min_n_ticks=1))


# ---- Stages


def stages_figure(summary: Summary) -> "Figure | None":
    """Draw the perplexities and the tasks' accuracies by stage; a panel is absent where nothing was measured."""
    stages = summary.stages.in_order()
    texts, tasks = stages.texts, stages.tasks
    if not texts and not tasks:
        return None
    height = max(3.2, 1.5 + 0.36 * (len(tasks) + 1)) if tasks else 3.2
    width = WIDTH if tasks and texts else 6.5 if tasks or len(texts) > 1 else 5.0
    figure = blank_figure(width, height)
    panels = figure.add_gridspec(1, bool(texts) + bool(tasks))
    if texts and tasks:
        panels.set_width_ratios([min(1.2, 0.75 + 0.2 * len(texts)), 1.2])
    if texts:
        _draw_perplexities(figure.add_subplot(panels[0]), stages)
    if tasks:
        _draw_tasks(figure.add_subplot(panels[-1]), stages)
    # One entry per stage, however many artists carry its name.
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=len(stages), frameon=False, fontsize=9.5
    )
    return figure


def _draw_perplexities(axes: "Axes", stages: Stages) -> None:
    """Draw bars, one group per text and one bar per stage. What is not finite is a hatched bar to the top."""
    texts = stages.texts
    values = [v for stage in stages.values() for v in stage.perplexity.values() if isfinite(v) and v > 0]
    low, high = (min(values), max(values)) if values else (1.0, 1.0)
    logarithmic = high > 10 * low
    bottom = low / 2 if logarithmic else 0.0
    top = high * (high / bottom) ** 0.12 if logarithmic else high * 1.15
    if logarithmic:
        axes.set_yscale("log")
    axes.set_ylim(bottom, top)
    width = 0.8 / len(stages)
    for number, (name, stage) in enumerate(stages.items()):
        colour = stage_colour(name, number)
        for group, text in enumerate(texts):
            if text not in stage.perplexity:
                continue
            value = stage.perplexity[text]
            place = group + (number - (len(stages) - 1) / 2) * width
            broken = not isfinite(value)
            drawn = top if broken else value
            bar = axes.bar(place, drawn - bottom, 0.9 * width, bottom=bottom, color=colour, label=name)
            if broken:
                bar.patches[0].set(hatch="///", alpha=0.45)
            axes.annotate(
                perplexity(value),
                (place, drawn),
                xytext=(0, -6 if broken else 3),
                textcoords="offset points",
                ha="center",
                va="top" if broken else "bottom",
                fontsize=9 if len(texts) * len(stages) <= 6 else 7.5,
                color=INK,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5} if broken else None,
            )
    axes.set_xticks(range(len(texts)), texts)
    axes.set_xlim(-0.6, len(texts) - 0.4)
    label = "perplexity" + (" (log)" if logarithmic else "")
    tidy(axes, ylabel=label, title="Perplexity (lower is better)")
    axes.tick_params(axis="x", length=0)


def _draw_tasks(axes: "Axes", stages: Stages) -> None:
    """Draw one row per task and one for the mean, one mark per stage, with the tasks' standard errors."""
    has_mean = any(stage.mean_accuracy is not None for stage in stages.values())
    rows = ["mean", *stages.tasks] if has_mean else stages.tasks
    for number, (name, stage) in enumerate(stages.items()):
        scores = {task: stage.score(task, "acc") for task in stage.tasks} | {"mean": (stage.mean_accuracy, None)}
        # Stages lie a little apart, so that close values hide neither each other nor their errors.
        shift = (number - (len(stages) - 1) / 2) * 0.2
        for row, task in enumerate(rows):
            value, deviation = scores.get(task, (None, None))
            if value is not None:
                axes.errorbar(
                    100 * value,
                    row + shift,
                    xerr=100 * (deviation or 0) or None,
                    fmt="D" if task == "mean" else "o",
                    markersize=7 if task == "mean" else 5.5,
                    color=stage_colour(name, number),
                    elinewidth=1.3,
                    label=name,
                )
    if has_mean:
        axes.axhline(0.5, color="#999999", linewidth=0.8)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    tidy(axes, grid="x", xlabel="accuracy, % (bars: standard error)", title="Zero-shot tasks (higher is better)")
    axes.tick_params(axis="y", length=0)


def stage_colour(name: str, number: int) -> str:
    """Choose a stage's colour; those without one of their own get one by their place."""
    return STAGE_COLOURS.get(name, (PURPLE, GREEN, SKY)[number % 3])


# ---- Weights kept


def kept_figure(records: list[LayerRecord]) -> "Figure | None":
    """Draw the fraction of the weights that were kept, by block and by kind of layer."""
    if not records:
        return None
    kinds = _kinds(records)
    blocks = sorted({record.block for record in records})
    figure = blank_figure(WIDTH, max(2.8, 1.3 + 0.27 * len(kinds)))
    by_block, by_kind = figure.subplots(1, 2, width_ratios=[1.5, 1])
    overall = kept_percent(records)

    values = [kept_percent([r for r in records if r.block == block]) for block in blocks]
    by_block.bar(blocks, values, width=0.82 if len(blocks) > 3 else 0.5, color=BLUE)
    by_block.axhline(overall, color=VERMILLION, linewidth=1.2, linestyle=(0, (4, 3)))
    by_block.set_ylim(0, _ceiling(values))
    margin = 0.7 if len(blocks) > 3 else 1.5
    by_block.set_xlim(blocks[0] - margin, blocks[-1] + margin)
    if len(blocks) > 3:
        _whole_numbers(by_block)
    else:
        by_block.set_xticks(blocks)
    tidy(by_block, xlabel="decoder block", ylabel="weights kept, %", title=f"Kept by block; all: {overall:.2f} %")

    values = [kept_percent([r for r in records if r.layer == kind]) for kind in kinds]
    bars = by_kind.barh(range(len(kinds)), values, height=0.7, color=BLUE)
    by_kind.bar_label(bars, fmt="%.1f", padding=3, fontsize=8, color=INK)
    by_kind.set_yticks(range(len(kinds)), kinds)
    by_kind.invert_yaxis()
    by_kind.set_xlim(0, _ceiling(values))
    tidy(by_kind, grid="x", xlabel="weights kept, %", title="Kept by kind of layer")
    by_kind.tick_params(axis="y", length=0)
    return figure


def kept_percent(records: Sequence[LayerRecord]) -> float:
    """Compute the percentage of these layers' weights that are not zero."""
    total = sum(record.shape[0] * record.shape[1] for record in records)
    return 100 * (1 - sum(record.zeros for record in records) / total)


def _ceiling(values: list[float]) -> float:
    """Find the next round percentage with room for a label, at most a little above 100."""
    return min(10 * ceil(max(values) * 1.12 / 10) or 10, 112)
