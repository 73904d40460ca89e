"""Magnitude pruning: keep the largest |W|; inputs do not matter."""

from torch import Tensor

from .patterns import Pattern
from .solution import Solution


def solve(weight: Tensor, pattern: Pattern) -> Solution:
    """Prune W0 (out, in) by |W0|; kept weights stay as they are."""
    mask = pattern.mask(weight.abs())
    return Solution(weight * mask, mask)
