"""The pruning methods by name, all called alike."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from ..validation import did_you_mean
from . import admm, magnitude, maiht, sparsegpt, splitting, wanda
from .config import MAIHTConfig
from .patterns import Pattern
from .problem import ScaledGram
from .solution import Solution


class Method(NamedTuple):
    """A pruning method in two parts, so that layers with the same input share the first.

    Args:
        prepare: (gram, config) → what the method computes once per Gram matrix.
        solve: (weight, gram, prepared, pattern, config) → Solution, with W0 (out, in) as the weight.
    """

    prepare: Callable[[ScaledGram, MAIHTConfig], Any]
    solve: Callable[[Tensor, ScaledGram, Any, Pattern, MAIHTConfig], Solution]


def _nothing(gram: ScaledGram, config: MAIHTConfig) -> None:
    """Stand in for the first part of methods that prepare nothing."""


def _prepare_maiht(gram: ScaledGram, config: MAIHTConfig) -> Any:
    return (splitting.prepare if config.candidates == "preconditioned" else maiht.prepare)(gram, config)


def _solve_maiht(weight: Tensor, gram: ScaledGram, prepared: Any, pattern: Pattern, config: MAIHTConfig) -> Solution:
    solve = splitting.solve if config.candidates == "preconditioned" else maiht.solve
    return solve(weight, gram, prepared, pattern, config)


METHODS: dict[str, Method] = {
    "maiht": Method(_prepare_maiht, _solve_maiht),
    "aiht": Method(maiht.prepare, partial(maiht.solve, plain=False)),
    "iht": Method(maiht.prepare, partial(maiht.solve, accelerated=False)),
    "wanda": Method(_nothing, wanda.solve),
    "magnitude": Method(_nothing, magnitude.solve),
    "sparsegpt": Method(sparsegpt.prepare, sparsegpt.solve),
    "admm": Method(admm.prepare, admm.solve),
}

# Those whose iteration can be done in slices of rows, with gradient candidates.
IN_SLICES = ("maiht", "aiht", "iht")


def check_method(method: str) -> str:
    """Return `method`, or raise `ValueError` listing the known ones."""
    if method not in METHODS:
        asked = did_you_mean(method, METHODS)
        raise ValueError(f"method must be one of {', '.join(METHODS)}, but found {method!r}{asked}")
    return method
