"""Baselines: SparseGPT, ADMM-Grad, Wanda and magnitude against plainly written float64 references."""

from fractions import Fraction
from math import floor, inf

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.counts import check_zeros, floor_of
from maiht_lightning.solvers import LayerSolver, MAIHTConfig, PruningSpec, admm, parse_pattern, prune_layer, sparsegpt
from maiht_lightning.solvers.problem import scale_gram

PATTERNS = [("unstructured", 0.5), ("unstructured", 0.7), ("row", 0.3), ("2:4", 0.5), ("1:3", 2 / 3)]
DOUBLE = MAIHTConfig(precision="float64")


def layer(out=10, inputs=24, tokens=200, seed=0, dtype=torch.float64):
    """A weight and the Gram matrix of correlated inputs whose features differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=dtype)
    x = torch.randn(tokens, inputs, generator=generator, dtype=dtype) @ mix
    x = x * torch.logspace(-1, 1, inputs, dtype=dtype)
    return torch.randn(out, inputs, generator=generator, dtype=dtype), x.T @ x


def damped(gram):
    """SparseGPT's Hessian: 1 % of the mean diagonal on the diagonal."""
    return gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def brain_surgeon(row, keep, hessian):
    """One row, one column after the other: the later ones' best answer from an explicit inverse."""
    row = row.clone()
    for j in range(len(row)):
        if not keep[j]:
            inverse = torch.linalg.inv(hessian[j:, j:])
            row[j:] -= row[j] / inverse[0, 0] * inverse[0]
            row[j] = 0
    return row


def chosen(mask):
    """A chooser that gives back a mask known beforehand."""
    return lambda start, score: mask[:, start : start + score.shape[1]]


def test_sparsegpt_factor_is_that_of_the_damped_inverse():
    _, gram = layer()
    factor = sparsegpt.prepare(scale_gram(gram, torch.float64), DOUBLE)
    assert torch.equal(factor, factor.triu())
    assert (factor.diagonal() > 0).all()
    scale = 2.0 ** (2 * int(torch.frexp(gram.diagonal().max().sqrt()).exponent))
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(damped(gram)) * scale, rtol=1e-9, atol=0)


