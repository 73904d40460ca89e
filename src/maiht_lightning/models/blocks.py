"""Finding the decoder blocks of a causal language model and the linear layers in them."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

LINEAR_TYPES = (nn.Linear, Conv1D)


@dataclass(frozen=True)
class DecoderBlocks:
    """The repeated blocks of a model, in the order they run.

    Args:
        path: Dotted path of their `nn.ModuleList` in the model, such as `model.layers`.
        modules: The blocks.
    """

    path: str
    modules: tuple[nn.Module, ...]

    def linears(self) -> Iterator[tuple[str, nn.Module]]:
        """Every linear layer of the blocks with its dotted path in the model, in order."""
        for index, block in enumerate(self.modules):
            for name, linear in find_linears(block).items():
                yield f"{self.path}.{index}.{name}", linear


def find_blocks(model: nn.Module) -> DecoderBlocks:
    """Find the decoder blocks: the largest `nn.ModuleList` of modules of one kind that hold linear layers.

    Raises:
        ValueError: The model has no such list, or its blocks hold mixture-of-experts weights, which are
            3-D parameters and not linear layers.
    """
    candidates = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        blocks = tuple(module)
        weights = sum(weight_of(linear).numel() for block in blocks for linear in find_linears(block).values())
        # Experts and heads are module lists too, but they lie in a block and hold fewer weights than the blocks do.
        if weights and len({type(block) for block in blocks}) == 1:
            candidates.append((weights, DecoderBlocks(path, blocks)))
    if not candidates:
        if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
            raise ValueError(
                f"{type(model).__name__} is quantised, in layers that are no nn.Linear, but only dense weights can be "
                f"pruned: load the model that it was made from"
            )
        raise ValueError(
            f"{type(model).__name__} has no decoder blocks: it must hold an nn.ModuleList of equal blocks with "
            f"nn.Linear layers, as LLaMA's model.layers, but found none"
        )
    _, found = max(candidates, key=lambda candidate: candidate[0])
    for index, block in enumerate(found.modules):
        for name, parameter in block.named_parameters():
            if parameter.ndim > 2:
                raise ValueError(
                    f"{found.path}.{index}.{name} of {type(model).__name__} has shape "
                    f"{tuple(parameter.shape)}: mixture-of-experts weights (or convolutions) are not linear "
                    f"layers and would stay dense; such models are not supported"
                )
    return found


def find_linears(block: nn.Module) -> dict[str, nn.Module]:
    """Find the linear layers of a block, `nn.Linear` and GPT-2's `Conv1D`, by their dotted names in it.

    Where a layer has PEFT adapters, the layer itself (`.base_layer`) counts and the adapters do not.
    """
    adapters = tuple(
        f"{path}.{child}."
        for path, tuned in find_adapters(block).items()
        for child, _ in tuned.named_children()
        if child != "base_layer"
    )
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, LINEAR_TYPES) and not f"{name}.".startswith(adapters)
    }


def find_adapters(model: nn.Module) -> dict[str, nn.Module]:
    """Find the layers of a model that have PEFT adapters, by dotted name."""
    if "peft" not in sys.modules:
        # PEFT takes seconds to import, and a model with adapters cannot exist before it was imported.
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    kind: Any = BaseTunerLayer  # a mixin: its types do not say that every one is a module
    return {path: module for path, module in model.named_modules() if isinstance(module, kind)}


def refuse_adapters(model: nn.Module) -> None:
    """Raise `ValueError` if a model has PEFT adapters, which would stay dense beside the pruned layers."""
    if adapters := find_adapters(model):
        raise ValueError(
            f"{next(iter(adapters))} and {len(adapters) - 1} more layers have PEFT adapters: merge them before the "
            f"pruning, with merge_and_unload()"
        )


def weight_of(linear: nn.Module) -> Tensor:
    """The layer's weight as (out, in): a view, since `Conv1D` stores the transpose."""
    weight = linear.weight
    assert isinstance(weight, Tensor)  # for the type checker
    return weight.T if isinstance(linear, Conv1D) else weight


@torch.no_grad()
def write_weight(linear: nn.Module, weight: Tensor) -> None:
    """Write a weight (out, in) into the layer, in place."""
    weight_of(linear).copy_(weight)
    # Where autocast is on, it holds low-precision copies of weights (out, in), and would use the old one.
    torch.clear_autocast_cache()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch to eval mode and put every submodule's own mode back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def forwards_replaced(forwards: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Give modules other forwards for a while."""
    # A module may already have a forward of its own, as Accelerate's hooks give it one.
    replaced = [(module, forward, module.__dict__.get("forward")) for module, forward in forwards]
    try:
        for module, forward, _ in replaced:
            module.forward = forward
        yield
    finally:
        for module, _, before in replaced:
            module.__dict__.pop("forward", None)
            if before is not None:
                module.forward = before
