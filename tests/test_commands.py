"""`maiht evaluate` and `maiht report` as a user calls them, and a run with tasks from end to end."""

import csv
import json

import pytest
import torch

from maiht_lightning import prune
from maiht_lightning.cli import main
from maiht_lightning.evaluation.perplexity import perplexity
from maiht_lightning.evaluation.settings import Evaluation
from maiht_lightning.loading import load_model
from wandb_file import read_run

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 40


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fox.txt").write_text(TEXT)
    return "fox.txt"


def failed(capsys, *args):
    with pytest.raises(SystemExit) as stopped:
        main(list(args))
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_evaluate_prints_and_writes_what_is_measured(tiny_folder, tokenizer, text, tmp_path, capsys, dtype):
    model = load_model(str(tiny_folder), getattr(torch, dtype))
    ids = tokenizer(TEXT)["input_ids"]
    windows = torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)
    prune(model, windows[:2], method="magnitude", sparsity=0.25, progress=False)
    model.save_pretrained("pruned")
    tokenizer.save_pretrained("pruned")

    options = ["--perplexity", f"[{text}]", "--seqlen", "64", "--dtype", dtype, "--batch_size", "4"]
    main(["evaluate", "--model", "pruned", *options, "--output", "result.json"])
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["perplexity"][text] == pytest.approx(perplexity(model, windows, progress=False), rel=1e-4)
    assert found["sparsity"] == 0.25
    printed = capsys.readouterr().out
    assert "25.0000%" in printed
    assert f"{found['perplexity'][text]:.3f}" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "/nowhere/at/all"], "no model at /nowhere/at/all"),
        (["--model", "MODEL", "--perplexity", "[wikitext3]"], "unknown text 'wikitext3'"),
        # lm-eval reads all of its 14,000 task files to say what is similar.
        pytest.param(
            ["--model", "MODEL", "--perplexity", "[]", "--tasks", "[boolk]"],
            "boolk.*similar names.*boolq",
            marks=pytest.mark.slow,
        ),
        (["--model", "MODEL", "--limit", "0"], "limit"),
        (["--model", "MODEL", "--output", "not/there.json"], "output: expected a file in an existing folder"),
        ([], "model"),
    ],
)
def test_evaluate_refuses_bad_input(tiny_folder, text, capsys, options, message):
    import re

    options = [str(tiny_folder) if option == "MODEL" else option for option in options]
    assert re.search(message, failed(capsys, "evaluate", *options), re.DOTALL)


def test_settings_of_an_evaluation_are_checked():
    for name, value in (("limit", 0), ("num_fewshot", -1), ("max_windows", 0), ("seqlen", 1), ("batch_size", 0)):
        with pytest.raises(ValueError, match=name):
            Evaluation(**{name: value})


def run_folder(folder, method, dense, pruned):
    folder.mkdir()
    stages = {"dense": {"perplexity": {"wikitext2": dense}}, "pruned": {"perplexity": {"wikitext2": pruned}}}
    summary = {"method": method, "sparsity": 0.5, "pattern": "unstructured", "measured_sparsity": 0.5}
    (folder / "summary.json").write_text(json.dumps({**summary, "stages": stages, "seconds": {"solve": 3.0}}))
    (folder / "layers.csv").write_text("name,relative_error\na,0.1\nb,0.3\n")


def test_report_puts_runs_side_by_side(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_folder(tmp_path / "a", "maiht", 29.9, 54.4)
    run_folder(tmp_path / "b", "wanda", 29.9, 80.7)
    main(["report", "a", "b", "--output_dir", "both"])
    assert {"report.md", "report.csv", "report.html", "perplexity.png"} <= {
        p.name for p in (tmp_path / "both").iterdir()
    }
    rows = list(csv.DictReader((tmp_path / "both" / "report.csv").open()))
    assert {row["method"] for row in rows} >= {"maiht", "wanda"}
    printed = capsys.readouterr().out
    assert "54.4" in printed
    assert "80.7" in printed


@pytest.mark.parametrize(("runs", "message"), [(["nothing"], "nothing is no run's folder"), ([], "runs")])
def test_report_refuses_what_is_no_run(tmp_path, monkeypatch, capsys, runs, message):
    monkeypatch.chdir(tmp_path)
    assert message in failed(capsys, "report", *runs)


@pytest.mark.slow
def test_a_real_run_with_tasks_reports_everything(smollm2_gguf, tokenizer, local_data, tmp_path, monkeypatch):
    """SmolLM2's first blocks, real text and tasks, offline W&B: data store and folder hold what is promised."""
    import wandb

    monkeypatch.chdir(tmp_path)
    model = load_model(str(smollm2_gguf))
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:3], 3
    model.save_pretrained("small")
    tokenizer.save_pretrained("small")
    tasks = ["boolq", "hellaswag"]
    main(
        "prune --model.name_or_path small --data WikiText2DataModule --output_dir run --trainer.logger "
        "WandbLogger --trainer.logger.offline true --trainer.accelerator cpu --pruning.method wanda "
        "--pruning.calibration C4Calibration --pruning.calibration.samples 4 --pruning.calibration.seqlen 128 "
        "--pruning.calibration.sampling packed --pruning.evaluation.seqlen 128 --pruning.evaluation.max_windows 4 "
        f"--pruning.evaluation.tasks [{','.join(tasks)}] --pruning.evaluation.limit 6 "
        "--pruning.evaluation.batch_size 4".split()
    )
    wandb.finish()
    run = tmp_path / "run"
    stages = json.loads((run / "summary.json").read_text())["stages"]
    history, config = read_run(run)
    metrics = {key: value for row in history for key, value in row.items()}
    for name, stage in stages.items():
        assert metrics[f"{name}/perplexity/wikitext2"] == stage["perplexity"]["wikitext2"]
        assert metrics[f"{name}/mean_accuracy"] == stage["mean_accuracy"]
        assert metrics[f"{name}/mean_accuracy"] == pytest.approx(sum(stage["tasks"][t]["acc"] for t in tasks) / 2)
        for task in tasks:
            for metric, value in stage["tasks"][task].items():
                assert metrics[f"{name}/tasks/{task}/{metric}"] == value
    assert set(stages) == {"dense", "pruned"}
    assert metrics["tasks.nrows"] == 3  # boolq acc, hellaswag acc and acc_norm
    assert metrics["prune/layers.nrows"] == 21
    assert [row["prune/block"] for row in history if "prune/relative_error" in row] == [0, 1, 2]
    assert all(metrics[f"figures/{name}.count"] == 1 for name in ("relative_error", "stages", "kept"))
    assert config["model"]["name_or_path"] == "small"
    assert config["pruned_with"]["method"] == "wanda"
    assert config["seed_everything"] == 0
    assert "lightning" in config["environment"]
    page = (run / "report.html").read_text()
    assert "boolq" in page
    assert len(list((run / "figures").glob("*.png"))) == 3