@pytest.mark.parametrize("block", [1, 4, 7, 24, 128])
def test_sparsegpt_on_a_given_mask_is_column_by_column_brain_surgeon(block):
    weight, gram = layer()
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > 0.5
    factor = sparsegpt.prepare(scale_gram(gram, torch.float64), DOUBLE)
    found, found_mask = sparsegpt.eliminate(weight, factor, chosen(mask), span=1, block=block)
    expected = torch.stack([brain_surgeon(row, keep, damped(gram)) for row, keep in zip(weight, mask, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    assert torch.equal(found_mask, mask)


@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS)
def test_sparsegpt_chooses_as_the_plain_loop_does(pattern, sparsity, monkeypatch):
    """Masks too: cheapest entries by w² / [H⁻¹]_jj, block by block or group by group."""
    monkeypatch.setattr(sparsegpt, "BLOCK_SIZE", 8)
    weight, gram = layer()
    out, inputs = weight.shape
    hessian, work = damped(gram), weight.clone()
    mask = torch.ones_like(weight, dtype=torch.bool)
    span = int(pattern.split(":")[1]) if ":" in pattern else 8
    spent = 0
    for start in range(0, inputs, span):
        cost = torch.stack(
            [work[:, j] ** 2 / torch.linalg.inv(hessian[j:, j:])[0, 0] for j in range(start, start + span)],
            dim=1,
        )
        end = start + span
        if pattern == "unstructured":
            count = floor_of(sparsity, out * inputs) * end // inputs - spent
            order = cost.flatten().argsort()[:count]
            mask[order // span, start + order % span] = False
        else:
            total = floor_of(sparsity, inputs) * end // inputs - spent
            count = total if pattern == "row" else span - int(pattern.split(":")[0])
            mask[:, start:end].scatter_(1, cost.argsort(1)[:, :count], False)
        spent += count
        for j in range(start, end):
            inverse = torch.linalg.inv(hessian[j:, j:])
            change = (work[:, j] / inverse[0, 0]).masked_fill(mask[:, j], 0)
            work[:, j:] -= change[:, None] * inverse[0]
    result = prune_layer(weight, gram, sparsity=sparsity, pattern=pattern, method="sparsegpt", config=DOUBLE)
    assert torch.equal(result.mask, mask)
    torch.testing.assert_close(result.weight, work * mask, rtol=1e-8, atol=1e-10)


def test_sparsegpt_shares_zeros_evenly_over_blocks():
    dead = torch.zeros(300, dtype=torch.bool)
    zeros = sparsegpt.block_zeros(parse_pattern("unstructured", 0.7), (7, 300), dead, 128)
    assert zeros == [627, 627, 216]  # 0.7 · 7 · 128 = 627.2
    assert sparsegpt.block_zeros(parse_pattern("row", 0.55), (7, 300), dead, 128) == [70, 70, 25]
    # 50 dead columns go first, the other 115 zeros of a row are spread over 78, 128 and 44 live ones.
    dead[:50] = True
    assert sparsegpt.block_zeros(parse_pattern("row", 0.55), (7, 300), dead, 128) == [85, 59, 21]
    # Not even all dead ones are asked for.
    assert sparsegpt.block_zeros(parse_pattern("row", 0.1), (7, 300), dead, 128) == [30, 0, 0]


@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS)
def test_admm_is_the_plain_loop(pattern, sparsity):
    weight, gram = layer()
    norms = gram.diagonal().sqrt()
    a = gram / torch.outer(norms, norms) + 0.1 * torch.eye(len(gram), dtype=gram.dtype)
    target = weight * norms
    s, u = target.clone(), torch.zeros_like(target)
    goal = Fraction(repr(sparsity)).limit_denominator(1000)  # 2/3 is not the decimal that a float shows
    for step in range(20):
        if step < 15:
            score, mask = (s + u).abs(), torch.ones_like(target)
            now = goal * (1 - (1 - Fraction(step + 1, 15)) ** 3)
            if pattern == "unstructured":
                mask.view(-1)[score.view(-1).argsort()[: floor(now * target.numel())]] = 0
            elif pattern == "row":
                mask.scatter_(1, score.argsort(1)[:, : floor(now * target.shape[1])], 0)
            else:
                keep, group = map(int, pattern.split(":"))
                allowed = torch.zeros_like(mask, dtype=torch.bool)
                allowed.view(-1, group).scatter_(1, score.view(-1, group).argsort(1)[:, : group - keep], True)
                score[~allowed] = torch.inf
                mask.view(-1)[score.view(-1).argsort()[: floor(now * target.numel())]] = 0
        z = (s + u) * mask
        u = u + s - z
        s = torch.linalg.solve(a + torch.eye(len(a), dtype=a.dtype), (target @ a + z - u).T).T
    expected = (s + u) * mask / norms
    result = prune_layer(weight, gram, sparsity=sparsity, pattern=pattern, method="admm", config=DOUBLE)
    torch.testing.assert_close(result.weight, expected, rtol=1e-8, atol=1e-10)
    assert torch.equal(result.mask, mask.bool())


def test_admm_converges_to_the_ridge_solution_on_its_support(monkeypatch):
    monkeypatch.setattr(admm, "STEPS", 3000)
    weight, gram = layer()
    result = prune_layer(weight, gram, method="admm", config=DOUBLE)
    norms = gram.diagonal().sqrt()
    a = gram / torch.outer(norms, norms) + 0.1 * torch.eye(len(gram), dtype=gram.dtype)
    gradient = ((result.weight - weight) * norms) @ a
    assert gradient[result.mask].abs().max() < 1e-8 * gradient.abs().max()


@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS)
@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_scores_keep_the_largest(method, pattern, sparsity):
    weight, gram = layer()
    score = weight.abs() * (gram.diagonal().sqrt() if method == "wanda" else 1)
    group = score.numel() if pattern == "unstructured" else 24 if pattern == "row" else int(pattern[-1])
    zeros = floor_of(sparsity, group) if ":" not in pattern else group - int(pattern[0])
    last_zero = score.view(-1, group).sort(dim=1).values[:, [zeros - 1]]
    expected = (weight.view(-1, group) * (score.view(-1, group) > last_zero)).view_as(weight)
    result = prune_layer(weight, gram, sparsity=sparsity, pattern=pattern, method=method, config=DOUBLE)
    assert torch.equal(result.weight, expected)


@pytest.mark.parametrize("method", ["sparsegpt", "admm"])
def test_weight_updates_beat_the_same_mask_without(method):
    weight, gram = layer(tokens=60)
    result = prune_layer(weight, gram, method=method, config=DOUBLE)
    change = weight * result.mask - weight
    unchanged = ((change @ gram) * change).sum() / ((weight @ gram) * weight).sum()
    assert result.relative_error < 0.8 * unchanged


@pytest.mark.parametrize("method", ["sparsegpt", "admm"])
def test_dead_features_go_first_and_kept_ones_stay(method):
    weight, gram = layer(dtype=torch.float32)
    gram[::4] = 0
    gram[:, ::4] = 0  # 6 of 24 features
    result = prune_layer(weight, gram, sparsity=0.5, method=method)
    assert not result.mask[:, ::4].any()
    for pattern, sparsity in (("unstructured", 0.2), ("row", 0.2)):
        result = prune_layer(weight, gram, sparsity=sparsity, pattern=pattern, method=method)
        assert result.mask[:, [i for i in range(24) if i % 4]].all()
        kept = result.mask[:, ::4]
        assert kept.any()
        assert torch.equal(result.weight[:, ::4], weight[:, ::4] * kept)
        assert weight[:, ::4][kept].abs().min() >= (
            weight[:, ::4][~kept].abs().max() if pattern == "unstructured" else 0
        )
        # Nothing that matters was pruned, so nothing needs an answer.
        torch.testing.assert_close(result.weight * result.mask, weight * result.mask, rtol=1e-4, atol=1e-4)
    assert prune_layer(weight, gram, pattern="2:4", method=method).mask[:, ::4].sum() == 0


@pytest.mark.parametrize("method", ["sparsegpt", "admm"])
def test_no_live_feature_at_all(method):
    weight, gram = layer(dtype=torch.float32)
    result = prune_layer(weight, torch.zeros_like(gram), method=method)
    cut = weight.abs().flatten().sort().values[119]
    assert torch.equal(result.mask, weight.abs() > cut)
    assert torch.equal(result.weight, weight * result.mask)


@pytest.mark.parametrize("method", ["sparsegpt", "admm"])
def test_a_gram_matrix_that_is_none_is_refused_with_advice(method):
    weight, gram = layer(dtype=torch.float32)
    with pytest.raises(FloatingPointError, match="gram is XᵀX"):
        prune_layer(weight, 2 * gram.diagonal().diag() - gram, method=method)


@pytest.mark.parametrize("method", ["sparsegpt", "admm"])
def test_the_factorisation_is_shared_and_inputs_stay(method):
    weight, gram = layer(dtype=torch.float32)
    other = layer(out=3, seed=5, dtype=torch.float32)[0]
    before = weight.clone(), other.clone(), gram.clone()
    shared = LayerSolver(gram, PruningSpec.parse(method=method))
    together = [shared.prune(weight), shared.prune(other)]
    for alone, result in zip((weight, other), together, strict=True):
        assert torch.equal(result.weight, prune_layer(alone, gram, method=method).weight)
    assert all(map(torch.equal, (weight, other, gram), before))


@pytest.mark.slow
@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.data())
def test_any_layer_gets_finite_weights_and_exact_counts(data):
    draw = data.draw
    method = draw(st.sampled_from(["sparsegpt", "admm", "wanda", "magnitude"]))
    pattern = draw(st.sampled_from(["unstructured", "row", "2:4", "1:2", "3:5", "4:8"]))
    group = int(pattern.split(":")[1]) if ":" in pattern else 1
    out, inputs = draw(st.integers(1, 48)), draw(st.integers(1, 48 // group)) * group
    sparsity = 0.5 if group > 1 else draw(st.floats(0, 0.99))
    rank, seed = draw(st.integers(0, inputs)), draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rank, inputs, generator=generator) * 10.0 ** draw(st.integers(-12, 12))
    weight = torch.randn(out, inputs, generator=generator) * 10.0 ** draw(st.integers(-12, 12))
    source = torch.randint(inputs, (2, inputs), generator=generator)
    if draw(st.booleans()):
        x = x[:, source[0]]  # duplicated features
    if draw(st.booleans()):
        x = x.masked_fill(source[1] < inputs / 3, 0)  # dead features
    if draw(st.booleans()):
        weight = weight[:, source[1]]
    gram = x.T @ x
    first, second = (prune_layer(weight, gram, sparsity=sparsity, pattern=pattern, method=method) for _ in range(2))
    assert first.weight.isfinite().all()
    check_zeros(~first.mask, pattern, sparsity)
    assert (first.weight[~first.mask] == 0).all()
    assert torch.equal(first.weight, second.weight)
    # No bound: of two features that cancel each other, a method without compensation may remove one.
    assert 0 <= first.relative_error < inf
