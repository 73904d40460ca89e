"""Finding the Hugging Face model inside somebody's LightningModule."""

from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from ..models.blocks import find_blocks
from ..models.loading import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def find_language_model(module: LightningModule, name: str | None = None) -> "PreTrainedModel":
    """The Hugging Face model that a LightningModule holds, checked to have decoder blocks.

    Args:
        module: The LightningModule, its weights loaded.
        name: Dotted path of the model in it. None: the only Hugging Face model in it that is no part of another.

    Raises:
        MisconfigurationException: There is none, several, none of that name, or it cannot be pruned.
    """
    from transformers import PreTrainedModel

    found: dict[str, nn.Module] = {}
    if name is not None:
        try:
            found[name] = module.get_submodule(name)
        except AttributeError as error:
            raise MisconfigurationException(
                f"model={name!r}: {type(module).__name__} has no submodule of that name"
            ) from error
    else:
        for path, submodule in module.named_modules():
            if isinstance(submodule, PreTrainedModel) and not any(path.startswith(f"{p}.") for p in found):
                found[path] = submodule
    if len(found) != 1:
        raise MisconfigurationException(
            f"{type(module).__name__} must hold one Hugging Face model to prune, but found "
            + (f"several: {', '.join(found)}. Name one with the argument `model`." if found else "none.")
        )
    ((path, model),) = found.items()
    try:
        find_blocks(model)
    except ValueError as error:
        raise MisconfigurationException(f"{path!r} of {type(module).__name__} cannot be pruned: {error}") from error
    return model


def find_tokenizer(module: LightningModule, model: Any, name: str | None = None) -> "PreTrainedTokenizerBase":
    """The tokenizer named, or else the LightningModule's `tokenizer`, or else the one beside the model's weights.

    Raises:
        MisconfigurationException: None of them is there; the message says why.
    """
    source = name or getattr(getattr(model, "config", None), "_name_or_path", None)
    try:
        own = None if name else getattr(module, "tokenizer", None)
        tokenizer = own if own is not None else load_tokenizer(source) if source else None
    except (OSError, ValueError) as error:
        raise MisconfigurationException(f"{error}. Name one with `tokenizer`.") from error
    if tokenizer is None:
        raise MisconfigurationException(
            f"{type(module).__name__} has no `tokenizer`, and the model does not say where it was loaded from. Name "
            f"one with MAIHTPruning(tokenizer=...)."
        )
    return tokenizer
