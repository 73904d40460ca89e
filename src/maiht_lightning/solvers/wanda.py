"""Wanda: keep the largest |W_ij| · ‖x_j‖.

Background: Sun, Liu, Bair, Kolter, *A Simple and Effective Pruning Approach for Large Language Models*, ICLR
2024 (arXiv 2306.11695). The published setting compares within each output row: pattern `row`.
"""

from torch import Tensor

from .config import MAIHTConfig
from .patterns import Pattern
from .problem import ScaledGram
from .solution import Solution


def solve(weight: Tensor, gram: ScaledGram, prepared: None, pattern: Pattern, config: MAIHTConfig) -> Solution:
    """Prune W0 (out, in) by Wanda's score; kept weights stay as they are."""
    size = weight.abs().to(gram.norms.dtype)
    # Where a feature is dead, the score |W| · ‖x‖ (out, in) is 0 for all its weights, and |W| decides.
    mask = pattern.mask(size * gram.norms, size)
    return Solution(weight * mask, mask)
