"""`FrozenSparsity`: a fit that keeps the zeros of a pruned model."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from ..models.sparsity import count_zeros
from ..recovery.freeze import LostZerosError, SparsityMasks, freeze
from .language_model import find_language_model


class FrozenSparsity(Callback):
    """Fine-tune a pruned model with its zeros frozen.

    The zeros that the linear layers of the decoder blocks have when training starts stay zero, with any optimizer:
    gradients are masked before they are clipped, the optimizer's moments of frozen weights are zero, and the weights
    are masked again after every step, so that weight decay, momentum and rounding change nothing. All zeros are
    verified after each epoch and at the end of training.

    Checkpoints hold the number of zeros and no masks: the weights in them have the zeros, and a resumed fit finds them
    there. A checkpoint written without frozen zeros is loaded with a warning.

    On a PEFT model the product of the LoRA adapters is masked as well, in training and in PEFT's own merge, so that
    `merge_and_unload()` keeps the zeros.

    Note:
        Averaging callbacks (EMA, SWA) keep zeros only if they start from the pruned weights; what they leave is
        verified when training ends.

    Args:
        model: Dotted path of the Hugging Face model in the LightningModule. None: it is found.

    Raises:
        MisconfigurationException: The model has no zeros, or zeros were lost.

    Example::

        module = CausalLMModule("runs/NAME/model")
        Trainer(max_epochs=1, callbacks=[FrozenSparsity()]).fit(module, WikiText2DataModule())
    """

    def __init__(self, model: str | None = None) -> None:
        self.model = model
        self.masks: SparsityMasks | None = None
        # Set by `MAIHTPruning` where the zeros are still to come.
        self.expects_pruning = False
        self._loaded_zeros = 0
        self._handles: list[RemovableHandle] = []

    @override
    def state_dict(self) -> dict[str, Any]:
        """The number of zeros, from which a checkpoint of the sparse phase is known."""
        return {"zeros": self.masks.count if self.masks is not None else 0}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember how many zeros the checkpoint was written with."""
        self._loaded_zeros = state_dict["zeros"]

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Warn of a checkpoint from another phase."""
        if not self.expects_pruning and not checkpoint.get("callbacks", {}).get(self.state_key, {}).get("zeros"):
            rank_zero_warn(
                "FrozenSparsity: the checkpoint was not written with frozen zeros, so its weights are those of a dense "
                "phase. Was one from after the pruning meant?"
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the zeros, after a checkpoint was loaded."""
        model = find_language_model(pl_module, self.model)
        if self.expects_pruning and not any(count.zeros for count in count_zeros(model)):
            return
        self.freeze(trainer, pl_module)
        assert self.masks is not None
        if self.masks.count < self._loaded_zeros:
            raise MisconfigurationException(
                f"FrozenSparsity: the checkpoint was written with {self._loaded_zeros:,} zeros, but its weights have "
                f"{self.masks.count:,}"
            )

    def freeze(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze the zeros that the model has now, and clear the optimizer's memory of them."""
        self._remove_hooks()
        try:
            self.masks = freeze(find_language_model(pl_module, self.model))
        except ValueError as error:
            raise MisconfigurationException(f"FrozenSparsity: {error}") from error
        for optimizer in trainer.optimizers:
            self.masks.apply_to_optimizer(optimizer)
            # Right after the step, and not at the batch's end: a module may step several times in a batch.
            self._handles.append(optimizer.register_step_post_hook(lambda *_: self._mask_weights()))
        rank_zero_info(f"FrozenSparsity: {self.masks.count:,} zeros in {len(self.masks.masks)} layers stay zero")

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mask the gradients where the module clips them by itself, which is before the next hook."""
        if self.masks is not None and not pl_module.automatic_optimization:
            self.masks.apply_to_gradients()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Mask the gradients; Lightning clips them after this."""
        if self.masks is not None:
            self.masks.apply_to_gradients()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Verify the zeros."""
        self._verify()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Verify the zeros."""
        self._remove_hooks()
        self._verify()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Verify the zeros again, after other callbacks had their turn, where the weights are what a user gets."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(callback, StochasticWeightAveraging | WeightAveraging) for callback in callbacks):
            self._verify()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hooks behind; Lightning calls no `teardown` then."""
        self._remove_hooks()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hooks behind."""
        self._remove_hooks()

    def _mask_weights(self) -> None:
        if self.masks is not None:
            self.masks.apply_to_weights()

    def _verify(self) -> None:
        if self.masks is None:
            return
        try:
            self.masks.verify()
        except LostZerosError as error:
            raise MisconfigurationException(f"FrozenSparsity: {error}") from error

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
