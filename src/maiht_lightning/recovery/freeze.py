"""Keeping the zeros of a pruned model while it is trained on."""

from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from ..models.blocks import find_adapters, find_blocks


class LostZerosError(RuntimeError):
    """Weights that were frozen at zero are no longer zero; the message names their layers."""


def freeze(model: nn.Module) -> "SparsityMasks":
    """Freeze the zeros that a model has now, for a training loop of one's own.

    As a context it does everything by itself: inside, gradients are masked as they are accumulated, weights and
    optimizer state after each step of any optimizer that holds the model's parameters, and at the end the zeros are
    verified. Or call its methods: `apply_to_gradients` before clipping, `apply_to_weights` after the step.

    Where PEFT's LoRA adapters lie on layers with zeros, their product is masked from now on, too, in the forward pass
    and in PEFT's own merge; see `maiht_lightning.recovery.lora`.

    Args:
        model: A causal language model whose decoder blocks have zeros in their linear layers, such as `prune` leaves.

    Raises:
        ValueError: The model has no decoder blocks, no zeros in their linear layers, or adapters that cannot keep them.

    Example::

        with freeze(model):
            for batch in data:
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    """
    return SparsityMasks(model)


class SparsityMasks:
    """The zeros of a model's linear layers at one moment, and what keeps them.

    A mask takes one byte per weight, on the weight's device. See `freeze`.

    Attributes:
        count: Frozen weights in all.
        masks: By the layer's name, an int8 mask of its weight's shape (out, in), or of this process's shard of it: 0
            where it is frozen at 0, else 1. They are numbers and not booleans, since the weight is multiplied by them.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module) -> None:
        if find_adapters(model):
            from .lora import mask_lora

            mask_lora(model)
        blocks = find_blocks(model)
        self.count = 0
        self._weights: dict[str, nn.Parameter] = {}
        self.masks: dict[str, Tensor] = {}
        for path, linear in blocks.linears():
            weight = linear.weight
            assert isinstance(weight, nn.Parameter)
            zeros = _full_sum(weight == 0)
            if zeros:
                self._weights[path] = weight
                self.masks[path] = (_local(weight) != 0).to(torch.int8)
                self.count += zeros
        if not self.masks:
            raise ValueError(
                f"{type(model).__name__} has no zeros to freeze in the linear layers of its {len(blocks.modules)} "
                f"decoder blocks: prune it first, or load the pruned model"
            )
        self._handles: list[RemovableHandle] = []

    @torch.no_grad()
    def apply_to_gradients(self) -> None:
        """Zero the gradients of frozen weights; call it before clipping, so that their norm does not count."""
        for name, weight in self._weights.items():
            if weight.grad is not None:
                _local(weight.grad).mul_(self._mask(name, weight))

    @torch.no_grad()
    def apply_to_weights(self) -> None:
        """Set frozen weights back to 0, which weight decay, momentum and rounding may have moved."""
        for name, weight in self._weights.items():
            _local(weight).mul_(self._mask(name, weight))

    @torch.no_grad()
    def apply_to_optimizer(self, optimizer: Optimizer) -> None:
        """Zero an optimizer's state of frozen weights: moments from before the pruning would move them."""
        for name, weight in self._weights.items():
            for value in optimizer.state.get(weight, {}).values():
                # 8-bit moments cannot be multiplied; what they do to frozen weights is undone after each step.
                if isinstance(value, Tensor) and value.shape == weight.shape and type(_local(value)) is Tensor:
                    _local(value).mul_(self._mask(name, value))

    @torch.no_grad()
    def verify(self) -> None:
        """Check that all frozen weights are 0; waits for the device once.

        Raises:
            LostZerosError: Some are not; the message names the first layer.
        """
        counts = torch.stack(
            [
                ((_local(weight) != 0) & (self._mask(name, weight) == 0)).sum().cpu()
                for name, weight in self._weights.items()
            ]
        )
        counts = _summed_over_shards(counts, next(iter(self._weights.values())))
        lost = {name: int(number) for name, number in zip(self._weights, counts, strict=True) if number}
        if lost:
            first = next(iter(lost))
            raise LostZerosError(
                f"{sum(lost.values())} zeros were lost in {len(lost)} layers, {first} first ({lost[first]}): something "
                f"changed the weights after the optimizer's step, such as another callback or a loaded checkpoint"
            )

    def __enter__(self) -> Self:
        for name, weight in self._weights.items():
            if weight.requires_grad:
                # Clipping and whatever else reads a gradient (out, in) after the backward pass finds it masked.
                self._handles.append(
                    weight.register_post_accumulate_grad_hook(
                        lambda weight, name=name: self._mask_gradient(name, weight)
                    )
                )
        # This hook is called after the steps of all optimizers of the process, also of those made later.
        self._handles.append(register_optimizer_step_post_hook(lambda optimizer, *_: self._after_step(optimizer)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if error is None:
            self.verify()

    @torch.no_grad()
    def _mask_gradient(self, name: str, weight: Tensor) -> None:
        assert weight.grad is not None
        _local(weight.grad).mul_(self._mask(name, weight))

    def _after_step(self, optimizer: Optimizer) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(id(weight) in held for weight in self._weights.values()):
            self.apply_to_weights()

    def _mask(self, name: str, like: Tensor) -> Tensor:
        # The model may have been moved to another device since the masks were made.
        if self.masks[name].device != like.device:
            self.masks[name] = self.masks[name].to(like.device)
        return self.masks[name]


def _local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, or the tensor itself where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _full_sum(tensor: Tensor) -> int:
    total = tensor.sum()
    return int(total.full_tensor() if isinstance(total, DTensor) else total)


def _summed_over_shards(counts: Tensor, weight: Tensor) -> Tensor:
    """Sum counts (layers,) over all shards; the result is the same in all processes."""
    if not isinstance(weight, DTensor):
        return counts
    mesh = weight.device_mesh
    counts = counts.to(weight.to_local().device)
    return DTensor.from_local(counts, mesh, [Partial()] * mesh.ndim, run_check=False).full_tensor().cpu()
