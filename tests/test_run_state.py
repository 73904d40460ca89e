"""What `maiht` keeps of a run, the signals that stop it, and the rows that W&B gets once."""

import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import WandbLogger

from maiht_lightning.interrupts import Interrupted, Interrupts
from maiht_lightning.reporting.wandb_rows import WandbRows
from maiht_lightning.training.run_state import RunState, last_point, move_aside, resume_command

# ---- run.json


def test_a_state_is_read_back_and_tells_what_differs(tmp_path):
    assert RunState.read(tmp_path) is None
    state = RunState("fit", {"trainer": {"max_steps": 3, "callbacks": [{"class_path": "A"}]}, "seed": 0}, ["abc"])
    state.write(tmp_path)
    found = RunState.read(tmp_path)
    assert found == state
    assert found.differences(state) == []
    settings = {
        "trainer": {"max_steps": 6, "callbacks": [{"class_path": "B"}], "enable_progress_bar": False},
        "seed": 0,
        "new": [1],
    }
    assert found.differences(RunState("prune", settings)) == [
        "command: fit, now prune",
        "trainer.max_steps: 3, now 6",
        'trainer.callbacks.0.class_path: "A", now "B"',
        "new: null, now [1]",
    ]
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is not a run's state.*--fresh"):
        RunState.read(tmp_path)


def test_a_folder_is_renamed_by_a_number(tmp_path):
    (tmp_path / "run.1").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "file").touch()
    assert move_aside(tmp_path / "run") == tmp_path / "run.2"
    assert (tmp_path / "run.2" / "file").exists()
    assert not (tmp_path / "run").exists()


def checkpoint(path, step, *, earlier=None, done=0, **content):
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"done": done, "earlier": earlier, "trained": False}
    torch.save(
        {"global_step": step, "optimizer_states": [], "callbacks": {"MAIHTPruning": state}, **content},
        path,
    )


def test_the_last_point_has_most_of_the_run_behind_it(tmp_path):
    assert last_point(tmp_path) is None
    checkpoint(tmp_path / "logs" / "last.ckpt", 6)
    checkpoint(tmp_path / "logs" / "epoch=0.ckpt", 4)
    assert last_point(tmp_path).path.name == "last.ckpt"
    # Of the same step, ours has the counters of a fit that has ended.
    checkpoint(tmp_path / "resume.ckpt", 6)
    os.utime(tmp_path / "resume.ckpt", (1, 1))
    assert last_point(tmp_path).path.name == "resume.ckpt"
    checkpoint(tmp_path / "resume.ckpt", 6, done=1)
    assert not last_point(tmp_path).is_sparse
    checkpoint(tmp_path / "sparse_checkpoints" / "last.ckpt", 7, earlier={"epochs": 1, "steps": 6}, done=1)
    found = last_point(tmp_path)
    assert (found.path.parent.name, found.step, found.is_sparse) == ("sparse_checkpoints", 7, True)


def test_files_that_cannot_be_resumed_from_are_left_out(tmp_path):
    checkpoint(tmp_path / "good.ckpt", 2)
    torch.save({"global_step": 9, "callbacks": {"MAIHTPruning": {"done": 0, "earlier": None}}}, tmp_path / "light.ckpt")
    (tmp_path / "half.ckpt").write_bytes((tmp_path / "good.ckpt").read_bytes()[:200])
    torch.save({"global_step": 9, "optimizer_states": [], "callbacks": {}}, tmp_path / "other.ckpt")
    with pytest.warns(UserWarning, match=r"half\.ckpt cannot be resumed from"):
        assert last_point(tmp_path).path.name == "good.ckpt"


def test_the_command_that_resumes_names_the_folder():
    assert resume_command(["fit", "--config", "a b.yaml"], "runs/x") == (
        "maiht fit --config 'a b.yaml' --output_dir runs/x"
    )
    assert resume_command(["fit", "--output_dir", "y", "--fresh"], "y") == "maiht fit --output_dir y"
    assert resume_command(["fit", "--output_dir=y"], "y") == "maiht fit --output_dir=y"


# ---- Signals


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_where_it_comes_and_after_what_is_held(number):
    interrupts, done = Interrupts(), []
    before = signal.getsignal(number)

    def work():
        with interrupts.held():
            with interrupts.held():
                send(number)
                done.append("inner")
            done.append("outer")
        done.append("later")

    with pytest.raises(Interrupted) as stopped, interrupts.listening():
        work()
    assert done == ["inner", "outer"]
    with interrupts.held():
        pass  # nobody listens any more
    assert stopped.value.code == 128 + number
    with pytest.raises(Interrupted), interrupts.listening():
        send(number)
    assert signal.getsignal(number) == before


