"""The pruning methods by name, all called alike."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from . import admm, magnitude, maiht, sparsegpt, wanda
from .config import MAIHTConfig
from .patterns import Pattern
from .problem import ScaledGram
from .solution import Solution


class Method(NamedTuple):
    """A pruning method in two parts, so that layers with the same input share the first.

    Args:
        prepare: (gram, config) → whatever the method computes once for a Gram matrix.
        solve: (weight, gram, prepared, pattern, config) → Solution, with the weight W0 (out, in).
    """

    prepare: Callable[[ScaledGram, MAIHTConfig], Any]
    solve: Callable[[Tensor, ScaledGram, Any, Pattern, MAIHTConfig], Solution]


def _nothing(gram: ScaledGram, config: MAIHTConfig) -> None:
    """Stand in for the first part of methods that have none."""


def _hard_thresholding(*, accelerated: bool, plain: bool) -> Method:
    return Method(maiht.step_size, partial(_threshold, accelerated=accelerated, plain=plain))


def _threshold(
    weight: Tensor, gram: ScaledGram, step_size: float, pattern: Pattern, config: MAIHTConfig, **candidates: bool
) -> Solution:
    return maiht.solve(weight, gram, pattern, config, step_size=step_size, **candidates)


METHODS: dict[str, Method] = {
    "maiht": _hard_thresholding(accelerated=True, plain=True),
    "aiht": _hard_thresholding(accelerated=True, plain=False),
    "iht": _hard_thresholding(accelerated=False, plain=True),
    "wanda": Method(_nothing, wanda.solve),
    "magnitude": Method(_nothing, magnitude.solve),
    "sparsegpt": Method(sparsegpt.prepare, sparsegpt.solve),
    "admm": Method(admm.prepare, admm.solve),
}


def check_method(method: str) -> str:
    """Return `method`, or raise `ValueError` listing the known ones."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, but found {method!r}")
    return method
