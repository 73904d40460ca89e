"""A comparison as a table: Markdown, CSV and HTML from the same rows."""

import csv
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import isfinite, nan
from statistics import fmean, stdev

from ...records import STAGE_ORDER
from .. import formats
from ..html import Picture, render

BEST_NOTE = "best of the rows with the same pattern, sparsity and dense model"


@dataclass
class Row:
    """Runs that differ in nothing but their seeds.

    Args:
        method: Pruning method, or `dense`.
        pattern: Sparsity pattern; empty for a dense row.
        sparsity: Fraction of zeros asked for.
        settings: In what else it differs from other rows.
        runs: Names of the runs' folders.
        group: What the dense model and its measurement depend on.
        values: By column, the value of each run that has one.
        best: Columns in which this row has the best mean.
        n: Distinct runs, or distinct measurements of a dense model.
    """

    method: str
    pattern: str
    sparsity: float
    settings: str
    runs: list[str]
    group: tuple[tuple[str, str], ...] = ()
    values: dict[str, list[float]] = field(default_factory=dict)
    best: set[str] = field(default_factory=set)
    n: int = 0

    def add(self, measured: list[dict[str, float]]) -> "Row":
        """Add the values of each run."""
        for values in measured:
            self.n += 1
            for column, value in values.items():
                self.values.setdefault(column, []).append(value)
        return self

    def mean(self, column: str) -> float:
        """Average over the runs; NaN where none has the column."""
        return fmean(self.values[column]) if column in self.values else nan

    def deviation(self, column: str) -> float:
        """Compute the sample standard deviation; NaN where fewer than two runs have the column, or one is infinite."""
        values = self.values.get(column, [])
        return stdev(values) if len(values) > 1 and all(map(isfinite, values)) else nan


@dataclass
class Comparison:
    """Runs side by side.

    Args:
        rows: Dense models first, then what was pruned, by pattern and sparsity.
    """

    rows: list[Row]

    @property
    def columns(self) -> list[str]:
        """Keys of the measured columns, in the order in which to show them."""
        found = dict.fromkeys(key for row in self.rows for key in row.values)
        texts = dict.fromkeys(key.split("/", 1)[1].rpartition("/")[0] for key in found if key.startswith("perplexity/"))
        stages = [f"perplexity/{text}/{stage}" for text in texts for stage in STAGE_ORDER]
        tasks = [key for key in found if key.startswith("accuracy/")]
        own = dict.fromkeys(key.split("/", 1)[1].rpartition("/")[0] for key in found if key.startswith("metric/"))
        tasks += [f"metric/{metric}/{stage}" for metric in own for stage in STAGE_ORDER]
        rest = ["mean_accuracy", "mean_accuracy/finetuned", "mean_relative_error", "solve_seconds"]
        return [key for key in ["measured_sparsity", *stages, *tasks, *rest] if key in found]

    @staticmethod
    def better(column: str) -> Callable[[Iterable[float]], float] | None:
        """Say whether `min` or `max` is better; None where neither is, or where it depends on the machine."""
        if column.startswith("perplexity/"):
            return None if column.endswith("/dense") else min
        if column.startswith(("accuracy/", "mean_accuracy")):
            return max
        return min if column == "mean_relative_error" else None

    @staticmethod
    def heading(column: str) -> str:
        """Write what stands above a column."""
        kind, _, rest = column.partition("/")
        text, _, stage = rest.rpartition("/")
        return {
            "measured_sparsity": "zeros counted, %",
            "perplexity": f"{text} perplexity, {stage}",
            "accuracy": f"{rest} acc, %",
            "metric": f"{text}, {stage}",
            "mean_accuracy": f"mean acc, {rest}, %" if rest else "mean acc, %",
            "mean_relative_error": "mean relative error",
            "solve_seconds": "solver, s",
        }[kind]

    @staticmethod
    def cell(row: Row, column: str) -> str:
        """Write the mean, with the standard deviation where there are several runs; empty where there is no value."""
        if column not in row.values:
            return ""
        kind = column.partition("/")[0]
        form: Callable[[float], str] = {
            "perplexity": formats.perplexity,
            "metric": formats.number,
            "mean_relative_error": formats.error,
            "solve_seconds": "{:.1f}".format,
        }.get(kind, formats.percent)
        deviation = row.deviation(column)
        # A value that is the same in all runs, as the zeros are and most often the dense model, needs no deviation.
        if not isfinite(deviation) or deviation == 0:
            return form(row.mean(column))
        return f"{form(row.mean(column))} ± {f'{deviation:.2g}' if form is formats.error else form(deviation)}"

    def labels(self, row: Row) -> list[str]:
        """Write the cells that say what a row is, below `label_headings`."""
        asked = "" if row.method == "dense" else f"{100 * row.sparsity:g}"
        labels = [formats.method_name(row.method), row.pattern, asked]
        return labels + ([row.settings] if self._has_settings else []) + ([str(row.n)] if self._has_seeds else [])

    @property
    def label_headings(self) -> list[str]:
        """Headings of the columns that say what a row is; settings and numbers of runs only where there are any."""
        headings = ["method", "pattern", "sparsity, %"]
        return headings + (["other settings"] if self._has_settings else []) + (["n"] if self._has_seeds else [])

    @property
    def _has_settings(self) -> bool:
        return any(row.settings for row in self.rows)

    @property
    def _has_seeds(self) -> bool:
        return any(row.n > 1 for row in self.rows)

    def notes(self) -> str:
        """Say what the marks in the table mean."""
        seeds = " n: runs that differ in their seeds, as mean ± standard deviation." if self._has_seeds else ""
        several = any(row.best for row in self.rows)
        return ((f"Bold: {BEST_NOTE}." if several else "") + seeds).strip()

    def markdown(self) -> str:
        """Write a Markdown table; the best values are bold."""
        headings = self.label_headings + [self.heading(column) for column in self.columns]
        rules = ["---"] * len(self.label_headings) + ["---:"] * len(self.columns)
        lines = [_markdown_row(headings), _markdown_row(rules)]
        for row in self.rows:
            cells = [
                f"**{self.cell(row, column)}**" if column in row.best else self.cell(row, column)
                for column in self.columns
            ]
            lines.append(_markdown_row(self.labels(row) + cells))
        notes = self.notes()
        return "\n".join(lines) + "\n" + (f"\n{notes}\n" if notes else "")

    def csv(self) -> str:
        """Write bare numbers: for each measured column its mean and, in `COLUMN_sd`, the standard deviation."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        names = [name for column in self.columns for name in (column, f"{column}_sd")]
        writer.writerow(["method", "pattern", "sparsity", "settings", "n", *names, "runs"])
        for row in self.rows:
            numbers = [number for column in self.columns for number in _numbers(row, column)]
            writer.writerow([row.method, row.pattern, row.sparsity, row.settings, row.n, *numbers, " ".join(row.runs)])
        return file.getvalue()

    def html(self, figure: Picture | None = None) -> str:
        """Write a page that needs no other file; the best values are bold.

        Args:
            figure: A figure to show below the table.
        """
        count = sum(row.n for row in self.rows if row.method != "dense")
        return render(
            "comparison.html.jinja",
            width="90rem",
            title="Comparison of pruning runs",
            lead=f"{count} run{'s'[: count != 1]}.",
            comparison=self,
            figure=figure,
        )


def _numbers(row: Row, column: str) -> list[float | str]:
    """Give the mean and the standard deviation; empty where there is none."""
    deviation = row.deviation(column)
    return [row.mean(column) if column in row.values else "", deviation if isfinite(deviation) else ""]


def _markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
