"""What other libraries say and nobody can act on is left out, message by message; a log file has no bars."""

import logging
import re
import sys
import warnings

import pytest
import yaml
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from helpers.byte_model import llama_config, save_folder
from helpers.own_module import OwnModule
from helpers.terminal import environment, maiht
from maiht_lightning.callbacks import plain_progress
from maiht_lightning.callbacks.plain_progress import PlainProgress
from maiht_lightning.cli import main
from maiht_lightning.command_line.quiet import RECORDS, WARNINGS, noise_silenced

# What the libraries say, word by word.
LEFT_OUT = [
    ("torchao", "Failed to load /lib/torchao/_C_mxfp8.cpython-310-x86_64-linux-gnu.so: Could not load this library"),
    (
        "torch.utils._pytree",
        "<enum 'KernelPreference'> is an Enum subclass and is now natively supported by torch.compile as an opaque "
        "value type. Calling register_constant() on Enum subclasses is deprecated",
    ),
    (
        "lightning.pytorch.utilities.rank_zero",
        "💡 Tip: For seamless cloud uploads and versioning, try installing [litmodels]",
    ),
]
KEPT = [
    ("torchao", "Failed to quantize the model"),
    ("mine", "Failed to load /lib/mine.so"),
    ("torch.utils._pytree", "something else"),
    ("lightning.pytorch.utilities.rank_zero", "GPU available: False, used: False"),
    ("lightning.pytorch.utilities.rank_zero", "A tip: For seamless pruning"),
]
WARNED = [
    ("lightning.pytorch.trainer.connectors.data_connector", "The 'train_dataloader' does not have many workers which"),
    ("lightning.pytorch.utilities._pytree", "`isinstance(treespec, LeafSpec)` is deprecated, use"),
    (
        "lightning.pytorch.trainer.connectors.logger_connector.logger_connector",
        "Starting from v1.9.0, `tensorboardX` has been removed as a dependency",
    ),
]
SHOWN = [
    ("mine", "The 'train_dataloader' does not have many workers which"),
    ("lightning.pytorch.trainer", "`max_epochs` was not set"),
    ("maiht_lightning.callbacks.pruning", "the fit ended before step:3"),
    ("__main__", "mine"),
]


@pytest.mark.parametrize(("logger", "message"), LEFT_OUT + KEPT)
def test_records_are_left_out_one_by_one(logger, message, caplog, monkeypatch):
    # torch's loggers hand nothing on, but to handlers of their own.
    monkeypatch.setattr(logging.getLogger(logger), "propagate", True)
    monkeypatch.setattr(logging.getLogger(logger.partition(".")[0]), "propagate", True)
    with noise_silenced():
        logging.getLogger(logger).warning(message)
    assert (message in caplog.text) == ((logger, message) in KEPT)
    # It is undone when the command ends.
    caplog.clear()
    logging.getLogger(logger).warning(message)
    assert message in caplog.text


@pytest.mark.parametrize(("module", "message"), WARNED + SHOWN)
def test_warnings_are_left_out_one_by_one(module, message):
    def warn():
        warnings.warn_explicit(message, UserWarning, "file.py", 1, module=module)

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with noise_silenced():
            warn()
        assert len(told) == ((module, message) in SHOWN)
        warn()
        assert len(told) == ((module, message) in SHOWN) + 1


def test_every_entry_is_tested():
    for entries, said in ((RECORDS, LEFT_OUT), (WARNINGS, WARNED)):
        assert len(entries) == len(said)
        for (_, pattern), (_, message) in zip(entries, said, strict=False):
            assert any(re.match(pattern, message) for _, message in said)


