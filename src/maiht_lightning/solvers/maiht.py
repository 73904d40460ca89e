"""mAIHT, AIHT and IHT: iterative hard thresholding for one linear layer.

Background: Algorithm 1 of Wen, Zuo, Pan, *An Efficient Pruner for Large Language Model with Theoretical
Guarantee*, ICML 2025 (PMLR 267:66575-66596): Nesterov extrapolation with a monitor after Li & Lin's monotone
accelerated proximal gradient (NeurIPS 2015), started at the dense weight with a penalty λ that grows until the
sparsity is reached, then gradient steps on the support.

The names of Algorithm 1, and what they are here:

    B          `target`              (out, in)  the scaled dense weight W0 · diag(d), where the iteration starts
    A          in `products`         (in, in)   the Gram matrix XᵀX scaled to a unit diagonal, with the ridge
    S          `current()`           (out, in)  the point that an iteration has accepted; S_prev the one before it
    Z, V       `candidates`          (out, in)  the accelerated and the plain candidate for the next S
    u(S)       `stepped`             (out, in)  the gradient step S − α∇f(S), with ∇f(S) = (S − B) A
    Y          only as u(Y), `u_y`   (out, in)  the extrapolated point, from whose gradient step Z is made
    α          `step_size`                      below 1 / λmax(A)
    λ          `penalty`                        of ‖S‖₀: (1, 1), or (out, 1) where each row is a problem of its own
    t, t_prev  `t`, `t_previous`                Nesterov's sequence

What differs: the paper's form needs four products with A per iteration (two gradients, two losses). This one needs
two. Gradient steps u(S) are affine in S, so u(Y) is the same linear combination of known gradient steps as Y is of
points, and f(S) = ½⟨S − B, ∇f(S)⟩ comes with the gradient.

The support differs a little from that of the authors' program. Where λ ends up so large that fewer weights are left
than are to be kept, the support is filled up: theirs takes the zeros that come first in memory, this one those that the
next gradient step would raise highest, so that up to twice the missing number of entries differ. And theirs keeps one
weight more in a layer than numel − floor(s · numel).
"""

from functools import partial
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from .config import MAIHTConfig
from .patterns import Pattern, count, hard_threshold_, keep_of_groups_, kth_largest
from .precision import Products
from .problem import ScaledGram, largest_eigenvalue, scale_weight, unscale_weight
from .slices import Slices, rows_within
from .solution import Solution, padded

# Where a tolerance is set, so many iterations lie between two looks at whether the objective has converged.
CHECK_EVERY = 5


class Candidate:
    """A point tried in an iteration, Z or V of Algorithm 1, with what one product with A tells about it.

    Attributes:
        value: S (out, in).
        stepped: u(S) = S − α∇f(S) (out, in).
        loss: f(S), float64, (1, 1), or (out, 1) where each row is a problem of its own.
        nonzeros: Entries of S that thresholding has kept, shaped as `loss`.
    """

    def __init__(self, start: Tensor) -> None:
        self.value, self.stepped = start.clone(), start.clone()
        self.loss = self.nonzeros = torch.empty(0)


class Point(NamedTuple):
    """The rows of a candidate in the slice that is being computed.

    Args:
        candidate: Z or V.
        value: Its rows of S (rows, in).
        stepped: Its rows of u(S) (rows, in): those of the last iteration until it is measured, then its own.
    """

    candidate: Candidate
    value: Tensor
    stepped: Tensor


