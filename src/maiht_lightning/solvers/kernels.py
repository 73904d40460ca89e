"""Triton kernels of the passes over memory, each named as the pass that it does: see `fusing`.

One program has one row (in,) of a layer's matrices in its registers: it reads and writes each matrix once, and knows
the row's largest entry before it rounds it to half precision. What decides between passes is a compile-time constant;
numbers and sizes are arguments, so that a kernel is compiled once for all layers of about one width.

A `Left` is filled as `Left.fill` does. Half-precision numbers are rounded to nearest here as there.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .patterns import Pattern
from .precision import LIMIT, TOP, Left

# The widest row that a program holds: 32 numbers of each matrix for each of its threads.
WIDEST = 32768
# Entries of a row that a program compares, where rows do not fit into one.
COMPARED = 8192


@triton.jit
def _place(columns, WHOLE: tl.constexpr):
    """A program's row, the columns (WHOLE,), which of them there are, and where their entries lie in a matrix."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, WHOLE)
    return row, cols, cols < columns, row * columns + cols


@triton.jit
def _power_of_two(exponent):
    return (exponent + 127 << 23).to(tl.float32, bitcast=True)


@triton.jit
def _fill(
    row, cols, inside, values, matrix, exponents, columns, PARTS: tl.constexpr, TOP: tl.constexpr, LIMIT: tl.constexpr
):
    """Write a row (WHOLE,) as a `Left` has it: PARTS 0 as it is, 1 its high part, 3 [high | high | −low]."""
    if PARTS == 0:
        tl.store(matrix + row * columns + cols, values, mask=inside)
    else:
        largest = tl.max(tl.where(inside, tl.abs(values), 0.0))
        # What frexp calls the exponent, from the bits of a normal number.
        exponent = tl.minimum(TOP + 126 - (largest.to(tl.int32, bitcast=True) >> 23), LIMIT)
        tl.store(exponents + row, exponent)
        scaled = values * _power_of_two(exponent)
        high = scaled.to(tl.float16)
        start = matrix + row * columns * PARTS + cols
        tl.store(start, high, mask=inside)
        if PARTS == 3:
            tl.store(start + columns, high, mask=inside)
            tl.store(start + 2 * columns, (high.to(tl.float32) - scaled).to(tl.float16), mask=inside)


@triton.jit
def _factor(row, exponents, base):
    """By what a row of a product is still to be multiplied."""
    return _power_of_two(tl.minimum(-base - tl.load(exponents + row), 127))


