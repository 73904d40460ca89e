"""Files that an older version wrote: checkpoints resume, configurations run, and finished runs can be read.

See `compat/README.md` for what they are and how they were made.
"""

import importlib
import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from compat.setting import INTERRUPTED_AT, RUNS, write_setting
from maiht_lightning import FrozenSparsity, MAIHTPruning, cli, prune
from maiht_lightning.models.loading import load_model
from maiht_lightning.models.sparsity import count_zeros
from maiht_lightning.pruning.journal import Journal, read_records
from maiht_lightning.reporting.comparison.runs import read_run

COMPAT = Path(__file__).parent / "compat"


@pytest.fixture
def here(tmp_path, monkeypatch, no_figures):
    """An empty folder with the texts and the model of the older runs, from which commands are started."""
    write_setting(tmp_path)
    monkeypatch.setenv("MAIHT_DATA_DIR", "texts")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def checkpoint(path):
    return torch.load(path, weights_only=True)


def check_end(folder, name):
    """A resumed run ends as the older version's did, which was not interrupted."""
    found, expected = load_file(folder / "model_finetuned" / "model.safetensors"), load_file(COMPAT / name)
    assert found.keys() == expected.keys()
    for key, weight in expected.items():
        assert torch.equal(found[key] == 0, weight == 0), key
        torch.testing.assert_close(found[key], weight, rtol=1e-3, atol=1e-4)
    before = checkpoint(COMPAT / name.replace("finetuned.safetensors", "interrupted.ckpt"))["state_dict"]
    assert not any(torch.allclose(before[f"model.{key}"], weight, atol=1e-4) for key, weight in expected.items())


@pytest.mark.slow
def test_a_fit_interrupted_between_two_prunings_resumes(here):
    """Half of it is done: the second pruning comes, after it an epoch, and zeros only grow."""
    start = checkpoint(COMPAT / "schedule" / "interrupted.ckpt")
    assert start["callbacks"]["MAIHTPruning"]["done"] == 1
    command = ["--config", str(COMPAT / "schedule" / "config.yaml")]
    cli.main(["fit", *command, "--ckpt_path", str(COMPAT / "schedule" / "interrupted.ckpt")])
    # The folder is that of the checkpoint, and so are the counters.
    check_end(Path("schedule"), "schedule/finetuned.safetensors")
    (end,) = Path("schedule").rglob("*step=12.ckpt")
    state = checkpoint(end)["callbacks"]
    expected = {"done": 2, "pruned_step": 8, "earlier": None, "trained": False, "output_dir": "schedule"}
    assert state["MAIHTPruning"] == expected
    counts = count_zeros(load_model("schedule/model_finetuned"))
    assert all(2 * count.zeros == count.size for count in counts)
    assert state["FrozenSparsity"] == {"zeros": sum(count.zeros for count in counts)}
    for key, weight in start["state_dict"].items():
        if "_proj" in key:
            assert not checkpoint(end)["state_dict"][key][weight == 0].any(), key
    # Only what was still to come was pruned.
    assert Path("schedule/journal").is_dir()
    assert not Path("schedule/journal_epoch_1").exists()


def test_a_sparse_fine_tune_resumes_in_its_folder(here):
    shutil.copytree(COMPAT / "recovery", "recovery")
    older = json.loads(Path("recovery/summary.json").read_text())["stages"]
    before = read_records("recovery/journal")
    cli.main(["fit", "--config", "recovery/config.yaml", "--ckpt_path", "recovery/interrupted.ckpt"])
    check_end(Path("recovery"), "recovery/finetuned.safetensors")
    (end,) = Path("recovery/sparse_checkpoints").glob("*step=9.ckpt")
    assert checkpoint(end)["global_step"] == 9
    state = checkpoint(end)["callbacks"]
    assert state["MAIHTPruning"] == {
        "done": 1,
        "pruned_step": 4,
        "earlier": {"epochs": 1, "steps": 4},
        "trained": False,
        "output_dir": "recovery",
    }
    assert state["FrozenSparsity"] == checkpoint("recovery/interrupted.ckpt")["callbacks"]["FrozenSparsity"]
    # Stages before it are read and not measured again, and it was not pruned again.
    found = json.loads(Path("recovery/summary.json").read_text())["stages"]
    assert list(found) == ["dense", "pruned", "finetuned"]
    assert [found[stage] for stage in ("dense", "pruned")] == [older[stage] for stage in ("dense", "pruned")]
    assert found["finetuned"]["perplexity"] == pytest.approx(older["finetuned"]["perplexity"], rel=1e-3)
    assert read_records("recovery/journal") == before
    assert not Path("recovery/model").exists()
    assert Path("recovery/layers.csv").read_text() == (COMPAT / "recovery" / "layers.csv").read_text()


