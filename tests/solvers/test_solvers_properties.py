"""What the paper proves and what the problem's symmetries imply, on random problems."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.problems import FLOAT64, make_problem
from maiht_lightning.solvers import MAIHTConfig, parse_pattern, prune_layer
from maiht_lightning.solvers.maiht import HardThresholding, initial_penalty, prepare, step_size
from maiht_lightning.solvers.problem import largest_eigenvalue, scale_gram, scale_weight

ITERATIVE = ("maiht", "aiht", "iht")
PATTERNS = (("unstructured", 0.5), ("unstructured", 0.7), ("row", 0.6), ("2:4", 0.5), ("4:8", 0.5))

problem_shapes = {
    "seed": st.integers(0, 2**31),
    "out": st.integers(1, 12),
    "inputs": st.integers(1, 3).map(lambda n: 8 * n),
    "tokens": st.integers(1, 96),
}


class Fixed:
    """An iteration at constant λ, with the objective computed independently of it in float64."""

    def __init__(self, weight, gram, name, sparsity=0.5, *, dtype=torch.float64, mu=0.1, **candidates):
        scaled = scale_gram(gram, dtype)
        target, _ = scale_weight(weight, scaled.norms)
        self.pattern = parse_pattern(name, sparsity)
        self.step = step_size(scaled, MAIHTConfig(mu=mu))
        products = prepare(scaled, MAIHTConfig(mu=mu)).products
        self.iteration = HardThresholding(target, products, step_size=self.step, pattern=self.pattern, **candidates)
        self.target = target.double()
        self.a = scaled.correlation.double() + mu * torch.eye(len(gram), dtype=torch.float64)
        # As large as late in a real run, so that the first step prunes a good part.
        self.penalty = 60 * (
            initial_penalty(target, self.step, self.pattern)
            if not self.pattern.group
            else torch.zeros(1, 1, dtype=torch.float64)
        )

    def run(self, iterations):
        """S after each iteration, float64, from the dense start on."""
        points = [self.target]
        for _ in range(iterations):
            self.iteration.step(self.penalty)
            points.append(self.iteration.current().to(torch.float64, copy=True))  # the buffer is reused
        return points

    def gradient(self, s):
        return (s - self.target) @ self.a

    def objective(self, s):
        """F_λ(S): one number, or one a row."""
        loss = 0.5 * ((s - self.target) * self.gradient(s)).sum(1, keepdim=True)
        nonzeros = (s != 0).sum(1, keepdim=True)
        if self.pattern.name != "row":
            loss, nonzeros = loss.sum(), nonzeros.sum()
        return loss + self.penalty * nonzeros


@settings(max_examples=40, deadline=None)
@given(
    **problem_shapes,
    pattern=st.sampled_from(PATTERNS),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    accelerated=st.booleans(),
)
def test_objective_never_increases(seed, out, inputs, tokens, pattern, dtype, accelerated):
    weight, gram = make_problem(seed, out, inputs, tokens)
    fixed = Fixed(weight, gram, *pattern, dtype=dtype, accelerated=accelerated)
    points = fixed.run(25)
    # For N:M the dense start does not satisfy the pattern: it descends from the first point that does.
    values = [fixed.objective(s) for s in points[1 if fixed.pattern.group else 0 :]]
    scale = (fixed.target.square().sum() + fixed.objective(points[-1]).sum()).item()
    for before, after in itertools.pairwise(values):
        assert (after - before).max() <= (1e-6 if dtype == torch.float32 else 1e-14) * scale


@settings(max_examples=40, deadline=None)
@given(**problem_shapes, pattern=st.sampled_from(PATTERNS))
def test_plain_step_descends_sufficiently(seed, out, inputs, tokens, pattern):
    """F(V) ≤ F(S) − ½ (1/α − L) ‖V − S‖² for the plain candidate."""
    fixed = Fixed(*make_problem(seed, out, inputs, tokens), *pattern, accelerated=False)
    points = fixed.run(15)[1 if fixed.pattern.group else 0 :]
    curvature = torch.linalg.eigvalsh(fixed.a)[-1]
    for s, v in itertools.pairwise(points):
        distance = (v - s).square()
        distance = distance.sum(1, keepdim=True) if fixed.pattern.name == "row" else distance.sum()
        slack = fixed.objective(s) - fixed.objective(v) - 0.5 * (1 / fixed.step - curvature) * distance
        assert slack.min() >= -1e-13 * fixed.target.square().sum()


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), accelerated=st.booleans(), pattern=st.sampled_from(PATTERNS[:3]))
def test_limit_points_satisfy_the_optimality_conditions(seed, accelerated, pattern):
    fixed = Fixed(*make_problem(seed, 6, 12), *pattern, accelerated=accelerated)
    s = fixed.run(800)[-1]
    tau = (2 * fixed.penalty * fixed.step).sqrt().expand_as(s)
    steepest = (2 * fixed.penalty / fixed.step).sqrt().expand_as(s)
    support, gradient = s != 0, fixed.gradient(s)
    assert 0 < support.sum() < s.numel()
    assert (s.abs() >= tau * (1 - 1e-9))[support].all()
    assert gradient[support].abs().max() < 1e-7
    assert (gradient.abs() <= steepest * (1 + 1e-9))[~support].all()


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    **problem_shapes,
    pattern=st.sampled_from(PATTERNS),
    method=st.sampled_from(ITERATIVE),
    double=st.booleans(),
)
def test_refining_never_raises_the_loss(seed, out, inputs, tokens, pattern, method, double):
    weight, gram = make_problem(seed, out, inputs, tokens)
    name, sparsity = pattern
    config = FLOAT64 if double else "paper"
    result = prune_layer(weight, gram, pattern=name, sparsity=sparsity, method=method, config=config)
    losses = torch.tensor(result.objective[50:])
    assert len(losses) == 31
    assert (losses.diff() <= (1e-13 if double else 1e-5) * (losses[0] + 1e-12)).all()


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), pattern=st.sampled_from(PATTERNS), method=st.sampled_from(ITERATIVE))
def test_order_of_rows_and_features_does_not_matter(seed, pattern, method):
    weight, gram = make_problem(seed, 7, 24)
    name, sparsity = pattern
    group = parse_pattern(name, sparsity).group or 1
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(7, generator=generator)
    # N:M allows groups to be exchanged, not their members.
    order = torch.randperm(24 // group, generator=generator)
    columns = torch.arange(24).view(-1, group)[order].flatten()

    solve = {"pattern": name, "sparsity": sparsity, "method": method, "config": FLOAT64}
    expected = prune_layer(weight, gram, **solve)
    moved = prune_layer(weight[rows][:, columns], gram[columns][:, columns], **solve)
    assert torch.equal(moved.mask, expected.mask[rows][:, columns])
    torch.testing.assert_close(moved.weight, expected.weight[rows][:, columns], rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    pattern=st.sampled_from(PATTERNS),
    method=st.sampled_from(ITERATIVE),
    of_gram=st.floats(1e-6, 1e6),
    of_weight=st.floats(1e-6, 1e6),
)
def test_units_do_not_matter(seed, pattern, method, of_gram, of_weight):
    weight, gram = make_problem(seed, 6, 24)
    name, sparsity = pattern
    solve = {"pattern": name, "sparsity": sparsity, "method": method, "config": FLOAT64}
    expected = prune_layer(weight, gram, **solve)
    scaled = prune_layer(weight * of_weight, gram * of_gram, **solve)
    assert torch.equal(scaled.mask, expected.mask)
    torch.testing.assert_close(scaled.weight / of_weight, expected.weight, rtol=1e-6, atol=1e-6)
    factor = of_weight**2 * of_gram
    assert scaled.objective == pytest.approx([v * factor for v in expected.objective], rel=1e-6)
    # Powers of two change no rounding at all.
    exact = prune_layer(weight.float() * 2**-9, gram.float() * 4**7, pattern=name, sparsity=sparsity)
    again = prune_layer(weight.float(), gram.float(), pattern=name, sparsity=sparsity)
    assert torch.equal(exact.weight * 2**9, again.weight)


def spectra():
    """Symmetric positive semidefinite matrices that are hard in one way or another, by name."""
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(300, 300, generator=generator, dtype=torch.float64)).Q
    vector = torch.randn(300, generator=generator, dtype=torch.float64)

    def with_values(values):
        return rotation * values @ rotation.T

    return {
        "identity": torch.eye(300, dtype=torch.float64),
        "rank one": vector[:, None] * vector / 300,
        "rank one on an axis": torch.diag(torch.eye(300, dtype=torch.float64)[7]),
        "zero": torch.zeros(300, 300, dtype=torch.float64),
        "one by one": torch.tensor([[3.5]], dtype=torch.float64),
        "one by one, zero": torch.zeros(1, 1, dtype=torch.float64),
        "two clusters": with_values(torch.cat([torch.ones(150), torch.full((150,), 2.0)]).double()),
        "tight top": with_values(torch.linspace(0.999, 1, 300, dtype=torch.float64)),
        "wide": with_values(torch.logspace(-8, 3, 300, dtype=torch.float64)),
        "linear": with_values(torch.linspace(0, 7, 300, dtype=torch.float64)),
        "small": with_values(torch.linspace(0, 1e-12, 300, dtype=torch.float64)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", spectra())
def test_largest_eigenvalue(name, dtype):
    matrix = spectra()[name]
    exact = torch.linalg.eigvalsh(matrix)[-1].item()
    found = largest_eigenvalue(matrix.to(dtype))
    rounding = 2e-6 if dtype == torch.float32 else 1e-12
    # An upper estimate but for rounding, so that a step of 0.95 / found stays below 1 / exact.
    assert (1 - 1e-6) * exact <= found <= 1.02 * exact + rounding


@settings(max_examples=40, deadline=None)
@given(**problem_shapes, mu=st.sampled_from([0.0, 1e-3, 0.1, 10.0]), double=st.booleans())
def test_step_is_below_the_inverse_curvature(seed, out, inputs, tokens, mu, double):
    del out
    gram = make_problem(seed, 1, inputs, tokens)[1]
    scaled = scale_gram(gram, torch.float64 if double else torch.float32)
    a = scaled.correlation.double() + mu * torch.eye(inputs)
    product = step_size(scaled, MAIHTConfig(mu=mu)) * torch.linalg.eigvalsh(a)[-1].item()
    assert 0.9 < product < 1
    assert math.isfinite(product)
