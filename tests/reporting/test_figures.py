"""The figures hold the records' numbers; PNG files appear for what there is to show, and only for that."""

import subprocess
import sys

import matplotlib.colors
import numpy as np
import pytest

from maiht_lightning.records import LayerRecord, StageResult, Stages
from maiht_lightning.reporting.run.figures import draw_figures, kept_figure, relative_error_figure, stages_figure
from maiht_lightning.reporting.run.objective import objective_figure
from maiht_lightning.reporting.summary import Summary

KINDS = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")


def record(block, kind, error, **fields):
    return LayerRecord(f"model.layers.{block}.{kind}", block, (4, 8), fields.pop("zeros", 16), error, **fields)


@pytest.fixture
def records():
    """Two blocks of three kinds; errors from 0.001 to 0.032, twice as much each time."""
    return [record(i // 3, KINDS[i % 3], 0.001 * 2**i) for i in range(6)]


def iterating(error, last=2.0, accelerated=(1.0, 0.0, 0.5)):
    return record(
        0,
        f"layer_{error}",
        error,
        objective=[last / 8, last / 4, last, 1.5 * last, 1.2 * last, last],
        accelerated=list(accelerated),
    )


def summary(**stages):
    found = Stages({name: StageResult.from_json(stage) for name, stage in stages.items()})
    return Summary("maiht", 0.5, "unstructured", 0.5, found)


# ---- Relative error


def test_the_heat_map_holds_the_records_errors(records):
    axes, bar = relative_error_figure(records).axes
    (mesh,) = axes.collections
    assert mesh.get_array().shape == (3, 2)
    for layer in records:
        row = KINDS.index(layer.name.split(".", 3)[-1])
        assert mesh.get_array()[row, layer.block] == layer.relative_error
    assert [label.get_text() for label in axes.get_yticklabels()] == list(KINDS)
    assert isinstance(mesh.norm, matplotlib.colors.LogNorm)
    assert (mesh.norm.vmin, mesh.norm.vmax) == (0.001, 0.032)
    assert bar.get_ylabel() == "relative error (log)"
    assert axes.get_xlabel() == "decoder block"
    # A map as small as this one is a table as well.
    assert {text.get_text() for text in axes.texts} == {"0.001", "0.002", "0.004", "0.008", "0.016", "0.032"}


def test_errors_within_a_decade_have_a_linear_scale(records):
    axes, bar = relative_error_figure(records[:3]).axes
    assert not isinstance(axes.collections[0].norm, matplotlib.colors.LogNorm)
    assert bar.get_ylabel() == "relative error"


def test_missing_layers_are_left_out_and_zero_errors_are_the_lowest(records):
    records[0].relative_error = 0.0
    del records[4]
    (mesh,) = relative_error_figure(records).axes[0].collections
    table = np.ma.filled(mesh.get_array(), np.nan)
    assert table[0, 0] == mesh.norm.vmin == 0.002
    assert np.isnan(table[1, 1])


@pytest.mark.parametrize("blocks", [1, 2, 30, 80])
def test_labels_of_blocks_never_overlap(blocks):
    records = [record(b, f"kind_{k}", 0.01 * (b + 1)) for b in range(blocks) for k in range(12)]
    for figure, axis in ((relative_error_figure(records), "both"), (kept_figure(records), "x")):
        figure.draw_without_rendering()
        axes = figure.axes[0]
        for labels in [axes.get_xticklabels()] if axis == "x" else [axes.get_xticklabels(), axes.get_yticklabels()]:
            low, high = sorted(axes.get_xlim()) if labels is axes.get_xticklabels() else (-1, 1e9)
            boxes = [t.get_window_extent() for t in labels if t.get_text() and low <= t.get_position()[0] <= high]
            assert boxes
            assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


# ---- Objective


def test_the_objective_shows_least_median_and_greatest_error():
    figure = objective_figure([iterating(error) for error in (0.03, 0.01, 0.05, 0.02, 0.04)])
    whole = figure.axes[0]
    lines = {line.get_label(): line for line in whole.lines if not line.get_label().startswith("_")}
    assert [label.split(":")[0] for label in lines] == ["least (0.01)", "median (0.03)", "greatest (0.05)"]
    for line in lines.values():
        assert list(line.get_ydata()) == [0.125, 0.25, 1, 1.5, 1.2, 1]
        assert list(line.get_xdata()) == [1, 2, 3, 4, 5, 6]
    assert whole.get_yscale() == "log"


def test_the_monitors_choices_and_the_exact_support_are_marked():
    figure = objective_figure([iterating(0.01), iterating(0.02, accelerated=(0.0, 0.0, 1.0))])
    whole, choices, refining = figure.axes
    assert [list(np.ravel(mesh.get_array())) for mesh in choices.collections] == [[1.0, 0.0, 0.5], [0.0, 0.0, 1.0]]
    # Three iterations have choices: the fourth value is the first on the exact support.
    marks = [line for axes in (whole, refining) for line in axes.lines if line.get_marker() == "D"]
    assert [list(mark.get_xdata()) for mark in marks] == [[4]] * 4
    assert [list(mark.get_ydata()) for mark in marks[:2]] == [[1.5]] * 2
    courses = [line for line in refining.lines if line.get_marker() != "D" and len(line.get_xdata()) == 3]
    assert len(courses) == 2
    assert courses[0].get_ydata() == pytest.approx([50, 20, 0])


def test_a_course_that_hardly_falls_is_drawn_in_percent():
    course = iterating(0.01)
    course.objective = [104.0, 103.0, 102.0, 101.0, 100.5, 100.0]
    whole, choices = objective_figure([course]).axes
    assert whole.get_yscale() == "linear"
    assert whole.get_ylabel() == "objective above its last value, %"
    line = next(line for line in whole.lines if line.get_label().startswith("layer"))
    assert line.get_ydata() == pytest.approx([4, 3, 2, 1, 0.5, 0])
    assert choices.collections
    # Refining by itself would show the same again. With twice the span there is a logarithm, which would hide it.
    course.objective[0] = 201.0
    assert objective_figure([course]).axes[0].get_yscale() == "log"
    assert len(objective_figure([course]).axes) == 3


def test_without_a_monitor_or_refining_their_panels_are_absent():
    assert len(objective_figure([iterating(0.01, accelerated=())]).axes) == 1
    assert len(objective_figure([iterating(0.01, accelerated=[1.0] * 5)]).axes) == 2
    # Nothing lost: the course ends at 0, and there is no logarithm of it.
    assert objective_figure([iterating(0.0, last=0.0)]) is None


# ---- Stages


def test_perplexities_are_bars_by_stage():
    figure = stages_figure(
        summary(pruned={"perplexity": {"wikitext2": 54.45}}, dense={"perplexity": {"wikitext2": 29.93}})
    )
    (axes,) = figure.axes
    assert [bar.get_height() for bar in axes.patches] == [29.93, 54.45]
    assert [text.get_text() for text in axes.texts] == ["29.93", "54.45"]
    assert axes.get_yscale() == "linear"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["dense", "pruned"]


def test_large_and_infinite_perplexities_stay_on_the_axis():
    figure = stages_figure(
        summary(
            dense={"perplexity": {"a": 5.68, "b": 7.0}},
            pruned={"perplexity": {"a": float("inf"), "b": 123456.0}},
            finetuned={"perplexity": {"a": float("nan")}},
        )
    )
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    assert [text.get_text() for text in axes.texts] == ["5.68", "7.00", "∞", "123,456", "NaN"]
    low, high = axes.get_ylim()
    for bar in axes.patches:
        assert low == pytest.approx(bar.get_y())
        assert bar.get_y() + bar.get_height() <= high * 1.0001


def test_only_infinite_perplexities():
    assert stages_figure(summary(pruned={"perplexity": {"a": float("inf")}})).axes[0].texts[0].get_text() == "∞"


def test_tasks_are_marks_with_their_standard_errors():
    figure = stages_figure(
        summary(
            dense={"tasks": {"boolq": {"acc": 0.6, "acc_stderr": 0.02}, "rte": {"acc": 0.5}}, "mean_accuracy": 0.55},
            pruned={"tasks": {"boolq": {"acc": 0.4, "acc_stderr": 0.01}}, "mean_accuracy": 0.4},
        )
    )
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["mean", "boolq", "rte"]
    points = {container.get_label(): [] for container in axes.containers}
    for container in axes.containers:
        mark, _, bars = container
        reach = bars[0].get_segments()[0][:, 0] if bars else None
        points[container.get_label()].append((float(mark.get_xdata()[0]), None if reach is None else list(reach)))
    assert [value for value, _ in points["dense"]] == pytest.approx([55, 60, 50])
    assert [value for value, _ in points["pruned"]] == pytest.approx([40, 40])
    assert points["dense"][1][1] == pytest.approx([58, 62])
    assert points["dense"][2][1] is None


def test_nothing_measured_is_no_figure():
    assert stages_figure(summary(dense={}, pruned={"perplexity": {}, "tasks": {}})) is None
    assert stages_figure(summary()) is None


# ---- Weights kept


def test_kept_weights_by_block_and_kind(records):
    for layer, zeros in zip(records, (32, 16, 0, 8, 8, 8), strict=True):
        layer.zeros = zeros
    by_block, by_kind = kept_figure(records).axes
    assert [bar.get_height() for bar in by_block.patches] == [50, 75]
    assert [bar.get_width() for bar in by_kind.patches] == [37.5, 62.5, 87.5]
    assert "62.50 %" in by_block.get_title(loc="left")


def test_layers_weigh_as_many_weights_as_they_have():
    small, large = record(0, "a", 0.1, zeros=0), record(0, "b", 0.1, zeros=96)
    large.shape = (12, 8)
    assert kept_figure([small, large]).axes[0].patches[0].get_height() == pytest.approx(25)


# ---- Files


@pytest.mark.slow
def test_files_for_what_there_is(records, tmp_path):
    folder = tmp_path / "run" / "figures"
    paths = draw_figures(folder, summary(dense={"perplexity": {"a": 2.0}}), records)
    assert list(paths) == ["stages", "relative_error", "kept"]
    assert sorted(folder.iterdir()) == sorted(paths.values())
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths.values())
    assert set(draw_figures(folder, summary(), [iterating(0.1)])) == {"relative_error", "objective", "kept"}
    assert draw_figures(tmp_path, summary(), []) == {}


@pytest.mark.slow
def test_matplotlib_is_imported_only_to_draw_and_pyplot_never(tmp_path):
    script = f"""
import sys
from pathlib import Path
from maiht_lightning.reporting.run.figures import draw_figures
from maiht_lightning.records import StageResult, Stages
from maiht_lightning.reporting.summary import Summary
assert "matplotlib" not in sys.modules
stages = Stages(dense=StageResult({{"a": 2.0}}))
draw_figures(Path({str(tmp_path)!r}), Summary("maiht", 0.5, "row", 0.5, stages), [])
assert "matplotlib" in sys.modules
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
