"""Runs side by side: means and deviations by hand, what is best, what may be compared, what is no run."""

import csv
import io
import json
import math
from copy import deepcopy

import pytest
import yaml

from helpers.html_page import Page
from maiht_lightning.reporting.comparison import figure as comparison_figure
from maiht_lightning.reporting.comparison.rows import comparison, write_comparison
from maiht_lightning.reporting.comparison.runs import read_run
from maiht_lightning.reporting.comparison.wandb_report import project_of, publish, report_blocks

DENSE = {"perplexity": {"wikitext2": 29.93}, "tasks": {"boolq": {"acc": 0.6}}, "mean_accuracy": 0.6}
CONFIG = {
    "seed_everything": 0,
    "output_dir": None,
    "trainer": {"max_steps": 2, "logger": {"class_path": "A"}},
    "model": {"name_or_path": "small"},
    "pruning": {
        "method": "?",
        "calibration": {"class_path": "C4Calibration", "init_args": {"samples": 64, "seed": 0}},
        "evaluation": {"perplexity": ["wikitext2"], "seqlen": 512},
    },
}


@pytest.fixture
def make(tmp_path):
    """A function that writes a run's folder and reads it."""

    def make(name, method, perplexity, *, acc=0.5, seed=0, errors=(0.01, 0.03), change=None, **fields):
        folder = tmp_path / name
        folder.mkdir()
        pruned = {"perplexity": {"wikitext2": perplexity}, "tasks": {"boolq": {"acc": acc}}, "mean_accuracy": acc}
        summary = {
            "method": method,
            "sparsity": 0.5,
            "pattern": "unstructured",
            "measured_sparsity": 0.5,
            "stages": {"dense": DENSE, "pruned": pruned},
            "seconds": {"solve": 10.0},
            "peak_memory_bytes": 1,
            **fields,
        }
        (folder / "summary.json").write_text(json.dumps(summary))
        lines = [f"model.layers.0.layer{i},{error}" for i, error in enumerate(errors)]
        (folder / "layers.csv").write_text("\n".join(["name,relative_error", *lines]) + "\n")
        config = deepcopy(CONFIG)
        config["seed_everything"] = config["pruning"]["calibration"]["init_args"]["seed"] = seed
        if change:
            change(config)
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        return read_run(folder)

    return make


def table(runs):
    """Rows of the CSV as dictionaries."""
    return list(csv.DictReader(io.StringIO(comparison(runs).csv())))


def test_seeds_become_mean_and_standard_deviation(make):
    runs = [
        make(f"maiht-{seed}", "maiht", value, seed=seed, acc=acc, errors=(error,), seconds={"solve": seconds})
        for seed, value, acc, error, seconds in (
            (0, 50.0, 0.4, 0.01, 10),
            (1, 54.0, 0.5, 0.02, 20),
            (2, 61.0, 0.6, 0.03, 60),
        )
    ]
    dense, row = table(runs)
    assert row["n"] == "3"
    # Mean 55; deviations -5, -1, 6; sum of squares 62; over n - 1.
    assert float(row["perplexity/wikitext2/pruned"]) == pytest.approx(55)
    assert float(row["perplexity/wikitext2/pruned_sd"]) == pytest.approx(math.sqrt(31))
    assert float(row["accuracy/boolq"]) == float(row["mean_accuracy"]) == pytest.approx(0.5)
    assert float(row["accuracy/boolq_sd"]) == pytest.approx(0.1)
    assert float(row["mean_relative_error"]) == pytest.approx(0.02)
    assert float(row["solve_seconds"]) == pytest.approx(30)
    assert row["runs"] == "maiht-0 maiht-1 maiht-2"
    # The dense model was measured three times with one result: that is one measurement.
    assert (dense["method"], dense["n"], dense["perplexity/wikitext2/dense"]) == ("dense", "1", "29.93")
    assert dense["perplexity/wikitext2/dense_sd"] == dense["perplexity/wikitext2/pruned"] == ""
    assert float(dense["accuracy/boolq"]) == 0.6
    assert (
        "| mAIHT | unstructured | 50 | 3 | 50.00 | 29.93 | 55.00 ± 5.57 | 50.00 ± 10.00 |"
        in comparison(runs).markdown()
    )


def test_a_run_done_twice_counts_once(make):
    first = make("a", "maiht", 50.0)
    again = make("b", "maiht", 50.0, seconds={"solve": 99.0})
    assert [row["n"] for row in table([first, again])] == ["1", "1"]
    # Another seed with the same result is another measurement, as for methods that need no calibration.
    other = make("c", "maiht", 50.0, seed=1)
    assert [row["n"] for row in table([first, again, other])] == ["1", "2"]