REAL = {
    "torchao": ("import torchao.prototype.mx_formats", "Failed to load|is an Enum subclass"),
    "lightning": (
        "from lightning.pytorch import Trainer; Trainer(accelerator='cpu')",
        "Tip: For seamless|tensorboardX",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("library", REAL)
def test_the_installed_libraries_say_it_so(library):
    """The real thing: what is told without the command's quiet is not told with it."""
    statement, noise = REAL[library]
    quiet = f"from maiht_lightning.command_line.quiet import noise_silenced\nwith noise_silenced(): {statement}"
    loud = maiht(program=("-c", statement))
    if loud.status or not re.search(noise, loud.err + loud.out):
        pytest.skip(f"this version of {library} is quiet by itself")
    found = maiht(program=("-c", quiet))
    assert found.status == 0
    assert not re.search(noise, found.err + found.out)


@pytest.mark.slow
def test_importing_the_package_changes_nothing_of_the_process():
    program = """
import os, sys, warnings
import torch, lightning.pytorch, transformers, datasets, wandb, torchmetrics, matplotlib, jsonargparse, tqdm.auto
environment, filters = dict(os.environ), list(warnings.filters)
import maiht_lightning, maiht_lightning.cli, maiht_lightning.command_line.runs
for name in maiht_lightning.__all__:
    getattr(maiht_lightning, name)
sys.exit(f"{set(os.environ) - set(environment)}" if dict(os.environ) != environment else 0)
"""
    found = maiht(program=("-c", program))
    assert found.status == 0, found.err[-2000:]


def test_a_call_from_python_changes_nothing_of_the_process(capsys, monkeypatch):
    import os

    for name in ("TQDM_DISABLE", "GOMP_SPINCOUNT", "TOKENIZERS_PARALLELISM"):
        monkeypatch.delenv(name, raising=False)
    before, filters = dict(os.environ), list(warnings.filters)
    with pytest.raises(SystemExit):
        main(["evaluate", "--model", "/nowhere/at/all"])
    assert dict(os.environ) == before
    assert list(warnings.filters) == filters
    assert all(not logging.getLogger(name).filters for name, _ in RECORDS)


# ---- A run, in a file and on a terminal


CALLBACK = """
import logging, warnings
from lightning.pytorch import Callback

class Mine(Callback):
    def on_train_start(self, trainer, pl_module):
        warnings.warn("my own warning: the 'train_dataloader' does not have many workers")
        logging.getLogger("torchao").warning("a record of torchao that is new")
        logging.getLogger(__name__).warning("Failed to load my.so")
"""
BARS = re.compile(r"\r|it/s|layer/s|batch/s|━|%\|")
NOISE = re.compile(r"Tip:|Failed to load /|LeafSpec|many workers which|tensorboardX|register_constant|anonymous")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same fit with its output in files and on a terminal, with a callback of the user's own."""
    folder = tmp_path_factory.mktemp("runs")
    save_folder(folder / "model", llama_config())
    (folder / "mine.py").write_text(CALLBACK)
    config = {
        "model": {"name_or_path": "model"},
        "data": {"class_path": "PythonDocsDataModule", "init_args": {"seqlen": 64, "batch_size": 4}},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 3,
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
            "enable_model_summary": False,
            "callbacks": [{"class_path": "mine.Mine"}],
            "logger": {"class_path": "WandbLogger", "init_args": {"offline": True}},
        },
        "pruning": {
            "calibration": {"class_path": "PythonDocsCalibration", "init_args": {"samples": 8, "seqlen": 64}},
            "evaluation": {"perplexity": ["python_docs"], "seqlen": 64, "max_windows": 2},
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    path = f"{environment()['PYTHONPATH']}:{folder}"
    return {
        place: maiht(
            *["fit", "--config", "run.yaml", "--output_dir", place],
            cwd=folder,
            terminal=place == "terminal",
            PYTHONPATH=path,
        )
        for place in ("file", "terminal")
    } | {"folder": folder}


@pytest.mark.slow
def test_a_log_file_has_lines_and_no_bars(runs):
    done = runs["file"]
    assert done.status == 0, done.err[-3000:]
    assert not BARS.search(done.err)
    lines = done.err.splitlines()
    assert len(lines) < 40
    # The first one is Lightning's, of the seed that we set; no warning comes before.
    assert lines[0] == "Seed set to 0"
    order = ["Training: 3 steps", "Training: step 3", "Measuring the dense", "Pruned block 1 of 2"]
    order += ["Pruned block 2 of 2", "Measuring the pruned", "Zeros verified"]
    places = [next(number for number, line in enumerate(lines) if line.startswith(start)) for start in order]
    assert places == sorted(places)
    # Tables on stdout, without colours. W&B colours its own last lines.
    assert "perplexity, python_docs" in done.out
    assert "\x1b" not in "".join(line for line in f"{done.out}\n{done.err}".splitlines() if "wandb" not in line)
    # It is not written down as a choice of the user's.
    config = yaml.safe_load((runs["folder"] / "file" / "config.yaml").read_text())
    assert config["trainer"]["enable_progress_bar"] is None
    assert not (runs["folder"] / "file" / "config.yaml").read_text().count("# ") > 1


@pytest.mark.slow
def test_a_terminal_has_bars(runs):
    done = runs["terminal"]
    assert done.status == 0, done.out[-3000:]
    assert "layer/s" in done.out
    assert "Pruned block" not in done.out
    assert "Training: step" not in done.out


@pytest.mark.slow
@pytest.mark.parametrize("place", ["file", "terminal"])
def test_noise_is_left_out_and_nothing_else(runs, place):
    said = runs[place].err + runs[place].out
    assert not NOISE.search(said)
    for own in ("my own warning", "a record of torchao that is new", "Failed to load my.so"):
        assert own in said


@pytest.mark.slow
def test_bars_that_were_asked_for_are_shown_in_a_file_as_well(runs):
    options = ["--trainer.enable_progress_bar", "true", "--output_dir", "asked"]
    done = maiht(
        *["prune", "--config", "run.yaml", *options],
        cwd=runs["folder"],
        PYTHONPATH=f"{environment()['PYTHONPATH']}:{runs['folder']}",
    )
    assert done.status == 0, done.err[-3000:]
    assert "layer/s" in done.err
    assert "Pruned block" not in done.err


@pytest.mark.slow
@pytest.mark.parametrize("terminal", [False, True])
def test_bars_of_other_libraries_are_for_terminals(terminal, tmp_path):
    """As transformers has them for GGUF files and weights; the user's own choice comes first."""
    bars = (
        "import sys; sys.argv = ['maiht', 'doctor', '--help']; from maiht_lightning.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "from tqdm.auto import tqdm\nfor _ in tqdm(range(3), desc='Loading'): pass"
    )
    shown = maiht(program=("-c", bars), terminal=terminal)
    assert ("Loading" in shown.out + shown.err) == terminal
    chosen = maiht(program=("-c", bars), terminal=terminal, TQDM_DISABLE="1" if terminal else "")
    assert ("Loading" in chosen.out + chosen.err) != terminal


def test_lines_of_progress_have_step_and_loss(monkeypatch, caplog, tiny_llama):
    import torch

    clock = iter(range(0, 10_000, 40))
    monkeypatch.setattr(plain_progress.time, "monotonic", lambda: next(clock))
    windows = DataLoader(torch.randint(0, 64, (8, 16)), batch_size=2)

    class Module(OwnModule):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("loss", 2.5, prog_bar=True)
            self.log("hidden", 7.0)
            return loss

    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[PlainProgress()],
    )  # fmt: skip
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
        monkeypatch.setattr(logging.getLogger("lightning"), "propagate", True)
        trainer.fit(Module(tiny_llama(vocab_size=64)), windows)
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Training")]
    # The clock is asked after each step, and says 40 seconds more: every second step has a line, and the end.
    assert told == [
        "Training: 4 steps",
        "Training: step 2, epoch 0, loss 2.5",
        "Training: step 4, epoch 0, loss 2.5",
        "Training: step 4, epoch 1, loss 2.5",
    ]


@pytest.mark.slow
def test_output_that_is_no_longer_read_is_no_error():
    import subprocess

    command = f"{sys.executable} -m maiht_lightning.cli fit --help_all | head -1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.stdout == "usage: maiht fit [SETTINGS]\n"
    assert done.stderr == ""
    assert done.returncode in (0, 141)
