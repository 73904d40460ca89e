"""A LightningModule, a calibration source and a Trainer as people write them for themselves."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from maiht_lightning.data.calibration import CalibrationSource


class OwnModule(LightningModule):
    """A LightningModule as somebody else writes it: other names, a step of its own."""

    def __init__(self, model):
        super().__init__()
        self.net = torch.nn.ModuleDict({"lm": model})
        self.steps = 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return self.net["lm"](input_ids=batch, labels=batch, use_cache=False).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train_dataloader(self):
        return DataLoader(torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(5)), batch_size=2)


class Windows(CalibrationSource):
    """A calibration source of somebody's own."""

    def windows(self, tokenizer, seqlen):
        return torch.randint(0, 64, (6, 32), generator=torch.Generator().manual_seed(1))


class NoTokenizer:
    """Stands in where no text is tokenized; saved beside the model."""

    def save_pretrained(self, folder):
        pass


def trainer(*callbacks, **settings):
    settings = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, **settings}
    return Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
