"""The figure of a comparison: perplexity against sparsity."""

from math import isfinite, nan
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from ..figure_style import BLUE, GREEN, INK, ORANGE, PURPLE, SKY, VERMILLION, WIDTH, blank_figure, save_png, tidy
from ..formats import method_name, perplexity
from .table import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

PALETTE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, "#000000")
GREY = "#7A7A7A"
# Where perplexities span more than `SPAN` times the lowest, those above `FRAME` times it are left beyond the frame.
SPAN, FRAME = 100.0, 20.0
LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 9, "title_fontsize": 9}


def draw_rows(path: Path, rows: list[Row]) -> Path | None:
    """Draw perplexity against sparsity: one panel per text, one colour per method, one mark per pattern.

    Returns:
        `path`, or None where no perplexity was measured; nothing is written then.
    """
    pruned = [row for row in rows if row.method != "dense"]
    columns = dict.fromkeys(key for row in pruned for key in row.values)
    texts = [
        key.removesuffix("/pruned") for key in columns if key.startswith("perplexity/") and key.endswith("/pruned")
    ]
    if not texts:
        return None
    methods = list(dict.fromkeys(_method(row) for row in pruned))
    colours = {method: PALETTE[i % len(PALETTE)] for i, method in enumerate(methods)}
    styles = _pattern_styles([row.pattern for row in pruned])
    dense = [row for row in rows if row.method == "dense"]
    legend = _methods_legend(colours, dense)
    # Names with settings are long: such labels stand one below the other.
    columns_of_legend = min(4, len(legend)) if max(len(str(line.get_label())) for line in legend) < 30 else 1
    lines = sum(1 + str(line.get_label()).count("\n") for line in legend) / columns_of_legend
    figure = blank_figure(max(6.5, min(WIDTH, 4.5 * len(texts))), 3.6 + 0.22 * (lines + 1))
    panels = figure.subplots(1, len(texts), squeeze=False)[0]
    for axes, text in zip(panels, texts, strict=True):
        _draw_text(axes, text, pruned, colours, styles)
        _draw_dense(axes, text, dense)
        _leave_out_the_highest(axes, text, rows)
        _label_decades(axes)
        tidy(axes, xlabel="sparsity, %", ylabel="perplexity (log)", title=text.removeprefix("perplexity/"))
    figure.legend(handles=legend, loc="outside lower center", ncols=columns_of_legend, **LEGEND)
    if len(styles) > 1:
        figure.legend(handles=_patterns_legend(styles), loc="outside right center", title="pattern", **LEGEND)
    return save_png(figure, path)


def _method(row: Row) -> str:
    """Name what shares a colour: a method, with the settings in which its rows differ."""
    return f"{method_name(row.method)}, {row.settings}" if row.settings else method_name(row.method)


def _pattern_styles(patterns: list[str]) -> dict[str, dict[str, Any]]:
    """Choose mark and line of each pattern. N:M fixes the sparsity: no line joins its marks."""
    styles: dict[str, dict[str, Any]] = {}
    for pattern in dict.fromkeys(patterns):
        if pattern == "unstructured":
            styles[pattern] = {"marker": "o", "markersize": 6, "linestyle": "-"}
        elif pattern == "row":
            styles[pattern] = {"marker": "s", "markersize": 5.5, "linestyle": (0, (4, 2))}
        else:
            number = sum(":" in known for known in styles)
            styles[pattern] = {"marker": "*PDXv^"[number % 6], "markersize": 8, "linestyle": "none"}
    return styles


