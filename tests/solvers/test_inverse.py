"""Inverses by products, beside those of NumPy's in float64."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from helpers.oracle import LAYERS, cases, load
from helpers.problems import make_problem
from maiht_lightning.estimate.solver import _SolverTraffic, count_inverse
from maiht_lightning.solvers import LayerSolver, MAIHTConfig, PruningSpec, inverse
from maiht_lightning.solvers.inverse import by_products, half_of, shifted_inverse
from maiht_lightning.solvers.problem import scale_gram

WORDS = {"who": "mAIHT", "tried": "μ = 0.1", "advice": "look at gram"}


def exact(matrix, shift):
    return torch.from_numpy(np.linalg.inv(matrix.double().numpy() + shift * np.eye(len(matrix))))


def distance(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


def cuts(size, leaf):
    """How often a matrix is cut until `leaf` rows are left."""
    return 0 if size <= leaf else 1 + cuts(half_of(size), leaf)


@settings(max_examples=40, deadline=None)
@example(seed=0, size=35, leaf=8, tokens=1, shift=0.05)  # numbers of one size, so that their errors are of one sign
@given(
    seed=st.integers(0, 2**16),
    size=st.integers(1, 96),
    leaf=st.integers(8, 32),
    tokens=st.integers(1, 200),
    shift=st.sampled_from([0.05, 0.1, 1.0]),
)
def test_an_inverse_by_products_is_as_exact_as_they_are(seed, size, leaf, tokens, shift):
    gram = scale_gram(make_problem(seed, 1, size, tokens=tokens)[1].float()).correlation
    shifted = gram + shift * torch.eye(size)
    before, expected = shifted.clone(), exact(shifted, 0)
    found = by_products(shifted, leaf)
    assert torch.equal(shifted, before)
    # Each of a cut's four products leaves out up to 2⁻²¹ of itself, half for what two halves cannot hold, half for
    # their low parts' product. That adds up where cuts are nested, and is multiplied by what any inverse makes of it.
    bound = 2**-19 * max(1, cuts(size, leaf)) * np.linalg.cond(shifted.double().numpy())
    assert distance(found, expected) <= bound


@pytest.mark.parametrize(("name", "shift"), cases(*itertools.product(LAYERS, (0.05, 0.1))))
def test_of_real_layers(name, shift):
    gram = scale_gram(load(name)["gram"].float()).correlation
    found = by_products(gram + shift * torch.eye(len(gram)), 128)
    assert distance(found, exact(gram, shift)) < 2e-5


def test_it_is_by_products_where_the_solvers_are_of_halves(monkeypatch):
    seen = []

    def watch(matrix):
        seen.append(len(matrix))
        return by_products(matrix)

    monkeypatch.setattr(inverse, "by_products", watch)
    weight, gram = (each.float() for each in make_problem(0, 4, 24))
    config = MAIHTConfig(candidates="preconditioned", iterations=12, sublayers=True, dense_targets=0.5)
    for precision, number in (("float32", 0), ("tf32", 0), ("float64", 0), ("fp16x3", 3), ("mixed", 3)):
        spec = PruningSpec.parse(config=replace(config, precision=precision))
        LayerSolver(gram, spec, torch.zeros_like(gram)).prune(weight)
        assert seen == [24] * number, precision  # two penalties and the dense targets
        seen.clear()


def test_the_matrix_stays_as_it_is():
    gram = make_problem(0, 1, 40)[1].float()
    before = gram.clone()
    for form in ("plain", "fp16x3"):
        found = shifted_inverse(gram, 0.1, form, **WORDS)
        assert torch.equal(gram, before)
        assert distance(found, exact(gram, 0.1)) < 1e-3


def test_what_is_nearly_singular_is_factorised(monkeypatch):
    """Where rounding leaves a part that is not positive, and a factorisation of the whole does not mind."""

    def fail(matrix):
        raise torch.linalg.LinAlgError("not positive definite")

    monkeypatch.setattr(inverse, "by_products", fail)
    gram = make_problem(0, 1, 40)[1].float()
    expected = shifted_inverse(gram, 0.1, "plain", **WORDS)
    assert torch.equal(shifted_inverse(gram, 0.1, "fp16x3", **WORDS), expected)


@pytest.mark.parametrize("form", ["plain", "fp16x3"])
def test_what_is_not_positive_definite_is_named(form):
    gram = torch.diag(torch.tensor([1.0] * 10 + [-1.0] + [1.0] * 9))
    with pytest.raises(FloatingPointError, match=r"mAIHT could not.*minor 11 of 20.*with μ = 0\.1.*: look at gram"):
        shifted_inverse(gram, 0.1, form, **WORDS)
    with pytest.raises(torch.linalg.LinAlgError):
        by_products(gram, 8)


def test_what_it_takes_is_what_is_counted(monkeypatch):
    monkeypatch.setattr("maiht_lightning.estimate.solver.LEAF", 64)
    count_inverse.cache_clear()
    gram = scale_gram(make_problem(0, 1, 384)[1].float()).correlation + torch.eye(384)
    with FlopCounterMode(display=False) as flops, _SolverTraffic() as traffic:
        by_products(gram, 64)
    found = count_inverse(384, "fp16x3")
    count_inverse.cache_clear()
    # 384, 192, 96 and 48 rows.
    assert [half_of(size) for size in (384, 192, 96)] == [192, 96, 48]
    assert found.plain == 8 * 2 * 48**3
    assert found.halves == flops.get_total_flops()
    assert found.moved == pytest.approx(traffic.moved, rel=0.1)
    assert count_inverse(384, "plain").plain == 2 * 384**3
