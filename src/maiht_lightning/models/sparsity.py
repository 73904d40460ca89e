"""Counting the zeros of a pruned model."""

from dataclasses import dataclass

import torch
from torch import nn

from .blocks import find_blocks, find_linears
from .offload import full_weight


@dataclass(frozen=True)
class LayerCount:
    """Zeros of one linear layer, found by counting.

    Args:
        name: Dotted path in the model.
        zeros: Weights that are exactly 0.
        size: Weights in all.
    """

    name: str
    zeros: int
    size: int


@torch.no_grad()
def count_zeros(model: nn.Module) -> list[LayerCount]:
    """Count the zeros of every linear layer in the decoder blocks of a Hugging Face causal language model."""
    blocks = find_blocks(model)
    return [
        LayerCount(f"{blocks.path}.{i}.{name}", *_count(linear))
        for i, block in enumerate(blocks.modules)
        for name, linear in find_linears(block).items()
    ]


def measured_sparsity(counts: list[LayerCount]) -> float:
    """Fraction of zeros over all counted layers."""
    return sum(count.zeros for count in counts) / sum(count.size for count in counts)


def _count(linear: nn.Module) -> tuple[int, int]:
    weight = full_weight(linear)
    return weight.numel() - int(weight.count_nonzero()), weight.numel()
