"""Every file that is to outlast a crash: a signal waits for it, and a disk that fails leaves the older one."""

import errno
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import WandbLogger

from helpers.byte_model import byte_tokenizer
from helpers.own_module import OwnModule, trainer
from maiht_lightning import save_compact
from maiht_lightning.callbacks.resume_point import save_point
from maiht_lightning.interrupts import Interrupted, interrupts
from maiht_lightning.models.durable import replacing
from maiht_lightning.models.saving import save_model
from maiht_lightning.pruning.journal import Journal, drop_weights
from maiht_lightning.records import LayerRecord
from maiht_lightning.reporting.figure_style import blank_figure, save_png
from maiht_lightning.reporting.run.page import write_page
from maiht_lightning.reporting.summary import Summary, write_layers
from maiht_lightning.reporting.wandb_rows import WandbRows
from maiht_lightning.training.run_state import RunState

RECORD = LayerRecord("model.layers.0.q", 0, (2, 2), 2, 0.1, [], [], 0.0, "q")


def journal(folder):
    return Journal(folder / "journal", {"blocks": ["a"], "model": "b"})


def prepare(what, folder, model):
    """Do what comes before a write."""
    if what == "journal block":
        journal(folder)
    if what == "journal records":
        journal_block(folder, model)


def journal_block(folder, model):
    journal(folder).save(0, {"q": torch.eye(2)}, [RECORD])


def journal_settings(folder, model):
    journal(folder)


def journal_records(folder, model):
    drop_weights(folder / "journal")


def resume_point(folder, model):
    class Saving(OwnModule):
        def on_train_end(self):
            save_point(self.trainer, folder)

    trainer(max_steps=1).fit(Saving(model))


def rows(folder, model):
    server = SimpleNamespace(log=lambda row: None, starting_step=0, offline=False)
    logger = WandbLogger(save_dir=folder, experiment=server)
    WandbRows(logger, folder / "rows.jsonl").log_metrics({"loss": 1.0}, 0)


# What writes a file of a run, and the file.
WRITERS = {
    "journal block": (journal_block, "journal/block_00000.safetensors"),
    "journal settings": (journal_settings, "journal/settings.json"),
    "journal records": (journal_records, "journal/records.json"),
    "model": (lambda folder, model: save_model(model, folder / "model", byte_tokenizer()), "model"),
    "compact": (lambda folder, model: save_compact(model, folder / "model_compact"), "model_compact"),
    "resume.ckpt": (resume_point, "resume.ckpt"),
    "run.json": (lambda folder, model: RunState("fit", {}).write(folder), "run.json"),
    "summary.json": (lambda folder, model: Summary("wanda", 0.5, "row").write(folder), "summary.json"),
    "layers.csv": (lambda folder, model: write_layers(folder, [RECORD]), "layers.csv"),
    "report.html": (
        lambda folder, model: write_page(folder, Summary("wanda", 0.5, "row"), [RECORD], {}, {}, {}, ""),
        "report.html",
    ),
    "figure": (lambda folder, model: save_png(blank_figure(1, 1), folder / "figure.png"), "figure.png"),
}


def content(path):
    """The bytes of a file, or of those in a folder by their names."""
    return {file.name: file.read_bytes() for file in [path, *path.rglob("*")] if file.is_file()}


@pytest.mark.parametrize("what", WRITERS)
def test_a_signal_waits_until_a_file_is_whole(tiny_llama, tmp_path, monkeypatch, what):
    write, name = WRITERS[what]
    prepare(what, tmp_path, None)
    fsync, synced = os.fsync, []

    def interrupted(descriptor):
        synced.append(descriptor)
        if len(synced) == 1:
            signal.raise_signal(signal.SIGTERM)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(Interrupted), interrupts.listening():
        write(tmp_path, tiny_llama(vocab_size=64))
    assert (tmp_path / name).exists()
    assert not list(tmp_path.rglob("*.partial"))
    # The name is on the disk as well.
    assert len(synced) >= 2


def test_a_signal_waits_until_a_row_is_whole(tmp_path, monkeypatch):
    real = Path.open

    def opened(self, mode="r", *args, **kwargs):
        if mode == "a":
            signal.raise_signal(signal.SIGTERM)
        return real(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(Interrupted), interrupts.listening():
        rows(tmp_path, None)
    assert (tmp_path / "rows.jsonl").read_text().endswith("}\n")


ONCE = ("journal settings", "journal records")


@pytest.mark.parametrize(
    ("what", "older"), [(w, older) for w in WRITERS for older in (0, 1) if not older or w not in ONCE]
)
def test_a_disk_that_fails_leaves_the_older_file(tiny_llama, tmp_path, monkeypatch, what, older):
    write, name = WRITERS[what]
    model = tiny_llama(vocab_size=64)
    prepare(what, tmp_path, model)
    if older:
        write(tmp_path, model)
    before = content(tmp_path / name)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=rf"{name} could not be written: .*No space left.*start the same again"):
            write(tmp_path, model)
    assert content(tmp_path / name) == before
    assert not list(tmp_path.rglob("*.partial"))
    write(tmp_path, model)
    assert content(tmp_path / name)


def test_an_error_that_is_not_the_disks_stays_what_it_is(tmp_path):
    with pytest.raises(RuntimeError, match=r"^some tensors share memory$"), replacing(tmp_path / "file"):
        raise RuntimeError("some tensors share memory")
    assert not list(tmp_path.iterdir())


def test_rows_that_cannot_be_kept_are_logged_all_the_same(tmp_path):
    logged = []
    server = SimpleNamespace(log=logged.append, starting_step=0, offline=False)
    logger = WandbLogger(save_dir=tmp_path, experiment=server)
    kept = WandbRows(logger, tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").mkdir()
    with pytest.warns(UserWarning, match=r"rows\.jsonl could not be written"):
        logger.log_metrics({"loss": 1.0}, 0)
    (tmp_path / "rows.jsonl").rmdir()
    logger.log_metrics({"loss": 0.5}, 1)
    assert [row["loss"] for row in logged] == [1.0, 0.5]
    assert "rows.jsonl could not be written" in kept.problem
    assert not (tmp_path / "rows.jsonl").exists()
