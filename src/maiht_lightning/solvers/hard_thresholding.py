"""The iteration of mAIHT, AIHT and IHT: candidates, their gradient steps, and the monitor that takes the better one.

The names are those of `maiht`, whose table says what they are in Algorithm 1 of Wen, Zuo, Pan, ICML 2025.
"""

from math import sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .fusing import one_pass
from .patterns import Pattern, count, hard_threshold_, keep_of_groups_
from .precision import Left, Multiplier, Products, scale
from .slices import Slices, copy_beside
from .solution import padded

# Where a tolerance is set, so many iterations lie between two looks at whether the objective has converged.
CHECK_EVERY = 5
# So many products of the refining, the last ones, are those for final weights: what the rounded ones before them were
# off by, these make good. Where a tolerance may end it at any time, all are.
EXACT_STEPS = 10


class Candidate:
    """A point tried in an iteration, Z or V of Algorithm 1, with what one product with A tells about it.

    Attributes:
        value: S (out, in).
        stepped: u(S) = S − α∇f(S) (out, in).
        loss: f(S), float64, (1, 1), or (out, 1) where each row is a problem of its own.
        nonzeros: Entries of S that thresholding has kept, shaped as `loss`.
    """

    def __init__(self, start: Tensor) -> None:
        self.value, self.stepped = copy_beside(start), copy_beside(start)
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
        self.target, self.products = target, products
        device = products.search.device
        self.keep_zeros = keep_zeros
        self.step_size, self.pattern = step_size, pattern
        self.slices = Slices(len(target), rows or len(target), device)
        self.gradient = torch.empty_like(target[self.slices.parts[0]], device=device)
        # S − B as products take it, and a buffer for it where they take it in another form.
        self.left = products.search.left(len(self.gradient))
        self.residual = self._residual(self.left)
        # All begin at the dense weight B: its gradient is 0, so that its gradient step u(B) is B again.
        self.candidates = [Candidate(target) for _ in range(accelerated + plain)]
        self.accelerated, self.plain = accelerated, plain
        self.stepped = copy_beside(target)
        self.nonzeros = self._per_problem(count(target != 0)[:, 0]).to(device)
        self.loss = torch.zeros_like(self.nonzeros)
        self.took_accelerated = torch.ones_like(self.nonzeros, dtype=torch.bool)
        self.t, self.t_previous = 1.0, 0.0

    def _per_problem(self, rows: Tensor) -> Tensor:
        """Sum (out,), one number per row, to one per problem: (out, 1) for independent rows, else (1, 1); float64."""
        rows = rows.double()
        return rows[:, None] if self.pattern.by_row and not self.pattern.group else rows.sum().view(1, 1)

    def _residual(self, left: Left) -> Tensor:
        return left.matrix if left.exponents is None else torch.empty_like(self.gradient)

    def measure(self, multiply: Multiplier, left: Left, value: Tensor, stepped: Tensor, target: Tensor) -> Tensor:
        """The loss of a point, whose residual is in `left`, and its gradient step to `stepped`: one product with A."""
        gradient, residual = self.gradient[: len(value)], self.residual[: len(value)]
        multiply.product(left, out=gradient)
        settings = multiply.exponent, gradient, self.step_size, self.keep_zeros
        return self._per_problem(descend(value, target, left, *settings, stepped, scratch=(gradient, residual))) / 2

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
        # N of M needs no threshold.
        tau = None if self.pattern.group else (2 * self.step_size * penalty).sqrt().to(self.target.dtype)
        for part in self.slices.parts:
            target = self.slices.borrow(self.target, part)  # B (rows, in)
            stepped = self.slices.borrow(self.stepped, part)  # u(S_prev) (rows, in), until it is u(S)
            points = [
                Point(point, self.slices.borrow(point.value, part, read=False), self.slices.borrow(point.stepped, part))
                for point in self.candidates
            ]
            scratch = self.gradient[: len(stepped)], self.residual[: len(stepped)]
            left = self.left.rows(len(stepped))
            known = points[0].stepped, points[-1].stepped, self.took_accelerated
            for candidate, value, after in points:
                into = tau, self.pattern, target, value, left
                # The last iteration has accepted Z or V as S: `stepped` turns from u(S_prev) into u(S).
                if self.accelerated and candidate is first:
                    kept = propose_accelerated(stepped, *known, a, c, *into, scratch=scratch)
                elif self.accelerated:
                    kept = propose(stepped, *into, scratch=scratch)
                else:
                    kept = propose_plain(stepped, *known, *into, scratch=scratch)
                # Of N:M every candidate keeps as many entries, so that their number does not matter to the monitor.
                candidate.nonzeros += 0 if kept is None else self._per_problem(kept)
                # Its gradient step (rows, in) into `after`.
                candidate.loss += self.measure(self.products.search, left, value, after, target)
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
        """Take gradient steps on a support, in place; the last products are those for final weights.

        Args:
            value: S (out, in).
            keep: The support as numbers (out, in), 1 and 0.
            steps: Gradient steps t2 at most.
            tolerance: Stop when `CHECK_EVERY` steps together lower f by no more than this fraction.

        Returns:
            f(S) at the start and after each step, float64 scalars.
        """
        search, final = self.products
        # The room for products of the search is there already.
        exact = self.left if search is final else final.left(len(self.gradient))
        courses = []
        for part in self.slices.parts:
            target, rows = self.slices.borrow(self.target, part), self.slices.borrow(value, part)
            kept, stepped = self.slices.borrow(keep, part), self.slices.borrow(self.stepped, part, read=False)
            scratch, before = self.residual[: len(rows)], rows
            losses: list[Tensor] = []
            while not losses or (len(losses) <= steps and not has_converged(losses, tolerance)):
                is_rough = not tolerance and len(losses) + EXACT_STEPS <= steps
                multiply, left = (search, self.left) if is_rough else (final, exact)
                left = left.rows(len(rows))
                restrict(before, kept, target, rows, left, scratch=scratch)
                losses.append(self.measure(multiply, left, rows, stepped, target).sum())
                before = stepped
            self.slices.give_back(value, part, rows)
            courses.append(losses)
        # Slices may have converged at different times: those that stopped early stay at their last loss.
        courses = [padded(losses, max(map(len, courses))) for losses in courses]
        return [torch.stack(losses).sum() for losses in zip(*courses, strict=True)]


