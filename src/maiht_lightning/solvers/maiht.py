"""mAIHT, AIHT and IHT: iterative hard thresholding for one linear layer.

Background: Algorithm 1 of Wen, Zuo, Pan, *An Efficient Pruner for Large Language Model with Theoretical
Guarantee*, ICML 2025 (PMLR 267:66575-66596): Nesterov extrapolation with a monitor after Li & Lin's monotone
accelerated proximal gradient (NeurIPS 2015), started at the dense weight with a penalty λ that grows until the
sparsity is reached, then gradient steps on the support.

The names of Algorithm 1, and what they are here and in `hard_thresholding`, where the iteration is:

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
from typing import NamedTuple

import torch
from torch import Tensor

from .config import MAIHTConfig
from .hard_thresholding import CHECK_EVERY, HardThresholding, has_converged
from .patterns import Pattern, count, kth_largest
from .precision import Products
from .problem import ScaledGram, largest_eigenvalue, scale_weight, unscale_weight
from .slices import page_locked, rows_within
from .solution import Solution


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
    target = page_locked(target, device)
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
            if changed <= config.tolerance and has_converged(losses, config.tolerance):
                break
    return losses, choices


def step_size(gram: ScaledGram, config: MAIHTConfig) -> float:
    """α = step_scale / λmax(A), with λmax(A) = λmax(C) + μ."""
    # A Gram matrix of dead features alone has λmax = 0; any step will do then.
    return config.step_scale / max(largest_eigenvalue(gram.correlation) + config.mu, torch.finfo(torch.float32).tiny)
