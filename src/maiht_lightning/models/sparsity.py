"""Counting the zeros of a pruned model."""

from dataclasses import dataclass

import torch
from torch import nn

from ..records import LayerRecord
from .blocks import find_blocks
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
    return [LayerCount(path, *_count(linear)) for path, linear in find_blocks(model).linears()]


def measured_sparsity(counts: list[LayerCount]) -> float:
    """Fraction of zeros over all counted layers."""
    return sum(count.zeros for count in counts) / sum(count.size for count in counts)


def layers_that_lost_zeros(counts: list[LayerCount], records: list[LayerRecord]) -> list[str]:
    """The layers that have fewer zeros now than when they were pruned, by their path in the model."""
    now = {count.name: count.zeros for count in counts}
    return [record.name for record in records if now.get(record.name, 0) < record.zeros]


def _count(linear: nn.Module) -> tuple[int, int]:
    weight = full_weight(linear)
    return weight.numel() - int(weight.count_nonzero()), weight.numel()