def has_converged(losses: list[Tensor], tolerance: float) -> bool:
    """Whether the loss has hardly changed since the last look, `CHECK_EVERY` steps ago; waits for the device then."""
    if not tolerance or len(losses) <= CHECK_EVERY or len(losses) % CHECK_EVERY:
        return False
    before, now = losses[-1 - CHECK_EVERY], losses[-1]
    return bool((before - now).abs() <= tolerance * before)


# ---- Passes over memory, with matrices of a slice's rows (rows, in); see `fusing`


@one_pass
def propose_accelerated(
    before: Tensor,
    after_first: Tensor,
    after_last: Tensor,
    took_first: Tensor,
    a: float,
    c: float,
    *into: Any,
    scratch: tuple[Tensor, Tensor],
) -> Tensor | None:
    """Threshold u(Y), and turn `before` from u(S_prev) into u(S): S was the first or the last candidate.

    The rest is as in `_threshold`, whose scratch is the second; the first is for u(Y).
    """
    u_y = torch.mul(before, 1 - c, out=scratch[0])
    torch.where(took_first, after_first, after_last, out=before)
    return _threshold(u_y.add_(before, alpha=c).lerp_(after_first, a), *into, scratch=scratch[1])


@one_pass
def propose_plain(
    before: Tensor,
    after_first: Tensor,
    after_last: Tensor,
    took_first: Tensor,
    *into: Any,
    scratch: tuple[Tensor, Tensor],
) -> Tensor | None:
    """Turn `before` from u(S_prev) into u(S), and threshold it; the rest is as in `_threshold`."""
    return _threshold(torch.where(took_first, after_first, after_last, out=before), *into, scratch=scratch[1])


@one_pass
def propose(stepped: Tensor, *into: Any, scratch: tuple[Tensor, Tensor]) -> Tensor | None:
    """Threshold u(S); the rest is as in `_threshold`."""
    return _threshold(stepped, *into, scratch=scratch[1])


def _threshold(
    stepped: Tensor,
    tau: Tensor | None,
    pattern: Pattern,
    target: Tensor,
    value: Tensor,
    left: Left,
    *,
    scratch: Tensor,
) -> Tensor | None:
    """Write H_τ(`stepped`), or its N largest of every M, to `value`, and fill `left` with what it lacks of B.

    Args:
        stepped: (rows, in).
        tau: (1, 1) or (rows, 1); None for N:M.
        pattern: For N:M.
        target: B (rows, in).
        value: (rows, in), overwritten.
        left: Filled with H_τ(`stepped`) − B.
        scratch: (rows, in), which may be the matrix of `left`.

    Returns:
        How many entries of each row stay (rows,); None for N:M.
    """
    if tau is None:
        keep_of_groups_(value, stepped, pattern.keep, pattern.group, scratch)
        numbers = None
    else:
        numbers = hard_threshold_(value, stepped, tau, scratch).sum(1, dtype=value.dtype)
    _lack(value, target, left, scratch)
    return numbers


def _lack(value: Tensor, target: Tensor, left: Left, scratch: Tensor) -> None:
    """Fill `left` with S − B (rows, in)."""
    left.fill(torch.sub(value, target, out=left.matrix if left.exponents is None else scratch))


@one_pass
def descend(
    value: Tensor,
    target: Tensor,
    left: Left,
    exponent: int,
    product: Tensor,
    step_size: float,
    keep_zeros: bool,
    stepped: Tensor,
    *,
    scratch: tuple[Tensor, Tensor],
) -> Tensor:
    """Write u(S) = S − α∇f(S) to `stepped`, and return 2 f(S) by rows (rows,).

    Args:
        value: S (rows, in).
        target: B (rows, in).
        left: Has S − B.
        exponent: Of A: see `Multiplier`.
        product: S − B times A (rows, in), but for the `scale`.
        step_size: α.
        keep_zeros: Entries that are 0 in B stay so.
        stepped: (rows, in), overwritten.
        scratch: Two matrices (rows, in), which may be `product` and the matrix of `left`.
    """
    gradient, residual = product, left.matrix
    if left.exponents is not None:
        gradient = torch.mul(product, scale(left.exponents, exponent), out=scratch[0])
        residual = torch.sub(value, target, out=scratch[1])
    torch.add(value, gradient, alpha=-step_size, out=stepped)
    if keep_zeros:
        stepped.mul_(target != 0)
    return torch.mul(residual, gradient, out=scratch[1]).sum(1)


@one_pass
def restrict(stepped: Tensor, keep: Tensor, target: Tensor, value: Tensor, left: Left, *, scratch: Tensor) -> None:
    """Write `stepped` on the support to `value`, and fill `left` with what it lacks of B; the others are (rows, in)."""
    torch.mul(stepped, keep, out=value)
    _lack(value, target, left, scratch)
