"""What enters the decoder blocks, one block after another.

The model's own forward prepares rotary embeddings and masks. What it hands to each block is recorded once, with every
block replaced by the identity, and given to the block when its turn comes. So this module need not know the blocks'
conventions, and recording costs next to nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..models.blocks import forwards_replaced
from ..models.offload import to_device
from .entries import Entry, entered
from .hidden_states import HiddenStateStore, NoStore

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Batch:
    """Windows on their way through the blocks.

    Args:
        hidden: Input of the next block (windows, seqlen, hidden), in the model's dtype, where it is stored: on the
            execution device, in host memory, or in a file that is mapped there.
        arguments: For each block the other arguments that it gets: positional ones, keyword ones.
        device: Where the blocks are computed.
        index: Index of the next block.
        known: Inputs (windows, seqlen, in) of layers at which modules of the next block can begin when it is passed.
    """

    hidden: Tensor
    arguments: list[Arguments]
    device: torch.device
    index: int = 0
    known: list[tuple[Entry, Tensor]] = field(default_factory=list)

    def input(self) -> Tensor:
        """Return the input of the next block (windows, seqlen, hidden) on the execution device."""
        return self.hidden.to(self.device, non_blocking=True)

    def run(self, block: Callable[..., Any]) -> Tensor:
        """Return the output (windows, seqlen, hidden) of the next block; older models wrap it in a tuple."""
        positional, keywords = self.arguments[self.index]
        output = block(self.input(), *positional, **keywords)
        return output[0] if isinstance(output, tuple) else output

    def advance(self, block: nn.Module) -> None:
        """Replace the hidden states by the output of the next block."""
        with entered(block, self.known):
            output = self.run(block)
        self.known = []
        self.index += 1
        if self._is_stored:
            self.hidden.copy_(output, non_blocking=True)
        else:
            self.hidden = output

    @property
    def _is_stored(self) -> bool:
        """Whether the hidden states have memory of their own, which is not that of a block's output."""
        return self.hidden.device.type != self.device.type or _is_mapped(self.hidden)


class BlockInputs:
    """Batches that are the inputs of one block after another.

    Iterating gives the batches, each of them an input of the block after the last one passed. A block is passed lazily:
    each batch goes through it as the batch is asked for, so that hidden states in host memory or on disk are read once
    per block.

    Args:
        batches: The batches, as inputs of the first block.
    """

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches
        self._passed: nn.Module | None = None
        # Index of the block that comes after the one passed.
        self._index = batches[0].index if batches else 0

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            # An iteration that memory has ended left some of them before the block, and others behind it.
            if self._passed is not None and batch.index < self._index:
                batch.advance(self._passed)
            yield batch
        # If the passed block is a copy, this frees its memory.
        self._passed = None

    @property
    def batch_size(self) -> int:
        """Windows in the largest batch."""
        return max(len(batch.hidden) for batch in self.batches)

    def split(self, batch_size: int, recorded: "BlockInputs") -> None:
        """Cut the batches into parts of so many windows, on their way as they are.

        Args:
            batch_size: Windows of a part at most.
            recorded: Inputs of the first block in just these parts, of which the other arguments are taken.
        """
        parts = [(hidden, batch) for batch in self.batches for hidden in batch.hidden.split(batch_size)]
        self.batches = [
            Batch(hidden, part.arguments, batch.device, batch.index)
            for (hidden, batch), part in zip(parts, recorded.batches, strict=True)
        ]

    def twin(self, store: HiddenStateStore) -> "BlockInputs":
        """The same inputs once more, which go their own way through the blocks from here on."""
        self.settle()
        return BlockInputs(
            [Batch(store.put(batch.input()), batch.arguments, batch.device, batch.index) for batch in self.batches]
        )

    @torch.no_grad()
    def pass_through(self, block: nn.Module) -> None:
        """Pass the next block, lazily: `block` must stay as it is until the batches have been iterated over."""
        self.settle()
        self._passed = block
        self._index += 1

    def forget(self) -> None:
        """Drop what is known of the next block's inside, which is about to change."""
        for batch in self.batches:
            batch.known = []

    @torch.no_grad()
    def settle(self) -> None:
        """Bring all batches through the block that was passed last, so that it may change or go."""
        if self._passed is not None:
            for _ in self:
                pass


