"""The real command line: fit, prune, validate, a run's folder, and bad input answered before training."""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from helpers.byte_model import byte_tokenizer, same_weights, save_folder
from helpers.counts import assert_total_is
from helpers.sharp_model import perplexity_by_definition
from helpers.warm import kill, python
from maiht_lightning import prune
from maiht_lightning.cli import main
from maiht_lightning.data.python_docs import PythonDocsCalibration
from maiht_lightning.data.sources import python_docs_texts
from maiht_lightning.data.windows import pack_windows
from maiht_lightning.models.loading import load_model
from maiht_lightning.models.sparsity import count_zeros

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


@pytest.mark.slow
def test_fit_prunes_and_fills_the_runs_folder(options, tmp_path, capsys):
    main(["fit", *options, "--output_dir", "out", "--pruning.sparsity", "0.6"])
    assert_total_is(0.6, zeros_of(tmp_path / "out" / "model"))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert list(summary["stages"]) == ["dense", "pruned"]
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert config["pruning"]["sparsity"] == 0.6
    assert config["trainer"]["max_steps"] == 2
    table = capsys.readouterr().out
    assert f"{summary['stages']['pruned']['perplexity']['python_docs']:.3f}" in table
    assert "self_attn.q_proj" in table


@pytest.mark.slow
def test_a_finished_run_is_left_alone_and_its_configuration_runs_again(options, no_figures, capsys, tmp_path):
    command = ["fit", *options, "--output_dir", "out"]
    main(command)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert not stop.value.code
    assert "the run in out is finished; --fresh starts it over" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main([*command, "--trainer.max_steps", "1", "--pruning.sparsity", "0.6"])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "the run in out has other settings: trainer.max_steps: 2, now 1; pruning.sparsity: 0.5, now 0.6" in said
    with pytest.raises(SystemExit):
        main(["prune", *options, "--output_dir", "out"])
    assert "command: fit, now prune" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert not (tmp_path / "out" / "resume.ckpt").exists()

    main([*command, "--fresh", "--pruning.sparsity", "0.6"])
    assert_total_is(0.6, zeros_of(tmp_path / "out" / "model"))
    (tmp_path / "out").rename(tmp_path / "other")
    (tmp_path / "out.1").rename(tmp_path / "out")
    main(["fit", "--config", "out/config.yaml"])
    (fresh,) = (tmp_path / "runs").iterdir()
    first, second = (load_model(str(path / "model")) for path in (tmp_path / "out", fresh))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.slow
def test_wandb_offline_twice(options, tmp_path):
    import wandb

    from helpers.wandb_file import read_run

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


@pytest.mark.slow
@pytest.mark.parametrize(("method", "pattern"), [("wanda", "row"), ("magnitude", "unstructured"), ("aiht", "2:4")])
def test_prune_needs_no_training(options, tiny_folder, tokenizer, tmp_path, method, pattern):
    main(["prune", *options, "--output_dir", "out", "--pruning.method", method, "--pruning.pattern", pattern])
    pruned, expected = load_model(str(tmp_path / "out" / "model")), load_model(str(tiny_folder))
    windows = PythonDocsCalibration(samples=8, seqlen=64).windows(tokenizer, 256)
    prune(expected, windows, method=method, pattern=pattern, progress=False)
    assert same_weights(pruned, expected)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["method"], summary["pattern"]) == (method, pattern)
    assert "fit" not in summary["seconds"]
    assert (tmp_path / "out" / "config.yaml").exists()


@pytest.fixture(scope="module")
def bytes_folder(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("bytes"))


def cells(printed, first):
    """The row of a printed table that begins with a text."""
    rows = [[cell.strip() for cell in re.split("[│┃]", line)] for line in printed.splitlines()]
    (row,) = [[cell for cell in row if cell] for row in rows if first in row]
    return row