class HardThresholding:
    """The iteration in scaled coordinates. Every buffer is allocated once; nothing waits for the device.

    Args:
        target: B (out, in). Its device holds what outlives an iteration: the candidates and the step before.
        products: Products with A = C + μI (in, in), on the device to compute on.
        step_size: α, below 1 / λmax(A).
        pattern: Decides what is thresholded: by penalty (`unstructured`, `row`) or N of M.
        accelerated: Try the extrapolated candidate (mAIHT, AIHT).
        plain: Try the plain gradient step (mAIHT, IHT). With both, the better one is taken: the monitor.
        rows: Rows computed at a time, all by default. For `row`, where each row has its own λ, all of them.
        keep_zeros: Entries that are 0 in the target stay 0. All points are combinations of gradient steps, so it is
            enough that these are masked.
    """

    def __init__(
        self,
        target: Tensor,
        products: Products,
        *,
        step_size: float,
        pattern: Pattern,
        accelerated: bool = True,
        plain: bool = True,
        rows: int | None = None,
        keep_zeros: bool = False,
    ) -> None:
        self.target, self.products, self.multiply = target, products, products.search
        device = products.search.device
        self.keep_zeros = keep_zeros
        self.step_size, self.pattern = step_size, pattern
        self.slices = Slices(len(target), rows or len(target), device)
        self.residual = torch.empty_like(target[self.slices.parts[0]], device=device)
        self.gradient = torch.empty_like(self.residual)
        # All begin at the dense weight B: its gradient is 0, so that its gradient step u(B) is B again.
        self.candidates = [Candidate(target) for _ in range(accelerated + plain)]
        self.accelerated, self.plain = accelerated, plain
        self.stepped = target.clone()
        self.nonzeros = self._per_problem(count(target != 0)[:, 0]).to(device)
        self.loss = torch.zeros_like(self.nonzeros)
        self.took_accelerated = torch.ones_like(self.nonzeros, dtype=torch.bool)
        self.t, self.t_previous = 1.0, 0.0

    def _per_problem(self, rows: Tensor) -> Tensor:
        """Sum (out,), one number per row, to one per problem: (out, 1) for independent rows, else (1, 1); float64."""
        rows = rows.double()
        return rows[:, None] if self.pattern.by_row and not self.pattern.group else rows.sum().view(1, 1)

    def measure(self, value: Tensor, stepped: Tensor, target: Tensor) -> Tensor:
        """The loss of a point's rows, and their gradient step into `stepped`: the one product with A."""
        residual, gradient = self.residual[: len(value)], self.gradient[: len(value)]
        torch.sub(value, target, out=residual)
        self.multiply(residual, out=gradient)
        loss = self._per_problem(residual.mul_(gradient).sum(1)) / 2
        torch.add(value, gradient, alpha=-self.step_size, out=stepped)
        if self.keep_zeros:
            stepped.mul_(target != 0)
        return loss

    def threshold(self, value: Tensor, stepped: Tensor, penalty: Tensor) -> Tensor:
        """Write H_τ(`stepped`), or its N largest of every M, to `value`; returns how many entries stay."""
        kept = self.residual[: len(value)]
        if self.pattern.group:
            keep_of_groups_(value, stepped, self.pattern.keep, self.pattern.group, kept)
            # Every candidate keeps as many entries, so that their number does not matter to the monitor.
            return torch.zeros_like(penalty)
        tau = (2 * self.step_size * penalty).sqrt().to(stepped.dtype)
        hard_threshold_(value, stepped, tau, kept)
        return self._per_problem(kept.sum(1))

    def step(self, penalty: Tensor) -> None:
        """Do one iteration at penalty λ, float64, (1, 1) or (out, 1).

            Y = S + (t_prev / t) (Z − S) + ((t_prev − 1) / t) (S − S_prev)
            Z = H_τ(u(Y)),  V = H_τ(u(S)),  τ = sqrt(2 α λ)
            S_prev, S = S, (Z if F_λ(Z) ≤ F_λ(V) else V)

        For a fixed λ and with the plain candidate V, F_λ(S) = f(S) + λ‖S‖₀ does not increase.
        """
        # With a = t_prev / t and b = (t_prev − 1) / t, Y = S + a (Z − S) + b (S − S_prev), and u(Y) is the same
        # combination of u(S), u(Z) and u(S_prev), since u is affine. It is made by two interpolations:
        # (1 − a) ((1 − c) u(S_prev) + c u(S)) + a u(Z), where c = 1 + b / (1 − a).
        a, b = self.t_previous / self.t, (self.t_previous - 1) / self.t
        c = 1 + b / (1 - a)
        first, last = self.candidates[0], self.candidates[-1]
        for candidate in self.candidates:
            candidate.loss, candidate.nonzeros = torch.zeros_like(penalty), torch.zeros_like(penalty)
        for part in self.slices.parts:
            target = self.slices.borrow(self.target, part)  # B (rows, in)
            stepped = self.slices.borrow(self.stepped, part)  # u(S_prev) (rows, in), until it is u(S)
            points = [
                Point(point, self.slices.borrow(point.value, part, read=False), self.slices.borrow(point.stepped, part))
                for point in self.candidates
            ]
            u_y = self.gradient[: len(stepped)]  # u(Y) (rows, in)
            if self.accelerated:
                torch.mul(stepped, 1 - c, out=u_y)
            # The last iteration has accepted Z or V as S: `stepped` turns from u(S_prev) into u(S).
            torch.where(self.took_accelerated, points[0].stepped, points[-1].stepped, out=stepped)
            if self.accelerated:
                u_y.add_(stepped, alpha=c).lerp_(points[0].stepped, a)
            for candidate, value, after in points:
                start = u_y if self.accelerated and candidate is first else stepped
                candidate.nonzeros += self.threshold(value, start, penalty)  # Z or V (rows, in) into `value`
                candidate.loss += self.measure(value, after, target)  # its gradient step (rows, in) into `after`
                self.slices.give_back(candidate.value, part, value)
                self.slices.give_back(candidate.stepped, part, after)
            self.slices.give_back(self.stepped, part, stepped)
        # F_λ(Z) ≤ F_λ(V), with ‖·‖₀ as a difference: where λ‖S‖₀ is far above f, sums would round the decision away.
        self.took_accelerated = first.loss - last.loss <= penalty * (last.nonzeros - first.nonzeros)
        self.loss = torch.where(self.took_accelerated, first.loss, last.loss)
        self.nonzeros = torch.where(self.took_accelerated, first.nonzeros, last.nonzeros)
        self.t_previous, self.t = self.t, (1 + sqrt(1 + 4 * self.t**2)) / 2

    def current(self) -> Tensor:
        """The point S (out, in) after the last step, in a buffer that the next step overwrites."""
        first, last = self.candidates[0], self.candidates[-1]
        took_accelerated = self.took_accelerated.to(self.target.device)
        return torch.where(took_accelerated, first.value, last.value, out=first.value)

    def finish(self) -> tuple[Tensor, Tensor]:
        """S and u(S) (out, in) after the last step. No further step is possible, since other memory is given back."""
        value, first, last = self.current(), self.candidates[0], self.candidates[-1]
        took_accelerated = self.took_accelerated.to(self.target.device)
        torch.where(took_accelerated, first.stepped, last.stepped, out=self.stepped)
        self.candidates.clear()
        return value, self.stepped

    def refine(self, value: Tensor, keep: Tensor, steps: int, tolerance: float = 0.0) -> list[Tensor]:
        """Take gradient steps on a support, in place, with the products for final weights.

        Args:
            value: S (out, in).
            keep: The support as numbers (out, in), 1 and 0.
            steps: Gradient steps t2 at most.
            tolerance: Stop when `CHECK_EVERY` steps together lower f by no more than this fraction.

        Returns:
            f(S) at the start and after each step, float64 scalars.
        """
        courses, self.multiply = [], self.products.final
        for part in self.slices.parts:
            target, rows = self.slices.borrow(self.target, part), self.slices.borrow(value, part)
            kept, stepped = self.slices.borrow(keep, part), self.slices.borrow(self.stepped, part, read=False)
            losses = [self.measure(rows, stepped, target).sum()]
            while len(losses) <= steps and not _has_converged(losses, tolerance):
                torch.mul(stepped, kept, out=rows)
                losses.append(self.measure(rows, stepped, target).sum())
            self.slices.give_back(value, part, rows)
            courses.append(losses)
        # Slices may have converged at different times: those that stopped early stay at their last loss.
        courses = [padded(losses, max(map(len, courses))) for losses in courses]
        return [torch.stack(losses).sum() for losses in zip(*courses, strict=True)]


