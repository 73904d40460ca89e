"""Examples for clusters and sweeps: the SLURM job and the W&B sweep, with stand-ins for what starts them."""

import json
import os
import re
import shlex
import signal
import subprocess
import time
from itertools import product
from pathlib import Path

import pytest
import yaml

from helpers.byte_model import save_folder
from helpers.terminal import environment
from helpers.wandb_file import finished_records, read_run
from helpers.warm import python
from maiht_lightning import cli

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs" / "examples"
JOB = EXAMPLES / "slurm.sh"
SWEEP = EXAMPLES / "sweep.yaml"


def add_program(folder, name, script):
    (folder / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def programs(tmp_path):
    """A folder for PATH, in which `maiht` is the one that is tested."""
    folder = tmp_path / "bin"
    folder.mkdir()
    add_program(folder, "maiht", f'exec {shlex.join(python())} -m maiht_lightning.cli "$@"')
    return folder


def small_settings(model, **changes):
    """Settings of a run of seconds, as a file has them."""
    return {
        "seed_everything": 0,
        "model": {"name_or_path": str(model)},
        "data": {"class_path": "PythonDocsDataModule", "init_args": {"seqlen": 32, "batch_size": 2}},
        "trainer": {"accelerator": "cpu", "limit_val_batches": 0, "logger": False, **changes},
        "pruning": {
            "method": "wanda",
            "calibration": {"class_path": "PythonDocsCalibration", "init_args": {"samples": 4, "seqlen": 32}},
            "evaluation": {"perplexity": ["python_docs"], "seqlen": 32, "max_windows": 4},
        },
    }


# ---- SLURM


def directives():
    """The options of the `#SBATCH` lines."""
    found = re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", JOB.read_text(), re.MULTILINE)
    return dict(found)


class Slurm:
    """What SLURM does with one job: runs its script, signals it or its step, and starts it again when it is queued."""

    def __init__(self, folder, programs):
        self.folder = folder
        self.log = folder / "slurm-7.out"
        # srun's own process is the task here, with what a task finds in its environment.
        self.path = f"{programs}:{os.environ['PATH']}"
        add_program(
            programs,
            "srun",
            'while [ "${1#--}" != "$1" ]; do shift; done\n'
            "export SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_NTASKS=1\n"
            'echo $$ > step; exec "$@"',
        )
        add_program(programs, "scontrol", 'echo "$@" >> queued')

    def run(self, *arguments, when=None):
        """Run the job once, with the signal sent as the script asks when the log says `when`; returns its status."""
        assert directives()["open-mode"] == "append"
        allocation = {
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NAME": directives()["job-name"],
            "SLURM_NTASKS": directives()["ntasks-per-node"],
            "SLURM_NTASKS_PER_NODE": directives()["ntasks-per-node"],
            "SLURM_NNODES": directives()["nodes"],
            "SLURM_NODELIST": "localhost",
        }
        with self.log.open("a") as log:
            job = subprocess.Popen(
                ["bash", JOB, *map(str, arguments)],
                cwd=self.folder,
                env=environment(PATH=self.path, **allocation),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        if when is not None:
            while job.poll() is None and when not in self.log.read_text():
                time.sleep(0.02)
            name, _, before = directives()["signal"].partition("@")
            assert int(before) >= 60
            # To the step's tasks, but with B: to the script alone.
            target = job.pid if name.startswith("B:") else int((self.folder / "step").read_text())
            os.kill(target, getattr(signal, f"SIG{name.removeprefix('B:')}"))
        return job.wait()

    def requeued(self):
        """The jobs that were put into the queue again, since this was asked before."""
        note = self.folder / "queued"
        lines = note.read_text().splitlines() if note.exists() else []
        note.unlink(missing_ok=True)
        return lines


@pytest.mark.slow
def test_the_slurm_job_is_queued_again_and_resumes_to_the_end(tmp_path, programs):
    """The real command, stopped in training, then left alone; another run ends with an error."""
    assert "requeue" in directives()
    settings = small_settings(save_folder(tmp_path / "model"), max_steps=400, log_every_n_steps=1)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    slurm = Slurm(tmp_path, programs)

    assert slurm.run("run.yaml", "runs/one", when="Training:") == 143, slurm.log.read_text()[-3000:]
    assert slurm.requeued() == ["requeue 7"]
    assert not (tmp_path / "runs" / "one" / "model").exists()

    assert slurm.run("run.yaml", "runs/one") == 0, slurm.log.read_text()[-3000:]
    assert slurm.requeued() == []
    said = slurm.log.read_text()
    (step,) = re.findall(r"the run resumes after step (\d+)", said)
    assert 0 < int(step) < 400
    summary = json.loads((tmp_path / "runs" / "one" / "summary.json").read_text())
    assert summary["failures"] == []
    assert list(summary["stages"]) == ["dense", "pruned"]
    assert (tmp_path / "runs" / "one" / "model" / "config.json").exists()

    # An error is no reason to try for ever; words after the folder are options.
    assert slurm.run("run.yaml", "runs/two", "--pruning.sparsity", "2") == 2
    assert "sparsity" in slurm.log.read_text().removeprefix(said)
    assert slurm.requeued() == []


# ---- W&B sweeps


def combinations():
    """The runs of the sweep's grid, as W&B hands them to its agent."""
    parameters = yaml.safe_load(SWEEP.read_text())["parameters"]
    for values in product(*(parameter["values"] for parameter in parameters.values())):
        yield {name: {"value": value} for name, value in zip(parameters, values, strict=True)}


def agents_command(arguments):
    """The words that W&B's agent starts a run with, made by its own functions."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = yaml.safe_load(SWEEP.read_text())
    options = create_sweep_command_args({"args": arguments})["args"]
    command = create_sweep_command(sweep["command"])
    return [word for part in command for word in (options if part == "${args}" else [part])]


@pytest.mark.slow
def test_the_sweeps_combinations_are_runs(monkeypatch, capsys):
    """The first and the last of the grid, with the configuration that the sweep names."""
    monkeypatch.chdir(ROOT)
    runs = list(combinations())
    assert len(runs) == 12
    for arguments in (runs[0], runs[-1]):
        program, *words = agents_command(arguments)
        assert program == "maiht"
        with pytest.raises(SystemExit) as stopped:
            cli.main([*words, "--print_config"])
        assert not stopped.value.code
        found = yaml.safe_load(capsys.readouterr().out)
        assert found["trainer"]["logger"]["init_args"]["offline"] is False
        for name, argument in arguments.items():
            assert found["pruning"][name.removeprefix("pruning.")] == argument["value"]


@pytest.mark.slow
def test_a_run_of_the_sweep_is_the_one_that_the_agent_asked_for(tmp_path, programs, small_data):
    """One combination, by the agent's command and in its environment, on a small model and offline."""
    sweep = yaml.safe_load(SWEEP.read_text())
    arguments = {name: {"value": argument["value"]} for name, argument in list(combinations())[-1].items()}
    logger = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"project": "sweep", "offline": True}}
    settings = small_settings(save_folder(tmp_path / "small"), logger=logger)
    settings["pruning"]["evaluation"]["perplexity"] = ["wikitext2"]
    command = agents_command(arguments)
    config = tmp_path / command[command.index("--config") + 1]
    config.parent.mkdir()
    config.write_text(yaml.safe_dump(settings))
    (tmp_path / "parameters.yaml").write_text(yaml.safe_dump({"wandb_version": 1, **arguments}))
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment(
            PATH=f"{programs}:{os.environ['PATH']}",
            MAIHT_DATA_DIR=str(small_data),
            WANDB_MODE="offline",
            WANDB_SWEEP_ID="sweep1",
            WANDB_RUN_ID="fromtheagent",
            WANDB_SWEEP_PARAM_PATH=str(tmp_path / "parameters.yaml"),
        ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = (tmp_path / "runs").iterdir()
    history, found = read_run(run)
    # What the sweep ranks its runs by.
    (value,) = [row[sweep["metric"]["name"]] for row in history if sweep["metric"]["name"] in row]
    assert value == json.loads((run / "summary.json").read_text())["stages"]["pruned"]["perplexity"]["wikitext2"]
    assert {name: found["pruning"][name] for name in ("method", "sparsity")} == {"method": "wanda", "sparsity": 0.6}
    # As a column beside the sweep's other runs.
    assert found["pruning.sparsity"] == 0.6
    record = next(each.run for each in finished_records(run) if each.WhichOneof("record_type") == "run")
    assert (record.run_id, record.sweep_id) == ("fromtheagent", "sweep1")
