"""Weights that make up for the error before them: against least squares over all tokens, float64."""

from dataclasses import replace

import pytest
import torch

from helpers.problems import make_problem
from maiht_lightning.solvers import LayerSolver, MAIHTConfig, PruningSpec, prune_layer
from maiht_lightning.solvers.correction import Correction
from maiht_lightning.solvers.problem import relative_error, scale_gram

CONFIG = MAIHTConfig(
    precision="float64",
    candidates="preconditioned",
    iterations=12,
    refine_iterations=60,
    sublayers=True,
    dense_targets=0.4,
)


@pytest.fixture
def streams():
    """A weight W0 (6, 16), inputs X (50, 16) in the pruned model and X_d in the dense one, float64."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(50, 16, generator=generator, dtype=torch.float64) @ torch.randn(
        16, 16, generator=generator, dtype=torch.float64
    )
    dense = inputs + 0.3 * torch.randn(50, 16, generator=generator, dtype=torch.float64)
    return torch.randn(6, 16, generator=generator, dtype=torch.float64), inputs, dense


def least_squares(weight, inputs, dense, *, c, mu, kept=None):
    """argmin ‖X Wᵀ − (X + c (X_d − X)) W0ᵀ‖² + μ ‖(W − W0) diag(d)‖², over the entries that are kept."""
    norms = inputs.norm(dim=0)
    left = torch.cat([inputs, mu**0.5 * norms.diag()])
    right = torch.cat([(inputs + c * (dense - inputs)) @ weight.T, mu**0.5 * norms.diag() @ weight.T])
    found = torch.zeros_like(weight)
    for i in range(len(weight)):
        columns = torch.ones(weight.shape[1], dtype=torch.bool) if kept is None else kept[i]
        found[i, columns] = torch.linalg.lstsq(left[:, columns], right[:, i : i + 1], driver="gelsd").solution[:, 0]
    return found


def drift_of(inputs, dense):
    return inputs.T @ (dense - inputs)


@pytest.mark.parametrize("c", [0.25, 1.0])
@pytest.mark.parametrize("mu", [0.01, 0.1, 2.0])
def test_the_weight_is_the_minimiser(streams, c, mu):
    weight, inputs, dense = streams
    config = replace(CONFIG, dense_targets=c, mu=mu)
    correction = Correction.prepare(scale_gram(inputs.T @ inputs, torch.float64), drift_of(inputs, dense), config)
    before = weight.clone()
    found = correction.apply(weight)
    torch.testing.assert_close(found, least_squares(weight, inputs, dense, c=c, mu=mu), rtol=1e-8, atol=1e-8)
    assert torch.equal(weight, before)
    assert (found - weight).norm() > 0.001 * weight.norm()


@pytest.mark.parametrize("precision", ["float32", "fp16x3", "mixed"])
def test_by_products_of_halves_it_is_as_exact(streams, precision):
    """Also where some features are a thousand times as large as others."""
    weight, inputs, dense = streams
    inputs, dense = (each * torch.logspace(0, 3, 16, dtype=torch.float64) for each in (inputs, dense))
    config = replace(CONFIG, precision=precision)
    gram, drift = (each.float() for each in (inputs.T @ inputs, drift_of(inputs, dense)))
    found = Correction.prepare(scale_gram(gram), drift, config).apply(weight.float())
    expected = least_squares(weight, inputs, dense, c=0.4, mu=0.1)
    norms = inputs.norm(dim=0)
    assert ((found - expected) * norms).norm() < 2e-5 * ((expected - weight) * norms).norm()


@pytest.mark.parametrize("pattern", ["unstructured", "row", "2:4"])
def test_what_is_kept_is_the_minimiser_on_its_support(streams, pattern):
    """So a solver's own objective with W1 in place of W0 is the one that is meant."""
    weight, inputs, dense = streams
    gram = inputs.T @ inputs
    spec = PruningSpec.parse(0.5, pattern, config=CONFIG)
    result = LayerSolver(gram, spec, drift_of(inputs, dense)).prune(weight)
    expected = least_squares(weight, inputs, dense, c=0.4, mu=0.1, kept=result.mask)
    torch.testing.assert_close(result.weight, expected, rtol=1e-6, atol=1e-7)
    # The error is against the dense weight that comes nearest to the targets.
    scaled = scale_gram(gram, torch.float64)
    nearest = least_squares(weight, inputs, dense, c=0.4, mu=0.1)
    assert result.relative_error == pytest.approx(relative_error(nearest, result.weight, scaled), rel=1e-6)
    without = prune_layer(weight, gram, pattern=pattern, config=CONFIG)
    assert not torch.allclose(without.weight, result.weight, rtol=1e-3)