def _has_converged(losses: list[Tensor], tolerance: float) -> bool:
    """Whether the loss has hardly changed since the last look, `CHECK_EVERY` steps ago; waits for the device then."""
    if not tolerance or len(losses) <= CHECK_EVERY or len(losses) % CHECK_EVERY:
        return False
    before, now = losses[-1 - CHECK_EVERY], losses[-1]
    return bool((before - now).abs() <= tolerance * before)


class Prepared(NamedTuple):
    """What is computed once per Gram matrix.

    Args:
        products: Products with A = C + μI (in, in).
        step_size: α, below 1 / λmax(A).
    """

    products: Products
    step_size: float


def prepare(gram: ScaledGram, config: MAIHTConfig) -> Prepared:
    """Add the ridge to a copy of C (in, in), and find the step size."""
    matrix = gram.correlation.clone()
    matrix.diagonal().add_(config.mu)
    return Prepared(Products.of(matrix, config.precision), step_size(gram, config))


def initial_penalty(target: Tensor, step_size: float, pattern: Pattern) -> Tensor:
    """λ0 = q² / (2α), float64: the first iteration from the dense weight then thresholds at q.

    q is the |B| that 95 % of the entries exceed for sparsities above 0.35, 99 % below 0.15, 97 % between. Where B has
    so many zeros (dead features, or a weight that was pruned before) that q would be 0, and λ would stay 0, only the
    other entries count.
    """
    quantile = 0.05 if pattern.sparsity > 0.35 else 0.01 if pattern.sparsity < 0.15 else 0.03
    size = pattern.units(target).abs()
    reached, left = size.shape[1] - int(quantile * (size.shape[1] - 1)), count(size > 0).double()
    reached_of_left = (left - (quantile * (left - 1)).floor()).clamp_min(1)
    q = kth_largest(size, torch.where(left >= reached, reached, reached_of_left))
    return q.double().square() / (2 * step_size)


