"""A W&B Report of several runs: the comparison's table, and panels of the runs that W&B has of them.

The panels show what `loggers.py` logs. Building the blocks needs no service; `publish` does.
"""

from types import ModuleType
from typing import Any

from ...records import Stages
from .runs import Run
from .table import Comparison

TITLE = "Pruning runs compared"


def publish(runs: list[Run], table: Comparison, entity: str, project: str | None) -> str:
    """Make a W&B Report of runs and return its address.

    Args:
        runs: Finished runs; see `read_run`. Offline ones must have been sent with `wandb sync` for the panels.
        table: These runs side by side.
        entity: W&B user or team.
        project: W&B project, the one that the runs are in; None for the one that their configurations name.

    Raises:
        ModuleNotFoundError: The package `wandb-workspaces` is not installed.
        ValueError: The runs' configurations name several projects.
    """
    project = project or project_of(runs)
    blocks = report_blocks(runs, table, entity, project)
    report = _reports().Report(entity=entity, project=project, title=TITLE, blocks=blocks, width="fluid")
    report.save()
    return str(report.url)


def report_blocks(runs: list[Run], table: Comparison, entity: str = "", project: str = "") -> list[Any]:
    """Build the report's blocks: the table, perplexity against sparsity, and the layers' errors over the blocks.

    Args:
        runs: Finished runs.
        table: These runs side by side.
        entity: W&B user or team of the panels' runs.
        project: W&B project of the panels' runs.

    Raises:
        ModuleNotFoundError: The package `wandb-workspaces` is not installed.
    """
    reports = _reports()
    texts = Stages({str(run.folder): run.summary.stages["pruned"] for run in runs}).texts
    panels: list[Any] = [
        reports.ScatterPlot(
            title=f"Perplexity, {text}",
            x=reports.SummaryMetric("sparsity"),
            y=reports.SummaryMetric(f"pruned/perplexity/{text}"),
            log_y=True,
        )
        for text in texts
    ]
    errors = reports.LinePlot(
        title="Relative error by block",
        x="prune/block",
        y=["prune/relative_error"],
        title_x="decoder block",
        title_y="mean relative error of the block's layers",
        log_y=True,
    )
    seconds = reports.LinePlot(
        title="Solver time by block", x="prune/block", y=["prune/seconds"], title_x="decoder block", title_y="seconds"
    )
    runset = reports.Runset(entity=entity, project=project, name="Pruning runs", filters=_only(runs))
    return [
        reports.H1(text="Comparison"),
        reports.MarkdownBlock(text=table.markdown()),
        reports.H1(text="Runs"),
        reports.PanelGrid(runsets=[runset], panels=[*panels, errors, seconds]),
    ]


def project_of(runs: list[Run]) -> str:
    """Find the W&B project that runs are in.

    Raises:
        ValueError: They are in several.
    """
    # Where nothing else is named, Lightning's logger takes this one.
    named = {run.wandb_project or "lightning_logs" for run in runs}
    if len(named) > 1:
        raise ValueError(
            f"a W&B Report is in one project, but the runs are in {', '.join(sorted(named))}: name one of "
            f"them with --project, whose runs its panels will show"
        )
    return named.pop()


def _only(runs: list[Run]) -> str:
    """Write a filter for these runs by the identifiers in their folders; empty, for all runs, where one has none."""
    # W&B's folders are named `run-DATE-ID` or `offline-run-DATE-ID`, one for each time that the run was started.
    found = [{path.name.rpartition("-")[2] for path in run.folder.glob("wandb/*run-*-*")} for run in runs]
    return f"Metric('ID') in {sorted(set().union(*found))}" if found and all(found) else ""


def _reports() -> ModuleType:
    try:
        import wandb_workspaces.reports.v2 as reports
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "W&B Reports need the package wandb-workspaces: pip install 'maiht-lightning[wandb]'"
        ) from error
    return reports
