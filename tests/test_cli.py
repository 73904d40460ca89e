"""The real command line: fit, prune, validate, a run's folder, and bad input answered before training."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
import yaml

from maiht_lightning.cli import main
from maiht_lightning.loading import load_model
from maiht_lightning.sparsity import count_zeros

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture
def options(tiny_folder, tmp_path, monkeypatch):
    """Options of a small run in an empty folder, changed or extended by keyword."""
    monkeypatch.chdir(tmp_path)
    config = {
        "model": {"name_or_path": str(tiny_folder)},
        "data": {"class_path": "PythonDocsDataModule", "init_args": {"seqlen": 64, "batch_size": 4}},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 2,
            "limit_val_batches": 1,
            "num_sanity_val_steps": 0,
            "logger": False,
            "enable_progress_bar": False,
            "enable_checkpointing": False,
        },
        "pruning": {
            "calibration": {"class_path": "PythonDocsCalibration", "init_args": {"samples": 8, "seqlen": 64}},
            "evaluation": {"perplexity": ["python_docs"], "seqlen": 64, "max_windows": 2},
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return ["--config", "run.yaml"]


def zeros_of(path):
    return [(count.zeros, count.size) for count in count_zeros(load_model(str(path)))]


def test_fit_prunes_and_fills_the_runs_folder(options, tmp_path, capsys):
    main(["fit", *options, "--output_dir", "out", "--pruning.sparsity", "0.6"])
    assert all(zeros == int(0.6 * size) for zeros, size in zeros_of(tmp_path / "out" / "model"))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert list(summary["stages"]) == ["dense", "pruned"]
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert config["pruning"]["sparsity"] == 0.6
    assert config["trainer"]["max_steps"] == 2
    table = capsys.readouterr().out
    assert f"{summary['stages']['pruned']['perplexity']['python_docs']:.3f}" in table
    assert "self_attn.q_proj" in table


@pytest.mark.slow
def test_second_run_never_dies_and_a_saved_configuration_runs_again(options, tmp_path):
    for _ in range(2):
        main(["fit", *options, "--output_dir", "out"])
    main(["fit", "--config", "out/config.yaml"])
    (fresh,) = (tmp_path / "runs").iterdir()
    first, second = (load_model(str(path / "model")) for path in (tmp_path / "out", fresh))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.slow
def test_wandb_offline_twice(options, tmp_path):
    import wandb

    from wandb_file import read_run

    logger = '{"class_path": "WandbLogger", "init_args": {"offline": true, "project": "test"}}'
    for name in ("one", "two"):
        main(["fit", *options, "--output_dir", name, "--trainer.logger", logger, "--trainer.log_every_n_steps", "1"])
        wandb.finish()
        history, config = read_run(tmp_path / name)
        assert [row["train/loss"] > 0 for row in history if "train/loss" in row] == [True, True]
        assert [row["prune/block"] for row in history if "prune/seconds" in row] == [0, 1]
        metrics = {key for row in history for key in row}
        assert {"dense/perplexity/python_docs", "pruned/perplexity/python_docs", "pruned/sparsity"} <= metrics
        assert config["pruning"]["method"] == "maiht"
        assert config["data"]["init_args"]["seqlen"] == 64
    assert not (tmp_path / "wandb").exists()


@pytest.mark.parametrize(("method", "pattern"), [("wanda", "row"), ("magnitude", "unstructured"), ("aiht", "2:4")])
def test_prune_needs_no_training(options, tiny_folder, tmp_path, method, pattern):
    main(["prune", *options, "--output_dir", "out", "--pruning.method", method, "--pruning.pattern", pattern])
    pruned, dense = load_model(str(tmp_path / "out" / "model")), load_model(str(tiny_folder))
    assert all(count.zeros * 2 == count.size for count in count_zeros(pruned))
    assert torch.equal(pruned.model.embed_tokens.weight, dense.model.embed_tokens.weight)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["method"], summary["pattern"]) == (method, pattern)
    assert "fit" not in summary["seconds"]
    assert (tmp_path / "out" / "config.yaml").exists()


@pytest.mark.slow
def test_prune_reads_a_checkpoint_and_agrees_with_fit(options, tmp_path):
    main(["fit", *options, "--output_dir", "fitted", "--trainer.enable_checkpointing", "true"])
    (checkpoint,) = (tmp_path / "fitted").glob("**/*.ckpt")
    main(["prune", *options, "--output_dir", "pruned", "--ckpt_path", str(checkpoint)])
    fitted, pruned = (load_model(str(tmp_path / name / "model")) for name in ("fitted", "pruned"))
    assert all(torch.equal(a, b) for a, b in zip(fitted.parameters(), pruned.parameters(), strict=True))


def test_validate_reports_perplexity(options, capsys):
    main(["validate", *options])
    assert "val/perplexity" in capsys.readouterr().out


@pytest.fixture
def no_training(monkeypatch):
    from maiht_lightning import CausalLMModule

    monkeypatch.setattr(CausalLMModule, "training_step", lambda *_: pytest.fail("training began"))


@pytest.mark.parametrize("command", ["fit", "prune"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--pruning.method", "foo"], "method must be one of maiht, "),
        (["--pruning.sparsity", "1.5"], "sparsity is the fraction of zeros"),
        (["--pruning.sparsity", "0.7", "--pruning.pattern", "2:4"], "means a sparsity of 0.5"),
        (["--pruning.pattern", "3:2"], "pattern '3:2' keeps N = 3 of M = 2"),
        (["--pruning.pattern", "2:5"], "divisible by 5"),
        (["--pruning.config", "fastest"], "names a preset"),
        (["--pruning.config.mu", "-1"], "mu must be a finite number"),
        (["--pruning.calibration.init_args.samples", "100000"], "the text is too short"),
        (["--pruning.evaluation.perplexity", "[wikitext3]"], "unknown text 'wikitext3'"),
        (["--model.name_or_path", "./nowhere"], "no model at"),
        (["--model.learning_rate", "-1"], "learning_rate must be"),
        (["--no.such.option", "1"], "no.such.option"),
    ],
)
def test_bad_input_is_answered_before_training(options, no_training, capsys, tmp_path, command, change, message):
    with pytest.raises(SystemExit) as stop:
        main([command, *options, *change])
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.glob("runs/*/model"))


def test_missing_data_folder_is_named_before_training(options, no_training, capsys, monkeypatch):
    monkeypatch.setenv("MAIHT_DATA_DIR", "/nowhere")
    for change in (["--data", "WikiText2DataModule"], ["--pruning.calibration", "C4Calibration"]):
        with pytest.raises(SystemExit):
            main(["fit", *options, *change])
        assert "MAIHT_DATA_DIR: expected the folder /nowhere" in capsys.readouterr().err


def test_model_without_decoder_blocks_is_refused_before_training(options, no_training, tiny_folder, capsys, tmp_path):
    from transformers import MambaConfig

    MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=0).save_pretrained(tmp_path / "empty")
    for file in tiny_folder.glob("tokenizer*"):
        (tmp_path / "empty" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(SystemExit):
        main(["fit", *options, "--model.name_or_path", str(tmp_path / "empty" / "config.json")])
    assert "has no decoder blocks" in capsys.readouterr().err


def test_errors_inside_libraries_keep_their_traceback(options, monkeypatch):
    from maiht_lightning import CausalLMModule

    monkeypatch.setattr(CausalLMModule, "training_step", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        main(["fit", *options])


@pytest.mark.parametrize("command", ["fit", "prune"])
def test_help_reads_well(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    for line in ("--output_dir", "--pruning.method", "Highest learning rate", "Fraction of zeros"):
        assert line in text


@pytest.mark.slow
def test_killed_while_pruning_and_resumed(options, tmp_path):
    command = [sys.executable, "-m", "maiht_lightning.cli", "prune", *options]
    environment = {**os.environ, "PYTHONPATH": os.path.join(ROOT, "src")}
    subprocess.run([*command, "--output_dir", "whole"], check=True, env=environment, capture_output=True)

    first = tmp_path / "broken" / "journal" / "block_00000.safetensors"
    process = subprocess.Popen([*command, "--output_dir", "broken"], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert first.exists()
    stamp = first.stat().st_mtime_ns
    subprocess.run([*command, "--output_dir", "broken"], check=True, env=environment, capture_output=True)
    assert first.stat().st_mtime_ns == stamp  # not solved again
    whole, resumed = (load_model(str(tmp_path / name / "model")) for name in ("whole", "broken"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("name", ["quickstart", "smollm2_wikitext2", "smollm2_recovery", "llama7b_wikitext2"])
def test_every_configuration_is_valid_for_fit_and_prune(name, capsys):
    path = os.path.join(ROOT, "configs", f"{name}.yaml")
    for command in ("fit", "prune"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--config", path, "--print_config"])
        assert not stop.value.code
        assert yaml.safe_load(capsys.readouterr().out)["pruning"]["method"] == "maiht"
