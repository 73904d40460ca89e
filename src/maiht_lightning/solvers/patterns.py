"""Sparsity patterns: which entries of a weight compete with each other, and how many of them stay.

A pattern cuts a weight of shape (out, in) into *units* of equal size, and keeps the same number of entries in each: a
unit is the whole layer (`unstructured`), a row (`row`), or M consecutive inputs of a row (`N:M`, N of M kept). All
counts are exact, whatever ties there are.
"""

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from math import inf, sqrt

import numpy as np
import torch
from torch import Tensor

from ..validation import did_you_mean
from .fusing import one_pass

DEFAULT_SPARSITY = 0.5
SAMPLED_FROM = 2**12  # entries of a row from which on a sample of it is worth its while
SORTED_BELOW = 2**12  # entries that a CPU sorts faster than it goes through the bits of one
MAX_GROUP = 64  # M of N:M; ranks within a group are counted in M² / 2 comparisons, as int8


@dataclass(frozen=True)
class Pattern:
    """A sparsity pattern together with the sparsity asked for.

    Args:
        name: `unstructured`, `row` or `N:M`.
        sparsity: Fraction of zeros; for `N:M` this is 1 − N/M.
        keep: N of an `N:M` pattern, else 0.
        group: M of an `N:M` pattern, else 0.
    """

    name: str
    sparsity: float
    keep: int = 0
    group: int = 0

    @property
    def by_row(self) -> bool:
        """Whether rows do not compete with each other, so that each row is a problem of its own."""
        return self.name != "unstructured"

    def check_shape(self, shape: torch.Size | tuple[int, ...], layer: str = "weight") -> None:
        """Raise `ValueError` unless a weight of shape (out, in) can be cut into this pattern's units."""
        if self.group and shape[1] % self.group:
            raise ValueError(
                f"pattern {self.name!r} needs the number of inputs to be divisible by {self.group}, "
                f"but {layer} has shape {tuple(shape)}: {shape[1]} inputs"
            )

    def kept(self, shape: torch.Size | tuple[int, ...]) -> int:
        """Entries kept in each unit of a weight of shape (out, in)."""
        if self.group:
            return self.keep
        size = shape[1] if self.by_row else shape[0] * shape[1]
        return size - zeros_of(self.sparsity, size)

    def with_zeros(self, zeros: int, size: int) -> "Pattern":
        """The same with exactly so many zeros in each unit of so many entries."""
        # Halfway to the next number, where no rounding of the fraction can change it.
        return replace(self, sparsity=(zeros + 0.5) / size if zeros else 0.0)

    def units(self, matrix: Tensor) -> Tensor:
        """View (out, in) as (units, entries of a unit)."""
        if self.group:
            return matrix.reshape(-1, self.group)
        return matrix if self.by_row else matrix.reshape(1, -1)

    def holds_for(self, weight: Tensor) -> bool:
        """Whether no unit of a weight (out, in) has more entries left than this pattern keeps."""
        left = (self.units(weight) != 0).sum(1)
        return bool((left <= self.kept(weight.shape)).all())

    def mask(self, score: Tensor, *tiebreaks: Tensor) -> Tensor:
        """The entries to keep: those with the largest score in their unit, an exact number of them.

        Args:
            score: (out, in), finite.
            tiebreaks: Further scores of the same shape that decide among equal ones, first to last; what is
                still equal then is decided by position.

        Returns:
            Boolean (out, in).
        """
        keep = self.kept(score.shape)
        mask = keep_largest(self.units(score), keep, *(self.units(t) for t in tiebreaks))
        return mask.reshape(score.shape)


def parse_pattern(pattern: str, sparsity: float) -> Pattern:
    """Read a pattern's name and check it against the sparsity.

    Args:
        pattern: `unstructured`, `row`, or `N:M` such as `2:4`, which keeps N of M.
        sparsity: Fraction of zeros in [0, 1). `N:M` fixes the sparsity by itself; it may be left at the
            default or must agree.

    Raises:
        ValueError: Naming the argument that is wrong, what was expected and what was found.
    """
    is_number = isinstance(sparsity, int | float | np.floating) and not isinstance(sparsity, bool)
    if not is_number or not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be the fraction of zeros, at least 0 and below 1, but found {sparsity!r}")
    # The decimal that was written is meant: NumPy's float32 of 0.29 would be 0.28999999 as a Python float.
    sparsity = float(str(sparsity))
    if pattern in ("unstructured", "row"):
        return Pattern(pattern, sparsity)
    match = re.fullmatch(r"([0-9]+):([0-9]+)", pattern) if isinstance(pattern, str) else None
    if match is None:
        asked = did_you_mean(pattern, ("unstructured", "row"))
        raise ValueError(f"pattern must be 'unstructured', 'row' or 'N:M' such as '2:4', but found {pattern!r}{asked}")
    keep, group = int(match[1]), int(match[2])
    if not 1 <= keep <= group:
        raise ValueError(
            f"pattern {pattern!r} keeps N = {keep} of M = {group}: N must be at least 1 and at most M "
            f"('2:4' keeps 2 of 4)"
        )
    if group > MAX_GROUP:
        raise ValueError(f"pattern {pattern!r} has groups of {group}, but M must be at most {MAX_GROUP}")
    implied = 1 - keep / group
    if sparsity != DEFAULT_SPARSITY and abs(sparsity - implied) > 1e-6:
        raise ValueError(
            f"pattern {pattern!r} means a sparsity of {implied:g}, but sparsity is {sparsity!r}: "
            f"leave the sparsity out or change the pattern"
        )
    return Pattern(pattern, implied, keep, group)


