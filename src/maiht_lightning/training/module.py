"""A LightningModule around any Hugging Face causal language model."""

from collections.abc import Callable
from functools import cached_property, partial
from importlib.util import find_spec
from math import ceil
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from ..evaluation.perplexity import Perplexity
from ..models.blocks import find_blocks
from ..models.loading import check_source, load_model, load_tokenizer
from ..models.rotary import keeping_buffers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class CausalLMModule(LightningModule):
    """Fine-tune a causal language model with AdamW, a linear warm-up and a cosine decay to 0.

    The weights are loaded when the Trainer asks for them (`configure_model`), in the Trainer's precision, so
    that wrong settings are found before. With `precision: bf16-true` they are bfloat16 throughout, while buffers
    such as rotary frequencies stay in float32, as `from_pretrained` has them. Under `ModelParallelStrategy` the
    decoder blocks are sharded over the processes (FSDP2).

    Args:
        name_or_path: Hugging Face hub name, local folder, `.gguf` file (dequantised), or the path of a
            `config.json` for random weights.
        learning_rate: Highest learning rate.
        weight_decay: AdamW's weight decay, for matrices only.
        warmup_fraction: Share of the optimizer steps over which the learning rate rises.
        gradient_checkpointing: Recompute activations in the backward pass: less memory for one more forward pass.
        optimizer: `adamw` (PyTorch's), or `adamw_8bit` (torchao's; needs the extra `lowmem`), whose moments take 2
            bytes per weight, not 8 or, in bfloat16, 4, and which rounds updates of bfloat16 weights stochastically.
            With `precision: bf16-true`, plain AdamW loses updates below a 256th of a weight.

    Raises:
        FileNotFoundError: `name_or_path` is a local path and nothing is there.
        ValueError: A number is out of range, or the optimizer unknown.
        ModuleNotFoundError: torchao is asked for and not installed.

    Example::

        trainer = Trainer(max_steps=100, callbacks=[MAIHTPruning(sparsity=0.5)])
        trainer.fit(CausalLMModule("HuggingFaceTB/SmolLM2-135M"), WikiText2DataModule())
    """

    def __init__(
        self,
        name_or_path: str,
        learning_rate: float = 2e-5,
        weight_decay: float = 0.0,
        warmup_fraction: float = 0.03,
        gradient_checkpointing: bool = False,
        optimizer: Literal["adamw", "adamw_8bit"] = "adamw",
    ) -> None:
        super().__init__()
        check_source(name_or_path)
        for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a finite number, at least 0, but found {value!r}")
        if not 0 <= warmup_fraction <= 1:
            raise ValueError(f"warmup_fraction must lie between 0 and 1, but found {warmup_fraction!r}")
        if optimizer not in ("adamw", "adamw_8bit"):
            raise ValueError(f"optimizer must be adamw or adamw_8bit, but found {optimizer!r}")
        if optimizer == "adamw_8bit" and find_spec("torchao") is None:
            raise ModuleNotFoundError("optimizer: adamw_8bit needs torchao: pip install 'maiht-lightning[lowmem]'")
        self.save_hyperparameters()
        self.name_or_path = name_or_path
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_fraction = warmup_fraction
        self.gradient_checkpointing = gradient_checkpointing
        self.optimizer = optimizer
        # The epochs and optimizer steps of fits before this one on the same Trainer: its schedule begins after them.
        self.previous_epochs = self.previous_steps = 0
        # `maiht prune` sets this for a model larger than the memory: see `load_model`.
        self.blocks_on_disk = False
        self.perplexity = Perplexity()
        self.model: PreTrainedModel | None = None

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The model's tokenizer."""
        return load_tokenizer(self.name_or_path)

    def configure_model(self) -> None:
        """Load the weights, once, in the dtype that the Trainer's precision sets."""
        if self.model is not None:
            return
        model = load_model(self.name_or_path, torch.get_default_dtype(), blocks_on_disk=self.blocks_on_disk)
        if self.gradient_checkpointing:
            # Newer releases of transformers have renamed the method.
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        # `from_pretrained` leaves the model in eval mode, in which neither checkpointing nor dropout happens.
        self.model = model.train()
        if self.device_mesh is not None:
            _shard(self.model, self.device_mesh)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Lightning's bf16-true casts the module with all its buffers, among them the rotary frequencies.
        keeping_buffers(self, fn, partial(super()._apply, recurse=recurse))
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits (batch, seqlen, vocabulary) for token ids (batch, seqlen)."""
        return self._language_model(input_ids=input_ids, use_cache=False).logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean cross-entropy of the next tokens, in nats."""
        input_ids = batch["input_ids"]
        loss = self._language_model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add a batch to the perplexity over the validation windows, logged as `val/perplexity`."""
        self._evaluation_step(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add a batch to the perplexity over the test windows, logged as `test/perplexity`."""
        self._evaluation_step(batch, "test")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW; the learning rate warms up linearly and falls along a cosine over the whole fit."""
        from transformers import get_cosine_schedule_with_warmup

        # Weight decay is for matrices, and neither for norms' scales (hidden,) nor for biases.
        trained = [p for p in self.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer: torch.optim.Optimizer
        if self.optimizer == "adamw_8bit":
            from torchao.optim import AdamW8bit

            optimizer = AdamW8bit(groups, lr=self.learning_rate, bf16_stochastic_round=True)
        else:
            if any(p.dtype in (torch.bfloat16, torch.float16) for p in trained):
                rank_zero_warn("AdamW loses small updates of half-precision weights: consider optimizer: adamw_8bit")
            optimizer = torch.optim.AdamW(groups, lr=self.learning_rate)
        steps = self._scheduled_steps()
        schedule = get_cosine_schedule_with_warmup(optimizer, round(self.warmup_fraction * steps), steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _scheduled_steps(self) -> int:
        """Count the optimizer steps of this fit."""
        trainer = self.trainer
        # This property also loads the data, from which `num_training_batches` comes, unless only steps are counted.
        steps = trainer.estimated_stepping_batches
        if not self.previous_steps:
            return int(steps)
        ends = []
        if trainer.max_epochs is not None and trainer.max_epochs >= 0:
            an_epoch = ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
            ends.append(an_epoch * (trainer.max_epochs - self.previous_epochs))
        if trainer.max_steps >= 0:
            ends.append(trainer.max_steps - self.previous_steps)
        return min(ends)

    @property
    def _language_model(self) -> "PreTrainedModel":
        if self.model is None:
            raise RuntimeError("the weights are not loaded yet: call configure_model(), as the Trainer does")
        return self.model

    def _evaluation_step(self, batch: dict[str, Tensor], stage: str) -> None:
        input_ids = batch["input_ids"]
        self.perplexity.update(self(input_ids)[:, :-1], input_ids[:, 1:])
        self.log(f"{stage}/perplexity", self.perplexity, prog_bar=True)


def _shard(model: "PreTrainedModel", mesh: DeviceMesh) -> None:
    """Shard block by block (FSDP2) over the processes of a mesh, as `ModelParallelStrategy` asks of a module."""
    if (split := mesh["tensor_parallel"].size()) > 1:
        raise ValueError(
            f"ModelParallelStrategy would split each layer over {split} processes, which CausalLMModule does not: give "
            f"it tensor_parallel_size=1 and data_parallel_size={mesh.size()}"
        )
    for block in find_blocks(model).modules:
        fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])