@pytest.mark.slow
def test_what_is_printed_and_written_at_the_end_equals_measurements(options, bytes_folder, tmp_path, capsys, caplog):
    """Of the dense and the saved pruned model, by the definitions; and of a pruning without Lightning."""
    main(["prune", *options, "--output_dir", "out", "--model.name_or_path", str(bytes_folder)])
    printed, progress = capsys.readouterr()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    dense, pruned = load_model(str(bytes_folder)), load_model(str(tmp_path / "out" / "model"))

    texts = "\n\n".join(python_docs_texts("heldout"))
    windows = torch.tensor(byte_tokenizer()(texts)["input_ids"][: 2 * 64]).view(2, 64)
    for name, model in (("dense", dense), ("pruned", pruned)):
        measured = summary["stages"][name]["perplexity"]["python_docs"]
        assert measured == pytest.approx(perplexity_by_definition(model, windows), rel=1e-5)
    values = [f"{summary['stages'][name]['perplexity']['python_docs']:.3f}" for name in ("dense", "pruned")]
    assert values[0] != values[1]
    assert cells(printed, "measure") == ["measure", "dense", "pruned"]
    assert cells(printed, "perplexity, python_docs") == ["perplexity, python_docs", *values]

    weights = {name: w for name, w in pruned.named_parameters() if name.endswith("_proj.weight")}
    zeros = {name: int((weight == 0).sum()) for name, weight in weights.items()}
    sparsity = sum(zeros.values()) / sum(weight.numel() for weight in weights.values())
    assert summary["measured_sparsity"] == sparsity
    assert f"maiht, unstructured: {100 * sparsity:.4f}% zeros, counted" in " ".join(printed.split())

    report = prune(dense, PythonDocsCalibration(8, 64).windows(byte_tokenizer(), 128), progress=False)
    expected = {record.name: record for record in report.layers}
    with (tmp_path / "out" / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == list(expected)
    for row in rows:
        record = expected[row["name"]]
        assert float(row["relative_error"]) == pytest.approx(record.relative_error, rel=1e-9)
        assert float(row["sparsity"]) == zeros[f"{row['name']}.weight"] / record.shape[0] / record.shape[1]
        assert (int(row["block"]), int(row["out"]), int(row["in"])) == (record.block, *record.shape)
        course = [float(row["objective_first"]), float(row["objective_last"])]
        assert course == pytest.approx([record.objective[0], record.objective[-1]])
        assert int(row["iterations"]) == len(record.objective)

    for kind in ("self_attn.q_proj", "mlp.down_proj"):
        errors = [expected[f"model.layers.{block}.{kind}"].relative_error for block in range(2)]
        _, count, mean, worst, block, _ = cells(printed, kind)
        assert (count, worst, block) == ("2", f"{max(errors):.5f}", str(errors.index(max(errors))))
        assert float(mean) == pytest.approx((errors[0] * errors[1]) ** 0.5, abs=1e-5)
    # Where there is no terminal, a line for each block has said how far the pruning is.
    for block in range(2):
        worst = max((r for r in report.layers if r.block == block), key=lambda record: record.relative_error)
        said = f"Pruned block {block + 1} of 2: relative error {worst.relative_error:.4f} at most, in {worst.layer}"
        assert said in caplog.messages
    assert "layer/s" not in progress


@pytest.mark.slow
def test_prune_reads_a_checkpoint_and_agrees_with_fit(options, tmp_path):
    main(["fit", *options, "--output_dir", "fitted", "--trainer.enable_checkpointing", "true"])
    (checkpoint,) = (tmp_path / "fitted").glob("**/*.ckpt")
    main(["prune", *options, "--output_dir", "pruned", "--ckpt_path", str(checkpoint)])
    fitted, pruned = (load_model(str(tmp_path / name / "model")) for name in ("fitted", "pruned"))
    assert all(torch.equal(a, b) for a, b in zip(fitted.parameters(), pruned.parameters(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("command", "name"), [("validate", "val"), ("test", "test")])
def test_validate_and_test_report_the_perplexity_of_their_windows(options, bytes_folder, capsys, command, name):
    batches = ["--trainer.limit_val_batches", "2", "--trainer.limit_test_batches", "2"]
    main([command, *options, "--model.name_or_path", str(bytes_folder), *batches])
    value = float(cells(capsys.readouterr().out, f"{name}/perplexity")[1])
    windows = pack_windows(python_docs_texts("heldout"), byte_tokenizer(), 64)[:8]
    model = load_model(str(bytes_folder))
    assert value == pytest.approx(perplexity_by_definition(model, windows), rel=1e-5)
    assert value != pytest.approx(perplexity_by_definition(model, windows[:4]), rel=1e-3)


@pytest.fixture
def no_training(monkeypatch):
    from maiht_lightning import CausalLMModule

    monkeypatch.setattr(CausalLMModule, "training_step", lambda *_: pytest.fail("training began"))


@pytest.mark.slow
@pytest.mark.parametrize("command", ["fit", "prune"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--pruning.method", "foo"], "method must be one of maiht, "),
        (["--pruning.sparsity", "1.5"], "sparsity must be the fraction of zeros"),
        (["--pruning.sparsity", "0.7", "--pruning.pattern", "2:4"], "means a sparsity of 0.5"),
        (["--pruning.pattern", "3:2"], "pattern '3:2' keeps N = 3 of M = 2"),
        (["--pruning.pattern", "2:5"], "divisible by 5"),
        (["--pruning.config", "fastest"], "config must be a preset"),
        (["--pruning.config.mu", "-1"], "mu must be a finite number"),
        (["--pruning.calibration.init_args.samples", "100000"], "the text must fill 100000 window(s)"),
        (
            ["--pruning.evaluation.perplexity", "[wikitext3]"],
            "text must be one of wikitext2, c4, python_docs, or the path of a .txt file, but found 'wikitext3'",
        ),
        (["--model.name_or_path", "./nowhere"], "no model at"),
        (["--model.learning_rate", "-1"], "learning_rate must be"),
        (["--no.such.option", "1"], "no.such.option"),
    ],
)
def test_bad_input_is_answered_before_training(options, no_training, capsys, tmp_path, command, change, message):
    with pytest.raises(SystemExit) as stop:
        main([command, *options, *change])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert message in " ".join(said.split())
    assert "Traceback" not in said
    assert not list(tmp_path.glob("runs/*/model"))


@pytest.mark.slow
def test_missing_data_folder_is_named_before_training(options, no_training, capsys, monkeypatch):
    monkeypatch.setenv("MAIHT_DATA_DIR", "/nowhere")
    for change in (["--data", "WikiText2DataModule"], ["--pruning.calibration", "C4Calibration"]):
        with pytest.raises(SystemExit):
            main(["fit", *options, *change])
        assert "MAIHT_DATA_DIR must name a folder, but found none at /nowhere" in capsys.readouterr().err


def test_model_without_decoder_blocks_is_refused_before_training(options, no_training, tiny_folder, capsys, tmp_path):
    from transformers import MambaConfig

    MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=0).save_pretrained(tmp_path / "empty")
    for file in tiny_folder.glob("tokenizer*"):
        (tmp_path / "empty" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(SystemExit):
        main(["fit", *options, "--model.name_or_path", str(tmp_path / "empty" / "config.json")])
    assert "has no decoder blocks" in capsys.readouterr().err


@pytest.mark.slow
def test_errors_inside_libraries_keep_their_traceback(options, monkeypatch):
    from maiht_lightning import CausalLMModule

    monkeypatch.setattr(CausalLMModule, "training_step", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        main(["fit", *options])


@pytest.mark.parametrize("command", ["fit", "prune"])
def test_all_settings_are_listed(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help_all"])
    text = capsys.readouterr().out
    for line in ("--output_dir", "--pruning.method", "Highest learning rate", "Fraction of zeros"):
        assert line in text


@pytest.mark.slow
def test_killed_while_pruning_and_resumed(options, tmp_path):
    command = [*python(), "-m", "maiht_lightning.cli", "prune", *options, "--pruning.keep_journal", "true"]
    environment = {**os.environ, "PYTHONPATH": os.path.join(ROOT, "src")}
    subprocess.run([*command, "--output_dir", "whole"], check=True, env=environment, capture_output=True)

    first = tmp_path / "broken" / "journal" / "block_00000.safetensors"
    process = subprocess.Popen([*command, "--output_dir", "broken"], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    kill(process)
    assert first.exists()
    stamp = first.stat().st_mtime_ns
    subprocess.run([*command, "--output_dir", "broken"], check=True, env=environment, capture_output=True)
    assert first.stat().st_mtime_ns == stamp  # not solved again
    whole, resumed = (load_model(str(tmp_path / name / "model")) for name in ("whole", "broken"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_parents_wandb_service_does_not_hold_a_killed_run(options, tmp_path):
    """A process that has used W&B hands its service to its children, which a killed run would leave in use there."""
    program = "import os, wandb; wandb.init(mode='offline'); print(os.environ['WANDB_SERVICE'], flush=True); input()"
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    try:
        environment = {
            **os.environ,
            "PYTHONPATH": os.path.join(ROOT, "src"),
            "WANDB_SERVICE": parent.stdout.readline().strip(),
        }
        logger = '{"class_path": "WandbLogger", "init_args": {"offline": true, "project": "test"}}'
        command = [*python(), "-m", "maiht_lightning.cli", "prune", *options, "--output_dir", "out"]
        command += ["--trainer.logger", logger]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if list(tmp_path.glob("out/journal/block_*.safetensors")):
                break
            time.sleep(0.002)
        assert list(tmp_path.glob("out/wandb/offline-run-*"))
        assert kill(process) == -signal.SIGKILL
        again = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
        assert again.returncode == 0, again.stderr[-3000:]
    finally:
        parent.communicate("\n")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["finished"]


@pytest.mark.slow
def test_what_failed_beside_the_pruning_is_told_at_the_end(options, no_figures, capsys, tmp_path, monkeypatch):
    def measure(*_, **__):
        raise ZeroDivisionError("no tokens")

    monkeypatch.setattr("maiht_lightning.evaluation.evaluation.perplexity", measure)
    for told in ("maiht: failed: ", "maiht: the run in out is finished"):
        with pytest.raises(SystemExit) as stop:
            main(["prune", *options, "--output_dir", "out"])
        assert stop.value.code == 1
        said = capsys.readouterr().err
        assert told in said
        assert "evaluate pruned, python_docs: ZeroDivisionError: no tokens" in said
    assert zeros_of(tmp_path / "out" / "model")[0][0] > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("number", "moment"), [(signal.SIGTERM, "training"), (signal.SIGINT, "sparse")])
def test_told_to_stop_and_resumed(options, bytes_folder, tmp_path, number, moment):
    """Exit status, the command that resumes, and the same weights."""
    every = '[{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"every_n_train_steps": 1}}]'
    more = ["--trainer.max_steps", "40", "--trainer.callbacks", every, "--trainer.enable_checkpointing", "true"]
    more += ["--sparse_finetune.max_steps", "40", "--trainer.limit_train_batches", "100", "--pruning.method", "wanda"]
    more += ["--model.name_or_path", str(bytes_folder)]
    command = [*python(), "-m", "maiht_lightning.cli", "fit", *options, *more]
    environment = {**os.environ, "PYTHONPATH": os.path.join(ROOT, "src"), "OMP_NUM_THREADS": "1"}
    with open("out.log", "w") as log:
        process = subprocess.Popen([*command, "--output_dir", "out"], env=environment, stderr=log)
    pattern = {"training": "out/**/checkpoints/*.ckpt", "sparse": "out/sparse_checkpoints/*.ckpt"}[moment]
    deadline = time.monotonic() + 600
    while not list(tmp_path.glob(pattern)) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait() == 128 + number, (tmp_path / "out.log").read_text()[-3000:]
    said = (tmp_path / "out.log").read_text()
    assert "maiht: stopping after this training step" in said
    (line,) = [line for line in said.splitlines() if line.startswith("maiht fit ")]
    assert (tmp_path / "out" / "resume.ckpt").exists()
    assert not (tmp_path / "out" / "model_finetuned").exists()
    again = [*python(), "-m", "maiht_lightning.cli", *shlex.split(line)[1:]]
    assert subprocess.run(again, env=environment, capture_output=True, check=False).returncode == 0
    main([*command[command.index("fit") :], "--output_dir", "whole"])
    for name in ("model", "model_finetuned"):
        one, two = (load_model(str(tmp_path / run / name)) for run in ("whole", "out"))
        assert same_weights(one, two)


DIES = """
import os, signal, sys
from maiht_lightning import CausalLMModule
from maiht_lightning.cli import main
from maiht_lightning.pruning.journal import Journal

call, calls, save, step = int(sys.argv.pop(1)), [0], Journal.save, CausalLMModule.training_step

def saved(*arguments):
    save(*arguments)
    calls[0] += 1
    if calls[0] == call:
        os.kill(os.getpid(), signal.SIGKILL)

def counted(*arguments):
    print("a training step", flush=True)
    return step(*arguments)

Journal.save, CausalLMModule.training_step = saved, counted
main()
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_while_pruning_within_training_and_resumed(options, bytes_folder, tmp_path):
    """With SIGKILL after the first block of each of two prunings: no step is made twice."""
    more = ["--trainer.max_steps", "6", "--pruning.prune_at", "{step:2: 0.3, step:4: 0.5}"]
    more += ["--model.name_or_path", str(bytes_folder), "--pruning.method", "wanda", "--output_dir"]
    environment = {**os.environ, "PYTHONPATH": os.path.join(ROOT, "src"), "OMP_NUM_THREADS": "1"}
    steps = []
    for folder, call, status in (("out", 1, -9), ("out", 2, -9), ("out", 0, 0), ("whole", 0, 0)):
        command = [*python(), "-c", DIES, str(call), "fit", *options, *more, folder]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr[-3000:]
        steps.append(done.stdout.count("a training step"))
    assert steps == [2, 2, 2, 6]
    for name in ("model", "model_finetuned"):
        assert same_weights(*(load_model(str(tmp_path / run / name)) for run in ("whole", "out")))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quickstart", "smollm2_wikitext2", "smollm2_recovery", "llama7b_wikitext2"])
def test_every_configuration_is_valid_for_fit_and_prune(name, capsys):
    path = os.path.join(ROOT, "configs", f"{name}.yaml")
    for command in ("fit", "prune"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--config", path, "--print_config"])
        assert not stop.value.code
        assert yaml.safe_load(capsys.readouterr().out)["pruning"]["method"] == "maiht"


def test_the_configuration_printed_is_the_files_with_the_options(options, tmp_path, capsys):
    changes = ["--pruning.config.mu", "0.25", "--pruning.prune_at", "{step:1: 0.3, end: 0.6}", "--data.seqlen", "32"]
    with pytest.raises(SystemExit):
        main(["fit", *options, *changes, "--print_config"])
    printed = capsys.readouterr().out
    found, given = yaml.safe_load(printed), yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert found["pruning"]["config"]["mu"] == 0.25
    assert found["pruning"]["prune_at"] == {"step:1": 0.3, "end": 0.6}
    assert found["data"]["init_args"]["seqlen"] == 32
    assert found["data"]["init_args"]["batch_size"] == 4
    for name in ("samples", "seqlen"):
        assert found["pruning"]["calibration"]["init_args"][name] == given["pruning"]["calibration"]["init_args"][name]
    for name, value in given["pruning"]["evaluation"].items():
        assert found["pruning"]["evaluation"][name] == value
    # As a file, it is the same configuration.
    (tmp_path / "printed.yaml").write_text(printed)
    with pytest.raises(SystemExit):
        main(["fit", "--config", "printed.yaml", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out) == found


@pytest.mark.slow
def test_an_error_of_the_users_is_one_line_and_exit_status_2(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.path.join(ROOT, "src")}
    command = [*python(), "-m", "maiht_lightning.cli", "evaluate", "--model", "/nowhere/at/all"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    first, hint = [line for line in done.stderr.splitlines() if "maiht" in line.lower()][-2:]
    assert first.startswith("maiht: error: no model at /nowhere/at/all")
    assert hint == "(MAIHT_TRACEBACK=1 shows where.)"
    assert "Traceback" not in done.stderr
    environment["MAIHT_TRACEBACK"] = "1"
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("given", "expected"), [(None, "1000"), ("77", "77")])
def test_threads_of_the_command_spin_moderately_unless_the_user_decides(given, expected):
    """libgomp tells what it has read when torch loads it."""
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE", "PYTHONPATH": os.path.join(ROOT, "src")}
    environment |= {} if given is None else {"GOMP_SPINCOUNT": given}
    done = subprocess.run(
        [sys.executable, "-m", "maiht_lightning.cli", "estimate", "--model", "nowhere/at/all"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    told = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    if not told:
        pytest.skip("this torch has another OpenMP than GNU's")
    assert set(told) == {expected}


def test_scripts_set_the_spinning_before_torch_is_loaded():
    folder, seen = os.path.join(ROOT, "scripts"), 0
    for name in sorted(os.listdir(folder)):
        if not name.endswith((".py", ".sh")):
            continue
        with open(os.path.join(folder, name)) as file:
            text = file.read()
        uses = re.search(
            r"^(import torch|from (torch|maiht_lightning|transformers)\b)|^exec \.venv", text, re.MULTILINE
        )
        # Three of them load no torch, and one is the parts of another.
        if uses and name not in ("render_docs.py", "docs.sh", "docs_hooks.py", "gpu_parts.py"):
            seen += 1
            assert 0 < text.find("GOMP_SPINCOUNT") < uses.start(), name
    assert seen >= 10
