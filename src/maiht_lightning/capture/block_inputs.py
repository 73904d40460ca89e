"""Recording what enters the decoder blocks, and running them one by one.

The model's own forward prepares rotary embeddings and masks; what it hands to each block is recorded once,
with every block replaced by the identity, and given to the block again when its turn comes. So the blocks'
conventions need not be known here, and recording costs next to nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.offload import to_device


@dataclass
class Batch:
    """Calibration windows on their way through the blocks.

    Args:
        hidden: Input of the next block (windows, seqlen, hidden), in the model's dtype, where it is kept: on the
            computing device, in host memory, or in a file that is mapped there.
        arguments: For each block the other arguments it gets: positional ones, keyword ones.
        device: Where to compute.
    """

    hidden: Tensor
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]
    device: torch.device

    def input(self) -> Tensor:
        """Input of the next block on the computing device."""
        return self.hidden.to(self.device, non_blocking=True)

    def advance(self, block: nn.Module, index: int) -> None:
        """Replace the hidden states by a block's output."""
        output = run_block(block, self.input(), self.arguments[index])
        if self.kept_elsewhere:
            self.hidden.copy_(output, non_blocking=True)
        else:
            self.hidden = output

    @property
    def kept_elsewhere(self) -> bool:
        """Whether the hidden states have a place of their own, not that of the block's output."""
        return self.hidden.device.type != self.device.type or _is_mapped(self.hidden)


def run_block(block: nn.Module, hidden: Tensor, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
    """Output (windows, seqlen, hidden) of one block; older models wrap it in a tuple."""
    positional, keywords = arguments
    output = block(hidden, *positional, **keywords)
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def record_inputs(
    model: nn.Module,
    blocks: tuple[nn.Module, ...],
    windows: Tensor,
    batch_size: int = 1,
    *,
    device: torch.device | None = None,
    keep: Callable[[Tensor], Tensor] | None = None,
) -> list[Batch]:
    """Record the first block's inputs and every block's other arguments.

    Args:
        model: A Hugging Face causal language model in eval mode; its blocks may be on the meta device.
        blocks: Its decoder blocks.
        windows: Token ids (samples, seqlen).
        batch_size: Windows a forward pass.
        device: Where the blocks will be computed; by default where the model is.
        keep: Puts hidden states where they are kept.

    Returns:
        One entry a batch. Arguments that are equal in all batches are stored once.
    """
    batches: list[Batch] = []
    recorded: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []
    # The backbone, without the head: a vocabulary of logits is of no use here.
    backbone = getattr(model, "base_model", model)
    home = next(parameter.device for parameter in model.parameters() if not parameter.is_meta)
    device = device or home
    with _blocks_bypassed(blocks, recorded):
        for tokens in windows.split(batch_size):
            recorded.clear()
            backbone(input_ids=tokens.to(home), use_cache=False)
            if len(recorded) != len(blocks):
                raise ValueError(
                    f"{type(model).__name__} ran {len(recorded)} of its {len(blocks)} decoder blocks in one "
                    f"forward pass; models that skip or repeat blocks are not supported"
                )
            arguments = to_device([(positional, keywords) for _, positional, keywords in recorded], device)
            if batches:
                arguments = [_share(new, old) for new, old in zip(arguments, batches[0].arguments, strict=True)]
            hidden = recorded[0][0]
            batches.append(Batch(hidden.to(device) if keep is None else keep(hidden), arguments, device))
    return batches


@torch.no_grad()
def logits_from_hidden(model: nn.Module, blocks: tuple[nn.Module, ...], tokens: Tensor, hidden: Tensor) -> Tensor:
    """Logits (windows, seqlen, vocabulary) of a model whose last block has just returned `hidden`.

    Args:
        model: As for `record_inputs`.
        blocks: Its decoder blocks, which do not run.
        tokens: Token ids (windows, seqlen) that led there.
        hidden: The last block's output.
    """
    with _blocks_bypassed(blocks, [], hidden):
        return model(input_ids=tokens, use_cache=False).logits


@contextmanager
def _blocks_bypassed(
    blocks: tuple[nn.Module, ...],
    recorded: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]],
    result: Tensor | None = None,
) -> Iterator[None]:
    """Blocks note what they get and return it, or `result`; one runs once, to learn the form of their output."""
    returns_tuple: list[bool] = []
    # A block may already have a forward of its own, as Accelerate's hooks give it one.
    before = [block.__dict__.get("forward") for block in blocks]

    def make(block: nn.Module) -> Any:
        forward = block.forward

        def record(hidden: Tensor | None = None, *positional: Any, **keywords: Any) -> Any:
            if hidden is None:
                hidden = keywords.pop("hidden_states")
            if not returns_tuple:  # run one block to learn what blocks of this model return
                trial = hidden, positional, keywords
                if any(parameter.is_meta for parameter in block.parameters()):
                    trial = to_device(trial, "meta")
                returns_tuple.append(isinstance(forward(trial[0], *trial[1], **trial[2]), tuple))
            recorded.append((hidden, positional, keywords))
            returned = hidden if result is None else result
            return (returned,) if returns_tuple[0] else returned

        return record

    try:
        for block in blocks:
            block.forward = make(block)
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.forward = forward


def _is_mapped(tensor: Tensor) -> bool:
    return tensor.untyped_storage().filename is not None if tensor.device.type == "cpu" else False


def _share(new: Any, old: Any) -> Any:
    """`old` in place of an equal `new`, element by element, so that equal tensors exist once."""
    if isinstance(new, Tensor):
        same = isinstance(old, Tensor) and new.shape == old.shape and new.dtype == old.dtype and torch.equal(new, old)
        return old if same else new
    if type(new) is tuple and type(old) is tuple and len(new) == len(old):
        return tuple(_share(a, b) for a, b in zip(new, old, strict=True))
    if type(new) is dict and type(old) is dict:
        return {key: _share(value, old.get(key)) for key, value in new.items()}
    return new
