"""Gram matrices of the inputs of a block's linear layers.

Each batch's XᵀX is computed in float32 and summed in float64, so that neither the order of the batches nor how many
processes share them changes more than, rarely, the last bit of the sum.
"""

from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..models.blocks import find_linears, weight_of
from ..solvers.precision import can_multiply_halves, float32_products
from .block_inputs import BlockInputs

# TF32 holds values of these formats exactly: products of such inputs are as good with it as in float32, and far faster.
WITHIN_TF32 = (torch.bfloat16, torch.float16)


@dataclass
class InputGroup:
    """Linear layers that see the same input, such as q, k and v, and the Gram matrix of that input.

    Args:
        names: Their names in the block.
        gram: G = XᵀX (in, in), float64, summed over all tokens seen.
        drift: Xᵀ(X_d − X) (in, in), float64, where X_d are the dense model's inputs; None where they are not known.
    """

    names: list[str]
    gram: Tensor
    drift: Tensor | None = None


@torch.no_grad()
def accumulate_grams(block: nn.Module, inputs: BlockInputs, *, tf32: bool = False) -> list[InputGroup]:
    """Run all batches through one block and sum XᵀX for each distinct input of its linear layers.

    A forward pass ends at the input of the last layer, since the block's output is of no use before it is pruned.

    Args:
        block: The decoder block in eval mode.
        inputs: Its inputs, hidden states (windows, seqlen, hidden) per batch; they stay inputs of this block.
        tf32: Round float32 inputs to TF32 in the products, on CUDA devices that have it.

    Returns:
        The groups in the order in which the block uses them.

    Raises:
        ValueError: A linear layer of the block did not run once on every token, or its inputs are not finite.
    """
    linears = find_linears(block)
    collector = _Collector(list(linears), tf32)
    handles = [
        linear.register_forward_pre_hook(lambda module, args, name=name: collector.see(name, module, args[0]))
        for name, linear in linears.items()
    ]
    try:
        for batch in inputs:
            collector.tokens = batch.hidden.shape[:-1].numel()
            with suppress(_SeenAll):
                batch.run(block)
            collector.end_batch()
    finally:
        for handle in handles:
            handle.remove()
    for group in collector.groups:
        mirror_(group.gram)
        if not all(extreme.isfinite() for extreme in group.gram.aminmax()):
            raise ValueError(f"the inputs of {', '.join(group.names)} are not finite: the model overflows on them")
    return collector.groups


def as_multiplied(inputs: Tensor) -> Tensor:
    """A layer's inputs (..., in) as its product sees them: under autocast it rounds them to half precision."""
    device = inputs.device.type
    return inputs.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else inputs


def as_factor(inputs: Tensor) -> Tensor:
    """A layer's inputs (tokens, in) as `add_gram` takes them: half precision on GPUs that multiply it, else float32.

    A GPU forms the exact products of such numbers and sums them in float32, at twice TF32's rate and without a copy.
    """
    device = inputs.device
    if inputs.dtype not in WITHIN_TF32 or device.type != "cuda" or not can_multiply_halves(device):
        return inputs.float()
    # GPUs before Ampere have no products of bfloat16.
    lacks = (
        inputs.dtype == torch.bfloat16 and torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8,)
    )
    return inputs.float() if lacks else inputs


