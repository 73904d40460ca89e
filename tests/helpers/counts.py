"""Zeros that a pattern promises, counted without the package."""

import math
from decimal import Decimal


def floor_of(sparsity, size):
    """floor(sparsity · size) for the decimal that is written, in decimal arithmetic."""
    return math.floor(Decimal(repr(float(str(sparsity)))) * size)


def check_zeros(zeros, pattern, sparsity):
    """Whether a mask of zeros (out, in) has exactly those that were asked for, where the pattern wants them."""
    out, inputs = zeros.shape
    if pattern == "unstructured":
        assert int(zeros.sum()) == floor_of(sparsity, out * inputs)
    elif pattern == "row":
        assert zeros.sum(1).tolist() == [floor_of(sparsity, inputs)] * out
    else:
        keep, group = map(int, pattern.split(":"))
        assert (zeros.reshape(out, -1, group).sum(2) == group - keep).all()


def assert_total_is(sparsity, layers):
    """See that layers, as (zeros, size), have together as many zeros as a uniform sparsity gives them."""
    layers = list(layers)
    assert sum(zeros for zeros, _ in layers) == sum(floor_of(sparsity, size) for _, size in layers)
