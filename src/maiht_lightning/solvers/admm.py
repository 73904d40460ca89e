"""ADMM-Grad: alternate between an exact ridge solution and pruning, tied together by dual variables.

Background: Boža, *Fast and Effective Weight Update for Pruned Large Language Models*, TMLR 2024 (arXiv
2401.02938). In the coordinates S = W · diag(d), with A = C + damping and B = W0 · diag(d):

    Z = (S + U) ∘ mask,   U ← U + S − Z,   S = (A + ρI)⁻¹ (A B + ρ (Z − U))

In the first steps the mask keeps the largest |S + U| at a sparsity that grows as s − s(1 − i/15)³; then it is
frozen. For N:M patterns the entries outside the N largest of their group go in the same gradual way, smallest first
over the whole layer. The result is the last Z.

What differs: counts are exact here. And the authors' program (github.com/fmfi-compbio/admm-pruning) grows the sparsity
in this way for `row` and N:M alone; for `unstructured` it asks for all of it from the first step on, without the
paper's schedule.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .config import MAIHTConfig
from .inverse import shifted_inverse
from .patterns import Pattern
from .precision import Multiplier, final_form
from .problem import ScaledGram, scale_weight, unscale_weight
from .solution import Solution

# The paper's settings: all steps, the first ones in which the mask changes, penalty ρ, damping of the unit diagonal.
STEPS = 20
MASK_STEPS = 15
RHO = 1.0
DAMPING = 0.1


class Prepared(NamedTuple):
    """What ADMM computes once per Gram matrix.

    Args:
        damped: Products with A = C + damping · I (in, in).
        inverse: Products with (A + ρI)⁻¹ (in, in).
    """

    damped: Multiplier
    inverse: Multiplier


def prepare(gram: ScaledGram, config: MAIHTConfig) -> Prepared:
    """Compute A and (A + ρI)⁻¹.

    Raises:
        FloatingPointError: The damped Gram matrix is not positive definite.
    """
    damped = gram.correlation.clone()
    damped.diagonal().add_(DAMPING)
    form = final_form(config.precision)
    inverse = shifted_inverse(
        damped, RHO, form, who="ADMM", tried=f"damping {DAMPING} and ρ = {RHO}", advice="check that gram is XᵀX"
    )
    return Prepared(Multiplier(damped, form), Multiplier(inverse, form))


def solve(weight: Tensor, gram: ScaledGram, prepared: Prepared, pattern: Pattern, config: MAIHTConfig) -> Solution:
    """Prune one layer by ADMM-Grad.

    Args:
        weight: W0 (out, in).
        gram: The scaled Gram matrix of the layer's inputs.
        prepared: From `prepare`.
        pattern: What to prune and how much.
        config: `keep_zeros`, and the precision that the Gram matrix was prepared for; other settings are the paper's.

    Returns:
        The pruned weight in `gram`'s dtype; a kept weight of a dead feature stays what it was. There is no objective,
        which would cost one more product per step.
    """
    target, exponent = scale_weight(weight, gram.norms)
    size = weight.abs().to(target.dtype)  # |W0| (out, in)
    pull = prepared.damped(target)  # B A (out, in)
    current, dual = target.clone(), torch.zeros_like(target)  # S and U (out, in)
    mask = torch.ones_like(target, dtype=torch.bool)
    for step in range(STEPS):
        proposal = current + dual
        if config.keep_zeros:
            proposal.mul_(size != 0)
        if step < MASK_STEPS:
            growing = pattern.sparsity * (1 - (1 - (step + 1) / MASK_STEPS) ** 3)
            # Columns of dead features are 0 in S and U alike: |W0| decides among their entries.
            if not pattern.group:
                mask = replace(pattern, sparsity=growing).mask(proposal.abs(), size)
            else:
                mask = pattern.mask(proposal.abs(), size)
                if step + 1 < MASK_STEPS:
                    score = proposal.abs().masked_fill_(mask, torch.inf)
                    mask = Pattern("unstructured", growing).mask(score, size)
        sparse = proposal * mask  # Z (out, in)
        dual = proposal - sparse
        current = prepared.inverse(pull + RHO * (sparse - dual))
    if config.keep_zeros:
        mask &= size != 0
    result = unscale_weight((current + dual) * mask, exponent, gram.norms)
    return Solution(torch.where(mask & (gram.norms == 0), weight.to(result.dtype), result), mask)
