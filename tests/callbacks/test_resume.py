"""A fit that died while or after its model was pruned, resumed by the next one; and failures that cost no model."""

import copy
import json
import os
import shutil
from collections import namedtuple

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from helpers.own_module import NoTokenizer, OwnModule, Windows, trainer
from helpers.sharp_model import language
from maiht_lightning import Evaluation, MAIHTPruning, SparseFinetune, sparse_finetune
from maiht_lightning.data.module import ResumingLoader
from maiht_lightning.evaluation import evaluation
from maiht_lightning.evaluation.evaluation import LoadedEvaluation
from maiht_lightning.pruning.journal import Journal
from maiht_lightning.reporting.recorder import RunRecorder

pytestmark = pytest.mark.usefixtures("text", "no_figures")


@pytest.fixture
def make_module(sharp_llama):
    """A function that makes the same dense module each time."""

    def make():
        module = OwnModule(sharp_llama(hidden_size=32, intermediate_size=64).train())
        module.tokenizer = NoTokenizer()
        return module

    return make


def pruning(tmp_path, **settings):
    return MAIHTPruning(calibration=Windows(), output_dir=str(tmp_path / "run"), **{"method": "wanda", **settings})


def summary_of(tmp_path):
    return json.loads((tmp_path / "run" / "summary.json").read_text())


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


class Died(BaseException):
    """Stands for the end of a process, which nothing catches."""


@pytest.fixture
def dies(monkeypatch):
    """A function that lets a method raise when it is called for a certain time."""

    def set_up(owner, name, call):
        calls, real = [0], getattr(owner, name)

        def method(*args, **kwargs):
            calls[0] += 1
            if calls[0] == call:
                raise Died
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, method)
        return calls

    return set_up


@pytest.fixture
def undisturbed(make_module, tmp_path):
    module = make_module()
    trainer(pruning(tmp_path / "undisturbed")).fit(module)
    return weights(module), summary_of(tmp_path / "undisturbed")["stages"]


DEATHS = {
    "measuring": (LoadedEvaluation, "measure", 1),
    "first block": (Journal, "save", 1),
    "second block": (Journal, "save", 2),
}


@pytest.mark.parametrize("where", DEATHS)
def test_a_pruning_that_died_resumes_without_a_training_step(make_module, undisturbed, dies, tmp_path, where):
    calls = dies(*DEATHS[where])
    first = make_module()
    with pytest.raises(Died):
        trainer(pruning(tmp_path)).fit(first)
    assert first.steps == 4
    assert (tmp_path / "run" / "resume.ckpt").exists()

    module, callback = make_module(), pruning(tmp_path)
    fit = trainer(callback)
    fit.fit(module)
    assert module.steps == 0
    # What was done is not done again: two stages or blocks, and the call that died.
    assert calls[0] == 3
    assert same(weights(module), undisturbed[0])
    assert summary_of(tmp_path)["stages"] == undisturbed[1]
    assert (fit.global_step, fit.current_epoch) == (4, 1)
    assert not (tmp_path / "run" / "resume.ckpt").exists()


def test_the_trained_model_is_on_the_disk_before_a_block_changes(make_module, tmp_path, monkeypatch):
    synced, found, fsync = set(), {}, os.fsync

    def note(descriptor):
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def look(model, *args, **kwargs):
        path = tmp_path / "run" / "resume.ckpt"
        found["saved"] = torch.load(path, weights_only=True)["state_dict"]
        found["model"] = copy.deepcopy(model.state_dict())
        found["synced"] = {str(tmp_path / "run" / "resume.ckpt.partial"), str(tmp_path / "run")} <= synced
        raise Died

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr("maiht_lightning.callbacks.pruning_run.prune_model", look)
    with pytest.raises(Died):
        trainer(pruning(tmp_path), precision="bf16-true").fit(make_module())
    assert found["synced"]
    assert same({name.removeprefix("net.lm."): value for name, value in found["saved"].items()}, found["model"])
    assert {value.dtype for value in found["saved"].values()} == {torch.bfloat16}


def test_what_is_trained_anew_in_the_folder_of_a_finished_run_is_measured_anew(make_module, tmp_path):
    class Other(OwnModule):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    found = []
    for kind in (OwnModule, Other):
        module = make_module()
        module.__class__ = kind
        trainer(pruning(tmp_path)).fit(module)
        assert module.steps == 4
        found.append(summary_of(tmp_path)["stages"])
    assert found[0]["dense"] != found[1]["dense"]
    assert found[0]["pruned"] != found[1]["pruned"]