@triton.jit(do_not_specialize=["took_stride", "tau_stride"])
def _threshold(
    before, first, last, took, took_stride, a, c, tau, tau_stride, keep, target, value, matrix, exponents, counts,
    columns,
    ACCELERATED: tl.constexpr, CHOOSE: tl.constexpr, SUPPORT: tl.constexpr,
    PARTS: tl.constexpr, TOP: tl.constexpr, LIMIT: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    row, cols, inside, at = _place(columns, WHOLE)
    point = tl.load(before + at, mask=inside, other=0.0)
    if CHOOSE:
        one = tl.load(first + at, mask=inside, other=0.0)
        chosen = one
        if tl.load(took + row * took_stride) == 0:
            chosen = tl.load(last + at, mask=inside, other=0.0)
        tl.store(before + at, chosen, mask=inside)
        if ACCELERATED:
            point = point * (1 - c) + chosen * c
            point = point + a * (one - point)
        else:
            point = chosen
    if SUPPORT:
        point = point * tl.load(keep + at, mask=inside, other=0.0)
    else:
        kept = inside & (tl.abs(point) >= tl.load(tau + row * tau_stride))
        point = tl.where(kept, point, 0.0)
        tl.store(counts + row, tl.sum(kept.to(tl.float32)))
    tl.store(value + at, point, mask=inside)
    lacking = point - tl.load(target + at, mask=inside, other=0.0)
    _fill(row, cols, inside, lacking, matrix, exponents, columns, PARTS, TOP, LIMIT)


@triton.jit(do_not_specialize=["base"])
def _descend(
    value, target, product, exponents, base, step_size, stepped, sums, columns,
    SCALED: tl.constexpr, KEEP_ZEROS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    row, _, inside, at = _place(columns, WHOLE)
    point = tl.load(value + at, mask=inside, other=0.0)
    wanted = tl.load(target + at, mask=inside, other=0.0)
    gradient = tl.load(product + at, mask=inside, other=0.0)
    if SCALED:
        gradient = gradient * _factor(row, exponents, base)
    tl.store(sums + row, tl.sum((point - wanted) * gradient))
    point = point - step_size * gradient
    if KEEP_ZEROS:
        point = tl.where(wanted != 0, point, 0.0)
    tl.store(stepped + at, point, mask=inside)


@triton.jit(do_not_specialize=["base"])
def _combine(
    current, exponents, base, target, dual, free, score, columns,
    SCALED: tl.constexpr, SOME: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    row, _, inside, at = _place(columns, WHOLE)
    point = tl.load(current + at, mask=inside, other=0.0)
    if SCALED:
        point = point * _factor(row, exponents, base)
    point = point + tl.load(target + at, mask=inside, other=0.0) + tl.load(dual + at, mask=inside, other=0.0)
    tl.store(current + at, point, mask=inside)
    size = tl.abs(point)
    if SOME:
        size = size * tl.load(free + at, mask=inside, other=0.0)
    tl.store(score + at, size, mask=inside)


@triton.jit
def _separate(
    proposal, mask, penalty, target, dual, matrix, exponents, columns,
    PARTS: tl.constexpr, TOP: tl.constexpr, LIMIT: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    row, cols, inside, at = _place(columns, WHOLE)
    point = tl.load(proposal + at, mask=inside, other=0.0)
    sparse = tl.where(tl.load(mask + at, mask=inside, other=0) != 0, point, 0.0)
    rest = point - sparse
    tl.store(dual + at, rest, mask=inside)
    right = (sparse - rest - tl.load(target + at, mask=inside, other=0.0)) * penalty
    _fill(row, cols, inside, right, matrix, exponents, columns, PARTS, TOP, LIMIT)


@triton.jit(do_not_specialize=["base"])
def _curve(
    product, exponents, base, kept, direction, curvatures, squares, columns,
    SCALED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    row, _, inside, at = _place(columns, WHOLE)
    image = tl.load(product + at, mask=inside, other=0.0) * tl.load(kept + at, mask=inside, other=0.0)
    if SCALED:
        image = image * _factor(row, exponents, base)
    tl.store(product + at, image, mask=inside)
    along = tl.load(direction + at, mask=inside, other=0.0)
    tl.store(curvatures + row, tl.sum(along * image))
    tl.store(squares + row, tl.sum(along * along))


@triton.jit
def _move(value, residual, direction, image, length, squares, columns, WHOLE: tl.constexpr):
    row, _, inside, at = _place(columns, WHOLE)
    far = tl.load(length + row)
    along = tl.load(direction + at, mask=inside, other=0.0)
    tl.store(value + at, tl.load(value + at, mask=inside, other=0.0) + far * along, mask=inside)
    rest = tl.load(residual + at, mask=inside, other=0.0) - far * tl.load(image + at, mask=inside, other=0.0)
    tl.store(residual + at, rest, mask=inside)
    tl.store(squares + row, tl.sum(rest * rest))


@triton.jit
def _turn(
    direction, residual, ratio, matrix, exponents, columns,
    PARTS: tl.constexpr, TOP: tl.constexpr, LIMIT: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    row, cols, inside, at = _place(columns, WHOLE)
    along = tl.load(direction + at, mask=inside, other=0.0) * tl.load(ratio + row)
    along = along + tl.load(residual + at, mask=inside, other=0.0)
    tl.store(direction + at, along, mask=inside)
    _fill(row, cols, inside, along, matrix, exponents, columns, PARTS, TOP, LIMIT)


@triton.jit(do_not_specialize=["blocks"])
def _compare(score, low, high, mask, within, above, columns, blocks, BOUNDED: tl.constexpr, WHOLE: tl.constexpr):
    """Which entries reach the bound `low`, or if BOUNDED exceed it and do not exceed `high`; counts by block."""
    # All blocks of all rows in one dimension: a GPU has no more than 65,535 programs in another.
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    cols = (program % blocks) * WHOLE + tl.arange(0, WHOLE)
    inside = cols < columns
    at = row * columns + cols
    entries = tl.load(score + at, mask=inside, other=0.0)
    bottom = tl.load(low + row)
    if BOUNDED:
        over = inside & (entries > tl.load(high + row))
        found = inside & (entries > bottom) & (over == 0)
        tl.store(above + program, tl.sum(over.to(tl.int32)))
    else:
        found = inside & (entries >= bottom)
    tl.store(mask + at, found, mask=inside)
    tl.store(within + program, tl.sum(found.to(tl.int32)))


# ---- The passes; arguments and results are theirs, or NotImplemented


def _of_rows(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Decline other formats than float32, and rows that are too wide for a program."""

    @functools.wraps(launch)
    def run(matrix: Tensor, *args: Any) -> Any:
        fits = matrix.dtype == torch.float32 and matrix.is_contiguous() and matrix.shape[1] <= WIDEST
        return launch(matrix, *args) if fits else NotImplemented

    return run


@_of_rows
def propose_accelerated(
    before: Tensor, after_first: Tensor, after_last: Tensor, took_first: Tensor, a: float, c: float, *into: Any
) -> Any:
    return _thresholded(before, after_first, after_last, took_first, a, c, *into)


@_of_rows
def propose_plain(before: Tensor, after_first: Tensor, after_last: Tensor, took_first: Tensor, *into: Any) -> Any:
    return _thresholded(before, after_first, after_last, took_first, 0.0, 0.0, *into, accelerated=False)


@_of_rows
def propose(stepped: Tensor, *into: Any) -> Any:
    return _thresholded(stepped, stepped, stepped, stepped, 0.0, 0.0, *into, accelerated=False, choose=False)


def _thresholded(
    before: Tensor,
    first: Tensor,
    last: Tensor,
    took: Tensor,
    a: float,
    c: float,
    tau: Tensor | None,
    pattern: Pattern,
    target: Tensor,
    value: Tensor,
    left: Left,
    *,
    accelerated: bool = True,
    choose: bool = True,
) -> Any:
    if tau is None:
        return NotImplemented
    counts = torch.empty(len(value), dtype=torch.float32, device=value.device)
    _threshold[len(value),](
        before, first, last, took, int(len(took) > 1), a, c, tau, int(len(tau) > 1), value, target, value,
        *_filled(left), counts, value.shape[1],
        ACCELERATED=accelerated, CHOOSE=choose, SUPPORT=False, **_rounding(left), **_by_row(value),
    )  # fmt: skip
    return counts


@_of_rows
def restrict(stepped: Tensor, keep: Tensor, target: Tensor, value: Tensor, left: Left) -> None:
    _threshold[len(value),](
        stepped, stepped, stepped, stepped, 0, 0.0, 0.0, stepped, 0, keep, target, value,
        *_filled(left), value, value.shape[1],
        ACCELERATED=False, CHOOSE=False, SUPPORT=True, **_rounding(left), **_by_row(value),
    )  # fmt: skip


@_of_rows
def descend(
    value: Tensor,
    target: Tensor,
    left: Left,
    base: int,
    product: Tensor,
    step_size: float,
    keep_zeros: bool,
    stepped: Tensor,
) -> Tensor:
    sums = torch.empty(len(value), dtype=torch.float32, device=value.device)
    scaled = left.exponents is not None
    _descend[len(value),](
        value, target, product, left.exponents if scaled else value, base, step_size, stepped, sums, value.shape[1],
        SCALED=scaled, KEEP_ZEROS=keep_zeros, **_by_row(value),
    )  # fmt: skip
    return sums


@_of_rows
def combine(
    current: Tensor, left: Left, base: int, target: Tensor, dual: Tensor, free: Tensor | None, score: Tensor
) -> None:
    scaled = left.exponents is not None
    _combine[len(current),](
        current, left.exponents if scaled else current, base, target, dual, current if free is None else free, score,
        current.shape[1], SCALED=scaled, SOME=free is not None, **_by_row(current),
    )  # fmt: skip


@_of_rows
def separate(proposal: Tensor, mask: Tensor, penalty: float, target: Tensor, dual: Tensor, left: Left) -> None:
    _separate[len(proposal),](
        proposal, mask, penalty, target, dual, *_filled(left), proposal.shape[1],
        **_rounding(left), **_by_row(proposal),
    )  # fmt: skip


@_of_rows
def curve(product: Tensor, left: Left, base: int, kept: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    scaled = left.exponents is not None
    curvatures, squares = product.new_empty(2, len(product), 1).unbind()
    _curve[len(product),](
        product, left.exponents if scaled else product, base, kept, direction, curvatures, squares, product.shape[1],
        SCALED=scaled, **_by_row(product),
    )  # fmt: skip
    return curvatures, squares


@_of_rows
def move(value: Tensor, residual: Tensor, direction: Tensor, image: Tensor, length: Tensor) -> Tensor:
    squares = value.new_empty(len(value), 1)
    _move[len(value),](
        value, residual, direction, image, length.contiguous(), squares, value.shape[1], **_by_row(value)
    )
    return squares


@_of_rows
def turn(direction: Tensor, residual: Tensor, ratio: Tensor, left: Left) -> None:
    _turn[len(direction),](
        direction, residual, ratio.contiguous(), *_filled(left), direction.shape[1],
        **_rounding(left), **_by_row(direction),
    )  # fmt: skip


def reaching(score: Tensor, threshold: Tensor) -> Any:
    found = _compared(score, threshold, threshold, bounded=False)
    return found if found is NotImplemented else found[:2]


def between(score: Tensor, low: Tensor, high: Tensor) -> Any:
    return _compared(score, low, high, bounded=True)


def _compared(score: Tensor, low: Tensor, high: Tensor, *, bounded: bool) -> Any:
    if score.dtype != torch.float32 or not score.is_contiguous():
        return NotImplemented
    rows, columns = score.shape
    blocks = triton.cdiv(columns, COMPARED)
    mask = torch.empty_like(score, dtype=torch.bool)
    counts = torch.empty(2, rows, blocks, dtype=torch.int32, device=score.device)
    _compare[rows * blocks,](
        score, low.contiguous(), high.contiguous(), mask, counts[0], counts[1], columns, blocks,
        BOUNDED=bounded, WHOLE=COMPARED, num_warps=8,
    )  # fmt: skip
    within, above = counts.sum(2, keepdim=True).unbind()
    return mask, within, above


def _filled(left: Left) -> tuple[Tensor, Tensor]:
    return left.matrix, left.matrix if left.exponents is None else left.exponents


def _rounding(left: Left) -> dict[str, int]:
    return {"PARTS": left.parts, "TOP": TOP, "LIMIT": LIMIT}


def _by_row(matrix: Tensor) -> dict[str, int]:
    whole = triton.next_power_of_2(matrix.shape[1])
    return {"WHOLE": whole, "num_warps": min(32, max(1, whole // 512))}
