"""The solver against Algorithm 1 written plainly: float64, four products an iteration, full sorts."""

from math import sqrt

import pytest
import torch

from helpers.counts import floor_of
from helpers.problems import FLOAT64, make_problem
from maiht_lightning.solvers import LayerSolver, MAIHTConfig, PruningSpec, prune_layer


def naive(weight, gram, sparsity, method, *, groups=None, mu=0.1, scale=0.95, iterations=50, refine=30):
    """Algorithm 1 on one problem. `groups` is (N, M) or None. Returns weight, mask and losses."""
    d = gram.diagonal().sqrt()
    target = weight * d
    a = gram / d / d[:, None] + mu * torch.eye(len(d), dtype=gram.dtype)
    step = scale / torch.linalg.eigvalsh(a)[-1]

    def loss(s):
        return 0.5 * torch.trace((s - target) @ a @ (s - target).T)

    def gradient(s):
        return (s - target) @ a

    def objective(s):
        return loss(s) + penalty * (s != 0).sum()

    def keep_n_of_m(v):
        rank = v.abs().view(-1, groups[1]).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return v * (rank < groups[0]).view_as(v)

    def proximal(v):
        return keep_n_of_m(v) if groups else v * (v.abs() >= (2 * penalty * step).sqrt())

    ascending = target.abs().flatten().sort().values
    quantile = 0.05 if sparsity > 0.35 else 0.01 if sparsity < 0.15 else 0.03
    penalty = ascending[int(quantile * (len(ascending) - 1))] ** 2 / (2 * step)
    margin = 0.015 if sparsity > 0.35 else 0.01

    s = previous = z = target
    t, t_previous = 1.0, 0.0
    losses = []
    for _ in range(iterations):
        penalty = penalty * (1 + sparsity - margin - (s == 0).double().mean())
        y = s + (t_previous / t) * (z - s) + ((t_previous - 1) / t) * (s - previous)
        z = proximal(y - step * gradient(y))
        v = proximal(s - step * gradient(s))
        take_z = method == "aiht" or (method == "maiht" and objective(z) <= objective(v))
        previous, s = s, (z if take_z else v)
        t_previous, t = t, (1 + sqrt(1 + 4 * t * t)) / 2
        losses.append(loss(s).item())

    if groups:
        mask = keep_n_of_m(s) != 0
    else:
        # Where fewer are left than are to be kept, the next gradient step decides.
        stepped = (s - step * gradient(s)).abs().flatten().tolist()
        order = sorted(range(s.numel()), key=list(zip(s.abs().flatten().tolist(), stepped, strict=True)).__getitem__)
        mask = torch.ones_like(s, dtype=torch.bool).flatten()
        mask[order[: floor_of(sparsity, s.numel())]] = False
        mask = mask.view_as(s)
    s = s * mask
    losses.append(loss(s).item())
    for _ in range(refine):
        s = (s - step * gradient(s)) * mask
        losses.append(loss(s).item())
    return s / d, mask, losses


def assert_same(result, weight, mask, losses):
    assert torch.equal(result.mask, mask)
    torch.testing.assert_close(result.weight, weight, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(torch.tensor(result.objective), torch.tensor(losses), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("method", ["maiht", "aiht", "iht"])
@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5, 0.7])
@pytest.mark.parametrize(("out", "inputs"), [(24, 40), (40, 17)])
def test_unstructured(out, inputs, sparsity, method):
    weight, gram = make_problem(out, out, inputs)
    result = prune_layer(weight, gram, sparsity=sparsity, method=method, config=FLOAT64)
    assert_same(result, *naive(weight, gram, sparsity, method))


@pytest.mark.parametrize("method", ["maiht", "aiht", "iht"])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.7])
def test_each_row_is_a_problem_of_its_own(sparsity, method):
    weight, gram = make_problem(1, 6, 41)
    result = prune_layer(weight, gram, sparsity=sparsity, pattern="row", method=method, config=FLOAT64)
    rows = [naive(row[None], gram, sparsity, method) for row in weight]
    assert_same(
        result,
        torch.cat([row[0] for row in rows]),
        torch.cat([row[1] for row in rows]),
        [sum(losses) for losses in zip(*(row[2] for row in rows), strict=True)],
    )


@pytest.mark.parametrize("method", ["maiht", "aiht", "iht"])
@pytest.mark.parametrize("groups", [(2, 4), (1, 4), (4, 8)])
def test_n_of_m(groups, method):
    weight, gram = make_problem(2, 12, 40)
    result = prune_layer(weight, gram, pattern=f"{groups[0]}:{groups[1]}", method=method, config=FLOAT64)
    assert_same(result, *naive(weight, gram, 1 - groups[0] / groups[1], method, groups=groups))


def test_settings():
    weight, gram = make_problem(3, 16, 24)
    config = MAIHTConfig(mu=0.01, iterations=12, refine_iterations=5, step_scale=0.5, precision="float64")
    result = prune_layer(weight, gram, sparsity=0.6, config=config)
    assert_same(result, *naive(weight, gram, 0.6, "maiht", mu=0.01, scale=0.5, iterations=12, refine=5))


@pytest.mark.parametrize(("iterations", "refine"), [(0, 0), (0, 4), (3, 0)])
def test_few_iterations(iterations, refine):
    weight, gram = make_problem(4, 16, 24)
    config = MAIHTConfig(iterations=iterations, refine_iterations=refine, precision="float64")
    result = prune_layer(weight, gram, config=config)
    assert_same(result, *naive(weight, gram, 0.5, "maiht", iterations=iterations, refine=refine))
    assert len(result.accelerated) == iterations


def test_float32_is_near_float64():
    weight, gram = make_problem(5, 32, 48)
    single = prune_layer(weight.float(), gram.float(), sparsity=0.5, config="paper")
    double = prune_layer(weight, gram, sparsity=0.5, config=FLOAT64)
    assert single.relative_error == pytest.approx(double.relative_error, rel=1e-2)
    assert (single.mask == double.mask).float().mean() > 0.99


def test_relative_error_is_that_of_the_outputs():
    generator = torch.Generator().manual_seed(6)
    inputs = torch.randn(50, 20, generator=generator, dtype=torch.float64)
    weight = torch.randn(7, 20, generator=generator, dtype=torch.float64)
    result = prune_layer(weight, inputs.T @ inputs, config=FLOAT64)
    change, dense = inputs @ (result.weight - weight).T, inputs @ weight.T
    assert result.relative_error == pytest.approx((change.norm() / dense.norm()).item() ** 2, rel=1e-10)


def test_a_group_is_solved_as_its_layers_are():
    gram = make_problem(7, 1, 24)[1]
    weights = [make_problem(8 + i, out, 24)[0] for i, out in enumerate((12, 4, 4))]
    shared = LayerSolver(gram, PruningSpec.parse())
    for weight in weights:
        result, alone = shared.prune(weight), prune_layer(weight, gram)
        assert torch.equal(alone.weight, result.weight)
        assert alone.objective == result.objective


def test_monitor_reports_its_choices():
    weight, gram = make_problem(9, 24, 32)
    result = prune_layer(weight, gram, config="paper")
    assert len(result.accelerated) == 50
    assert set(result.accelerated) == {0.0, 1.0}  # both candidates win at times
    by_row = prune_layer(weight, gram, pattern="row", config="paper")
    assert any(0 < fraction < 1 for fraction in by_row.accelerated)
    assert prune_layer(weight, gram, method="aiht").accelerated == []