def test_a_second_fine_tune_is_saved_and_measured_like_the_first(make_module, tmp_path):
    module, callback = make_module(), pruning(tmp_path)
    fit = trainer(callback)
    fit.fit(module)
    stages = []
    for _ in range(2):
        sparse_finetune(fit, module, SparseFinetune(max_epochs=1))
        stages.append(summary_of(tmp_path)["stages"])
    assert stages[0]["finetuned"] != stages[1]["finetuned"]
    assert [stages[0][name] for name in ("dense", "pruned")] == [stages[1][name] for name in ("dense", "pruned")]
    saved = torch.cat([p.flatten() for p in _load(tmp_path / "run" / "model_finetuned").parameters()])
    assert torch.equal(saved, torch.cat([p.detach().flatten() for p in module.net["lm"].parameters()]))


def _load(folder):
    from maiht_lightning import load_model

    return load_model(str(folder))


def test_a_fine_tune_goes_on_from_where_the_first_fit_was_resumed(make_module, dies, tmp_path):
    """The counters of a fit that was resumed without a step are those of one that has made its steps."""
    settings, limits = SparseFinetune(max_steps=3), {"max_epochs": None, "max_steps": 3}
    undisturbed, fit = make_module(), trainer(pruning(tmp_path / "undisturbed"), **limits)
    fit.fit(undisturbed)
    sparse_finetune(fit, undisturbed, settings)

    dies(Journal, "save", 2)
    with pytest.raises(Died):
        trainer(pruning(tmp_path), **limits).fit(make_module())
    module, fit = make_module(), trainer(pruning(tmp_path), **limits)
    fit.fit(module)
    assert module.steps == 0
    sparse_finetune(fit, module, settings)
    assert module.steps == 3
    assert same(weights(module), weights(undisturbed))


@pytest.mark.parametrize("steps", [3, 4])
def test_a_fit_that_died_after_its_last_checkpoint_is_left_out(make_module, tmp_path, monkeypatch, steps):
    """The checkpoint is from the last step, within an epoch of four batches or at its end."""

    def fitted(callback, module):
        saving = ModelCheckpoint(tmp_path / "saved", save_top_k=0, save_last=True, every_n_train_steps=steps)
        fit = trainer(callback, saving, enable_checkpointing=True, max_epochs=None, max_steps=steps)
        fit.fit(module)
        return fit

    undisturbed = make_module()
    expected = fitted(pruning(tmp_path / "undisturbed"), undisturbed)

    def die(*_):
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr("maiht_lightning.callbacks.pruning.save_point", die)
        with pytest.raises(Died):
            fitted(pruning(tmp_path), make_module())
    module, callback = make_module(), pruning(tmp_path)
    callback.resume_from = tmp_path / "saved" / "last.ckpt"
    fit = fitted(callback, module)
    assert module.steps == 0
    assert same(weights(module), weights(undisturbed))
    for each in (expected, fit):
        counted = each.fit_loop.epoch_loop._batches_that_stepped
        assert (each.global_step, each.current_epoch, counted) == (steps, 1, steps)


def test_a_pruning_in_own_code_stops_after_a_block(make_module, undisturbed, dies, tmp_path):
    class Stop(Callback):
        def on_train_end(self, trainer, pl_module):
            trainer._signal_connector.received_sigterm = True

    calls = dies(Journal, "save", 0)
    with pytest.raises(SystemExit):
        trainer(Stop(), pruning(tmp_path)).fit(make_module())
    assert calls[0] == 1
    module = make_module()
    trainer(pruning(tmp_path)).fit(module)
    assert (module.steps, calls[0]) == (0, 2)
    assert same(weights(module), undisturbed[0])


def test_a_fine_tune_that_died_when_it_was_trained_is_finished_without_a_step(make_module, dies, tmp_path):
    settings = SparseFinetune(max_epochs=1)
    undisturbed, fit = make_module(), trainer(pruning(tmp_path / "undisturbed"))
    fit.fit(undisturbed)
    sparse_finetune(fit, undisturbed, settings)

    module, fit = make_module(), trainer(pruning(tmp_path))
    fit.fit(module)
    calls = dies(type(fit.callbacks[0].run.recorder), "save", 1)
    with pytest.raises(Died):
        sparse_finetune(fit, module, settings)
    module = make_module()
    point = tmp_path / "run" / "resume.ckpt"
    sparse_finetune(trainer(pruning(tmp_path)), module, settings, ckpt_path=str(point))
    assert module.steps == 0
    assert calls[0] == 2
    assert same(weights(module), weights(undisturbed))
    assert summary_of(tmp_path)["stages"] == summary_of(tmp_path / "undisturbed")["stages"]
    assert not point.exists()


