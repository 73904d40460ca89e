"""What fails while a run is at work, at every write and every call to others; each row says what must hold."""

import errno
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from helpers.own_module import NoTokenizer, OwnModule, Windows, trainer
from helpers.sharp_model import language
from maiht_lightning import Evaluation, MAIHTPruning, load_compact
from maiht_lightning.callbacks import pruning as callback_module
from maiht_lightning.capture import grams
from maiht_lightning.evaluation import evaluation
from maiht_lightning.evaluation.evaluation import LoadedEvaluation
from maiht_lightning.models import durable, saving
from maiht_lightning.models.loading import load_model
from maiht_lightning.pruning.journal import Journal
from maiht_lightning.reporting.figure_style import blank_figure, save_png
from maiht_lightning.reporting.recorder import RunRecorder
from maiht_lightning.solvers import LayerSolver

pytestmark = pytest.mark.slow

FULL = OSError(errno.ENOSPC, "No space left on device")


class Watched(Logger):
    """A logger of somebody's own."""

    name, version = "watched", "1"

    def log_hyperparams(self, *_, **__):
        pass

    def log_metrics(self, *_, **__):
        pass


class Tokenizer(NoTokenizer):
    """One that writes a file."""

    def save_pretrained(self, folder):
        (Path(folder) / "tokenizer.json").write_text("{}")


@pytest.fixture
def fit(sharp_llama, no_prediction, monkeypatch):
    """A function that fits and prunes the same model in a folder, and gives the module with the callback."""
    windows = language(4, 32, seed=2)
    task = {"acc": 0.5}
    monkeypatch.setattr(evaluation, "zero_shot", lambda model, tokenizer, tasks, **_: dict.fromkeys(tasks, task))
    monkeypatch.setattr(Evaluation, "load", lambda self, *_: LoadedEvaluation(self, {"random": windows}, {"boolq": 0}))

    # One small figure: to draw a run's takes longer than the run.
    monkeypatch.setattr(
        "maiht_lightning.reporting.recorder.draw_figures",
        lambda figures, *_: {"relative_error": save_png(blank_figure(1, 1), figures / "relative_error.png")},
    )

    def work(folder):
        module = OwnModule(sharp_llama(hidden_size=32, intermediate_size=64).train())
        module.tokenizer = Tokenizer()
        pruning = MAIHTPruning(
            method="wanda", calibration=Windows(), output_dir=str(folder), save_dense=True, compact=True
        )
        trainer(pruning, logger=Watched()).fit(module)
        return module, pruning

    return work


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def raising(error, owner, name, at=1):
    """Lets a function raise when it is called for a certain time."""

    def inject(patch):
        real, calls = getattr(owner, name), [0]

        def function(*args, **kwargs):
            calls[0] += 1
            if calls[0] == at:
                raise error
            return real(*args, **kwargs)

        patch.setattr(owner, name, function)

    return inject


def full(file, at=1):
    """Lets the disk be full when a file, or one in a folder of that name, is brought to it for a certain time."""

    def inject(patch):
        real, calls = durable.sync, [0]

        def sync(path):
            if f"{file}.partial" in path.parts:
                calls[0] += 1
                if calls[0] >= at:
                    raise FULL
            return real(path)

        patch.setattr(durable, "sync", sync)

    return inject


@dataclass
class Fault:
    """What is injected, and what must hold.

    Args:
        inject: Given a `MonkeyPatch`, brings the fault in.
        error: Pattern of the error with which the run ends; None: it goes on.
        failures: The phases in the summary's `failures`.
        steps: Training steps of the run that is started again; None: it is not, since it is finished.
        notes: Pattern of a note in the summary.
    """

    inject: object
    error: str | None = None
    failures: tuple[str, ...] = ()
    steps: int | None = 0
    notes: str | None = None


def refused(file):
    return (
        rf"{file} could not be written: .*No space left on device.*has room and can be written to, then start the same"
    )


OUT_OF_MEMORY = torch.OutOfMemoryError("8 GiB")
BROKEN = ZeroDivisionError("broken")
FAULTS = {
    "calibration text": Fault(raising(FULL, Windows, "windows"), "pruning cannot work with these settings", steps=4),
    "evaluation text": Fault(raising(FULL, Evaluation, "load"), "pruning cannot work with these settings", steps=4),
    "summary at the start": Fault(full("summary.json"), refused(r"summary\.json")),
    "resume.ckpt": Fault(full("resume.ckpt"), refused(r"resume\.ckpt"), steps=4),
    "model_dense": Fault(full("model_dense"), refused("model_dense")),
    "journal settings": Fault(full("settings.json"), refused(r"settings\.json")),
    "first block": Fault(full("block_00000.safetensors"), refused(r"block_00000\.safetensors")),
    "second block": Fault(full("block_00001.safetensors"), refused(r"block_00001\.safetensors")),
    "model": Fault(full("model"), refused("model")),
    "model's tokenizer": Fault(raising(FULL, Tokenizer, "save_pretrained", at=2), refused("model")),
    "model_compact": Fault(full("model_compact"), refused("model_compact")),
    "layers.csv": Fault(full("layers.csv"), refused(r"layers\.csv")),
    "summary in the middle": Fault(full("summary.json", at=3), refused(r"summary\.json")),
    "summary at the end": Fault(full("summary.json", at=6), refused(r"summary\.json")),
    "journal records": Fault(full("records.json"), refused(r"records\.json")),
    "figures": Fault(full("relative_error.png"), failures=("figures",), steps=None),
    "report.html": Fault(full("report.html"), failures=("report.html",), steps=None),
    "logger's settings": Fault(raising(BROKEN, Watched, "log_hyperparams"), failures=("log",), steps=None),
    "logger's numbers": Fault(raising(BROKEN, Watched, "log_metrics", at=2), failures=("log",), steps=None),
    "perplexity": Fault(raising(BROKEN, evaluation, "perplexity"), failures=("evaluate dense, random",), steps=None),
    "lm-eval": Fault(raising(BROKEN, evaluation, "zero_shot", at=2), failures=("evaluate pruned, boolq",), steps=None),
    "capture": Fault(raising(RuntimeError("broken"), grams, "add_gram", at=30), "could not be captured: broken"),
    "solver": Fault(raising(FloatingPointError("broken"), LayerSolver, "prune", at=9), "could not be pruned: broken"),
    "memory in the solver": Fault(raising(OUT_OF_MEMORY, LayerSolver, "prune", at=9), "pruned: 8 GiB"),
}


