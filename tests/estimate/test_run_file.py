"""Predictions of a run's own configuration file."""

import json
from pathlib import Path

import pytest
import yaml

from maiht_lightning.cli import main
from maiht_lightning.estimate.plan import Job
from maiht_lightning.estimate.run_file import read_run_file
from maiht_lightning.evaluation.lm_eval_tasks import PAPER_TASKS
from maiht_lightning.solvers import MAIHTConfig

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def write(tmp_path):
    def write(**settings):
        content = {"model": {"name_or_path": "huggyllama/llama-7b"}, **settings}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
        return str(tmp_path / "run.yaml")

    return write


def test_the_papers_run():
    model, job, notes = read_run_file(CONFIGS / "llama7b_wikitext2.yaml")
    assert model == "huggyllama/llama-7b"
    expected = Job(
        dtype="bfloat16",
        samples=128,
        seqlen=2048,
        batch_size=8,
        config=MAIHTConfig(),
        optimizer="adamw_8bit",
        eval_batch_size=4,
        tasks=list(PAPER_TASKS),
        task_batch_size=32,
    )
    assert Job(**job) == expected
    assert len(notes) == 1
    assert "--train_steps" in notes[0]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_that_ships_can_be_read(path):
    _, job, _ = read_run_file(path)
    Job(**job)


@pytest.mark.parametrize(
    ("settings", "field", "value"),
    [
        ({"trainer": {"precision": "16-true"}}, "dtype", "float16"),
        ({"trainer": {"precision": "bf16-mixed"}}, "dtype", "float32"),
        ({"trainer": {"max_steps": 10, "accumulate_grad_batches": 4}}, "train_steps", 40),
        ({"data": {"class_path": "X", "init_args": {"batch_size": 3}}}, "train_batch_size", 3),
        ({"data": {"batch_size": 3}}, "train_batch_size", 3),
        ({"model": {"name_or_path": "x", "gradient_checkpointing": True}}, "gradient_checkpointing", True),
        ({"model": {"name_or_path": "x", "optimizer": "adamw_8bit"}}, "optimizer", "adamw_8bit"),
        ({"pruning": {"batch_size": 5}}, "batch_size", 5),
        ({"pruning": {"method": "wanda"}}, "method", "wanda"),
        ({"pruning": {"pattern": "2:4"}}, "pattern", "2:4"),
        ({"pruning": {"sparsity": 0.7}}, "sparsity", 0.7),
        ({"pruning": {"config": "best"}}, "config", "best"),
        ({"pruning": {"config": {"mu": 0.2}}}, "config", MAIHTConfig(mu=0.2)),
        ({"pruning": {"offload": "cpu"}}, "offload", "cpu"),
        ({"pruning": {"calibration": {"class_path": "C", "init_args": {"samples": 7}}}}, "samples", 7),
        ({"pruning": {"calibration": {"class_path": "C", "init_args": {"seqlen": 99}}}}, "seqlen", 99),
        ({"pruning": {"evaluation": {"max_windows": 12}}}, "eval_windows", 12),
        ({"pruning": {"evaluation": {"batch_size": 6}}}, "eval_batch_size", 6),
        ({"pruning": {"evaluation": {"tasks": ["rte", "mine"]}}}, "tasks", ["rte", "mine"]),
        ({"pruning": {"evaluation": {"limit": 9}}}, "task_limit", 9),
        ({"pruning": {"evaluation": {"task_batch_size": 16}}}, "task_batch_size", 16),
        # What a run does where nothing is said.
        ({}, "batch_size", 1),
        ({}, "gradient_checkpointing", False),
        ({}, "optimizer", "adamw"),
        ({}, "dtype", "float32"),
    ],
)
def test_every_setting_is_read(write, settings, field, value):
    assert getattr(Job(**read_run_file(write(**settings))[1]), field) == value


def test_the_command_predicts_it_and_options_go_before(write, tmp_path, capsys):
    file = write(trainer={"max_steps": 10}, pruning={"method": "wanda", "sparsity": 0.7})
    main(["estimate", file, "--gpu", "h100-80gb", "--sparsity", "0.6", "--output", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["model"] == "huggyllama/llama-7b"
    assert (found["job"]["method"], found["job"]["sparsity"], found["job"]["train_steps"]) == ("wanda", 0.6, 10)
    assert "finetune" in capsys.readouterr().out


@pytest.mark.slow
def test_epochs_are_told(capsys):
    main(["estimate", str(CONFIGS / "llama7b_wikitext2.yaml"), "--gpu", "a100-80gb"])
    assert "give --train_steps" in capsys.readouterr().out
    main(["estimate", str(CONFIGS / "llama7b_wikitext2.yaml"), "--gpu", "a100-80gb", "--train_steps", "9"])
    assert "give --train_steps" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"), [("a: 1", "with model.name_or_path, but has none"), (None, "found none at")]
)
def test_other_files_are_refused(tmp_path, text, message, capsys):
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        main(["estimate", str(file), "--gpu", "h100-80gb"])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