def slice_rows(size: int, device: torch.device) -> int:
    """Rows of a Gram matrix (in, in) that are computed at a time: an eighth, or more where an eighth is little."""
    least = 256 if device.type == "cpu" else 1024
    return min(size, max(least, -(-size // 1024) * 128))


def add_gram(gram: Tensor, tokens: Tensor, buffer: Tensor) -> None:
    """Add XᵀX to the upper triangle of a matrix, slice by slice of its rows, which saves nearly half of the product.

    What is added below the diagonal has no meaning; `mirror_` overwrites it.

    Args:
        gram: The sum (in, in), float64.
        tokens: X (tokens, in), float32, or what `as_factor` has left in half precision.
        buffer: At least (`slice_rows` · in,), float32, overwritten.
    """
    size = len(gram)
    rows = slice_rows(size, gram.device)
    for start in range(0, size, rows):
        part = gram[start : start + rows, start:]  # (rows, in − start)
        product = buffer[: part.numel()].view(part.shape)
        part += multiply(tokens[:, start : start + rows].T, tokens[:, start:], product)


def multiply(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """Write a product of float32 matrices, or of half-precision ones with sums in float32, to `out` (float32)."""
    if left.dtype == torch.float32:
        return torch.mm(left, right, out=out)
    return torch.mm(left, right, out_dtype=torch.float32, out=out)


def mirror_(gram: Tensor) -> Tensor:
    """Copy a matrix's upper triangle (in, in) to the lower one, slice by slice of its rows."""
    rows = slice_rows(len(gram), gram.device)
    for start in range(0, len(gram), rows):
        end = start + rows
        gram[end:, start:end] = gram[start:end, end:].T
        corner = gram[start:end, start:end]
        corner.copy_(corner.triu() + corner.triu(1).T)
    return gram


class _SeenAll(Exception):
    """Ends a pass through a block whose inputs have all been seen."""


@dataclass
class _Collector:
    """Sums a Gram matrix for each distinct input; the first batch shows which layers share one."""

    names: list[str]
    tf32: bool = False
    groups: list[InputGroup] = field(default_factory=list)
    group_of: dict[str, InputGroup] = field(default_factory=dict)
    # The tokens of the batch under way, and the layers that have run on them.
    tokens: int = 0
    ran: set[str] = field(default_factory=set)
    # The groups' inputs X in the batch under way, held so that no address is used twice.
    inputs: list[Tensor] = field(default_factory=list)
    # Memory for some rows of XᵀX in float32: allocating it for each product would cost as much as the sum.
    buffer: Tensor = field(default_factory=lambda: torch.empty(0))
    first_batch: bool = True

    def see(self, name: str, linear: nn.Module, inputs: Tensor) -> None:
        if name in self.ran:
            raise ValueError(f"{name} runs more than once in a forward pass, which is not supported")
        self.ran.add(name)
        # There may be more tokens than in the batch: a layer that runs on each head apart sees each several times.
        if (tokens := inputs.shape[:-1].numel()) < self.tokens:
            raise self._not_on_every_token(f"{name} ran on {tokens}")
        if self.first_batch:
            for group, known in zip(self.groups, self.inputs, strict=True):
                if inputs is known or (
                    inputs.data_ptr() == known.data_ptr()
                    and inputs.shape == known.shape
                    and inputs.stride() == known.stride()
                    and inputs._version == known._version
                ):
                    group.names.append(name)
                    self.group_of[name] = group
                    return
            size = weight_of(linear).shape[1]
            gram = torch.zeros(size, size, dtype=torch.float64, device=inputs.device)
            if self.buffer.numel() < (needed := slice_rows(size, inputs.device) * size):
                self.buffer = torch.empty(needed, dtype=torch.float32, device=inputs.device)
            self.group_of[name] = InputGroup([name], gram)
            self.groups.append(self.group_of[name])
            self.inputs.append(inputs)
        elif self.group_of[name].names[0] != name:
            return
        gram, inputs = self.group_of[name].gram, as_multiplied(inputs)
        # The training run may have set another precision for its own products, and autocast.
        tf32 = self.tf32 or inputs.dtype in WITHIN_TF32
        with torch.autocast(gram.device.type, enabled=False), float32_products(tf32=tf32):
            add_gram(gram, as_factor(inputs.reshape(-1, inputs.shape[-1])), self.buffer)
        if not self.first_batch and name == self.groups[-1].names[0]:
            raise _SeenAll

    def end_batch(self) -> None:
        # A pass ends at the first layer of the last group, before the others of that group.
        unreached = [] if self.first_batch else self.groups[-1].names[1:]
        if missing := [name for name in self.names if name not in self.ran and name not in unreached]:
            raise self._not_on_every_token(f"{', '.join(missing)} did not run")
        self.ran.clear()
        self.inputs.clear()
        self.first_batch = False

    def _not_on_every_token(self, found: str) -> ValueError:
        return ValueError(
            f"every linear layer of a block must run on each of the {self.tokens} tokens of a pass, but {found}: "
            f"mixtures of experts, which send a token to some of their layers, are not supported"
        )
