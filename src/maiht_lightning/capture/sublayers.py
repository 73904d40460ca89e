"""Gram matrices of one sublayer of a block after another, beside the dense model's.

Where the layers before it in the same block are pruned already, a layer sees what it will see in the pruned model. A
second, dense stream of hidden states tells what it would have seen in the dense one, so that its weights can be fitted
to outputs that make up for part of the error so far.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models.blocks import find_linears, weight_of
from ..solvers.precision import float32_products
from .block_inputs import Batch, BlockInputs
from .entries import Entry, entered, finding_entries
from .grams import (
    WITHIN_TF32,
    InputGroup,
    accumulate_grams,
    add_gram,
    as_factor,
    as_multiplied,
    mirror_,
    multiply,
    slice_rows,
)

# For windows that go through the blocks one by one: to add a product to a sum takes as long as that of some thousand
# tokens on a GPU, and of some hundred on a CPU.
TOKENS_AT_ONCE = 16384


@dataclass
class DenseStream:
    """The dense model's hidden states, on their way beside the pruned model's.

    Args:
        inputs: The dense inputs of the next block, batch for batch those of the pruned model.
        block: The dense block, once it is known.
        entry: Keep the group's inputs, as `accumulate_group` does with its own.
    """

    inputs: BlockInputs
    block: nn.Module
    entry: Entry | None = None


@torch.no_grad()
def find_groups(block: nn.Module, inputs: BlockInputs) -> tuple[list[list[str]], list[Entry]]:
    """Find which linear layers of a block share an input, and where its modules can begin.

    Returns:
        The names of the layers in the order in which they run, and the entries in theirs.

    Raises:
        ValueError: As `accumulate_grams` does.
    """
    inputs.settle()
    with finding_entries(block) as entries:
        groups = accumulate_grams(block, BlockInputs(inputs.batches[:1]))
    return [group.names for group in groups], entries


@torch.no_grad()
def accumulate_group(
    block: nn.Module,
    inputs: BlockInputs,
    names: list[str],
    *,
    dense: DenseStream | None = None,
    tf32: bool = False,
    entry: Entry | None = None,
    at_once: int = 1,
) -> InputGroup:
    """Run all batches through a block up to the input X of one group of layers, and sum XᵀX.

    What was kept of the block's inside for groups before this one does not run again.

    Args:
        block: The block in eval mode, with the layers before the group pruned.
        inputs: Its inputs, hidden states (windows, seqlen, hidden) per batch; they stay inputs of this block.
        names: The group's layers; the first one to run stands first.
        dense: The dense model's block and its inputs X_d; then Xᵀ(X_d − X) is summed as well, in the group's `drift`.
        tf32: Round float32 inputs to TF32 in the products, on CUDA devices that have it.
        entry: Keep the inputs with the batches, so that this module begins at them from now on, until the block is
            passed. The layers before in the module must stay as they are.
        at_once: Batches are multiplied together until they have so many tokens. Sums of others than single batches
            depend, in the last bits, on which these are.

    Raises:
        ValueError: The inputs are not finite.
    """
    size = weight_of(find_linears(block)[names[0]]).shape[1]
    group: InputGroup | None = None
    waiting: list[list[Tensor]] = []  # X and, where it is asked for, X_d (tokens, in) of some batches
    others = [None] * len(inputs.batches) if dense is None else dense.inputs
    for number, (batch, other) in enumerate(zip(inputs, others, strict=True), start=1):
        seen = [_input_of(block, names[0], batch, entry)]
        if dense is not None and other is not None:
            seen.append(_input_of(dense.block, names[0], other, dense.entry))
        waiting.append(seen)
        if number < len(inputs.batches) and sum(len(inner) for inner, *_ in waiting) < at_once:
            continue
        # A batch alone is not copied.
        factors = [as_factor(torch.cat(each) if len(each) > 1 else each[0]) for each in zip(*waiting, strict=True)]
        waiting.clear()
        if group is None:
            sums = [torch.zeros(size, size, dtype=torch.float64, device=factor.device) for factor in factors]
            group = InputGroup(names, *sums)
            buffer = torch.empty(slice_rows(size, sums[0].device) * size, dtype=torch.float32, device=sums[0].device)
        with (
            torch.autocast(seen[0].device.type, enabled=False),
            float32_products(tf32=tf32 or seen[0].dtype in WITHIN_TF32),
        ):
            add_gram(group.gram, factors[0], buffer)
            if group.drift is not None:
                add_product(group.drift, factors[0], factors[1], buffer)
    assert group is not None
    mirror_(group.gram)
    if group.drift is not None:
        # Of XᵀX_d, which half-precision inputs are enough for; the difference X_d − X would need more of them.
        group.drift -= group.gram
    for matrix in (group.gram, group.drift):
        if matrix is not None and not all(extreme.isfinite() for extreme in matrix.aminmax()):
            raise ValueError(f"the inputs of {', '.join(names)} are not finite: the model overflows on them")
    return group


def add_product(total: Tensor, left: Tensor, right: Tensor, buffer: Tensor) -> None:
    """Add LᵀR to a sum, slice by slice of its rows.

    Args:
        total: (in, in), float64.
        left: L (tokens, in), float32, or what `as_factor` has left in half precision.
        right: R (tokens, in), likewise.
        buffer: At least (`slice_rows` · in,), float32, overwritten.
    """
    rows = slice_rows(len(total), total.device)
    for start in range(0, len(total), rows):
        part = total[start : start + rows]  # (rows, in)
        part += multiply(left[:, start : start + rows].T, right, buffer[: part.numel()].view(part.shape))


class _Seen(Exception):
    """Ends a pass through a block at the input that was asked for."""


def _input_of(block: nn.Module, name: str, batch: Batch, entry: Entry | None) -> Tensor:
    """The input (tokens, in) of a layer of a block on a batch; what comes after it does not run."""
    with entered(block, batch.known), _stopping_at(find_linears(block)[name]) as seen, suppress(_Seen):
        batch.run(block)
    if entry is not None:
        batch.known.append((entry, seen[0]))
    return as_multiplied(seen[0].reshape(-1, seen[0].shape[-1]))


@contextmanager
def _stopping_at(linear: nn.Module) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []

    def stop(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen.append(arguments[0])
        raise _Seen

    handle = linear.register_forward_pre_hook(stop)
    try:
        yield seen
    finally:
        handle.remove()
