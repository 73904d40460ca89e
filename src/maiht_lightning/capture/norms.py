"""Squared norms of the inputs and outputs of a block's linear layers: what an allocation of zeros is decided by."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models.blocks import find_linears, weight_of
from .block_inputs import BlockInputs
from .grams import as_multiplied


@dataclass
class LayerNorms:
    """What one linear layer has seen and returned, summed over all tokens.

    Args:
        inputs: Σ x² of every input (in,), float64: the diagonal of XᵀX.
        outputs: ‖XW0ᵀ‖², float64 scalar, without a bias.
    """

    inputs: Tensor
    outputs: Tensor


@torch.no_grad()
def pass_and_measure(block: nn.Module, inputs: BlockInputs) -> dict[str, LayerNorms]:
    """Pass a block, and sum what its linear layers see and return.

    Args:
        block: The block in eval mode.
        inputs: Its inputs, which become those of the next block.

    Returns:
        By the layer's name in the block.
    """
    linears, device = find_linears(block), inputs.batches[0].device
    found = {
        name: LayerNorms(
            torch.zeros(weight_of(linear).shape[1], dtype=torch.float64, device=device),
            torch.zeros((), dtype=torch.float64, device=device),
        )
        for name, linear in linears.items()
    }

    def add(name: str, linear: nn.Module, seen: Tensor, returned: Tensor) -> None:
        found[name].inputs += as_multiplied(seen).flatten(0, -2).float().square().sum(0)
        bias = getattr(linear, "bias", None)
        returned = returned if bias is None else returned - bias
        found[name].outputs += returned.float().square().sum()

    handles = [
        linear.register_forward_hook(lambda module, args, output, name=name: add(name, module, args[0], output))
        for name, linear in linears.items()
    ]
    try:
        inputs.pass_through(block)
        inputs.settle()
    finally:
        for handle in handles:
            handle.remove()
    return found
