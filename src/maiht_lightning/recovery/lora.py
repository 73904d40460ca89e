"""LoRA adapters (PEFT) on a pruned model that leave its zeros alone, in training and when they are merged.

Background: Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, ICLR 2022 (arXiv 2106.09685). A layer's
output is W x + s B A x, and merging adds s B A to W, which fills its zeros. Here the product is masked by M = (W ≠ 0)
in both places, so that the merged model has W's zeros and the outputs that were trained.
"""

from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import Tensor, nn

from ..models.blocks import LINEAR_TYPES, weight_of


def mask_lora(model: nn.Module) -> nn.Module:
    """Mask the adapters' product in every LoRA layer over a linear layer with zeros, in place.

    `freeze` and `FrozenSparsity` do this by themselves. By hand it is for adapters that were trained elsewhere:
    `mask_lora(peft_model).merge_and_unload()`; the outputs of such a model change, since they were trained without.

    Args:
        model: A PEFT model, or any other, of which nothing is changed.

    Returns:
        The same model.

    Raises:
        ValueError: An adapter over a layer with zeros is not a plain LoRA, such as DoRA, one with a bias, or one over
            GPT-2's `Conv1D`; or the layer is quantised, so that its zeros cannot be seen.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        base = layer.get_base_layer()
        if not isinstance(base, LINEAR_TYPES):
            continue
        weight = weight_of(base)
        if not weight.is_floating_point():
            raise ValueError(
                f"{name} is quantised ({weight.dtype}), and which of its weights are zero cannot be seen: load the "
                f"model with floating-point weights"
            )
        if bool((weight != 0).all()):
            continue
        _refuse_unmaskable(layer, name)
        # The adapters' parameters stay where they are, in the optimizer too, if only the layer's class changes.
        layer.__class__ = MaskedLinear
    return model


def _refuse_unmaskable(layer: LoraLayer, name: str) -> None:
    plain = type(layer) in {Linear, MaskedLinear} and not cast(Linear, layer).fan_in_fan_out
    if not plain or layer.lora_variant or any(layer.lora_bias.values()):
        raise ValueError(
            f"{name} has zeros and an adapter that cannot keep them: it must be plain LoRA over an nn.Linear, "
            f"without a bias, DoRA or other variants, but found {type(layer).__name__} "
            f"{list(layer.lora_variant.values())}"
        )


class MaskedLinear(Linear):
    """PEFT's LoRA layer with the adapters' product masked by its base layer's zeros."""

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add one more adapter, which is masked as the first; one that cannot be is refused."""
        super().update_layer(adapter_name, *args, **kwargs)
        try:
            _refuse_unmaskable(self, kwargs.get("target_name") or type(self).__name__)
        except ValueError:
            self.delete_adapter(adapter_name)
            raise

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The product s B A ∘ M (out, in), which PEFT adds when it merges."""
        return super().get_delta_weight(adapter) * (self.get_base_layer().weight != 0)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """W x + (s B A ∘ M) x for inputs (..., in)."""
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError("adapters that keep zeros cannot be mixed within a batch (adapter_names)")
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        for adapter in self.active_adapters:
            if adapter in self.lora_A:
                # A (r, in) and B (out, r)
                down, up = (cast(Tensor, part[adapter].weight) for part in (self.lora_A, self.lora_B))
                inputs = self.lora_dropout[adapter](self._cast_input_dtype(x, down.dtype))
                if torch.is_autocast_enabled(x.device.type):
                    inputs, down, up = (t.to(torch.get_autocast_dtype(x.device.type)) for t in (inputs, down, up))
                weight = self.get_base_layer().weight
                result = result + MaskedProduct.apply(inputs, down, up, weight, self.scaling[adapter])
        return result.to(dtype)


class MaskedProduct(torch.autograd.Function):
    """x (s B A ∘ M)ᵀ with M = (W ≠ 0), remembering only its arguments: s B A is as large as W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, up: Tensor, weight: Tensor, scaling: float) -> Tensor:
        """Inputs (..., in), A (r, in), B (out, r), W (out, in) and s give (..., out)."""
        ctx.save_for_backward(x, down, up, weight)
        ctx.scaling = scaling
        return x @ _product(down, up, weight, scaling).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, A and B."""
        x, down, up, weight = ctx.saved_tensors
        (grad,) = grads
        inputs = grad @ _product(down, up, weight, ctx.scaling) if ctx.needs_input_grad[0] else None
        # The gradient of s B A ∘ M (out, in), from which those of A and B follow by the chain rule.
        of_product = grad.flatten(0, -2).T @ x.flatten(0, -2)
        of_product = of_product.mul_(ctx.scaling).mul_(weight != 0)
        return inputs, up.T @ of_product, of_product @ down.T, None, None


def _product(down: Tensor, up: Tensor, weight: Tensor, scaling: float) -> Tensor:
    return (up @ down).mul_(scaling).mul_(weight != 0)
