"""Inverses of Gram matrices with a shift, mostly by products, which a GPU does far faster than factorisations.

With a matrix cut in two, [[P, Qᵀ], [Q, R]], and its Schur complement S = R − Q P⁻¹ Qᵀ, the inverse is

    [[P⁻¹ + Tᵀ S⁻¹ T, −Tᵀ S⁻¹], [−S⁻¹ T, S⁻¹]],   T = Q P⁻¹,

so that P and S alone are inverted, by cutting them again, and what is small enough is factorised. All else is four
products of a quarter of the size, which can be half-precision ones.
"""

import torch
from torch import Tensor

from .precision import Form, Multiplier

# So many rows are factorised; a GPU would not have enough to do with fewer.
LEAF = 1024


def shifted_inverse(matrix: Tensor, shift: float, form: Form, *, who: str, tried: str, advice: str) -> Tensor:
    """(M + shift · I)⁻¹ (in, in) for a Gram matrix M (in, in), which stays as it is.

    Args:
        matrix: M.
        shift: What is added to its diagonal.
        form: `plain`: by a Cholesky factorisation. Else by products that are as accurate as float32's.
        who: For the message: who needs the inverse.
        tried: With what it was tried.
        advice: What to do.

    Raises:
        FloatingPointError: It is not positive definite.
    """
    shifted = matrix.clone()
    shifted.diagonal().add_(shift)
    if form != "plain":
        try:
            return by_products(shifted)
        except torch.linalg.LinAlgError:
            # Of a matrix that is nearly singular, rounding may have left a Schur complement that is not positive.
            pass
    lower, info = torch.linalg.cholesky_ex(shifted)
    if int(info):
        raise FloatingPointError(
            f"{who} could not factorise the Gram matrix in {matrix.dtype} (minor {int(info)} of {len(matrix)} is not "
            f"positive definite, with {tried}): {advice}"
        )
    return torch.cholesky_inverse(lower)


def half_of(size: int) -> int:
    """Rows of P; tensor cores take multiples of 8 numbers."""
    return -(-size // 16) * 8


def by_products(matrix: Tensor, leaf: int = LEAF) -> Tensor:
    """The inverse of a symmetric matrix (n, n), float32, cut until there are at most `leaf` rows, 8 or more.

    Raises:
        LinAlgError: It is not positive definite, but for rounding.
    """
    size = len(matrix)
    if size <= leaf:
        return torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    half = half_of(size)
    found = torch.empty_like(matrix)
    first = by_products(matrix[:half, :half], leaf)  # P⁻¹
    below = matrix[half:, :half]  # Q
    turned = Multiplier(first, "fp16x3")(below)  # T
    complement = matrix[half:, half:] - Multiplier(below.T, "fp16x3")(turned)
    last = by_products(complement, leaf)  # S⁻¹
    corner = Multiplier(last, "fp16x3")(turned.T)  # Tᵀ S⁻¹
    found[half:, half:] = last
    found[:half, :half] = first.add_(Multiplier(turned, "fp16x3")(corner))
    found[:half, half:] = corner.neg_()
    found[half:, :half] = corner.T
    return found
