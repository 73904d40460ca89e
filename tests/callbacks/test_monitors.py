"""Callbacks that remember scores forget all of them."""

import copy

import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel

from helpers.own_module import trainer
from maiht_lightning.callbacks.monitors import reset_monitors

# What a fit's beginning settles, and a clock; the rest is memory of scores and saved steps.
SETTLED = {"dirpath", "_check_on_train_epoch_end", "_last_time_checked", "log", "log_dict"}


class Logs(BoringModel):
    def validation_step(self, batch, batch_idx):
        loss = super().validation_step(batch, batch_idx)
        self.log("loss", loss["x"])
        return loss


def remembered(callback):
    """All that differs in a callback's attributes by what has happened to it."""
    return {name: copy.copy(value) for name, value in vars(callback).items() if name not in SETTLED}


def test_monitors_are_as_new(tmp_path):
    """Also in fields that a newer Lightning may have: every attribute is compared with that of a fresh callback."""
    kept = ModelCheckpoint(tmp_path, monitor="loss", mode="max", save_top_k=2, save_last=True)
    stopping = EarlyStopping("loss", patience=50)
    new = [remembered(kept), remembered(stopping)]
    fit = trainer(kept, stopping, max_steps=6, val_check_interval=2, limit_val_batches=1, enable_checkpointing=True)
    fit.fit(Logs())
    changed = [remembered(kept), remembered(stopping)]
    assert kept.best_model_path
    assert kept.last_model_path
    assert len([name for name in new[0] if differ(changed[0][name], new[0][name])]) > 5
    assert [name for name in new[1] if differ(changed[1][name], new[1][name])]
    reset_monitors(fit, tmp_path / "sparse")
    assert kept.dirpath == str(tmp_path / "sparse")
    for callback, fresh in zip((kept, stopping), new, strict=True):
        assert [name for name, value in remembered(callback).items() if differ(value, fresh[name])] == []


def differ(one, two):
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return not torch.equal(one, two)
    return type(one) is not type(two) or one != two