def solve(
    weight: Tensor,
    gram: ScaledGram,
    prepared: Prepared,
    pattern: Pattern,
    config: MAIHTConfig,
    *,
    accelerated: bool = True,
    plain: bool = True,
) -> Solution:
    """Prune one layer by (monotone, accelerated) iterative hard thresholding.

    Args:
        weight: W0 (out, in).
        gram: The scaled Gram matrix of the layer's inputs.
        prepared: From `prepare`.
        pattern: What to prune and how much.
        config: Iterations t1 and t2, ridge μ, tolerance, memory budget and `keep_zeros`.
        accelerated: Try the accelerated candidate.
        plain: Try the plain candidate; with both this is mAIHT.

    Returns:
        The pruned weight in `gram`'s dtype. Its objective is f(S) after each thresholding iteration and from
        the final support on after each refining step.
    """
    rows = rows_within(config.memory_budget, weight.shape, gram.norms.dtype)
    if rows < len(weight) and pattern.name == "row":
        # Rows that are problems of their own are solved slice after slice, which may stop early at different times.
        one = partial(solve, gram=gram, prepared=prepared, pattern=pattern, config=config)
        return Solution.concatenate([one(part, accelerated=accelerated, plain=plain) for part in weight.split(rows)])
    device, step_size = weight.device, prepared.step_size
    norms, dense = gram.norms, weight
    if rows < len(weight):
        # What must outlive a slice waits in host memory: B, and the candidates with their gradient steps (out, in).
        norms, dense = norms.cpu(), dense.cpu()
    target, exponent = scale_weight(dense, norms)
    penalty = initial_penalty(target, step_size, pattern) if not pattern.group else target.new_zeros(1, 1).double()
    iteration = HardThresholding(
        target,
        prepared.products,
        step_size=step_size,
        pattern=pattern,
        accelerated=accelerated,
        plain=plain,
        rows=rows,
        keep_zeros=config.keep_zeros,
    )
    losses, choices = _shrink_support(iteration, penalty.to(device), pattern, config)
    sparse, stepped = iteration.finish()

    # λ may have gone a little too far, so that S (out, in) has fewer nonzeros than are to be kept: those entries come
    # back that the next gradient step u(S) would raise highest. Dead features go by magnitude.
    mask = pattern.mask(sparse.abs(), stepped.abs_(), dense.abs().to(sparse.dtype))
    keep = mask.to(sparse.dtype)
    losses += iteration.refine(sparse.mul_(keep), keep, config.refine_iterations, config.tolerance)
    del iteration, keep, stepped

    result = unscale_weight(sparse, exponent, norms)
    if bool((norms == 0).any()):
        # A kept weight of a dead feature cannot change the layer's outputs: it stays what it was in W0 (out, in).
        result = torch.where(mask & (norms == 0), dense.to(result.dtype), result)
    return Solution(
        result.to(device),
        mask.to(device),
        objective=[v * 4.0**exponent for v in torch.stack(losses).tolist()],
        accelerated=torch.stack(choices).tolist() if accelerated and plain and choices else [],
    )


def _shrink_support(
    iteration: HardThresholding, penalty: Tensor, pattern: Pattern, config: MAIHTConfig
) -> tuple[list[Tensor], list[Tensor]]:
    """Iterate under an adapted λ until the support is small enough; returns the losses and the monitor's choices."""
    losses: list[Tensor] = []
    choices: list[Tensor] = []
    margin = 0.015 if pattern.sparsity > 0.35 else 0.01  # δ
    entries = iteration.target.shape[1] if len(iteration.nonzeros) > 1 else iteration.target.numel()
    support: Tensor | None = None
    for _ in range(config.iterations):
        penalty = penalty * (1 + pattern.sparsity - margin - (1 - iteration.nonzeros / entries))
        iteration.step(penalty)
        losses.append(iteration.loss.sum())
        choices.append(iteration.took_accelerated.float().mean())
        if config.tolerance and len(losses) % CHECK_EVERY == 0:
            before, support = support, iteration.current() != 0
            changed = 1.0 if before is None else float((before ^ support).sum()) / support.numel()
            if changed <= config.tolerance and _has_converged(losses, config.tolerance):
                break
    return losses, choices


def step_size(gram: ScaledGram, config: MAIHTConfig) -> float:
    """α = step_scale / λmax(A), with λmax(A) = λmax(C) + μ."""
    # A Gram matrix of dead features alone has λmax = 0; any step will do then.
    return config.step_scale / max(largest_eigenvalue(gram.correlation) + config.mu, torch.finfo(torch.float32).tiny)