@pytest.mark.parametrize("name", RUNS)
def test_a_configuration_means_what_it_meant(name, here, capsys):
    """Each setting is still there, with the same value, and none has come that changes what was asked for."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(["fit", "--config", str(COMPAT / name / "config.yaml"), "--print_config"])
    assert not stopped.value.code
    found = yaml.safe_load(capsys.readouterr().out)
    older = yaml.safe_load((COMPAT / name / "config.yaml").read_text())

    def check(old, new, path):
        if isinstance(old, dict):
            for key, value in old.items():
                assert key in new, (path, key)
                check(value, new[key], f"{path}.{key}")
        else:
            # A class may have come to be written by a longer path, which is the same class.
            assert new == old or (path.endswith("class_path") and loaded(new) is loaded(old)), path

    check(older, found, name)


def loaded(path):
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


@pytest.mark.slow
def test_a_configuration_runs(here):
    """From start to end, and as the older version's run did."""
    cli.main(["fit", "--config", str(COMPAT / "recovery" / "config.yaml"), "--output_dir", "again"])
    check_end(Path("again"), "recovery/finetuned.safetensors")
    written = yaml.safe_load(Path("again/config.yaml").read_text())
    assert (
        written["sparse_finetune"]
        == yaml.safe_load((COMPAT / "recovery" / "config.yaml").read_text())["sparse_finetune"]
    )


@pytest.mark.parametrize(
    "path",
    [
        "callbacks.distillation.Distillation",
        "callbacks.frozen.FrozenSparsity",
        "callbacks.pruning.MAIHTPruning",
        "data.c4.C4Calibration",
        "data.python_docs.PythonDocsCalibration",
        "data.python_docs.PythonDocsDataModule",
        "data.wikitext2.WikiText2DataModule",
    ],
)
def test_class_paths_of_configurations_are_those_of_the_classes(path):
    """Such paths stand in people's YAML; the name alone is the key of a callback's state in a checkpoint."""
    assert loaded(f"maiht_lightning.{path}").__qualname__ == path.rsplit(".", 1)[1]


def test_states_keep_their_keys():
    assert MAIHTPruning().state_dict().keys() == {"done", "pruned_step", "earlier", "trained", "output_dir"}
    assert FrozenSparsity().state_dict() == {"zeros": 0}
    assert (MAIHTPruning().state_key, FrozenSparsity().state_key) == ("MAIHTPruning", "FrozenSparsity")


def test_a_finished_run_is_read(capsys, tmp_path):
    run = read_run(COMPAT / "recovery")
    assert (run.summary.method, run.summary.pattern, run.summary.measured_sparsity) == ("sparsegpt", "2:4", 0.5)
    older = json.loads((COMPAT / "recovery" / "summary.json").read_text())
    assert {name: stage.perplexity["wikitext2"] for name, stage in run.summary.stages.items()} == {
        name: stage["perplexity"]["wikitext2"] for name, stage in older["stages"].items()
    }
    assert run.summary.seconds == older["seconds"]
    assert run.trained_before
    assert run.settings["pruning.calibration.samples"] == "4"
    assert run.seeds == ("seed_everything=7", "pruning.calibration.seed=0")
    errors = [float(line.split(",")[5]) for line in (COMPAT / "recovery" / "layers.csv").read_text().splitlines()[1:]]
    assert run.mean_relative_error == pytest.approx(sum(errors) / 14)

    cli.main(["report", str(COMPAT / "recovery"), "--output_dir", str(tmp_path / "report")])
    assert f"{older['stages']['pruned']['perplexity']['wikitext2']:.2f}" in capsys.readouterr().out
    assert list((tmp_path / "report").glob("*.html"))


def test_a_journal_is_read(tmp_path):
    """Its blocks and records are there, although their fingerprint is none that is taken now."""
    shutil.copytree(COMPAT / "recovery" / "journal", tmp_path / "journal")
    journal = Journal(tmp_path / "journal", json.loads((tmp_path / "journal" / "settings.json").read_text()))
    assert journal.moved_to is None
    records = []
    for block in range(2):
        weights, of_block = journal.load(block)
        assert len(weights) == len(of_block) == 7
        for record in of_block:
            weight = weights[record.layer]
            assert record.name.endswith(f"layers.{block}.{record.layer}")
            assert record.shape == tuple(weight.shape)
            assert record.zeros == int((weight == 0).sum()) == weight.numel() // 2
        records += of_block
    assert read_records(tmp_path / "journal") == records


def test_a_journal_with_another_fingerprint_is_moved_aside(here, caplog):
    """Fingerprints are taken of all bits now and were taken of sums: such a journal is not resumed, nor overwritten."""
    shutil.copytree(COMPAT / "recovery" / "journal", "journal")
    windows = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.WARNING):
        report = prune(
            load_model("tiny"), windows, method="wanda", pattern="2:4", journal_dir="journal", progress=False
        )
    assert report.resumed == 0
    assert re.search(r"journal was of another pruning; moved to journal\.1", caplog.text)
    for file in (COMPAT / "recovery" / "journal").iterdir():
        assert (Path("journal.1") / file.name).read_bytes() == file.read_bytes()


def test_the_checkpoints_are_of_the_steps_that_are_told():
    for name in RUNS:
        saved = checkpoint(COMPAT / name / "interrupted.ckpt")
        assert saved["global_step"] == INTERRUPTED_AT
        assert not any(str(value).startswith("/") for value in saved["callbacks"]["MAIHTPruning"].values())
