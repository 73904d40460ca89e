"""Checks of settings, with one form of message: "`name` must be A, but found B"."""

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def check_at_least(minimum: int, **settings: int) -> None:
    """Refuse settings below a minimum, by name.

    Raises:
        ValueError: One of them is smaller.
    """
    for name, value in settings.items():
        if value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, but found {value}")


def check_integer(minimum: int, **settings: object) -> None:
    """Refuse settings that are no whole numbers or are below a minimum, by name.

    Raises:
        ValueError: One of them is a float, a bool or something else, or smaller.
    """
    for name, value in settings.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ValueError(f"{name} must be a whole number, at least {minimum}, but found {value!r}")


def positions_of(model: Any) -> int | None:
    """How many positions a Hugging Face model is made for, by its config; None if that does not say.

    Rotary models compute beyond them, but were not trained there: what they compute is no measure of them.
    """
    return getattr(getattr(model, "config", None), "max_position_embeddings", None)


def check_fits(name: str, windows: "Tensor", model: Any) -> None:
    """Refuse token windows for which a model has no embeddings or no positions.

    Args:
        name: What the windows are of, for the message.
        windows: Token ids (windows, seqlen), int64, at least one.
        model: A Hugging Face causal language model.

    Raises:
        ValueError: There are ids beyond the embedding, or more tokens a window than positions.
    """
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    vocabulary = getattr(embedding, "num_embeddings", None)
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        known = "0 and more" if vocabulary is None else f"0 to {vocabulary - 1}"
        raise ValueError(
            f"{name} hold token ids from {low} to {high}, but the model knows {known}: were they made with another "
            f"model's tokenizer?"
        )
    positions = positions_of(model)
    if positions is not None and windows.shape[1] > positions:
        raise ValueError(
            f"{name} must have at most as many tokens as the model has positions, {positions} by "
            f"max_position_embeddings in its config, but have {windows.shape[1]}: choose a smaller seqlen"
        )


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that another one was probably meant to be; None where none is near.

    Of dotted names, such as `--pruning.sparsity`, the last part alone may have been given.

    Args:
        word: As it was written.
        known: What could have been written.
    """
    by_lower = {name.lower(): name for name in known}
    lower = word.lower()
    # A whole setting with a slip is nearer than another one that only ends alike.
    found = difflib.get_close_matches(lower, by_lower, n=1, cutoff=0.8)
    if not found:
        leaf = lower.lstrip("-").rpartition(".")[2]
        ends = {name.lstrip("-").rpartition(".")[2]: name for name in reversed(by_lower)}
        found = [ends[end] for end in difflib.get_close_matches(leaf, ends, n=1, cutoff=0.8)]
    if not found:
        found = [name for name in by_lower if len(lower) > 2 and name.startswith(lower)][:1]
    if not found and "." not in lower:  # of dotted names the section alone would be alike
        found = difflib.get_close_matches(lower, by_lower, n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: a question after the nearest known one, or nothing."""
    found = nearest(word, known) if isinstance(word, str) else None
    return "" if found is None else f": did you mean {found}?"
