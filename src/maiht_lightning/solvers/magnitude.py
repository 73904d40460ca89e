"""Magnitude pruning: keep the largest |W|; inputs do not matter."""

from torch import Tensor

from .config import MAIHTConfig
from .patterns import Pattern
from .problem import ScaledGram
from .solution import Solution


def solve(weight: Tensor, gram: ScaledGram, prepared: None, pattern: Pattern, config: MAIHTConfig) -> Solution:
    """Prune W0 (out, in) by |W0|; kept weights stay as they are."""
    mask = pattern.mask(weight.abs())
    return Solution(weight * mask, mask)
