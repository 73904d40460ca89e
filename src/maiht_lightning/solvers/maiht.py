"""mAIHT, AIHT and IHT: iterative hard thresholding for one linear layer.

Background: Algorithm 1 of Wen, Zuo, Pan, *An Efficient Pruner for Large Language Model with Theoretical
Guarantee*, ICML 2025 (PMLR 267:66575-66596): Nesterov extrapolation with a monitor after Li & Lin's monotone
accelerated proximal gradient (NeurIPS 2015), started at the dense weight with a penalty λ that grows until the
sparsity is reached, then gradient steps on the support.

What differs: the paper's form needs four products with A an iteration (two gradients, two losses). Here it
needs two. Gradient steps u(S) = S − α∇f(S) are affine in S, so u of the extrapolated point is the same linear
combination of the u's at hand, and f(S) = ½⟨S − B, ∇f(S)⟩ comes with the gradient.
"""

from math import sqrt

import torch
from torch import Tensor

from .config import MAIHTConfig
from .patterns import Pattern, count, hard_threshold_, keep_of_groups_, kth_largest
from .problem import ScaledGram, largest_eigenvalue, scale_weight, unscale_weight
from .solution import Solution


class Point:
    """A point S with what one product with A tells about it.

    Attributes:
        value: S (out, in).
        stepped: u(S) = S − α∇f(S) (out, in).
        loss: f(S), float64, (1, 1) or one a row (out, 1).
        nonzeros: Entries of S that thresholding has kept, shaped as `loss`.
    """

    def __init__(self, like: Tensor) -> None:
        self.value = like.clone()
        self.stepped = torch.empty_like(like)
        self.loss = self.nonzeros = torch.empty(0)


class HardThresholding:
    """The iteration in scaled coordinates. Every buffer is allocated once; nothing waits for the device.

    Args:
        target: B (out, in).
        correlation: C (in, in).
        mu: Ridge μ, so that A = C + μI.
        step_size: α, below 1 / λmax(A).
        pattern: Decides what is thresholded: by penalty (`unstructured`, `row`) or N of M.
        accelerated: Try the extrapolated candidate (mAIHT, AIHT).
        plain: Try the plain gradient step (mAIHT, IHT). With both, the better one is taken: the monitor.
    """

    def __init__(
        self,
        target: Tensor,
        correlation: Tensor,
        *,
        mu: float,
        step_size: float,
        pattern: Pattern,
        accelerated: bool = True,
        plain: bool = True,
    ) -> None:
        self.target, self.correlation, self.mu = target, correlation, mu
        self.step_size, self.pattern = step_size, pattern
        self.residual, self.gradient = torch.empty_like(target), torch.empty_like(target)
        self.fast = Point(target) if accelerated else None
        self.plain = Point(target) if plain else None
        # The dense start: its gradient is 0, so a gradient step stays there.
        self.stepped = target.clone()
        self.previous = target.clone() if accelerated else self.stepped
        if self.fast is not None:
            self.fast.stepped.copy_(target)
        self.nonzeros = self._per_problem(torch.ne(target, 0, out=self.residual).sum(1))
        self.loss = torch.zeros_like(self.nonzeros)
        self.took_fast = torch.ones_like(self.nonzeros, dtype=torch.bool)
        self.t, self.t_previous = 1.0, 0.0

    def _per_problem(self, rows: Tensor) -> Tensor:
        """Sum numbers a row (out,) to one a problem, float64: (out, 1) where rows are independent, else (1, 1)."""
        rows = rows.double()
        return rows[:, None] if self.pattern.by_row and not self.pattern.group else rows.sum().view(1, 1)

    def measure(self, point: Point) -> None:
        """Fill in the point's loss and gradient step: the one product with A."""
        torch.sub(point.value, self.target, out=self.residual)
        torch.addmm(self.residual, self.residual, self.correlation, beta=self.mu, out=self.gradient)
        point.loss = self._per_problem(self.residual.mul_(self.gradient).sum(1)) / 2
        torch.add(point.value, self.gradient, alpha=-self.step_size, out=point.stepped)

    def threshold(self, point: Point, stepped: Tensor, penalty: Tensor) -> None:
        """Take the proximal step of λ‖·‖₀, or keep N of M, at a gradient step (out, in)."""
        if self.pattern.group:
            keep_of_groups_(point.value, stepped, self.pattern.keep, self.pattern.group, self.residual)
            point.nonzeros = self.nonzeros
            return
        tau = (2 * self.step_size * penalty).sqrt().to(stepped.dtype)
        hard_threshold_(point.value, stepped, tau, self.residual)
        point.nonzeros = self._per_problem(self.residual.sum(1))

    def step(self, penalty: Tensor) -> None:
        """One iteration at penalty λ, (1, 1) or one a row (out, 1), float64.

        For a fixed λ and with the plain candidate, F_λ(S) = f(S) + λ‖S‖₀ does not increase.
        """
        candidates = []
        if self.fast is not None:
            # Y = S + a (Z − S) + b (S − S_previous), written in gradient steps and as two interpolations:
            # (1 − a) (S + b / (1 − a) (S − S_previous)) + a Z.
            a, b = self.t_previous / self.t, (self.t_previous - 1) / self.t
            ahead = torch.lerp(self.previous, self.stepped, 1 + b / (1 - a), out=self.gradient)
            ahead.lerp_(self.fast.stepped, a)
            self.threshold(self.fast, ahead, penalty)
            self.measure(self.fast)
            candidates.append(self.fast)
        if self.plain is not None:
            self.threshold(self.plain, self.stepped, penalty)
            self.measure(self.plain)
            candidates.append(self.plain)
        first, last = candidates[0], candidates[-1]
        # ‖·‖₀ enters as a difference: with λ‖S‖₀ far above f, the sums would round the decision away.
        self.took_fast = first.loss - last.loss <= penalty * (last.nonzeros - first.nonzeros)
        self.loss = torch.where(self.took_fast, first.loss, last.loss)
        self.nonzeros = torch.where(self.took_fast, first.nonzeros, last.nonzeros)
        self.previous, self.stepped = self.stepped, self.previous
        torch.where(self.took_fast, first.stepped, last.stepped, out=self.stepped)
        self.t_previous, self.t = self.t, (1 + sqrt(1 + 4 * self.t**2)) / 2

    def current(self) -> Point:
        """The point S after the last step; its loss and gradient step are stale. No memory is taken."""
        first, last = self.fast or self.plain, self.plain or self.fast
        assert first is not None
        assert last is not None
        torch.where(self.took_fast, first.value, last.value, out=first.value)
        return first