@pytest.mark.parametrize("method", ["maiht", "sparsegpt", "admm", "wanda", "magnitude"])
def test_without_dense_targets_nothing_changes(streams, method):
    weight, inputs, dense = streams
    spec = PruningSpec.parse(0.5, method=method, config=replace(CONFIG, dense_targets=0.0))
    found = LayerSolver(inputs.T @ inputs, spec, drift_of(inputs, dense)).prune(weight)
    expected = LayerSolver(inputs.T @ inputs, spec).prune(weight)
    assert torch.equal(found.weight, expected.weight)
    assert found.objective == expected.objective
    assert found.relative_error == expected.relative_error


@pytest.mark.parametrize("method", ["maiht", "sparsegpt", "admm", "wanda", "magnitude"])
def test_every_method_prunes_the_corrected_weight(streams, method):
    weight, inputs, dense = streams
    gram, spec = inputs.T @ inputs, PruningSpec.parse(0.5, method=method, config=CONFIG)
    found = LayerSolver(gram, spec, drift_of(inputs, dense)).prune(weight)
    nearest = least_squares(weight, inputs, dense, c=0.4, mu=0.1)
    expected = prune_layer(nearest, gram, method=method, config=replace(CONFIG, dense_targets=0.0))
    assert torch.equal(found.mask, expected.mask)
    torch.testing.assert_close(found.weight, expected.weight, rtol=1e-6, atol=1e-7)


def test_dead_features_keep_their_weights(streams):
    weight, inputs, dense = streams
    inputs[:, [2, 9]] = 0
    scaled = scale_gram(inputs.T @ inputs, torch.float64)
    found = Correction.prepare(scaled, drift_of(inputs, dense), CONFIG).apply(weight)
    assert torch.equal(found[:, [2, 9]], weight[:, [2, 9]])
    # The others may use what the dense model has there.
    alive = [i for i in range(16) if i not in (2, 9)]
    expected = least_squares(weight, inputs, dense, c=0.4, mu=0.1)
    torch.testing.assert_close(found[:, alive], expected[:, alive], rtol=1e-8, atol=1e-8)


def test_zeros_that_are_kept_are_not_filled(streams):
    weight, inputs, dense = streams
    weight[weight.abs() < 0.5] = 0
    spec = PruningSpec.parse(0.5, config=replace(CONFIG, keep_zeros=True))
    found = LayerSolver(inputs.T @ inputs, spec, drift_of(inputs, dense)).prune(weight)
    assert (weight == 0).any()
    assert not found.weight[weight == 0].any()
    assert int((found.weight == 0).sum()) == weight.numel() // 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_is_computed_in_the_solvers_precision(streams, dtype):
    """A half-precision weight is corrected in float32 and rounded once, as it is pruned."""
    weight, inputs, dense = streams
    single = replace(CONFIG, precision="float32")
    solver = LayerSolver(inputs.T @ inputs, PruningSpec.parse(0.0, config=single), drift_of(inputs, dense))
    found = solver.prune(weight.to(dtype))
    assert found.weight.dtype == dtype
    expected = least_squares(weight.to(dtype).double(), inputs, dense, c=0.4, mu=0.1)
    torch.testing.assert_close(found.weight, expected.to(dtype), rtol=2 * torch.finfo(dtype).eps + 1e-4, atol=1e-4)


def test_a_singular_gram_matrix_needs_a_ridge():
    weight, gram = make_problem(0, 4, 16, tokens=3)
    config = replace(CONFIG, mu=0.0)
    with pytest.raises(FloatingPointError, match=r"could not factorise.*μ = 0\.0.*raise mu, or set dense_targets = 0"):
        LayerSolver(gram - 1e-9 * torch.eye(16), PruningSpec.parse(config=config), torch.zeros_like(gram)).prune(weight)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_dense_targets_out_of_range(value):
    with pytest.raises(ValueError, match="dense_targets must lie between 0 and 1"):
        replace(CONFIG, dense_targets=value)


def test_dense_targets_need_sublayers():
    with pytest.raises(ValueError, match=r"dense_targets = 0\.4 needs sublayers = True"):
        replace(CONFIG, sublayers=False)
