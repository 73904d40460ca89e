"""The order of training windows: another in each epoch, and the same after a checkpoint."""

from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.data import _replace_dunder_methods, _update_dataloader
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, get_worker_info

from helpers.own_module import trainer
from maiht_lightning.data.module import EpochOrder, TextDataModule, TokenWindows

WINDOWS = 11


class Letters:
    def __call__(self, text, **_):
        return {"input_ids": [ord(letter) - 97 for letter in text]}


class Text(TextDataModule):
    """Eleven windows of two tokens: the window's number, and 0."""

    def texts(self, split):
        return ["".join(chr(97 + i) + "a" for i in range(WINDOWS))]

    def _find_tokenizer(self):
        return Letters()


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(26)), []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["input_ids"][:, 0].tolist())
        return (self.weight[batch["input_ids"][:, 0]] - len(self.seen)).square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def order_of(epoch, seed):
    return torch.randperm(WINDOWS, generator=torch.Generator().manual_seed(seed + epoch)).tolist()


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        yield 3


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_each_epoch_has_all_windows_in_an_order_of_its_own(seed, num_workers):
    module = Module()
    trainer(max_epochs=3).fit(module, datamodule=Text(seqlen=2, batch_size=4, num_workers=num_workers))
    assert [len(batch) for batch in module.seen] == [4, 4, 3] * 3
    epochs = [[*chain(*module.seen[3 * epoch : 3 * epoch + 3])] for epoch in range(3)]
    assert epochs == [order_of(epoch, seed) for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@pytest.mark.parametrize("steps", [1, 3, 5, 6])
def test_a_resumed_fit_sees_what_the_uninterrupted_one_would(tmp_path, steps):
    """From a checkpoint within an epoch of three batches, and from one at its end."""
    whole, first, again = Module(), Module(), Module()
    trainer(max_epochs=3).fit(whole, datamodule=Text(seqlen=2, batch_size=4))
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=steps)
    settings = {"max_epochs": 3, "max_steps": steps, "enable_checkpointing": True}
    trainer(saved, **settings).fit(first, datamodule=Text(seqlen=2, batch_size=4))
    trainer(max_epochs=3).fit(again, datamodule=Text(seqlen=2, batch_size=4), ckpt_path=saved.best_model_path)
    assert first.seen + again.seen == whole.seen
    assert len(first.seen) == steps


@pytest.mark.parametrize("restarting", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_each_of_two_processes_leaves_out_its_own_batches(seed, rank, restarting):
    """Lightning wraps the order and makes the loader anew where there are several processes."""
    loop = SimpleNamespace(
        restarting=restarting,
        epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(current=SimpleNamespace(ready=2))),
    )
    data = Text(seqlen=2, batch_size=2)
    data.setup("fit")
    data.trainer = SimpleNamespace(current_epoch=1, fit_loop=loop, lightning_module=None)
    with _replace_dunder_methods(DataLoader, "dataset"):
        loader = data.train_dataloader()
    shared = _update_dataloader(loader, DistributedSamplerWrapper(loader.sampler, num_replicas=2, rank=rank, seed=9))
    shared.sampler.set_epoch(1)
    theirs = torch.randperm(WINDOWS, generator=torch.Generator().manual_seed(9 + 1)).tolist()
    mine = [order_of(1, seed)[place] for place in [*theirs, theirs[0]][rank::2]]
    batches = [mine[:2], mine[2:4], mine[4:]]
    assert len(shared) == 3
    assert [batch["input_ids"][:, 0].tolist() for batch in shared] == batches[2 if restarting else 0 :]


def test_without_a_trainer_it_is_the_first_epochs_order(seed):
    assert list(EpochOrder(WINDOWS, None)) == order_of(0, seed)
    data = Text(seqlen=2, batch_size=WINDOWS)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert batch["input_ids"][:, 0].tolist() == order_of(0, seed)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1])
def test_processes_that_load(monkeypatch, num_workers):
    by = lambda *_: {"input_ids": torch.tensor([get_worker_info() is not None])}  # noqa: E731
    monkeypatch.setattr(TokenWindows, "__getitem__", by)
    data = Text(seqlen=2, batch_size=4, num_workers=num_workers)
    data.setup("fit")
    data.setup("test")
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        assert [bool(batch["input_ids"].all()) for batch in loader] == [num_workers > 0] * 3
