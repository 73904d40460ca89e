"""Recover a pruned model with LoRA and merge the adapters without losing a zero.

    python docs/examples/lora_recovery.py --model runs/NAME/model --output recovered

`FrozenSparsity` masks the product of PEFT's adapters, in training and in PEFT's own merge. Needs `peft`.
"""

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer
from peft import LoraConfig, get_peft_model
from torch import Tensor

from maiht_lightning import FrozenSparsity, WikiText2DataModule, count_zeros, load_model, load_tokenizer
from maiht_lightning.data.python_docs import PythonDocsDataModule
from maiht_lightning.models.sparsity import measured_sparsity


class LoraModule(LightningModule):
    """A pruned model with adapters, which alone are trained."""

    def __init__(self, folder: str, learning_rate: float) -> None:
        super().__init__()
        self.tokenizer = load_tokenizer(folder)
        adapters = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
        self.model = get_peft_model(load_model(folder), adapters).train()
        self.learning_rate = learning_rate

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean cross-entropy of the next tokens."""
        loss = self.model(input_ids=batch["input_ids"], labels=batch["input_ids"], use_cache=False).loss
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW for the adapters."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.learning_rate)


def main() -> None:
    """Train, merge, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the pruned model")
    parser.add_argument("--output", required=True, help="folder for the recovered model")
    parser.add_argument("--data", choices=["python_docs", "wikitext2"], default="python_docs")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    args = parser.parse_args()

    data = {"python_docs": PythonDocsDataModule, "wikitext2": WikiText2DataModule}[args.data]
    module = LoraModule(args.model, args.learning_rate)
    trainer = Trainer(
        max_steps=args.steps,
        callbacks=[FrozenSparsity()],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, data(seqlen=args.seqlen, batch_size=4))

    before = measured_sparsity(count_zeros(module.model))
    merged = module.model.merge_and_unload()
    after = measured_sparsity(count_zeros(merged))
    merged.save_pretrained(args.output)
    module.tokenizer.save_pretrained(args.output)
    print(f"Zeros before the merge {before:.4%}, after it {after:.4%}. The recovered model is in {args.output}")


if __name__ == "__main__":
    main()