@torch.no_grad()
def record_inputs(
    model: nn.Module,
    blocks: tuple[nn.Module, ...],
    batches: Sequence[Tensor],
    *,
    device: torch.device | None = None,
    store: HiddenStateStore | NoStore | None = None,
) -> BlockInputs:
    """Record the first block's inputs and every block's other arguments.

    Args:
        model: A Hugging Face causal language model in eval mode; its blocks may be on the meta device.
        blocks: Its decoder blocks.
        batches: Token ids (windows, seqlen), int64, of each forward pass.
        device: Where the blocks will be computed; by default where the model is.
        store: Keeps the hidden states; by default they stay on the device.

    Returns:
        The batches. Arguments that are equal in one and the next are stored once.

    Raises:
        ValueError: The model skips blocks or repeats them.
    """
    found: list[Batch] = []
    recorded: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []
    # The backbone runs without the head, whose logits (windows, seqlen, vocabulary) are of no use here.
    backbone = getattr(model, "base_model", model)
    outside = next(parameter.device for parameter in model.parameters() if not parameter.is_meta)
    device = device or outside
    with _blocks_bypassed(blocks, recorded):
        for tokens in batches:
            recorded.clear()
            backbone(input_ids=tokens.to(outside), use_cache=False)
            if len(recorded) != len(blocks):
                raise ValueError(
                    f"{type(model).__name__} ran {len(recorded)} of its {len(blocks)} decoder blocks in one "
                    f"forward pass; models that skip or repeat blocks are not supported"
                )
            arguments = to_device([(positional, keywords) for _, positional, keywords in recorded], device)
            if found:
                # Of the last batch: batches of the same length stand together.
                arguments = [_share(new, old) for new, old in zip(arguments, found[-1].arguments, strict=True)]
            hidden = recorded[0][0]
            found.append(Batch(hidden.to(device) if store is None else store.put(hidden), arguments, device))
    return BlockInputs(found)


def logits_from_hidden(model: nn.Module, blocks: tuple[nn.Module, ...], tokens: Tensor, hidden: Tensor) -> Tensor:
    """Compute the logits (windows, seqlen, vocabulary) of a model whose last block has returned `hidden`.

    They are differentiable by it where gradients are on.

    Args:
        model: As for `record_inputs`.
        blocks: Its decoder blocks, which do not run.
        tokens: Token ids (windows, seqlen) that led there.
        hidden: The last block's output (windows, seqlen, hidden).
    """
    with _blocks_bypassed(blocks, [], hidden):
        return model(input_ids=tokens, use_cache=False).logits


@contextmanager
def _blocks_bypassed(
    blocks: tuple[nn.Module, ...],
    recorded: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]],
    result: Tensor | None = None,
) -> Iterator[None]:
    """Let blocks note what they get and return it, or `result`. One runs once, to learn the form of their output."""
    returns_tuple: list[bool] = []

    def make(block: nn.Module) -> Any:
        forward = block.forward

        def record(hidden: Tensor | None = None, *positional: Any, **keywords: Any) -> Any:
            if hidden is None:
                hidden = keywords.pop("hidden_states")
            if not returns_tuple:  # one run tells whether this model's blocks wrap their output
                trial = hidden, positional, keywords
                if any(parameter.is_meta for parameter in block.parameters()):
                    trial = to_device(trial, "meta")
                returns_tuple.append(isinstance(forward(trial[0], *trial[1], **trial[2]), tuple))
            recorded.append((hidden, positional, keywords))
            returned = hidden if result is None else result
            return (returned,) if returns_tuple[0] else returned

        return record

    with forwards_replaced([(block, make(block)) for block in blocks]):
        yield


def _is_mapped(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.untyped_storage().filename is not None


def _share(new: Any, old: Any) -> Any:
    """Return `new` with `old`'s tensors where they are equal, so that equal tensors exist once."""
    if isinstance(new, Tensor):
        same = isinstance(old, Tensor) and new.shape == old.shape and new.dtype == old.dtype and torch.equal(new, old)
        return old if same else new
    if type(new) is tuple and type(old) is tuple and len(new) == len(old):
        return tuple(_share(a, b) for a, b in zip(new, old, strict=True))
    if type(new) is dict and type(old) is dict:
        return {key: _share(value, old.get(key)) for key, value in new.items()}
    return new