def _draw_text(
    axes: "Axes", text: str, rows: list[Row], colours: dict[str, str], styles: dict[str, dict[str, Any]]
) -> None:
    """Draw the pruned models' perplexities of one text: one line or set of marks per method and pattern."""
    column = f"{text}/pruned"
    rows = [row for row in rows if column in row.values]
    sparsities = [100 * row.sparsity for row in rows]
    step = 0.03 * (max(sparsities) - min(sparsities) or 10)
    grouped = [pattern for pattern in styles if ":" in pattern]
    # Marks of N:M patterns would lie on those of unstructured models of the same sparsity: they stand to the left.
    shifts = {pattern: -step * (grouped.index(pattern) + 1) if pattern in grouped else 0.0 for pattern in styles}
    axes.set_yscale("log")
    for method, colour in colours.items():
        for pattern, style in styles.items():
            members = [row for row in rows if _method(row) == method and row.pattern == pattern]
            finite = [row for row in members if isfinite(row.mean(column))]
            points = [(100 * row.sparsity, row.mean(column), row.deviation(column)) for row in finite]
            if finite:
                known = {place for place, *_ in points}
                # Between its places where others were measured and this was not, a line has a gap.
                between = {place for place in sparsities if min(known) < place < max(known)}
                points = sorted([*points, *((place, nan, nan) for place in between - known)])
                axes.errorbar(
                    [place + shifts[pattern] for place, *_ in points],
                    [value for _, value, _ in points],
                    yerr=[deviation if isfinite(deviation) else 0 for *_, deviation in points],
                    color=colour,
                    linewidth=1.6,
                    capsize=3,
                    label=f"{method}, {pattern}",
                    **style,
                )
            # A value that is not finite has no place on the axis: its mark stands above the axes.
            for row in members:
                if row not in finite:
                    axes.annotate(
                        "∞",
                        (100 * row.sparsity + shifts[pattern], 1),
                        xycoords=("data", "axes fraction"),
                        ha="center",
                        va="bottom",
                        color=colour,
                    )
    places = [100 * row.sparsity + shifts[row.pattern] for row in rows]
    axes.set_xlim(min(places) - 2 * step, max(places) + 2 * step)
    if len(set(sparsities)) <= 8:
        axes.set_xticks(sorted(set(sparsities)))
        axes.xaxis.set_major_formatter("{x:g}")


def _draw_dense(axes: "Axes", text: str, rows: list[Row]) -> None:
    """Draw a dashed line at the perplexity of each dense model, with its number."""
    for row, style in zip(rows, _dense_styles(rows).values(), strict=True):
        value = row.mean(f"{text}/dense")
        if isfinite(value):
            axes.axhline(value, label=_method(row), **style)
            axes.annotate(
                perplexity(value),
                (1, value),
                xycoords=("axes fraction", "data"),
                xytext=(-2, 3),
                textcoords="offset points",
                ha="right",
                va="bottom",
                fontsize=8.5,
                color=INK,
            )


def _leave_out_the_highest(axes: "Axes", text: str, rows: list[Row]) -> None:
    """End the axis where few hopeless models would squeeze all others together, and say whose are beyond it."""
    values = [
        (value, row) for row in rows for stage in ("dense", "pruned") if isfinite(value := row.mean(f"{text}/{stage}"))
    ]
    lowest = min((value for value, _ in values), default=1.0)
    if all(value <= SPAN * lowest for value, _ in values):
        return
    axes.set_ylim(0.8 * lowest, FRAME * lowest)
    beyond = dict.fromkeys(_method(row) for value, row in values if value > FRAME * lowest)
    note = fill(f"higher, beyond this axis: {', '.join(beyond)}", 50)
    axes.set_title(note, loc="right", fontsize=8.5, color=INK)


def _label_decades(axes: "Axes") -> None:
    """Label a logarithmic axis with plain numbers, closer where it spans few decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_ylim()
    if high < 1000 * low:
        # Over fewer than three decades, powers of ten alone would be a label or two.
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if high < 10 * low else (1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _dense_styles(rows: list[Row]) -> dict[str, dict[str, Any]]:
    """Choose the line of each dense model; those of several differ in their dashes."""
    return {
        _method(row): {"color": GREY, "linewidth": 1.2, "linestyle": (0, (2 + 3 * number, 2))}
        for number, row in enumerate(rows, start=1)
    }


def _methods_legend(colours: dict[str, str], dense: list[Row]) -> "list[Line2D]":
    from matplotlib.lines import Line2D

    styles = {method: {"color": colour, "linewidth": 4} for method, colour in colours.items()} | _dense_styles(dense)
    return [Line2D([], [], label=fill(name, 90), **style) for name, style in styles.items()]


def _patterns_legend(styles: dict[str, dict[str, Any]]) -> "list[Line2D]":
    from matplotlib.lines import Line2D

    return [Line2D([], [], color=INK, label=pattern, **style) for pattern, style in styles.items()]
