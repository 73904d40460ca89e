"""Short fits of a small pruned model, and what must hold after them."""

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

BATCHES = torch.randint(0, 64, (100, 4, 16), generator=torch.Generator().manual_seed(3))


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1, foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1, fused=True),
    "AMSGrad": lambda p: torch.optim.Adam(p, lr=3e-3, amsgrad=True, weight_decay=0.01),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
}


STEPS = 50


def masks_of(model):
    return {name: p != 0 for name, p in model.named_parameters() if "_proj" in name}


def loss_of(model, batch, parameters=None):
    arguments = {"input_ids": batch, "labels": batch, "use_cache": False}
    if parameters is None:
        return model(**arguments).loss
    return torch.func.functional_call(model, parameters, kwargs=arguments).loss


class Module(LightningModule):
    def __init__(self, model, optimizer_of=OPTIMIZERS["AdamW"], batches=BATCHES):
        super().__init__()
        self.lm, self.optimizer_of, self.batches, self.losses = model, optimizer_of, batches, []

    def training_step(self, batch, batch_idx):
        loss = loss_of(self.lm, batch[0])
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        return self.optimizer_of(self.parameters())

    def train_dataloader(self):
        return DataLoader(self.batches, batch_size=1)


def trainer(*callbacks, **settings):
    defaults = {
        "max_steps": STEPS,
        "gradient_clip_val": 1.0,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(callbacks=list(callbacks), **{**defaults, **settings})


def check(model, masks, start):
    """Zeros are exactly where they were, and everything else has moved."""
    for name, mask in masks.items():
        weight = dict(model.named_parameters())[name]
        assert not weight[~mask].any(), name
        assert (weight[mask] != start[name][mask]).all(), name