def initial_penalty(target: Tensor, step_size: float, pattern: Pattern) -> Tensor:
    """λ0 = q² / (2α), float64: the threshold that a first step from the dense weight applies is q.

    q is the |B| that 95 % of the entries exceed for sparsities above 0.35, 99 % below 0.15, 97 % between. With so
    many zeros (dead features, or a weight that was pruned before) that q would be one, so that λ would stay 0, only
    the other entries count.
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
    pattern: Pattern,
    config: MAIHTConfig,
    *,
    step_size: float,
    accelerated: bool = True,
    plain: bool = True,
) -> Solution:
    """Prune one layer by (monotone, accelerated) iterative hard thresholding.

    Args:
        weight: W0 (out, in).
        gram: The scaled Gram matrix of the layer's inputs.
        pattern: What to prune and how much.
        config: Iterations and ridge.
        step_size: α from `step_size`.
        accelerated: Try the accelerated candidate.
        plain: Try the plain candidate; with both this is mAIHT.

    Returns:
        The pruned weight in `gram`'s dtype. Its objective is f(S) after each thresholding iteration and from
        the final support on after each refining step.
    """
    target, exponent = scale_weight(weight, gram)
    penalty = initial_penalty(target, step_size, pattern) if not pattern.group else target.new_zeros(1, 1).double()
    iteration = HardThresholding(
        target,
        gram.correlation,
        mu=config.mu,
        step_size=step_size,
        pattern=pattern,
        accelerated=accelerated,
        plain=plain,
    )
    losses, choices = [], []
    margin = 0.015 if pattern.sparsity > 0.35 else 0.01
    entries = target.shape[1] if iteration.nonzeros.shape[0] > 1 else target.numel()
    for _ in range(config.iterations):
        penalty = penalty * (1 + pattern.sparsity - margin - (1 - iteration.nonzeros / entries))
        iteration.step(penalty)
        losses.append(iteration.loss.sum())
        choices.append(iteration.took_fast.float().mean())
    point = iteration.current()
    sparse = point.value
    # The memory of the other candidate and of the point before is free for the selection.
    iteration.plain, iteration.previous = iteration.fast, iteration.stepped

    # λ may have gone a little too far, so that fewer weights are left than asked for: those come back that the
    # next gradient step would raise highest. Dead features go by magnitude. All three scores lie in buffers.
    mask = pattern.mask(
        torch.abs(sparse, out=iteration.residual),
        iteration.stepped.abs_(),
        iteration.gradient.copy_(weight).abs_(),
    )
    keep = iteration.stepped.copy_(mask)
    sparse.mul_(keep)
    for _ in range(config.refine_iterations):
        iteration.measure(point)
        losses.append(point.loss.sum())
        torch.mul(point.stepped, keep, out=sparse)
    iteration.measure(point)
    losses.append(point.loss.sum())

    result = unscale_weight(sparse, exponent, gram)
    if bool((gram.norms == 0).any()):
        # A kept weight of a dead feature cannot matter: it stays what it was.
        result = torch.where(mask & (gram.norms == 0), weight.to(result.dtype), result)
    return Solution(
        result,
        mask,
        objective=[v * 4.0**exponent for v in torch.stack(losses).tolist()],
        accelerated=torch.stack(choices).tolist() if accelerated and plain and choices else [],
    )


def step_size(gram: ScaledGram, config: MAIHTConfig) -> float:
    """α = step_scale / λmax(A), with λmax(A) = λmax(C) + μ."""
    # A Gram matrix of dead features alone has λmax = 0; any step will do then.
    return config.step_scale / max(largest_eigenvalue(gram.correlation) + config.mu, torch.finfo(torch.float32).tiny)
