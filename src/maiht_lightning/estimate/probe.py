"""Counting what a model's forward and backward passes do, on the meta device: sizes are computed, numbers are not.

A twin of the model with one block and one with two differ by what a block costs; the rest is outside the blocks.
All that is counted grows linearly with the number of tokens, so two short windows tell what a token costs. Attention
alone grows faster: it is replaced by a stand-in that keeps what a fused kernel keeps, and its products are counted by
formula.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..capture.entries import Entry, finding_entries
from ..models.blocks import find_blocks, find_linears

# Lengths of the two windows, in tokens.
FEWER, MORE = 32, 64
_ATTENTION = "maiht_estimate"


@dataclass(frozen=True)
class Counts:
    """What a part of a model does, in bytes per token.

    Args:
        saved: Activations kept for the backward pass, each once, without parameters.
        forward: Read and written by all but matrix products in a forward pass without gradients.
        training: The same in a forward and a backward pass.
        peak: The most that exists at a time in a forward pass without gradients, inputs included.
    """

    saved: float
    forward: float
    training: float
    peak: float


@dataclass
class Structure:
    """What a forward pass shows of a model.

    Args:
        group_of: The number of each linear layer's input, by the layer's name in the block, in the order in which they
            run.
        entries: The modules of the block that can begin at the input of their last layer.
        attention_width: See `ModelShape`.
        vocabulary: Columns of the logits.
    """

    group_of: dict[str, int] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    attention_width: int = 0
    vocabulary: int = 0


def reset_twin(kind: type[nn.Module], config: Any, blocks: int, dtype: torch.dtype) -> nn.Module:
    """Make a model of the same kind on the meta device with so many blocks; `config` is changed."""
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, _attention)
    # transformers maps `num_hidden_layers` to a config's own name for it. Some configs list a kind for each block.
    config.num_hidden_layers = blocks
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:blocks]
    config._attn_implementation = _ATTENTION
    build: Any = kind
    with torch.device("meta"):
        return build(config).to(dtype)


def width_of(model: nn.Module) -> int:
    """Find the width of the hidden states: that of the embeddings, of which no model here has two."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    return int(embedding.embedding_dim)


def count_block(twin: Callable[[int, torch.dtype], nn.Module], dtype: torch.dtype) -> tuple[Counts, Counts, Structure]:
    """Count what a block, and what everything else, does for a token.

    Args:
        twin: Makes a model on the meta device with so many blocks and weights of a dtype.
        dtype: That of the weights.

    Returns:
        The counts of a block, those of everything else, and the block's structure.
    """
    structure = Structure()
    one, two = (_count(twin(blocks, dtype), structure) for blocks in (1, 2))
    block = [b - a for a, b in zip(one, two, strict=True)]
    rest = [a - b for a, b in zip(one, block, strict=True)]
    # Peaks do not add up, so the difference of two models says nothing of a block's: it is taken from within the block.
    saved, forward, training = block[:3]
    outside = Counts(saved=rest[0], forward=rest[1], training=rest[2], peak=one[4])
    return Counts(saved=saved, forward=forward, training=training, peak=one[3]), outside, structure


def _count(model: nn.Module, structure: Structure) -> list[float]:
    """Count saved bytes, forward and training traffic, peak within the block and over all, each per token."""
    fewer, more = (_count_window(model, structure, tokens) for tokens in (FEWER, MORE))
    # What is done once per step, such as writing the parameters' gradients, is the same for both and cancels.
    return [(b - a) / (MORE - FEWER) for a, b in zip(fewer, more, strict=True)]


def _count_window(model: nn.Module, structure: Structure, length: int) -> list[int]:
    """Count the same as `_count`, in bytes of one window of so many tokens."""
    tokens = torch.zeros(1, length, dtype=torch.long, device="meta")
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            saved.setdefault(storage._cdata, tensor)
        return tensor

    structure.group_of.clear()
    block = find_blocks(model).modules[0]
    traffic = Traffic()
    with torch.no_grad(), traffic, finding_entries(block) as structure.entries:
        handles = _watch(block, structure, traffic)
        model.eval()(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    forward, peak, block_peak = traffic.moved, traffic.peak, traffic.block_peak

    model.train()
    traffic = Traffic()
    with traffic:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(input_ids=tokens, labels=tokens, use_cache=False)
        structure.vocabulary = output.logits.shape[-1]
        bytes_saved = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
        output.loss.backward()
    structure.attention_width = _attention_width[0]
    model.zero_grad()
    return [bytes_saved, forward, traffic.moved, block_peak, peak]


def _watch(block: nn.Module, structure: Structure, traffic: "Traffic") -> list[Any]:
    """Hook into a block to number the inputs of its linear layers and to note when it begins and ends."""
    inputs: list[Tensor] = []

    def see(name: str, given: Tensor) -> None:
        number = next((i for i, known in enumerate(inputs) if given is known), len(inputs))
        if number == len(inputs):
            inputs.append(given)
        structure.group_of.setdefault(name, number)

    def leave(*_: Any) -> None:
        traffic.leave_block()
        inputs.clear()

    handles = [
        linear.register_forward_pre_hook(lambda module, args, name=name: see(name, args[0]))
        for name, linear in find_linears(block).items()
    ]
    handles.append(block.register_forward_pre_hook(lambda *_: traffic.enter_block()))
    handles.append(block.register_forward_hook(leave))
    return handles


class Traffic(TorchDispatchMode):
    """Bytes that all but matrix products read and write, and the most bytes that exist at a time.

    Attributes:
        moved: Bytes read and written.
        peak: The most that existed.
        block_peak: The same between `enter_block` and `leave_block`, beyond what existed before.
    """

    PRODUCTS = ("aten.mm.", "aten.addmm.", "aten.bmm.", "aten.baddbmm.")

    def __init__(self) -> None:
        super().__init__()
        self.moved = self.alive = self.peak = self.block_peak = 0
        self._known: set[int] = set()
        self._outer = (0, 0)

    def enter_block(self) -> None:
        """Begin `block_peak`."""
        self._outer = self.peak, self.alive
        self.peak = self.alive

    def leave_block(self) -> None:
        """End `block_peak`."""
        before, alive = self._outer
        self.block_peak = self.peak - alive
        self.peak = max(self.peak, before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given, made = tensors(args), tensors(output)
        storages = {tensor.untyped_storage()._cdata for tensor in given}
        for tensor in made:
            if tensor.untyped_storage()._cdata not in storages:
                self._note(tensor)
        is_view = bool(made) and all(tensor.untyped_storage()._cdata in storages for tensor in made)
        if str(func).startswith(self.PRODUCTS) or (is_view and not func._schema.is_mutable) or "empty" in str(func):
            return output
        moved = made if "embedding" in str(func) or "select" in str(func) else [*given, *made]
        self.moved += sum(map(nbytes, moved))
        return output

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor's entries."""
    return tensor.numel() * tensor.element_size()


def tensors(values: Any) -> list[Tensor]:
    """Those among an operation's arguments or results."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, list | tuple):
        return [tensor for value in values for tensor in tensors(value)]
    return []


_attention_width = [0]


class _Attention(torch.autograd.Function):
    """Attention that keeps what a fused kernel keeps: query, key, value, output and one number per query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        log_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, log_sums)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """Stand in for a transformers attention function; the tensors have shape (batch, heads, tokens, size)."""
    _attention_width[0] = query.shape[1] * (query.shape[-1] + value.shape[-1])
    output = _Attention.apply(query, key, value)
    return output.transpose(1, 2).contiguous(), None
