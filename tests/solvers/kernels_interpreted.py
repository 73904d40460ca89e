"""Kernels beside the passes whose work they do, by Triton's interpreter: run by `test_kernels`, in its own process."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from helpers.problems import make_problem
from maiht_lightning import MAIHTConfig, prune_layer
from maiht_lightning.solvers import hard_thresholding, kernels, patterns
from maiht_lightning.solvers.fusing import run_by
from maiht_lightning.solvers.precision import Multiplier

ROWS, INPUTS = 4, 20
METHODS = {
    "maiht": {"propose_accelerated", "propose", "descend", "restrict"},
    "aiht": {"propose_accelerated", "descend", "restrict"},
    "iht": {"propose_plain", "descend", "restrict"},
    "preconditioned": {"combine", "separate", "curve", "move", "turn"},
}


@pytest.mark.parametrize(
    ("method", "pattern", "precision"),
    [
        ("maiht", "unstructured", "mixed"),
        ("maiht", "row", "float32"),
        ("maiht", "2:4", "fp16x3"),
        ("aiht", "unstructured", "fp16x3"),
        ("iht", "row", "mixed"),
        ("preconditioned", "unstructured", "mixed"),
        ("preconditioned", "row", "float32"),
        ("preconditioned", "2:4", "fp16x3"),
    ],
)
def test_layers(method, pattern, precision):
    """With zeros that stay in layers that compete as a whole; N of M are kept by what has no kernel."""
    config = MAIHTConfig(iterations=3, refine_iterations=11, precision=precision, keep_zeros=pattern == "unstructured")
    if method == "preconditioned":
        config = replace(config, candidates="preconditioned", iterations=7, refine_iterations=2)
    weight, gram = (tensor.float() for tensor in make_problem(3, ROWS, INPUTS, spread=1.5))
    weight[3, :5] = 0
    name = "maiht" if method == "preconditioned" else method
    expected = prune_layer(weight, gram, config=config, method=name, pattern=pattern)
    done = set()

    def by_kernel(function, scratch, *args):
        found = getattr(kernels, function.__name__)(*args)
        if found is NotImplemented:
            return function(*args, scratch=scratch)
        done.add(function.__name__)
        return found

    with run_by(by_kernel):
        found = prune_layer(weight, gram, config=config, method=name, pattern=pattern)
    proposed = set() if pattern != "2:4" else {name for name in METHODS[method] if name.startswith("propose")}
    assert done >= METHODS[method] - proposed
    assert not done & proposed
    assert torch.equal(found.mask, expected.mask)
    assert_close(found.weight, expected.weight, rtol=1e-4, atol=1e-6)
    assert found.relative_error == pytest.approx(expected.relative_error, rel=1e-5)
    assert found.objective == pytest.approx(expected.objective, rel=1e-5)


@pytest.mark.parametrize("form", ["plain", "fp16", "fp16x3"])
def test_halves_are_the_same_to_the_last_bit(form):
    """Of rows of any size, and of none; a row is no power of two long."""
    size = torch.tensor([1e-30, 1e-3, 3e30, 0.0])[:, None]
    values = torch.randn(ROWS, INPUTS, generator=torch.Generator().manual_seed(0)) * size
    multiply = Multiplier(torch.eye(INPUTS), form)
    expected, found = multiply.left(ROWS), multiply.left(ROWS)
    expected.fill(values)
    kernels.turn(torch.zeros(ROWS, INPUTS), values, torch.zeros(ROWS, 1), found)
    assert torch.equal(found.matrix, expected.matrix)
    if form != "plain":
        assert torch.equal(found.exponents[:-1], expected.exponents[:-1])
        assert (found.matrix[-1] == 0).all()


@pytest.mark.parametrize("form", ["plain", "fp16"])
def test_zeros_that_stay(form):
    generator = torch.Generator().manual_seed(0)
    value, target, product = (torch.randn(ROWS, INPUTS, generator=generator) for _ in range(3))
    target[:, ::3] = 0
    multiply = Multiplier(torch.eye(INPUTS), form)
    left = multiply.left(ROWS)
    left.fill(value - target)
    for keep_zeros in (False, True):
        expected, found = torch.empty(ROWS, INPUTS), torch.empty(ROWS, INPUTS)
        settings = value, target, left, multiply.exponent, product, 0.3, keep_zeros
        scratch = torch.empty(ROWS, INPUTS), torch.empty(ROWS, INPUTS)
        sums = hard_thresholding.descend.__wrapped__(*settings, expected, scratch=scratch)
        assert_close(kernels.descend(*settings, found), sums)
        assert_close(found, expected)
        assert bool((found[:, ::3] == 0).all()) == keep_zeros


def test_comparisons_of_long_rows():
    score = torch.rand(3, kernels.COMPARED + 100, generator=torch.Generator().manual_seed(0))
    low, high = torch.tensor([[0.2], [0.5], [0.9]]), torch.tensor([[0.3], [0.5], [0.95]])
    score[:, 7], score[:, 11] = low[:, 0], high[:, 0]
    for name, bounds in (("between", (low, high)), ("reaching", (low,))):
        expected = getattr(patterns, name).__wrapped__(score, *bounds)
        found = getattr(kernels, name)(score, *bounds)
        assert len(found) == len(expected)
        assert all(map(torch.equal, found, expected))
        assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in expected]


def test_what_kernels_decline():
    def turned(matrix):
        left = Multiplier(torch.eye(matrix.shape[1], dtype=matrix.dtype)).left_for(matrix)
        return kernels.turn(matrix, matrix, torch.ones(len(matrix), 1), left)

    assert turned(torch.ones(2, 4)) is None
    assert turned(torch.ones(2, 4).double()) is NotImplemented
    assert turned(torch.ones(4, 2).T) is NotImplemented
    wide = torch.empty(1, kernels.WIDEST + 1)
    assert kernels.move(wide, wide, wide, wide, wide) is NotImplemented
    assert kernels.reaching(torch.ones(2, 4).double(), torch.ones(2, 1).double()) is NotImplemented
    assert kernels.between(torch.ones(4, 2).T, torch.ones(2, 1), torch.ones(2, 1)) is NotImplemented
