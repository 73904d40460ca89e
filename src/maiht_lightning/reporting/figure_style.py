"""What the figures share: size, colours, and axes without clutter. matplotlib's objects only, no pyplot."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..models.durable import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
WIDTH = 9.0
# Okabe and Ito's palette can be told apart with any colour vision. Yellow is left out: it is too light for lines.
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
INK, FAINT = "#333333", "#DDDDDD"


def blank_figure(width: float, height: float) -> "Figure":
    """Make a white figure of a size in inches, which lays itself out."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")


def save_png(figure: "Figure", path: Path) -> Path:
    """Write a figure and return its path."""
    with replacing(path) as partial:
        figure.savefig(partial, format="png")
    return path


def tidy(axes: "Axes", *, grid: str = "y", **labels: str) -> None:
    """Take away what carries nothing; set `title`, `xlabel` and `ylabel`."""
    axes.set(**{key: text for key, text in labels.items() if key != "title"})
    axes.set_title(labels.get("title", ""), loc="left", fontsize=11, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(colors=INK, labelsize=9)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(color=INK, fontsize=9.5)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, color=FAINT, linewidth=0.7)  # type: ignore[arg-type]
