"""Rotary frequencies in float32, whatever the weights are in.

Lightning's `bf16-true` and `16-true` cast a module with all its buffers. Rotary frequencies of bfloat16 are off by up
to 0.4 %, which at position 2,000 is another angle altogether; and the folder that is saved, loaded again, has those of
float32, so that it is another model than the one that was trained, pruned and measured.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

FREQUENCIES = "inv_freq"


def keeping_buffers(module: nn.Module, fn: Callable[[Tensor], Tensor], apply: Callable[..., Any]) -> None:
    """Move a module as `fn` asks, with floating-point buffers in the dtype that they had.

    Args:
        module: The module.
        fn: What `nn.Module._apply` is given.
        apply: That method of the module's parent class.
    """
    before = {
        (submodule, name): buffer
        for submodule in module.modules()
        for name, buffer in submodule.named_buffers(recurse=False)
        if buffer.is_floating_point()
    }
    apply(fn)
    for (submodule, name), old in before.items():
        new = submodule.get_buffer(name)
        if new.dtype != old.dtype:
            # A meta tensor has no values that could be kept.
            kept = torch.empty_like(new, dtype=old.dtype) if old.is_meta else old.to(new.device)
            setattr(submodule, name, kept)


def restore_frequencies(model: nn.Module) -> list[str]:
    """Give rotary embeddings whose frequencies were rounded to half precision those that they had, in place.

    They are computed anew from the module's config.

    Returns:
        Paths of the modules that were restored.

    Raises:
        ValueError: The frequencies of a module cannot be computed anew, or are others.
    """
    restored = []
    for path, module in model.named_modules():
        rounded = module._buffers.get(FREQUENCIES)
        if rounded is None or rounded.dtype not in (torch.bfloat16, torch.float16):
            continue
        try:
            fresh = type(module)(config=module.config)
            exact = fresh.get_buffer(FREQUENCIES)
            same = torch.equal(exact.to(rounded.device, rounded.dtype), rounded)
        except (TypeError, AttributeError, RuntimeError, ValueError, KeyError):
            same = False
        if not same:
            raise ValueError(
                f"{path}.{FREQUENCIES} was rounded to {rounded.dtype}, and cannot be computed anew: keep float buffers "
                f"in float32, as CausalLMModule does, or train with precision bf16-mixed or 32-true"
            )
        for name, buffer in fresh.named_buffers(recurse=False):
            setattr(module, name, buffer.to(rounded.device))
        restored.append(path)
    return restored
