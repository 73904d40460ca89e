"""Several runs side by side: methods, sparsities, patterns and seeds.

Runs that differ in nothing but their seeds become one row, a mean with a standard deviation. Runs that differ in
anything else that `config.yaml` knows stay apart, and the row says in what.
"""

import json
from collections.abc import Callable
from math import isnan
from pathlib import Path
from typing import Any

from ...models.durable import write_text
from ...records import STAGE_ORDER, StageResult
from ..html import picture
from .figure import draw_rows
from .runs import Run
from .table import Comparison, Row

FIGURE_CAPTION = (
    "Perplexity of the pruned models against the sparsity asked for; bars are standard deviations over seeds, N:M "
    "patterns stand a little to the left of theirs, and the dashed grey line is the dense model."
)


def write_comparison(folder: str | Path, table: Comparison) -> Path:
    """Write `report.md`, `report.csv`, `report.html` and, where perplexity was measured, `perplexity.png`.

    Args:
        folder: Where to; made if it does not exist.
        table: Runs side by side; see `comparison`.

    Returns:
        The path of `report.html`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = draw_rows(folder / "perplexity.png", table.rows)
    figure = None if drawn is None else picture(drawn, "Perplexity against sparsity", FIGURE_CAPTION)
    write_text(folder / "report.md", table.markdown())
    write_text(folder / "report.csv", table.csv())
    page = folder / "report.html"
    write_text(page, table.html(figure))
    return page


def comparison(runs: list[Run]) -> Comparison:
    """Put runs side by side: one row per setting, and one per dense model.

    Args:
        runs: Finished runs; see `read_run`.

    Raises:
        ValueError: There are no runs.
    """
    if not runs:
        raise ValueError("`runs` must hold at least one run, but found none: name the folders of finished runs")
    rows = _dense_rows(runs) + sorted(_pruned_rows(runs), key=lambda row: (_pattern_order(row.pattern), row.sparsity))
    _mark_best(rows)
    return Comparison(rows)


def _dense_rows(runs: list[Run]) -> list[Row]:
    differing = _differing([run.measurement_settings for run in runs])
    rows = []
    for members in _grouped(runs, lambda run: run.measurement_settings):
        # Runs of one dense model measure the same thing again: equal measurements count once.
        distinct = {json.dumps(values): values for run in members if (values := _values(run, "dense"))}
        if distinct:
            label, group = _label(members[0].measurement_settings, differing), _key(members[0].measurement_settings)
            names = [run.folder.name for run in members]
            rows.append(Row("dense", "", 0.0, label, names, group).add(list(distinct.values())))
    return rows


def _pruned_rows(runs: list[Run]) -> list[Row]:
    elsewhere = _differing([run.measurement_settings for run in runs])
    rows = []
    for alike in _grouped(runs, _setting):
        differing = elsewhere | _differing([run.distinctions for run in alike])
        for members in _grouped(alike, lambda run: run.distinctions):
            first = members[0]
            label, group = _label(first.distinctions, differing), _key(first.measurement_settings)
            names = [run.folder.name for run in members]
            rows.append(Row(*_setting(first), label, names, group).add(_distinct(members)))
    return rows


def _distinct(runs: list[Run]) -> list[dict[str, float]]:
    """List the runs' values; a run done again with the same seeds and the same result is no further evidence."""
    found: dict[tuple[tuple[str, ...], str], dict[str, float]] = {}
    for run in runs:
        values = _values(run, "pruned")
        results = {name: value for name, value in values.items() if name != "solve_seconds"}
        found.setdefault((run.seeds, json.dumps(results)), values)
    return list(found.values())


def _setting(run: Run) -> tuple[str, str, float]:
    """Give what has columns of its own: method, pattern and sparsity."""
    return run.summary.method, run.summary.pattern, run.summary.sparsity


def _values(run: Run, stage: str) -> dict[str, float]:
    """Collect the numbers of a row by their columns' keys; what was not measured is absent."""
    summary = run.summary
    results = {name: summary.stages.get(name, StageResult()) for name in STAGE_ORDER}
    # A pruned row shows the perplexities of all its run's stages, a dense row its own.
    values: dict[str, float | None] = {
        f"perplexity/{text}/{name}": value
        for name, result in results.items()
        if stage in ("pruned", name)
        for text, value in result.perplexity.items()
    }
    values |= {
        f"metric/{metric}/{name}": value
        for name, result in results.items()
        if stage in ("pruned", name)
        for metric, value in result.metrics.items()
    }
    values |= {f"accuracy/{task}": results[stage].score(task, "acc")[0] for task in results[stage].tasks}
    values["mean_accuracy"] = results[stage].mean_accuracy
    if stage == "pruned":
        values["mean_accuracy/finetuned"] = results["finetuned"].mean_accuracy
        values["measured_sparsity"] = summary.measured_sparsity
        values["mean_relative_error"] = run.mean_relative_error
        values["solve_seconds"] = summary.seconds.get("solve")
    return {name: value for name, value in values.items() if value is not None}


def _mark_best(rows: list[Row]) -> None:
    """Mark the best means among rows of the same pattern, sparsity and dense model, where there are several."""
    groups = _grouped(
        [row for row in rows if row.method != "dense"], lambda row: (row.pattern, row.sparsity, row.group)
    )
    for members in groups:
        for column in dict.fromkeys(key for row in members for key in row.values):
            better = Comparison.better(column)
            having = [row for row in members if column in row.values and not isnan(row.mean(column))]
            # Bold marks a difference: where all means are equal, or there is one row alone, none is marked.
            if better is None or len({row.mean(column) for row in having}) < 2:
                continue
            best = better(row.mean(column) for row in having)
            for row in having:
                if row.mean(column) == best:
                    row.best.add(column)


def _pattern_order(pattern: str) -> tuple[int, str]:
    """Sort unstructured before by row, and N:M patterns last, by their names."""
    return {"unstructured": 0, "row": 1}.get(pattern, 2), pattern


def _key(settings: dict[str, str]) -> tuple[tuple[str, str], ...]:
    """Make settings hashable, whatever their order."""
    return tuple(sorted(settings.items()))


def _grouped(items: list[Any], key: Callable[[Any], Any]) -> list[list[Any]]:
    """Put items with equal keys together, in the order in which they first appear."""
    groups: dict[Any, list[Any]] = {}
    for item in items:
        found = key(item)
        groups.setdefault(_key(found) if isinstance(found, dict) else found, []).append(item)
    return list(groups.values())


def _differing(settings: list[dict[str, str]]) -> set[str]:
    """Find the names whose values differ among those settings that have them."""
    names = {name for one in settings for name in one}
    return {name for name in names if len({one[name] for one in settings if name in one}) > 1}


def _label(settings: dict[str, str], differing: set[str]) -> str:
    """Write the differing settings of a row, by the last two parts of their names, and of paths the last two parts."""
    return ", ".join(
        f"{'.'.join(name.split('.')[-2:])}={'/'.join(value.split('/')[-2:])}"
        for name, value in settings.items()
        if name in differing
    )
