"""Pruning in the middle of a fit, in several shots, and the sparse fine-tune that follows a fit."""

import json
from itertools import pairwise

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from transformers import AutoModelForCausalLM

from maiht_lightning import FrozenSparsity, MAIHTPruning, SparseFinetune, sparse_finetune
from maiht_lightning.callbacks.schedule import Shot, parse_schedule
from maiht_lightning.evaluation.settings import Evaluation
from maiht_lightning.sparsity import count_zeros
from own_module import NoTokenizer, OwnModule, Windows, trainer

# Many short fits: several seconds in all.
pytestmark = pytest.mark.slow


@pytest.fixture
def module(tiny_llama):
    class WithValidation(OwnModule):
        def __init__(self, model):
            super().__init__(model)
            self.learning_rate = 1e-3
            self.sparsities = []

        def training_step(self, batch, batch_idx):
            self.sparsities.append(sparsity(self))
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

        def validation_step(self, batch, batch_idx):
            # The mean size of the weights: pruning lowers it, whatever the loss.
            self.log("val/zeros", -sparsity(self))

        def val_dataloader(self):
            return self.train_dataloader()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=0.1)

    module = WithValidation(tiny_llama(vocab_size=64).train())
    module.tokenizer = NoTokenizer()
    return module


def sparsity(module):
    counts = count_zeros(module.net["lm"])
    return round(sum(c.zeros for c in counts) / sum(c.size for c in counts), 3)


def pruning(tmp_path, **settings):
    return MAIHTPruning(calibration=Windows(), output_dir=str(tmp_path / "run"), method="wanda", **settings)


def stages(tmp_path):
    return json.loads((tmp_path / "run" / "summary.json").read_text())["stages"]


# ---- The setting


def test_what_a_schedule_may_be():
    assert parse_schedule("end", 0.5) == [Shot("end", 0, 0.5)]
    assert parse_schedule("epoch:2", 0.5) == [Shot("epoch", 2, 0.5)]
    shots = parse_schedule({"step:10": 0.3, "step:20": 0.5, "end": 0.6}, 0.9)
    assert [(shot.name, shot.sparsity) for shot in shots] == [("step:10", 0.3), ("step:20", 0.5), ("end", 0.6)]
    assert [shots[0].is_due(99, steps) for steps in (9, 10, 11)] == [False, True, True]
    assert not shots[2].is_due(99, 99)


@pytest.mark.parametrize(
    "prune_at",
    [
        "start",
        "epoch:0",
        "epoch:x",
        "epoch",
        "step:-1",
        {},
        {"epoch:1": 0.5, "epoch:2": 0.3},
        {"epoch:2": 0.3, "epoch:1": 0.5},
        {"epoch:1": 0.3, "step:9": 0.5},
        {"end": 0.3, "epoch:1": 0.5},
        {"epoch:1": 1.5},
        {"epoch:1": "half"},
    ],
)
def test_what_it_may_not_be(prune_at):
    with pytest.raises(ValueError, match="prune_at"):
        MAIHTPruning(prune_at=prune_at)


def test_a_pattern_that_fixes_the_sparsity_has_one_shot():
    MAIHTPruning(pattern="2:4", prune_at="epoch:1")
    with pytest.raises(ValueError, match="2:4"):
        MAIHTPruning(pattern="2:4", prune_at={"epoch:1": 0.3, "end": 0.5})


# ---- In a fit


@pytest.mark.parametrize(("prune_at", "dense_steps"), [("epoch:1", 4), ("step:6", 6)])
def test_the_rest_of_the_fit_keeps_the_zeros(module, text, tmp_path, prune_at, dense_steps):
    trainer(pruning(tmp_path, prune_at=prune_at), max_epochs=3).fit(module)
    assert module.sparsities == [0.0] * dense_steps + [0.5] * (12 - dense_steps)
    assert list(stages(tmp_path)) == ["dense", "pruned", "finetuned"]
    pruned, finetuned = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "run" / name) for name in ("model", "model_finetuned")
    )
    for (name, one), two in zip(pruned.named_parameters(), finetuned.parameters(), strict=True):
        if "_proj" in name:
            assert torch.equal(one == 0, two == 0)
            assert (one[one != 0] != two[one != 0]).all()
    seconds = json.loads((tmp_path / "run" / "summary.json").read_text())["seconds"]
    assert min(seconds[phase] for phase in ("fit", "finetune", "capture", "solve", "evaluate")) > 0