def test_while_training_lightning_stops_and_a_second_time_nothing_waits(capsys):
    interrupts, seen = Interrupts(), []

    def train():
        ours = signal.getsignal(signal.SIGTERM)

        # As Lightning does: its own handler first, then the one that was there.
        def composed(number, frame):
            seen.append(number)
            ours(number, frame)

        signal.signal(signal.SIGTERM, composed)
        interrupts.training = True
        send(signal.SIGINT)
        assert (seen, interrupts.signum) == ([signal.SIGTERM], signal.SIGINT)
        send(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), interrupts.listening():
        train()
    assert "stopping after this training step" in capsys.readouterr().err


def test_what_fails_while_held_is_raised_and_not_the_signal():
    interrupts = Interrupts()

    def write():
        with interrupts.held():
            send(signal.SIGTERM)
            raise OSError("full")

    with pytest.raises(OSError, match="full"), interrupts.listening():
        write()


# ---- W&B's rows


class Server:
    """Stands for W&B's side of a run: it keeps rows in order, and knows how many it has."""

    def __init__(self, rows=(), *, offline=False, folder=None):
        self.rows, self.starting_step = list(rows), 0 if offline else len(rows)
        self.offline, self.id, self.dir = offline, "abc", folder

    def log(self, row):
        self.rows.append(row)


def rows_logger(tmp_path, server):
    logger = WandbLogger(save_dir=tmp_path, offline=server.offline, experiment=server)
    WandbRows(logger, tmp_path / "rows.jsonl")
    return logger


def test_rows_that_were_logged_are_not_logged_again_and_lost_ones_are(tmp_path):
    server = Server()
    logger = rows_logger(tmp_path, server)
    for step in range(4):
        logger.log_metrics({"loss": torch.tensor(step / 2), "epoch": 0}, step)
    logger.log_metrics({"val": 7.0}, 3)
    whole = [{k: float(v) for k, v in row.items()} for row in server.rows]

    # The last two were lost with the process, and the file's last line was not finished.
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"row": 5, "st')
    server = Server(whole[:3])
    logger = rows_logger(tmp_path, server)
    for step in (2, 3):
        logger.log_metrics({"loss": -1.0, "epoch": 0}, step)
    assert server.rows == whole
    logger.log_metrics({"loss": 2.0, "epoch": 0}, 4)
    assert server.rows == [*whole, {"loss": 2.0, "epoch": 0, "trainer/global_step": 4}]
    # A third process knows the rows of both.
    server = Server(server.rows)
    rows_logger(tmp_path, server).log_metrics({"loss": 2.0, "epoch": 0}, 4)
    assert len(server.rows) == 6


def test_a_resumed_pruning_logs_the_blocks_that_are_left(tmp_path):
    """All of them at one step, with the same names."""
    server = Server()
    logger = rows_logger(tmp_path, server)
    for block in range(2):
        logger.log_metrics({"prune/block": block, "prune/relative_error": 0.5}, 8)
    server = Server(server.rows)
    logger = rows_logger(tmp_path, server)
    for block in range(4):
        logger.log_metrics({"prune/block": block, "prune/relative_error": 0.5}, 8)
    assert [row["prune/block"] for row in server.rows] == [0, 1, 2, 3]


def test_the_summary_of_a_pruning_is_one_row_whoever_made_it(tmp_path):
    """A process that takes the blocks from the journal knows no rate."""
    server = Server()
    rows_logger(tmp_path, server).log_metrics({"pruned/sparsity": 0.5, "seconds/solve": 2.0, "tflops/solve": 1.0}, 8)
    server = Server(server.rows)
    rows_logger(tmp_path, server).log_metrics({"pruned/sparsity": 0.5, "seconds/solve": 2.0}, 8)
    assert len(server.rows) == 1


def test_a_run_on_disk_is_whole_in_its_last_file(tmp_path):
    folders = [tmp_path / "wandb" / f"offline-run-{number}-abc" / "files" for number in (1, 2)]
    other = tmp_path / "wandb" / "offline-run-1-xyz"
    for folder in (folders[0], other):
        folder.mkdir(parents=True)
    rows_logger(tmp_path, Server(offline=True, folder=str(folders[0]))).log_metrics({"loss": 1.0}, 0)
    assert folders[0].exists()
    folders[1].mkdir(parents=True)
    server = Server(offline=True, folder=str(folders[1]))
    rows_logger(tmp_path, server).log_metrics({"loss": 0.5}, 1)
    assert [row["loss"] for row in server.rows] == [1.0, 0.5]
    assert sorted(path.name for path in (tmp_path / "wandb").iterdir()) == [
        "offline-run-1-xyz",
        "offline-run-2-abc",
        "superseded",
    ]


def test_what_is_no_number_is_logged_each_time_and_not_kept(tmp_path):
    server = Server()
    logger = rows_logger(tmp_path, server)
    logger.log_metrics({"loss": 1.0}, 0)
    logger.log_metrics({"table": SimpleNamespace()}, 0)
    logger.log_metrics({"loss": float("nan")}, 1)
    assert len(server.rows) == 3
    kept = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["row"], row["step"]) for row in kept] == [(0, 0), (2, 1)]