def zeros_of(sparsity: float, size: int) -> int:
    """Zeros among `size` entries: floor(sparsity · size) for the decimal that was written.

    A binary fraction is a little off that decimal, and a product with it is rounded, so that `int(0.29 * 100)` is 28.

    Example:
        >>> zeros_of(0.29, 100)
        29
    """
    return int(Fraction(str(sparsity)) * size)


def keep_largest(score: Tensor, keep: int, *tiebreaks: Tensor) -> Tensor:
    """Find the `keep` largest entries of each row, exactly that many; only short rows are sorted.

    Args:
        score: (rows, n), finite.
        keep: Entries to keep in each row.
        tiebreaks: Further scores of the same shape and kind that decide among equal ones, first to last; what is
            still equal then is decided by position, first to last.

    Returns:
        Boolean (rows, n).
    """
    if score.shape[1] <= MAX_GROUP:
        return _keep_largest_of_short_rows(score, keep, tiebreaks)
    wanted = torch.full((score.shape[0], 1), keep, device=score.device)
    threshold = kth_largest(score, wanted)
    reached, number = reaching(score, threshold)
    if torch.equal(number, wanted):
        return reached
    # Of entries that are equal in all keys so far some are kept: (rows, n).
    kept, open_ = score > threshold, score == threshold
    if len(score) == 1 and score.shape[1] >= SAMPLED_FROM:
        places = open_[0].nonzero()[:, 0]
        # In a layer of some million weights two are often equal, and seldom many.
        if len(places) <= score.shape[1] // 64:
            for key in reversed(tiebreaks):
                places = places[key[0, places].argsort(descending=True, stable=True)]
            kept[0, places[: keep - int(count(kept))]] = True
            return kept
    for key in tiebreaks:
        closed = torch.where(open_, key, -torch.inf)
        threshold = kth_largest(closed, keep - count(kept))
        kept |= closed > threshold
        open_ = closed == threshold
        if torch.equal(count(kept) + count(open_), wanted):
            return kept.logical_or_(open_)
    return kept.logical_or_(open_ & (open_.cumsum(1) <= keep - count(kept)))


def _keep_largest_of_short_rows(score: Tensor, keep: int, tiebreaks: tuple[Tensor, ...]) -> Tensor:
    rows, n = score.shape
    if keep in (0, n):
        return torch.full_like(score, keep == n, dtype=torch.bool)
    mask = score >= score.kthvalue(n - keep + 1, dim=1, keepdim=True).values
    if int(mask.count_nonzero()) == rows * keep:
        return mask
    order = torch.arange(n, device=score.device).expand(rows, n)
    for key in (*reversed(tiebreaks), score):
        order = order.gather(1, key.gather(1, order).argsort(dim=1, descending=True, stable=True))
    return torch.zeros_like(mask).scatter_(1, order[:, :keep], True)


def kth_largest(score: Tensor, k: Tensor) -> Tensor:
    """Find the k-th largest entry of each row by bisection, of a single long one between bounds from a sample of it.

    Where they are few on a CPU, they are sorted.

    Floating-point numbers are ordered as the integers of their bits are, negative ones in reverse, so the value is
    found bit by bit: the largest number that at least k entries reach. It takes one pass over memory per bit, which all
    processors of a GPU do together, where a selection by `kthvalue` gives each row to one of them.

    Args:
        score: (rows, n); entries of −inf do not count.
        k: (rows, 1), whole numbers. The result is NaN where k is 0.

    Returns:
        (rows, 1).
    """
    if score.numel() < SORTED_BELOW and score.device.type == "cpu":
        ranked = score.sort(dim=1, descending=True).values.gather(1, (k - 1).clamp_min(0).long())
        return torch.where(k > 0, ranked, torch.nan)
    if len(score) == 1 and score.shape[1] >= SAMPLED_FROM:
        sampled = _kth_largest_by_sample(score[0], int(k))
        if sampled is not None:
            return sampled.view(1, 1)
    bits = 8 * score.element_size() - 1
    kind = {15: torch.int16, 31: torch.int32, 63: torch.int64}[bits]
    low, high = torch.iinfo(kind).min, torch.iinfo(kind).max
    is_negative = count(score >= 0) < k
    found = torch.where(is_negative, low, 0).to(kind)
    # The sign is settled, and with it whether the other bits are those of the integer or their complement.
    flipped = torch.where(is_negative, high, 0).to(kind)
    reached = torch.empty_like(score)
    # What a bit takes are six kernels on a GPU, which for all but large matrices cost their launch.
    for bit in reversed(range(bits)):
        candidate = found | 1 << bit
        torch.ge(score, (candidate ^ flipped).view(score.dtype), out=reached)
        found = torch.where(count(reached) >= k, candidate, found)
    return (found ^ flipped).view(score.dtype)


