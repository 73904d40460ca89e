"""Prune a model and train it on in a loop of one's own, with Lightning Fabric and without a Trainer.

    python docs/examples/fabric_loop.py --model HuggingFaceTB/SmolLM2-135M-Instruct --output recovered

`prune` makes the zeros and `freeze` keeps them. In a plain PyTorch loop, leave out the lines with `fabric`.
"""

import argparse

import torch
from lightning.fabric import Fabric
from torch.utils.data import DataLoader

from maiht_lightning import count_zeros, freeze, load_model, load_tokenizer, prune
from maiht_lightning.data.python_docs import PythonDocsCalibration
from maiht_lightning.models.sparsity import measured_sparsity


def main() -> None:
    """Prune, train on, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="hub name, folder or .gguf file of a dense model")
    parser.add_argument("--output", required=True, help="folder for the recovered model")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--samples", type=int, default=64, help="windows, to calibrate on and to train on")
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    args = parser.parse_args()

    tokenizer, model = load_tokenizer(args.model), load_model(args.model)
    # Text that every Python installation carries; any LongTensor (samples, seqlen) of token ids will do.
    windows = PythonDocsCalibration(samples=args.samples, seqlen=args.seqlen).windows(tokenizer, args.seqlen)

    # One device: with several, each would prune and train on the same windows.
    fabric = Fabric(devices=1)
    fabric.seed_everything(0)
    prune(model.to(fabric.device), windows, sparsity=args.sparsity)
    # AdamW's decay and moments would move zeros: `freeze` below sets them back after each step.
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.1)
    wrapped, optimizer = fabric.setup(model.train(), optimizer)
    loader = fabric.setup_dataloaders(DataLoader(windows, batch_size=4, shuffle=True))  # type: ignore[arg-type]

    before = measured_sparsity(count_zeros(model))
    with freeze(model):
        for epoch in range(args.epochs):
            losses = []
            for batch in loader:
                loss = wrapped(input_ids=batch, labels=batch, use_cache=False).loss
                fabric.backward(loss)
                # The norm is that of the weights that are left: gradients of zeros are masked already.
                fabric.clip_gradients(wrapped, optimizer, max_norm=1.0)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.detach())
            print(f"epoch {epoch + 1}: loss {torch.stack(losses).mean():.4f}")
    after = measured_sparsity(count_zeros(model))

    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"Zeros before the training {before:.4%}, after it {after:.4%}. The recovered model is in {args.output}")


if __name__ == "__main__":
    main()
