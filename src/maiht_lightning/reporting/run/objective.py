"""The figure of the objective's course, with the monitor's choices and the refining."""

from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

from ...records import LayerRecord
from ..figure_style import BLUE, GREEN, ORANGE, SKY, VERMILLION, WIDTH, blank_figure, tidy
from ..formats import error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


ABOVE_LAST = "objective above its last value, %"


class Course(NamedTuple):
    """A layer whose objective is drawn, what it stands for, and its colour."""

    name: str
    record: LayerRecord
    colour: str

    @property
    def exact(self) -> int:
        """Index of the first value on the exact support: the one after the monitor's last choice."""
        return len(self.record.accelerated)


def objective_figure(records: list[LayerRecord]) -> "Figure | None":
    """Draw the course of the objective in the layers with the least, the median and the greatest relative error.

    Every course is divided by its last value, so that layers of any size share an axis: on a logarithmic one where it
    more than doubles or halves. Below are the monitor's choices. Beside them is the refining, which the logarithm would
    hide; where there is no monitor the records do not tell where it begins, and it is left out.
    """
    courses = _choose(records)
    if not courses:
        return None
    monitored = all(0 < course.exact < len(course.record.objective) for course in courses)
    logarithmic = any(max(course.record.objective) > 2 * min(course.record.objective) for course in courses)
    refined = monitored and logarithmic and all(course.exact + 1 < len(course.record.objective) for course in courses)

    figure = blank_figure(WIDTH, 4.4 if monitored else 3.6)
    grid = figure.add_gridspec(1 + monitored, 1 + refined)
    if monitored:
        grid.set_height_ratios([1, 0.1 * len(courses)])
    if refined:
        grid.set_width_ratios([1.65, 1])
    whole = figure.add_subplot(grid[0, 0])
    _draw_whole(whole, courses, monitored, logarithmic)
    if monitored:
        whole.tick_params(labelbottom=False)
        _draw_choices(figure.add_subplot(grid[1, 0], sharex=whole), courses)
    if refined:
        _draw_refining(figure.add_subplot(grid[:, 1]), courses)
    return figure


def _choose(records: list[LayerRecord]) -> list[Course]:
    """Choose up to three layers; a course that ends at 0, where nothing was lost, has no logarithm and is left out."""
    usable = [r for r in records if len(r.objective) > 1 and r.objective[-1] > 0 and all(map(isfinite, r.objective))]
    usable.sort(key=lambda record: record.relative_error)
    if len(usable) > 2:
        usable = [usable[0], usable[(len(usable) - 1) // 2], usable[-1]]
    names = {0: (), 1: ("layer",), 2: ("least", "greatest"), 3: ("least", "median", "greatest")}[len(usable)]
    colours = {"least": GREEN, "median": BLUE, "layer": BLUE, "greatest": VERMILLION}
    return [Course(name, record, colours[name]) for name, record in zip(names, usable, strict=True)]


def _over_last(course: Course) -> list[float]:
    objective = course.record.objective
    return [value / objective[-1] for value in objective]


def _above_last(course: Course) -> list[float]:
    return [100 * (value - 1) for value in _over_last(course)]


def _draw_whole(axes: "Axes", courses: list[Course], monitored: bool, logarithmic: bool) -> None:
    for course in courses:
        record = course.record
        values = _over_last(course) if logarithmic else _above_last(course)
        label = f"{course.name} ({error(record.relative_error)}): block {record.block} {record.layer}"
        axes.plot(range(1, len(values) + 1), values, color=course.colour, linewidth=1.8, label=label)
        if monitored:
            _mark_exact(axes, course, values)
    if logarithmic:
        axes.set_yscale("log")
    axes.set_xlim(0, max(len(course.record.objective) for course in courses) + 1)
    tidy(
        axes,
        xlabel="" if monitored else "iteration",
        ylabel="objective / its last value (log)" if logarithmic else ABOVE_LAST,
        title="Objective while weights are removed" + (", ◆ exact support" if monitored else ""),
    )
    legend = axes.legend(title="relative error", fontsize=8, title_fontsize=8)
    legend.set_loc("lower right" if logarithmic else "upper right")
    legend.set_alignment("left")


def _draw_refining(axes: "Axes", courses: list[Course]) -> None:
    """Draw the last part of the courses, from the exact support on, in percent above their ends."""
    for course in courses:
        values, first = _above_last(course), course.exact
        axes.plot(range(first + 1, len(values) + 1), values[first:], color=course.colour, linewidth=1.8)
        _mark_exact(axes, course, values)
    axes.margins(x=0.03)
    tidy(axes, xlabel="iteration", ylabel=ABOVE_LAST, title="Refining on the exact support")


def _mark_exact(axes: "Axes", course: Course, values: list[float]) -> None:
    """Mark where the exact support is taken."""
    axes.plot([course.exact + 1], [values[course.exact]], "D", color=course.colour, markersize=5, zorder=3)
    axes.axvline(course.exact + 1, color="#888888", linewidth=0.9, linestyle=(0, (4, 3)), zorder=0.5)


def _draw_choices(axes: "Axes", courses: list[Course]) -> None:
    """Draw one strip per layer: which candidate the monitor took at each iteration."""
    from matplotlib.patches import Patch

    colours = _choice_colours()
    for row, course in enumerate(courses):
        # Iterations count from 1, as in the curves above: a cell is centred on its iteration's number.
        axes.pcolormesh(
            [i + 0.5 for i in range(course.exact + 1)],
            [row - 0.4, row + 0.4],
            [course.record.accelerated],
            cmap=colours,
            vmin=0,
            vmax=1,
            edgecolors="white",
            linewidth=0.4,
        )
    tidy(axes, grid="", xlabel="iteration")
    axes.set_yticks(range(len(courses)), [course.name for course in courses])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.invert_yaxis()
    axes.legend(
        handles=[
            Patch(color=colours(1.0), label="the monitor took the accelerated step"),
            Patch(color=colours(0.0), label="the plain step"),
        ],
        loc="lower left",
        bbox_to_anchor=(-0.01, 0.98),
        ncols=2,
        frameon=False,
        fontsize=8,
        handlelength=1,
        borderpad=0.2,
    )


def _choice_colours() -> Any:
    """Map 0, the plain step, to orange and 1, the accelerated one, to light blue; rows that disagree lie between."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("choices", [ORANGE, "#F3EFE4", SKY])
