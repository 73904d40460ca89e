"""Somebody's LightningModule and DataLoader, pruned on their own data: the lines marked `added` are all it takes.

    python docs/examples/own_data.py --output runs/bytes

A small LLaMA learns the bytes of Python's documentation, in paragraphs that are padded to the longest of a batch. There
is no tokenizer, and nothing is downloaded. What is calibrated on, and what the model is measured by, before and after
the pruning, are the loaders and a function that were there already.
"""

import argparse
from pydoc_data.topics import topics

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from maiht_lightning import Evaluation, MAIHTPruning  # added

LONGEST = 128


class ByteModel(LightningModule):
    """A language model of bytes, with a training step of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=LONGEST,
            )
        )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of the next bytes, padding left out."""
        loss = self.net(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def collate(paragraphs: list[Tensor]) -> dict[str, Tensor]:
    """Pad paragraphs on the right: token ids and mask (paragraphs, longest)."""
    mask = pad_sequence([torch.ones_like(paragraph) for paragraph in paragraphs], batch_first=True)
    return {"input_ids": pad_sequence(paragraphs, batch_first=True), "attention_mask": mask}


def load(topic: str) -> DataLoader[Tensor]:
    """The paragraphs of a topic, the longer ones cut."""
    paragraphs = [torch.tensor(list(text.encode()[:LONGEST])) for text in topics[topic].split("\n\n") if len(text) > 20]
    return DataLoader(paragraphs, batch_size=8, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]


def bytes_foreseen(model: LlamaForCausalLM) -> dict[str, float]:
    """How many of the bytes of a sentence the model expects."""
    sentence = torch.tensor([list(b"the value of the attribute is the name of the class")], device=model.device)
    expected, found = model(sentence).logits[:, :-1].argmax(-1), sentence[:, 1:]
    return {"bytes foreseen": float((expected == found).float().mean())}


def main() -> None:
    """Train as ever; the pruning comes at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="the run's folder")
    parser.add_argument("--epochs", type=int, default=8)
    args = parser.parse_args()

    training, held_out = load("debugger"), load("strings")
    measures = Evaluation(perplexity={"held out": held_out}, metrics=[bytes_foreseen])  # added
    pruning = MAIHTPruning(sparsity=0.5, calibration=training, evaluation=measures, output_dir=args.output)  # added
    trainer = Trainer(
        max_epochs=args.epochs,
        callbacks=[pruning],  # added
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(ByteModel(), training)


if __name__ == "__main__":
    main()