# ---- Prunings within training


class Resumable(OwnModule):
    """Its loader leaves out what was trained on before the checkpoint; it validates within an epoch."""

    def train_dataloader(self):
        return ResumingLoader(super().train_dataloader().dataset, self.trainer, batch_size=2)

    def validation_step(self, batch, batch_idx):
        self.log("val", self.net["lm"](input_ids=batch, labels=batch, use_cache=False).loss)

    def val_dataloader(self):
        return super().train_dataloader()


SCHEDULES = {
    "steps": {"prune_at": {"step:2": 0.3, "step:7": 0.5}},
    "epochs": {"prune_at": {"epoch:1": 0.3, "epoch:2": 0.5}},
    "end": {"prune_at": {"step:3": 0.2, "end": 0.5}},
}
DEATHS_WITHIN = {
    # The call that dies, and how many training steps of twelve are left then, by schedule.
    "measuring": (LoadedEvaluation, "measure", 1, {"steps": 10, "epochs": 8, "end": 9}),
    "first pruning": (Journal, "save", 2, {"steps": 10, "epochs": 8, "end": 9}),
    "second pruning": (Journal, "save", 3, {"steps": 5, "epochs": 4, "end": 0}),
    "saving": (RunRecorder, "save", 1, {"steps": 5, "epochs": 4, "end": 0}),
    "figures": (RunRecorder, "finish_pruning", 1, {"steps": 5, "epochs": 4, "end": 0}),
    "next step": (Resumable, "training_step", 4, {"steps": 10}),
    "last step": (Resumable, "training_step", 12, {"steps": 5, "epochs": 4, "end": 9}),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "schedule"), [(where, schedule) for where in DEATHS_WITHIN for schedule in DEATHS_WITHIN[where][3]]
)
def test_a_pruning_within_training_that_died_costs_no_step_done_before(make_module, dies, tmp_path, where, schedule):
    def fitted(folder, module):
        module.__class__ = Resumable
        settings = {"max_epochs": 3, "val_check_interval": 2, "num_sanity_val_steps": 0}
        fit = trainer(pruning(folder, **SCHEDULES[schedule]), **settings)
        fit.fit(module)
        return fit

    undisturbed, module = make_module(), make_module()
    expected = fitted(tmp_path / "undisturbed", undisturbed)
    assert undisturbed.steps == 12
    calls = dies(*DEATHS_WITHIN[where][:3])
    with pytest.raises(Died):
        fitted(tmp_path, make_module())
    solved = calls[0]
    fit = fitted(tmp_path, module)
    assert module.steps == DEATHS_WITHIN[where][3][schedule]
    if where.endswith("pruning"):
        # Of four blocks none is done again but the one at which it died.
        assert calls[0] == solved + 4 - (solved - 1)
    assert same(weights(module), weights(undisturbed))
    assert summary_of(tmp_path)["stages"] == summary_of(tmp_path / "undisturbed")["stages"]
    for each in (expected, fit):
        counted = each.fit_loop.epoch_loop._batches_that_stepped
        assert (each.global_step, each.current_epoch, counted) == (12, 3, 12)
    assert not (tmp_path / "run" / "resume.ckpt").exists()
    assert not list((tmp_path / "run").glob("journal*/block*"))


# ---- What fails beside the pruning


def test_a_measurement_that_fails_costs_no_model(make_module, undisturbed, tmp_path, monkeypatch):
    def measure(model, windows, **settings):
        raise ZeroDivisionError("no tokens")

    monkeypatch.setattr(evaluation, "perplexity", measure)
    module = make_module()
    with pytest.warns(UserWarning, match="2 things failed beside the pruning.*evaluate dense, random: ZeroDivision"):
        trainer(pruning(tmp_path)).fit(module)
    assert same(weights(module), undisturbed[0])
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    summary = summary_of(tmp_path)
    assert summary["failures"] == [
        {"phase": f"evaluate {stage}, random", "message": "ZeroDivisionError: no tokens"}
        for stage in ("dense", "pruned")
    ]
    assert list(summary["stages"]) == ["dense", "pruned"]


