"""Pruning in training code of one's own, and recovery in the same run.

    python docs/examples/own_code.py --model HuggingFaceTB/SmolLM2-135M-Instruct --output runs/own

The LightningModule is anybody's: it holds a Hugging Face causal language model somewhere and has its own training
step. `MAIHTPruning` prunes when the first fit ends; `sparse_finetune` fits once more with the zeros frozen.
"""

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from maiht_lightning import Evaluation, MAIHTPruning, SparseFinetune, load_model, load_tokenizer, sparse_finetune
from maiht_lightning.data.python_docs import PythonDocsCalibration, PythonDocsDataModule


class MyModule(LightningModule):
    """Somebody's module: a language model beside other parts, and a loss of its own."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.tokenizer = load_tokenizer(name)
        self.parts = nn.ModuleDict({"language_model": load_model(name).train()})
        self.temperature = nn.Parameter(torch.ones(()))
        # An attribute of this name is what `SparseFinetune(learning_rate=...)` sets.
        self.learning_rate = 2e-5

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of the next tokens, computed here, with a temperature that is trained along."""
        logits = self.parts["language_model"](input_ids=batch["input_ids"], use_cache=False).logits * self.temperature
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD, to show that any optimizer will do."""
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9)


def main() -> None:
    """Train, prune, train on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="hub name, folder or .gguf file")
    parser.add_argument("--output", required=True, help="the run's folder")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10, help="before the pruning, and after it")
    args = parser.parse_args()

    pruning = MAIHTPruning(
        sparsity=args.sparsity,
        # Text that every Python installation carries; without these two lines it is C4 and WikiText-2.
        calibration=PythonDocsCalibration(samples=16, seqlen=args.seqlen),
        evaluation=Evaluation(perplexity=["python_docs"], seqlen=args.seqlen, max_windows=8),
        output_dir=args.output,
    )
    trainer = Trainer(
        max_steps=args.steps, callbacks=[pruning], limit_val_batches=0, logger=False, enable_checkpointing=False
    )
    module, data = MyModule(args.model), PythonDocsDataModule(seqlen=args.seqlen, batch_size=2)
    trainer.fit(module, data)
    sparse_finetune(trainer, module, SparseFinetune(max_steps=args.steps, learning_rate=1e-3), datamodule=data)


if __name__ == "__main__":
    main()
