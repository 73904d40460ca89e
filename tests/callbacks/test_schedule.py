"""Pruning in the middle of a fit, in several shots, and the sparse fine-tune that follows a fit."""

import copy
import json
from itertools import pairwise

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from helpers.divergence import definition
from helpers.own_module import NoTokenizer, OwnModule, Windows, trainer
from helpers.sharp_model import sharpen
from maiht_lightning import (
    CausalLMModule,
    Distillation,
    FrozenSparsity,
    MAIHTPruning,
    SparseFinetune,
    prune,
    sparse_finetune,
)
from maiht_lightning.callbacks.schedule import PruningStep, parse_schedule
from maiht_lightning.models.sparsity import count_zeros
from maiht_lightning.solvers import PruningSpec

# Many short fits: several seconds in all.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_figures")]


@pytest.fixture
def module(tiny_llama):
    class WithValidation(OwnModule):
        def __init__(self, model):
            super().__init__(model)
            self.learning_rate = 1e-3
            self.sparsities, self.losses = [], []

        def training_step(self, batch, batch_idx):
            self.sparsities.append(sparsity(self))
            loss = super().training_step(batch, batch_idx)
            self.losses.append(float(loss.detach()))
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
    return MAIHTPruning(
        **{"calibration": Windows(), "output_dir": str(tmp_path / "run"), "method": "wanda", **settings}
    )


def stages(tmp_path):
    return json.loads((tmp_path / "run" / "summary.json").read_text())["stages"]


# ---- The setting


def test_what_a_schedule_may_be():
    spec = PruningSpec.parse(0.9, "row", "wanda")
    assert parse_schedule("end", spec) == [PruningStep("end", 0, spec)]
    assert parse_schedule("epoch:2", spec) == [PruningStep("epoch", 2, spec)]
    steps = parse_schedule({"step:10": 0.3, "step:20": 0.5, "end": 0.6}, spec)
    assert [(step.name, step.spec.sparsity) for step in steps] == [("step:10", 0.3), ("step:20", 0.5), ("end", 0.6)]
    assert all(step.spec.at(0.9) == spec for step in steps)
    assert [steps[0].is_due(99, count) for count in (9, 10, 11)] == [False, True, True]
    assert not steps[2].is_due(99, 99)


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