def test_the_mean_relative_error_is_the_layers(make):
    assert make("a", "maiht", 50.0, errors=(0.01, 0.02, 0.06)).mean_relative_error == pytest.approx(0.03)


def test_the_best_of_each_pattern_and_sparsity_is_marked(make):
    runs = [
        make("a", "maiht", 50.0, acc=0.5, errors=(0.01,)),
        make("b", "wanda", 80.0, acc=0.55, errors=(0.02,)),
        make("c", "wanda", 70.0, pattern="2:4"),
        make("d", "wanda", 90.0, sparsity=0.7),
        make("e", "maiht", float("inf"), sparsity=0.7),
        make("f", "iht", 85.0, sparsity=0.7),
    ]
    rows = comparison(runs).rows
    best = {(row.method, row.pattern, row.sparsity): row.best for row in rows if row.method != "dense"}
    assert best["maiht", "unstructured", 0.5] == {"perplexity/wikitext2/pruned", "mean_relative_error"}
    assert best["wanda", "unstructured", 0.5] == {"accuracy/boolq", "mean_accuracy"}
    assert best["wanda", "2:4", 0.5] == set()  # nothing beside it
    assert "perplexity/wikitext2/pruned" in best["iht", "unstructured", 0.7]
    assert "perplexity/wikitext2/pruned" not in best["maiht", "unstructured", 0.7]
    markdown = comparison(runs).markdown()
    assert "**50.00**" in markdown
    assert "**80.00**" not in markdown
    assert "| ∞ |" in markdown


def test_other_settings_are_told_apart_and_named(make):
    def more(config):
        config["pruning"]["calibration"]["init_args"]["samples"] = 128
        config["trainer"]["logger"] = None

    runs = [make("a", "maiht", 50.0), make("b", "maiht", 48.0, change=more), make("c", "wanda", 80.0)]
    dense, *rows = table(runs)
    assert [row["settings"] for row in rows] == ["calibration.samples=64", "calibration.samples=128", ""]
    assert dense["settings"] == ""
    assert "| other settings |" in comparison(runs).markdown()


def test_other_models_and_measurements_are_never_compared(make):
    def large(config):
        config["model"]["name_or_path"] = "large"

    def longer(config):
        config["pruning"]["evaluation"]["seqlen"] = 2048

    other = {"dense": {"perplexity": {"wikitext2": 5.68}}, "pruned": {"perplexity": {"wikitext2": 7.2}}}
    runs = [
        make("a", "maiht", 50.0),
        make("b", "wanda", 80.0),
        make("c", "maiht", 0, change=large, stages=other),
        make("d", "maiht", 30.0, change=longer),
    ]
    rows = comparison(runs).rows
    assert [row.method for row in rows[:3]] == ["dense"] * 3
    assert [row.settings for row in rows[:3]] == [
        "model.name_or_path=small, evaluation.seqlen=512",
        "model.name_or_path=large, evaluation.seqlen=512",
        "model.name_or_path=small, evaluation.seqlen=2048",
    ]
    assert [run for row in rows for run in row.runs if "perplexity/wikitext2/pruned" in row.best] == ["a"]


def test_finetuned_stage_and_absent_measurements(make):
    stages = {"pruned": {}, "finetuned": {"perplexity": {"/a/b.txt": 12.5}, "tasks": {"boolq": {"acc": 0.5}}}}
    runs = [make("a", "maiht", 50.0), make("b", "wanda", 0, stages=stages)]
    rows = {row["method"]: row for row in table(runs)}
    assert rows["wanda"]["perplexity//a/b.txt/finetuned"] == "12.5"
    assert rows["wanda"]["mean_accuracy/finetuned"] == "0.5"
    assert rows["wanda"]["perplexity/wikitext2/pruned"] == rows["maiht"]["mean_accuracy/finetuned"] == ""
    assert "/a/b.txt perplexity, finetuned" in comparison(runs).markdown()


def test_infinite_values_have_a_mean_and_no_deviation(make):
    runs = [make("a", "magnitude", float("inf")), make("b", "magnitude", 500.0, seed=1)]
    row = table(runs)[1]
    assert (row["perplexity/wikitext2/pruned"], row["perplexity/wikitext2/pruned_sd"]) == ("inf", "")


def test_runs_of_somebodys_own_script_have_no_configuration(make):
    run = make("a", "maiht", 50.0)
    (run.folder / "config.yaml").unlink()
    (run.folder / "journal").mkdir()
    (run.folder / "journal" / "settings.json").write_text(json.dumps({"config": {"mu": 0.5}}))
    run = read_run(run.folder)
    assert run.settings == {"pruning.config.mu": "0.5"}
    assert (run.trained_before, run.config_known) == (False, False)
    assert run.distinctions == {"command": "prune", "config.yaml": "absent", **run.settings}
    (run.folder / "journal" / "settings.json").unlink()
    assert read_run(run.folder).settings == {}
    assert read_run(run.folder).distinctions == {"command": "prune", "config.yaml": "absent"}