def test_where_memory_runs_out_the_batch_is_halved(sharp_llama, monkeypatch):
    sizes, said, real = [], [], evaluation.perplexity

    def measure(model, windows, *, batch_size, **settings):
        sizes.append(batch_size)
        if batch_size > 2:
            raise torch.OutOfMemoryError("8 GiB")
        return real(model, windows, batch_size=batch_size, **settings)

    monkeypatch.setattr(evaluation, "perplexity", measure)
    model, windows = sharp_llama(), language(8, 32, seed=2)
    loaded = LoadedEvaluation(Evaluation(batch_size=8), {"text": windows}, {})
    found = loaded.measure(model, None, progress=False, on_retry=said.append)
    assert sizes == [8, 4, 2]
    assert found.perplexity["text"] == pytest.approx(real(model, windows, batch_size=8, progress=False), rel=1e-6)
    assert said == [
        "text: memory ran out with batch_size 8, so it is measured with 4",
        "text: memory ran out with batch_size 4, so it is measured with 2",
    ]
    monkeypatch.setattr(evaluation, "perplexity", lambda *_, **__: _out_of_memory())
    with pytest.raises(torch.OutOfMemoryError):
        loaded.measure(model, None, progress=False)


def _out_of_memory():
    raise torch.OutOfMemoryError("8 GiB")


def test_a_text_that_fails_leaves_the_others(sharp_llama, monkeypatch):
    real, failed = evaluation.perplexity, []

    def measure(model, windows, **settings):
        if len(windows) == 1:
            raise ValueError("too short")
        return real(model, windows, **settings)

    monkeypatch.setattr(evaluation, "perplexity", measure)
    windows = language(4, 32, seed=2)
    loaded = LoadedEvaluation(Evaluation(), {"short": windows[:1], "long": windows}, {})
    found = loaded.measure(
        sharp_llama(), None, progress=False, on_failure=lambda what, error: failed.append((what, str(error)))
    )
    assert list(found.perplexity) == ["long"]
    assert failed == [("short", "too short")]
    with pytest.raises(ValueError, match="too short"):
        loaded.measure(sharp_llama(), None, progress=False)


Usage = namedtuple("Usage", "total used free")


def test_a_disk_too_small_is_found_before_training(make_module, tmp_path, monkeypatch):
    module = make_module()
    size = sum(p.numel() * 4 for p in module.parameters())
    blocks = sum(p.numel() * 4 for name, p in module.named_parameters() if name.endswith("_proj.weight"))
    needed = size + blocks + 2 * size
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, needed - 1))
    with pytest.raises(MisconfigurationException, match=rf"needs {needed / 1e9:.2f} GB in .*model_dense .* make room"):
        trainer(pruning(tmp_path, save_dense=True)).fit(module)
    assert module.steps == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, needed))
    trainer(pruning(tmp_path, save_dense=True)).fit(module)
    assert module.steps == 4


class StopAfter(Callback):
    """Lets SIGTERM come after some steps, as Lightning's own handler notes it."""

    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.steps:
            trainer._signal_connector.received_sigterm = True


def test_a_fit_that_is_told_to_stop_keeps_what_it_has_trained(make_module, undisturbed, tmp_path):
    first = make_module()
    with pytest.raises(SystemExit):
        trainer(StopAfter(2), pruning(tmp_path)).fit(first)
    assert first.steps == 2
    saved = torch.load(tmp_path / "run" / "resume.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    assert len(saved["optimizer_states"][0]["state"]) > 0
    assert same(dict(saved["state_dict"]), weights(first))


@pytest.mark.parametrize("limits", [{"max_epochs": 2}, {"max_epochs": None, "max_steps": 8}])
def test_a_fit_that_is_told_to_stop_between_epochs_goes_on_with_the_next(make_module, tmp_path, limits):
    undisturbed = make_module()
    trainer(pruning(tmp_path / "undisturbed"), **limits).fit(undisturbed)
    with pytest.raises(SystemExit):
        trainer(StopAfter(4), pruning(tmp_path), **limits).fit(make_module())
    module = make_module()
    fit = trainer(pruning(tmp_path), **limits)
    fit.fit(module)
    assert module.steps == 4
    assert (fit.global_step, fit.current_epoch, fit.fit_loop.epoch_loop._batches_that_stepped) == (8, 2, 8)
    assert same(weights(module), weights(undisturbed))
