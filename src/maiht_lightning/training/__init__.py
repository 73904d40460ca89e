"""Fitting, pruning and fitting on: the LightningModule, the Trainer that can also prune, the sparse fine-tune."""
