"""A real offline W&B run, and the report as it is sent: panels of what the run has logged, and of this run alone."""

import json
import re

import pytest

from helpers.byte_model import save_folder
from helpers.terminal import ROOT, maiht
from helpers.wandb_file import finished_records
from helpers.wandb_server import wandb_server
from maiht_lightning.cli import main

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a run that was pruned by `maiht` with an offline logger."""
    import wandb

    folder = tmp_path_factory.mktemp("reported") / "run"
    model = save_folder(folder.with_name("model"))
    logger = {"class_path": "WandbLogger", "init_args": {"offline": True, "project": "ours"}}
    settings = (
        "--trainer.accelerator cpu --pruning.method wanda --pruning.calibration PythonDocsCalibration "
        "--pruning.calibration.samples 4 --pruning.calibration.seqlen 32 --pruning.evaluation.perplexity [python_docs] "
        "--pruning.evaluation.seqlen 32 --pruning.evaluation.max_windows 2"
    )
    paths = ["--model.name_or_path", str(model), "--output_dir", str(folder)]
    main(["prune", *paths, *settings.split(), "--trainer.logger", json.dumps(logger)])
    wandb.finish()
    return folder


def named(items):
    return {item.key or ".".join(item.nested_key) for item in items}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_panels_of_a_report_show_what_a_run_has_logged(folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb_workspaces.reports.v2")
    records = finished_records(folder)
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    rows = [named(record.history.item) for record in records if record.WhichOneof("record_type") == "history"]
    summary = set().union(
        *(named(record.summary.update) for record in records if record.WhichOneof("record_type") == "summary")
    )
    with wandb_server() as (environment, saved), monkeypatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        main(["report", str(folder), "--output_dir", str(tmp_path), "--wandb", "true", "--entity", "me"])
    (view,) = saved
    (grid,) = [block["metadata"] for block in json.loads(view["spec"])["blocks"] if block["type"] == "panel-grid"]

    shown = []
    for panel in grid["panelBankSectionConfig"]["panels"]:
        settings = panel["config"]
        if panel["viewType"] == "Scatter Plot":
            axes = [settings["xAxis"], settings["yAxis"]]
            assert {axis.partition(":")[2] for axis in axes} <= summary, axes
            assert {axis.partition(":")[0] for axis in axes} == {"summary"}
            shown += axes
        else:
            # A curve has its points from rows in which both numbers are.
            together = {settings["xAxis"], *settings["metrics"]}
            assert sum(together <= row for row in rows) == 2, together
            shown += settings["metrics"]
    assert shown == [
        "summary:sparsity",
        "summary:pruned/perplexity/python_docs",
        "prune/relative_error",
        "prune/seconds",
    ]
    # The runs beside the panels are this one, in its project, and the report is there as well.
    (runset,) = grid["runSets"]
    assert view["projectName"] == runset["project"]["name"] == run.project == "ours"
    assert run.run_id in json.dumps(runset["filters"])
    assert "/ours/reports/" in capsys.readouterr().out


@pytest.mark.slow
def test_what_is_logged_of_a_block_has_the_blocks_for_its_axis(folder):
    """Each by its own name: W&B's patterns, Lightning's `*` as well, end at a slash."""
    records = finished_records(folder)
    defined = {r.metric.name: r.metric.step_metric for r in records if r.WhichOneof("record_type") == "metric"}
    rows = [named(record.history.item) for record in records if record.WhichOneof("record_type") == "history"]
    logged = set().union(*(row for row in rows if "prune/relative_error" in row))
    of_blocks = {name for name in logged if name.startswith("prune/")} - {"prune/block"}
    assert {name.rpartition(".")[2] for name in of_blocks if "." in name} == set(LAYERS)
    assert {name: defined.get(name) for name in of_blocks} == dict.fromkeys(of_blocks, "prune/block")
    assert defined["prune/block"] == ""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("command", ["fit", "report"])
def test_without_wandbs_key_there_is_a_remedy_and_no_traceback(command, folder, tmp_path):
    """As on a cluster, where nobody can be asked for it; a fit ends before its model is loaded."""
    if command == "fit":
        save_folder(tmp_path / "model")
        (tmp_path / "model" / "model.safetensors").write_bytes(b"no weights")
        settings = "--model.name_or_path model --data PythonDocsDataModule --data.seqlen 32 --trainer.max_steps 1"
        settings += " --pruning.calibration PythonDocsCalibration --pruning.evaluation.perplexity [python_docs]"
        settings += " --trainer.accelerator cpu --trainer.logger WandbLogger"
    else:
        pytest.importorskip("wandb_workspaces.reports.v2")
        settings = f"{folder} --wandb true"
    nothing = {"HOME": str(tmp_path), "WANDB_API_KEY": "", "WANDB_MODE": "online", "NETRC": str(tmp_path / "netrc")}
    shown = maiht(command, *settings.split(), cwd=tmp_path, warm=True, **nothing)
    told = shown.err.splitlines()
    assert (shown.status, "Traceback" in shown.err) == (2, False), shown.err[-3000:]
    (place,) = [number for number, line in enumerate(told) if line.startswith("maiht: error: W&B: ")]
    assert "wandb login" in told[place]
    assert "--trainer.logger.offline true" in told[place + 1]
    # What is asked of W&B comes last.
    assert command == "fit" or list(tmp_path.glob("reports/*/report.html"))


@pytest.mark.slow
def test_an_offline_run_can_be_looked_at_without_an_account(folder, tmp_path):
    """By W&B's own viewer, with the guide's words."""
    from wandb.cli.cli import cli

    if "leet" not in cli.commands:
        pytest.skip("this version of wandb has no viewer")
    page = (ROOT / "docs" / "guides" / "wandb.md").read_text()
    told = [line.partition(" #")[0].split() for line in re.findall(r"^wandb (.*)$", page, re.MULTILINE)]
    assert {words[0] for words in told} == {"leet", "sync"} <= cli.commands.keys()
    assert {words[-1] for words in told} == {"runs/NAME/wandb/offline-run-*"}
    (run,) = folder.glob("wandb/offline-run-*")
    nobody = {"HOME": str(tmp_path), "WANDB_API_KEY": "", "NETRC": str(tmp_path / "netrc")}
    (words,) = [words[:-1] for words in told if "--summary" in words]
    shown = maiht(*words, run, program=("-m", "wandb"), cwd=tmp_path, warm=True, **nobody)
    assert shown.status == 0, shown.err
    seen = dict(line.split(None, 1) for line in shown.out.splitlines() if len(line.split()) == 2)
    for name, stage in json.loads((folder / "summary.json").read_text())["stages"].items():
        assert float(seen[f"{name}/perplexity/python_docs"]) == stage["perplexity"]["python_docs"]
    assert (seen["project"], seen["method"]) == ("ours", "wanda")