def test_what_is_no_finished_run_is_refused(make, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is no run's folder: there is no such folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"is no run's folder: it has no summary\.json"):
        read_run(tmp_path)
    folder = make("a", "maiht", 50.0).folder
    (folder / "layers.csv").unlink()
    with pytest.raises(ValueError, match=r"a is unfinished: layers\.csv is missing"):
        read_run(folder)
    (folder / "summary.json").write_text(
        json.dumps({"method": "maiht", "sparsity": 0.5, "pattern": "row", "stages": {}})
    )
    with pytest.raises(ValueError, match="a is unfinished: the stage `pruned`"):
        read_run(folder)
    (folder / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"summary\.json is not a run's summary"):
        read_run(folder)
    (folder / "summary.json").write_text('{"sparsity": 1}')
    with pytest.raises(ValueError, match=r"summary\.json is not a run's summary.*method"):
        read_run(folder)
    (folder / "summary.json").unlink()
    with pytest.raises(ValueError, match=r"a is unfinished: summary\.json is missing"):
        read_run(folder)
    with pytest.raises(ValueError, match="at least one run"):
        comparison([])


def test_the_page_holds_the_table_and_needs_nothing_from_outside(make, tmp_path):
    runs = [make("<i>", "maiht", 50.0), make("b", "wanda", 80.0, acc=0.45), make("c", "wanda", 82.0, acc=0.45, seed=1)]
    folder = tmp_path / "new" / "comparison"
    path = write_comparison(folder, comparison(runs))
    assert path == folder / "report.html"
    assert sorted(file.name for file in folder.iterdir()) == [
        "perplexity.png",
        "report.csv",
        "report.html",
        "report.md",
    ]
    page = Page(path.read_text())
    result, names = page.tables
    assert result[0][:4] == ["method", "pattern", "sparsity, %", "n"]
    assert result[2][:7] == ["mAIHT", "unstructured", "50", "1", "50.00", "29.93", "50.00"]
    assert result[3][:7] == ["Wanda", "unstructured", "50", "2", "50.00", "29.93", "81.00 ± 1.41"]
    assert page.best == ["50.00", "50.00", "50.00"]  # perplexity, boolq, mean; the errors are equal
    assert [row[-1] for row in names[1:]] == ["<i>", "b, c"]
    assert [link[:22] for link in page.links] == ["data:image/png;base64,"]
    assert (folder / "report.md").read_text() == comparison(runs).markdown()


def test_the_figure_draws_lines_marks_and_the_dense_model(make, tmp_path, monkeypatch):
    runs = [
        make("a", "maiht", 50.0),
        make("b", "maiht", 90.0, sparsity=0.6),
        make("c", "maiht", float("inf"), sparsity=0.7),
        make("d", "wanda", 70.0, pattern="2:4"),
        make("e", "wanda", 80.0, seed=0),
        make("f", "wanda", 84.0, seed=1),
    ]
    drawn = []
    monkeypatch.setattr(comparison_figure, "save_png", lambda figure, path: drawn.append(figure) or path)
    assert comparison_figure.draw_rows(tmp_path / "x.png", comparison(runs).rows) == tmp_path / "x.png"
    (axes,) = drawn[0].axes
    assert axes.get_yscale() == "log"
    points = {container.get_label(): container for container in axes.containers}
    line = points["mAIHT, unstructured"][0]
    assert (list(line.get_xdata()), list(line.get_ydata()), line.get_linestyle()) == ([50, 60], [50, 90], "-")
    marks = points["Wanda, 2:4"][0]
    assert (list(marks.get_ydata()), marks.get_linestyle()) == ([70], "None")
    reach = points["Wanda, unstructured"][2][0].get_segments()[0][:, 1]
    assert list(reach) == pytest.approx([82 - math.sqrt(8), 82 + math.sqrt(8)])
    dense = next(line for line in axes.lines if line.get_label() == "dense")
    assert list(dense.get_ydata()) == [29.93, 29.93]
    assert [text.get_text() for text in axes.texts] == ["∞", "29.93"]


def test_lines_have_gaps_where_only_others_were_measured(make, tmp_path, monkeypatch):
    runs = [make(f"a{value}", "maiht", value, sparsity=value / 100) for value in (50.0, 60.0, 80.0)]
    runs += [make(f"b{value}", "wanda", value, sparsity=value / 100) for value in (40.0, 60.0, 70.0)]
    drawn = []
    monkeypatch.setattr(comparison_figure, "save_png", lambda figure, path: drawn.append(figure) or path)
    comparison_figure.draw_rows(tmp_path / "x.png", comparison(runs).rows)
    lines = {container.get_label(): container[0] for container in drawn[0].axes[0].containers}
    for name, expected in (
        ("mAIHT", {50: 50, 60: 60, 70: math.nan, 80: 80}),
        ("Wanda", {40: 40, 50: math.nan, 60: 60, 70: 70}),
    ):
        line = lines[f"{name}, unstructured"]
        assert list(line.get_xdata()) == pytest.approx(list(expected))
        assert list(line.get_ydata()) == pytest.approx(list(expected.values()), nan_ok=True)


@pytest.mark.parametrize(("highest", "cut"), [(2900.0, False), (3100.0, True)])
def test_hopeless_models_do_not_squeeze_the_others(make, tmp_path, monkeypatch, highest, cut):
    """Where one is above a hundred times the lowest, which is the dense model's 29.93."""
    runs = [make("a", "maiht", 50.0), make("b", "magnitude", highest), make("c", "wanda", 590.0)]
    drawn = []
    monkeypatch.setattr(comparison_figure, "save_png", lambda figure, path: drawn.append(figure) or path)
    comparison_figure.draw_rows(tmp_path / "x.png", comparison(runs).rows)
    (axes,) = drawn[0].axes
    assert (axes.get_ylim()[1] > highest) != cut
    assert axes.get_ylim()[0] < 29.93 < 590 < axes.get_ylim()[1]
    assert axes.get_title(loc="right") == ("higher, beyond this axis: magnitude" if cut else "")


def test_without_perplexities_there_is_no_figure(make, tmp_path):
    run = make("a", "maiht", 0, stages={"pruned": {"tasks": {"boolq": {"acc": 0.5}}}})
    assert comparison_figure.draw_rows(tmp_path / "x.png", comparison([run]).rows) is None
    assert Page(write_comparison(tmp_path / "out", comparison([run])).read_text()).links == []
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["report.csv", "report.html", "report.md"]


def test_wandb_report_blocks(make):
    reports = pytest.importorskip("wandb_workspaces.reports.v2")
    runs = [make("a", "maiht", 50.0), make("b", "wanda", 80.0)]
    first, text, _, grid = report_blocks(runs, comparison(runs))
    assert isinstance(first, reports.H1)
    assert text.text == comparison(runs).markdown()
    scatter, errors, _ = grid.panels
    assert scatter.y.name == "pruned/perplexity/wikitext2"
    assert scatter.x.name == "sparsity"
    assert (errors.x, errors.y) == ("prune/block", ["prune/relative_error"])
    assert grid.runsets[0].filters == ""
    for run, name in zip(runs, ("abc123", "xyz789"), strict=True):
        (run.folder / "wandb" / f"offline-run-20250101_120000-{name}").mkdir(parents=True)
    _, _, _, grid = report_blocks(runs, comparison(runs))
    assert grid.runsets[0].filters == "Metric('ID') in ['abc123', 'xyz789']"
    # What would be sent can be built: the names of metrics and the filter are understood.
    assert "abc123" in json.dumps(grid._to_model().model_dump(mode="json"))


def test_a_wandb_report_is_in_the_project_of_its_runs(make):
    def logs_to(project, name="lightning.pytorch.loggers.WandbLogger"):
        return lambda config: config["trainer"].update(logger={"class_path": name, "init_args": {"project": project}})

    first, second = make("a", "maiht", 50.0, change=logs_to("x")), make("b", "wanda", 80.0, change=logs_to("y"))
    assert project_of([first]) == project_of([first, first]) == "x"
    with pytest.raises(ValueError, match=r"the runs are in x, y: name one of them with --project"):
        project_of([first, second])
    # Lightning's own name, where none was given or the logger is another one.
    for number, change in enumerate((logs_to(None), logs_to("x", "CometLogger"), None)):
        assert project_of([make(f"c{number}", "maiht", 50.0, change=change)]) == "lightning_logs"


def test_wandb_report_without_its_package_says_what_to_install(make, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb_workspaces.reports.v2", None)
    runs = [make("a", "maiht", 50.0)]
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'maiht-lightning\[wandb\]'"):
        publish(runs, comparison(runs), "me", "project")


def test_what_comes_after_the_pruning_does_not_part_dense_models(make):
    def longer(config):
        config["sparse_finetune"] = {"max_steps": 100, "distillation": 0.5}

    rows = table([make("one", "maiht", 50.0), make("two", "maiht", 50.0, change=longer)])
    assert len([row for row in rows if row["method"] == "dense"]) == 1
    assert len(rows) == 3