@pytest.fixture(scope="module")
def whole():
    """What an undisturbed run comes to; made by the first test."""
    return {}


def undisturbed(whole, fit, folder):
    if not whole:
        module, _ = fit(folder / "whole")
        summary = json.loads((folder / "whole" / "summary.json").read_text())
        whole.update(weights=weights(module), stages=summary["stages"])
    return whole


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_costs_nothing_that_was_finished(fit, whole, tmp_path, monkeypatch, name):
    fault, expected, folder = FAULTS[name], undisturbed(whole, fit, tmp_path), tmp_path / "run"
    with monkeypatch.context() as patch:
        fault.inject(patch)
        if fault.error is None:
            module, pruning = fit(folder)
            failures = pruning.summary.failures
            assert tuple(dict.fromkeys(each["phase"] for each in failures)) == fault.failures
            assert json.loads((folder / "summary.json").read_text())["failures"] == failures
        else:
            kinds = (OSError, MisconfigurationException, RuntimeError)
            with pytest.raises(kinds, match=fault.error):
                fit(folder)
    assert not list(folder.rglob("*.partial"))
    if fault.steps is not None:
        finished = {path: path.read_bytes() for path in folder.rglob("*.safetensors") if "journal" not in path.parts}
        module, pruning = fit(folder)
        assert module.steps == fault.steps
        # What was whole before was not written again.
        assert all(path.read_bytes() == content for path, content in finished.items())
        assert json.loads((folder / "summary.json").read_text())["stages"] == expected["stages"]
        assert pruning.summary.failures == []
        assert {"report.html", "layers.csv", "figures"} <= {path.name for path in folder.iterdir()}
    assert same(weights(module), expected["weights"])
    for saved in (load_model(str(folder / "model")), load_compact(folder / "model_compact")):
        assert same(weights(saved), {k.removeprefix("net.lm."): v for k, v in expected["weights"].items()})


# ---- Disks that are full, or read-only, for real


@pytest.fixture
def disk(tmp_path):
    """A small file system of its own, and functions that break and mend it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk):
    """Leave no byte free."""
    with (disk / "filler").open("wb", buffering=0) as file:
        for size in (65536, 1):
            while True:
                try:
                    file.write(bytes(size))
                except OSError:
                    break


def make_room(disk):
    (disk / "filler").unlink()


def remount(disk, how):
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)


BREAKS = {
    "full": (fill, make_room, "No space left"),
    "read-only": (lambda disk: remount(disk, "ro"), lambda disk: remount(disk, "rw"), "Read-only file system"),
}
# Where it breaks, and how many training steps the run has to make after it was mended.
MOMENTS = {
    r"resume\.ckpt": (callback_module, "save_point", 4),
    "model_dense": (saving, "replacing", 0),
    r"block_00000\.safetensors": (Journal, "save", 0),
    "model": (RunRecorder, "save", 0),
    "report": (RunRecorder, "_report", 0),
}


@pytest.mark.parametrize("how", BREAKS)
@pytest.mark.parametrize("what", MOMENTS)
def test_a_disk_that_fails_is_named_and_once_mended_the_run_ends_the_same(
    fit, whole, disk, tmp_path, monkeypatch, what, how
):
    expected = undisturbed(whole, fit, tmp_path)
    damage, mend, said = BREAKS[how]
    owner, name, steps = MOMENTS[what]
    real, calls = getattr(owner, name), [0]

    def breaking(*args, **kwargs):
        calls[0] += 1
        # The dense model is saved before the pruned one.
        if calls[0] == (2 if what == "model" else 1):
            damage(disk)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, breaking)
        file = r"summary\.json" if what == "report" else what
        with pytest.raises(OSError, match=rf"disk/run/.*{file} could not be written: .*start the same again") as error:
            fit(disk / "run")
    # PyTorch's writer does not say what the disk has said.
    assert said in str(error.value) or what == r"resume\.ckpt"
    mend(disk)
    module, _ = fit(disk / "run")
    assert module.steps == steps
    assert same(weights(module), expected["weights"])
    assert json.loads((disk / "run" / "summary.json").read_text())["stages"] == expected["stages"]
    saved = weights(load_model(str(disk / "run" / "model")))
    assert same(saved, {k.removeprefix("net.lm."): v for k, v in expected["weights"].items()})
    assert not list((disk / "run").rglob("*.partial"))
    assert (disk / "run" / "report.html").exists()


FILLS = """
import sys, torch
from pathlib import Path
from maiht_lightning.capture.hidden_states import HiddenStateStore

with HiddenStateStore("disk", torch.device("cpu"), Path(sys.argv[1])) as store:
    store.put(torch.ones(1000))
    store.put(torch.ones(2_000_000))
"""


def test_hidden_states_on_a_full_disk_are_an_error_and_no_crash(disk):
    """Writing to a mapped file without room would end the process with SIGBUS."""
    done = subprocess.run([sys.executable, "-c", FILLS, str(disk)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.search(r"OSError: .*batch_000001\.bin could not be written: .*No space left.*make room", done.stderr)