def test_in_several_shots_zeros_only_grow(module, text, tmp_path):
    seen = []

    class Zeros(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            seen.append({n: p == 0 for n, p in module.net["lm"].named_parameters() if "_proj" in n})

    schedule = {"epoch:1": 0.3, "epoch:2": 0.5, "end": 0.6}
    trainer(pruning(tmp_path, prune_at=schedule), Zeros(), max_epochs=3).fit(module)
    assert module.sparsities == [0.0] * 4 + [0.3] * 4 + [0.5] * 4
    assert sparsity(module) == 0.6
    seen.append({n: p == 0 for n, p in module.net["lm"].named_parameters() if "_proj" in n})
    for before, after in pairwise(seen):
        assert all((after[name] | ~zeros).all() for name, zeros in before.items())
    assert list(stages(tmp_path)) == ["dense", "pruned"]


@pytest.mark.parametrize("prune_at", ["epoch:2", "step:8"])
def test_at_the_very_end_nothing_is_trained_on(module, text, tmp_path, recwarn, prune_at):
    trainer(pruning(tmp_path, prune_at=prune_at), max_epochs=2).fit(module)
    assert module.sparsities == [0.0] * 8
    assert list(stages(tmp_path)) == ["dense", "pruned"]
    assert not any("ended before" in str(warning.message) for warning in recwarn)


def test_gradient_accumulation_counts_optimizer_steps(module, text, tmp_path):
    trainer(pruning(tmp_path, prune_at="step:3"), max_epochs=2, accumulate_grad_batches=2).fit(module)
    assert module.sparsities == [0.0] * 6 + [0.5] * 2


def test_a_shot_that_is_never_reached_is_refused(module, text, tmp_path):
    for prune_at in ("epoch:2", "step:5"):
        with pytest.raises(MisconfigurationException, match=f"{prune_at} is never reached, since the fit ends after"):
            trainer(pruning(tmp_path, prune_at=prune_at)).fit(module)
    assert module.steps == 0


def test_a_fit_that_stops_early_is_pruned_all_the_same(module, text, tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = True

    with pytest.warns(UserWarning, match="ended before epoch:2"):
        trainer(pruning(tmp_path, prune_at={"epoch:2": 0.3, "epoch:3": 0.5}), Stop(), max_epochs=4).fit(module)
    assert sparsity(module) == 0.5
    assert list(stages(tmp_path)) == ["dense", "pruned"]


def test_averages_across_the_pruning_are_refused(module, text, tmp_path):
    with pytest.raises(MisconfigurationException, match="from before the pruning into those from after it"):
        trainer(EMAWeightAveraging(), pruning(tmp_path, prune_at="epoch:1"), max_epochs=2).fit(module)
    assert module.steps == 0


def test_best_and_last_are_of_the_sparse_phase(module, text, tmp_path):
    """By what is monitored every dense model is better; by its patience the fit would stop at once."""
    best = ModelCheckpoint(tmp_path / "ckpt", monitor="val/dense", save_last=True, mode="max")
    stopping = EarlyStopping("val/dense", mode="max", patience=1)
    module.validation_step = lambda batch, batch_idx: module.log("val/dense", -sparsity(module) + module.steps * 1e-6)
    shot = pruning(tmp_path, prune_at="epoch:2")
    trainer(shot, best, stopping, max_epochs=4, enable_checkpointing=True).fit(module)
    assert module.steps == 16
    for path in (best.best_model_path, best.last_model_path):
        stored = torch.load(path, weights_only=True)
        weight = stored["state_dict"]["net.lm.model.layers.0.mlp.up_proj.weight"]
        assert (weight == 0).float().mean() == 0.5
        assert stored["global_step"] > 8


@pytest.mark.parametrize("at", [6, 8, 10])
def test_resumed_before_at_and_after_the_pruning(module, text, tiny_llama, tmp_path, at):
    """At 8 the checkpoint is written just before the pruning."""
    saved = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    schedule = {"prune_at": "step:8"}
    trainer(pruning(tmp_path, **schedule), saved, max_epochs=4, enable_checkpointing=True).fit(module)
    again = type(module)(tiny_llama(vocab_size=64, seed=5).train())
    again.tokenizer = NoTokenizer()
    callback = pruning(tmp_path, **schedule)
    trainer(callback, max_epochs=4).fit(again, ckpt_path=tmp_path / "ckpt" / f"step={at}.ckpt")
    assert again.sparsities == [0.0] * (8 - at) + [0.5] * (16 - max(at, 8))
    assert sparsity(again) == 0.5
    assert list(stages(tmp_path)) == ["dense", "pruned", "finetuned"]


# ---- A second fit


def test_a_second_fit_goes_on_in_the_same_run(module, text, tmp_path):
    checkpoints = ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    rates = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append((trainer.optimizers[0].param_groups[0]["lr"], len(trainer.optimizers[0].state)))

    fit = trainer(pruning(tmp_path), checkpoints, Rates(), max_epochs=1, enable_checkpointing=True)
    fit.fit(module)
    dense = checkpoints.last_model_path
    sparse_finetune(fit, module, SparseFinetune(max_epochs=2, learning_rate=1e-4))
    assert module.sparsities == [0.0] * 4 + [0.5] * 8
    assert fit.global_step == 12
    assert [rate for rate, _ in rates] == [1e-3] * 4 + [1e-4] * 8
    assert rates[4][1] == 0  # the optimizer remembers nothing
    assert list(stages(tmp_path)) == ["dense", "pruned", "finetuned"]
    assert checkpoints.last_model_path.startswith(str(tmp_path / "run" / "sparse_checkpoints"))
    for path, zeros in ((dense, 0.0), (checkpoints.best_model_path, 0.5), (checkpoints.last_model_path, 0.5)):
        weight = torch.load(path, weights_only=True)["state_dict"]["net.lm.model.layers.0.mlp.up_proj.weight"]
        assert (weight == 0).float().mean() == zeros


def test_its_length_in_steps(module, text, tmp_path):
    fit = trainer(pruning(tmp_path), max_epochs=1, max_steps=3)
    fit.fit(module)
    sparse_finetune(fit, module, SparseFinetune(max_steps=6))
    assert fit.global_step == 9
    assert module.sparsities == [0.0] * 3 + [0.5] * 6


def test_it_is_refused_where_nothing_was_pruned(module, text, tmp_path):
    fit = trainer(pruning(tmp_path))
    with pytest.raises(MisconfigurationException, match="has pruned nothing"):
        sparse_finetune(fit, module, SparseFinetune(max_steps=1))
    fit.fit(module)
    with pytest.raises(MisconfigurationException, match="max_epochs or max_steps"):
        sparse_finetune(fit, module, SparseFinetune())
    with pytest.raises(MisconfigurationException, match="no attribute"):
        sparse_finetune(fit, module, SparseFinetune(max_steps=1, warmup_fraction=0.1))
    with pytest.raises(MisconfigurationException, match="save_dense=True"):
        sparse_finetune(fit, module, SparseFinetune(max_steps=1, distillation=0.5))


def test_distillation_from_the_model_before_the_pruning(module, text, tmp_path):
    fit = trainer(pruning(tmp_path, save_dense=True))
    fit.fit(module)
    sparse_finetune(fit, module, SparseFinetune(max_steps=4, distillation=0.5, temperature=2.0))
    assert sparsity(module) == 0.5
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model_dense")
    assert not any(count.zeros for count in count_zeros(dense))


@pytest.mark.parametrize(
    "settings",
    [{"max_epochs": 0}, {"max_steps": -1}, {"learning_rate": -1.0}, {"distillation": 1.5}, {"temperature": 0.0}],
)
def test_its_settings_are_checked(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        SparseFinetune(**settings)


# ---- A model that comes pruned


def test_with_frozen_sparsity_a_pruned_model_is_not_pruned_again(module, text, tmp_path):
    trainer(pruning(tmp_path)).fit(module)
    before = {n: p.detach().clone() for n, p in module.net["lm"].named_parameters()}
    again = MAIHTPruning(calibration=Windows(), output_dir=str(tmp_path / "again"), method="wanda")
    trainer(FrozenSparsity(), again).fit(module)
    assert sparsity(module) == 0.5
    for name, weight in module.net["lm"].named_parameters():
        if "_proj" in name:
            assert torch.equal(weight == 0, before[name] == 0)
    summary = json.loads((tmp_path / "again" / "summary.json").read_text())
    assert list(summary["stages"]) == ["pruned", "finetuned"]
    assert (tmp_path / "again" / "model_finetuned" / "config.json").exists()


def test_a_dense_checkpoint_loaded_afterwards_is_warned_of(module, text, tmp_path):
    checkpoints = ModelCheckpoint(tmp_path / "ckpt")
    fit = trainer(pruning(tmp_path), checkpoints, enable_checkpointing=True)
    fit.fit(module)
    with pytest.warns(UserWarning, match="was a checkpoint from before the pruning loaded"):
        fit.validate(module, ckpt_path="best")


def test_a_dense_checkpoint_given_to_frozen_sparsity_is_warned_of(module, text, tmp_path):
    checkpoints = ModelCheckpoint(tmp_path / "ckpt")
    trainer(checkpoints, enable_checkpointing=True).fit(module)
    with (
        pytest.warns(UserWarning, match="not written with frozen zeros"),
        pytest.raises(MisconfigurationException, match="no zeros to freeze"),
    ):
        trainer(FrozenSparsity(), max_epochs=2).fit(module, ckpt_path=checkpoints.best_model_path)


def test_evaluation_is_what_was_asked_for(module, tmp_path):
    assert MAIHTPruning(evaluation=Evaluation(perplexity=[])).evaluation.perplexity == []
