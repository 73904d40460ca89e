"""`Distillation`: a fit in which a teacher's predictions are part of the loss."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from ..models.loading import check_source, load_model
from ..recovery.distillation import Distilled, check_distillation, distilled
from .language_model import find_language_model


class Distillation(Callback):
    """Fine-tune a model, such as a pruned one, with the predictions of a teacher, such as the dense one.

    The loss that the Hugging Face model returns in training becomes (1 − weight)·loss + weight·T²·KL(teacher ‖ model)
    at temperature T, a mean over the predicted tokens (Hinton et al. 2015, https://arxiv.org/abs/1503.02531). Any
    LightningModule works that passes `labels` and takes the output's `loss`; validation is as without. The divergence
    is logged as `train/kl`, in nats a token with T² in it.

    The teacher is loaded when the fit starts, in the model's dtype and on its device, and dropped when training ends.
    It is no part of the LightningModule: neither checkpoints nor optimizers see it, and a resumed fit loads it again.

    Note:
        What the LightningModule logs as its training loss is the mixture. The teacher must share the model's
        tokenizer; that both predict as many tokens is checked, which tokens is not.

    Args:
        teacher: Hugging Face hub name, local folder, also a compact one, or `.gguf` file (dequantised).
        weight: Share of the divergence in the loss, above 0 and at most 1.
        temperature: Softens both models' distributions; above 1, unlikely tokens count more.
        model: Dotted path of the Hugging Face model in the LightningModule. None: it is found.

    Raises:
        FileNotFoundError: `teacher` is a local path and nothing is there.
        ValueError: A number is out of range.
        MisconfigurationException: Teacher, model or module do not fit; raised before training where it can be known.

    Example::

        module = CausalLMModule("runs/NAME/model")
        callbacks = [FrozenSparsity(), Distillation("HuggingFaceTB/SmolLM2-135M")]
        Trainer(max_epochs=1, callbacks=callbacks).fit(module, WikiText2DataModule())
    """

    def __init__(self, teacher: str, weight: float = 0.5, temperature: float = 1.0, model: str | None = None) -> None:
        check_source(teacher)
        check_distillation(weight, temperature)
        self.teacher, self.weight, self.temperature, self.model = teacher, weight, temperature, model
        self._distilled: Distilled | None = None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the teacher, where the model is by now, and put it into the model's loss."""
        self._release()
        model = find_language_model(pl_module, self.model)
        try:
            teacher = load_model(self.teacher, model.dtype).to(model.device).requires_grad_(False)
            self._distilled = distilled(model, teacher, self.weight, self.temperature)
        except (ValueError, OSError, ModuleNotFoundError) as error:
            raise MisconfigurationException(f"Distillation from {self.teacher}: {error}") from error
        rank_zero_info(f"Distillation: {self.teacher} teaches, with {teacher.num_parameters():,} parameters")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a model in eval mode, whose loss would stay its own."""
        if not find_language_model(pl_module, self.model).training:
            raise MisconfigurationException(
                "Distillation: the model is in eval mode, in which `from_pretrained` leaves it and Lightning too, and "
                "nothing would be distilled: call its `train()` where it is loaded"
            )

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the divergence."""
        if self._distilled is None:
            return
        kl, self._distilled.kl = self._distilled.kl, None
        if kl is not None:
            pl_module.log("train/kl", kl, prog_bar=True)
        elif outputs:
            raise MisconfigurationException(
                f"Distillation: {type(pl_module).__name__} made a training step without calling its model in training "
                f"mode, so that nothing was distilled: call `model(...)`, not `model.forward(...)` or a part of it"
            )

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the teacher."""
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Drop the teacher; Lightning calls no `teardown` then."""
        self._release()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Drop the teacher."""
        self._release()

    def _release(self) -> None:
        if self._distilled is not None:
            self._distilled.remove()
            self._distilled = None
