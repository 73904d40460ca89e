"""Checks of settings, with one form of message: "`name` must be A, but found B"."""

import difflib
from collections.abc import Iterable


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
    if not found:
        found = difflib.get_close_matches(lower, by_lower, n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: a question after the nearest known one, or nothing."""
    found = nearest(word, known) if isinstance(word, str) else None
    return "" if found is None else f": did you mean {found}?"
