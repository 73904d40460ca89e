"""mAIHT with preconditioned candidates: a support from operator splitting, then monitored thresholding on it.

Background: the problem, the plain step and the monitor are those of Wen, Zuo, Pan, ICML 2025 (PMLR 267:66575-66596).
Splitting the objective from the constraint is ADMM (Boyd et al. 2011); for pruning, with a penalty that grows, ALPS
(Meng et al., NeurIPS 2024, arXiv 2406.07831) and, with a fixed one, ADMM-Grad (Boža, TMLR 2024).

Where the Gram matrix is ill conditioned, a gradient step moves next to nothing along most directions, and the published
iteration ends near the support it began with. So the support comes from steps that are preconditioned by (A + ρI)⁻¹,

    Z = H_k(S + U),   U ← U + S − Z,   S = (A + ρI)⁻¹ (A B + ρ (Z − U)) = B + ρ (A + ρI)⁻¹ (Z − U − B),

with H_k keeping as many entries as the pattern asks for, from the first step on, and ρ growing from `FIRST` to `LAST`,
with one factorisation for each value: small ρ lets the support move, large ρ settles it. S is computed in its second
form, since what is rounded in a product of Z − U − B is small where the error is. What follows never raises f on
supports of that size. Two candidates compete, as in the paper's Algorithm 1:

    V = H_k(S − α∇f(S))                             the plain candidate, α < 1 / λmax(A): f(V) ≤ f(S)
    Z = H_k(S − ∇f(S)) and conjugate gradients      the accelerated one: a unit step, and weights that fit its support

and the better one is taken. Conjugate gradients on the last support, every output row at once, do what the paper's
gradient steps do there, for a fraction of the products.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .config import MAIHTConfig
from .fusing import one_pass
from .inverse import shifted_inverse
from .patterns import Pattern
from .precision import Left, Multiplier, final_form, scale, search_form
from .problem import ScaledGram, largest_eigenvalue, scale_weight, unscale_weight
from .solution import Solution

FIRST, LAST = 0.05, 1.0
# Steps of the splitting at one value of ρ, about; a factorisation costs as much as one or two steps.
STEPS_PER_LEVEL = 6
# Monitored iterations, and conjugate gradient steps for the accelerated candidate in each.
MONITORED = 2
CANDIDATE_STEPS = 3


class Prepared(NamedTuple):
    """What is computed once per Gram matrix.

    Args:
        multiply: Products with A = C + μI (in, in).
        inverses: Products with (A + ρI)⁻¹ (in, in) for each ρ.
        penalties: The values of ρ.
        step_size: α, below 1 / λmax(A).
    """

    multiply: Multiplier
    inverses: list[Multiplier]
    penalties: list[float]
    step_size: float


def levels(steps: int) -> int:
    """How many values ρ takes in so many steps of the splitting."""
    return max(1, round(steps / STEPS_PER_LEVEL)) if steps else 0


def products(config: MAIHTConfig) -> int:
    """Count the products of a layer (out, in) with a matrix (in, in), factorisations left out."""
    # One to measure the first point; of each pair of candidates, one to measure the plain one and two for the
    # accelerated one, before and after its conjugate gradient steps.
    return config.iterations + 1 + MONITORED * (CANDIDATE_STEPS + 3) + config.refine_iterations


def prepare(gram: ScaledGram, config: MAIHTConfig) -> Prepared:
    """Invert A + ρI for every ρ.

    Raises:
        FloatingPointError: It is not positive definite.
    """
    matrix = gram.correlation.clone()
    matrix.diagonal().add_(config.mu)
    number = levels(config.iterations)
    penalties = [FIRST * (LAST / FIRST) ** (level / max(1, number - 1)) for level in range(number)]
    inverses = []
    for penalty in penalties:
        inverse = shifted_inverse(
            matrix,
            penalty,
            final_form(config.precision),
            who="mAIHT",
            tried=f"μ = {config.mu} and ρ = {penalty:.2g}",
            advice="check that gram is XᵀX, or solve with candidates='gradient', which factorises nothing",
        )
        inverses.append(Multiplier(inverse, search_form(config.precision)))
    largest = largest_eigenvalue(gram.correlation) + config.mu
    step_size = config.step_scale / max(largest, torch.finfo(torch.float32).tiny)
    return Prepared(Multiplier(matrix, final_form(config.precision)), inverses, penalties, step_size)


class Iterate(NamedTuple):
    """A sparse point with what one product with A tells about it.

    Args:
        value: S (out, in).
        gradient: ∇f(S) = (S − B) A (out, in).
        loss: f(S), a float64 scalar.
        mask: Its support, boolean (out, in).
    """

    value: Tensor
    gradient: Tensor
    loss: Tensor
    mask: Tensor


class Splitting:
    """The iteration for one layer in scaled coordinates.

    Args:
        target: B (out, in).
        prepared: From `prepare`.
        pattern: What to keep.
        size: |W0| (out, in), which decides among entries that are equal otherwise, such as those of dead features.
        free: Numbers (out, in), 0 where an entry has to stay 0 and else 1; None where all are free.
    """

    def __init__(
        self, target: Tensor, prepared: Prepared, pattern: Pattern, size: Tensor, free: Tensor | None = None
    ) -> None:
        self.target, self.pattern, self.size, self.free = target, pattern, size, free
        self.prepared, self.multiply = prepared, prepared.multiply

    def threshold(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """H_k: the kept entries of a matrix (out, in), which is overwritten, and their mask."""
        score = value.abs() if self.free is None else value.abs().mul_(self.free)
        mask = self._mask(score)
        return value.mul_(mask), mask

    def split(self, steps: int) -> tuple[Tensor, Tensor]:
        """Take so many preconditioned steps from the dense weight; returns the last Z (out, in) and its mask."""
        inverses, penalties = self.prepared.inverses, self.prepared.penalties
        current, dual = torch.zeros_like(self.target), torch.zeros_like(self.target)  # S − B and U (out, in)
        if not steps:
            inverses, penalties = [self.multiply], [1.0]
        # What S − B is a product of, and |S + U| (out, in): where the one is float32, there is no need of both at once.
        left, exponent = inverses[0].left(len(current)), 0
        score = left.matrix if left.exponents is None else torch.empty_like(current)
        before = penalties[0]
        for step in range(steps):
            level = step * len(penalties) // steps
            if (penalty := penalties[level]) != before:
                # U is the multiplier divided by ρ: the multiplier stays what it was.
                dual.mul_(before / penalty)
                before = penalty
            combine(current, left, exponent, self.target, dual, self.free, score)
            separate(current, self._mask(score), penalty, self.target, dual, left, scratch=score)
            inverses[level].product(left, out=current)
            exponent = inverses[level].exponent
        combine(current, left, exponent, self.target, dual, self.free, score)
        mask = self._mask(score)
        return current.mul_(mask), mask

    def _mask(self, score: Tensor) -> Tensor:
        """The entries to keep, by their size (out, in), which is 0 for those that must stay 0: boolean."""
        mask = self.pattern.mask(score, self.size)
        return mask if self.free is None else mask & (self.free != 0)

    def measure(self, value: Tensor, mask: Tensor) -> Iterate:
        """The gradient and the loss of a sparse point: one product with A."""
        residual = value - self.target
        gradient = self.multiply(residual)
        return Iterate(value, gradient, residual.mul_(gradient).sum(dtype=torch.float64) / 2, mask)

    def fit(self, point: Iterate, steps: int) -> tuple[Tensor, list[Tensor]]:
        """Take conjugate gradient steps on a support, for all rows at once; never raises f.

        Returns:
            S (out, in), and f(S) after each step.
        """
        kept = point.mask.to(point.value.dtype)
        value, residual = point.value.clone(), point.gradient.mul(kept).neg_()  # −∇f on the support (out, in)
        direction, square = residual.clone(), _row_products(residual, residual)
        losses, loss = [], point.loss
        # About ε λmax, the error of a curvature for directions of unit length.
        rounding = torch.finfo(value.dtype).eps / self.prepared.step_size
        left, image = self.multiply.left_for(direction), torch.empty_like(value)  # (out, in)
        left.fill(direction)
        for _ in range(steps):
            self.multiply.product(left, out=image)
            curvature, norms = curve(image, left, self.multiply.exponent, kept, direction)
            # Below rounding the curvature is none: where A is singular a step along it would have any length.
            length = torch.where(curvature > rounding * norms, square / curvature, 0)  # (out, 1)
            after = move(value, residual, direction, image, length)
            loss = loss - (length * square).sum(dtype=torch.float64) / 2
            losses.append(loss)
            turn(direction, residual, torch.where(square > 0, after / square, 0), left)
            square = after
        return value, losses

    def monitored(self, point: Iterate) -> tuple[Iterate, bool]:
        """Do one iteration of two candidates; returns the better one, and whether it is the accelerated one."""
        plain = self.measure(*self.threshold(torch.sub(point.value, point.gradient, alpha=self.prepared.step_size)))
        start, mask = self.threshold(point.value - point.gradient)
        # The long step has left the values on the support as they were, but for their gradient, which is small there.
        start = torch.where(mask & point.mask, point.value, start)
        first = self.measure(start, mask)
        fast = self.measure(self.fit(first, CANDIDATE_STEPS)[0], mask)
        took_fast = bool(fast.loss <= plain.loss)
        best = fast if took_fast else plain
        # Rounding alone could make the plain candidate worse than where it began.
        return (best, took_fast) if bool(best.loss <= point.loss) else (point, took_fast)


def _row_products(one: Tensor, other: Tensor) -> Tensor:
    """Inner products of the rows of two matrices (out, in): (out, 1)."""
    return torch.linalg.vecdot(one, other)[:, None]


# ---- Passes over memory, with matrices (out, in); see `fusing`


@one_pass
def combine(
    current: Tensor,
    left: Left,
    exponent: int,
    target: Tensor,
    dual: Tensor,
    free: Tensor | None,
    score: Tensor,
    *,
    scratch: None = None,
) -> None:
    """Turn S − B, which is `current` times the `scale`, into S + U, and write its entries' size to `score`.

    That is 0 where `free` is 0.
    """
    if left.exponents is not None:
        current.mul_(scale(left.exponents, exponent))
    torch.abs(current.add_(target).add_(dual), out=score)
    if free is not None:
        score.mul_(free)


@one_pass
def separate(
    proposal: Tensor, mask: Tensor, penalty: float, target: Tensor, dual: Tensor, left: Left, *, scratch: Tensor
) -> None:
    """From S + U and the entries kept, of which Z is made, write U = S + U − Z, and fill `left` with ρ (Z − U − B).

    `scratch` (out, in) may be the matrix of `left`.
    """
    right = torch.mul(proposal, mask, out=left.matrix if left.exponents is None else scratch)
    torch.sub(proposal, right, out=dual)
    left.fill(right.sub_(dual).sub_(target).mul_(penalty))


@one_pass
def curve(
    product: Tensor, left: Left, exponent: int, kept: Tensor, direction: Tensor, *, scratch: None = None
) -> tuple[Tensor, Tensor]:
    """Turn the product of directions, in `left`, with A, given but for the `scale`, into its entries on the support.

    Returns:
        Curvatures along the directions (out, 1), and the directions' squared norms (out, 1).
    """
    if left.exponents is not None:
        product.mul_(scale(left.exponents, exponent))
    product.mul_(kept)
    return _row_products(direction, product), _row_products(direction, direction)


@one_pass
def move(
    value: Tensor, residual: Tensor, direction: Tensor, image: Tensor, length: Tensor, *, scratch: None = None
) -> Tensor:
    """Go a length (out, 1) along the directions: `value` and `residual` change. Returns squared norms of the latter."""
    value.addcmul_(length, direction)
    residual.addcmul_(length, image, value=-1)
    return _row_products(residual, residual)


@one_pass
def turn(direction: Tensor, residual: Tensor, ratio: Tensor, left: Left, *, scratch: None = None) -> None:
    """Make the next directions, the residual and so much (out, 1) of the last ones, and fill `left` with them."""
    left.fill(direction.mul_(ratio).add_(residual))


def solve(weight: Tensor, gram: ScaledGram, prepared: Prepared, pattern: Pattern, config: MAIHTConfig) -> Solution:
    """Prune one layer.

    Args:
        weight: W0 (out, in).
        gram: The scaled Gram matrix of the layer's inputs.
        prepared: From `prepare`.
        pattern: What to prune and how much.
        config: `iterations` steps of the splitting, `refine_iterations` conjugate gradient steps, `keep_zeros`.

    Returns:
        The pruned weight in `gram`'s dtype. Its objective is f(S) of the support that the splitting found, after each
        monitored iteration, and after each conjugate gradient step: it never rises.
    """
    target, exponent = scale_weight(weight, gram.norms)
    size = weight.abs().to(target.dtype)  # |W0| (out, in)
    free = (weight != 0).to(target.dtype) if config.keep_zeros else None
    iteration = Splitting(target, prepared, pattern, size, free)
    point = iteration.measure(*iteration.split(config.iterations))
    losses, choices = [point.loss], []
    for _ in range(MONITORED):
        point, took_fast = iteration.monitored(point)
        losses.append(point.loss)
        choices.append(float(took_fast))
    sparse, refined = iteration.fit(point, config.refine_iterations)
    result = unscale_weight(sparse, exponent, gram.norms)
    # A kept weight of a dead feature cannot change the layer's outputs: it stays what it was in W0 (out, in).
    result = torch.where(point.mask & (gram.norms == 0), weight.to(result.dtype), result)
    return Solution(
        result,
        point.mask,
        objective=[loss * 4.0**exponent for loss in torch.stack([*losses, *refined]).tolist()],
        accelerated=choices,
    )