def _kth_largest_by_sample(score: Tensor, k: int) -> Tensor | None:
    """The k-th largest of many entries (n,), exactly, from those that lie where a sample has it; None if they do not.

    Between the bounds are a few entries in a hundred, which are sorted. So memory is passed a few times, and not once a
    bit as by bisection; the numbers that decide come to the host, which waits for a GPU a few times.
    """
    n = len(score)
    if not k:
        return None
    # Of a matrix of 2ⁱ columns an odd step meets all of them.
    sample = score[:: round(n ** (1 / 3)) | 1].sort(descending=True).values
    place, spread = k / n * len(sample), 4 * sqrt(len(sample) * k / n * (1 - k / n)) + 2
    first, last = int(place - spread), int(place + spread)
    high = sample[first] if first >= 0 else sample.new_tensor(inf)
    low = sample[last] if last < len(sample) else sample.new_tensor(-inf)
    within, *numbers = between(score[None], low.view(1, 1), high.view(1, 1))
    inside, above = torch.cat(numbers).flatten().tolist()
    if above < k <= above + inside:
        return score[within[0]].sort(descending=True).values[k - above - 1] if inside <= n // 2 else None
    # The lower bound may be many entries' value: the zeros' of a sparse matrix.
    return low if above < k <= above + inside + int((score == low).sum()) else None


@one_pass
def between(score: Tensor, low: Tensor, high: Tensor, *, scratch: None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Which entries (rows, n) are above a bound (rows, 1) and at most another; how many, and how many exceed that one.

    The numbers are int64 (rows, 1).
    """
    within = (score > low).logical_and_(score <= high)
    return within, count(within), count(score > high)


@one_pass
def reaching(score: Tensor, threshold: Tensor, *, scratch: None = None) -> tuple[Tensor, Tensor]:
    """Which entries (rows, n) are at least the threshold (rows, 1), and how many of each row, int64 (rows, 1)."""
    reached = score >= threshold
    return reached, count(reached)


def count(mask: Tensor) -> Tensor:
    """Count the ones in each row of a mask (rows, n) of booleans or numbers: int64 (rows, 1)."""
    if mask.is_cuda:
        return mask.sum(1, keepdim=True, dtype=torch.int64)
    # On a CPU sums in float32 are far faster than in other formats, and exact up to 2²⁴.
    parts = mask.split(1 << 24, dim=1)
    return torch.stack([part.sum(1, keepdim=True, dtype=torch.float32).long() for part in parts]).sum(0)


def hard_threshold_(out: Tensor, value: Tensor, threshold: Tensor, kept: Tensor) -> Tensor:
    """Write H_τ(value) to `out`: entries with |v| ≥ τ stay, the others become 0.

    Args:
        out: (out, in), overwritten.
        value: (out, in).
        threshold: τ, (1, 1) for the whole matrix or (out, 1) for each row.
        kept: Scratch (out, in).

    Returns:
        `kept` (out, in), 1 where an entry stays, else 0: numbers, which on a CPU are several times faster to
        multiply with and to sum than booleans are.
    """
    torch.ge(torch.abs(value, out=kept), threshold, out=kept)
    torch.mul(value, kept, out=out)
    return kept


def keep_of_groups_(out: Tensor, value: Tensor, keep: int, group: int, scratch: Tensor) -> None:
    """Write to `out` the `keep` largest |v| of every `group` consecutive inputs, 0 elsewhere.

    Every entry's rank in its group is counted by comparing it with the others, which is exact also for
    equal values (the earlier input wins) and, for the small groups in use, several times faster than
    sorting millions of them.

    Args:
        out: (out, in), contiguous, overwritten.
        value: (out, in), contiguous.
        keep: N.
        group: M, at most `MAX_GROUP`, which divides `in`.
        scratch: (out, in), contiguous, overwritten.
    """
    # Member after member instead of group after group, so that comparisons run over contiguous memory.
    grouped, by_member = value.view(-1, group).T, scratch.view(group, -1)
    size = torch.abs(grouped, out=by_member).unbind()
    # Ranks (group, units) begin as if all later members of a group were larger.
    rank = torch.arange(group - 1, -1, -1, dtype=torch.int8, device=value.device)[:, None].repeat(1, len(size[0]))
    for later in range(1, group):
        for earlier in range(later):
            beaten = (size[earlier] >= size[later]).view(torch.int8)
            rank[later].add_(beaten)
            rank[earlier].sub_(beaten)
    torch.mul(grouped, torch.lt(rank, keep, out=by_member), out=out.view(-1, group).T)
