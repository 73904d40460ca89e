"""Entering the modules of a block at their last layer, so that what leads there need not run again.

Attention returns what its output projection returns, and an MLP what its down projection does. Where the input of such
a layer is known, its module can begin there: nothing before it in the module has any other use.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..models.blocks import find_linears, forwards_replaced


@dataclass(frozen=True)
class Entry:
    """A module of a block that can begin at the input of its last layer.

    Args:
        module: The module's name in the block.
        layer: The layer's.
        rest: What the module returns beside the layer's output, none of it tensors; None where it returns that alone.
    """

    module: str
    layer: str
    rest: tuple[Any, ...] | None


@contextmanager
def entered(block: nn.Module, known: Iterable[tuple[Entry, Tensor]]) -> Iterator[None]:
    """Let modules of a block begin at the inputs (..., in) of their last layers, whatever they are given."""
    begun = [
        (block.get_submodule(entry.module), _beginning_at(block.get_submodule(entry.layer), inputs, entry.rest))
        for entry, inputs in known
    ]
    with forwards_replaced(begun):
        yield


@contextmanager
def finding_entries(block: nn.Module) -> Iterator[list[Entry]]:
    """Watch one forward pass of a block; the list has its entries afterwards, in the order in which they run.

    A module counts if what it returns is, unchanged, what the last linear layer to run in it has returned. In inference
    mode PyTorch cannot tell whether a tensor was changed, so that none is found.
    """
    found: list[Entry] = []
    watch = _Watch(found)
    linears = find_linears(block)
    handles = [
        linear.register_forward_hook(lambda _, __, output, name=name: watch.see_layer(name, output))
        for name, linear in linears.items()
    ]
    for name, module in block.named_modules():
        if name and name not in linears and any(layer.startswith(f"{name}.") for layer in linears):
            handles.append(
                module.register_forward_hook(lambda _, __, output, name=name: watch.see_module(name, output))
            )
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Watch:
    found: list[Entry]
    # What the last layer to run has returned, which is held so that its memory is not used twice.
    layer: str = ""
    output: Tensor | None = None
    version: int = 0

    def see_layer(self, name: str, output: Tensor) -> None:
        self.layer, self.output = name, output
        self.version = 0 if output.is_inference() else output._version

    def see_module(self, name: str, output: Any) -> None:
        first, rest = (output[0], tuple(output[1:])) if isinstance(output, tuple) else (output, None)
        if not (self.layer.startswith(f"{name}.") and self._is_returned(first)):
            return
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(rest)):
            return
        # A module around one that was found replaces it, since it leaves out more.
        self.found[:] = [entry for entry in self.found if not entry.module.startswith(f"{name}.")]
        self.found.append(Entry(name, self.layer, rest))

    def _is_returned(self, output: Any) -> bool:
        known = self.output
        return (
            isinstance(output, Tensor)
            and known is not None
            and not (known.is_inference() or output.is_inference())
            and _place(output) == _place(known)
            and output._version == self.version
        )


def _place(tensor: Tensor) -> tuple[Any, ...]:
    # Not an address, which tensors on the meta device do not have.
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _beginning_at(layer: nn.Module, inputs: Tensor, rest: tuple[Any, ...] | None) -> Callable[..., Any]:
    def forward(*_: Any, **__: Any) -> Any:
        output = layer(inputs)
        return output if rest is None else (output, *rest)

    return forward
