"""The layer-wise reconstruction problem: scaling, largest eigenvalue, error.

Background: Wen, Zuo, Pan, *An Efficient Pruner for Large Language Model with Theoretical Guarantee*, ICML
2025 (PMLR 267:66575-66596). With inputs X of shape (tokens, in), G = XᵀX and d = sqrt(diag G), a linear layer
is pruned in the coordinates S = W · diag(d), where the features have unit norm and |S| is Wanda's score:

    f(S) = ½ tr((S − B) A (S − B)ᵀ),   B = W0 · diag(d),   A = C + μ I,   C = diag(d)⁻¹ G diag(d)⁻¹

The ridge is added to the diagonal of a matrix of the solver's own, once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .precision import Form, Multiplier

LANCZOS_STEPS = 48

# The error of a layer is computed in slices of so many weights: 64 MiB in float32.
ERROR_ELEMENTS = 2**24


@dataclass(frozen=True)
class ScaledGram:
    """A Gram matrix in unit-norm coordinates, shared by all layers that see the same input.

    Args:
        correlation: C (in, in), unit diagonal; rows and columns of dead features (d = 0) are 0.
        norms: d (in,), the ℓ2 norm of each input feature over all tokens.
    """

    correlation: Tensor
    norms: Tensor


def reciprocal_of(norms: Tensor) -> Tensor:
    """diag(d)⁻¹ (in,); 0 for dead features."""
    return torch.where(norms > 0, norms.reciprocal(), 0)


def scale_gram(gram: Tensor, dtype: torch.dtype = torch.float32) -> ScaledGram:
    """Bring G (in, in) to unit diagonal; `gram` is left as it is."""
    norms = gram.diagonal().to(dtype).clamp_min(0).sqrt()  # d (in,)
    inverse = reciprocal_of(norms)
    # Columns and rows of G (in, in) are divided one after the other, since products of extreme norms could leave the
    # floating-point range. The bounds are Cauchy-Schwarz, which rounding may break where features are nearly zero.
    correlation = (gram.to(dtype) * inverse).mul_(inverse[:, None]).clamp_(-1, 1)
    return ScaledGram(correlation, norms)


def scale_weight(weight: Tensor, norms: Tensor) -> tuple[Tensor, int]:
    """B (out, in), contiguous, divided by a power of two, and its exponent.

    The problem is homogeneous in B; bringing its largest entry near 1 keeps squares within float32 for weights
    and inputs of any scale, and a power of two costs no accuracy.
    """
    scaled = weight.to(norms.dtype).contiguous() * norms
    # Within these bounds the power and its inverse are normal numbers in float32.
    exponent = max(-100, min(100, int(torch.frexp(scaled.abs().max()).exponent)))
    return scaled.mul_(2.0**-exponent), exponent


def unscale_weight(scaled: Tensor, exponent: int, norms: Tensor) -> Tensor:
    """W = S · diag(d)⁻¹ (out, in); 0 for dead features."""
    return (scaled * 2.0**exponent).mul_(reciprocal_of(norms))


def largest_eigenvalue(matrix: Tensor, steps: int = LANCZOS_STEPS) -> float:
    """Upper estimate of the largest eigenvalue of a symmetric positive semidefinite (n, n) matrix.

    Lanczos iteration with full reorthogonalisation from a fixed pseudo-random start, plus the residual of the
    Ritz pair. From a random start, k steps miss the eigenvalue by more than a fraction ε with probability at
    most 1.65 √n exp(−√ε (2k − 1)) (Kuczyński & Woźniakowski, SIAM J. Matrix Anal. Appl. 13, 1992): below
    1e-6 for ε = 0.05, 48 steps and n = 11,008. So a step of 0.95 / λmax stays below 1 / λmax.
    """
    n = matrix.shape[0]
    steps = min(steps, n)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(n, generator=generator, dtype=torch.float64).to(matrix)
    basis = torch.zeros(steps + 1, n, dtype=matrix.dtype, device=matrix.device)  # Lanczos vectors, one per row
    diagonal = torch.zeros(steps, dtype=matrix.dtype, device=matrix.device)
    off_diagonal = torch.zeros(steps, dtype=matrix.dtype, device=matrix.device)
    basis[0] = start / start.norm()
    breakdown = torch.finfo(matrix.dtype).eps * (matrix @ basis[0]).norm()
    for k in range(steps):
        vector = matrix @ basis[k]
        # Rows of the basis that are still to come are 0. What a GPU takes here is the launch of each kernel.
        along = basis @ vector
        diagonal[k] = along[k]
        vector = torch.addmv(vector, basis.T, along, alpha=-1)
        # Once is too little when the start is already close to an eigenvector.
        vector = torch.addmv(vector, basis.T, basis @ vector, alpha=-1)
        norm = vector.norm()
        # After an invariant subspace is found (few distinct eigenvalues), what is left in `vector` (n,) is rounding.
        # Zero vectors from there on add nothing but zero eigenvalues.
        continues = norm > breakdown
        off_diagonal[k] = torch.where(continues, norm, 0)
        basis[k + 1] = torch.where(continues, vector / norm, 0)
    tridiagonal = torch.diag(diagonal) + torch.diag(off_diagonal[:-1], 1) + torch.diag(off_diagonal[:-1], -1)
    values, vectors = torch.linalg.eigh(tridiagonal.double().cpu())
    # Some eigenvalue is at most the residual away from the largest Ritz value.
    residual = off_diagonal[-1].double().cpu() * vectors[-1, -1].abs() if steps < n else 0.0
    return float(values[-1] + residual)


def relative_error(weight: Tensor, pruned: Tensor, gram: ScaledGram, form: Form = "plain") -> float:
    """‖X(W − W0)ᵀ‖² / ‖X W0ᵀ‖², from W0 and W (out, in); 0 when the dense output is 0.

    It is summed over slices of rows, so that large layers need little memory. Its products have a `Multiplier`'s form.
    """
    multiply = Multiplier(gram.correlation, form)
    noise = signal = torch.zeros((), dtype=torch.float64, device=weight.device)
    rows = max(1, ERROR_ELEMENTS // weight.shape[1])
    for dense, sparse in zip(weight.split(rows), pruned.split(rows), strict=True):
        scaled, exponent = scale_weight(dense, gram.norms)
        signal = signal + quadratic(scaled, multiply) * 4.0**exponent
        # (W − W0) · diag(d) (rows, in) takes the memory of the scaled weight, and its power of two.
        change = torch.sub(sparse, dense, out=scaled).mul_(gram.norms).mul_(2.0**-exponent)
        noise = noise + quadratic(change, multiply) * 4.0**exponent
    # Rounding may leave a tiny negative number where the Gram matrix is singular.
    return float(noise.clamp_min(0) / signal) if signal > 0 else 0.0


def quadratic(matrix: Tensor, multiply: Multiplier) -> Tensor:
    """tr(M G Mᵀ) for M (out, in) and products with G (in, in): a scalar, summed in float64."""
    return multiply(matrix).mul_(matrix).sum(1).sum(dtype=torch.float64)
