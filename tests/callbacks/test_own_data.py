"""Strangers' modules pruned on their own data: no tokenizer, no network, few lines."""

import copy
import json
import socket
from contextlib import suppress

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from helpers.own_module import OwnModule, trainer
from helpers.strangers import STRANGERS, Nested, language_model, sequences
from maiht_lightning import Evaluation, MAIHTPruning, SparseFinetune, prune, sparse_finetune
from maiht_lightning.callbacks.language_model import find_language_model
from maiht_lightning.pruning.journal import Journal

pytestmark = pytest.mark.usefixtures("no_figures", "no_network")


@pytest.fixture
def no_network(monkeypatch):
    """Makes any connection fail."""

    def refuse(*_):
        pytest.fail("something was asked of the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


class Copy(Callback):
    """Copies the model as trained; stands before MAIHTPruning."""

    def on_train_end(self, trainer, pl_module):
        self.dense = copy.deepcopy(find_language_model(pl_module))


class Died(BaseException):
    """Stands for the end of a process, which nothing catches."""


def pruning(tmp_path, **settings):
    defaults = {"method": "wanda", "evaluation": Evaluation(perplexity=[]), "output_dir": str(tmp_path / "run")}
    return MAIHTPruning(**{**defaults, **settings})


def summary_of(tmp_path):
    return json.loads((tmp_path / "run" / "summary.json").read_text())


def same(one, two):
    one, two = one.state_dict(), two.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@torch.no_grad()
def perplexity_of_sequences(model, rows):
    exact, losses = copy.deepcopy(model).double().eval(), []
    for tokens in rows:
        scores = exact(input_ids=tokens[None]).logits[0].log_softmax(-1)
        losses += [-scores[place, tokens[place + 1]] for place in range(len(tokens) - 1)]
    return torch.stack(losses).mean().exp().item()


@pytest.mark.slow
@pytest.mark.parametrize("calibration", ["loader", "train"])
@pytest.mark.parametrize("name", STRANGERS)
def test_a_strangers_module_is_pruned_on_its_own_data(name, calibration, tmp_path):
    """The callback is all there is to add: it is given as it is here, in one line or some."""
    module, copied = STRANGERS[name](), Copy()
    own = calibration == "train" or name == "OwnNames"
    callback = MAIHTPruning(
        method="wanda",
        calibration="train" if own else module.loader(seed=1),
        evaluation=Evaluation(perplexity={"held out": sequences(seed=2)}),
        output_dir=str(tmp_path / "run"),
    )
    trainer(copied, callback, max_epochs=1).fit(module, module.loader())

    expected = copy.deepcopy(copied.dense)
    prune(expected, sequences(seed=0 if own else 1), method="wanda", progress=False)
    assert same(find_language_model(module), expected)
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model"), expected)
    measured = {stage: found["perplexity"]["held out"] for stage, found in summary_of(tmp_path)["stages"].items()}
    rows = sequences(seed=2)
    assert measured == pytest.approx(
        {
            "dense": perplexity_of_sequences(copied.dense, rows),
            "pruned": perplexity_of_sequences(expected, rows),
        },
        rel=1e-4,
    )
    assert measured["dense"] != measured["pruned"]


def test_windows_in_a_tensor(tmp_path):
    module, copied = Nested(), Copy()
    windows = torch.randint(0, 64, (6, 16), generator=torch.Generator().manual_seed(1))
    trainer(copied, pruning(tmp_path, calibration=windows)).fit(module, module.loader())
    prune(copied.dense, windows, method="wanda", progress=False)
    assert same(find_language_model(module), copied.dense)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "6, 16" in page


@pytest.mark.parametrize("found", ["", "/absent/model"])
def test_what_needs_a_tokenizer_says_so_before_training_and_nothing_else_does(found, tmp_path):
    module = Nested()
    find_language_model(module).config._name_or_path = found
    for settings, what in (
        ({"evaluation": Evaluation()}, "the texts and tasks of the evaluation"),
        ({"evaluation": Evaluation(perplexity=[], tasks=["boolq"])}, "the texts and tasks of the evaluation"),
        ({"calibration": None}, "the calibration text"),
    ):
        callback = pruning(tmp_path, **{"calibration": "train", **settings})
        with pytest.raises(MisconfigurationException, match=f"no tokenizer for {what}: .* Name one with"):
            trainer(callback).fit(module, module.loader())
        assert module.trainer.global_step == 0
    trainer(pruning(tmp_path, calibration="train")).fit(module, module.loader())
    assert summary_of(tmp_path)["saved"] == ["model"]


def test_a_tokenizer_of_another_library_costs_no_model(tmp_path):
    module = Nested()
    module.tokenizer = object()
    trainer(pruning(tmp_path, calibration="train")).fit(module, module.loader())
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("calibration", ["frob", 7, {"a": 1}, object()])
def test_a_calibration_that_is_none_is_refused_at_once(calibration):
    with pytest.raises(TypeError, match=r"calibration must be a LongTensor .* or have a method windows"):
        MAIHTPruning(calibration=calibration)


# ---- What the fit trains on


class Epochs(OwnModule):
    """Other windows in each epoch, and an end in the middle of one."""

    dies_at = None

    def training_step(self, batch, batch_idx):
        if self.steps == self.dies_at:
            raise Died
        return super().training_step(batch, batch_idx)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(self.current_epoch)
        return DataLoader(torch.randint(0, 64, (8, 16), generator=generator), batch_size=2)

    def validation_step(self, batch, batch_idx):
        self.net["lm"](input_ids=batch)

    def val_dataloader(self):
        return DataLoader(torch.zeros(4, 16, dtype=torch.long), batch_size=2)


def epochs(*numbers):
    return torch.cat([torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(n)) for n in numbers])


