"""A Trainer that can also prune without training."""

from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from ..callbacks.compatibility import find_callback
from ..callbacks.preparation import check_disk
from ..callbacks.pruning import MAIHTPruning
from ..data import c4, python_docs, wikitext2  # noqa: F401
from .checkpoint import read_checkpoint


class PruningTrainer(Trainer):
    """A Trainer that can also prune without training."""

    def prune(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
    ) -> None:
        """Prune a model without training it.

        Args:
            model: The LightningModule.
            datamodule: Not needed; taken so that one configuration serves `fit` and `prune`.
            ckpt_path: A Lightning checkpoint to load the weights from first.

        Raises:
            MisconfigurationException: The Trainer has no `MAIHTPruning`, or as that callback says.
        """
        pruning = find_callback(self, MAIHTPruning)
        if pruning is None:
            raise MisconfigurationException("prune needs MAIHTPruning among the Trainer's callbacks")
        pruning.setup(self, model, "fit")
        if self.strategy.launcher is not None:
            self.strategy.launcher.launch(self._prune, model, pruning, ckpt_path, trainer=self)
        else:
            self._prune(model, pruning, ckpt_path)

    def _prune(self, model: LightningModule, pruning: MAIHTPruning, ckpt_path: str | None) -> None:
        callbacks: list[Any] = self.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if isinstance(callback, SaveConfigCallback):
                callback.setup(self, model, "prune")
        # The part of `Trainer.fit` that puts a model on its device in its precision.
        self.strategy.connect(model)
        model.trainer = self
        self.strategy.setup_environment()
        if pruning.offload == "disk":
            if not hasattr(model, "blocks_on_disk") or ckpt_path is not None:
                raise MisconfigurationException("offload: disk needs CausalLMModule and a folder, without ckpt_path")
            model.blocks_on_disk = True  # type: ignore[assignment]
        on_host = torch.device("cpu") if pruning.offload == "cpu" else nullcontext()
        with self.strategy.tensor_init_context(), on_host, self.precision_plugin.module_init_context():
            model.configure_model()
        if ckpt_path is not None:
            model.load_state_dict(read_checkpoint(ckpt_path)["state_dict"])
        self.precision_plugin.convert_module(model)
        if pruning.offload == "none":
            self.strategy.model_to_device()
        pruning.prepare(self, model)
        check_disk(pruning, self, model, trains=False)
        pruning.prune_and_record(self, model)
        pruning.run.publish()
        pruning.run.drop_journals()
        for logger in self.loggers:
            logger.finalize("success")
