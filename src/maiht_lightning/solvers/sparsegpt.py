"""SparseGPT: prune column after column, each time spreading the error over the columns still to come.

Background: Frantar, Alistarh, *SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot*,
ICML 2023 (arXiv 2301.00774). With H = G + damping, restricted to the columns from j on, pruning w_j costs
w_j² / [H⁻¹]_jj in the loss, and the best change of the later columns is −w_j / [H⁻¹]_jj · [H⁻¹]_j,:. One triangular
matrix holds what is needed of all these inverses: the upper Cholesky factor U of H⁻¹ = UᵀU, where [H⁻¹]_jj is U_jj² and
[H⁻¹]_j,: / [H⁻¹]_jj is U_j,: / U_jj.

What differs: the number of zeros is exact. The published code prunes the same fraction of every block of 128
columns; here the block that ends at column c leaves floor(zeros · c / in) zeros behind it in all, so that the
last one completes the layer's (for pattern `row`, each row's) number. Dead features go first and are not
counted in that share. U comes from one factorisation and a triangular inverse instead of two factorisations.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .config import MAIHTConfig
from .patterns import Pattern, keep_largest
from .problem import ScaledGram
from .solution import Solution

# The paper's settings, section 4: columns per lazy update of the later ones, and damping relative to the mean diagonal.
BLOCK_SIZE = 128
DAMPING = 0.01

# (first column, score (out, columns)) → mask (out, columns), True where a weight is kept.
Chooser = Callable[[int, Tensor], Tensor]


def prepare(gram: ScaledGram, config: MAIHTConfig) -> Tensor:
    """U (in, in), upper triangular with UᵀU = (G / c + damping)⁻¹; c brings the largest diagonal near 1.

    The damping is relative to the mean diagonal of live features. A dead feature gets that mean: coupled to
    nothing, its weights stay as they are with any positive number.

    Raises:
        FloatingPointError: The damped Gram matrix is not positive definite.
    """
    live = gram.norms > 0
    # A power of two near the largest of the norms d (in,) divides them: products stay in range, nothing is rounded.
    norms = torch.ldexp(gram.norms, -torch.frexp(gram.norms.max()).exponent)
    hessian = gram.correlation * norms * norms[:, None]
    mean = norms.square().sum() / live.sum().clamp_min(1)
    mean = torch.where(mean > 0, mean, 1)
    hessian.diagonal().copy_(torch.where(live, norms.square(), mean) + DAMPING * mean)
    # H reversed = L Lᵀ, so H = R Rᵀ with R = L reversed, upper triangular, and H⁻¹ = UᵀU with U = R⁻¹.
    lower, info = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if int(info):
        raise FloatingPointError(
            f"SparseGPT could not factorise the Gram matrix in {lower.dtype} (minor {int(info)} of "
            f"{len(norms)} is not positive definite, with {DAMPING:.0%} damping): solve in precision "
            f"'float64', use more calibration windows, or check that gram is XᵀX"
        )
    eye = torch.eye(len(norms), dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)


def solve(weight: Tensor, gram: ScaledGram, factor: Tensor, pattern: Pattern, config: MAIHTConfig) -> Solution:
    """Prune one layer by SparseGPT.

    Args:
        weight: W0 (out, in).
        gram: The scaled Gram matrix of the layer's inputs.
        factor: U from `prepare`.
        pattern: What to prune and how much. `unstructured` compares all rows within a block of columns, `row`
            the entries of a row within it, `N:M` each group when its first column is reached.
        config: `keep_zeros` alone; other settings are the paper's. A block of columns that has more zeros than its
            share keeps them all.

    Returns:
        The pruned weight in `gram`'s dtype. A kept weight of a dead feature stays what it was.
    """
    dead = gram.norms == 0
    # A power of two brings W0 (out, in) near 1, so that weights of any scale stay in range.
    dense = weight.to(factor.dtype)
    exponent = torch.frexp(dense.abs().max()).exponent
    size = weight.abs().to(factor.dtype)
    if pattern.group:
        span, block = pattern.group, pattern.group * max(1, BLOCK_SIZE // pattern.group)
        zeros: list[int] = []
    else:
        span = block = BLOCK_SIZE
        zeros = block_zeros(pattern, weight.shape, dead.cpu(), block)

    def choose(start: int, score: Tensor) -> Tensor:
        columns = slice(start, start + score.shape[1])
        if pattern.group:
            keep, by_row = pattern.keep, True
        else:
            by_row = pattern.by_row
            keep = (score.shape[1] if by_row else score.numel()) - zeros[start // block]
        shape = (score.shape[0] if by_row else 1, -1)
        score = score.masked_fill(dead[columns], -1)
        if config.keep_zeros:
            # Later columns compensate for earlier ones, so that an entry that was 0 in W0 may be large by now.
            score.masked_fill_(size[:, columns] == 0, -2)
        mask = keep_largest(score.reshape(shape), keep, size[:, columns].reshape(shape)).view_as(score)
        return mask & (size[:, columns] != 0) if config.keep_zeros else mask

    sparse, mask = eliminate(torch.ldexp(dense, -exponent), factor, choose, span=span, block=block)
    return Solution(torch.ldexp(sparse, exponent), mask)


def eliminate(
    weight: Tensor, factor: Tensor, choose: Chooser, *, span: int, block: int = BLOCK_SIZE
) -> tuple[Tensor, Tensor]:
    """Zero what `choose` does not keep, column after column, with the best update of later columns.

    Args:
        weight: (out, in); left as it is.
        factor: U (in, in), upper triangular, H⁻¹ = UᵀU.
        choose: Asked for the mask of `span` columns when the first of them is reached; its score is
            |W_ij| / U_jj, the root of the loss that pruning the entry costs.
        span: Columns chosen at once; a divisor of `block`.
        block: Columns whose updates of later blocks are applied together; it changes nothing but rounding.

    Returns:
        The pruned weight (out, in) and its boolean mask (out, in), True where a weight is kept.
    """
    weight = weight.clone()
    mask = torch.ones_like(weight, dtype=torch.bool)
    diagonal = factor.diagonal()
    for first in range(0, weight.shape[1], block):
        last = min(first + block, weight.shape[1])
        errors = torch.zeros_like(weight[:, first:last])
        for j in range(first, last):
            if (j - first) % span == 0:
                columns = slice(j, min(j + span, last))
                mask[:, columns] = choose(j, weight[:, columns].abs() / diagonal[columns])
            error = (weight[:, j] / diagonal[j]).masked_fill(mask[:, j], 0)  # (out,), 0 where a weight is kept
            weight[:, j:last].addr_(error, factor[j, j:last], alpha=-1)
            errors[:, j - first] = error
        weight[:, last:].addmm_(errors, factor[first:last, last:], alpha=-1)
    return weight.masked_fill_(~mask, 0), mask


def block_zeros(pattern: Pattern, shape: torch.Size | tuple[int, ...], dead: Tensor, block: int) -> list[int]:
    """Zeros of each block of columns of a weight (out, in): for `row` in each row, else over all rows.

    Their sum is exact. Entries of dead features come first, then live ones in equal shares: floor(z · c)
    among the first c live columns, where z is the mean number of zeros of a live column.
    """
    rows = 1 if pattern.by_row else shape[0]
    ends = [min(end, shape[1]) for end in range(block, shape[1] + block, block)]
    dead_columns = [int(dead[:end].sum()) for end in ends]
    live_columns = [end - count for end, count in zip(ends, dead_columns, strict=True)]
    zeros = rows * shape[1] - pattern.kept(shape)
    dead_zeros = min(zeros, rows * dead_columns[-1])
    behind = [
        dead_zeros * d // max(dead_columns[-1], 1) + (zeros - dead_zeros) * n // max(live_columns[-1], 1)
        for d, n in zip(dead_columns, live_columns, strict=True)
    ]
    return [now - before for now, before in zip(behind, [0, *behind], strict=False)]