def fit_epochs(tmp_path, dies_at=None, ckpt_path=None, **settings):
    module = Epochs(language_model().train())
    module.dies_at = dies_at
    callback = pruning(tmp_path, calibration="train", **settings)
    fit = trainer(
        callback,
        max_epochs=2,
        enable_checkpointing=True,
        default_root_dir=tmp_path,
        reload_dataloaders_every_n_epochs=1,
    )
    with suppress(Died):
        fit.fit(module, ckpt_path=ckpt_path)
    return module, callback, fit


def test_validation_is_nothing_that_is_trained_on(tmp_path):
    _, callback, _ = fit_epochs(tmp_path)
    assert torch.equal(callback.run.windows.groups[0], epochs(0, 1))
    assert len(callback.run.windows.groups) == 1


def test_no_more_than_is_enough_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr("maiht_lightning.callbacks.calibration.CALIBRATION_TOKENS", 5 * 32)
    _, callback, _ = fit_epochs(tmp_path)
    assert torch.equal(callback.run.windows.groups[0], epochs(0, 1)[:10])


def test_in_the_middle_of_a_fit_it_is_what_came_before(tmp_path):
    _, callback, _ = fit_epochs(tmp_path, prune_at="step:3")
    assert torch.equal(callback.run.windows.groups[0], epochs(0)[:6])


def test_a_fit_that_resumes_within_its_training_prunes_with_the_same_windows(tmp_path):
    undisturbed, _, _ = fit_epochs(tmp_path / "undisturbed")
    fit_epochs(tmp_path, dies_at=6)
    (checkpoint,) = tmp_path.glob("**/epoch=0*.ckpt")
    module, callback, _ = fit_epochs(tmp_path, ckpt_path=str(checkpoint))
    assert module.steps == 4
    assert torch.equal(callback.run.windows.groups[0], epochs(0, 1))
    assert same(module, undisturbed)


def test_a_pruning_that_died_resumes_with_the_same_windows(tmp_path, monkeypatch):
    undisturbed, _, _ = fit_epochs(tmp_path / "undisturbed")
    with monkeypatch.context() as patch:
        save, calls = Journal.save, []

        def die_at_the_second(journal, *args):
            calls.append(journal)
            if len(calls) == 2:
                raise Died
            save(journal, *args)

        patch.setattr(Journal, "save", die_at_the_second)
        fit_epochs(tmp_path)
    module, callback, _ = fit_epochs(tmp_path)
    assert module.steps == 0
    assert callback.report.resumed == 1
    assert not (tmp_path / "run" / "journal.1").exists()
    assert torch.equal(callback.run.windows.groups[0], epochs(0, 1))
    assert same(module, undisturbed)


def test_they_leave_the_checkpoints_when_the_model_is_pruned(tmp_path):
    module, callback, fit = fit_epochs(tmp_path)
    assert "windows" not in callback.state_dict()
    sparse_finetune(fit, module, SparseFinetune(max_epochs=1))
    assert list(summary_of(tmp_path)["stages"]) == ["dense", "pruned", "finetuned"]


def test_a_training_step_that_gives_no_tokens_is_refused_at_once(tmp_path):
    class Embedded(OwnModule):
        def training_step(self, batch, batch_idx):
            self.steps += 1
            model = self.net["lm"]
            return model(inputs_embeds=model.get_input_embeddings()(batch), labels=batch).loss

    module = Embedded(language_model().train())
    with pytest.raises(MisconfigurationException, match="this fit gave it no input_ids: give calibration a DataLoader"):
        trainer(pruning(tmp_path, calibration="train")).fit(module)
    assert module.steps == 1


def test_padding_without_a_mask_is_refused_at_the_first_step(tmp_path):
    class Unmasked(Nested):
        def training_step(self, batch, batch_idx):
            del batch["attention_mask"]
            return super().training_step(batch, batch_idx)

    module = Unmasked()
    find_language_model(module).config.pad_token_id = 0
    with pytest.raises(ValueError, match=r"windows must be whole.* give batches with attention_mask"):
        trainer(pruning(tmp_path, calibration="train")).fit(module, module.loader())
    assert module.trainer.global_step == 0
    assert not find_language_model(module).model._forward_pre_hooks


def test_what_is_generated_in_a_training_step_is_not_trained_on(tmp_path):
    class Sampling(OwnModule):
        def training_step(self, batch, batch_idx):
            self.net["lm"].generate(batch[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=0)
            return super().training_step(batch, batch_idx)

    module, callback = Sampling(language_model().train()), pruning(tmp_path, calibration="train")
    trainer(callback).fit(module)
    expected = torch.cat(list(module.train_dataloader()))
    assert torch.equal(callback.run.windows.groups[0], expected)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_what_comes_with_a_cache_is_no_training_window(name):
    """By the argument's name before transformers 5.24, and since."""
    from maiht_lightning.callbacks.calibration import TrainingWindows

    class Backbone(torch.nn.Module):
        def forward(self, input_ids=None, past_key_values=None, cache=None):
            return input_ids

    model, seen = Backbone(), TrainingWindows()
    seen.watch(model, lambda windows: None)
    seen.is_listening = True
    model(input_ids=torch.tensor([[9]]), **{name: object()})
    model(input_ids=torch.tensor([[1, 2, 3]]))
    assert [group.tolist() for group in seen.windows().groups] == [[[1, 2, 3]]]


def test_without_a_fit_there_is_nothing_to_take(tmp_path):
    from maiht_lightning.training.trainer import PruningTrainer

    callback = pruning(tmp_path, calibration="train")
    with pytest.raises(MisconfigurationException, match="calibration must be a text or token batches where"):
        PruningTrainer(
            accelerator="cpu",
            callbacks=[callback],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        ).prune(OwnModule(language_model()))