@pytest.mark.parametrize("method", ["wanda", "maiht", "aiht", "iht", "sparsegpt", "admm"])
def test_in_several_shots_zeros_only_grow(module, text, tmp_path, method):
    """Also with methods that change the weights, which would choose others if nobody told them."""
    seen = []

    class Zeros(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            seen.append({n: p == 0 for n, p in module.net["lm"].named_parameters() if "_proj" in n})

    schedule = {"epoch:1": 0.3, "epoch:2": 0.5, "end": 0.6}
    fit = trainer(pruning(tmp_path, prune_at=schedule, method=method), Zeros(), max_epochs=3, limit_train_batches=2)
    fit.fit(module)
    assert module.sparsities == [0.0] * 2 + [0.3] * 2 + [0.5] * 2
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


def without_a_folder(root, *callbacks, **settings):
    """A Trainer whose pruning is told no folder, and that pruning."""
    callback = MAIHTPruning(calibration=Windows(), method="wanda", prune_at="step:6", **settings)
    return trainer(callback, *callbacks, max_epochs=3, enable_checkpointing=True, default_root_dir=root), callback


@pytest.fixture
def broken_run(module, text, tiny_llama, tmp_path):
    """The folder of a run with checkpoints at each step, and a function that makes a module to go on with."""
    saved = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit, callback = without_a_folder(tmp_path, saved)
    fit.fit(module)
    (callback.output_dir / "model_finetuned").rename(tmp_path / "finetuned")

    def another():
        again = type(module)(tiny_llama(vocab_size=64, seed=5).train())
        again.tokenizer = NoTokenizer()
        return again

    return callback.output_dir, another


def test_resumed_after_the_pruning_in_the_folder_of_the_run(broken_run, tmp_path):
    folder, another = broken_run
    fit, callback = without_a_folder(tmp_path)
    fit.fit(another(), ckpt_path=tmp_path / "ckpt" / "step=8.ckpt")
    assert callback.output_dir == folder
    assert list((tmp_path / "runs").iterdir()) == [folder]
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary["stages"]) == ["dense", "pruned", "finetuned"]
    assert len(callback.report.layers) == 14
    whole, resumed = (AutoModelForCausalLM.from_pretrained(tmp_path / "finetuned"), fit.lightning_module.net["lm"])
    saved = AutoModelForCausalLM.from_pretrained(folder / "model_finetuned")
    for one, two, three in zip(whole.parameters(), resumed.parameters(), saved.parameters(), strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_a_resumed_fit_verifies_the_zeros_of_the_pruning(broken_run, tmp_path):
    class Regrow(Callback):
        def on_fit_end(self, trainer, pl_module):
            pl_module.net["lm"].model.layers[1].mlp.up_proj.weight.data += 1e-3

    _, another = broken_run
    fit, _ = without_a_folder(tmp_path)
    fit.callbacks.insert(0, Regrow())
    with pytest.raises(MisconfigurationException, match=r"1 pruned layers lost zeros .*layers\.1\.mlp\.up_proj"):
        fit.fit(another(), ckpt_path=tmp_path / "ckpt" / "step=9.ckpt")


@pytest.mark.parametrize(("at", "given"), [(9, "other"), (4, None)])
def test_a_folder_that_is_given_wins_and_a_dense_checkpoint_begins_another(broken_run, tmp_path, at, given):
    folder, another = broken_run
    before = (folder / "summary.json").read_text()
    fit, callback = without_a_folder(tmp_path, output_dir=given and str(tmp_path / given))
    fit.fit(another(), ckpt_path=tmp_path / "ckpt" / f"step={at}.ckpt")
    assert callback.output_dir != folder
    assert callback.output_dir.name == given or callback.output_dir.parent == folder.parent
    assert (callback.output_dir / "model_finetuned" / "config.json").exists()
    assert (folder / "summary.json").read_text() == before


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


def test_its_warm_up(tiny_llama, text, tmp_path):
    """Over its own steps, and with the learning rate's own cosine."""
    tiny_llama(vocab_size=64).save_pretrained(tmp_path / "model")
    module, rates = CausalLMModule(str(tmp_path / "model"), learning_rate=1e-3, warmup_fraction=0.0), []
    module.tokenizer = NoTokenizer()
    module.on_train_batch_start = lambda *_: rates.append(module.optimizers().param_groups[0]["lr"])
    data = DataLoader([{"input_ids": row} for row in torch.arange(16 * 8).reshape(16, 8) % 64], batch_size=2)
    fit = trainer(pruning(tmp_path), max_steps=3)
    fit.fit(module, data)
    settings = SparseFinetune(max_steps=8, learning_rate=2e-3, warmup_fraction=0.5)
    sparse_finetune(fit, module, settings, train_dataloaders=data)
    assert rates[0] == 1e-3
    rising, falling = (
        [2e-3 * share for share in shares] for shares in ([0, 0.25, 0.5, 0.75], [1, 0.8536, 0.5, 0.1464])
    )
    assert rates[3:] == pytest.approx(rising + falling, rel=1e-3)


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


def test_what_cannot_be_done_changes_nothing(module, text, tmp_path):
    checkpoints = ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    callback = pruning(tmp_path)
    fit = trainer(callback, checkpoints, max_epochs=1, enable_checkpointing=True)
    fit.fit(module)

    def state():
        return (module.learning_rate, fit.max_epochs, fit.max_steps, len(fit.callbacks), callback.previous_fit), {
            name: getattr(checkpoints, name) for name in ("dirpath", "best_model_path", "last_model_path")
        }

    before = state()
    for impossible in ({"warmup_fraction": 0.1}, {"distillation": 0.5}):
        with pytest.raises(MisconfigurationException):
            sparse_finetune(fit, module, SparseFinetune(max_epochs=2, learning_rate=0.5, **impossible))
        assert state() == before
    fit.callbacks.insert(0, EMAWeightAveraging())
    with pytest.raises(MisconfigurationException, match="from before the pruning into those from after it"):
        sparse_finetune(fit, module, SparseFinetune(max_epochs=2, learning_rate=0.5))
    del fit.callbacks[0]
    assert state() == before


def by_hand(student, dense, batches, rate, weight, temperature):
    """A plain loop that keeps the student's zeros and distils from the dense model. Returns the losses."""
    masks = {name: p != 0 for name, p in student.named_parameters() if "_proj" in name}
    optimizer, losses = torch.optim.AdamW(student.parameters(), lr=rate, weight_decay=0.1), []
    for batch in batches:
        output = student(input_ids=batch, labels=batch)
        with torch.no_grad():
            target = dense(input_ids=batch).logits
        loss = (1 - weight) * output.loss + weight * definition(output.logits, target, batch, temperature)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        for name, mask in masks.items():
            student.get_parameter(name).grad *= mask
        optimizer.step()
        for name, mask in masks.items():
            student.get_parameter(name).data *= mask
    return losses


def test_each_second_fit_distils_as_it_was_asked_to(module, text, tmp_path):
    """From the model before the pruning, with this weight and temperature, or not at all; one after the other."""
    sharpen(module.net["lm"])
    fit = trainer(pruning(tmp_path, sparsity=0.8, save_dense=True))
    fit.fit(module)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model_dense")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    student.train()
    batches = list(module.train_dataloader())
    for rate, weight, temperature in ((1e-3, 0.3, 2.0), (2e-3, 0.0, 1.0), (5e-4, 0.8, 1.0), (1e-3, 1.0, 0.5)):
        module.losses.clear()
        others = [
            by_hand(copy.deepcopy(student), dense, batches, *other)[0]
            for other in ((rate, weight + 0.1, temperature), (rate, weight, 2 * temperature))
        ]
        start = copy.deepcopy(student)
        expected = by_hand(student, dense, batches, rate, weight, temperature)
        settings = SparseFinetune(max_epochs=1, learning_rate=rate, distillation=weight, temperature=temperature)
        sparse_finetune(fit, module, settings)
        assert module.losses == pytest.approx(expected, rel=1e-4)
        assert module.losses[0] != pytest.approx(others[0], rel=1e-2)
        assert (module.losses[0] != pytest.approx(others[1], rel=1e-3)) == (weight > 0)
        for name, mine in module.net["lm"].named_parameters():
            # Not entry by entry: where a gradient is almost 0, rounding decides about the sign of AdamW's first step.
            moved, by_loop = (of.detach() - start.get_parameter(name) for of in (mine, student.get_parameter(name)))
            assert (moved - by_loop).norm() < 0.01 * by_loop.norm(), name
        student.load_state_dict(module.net["lm"].state_dict())
    assert not [callback for callback in fit.callbacks if isinstance(callback, Distillation)]


def test_an_error_in_a_distilled_fit_leaves_no_distillation(module, text, tmp_path):
    fit = trainer(pruning(tmp_path, save_dense=True))
    fit.fit(module)
    kinds = [type(callback) for callback in fit.callbacks]

    def fail(*_):
        assert Distillation in map(type, fit.callbacks)
        raise RuntimeError("out of luck")

    module.on_train_batch_start = fail
    with pytest.raises(RuntimeError, match="out of luck"):
        sparse_finetune(fit, module, SparseFinetune(max_steps=1, distillation=0.5))
    assert [type(callback) for callback in fit.callbacks if type(callback) is not FrozenSparsity] == kinds


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


def fits(weight, pattern):
    """Whether a weight (out, in) has the zeros of a pattern at 50 %, by its definition."""
    rows, columns = weight.shape
    size = {"unstructured": rows * columns, "row": columns, "2:4": 4}[pattern]
    return all(2 * int((unit == 0).sum()) >= size for unit in weight.reshape(-1, size))


@pytest.mark.parametrize(
    ("given", "wanted", "pruned_again"),
    [
        ("unstructured", "2:4", True),
        ("unstructured", "row", True),
        ("row", "2:4", True),
        ("2:4", "2:4", False),
        ("row", "row", False),
        ("2:4", "unstructured", False),
    ],
)
def test_zeros_of_another_pattern_are_not_those_asked_for(module, text, tmp_path, given, wanted, pruned_again):
    model = module.net["lm"]
    prune(model, Windows().windows(None, 32), pattern=given, method="wanda", progress=False)
    model.train()
    weights = [p for name, p in model.named_parameters() if "_proj" in name]
    assert any(not fits(weight, wanted) for weight in weights) == pruned_again
    trainer(FrozenSparsity(), pruning(tmp_path, pattern=wanted), limit_train_batches=1).fit(module)
    assert all(fits(weight, wanted) for weight in weights)
    assert list(stages(tmp_path)) == (["dense", "pruned"] if pruned_again else ["pruned", "finetuned"])


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
