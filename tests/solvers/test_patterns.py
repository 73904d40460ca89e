"""Patterns: exact counts, whatever ties there are; thresholding and N:M projection against plain loops."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers.counts import check_zeros, floor_of
from maiht_lightning.solvers import parse_pattern, patterns, prune_layer
from maiht_lightning.solvers.patterns import (
    _kth_largest_by_sample,
    count,
    hard_threshold_,
    keep_largest,
    keep_of_groups_,
    kth_largest,
    zeros_of,
)

GROUPS = ((1, 2), (2, 4), (1, 4), (4, 8), (3, 8), (3, 3), (20, 64))


def scores(seed, rows, columns, levels):
    """Random (rows, columns); few levels make many ties, 0 levels none."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator)
    return values if levels == 0 else torch.round(values * levels)


SCORES = st.builds(
    scores,
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 24),
    columns=st.integers(1, 150),
    levels=st.integers(0, 3),
)


@settings(max_examples=60, deadline=None)
@given(score=SCORES, sparsity=st.floats(0, 0.999))
def test_counts_are_exact(score, sparsity):
    for pattern in ("unstructured", "row"):
        structure = parse_pattern(pattern, sparsity)
        check_zeros(~structure.mask(score), pattern, sparsity)
        unit = score.numel() if pattern == "unstructured" else score.shape[1]
        assert structure.kept(score.shape) == unit - floor_of(sparsity, unit)


@settings(max_examples=300, deadline=None)
@given(digits=st.integers(1, 4), k=st.integers(0, 9999), hundreds=st.integers(0, 10**6), more=st.integers(0, 9))
@example(digits=2, k=29, hundreds=1, more=0)
def test_a_sparsity_is_the_decimal_that_was_written(digits, k, hundreds, more):
    """Of sizes that it divides, where a product of floats is now and then just below a whole number, and of others."""
    parts = 10**digits
    k, size = k % parts, 100 * hundreds + more
    # As somebody writes it, and as a loop computes it.
    for sparsity in (float(f"{k / parts:.{digits}f}"), k / parts, np.float64(k / parts), np.float32(k / parts)):
        assert zeros_of(parse_pattern("unstructured", sparsity).sparsity, size) == k * size // parts


@pytest.mark.parametrize("sparsity", [0.29, np.float64(0.29), np.float32(0.29)])
def test_twenty_nine_of_a_hundred(sparsity):
    """A product of floats has 28 of them."""
    weight, gram = torch.arange(1.0, 101).view(4, 25), torch.eye(25)
    for method in ("maiht", "sparsegpt", "admm", "wanda", "magnitude"):
        assert (~prune_layer(weight, gram, sparsity=sparsity, method=method).mask).sum() == 29
    by_row = prune_layer(weight.view(1, 100), torch.eye(100), sparsity=sparsity, pattern="row").mask
    assert (~by_row).sum() == 29


@settings(max_examples=60, deadline=None)
@given(score=SCORES, sparsity=st.floats(0, 0.999))
def test_what_is_kept_is_at_least_what_goes(score, sparsity):
    mask = parse_pattern("unstructured", sparsity).mask(score)
    if not mask.all():
        assert score[mask].min() >= score[~mask].max()
    mask = parse_pattern("row", sparsity).mask(score)
    for values, kept in zip(score, mask, strict=True):
        if not kept.all():
            assert values[kept].min() >= values[~kept].max()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 9),
    groups=st.integers(1, 9),
    shape=st.sampled_from(GROUPS),
)
def test_n_of_m_are_kept(seed, rows, groups, shape):
    keep, group = shape
    score = scores(seed, rows, groups * group, 1)
    check_zeros(~parse_pattern(f"{keep}:{group}", 0.5).mask(score), f"{keep}:{group}", None)


def test_tiebreaks_decide_in_turn():
    score = torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0, 2.0]])
    first = torch.tensor([[0.0, 3.0, 5.0, 3.0, 3.0, 0.0]])
    second = torch.tensor([[0.0, 1.0, 0.0, 7.0, 1.0, 0.0]])
    mask = keep_largest(score, 5, first, second)
    assert mask.tolist() == [[True, True, True, True, False, True]]
    assert keep_largest(score, 4, first, second).tolist() == [[True, False, True, True, False, True]]
    # A tiebreak cannot overrule the score.
    assert keep_largest(score, 2, first, second).tolist() == [[True, False, False, False, False, True]]


@pytest.mark.parametrize("sorted_below", [0, patterns.SORTED_BELOW], ids=["bisected", "sorted"])
@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 4),
    columns=st.integers(1, 200),
    keep=st.floats(0, 1),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_keep_largest_is_a_stable_sort_by_all_keys(sorted_below, seed, rows, columns, keep, dtype):
    keys = [scores(seed + i, rows, columns, levels).to(dtype) for i, levels in enumerate((1, 2, 0))]
    keep = int(keep * columns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patterns, "SORTED_BELOW", sorted_below)
        mask = keep_largest(keys[0], keep, *keys[1:])
    for row in range(rows):
        order = sorted(range(columns), key=lambda j: tuple(-key[row, j].item() for key in keys))
        assert set(mask[row].nonzero().flatten().tolist()) == set(order[:keep])


@pytest.mark.parametrize("sorted_below", [0, patterns.SORTED_BELOW], ids=["bisected", "sorted"])
@settings(max_examples=60, deadline=None)
@given(score=SCORES, data=st.data(), dtype=st.sampled_from([torch.float16, torch.float32, torch.float64]))
def test_kth_largest(sorted_below, score, data, dtype):
    score = (score * 10.0 ** data.draw(st.integers(-4, 4))).clamp(-6e4, 6e4).to(dtype)
    rows, columns = score.shape
    k = torch.tensor(data.draw(st.lists(st.integers(1, columns), min_size=rows, max_size=rows)))[:, None]
    expected = torch.tensor([[sorted(row)[-int(place)]] for row, place in zip(score.tolist(), k, strict=True)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patterns, "SORTED_BELOW", sorted_below)
        assert torch.equal(kth_largest(score, k), expected.to(dtype))
        # Of none there is none, and what is −inf does not count.
        assert kth_largest(score, torch.zeros_like(k)).isnan().all()
        more = torch.cat([score, torch.full_like(score, -torch.inf)], dim=1)
        assert torch.equal(kth_largest(more, k), expected.to(dtype))


def test_few_entries_on_a_cpu_are_sorted(monkeypatch):
    """Bit by bit a small layer's selection takes tens of times as long."""
    passes = []
    monkeypatch.setattr(patterns, "count", lambda mask: passes.append(mask.shape) or mask.sum(1, keepdim=True))
    kth_largest(torch.rand(4, 1000), torch.full((4, 1), 500))
    assert not passes
    kth_largest(torch.rand(4, 1024), torch.full((4, 1), 500))
    assert len(passes) == 32


def long_rows():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(20_000, generator=generator)
    return {
        "normal": normal,
        "sizes": normal.abs(),
        "half of them zeros": normal.clamp_min(0),
        "few values": (3 * normal).round(),
        "one value": torch.zeros(20_000),
        "sorted, so that the sample is even": normal.sort().values,
        "the sample misses it": torch.where(torch.arange(20_000) % 27 == 0, 10 + normal, normal),
        "some do not count": torch.where(normal > 1, -torch.inf, normal),
        "uneven": (8 * normal).exp(),
    }


@pytest.mark.parametrize("kind", long_rows())
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_kth_largest_of_a_long_row_is_found_from_a_sample(kind, dtype):
    """Whether the sample was a good one or not."""
    row = long_rows()[kind].to(dtype)
    expected = row.sort(descending=True).values
    for k in (1, 2, 90, 7_000, 10_000, 13_333, 19_998, 20_000):
        assert torch.equal(kth_largest(row[None], torch.tensor([[k]])), expected[k - 1].view(1, 1))


def test_a_sample_saves_the_bisection(monkeypatch):
    """For most rows; where it has misled, bisection finds the entry all the same."""
    rows = long_rows()
    good = ("normal", "few values", "one value", "half of them zeros")
    assert all(_kth_largest_by_sample(rows[kind], 10_000) is not None for kind in good)
    # The smallest of the entries that are not zero, and one of the zeros.
    assert all(_kth_largest_by_sample(rows["half of them zeros"], k) is not None for k in (9_950, 15_000))
    assert _kth_largest_by_sample(rows["the sample misses it"], 10_000) is None
    passes = []
    monkeypatch.setattr(patterns, "count", lambda mask: passes.append(mask.shape) or mask.sum(1, keepdim=True))
    kth_largest(rows["normal"][None], torch.tensor([[10_000]]))
    assert len(passes) == 2


def test_few_ties_are_settled_without_a_bisection(monkeypatch):
    """In a large layer some entries are always equal; which of them stay is what the keys say, then the position."""
    generator = torch.Generator().manual_seed(0)
    score = torch.randperm(20_000, generator=generator).float()
    order = score.argsort(descending=True)
    tied = order[9_990:10_020]
    score[tied] = score[tied[0]].item()
    first, second = torch.zeros(20_000), torch.zeros(20_000)
    first[tied[::3]], second[tied[::2]] = 1.0, 2.0
    expected = keep_largest(score[None], 10_000, first[None], second[None])[0]
    assert int(expected.sum()) == 10_000
    by_hand = sorted(tied.tolist(), key=lambda place: (-first[place], -second[place], place))
    assert sorted(by_hand[:10]) == sorted(set(expected.nonzero()[:, 0].tolist()) & set(tied.tolist()))
    monkeypatch.setattr(patterns, "count", lambda mask: mask.sum(1, keepdim=True))
    monkeypatch.setattr(patterns, "kth_largest", lambda score, k, find=kth_largest: asked.append(k) or find(score, k))
    asked = []
    assert torch.equal(keep_largest(score[None], 10_000, first[None], second[None])[0], expected)
    assert len(asked) == 1


def test_counts_beyond_float32_are_exact():
    mask = torch.ones(1, (1 << 24) + 3, dtype=torch.bool)
    assert count(mask).item() == (1 << 24) + 3


def test_masks_of_views_and_zero_counts():
    score = torch.arange(24.0).view(6, 4).T  # not contiguous
    assert parse_pattern("unstructured", 0.5).mask(score).tolist() == (score >= 12).tolist()
    assert parse_pattern("row", 0).mask(score).all()
    assert not keep_largest(score, 0).any()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from(GROUPS),
    groups=st.integers(1, 6),
    levels=st.integers(0, 2),
)
def test_keep_of_groups_is_a_stable_sort(seed, shape, groups, levels):
    keep, group = shape
    value = scores(seed, 5, groups * group, levels)
    out = torch.full_like(value, torch.nan)
    keep_of_groups_(out, value, keep, group, torch.empty_like(value))
    order = value.abs().view(-1, group).argsort(dim=1, descending=True, stable=True)
    kept = torch.zeros(order.shape, dtype=torch.bool).scatter_(1, order[:, :keep], True).view_as(value)
    assert torch.equal(out, torch.where(kept, value, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("by_row", [False, True])
def test_hard_threshold_keeps_the_threshold_itself(dtype, by_row):
    value = torch.tensor([[0.5, -0.5, 0.25, -0.75, 0.0], [1.0, -0.5, 0.3, 0.2, -0.3]], dtype=dtype)
    tau = torch.tensor([[0.5], [0.3]] if by_row else [[0.5]], dtype=dtype)
    out = torch.full_like(value, torch.nan)
    hard_threshold_(out, value, tau, torch.empty_like(value))
    assert torch.equal(out, torch.where(value.abs() >= tau, value, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tau", [0.0, 1e-45, 1e-38, 1e30])
def test_hard_threshold_at_the_ends_of_the_range(dtype, tau):
    threshold = torch.tensor([[tau]], dtype=dtype)
    value = torch.tensor([[0.0, 1e-45, -1e-44, 2e-38, -1.0, 2e30]], dtype=dtype)
    out = torch.full_like(value, torch.nan)
    hard_threshold_(out, value, threshold, torch.empty_like(value))
    assert torch.equal(out, torch.where(value.abs() >= threshold, value, 0))


@pytest.mark.parametrize(
    "sparsity", [1.5, 1, 1.0, -0.1, float("nan"), float("inf"), True, "0.5", None, torch.tensor(0.5)]
)
def test_bad_sparsity(sparsity):
    with pytest.raises(ValueError, match="sparsity"):
        parse_pattern("unstructured", sparsity)


@pytest.mark.parametrize(
    "pattern", ["3:2", "0:4", "x", "64:128", "2:", ":4", "2:4:8", "-2:4", "2.0:4", "", " row", None, 24]
)
def test_bad_pattern(pattern):
    with pytest.raises(ValueError, match="pattern"):
        parse_pattern(pattern, 0.5)


def test_pattern_and_sparsity_must_agree():
    assert parse_pattern("1:4", 0.75) == parse_pattern("1:4", 0.5)
    with pytest.raises(ValueError, match=r"'2:4' means a sparsity of 0\.5, but sparsity is 0\.7"):
        parse_pattern("2:4", 0.7)


def test_inputs_must_divide_into_groups():
    with pytest.raises(ValueError, match=r"divisible by 4, but q_proj has shape \(8, 6\)"):
        parse_pattern("2:4", 0.5).check_shape((8, 6), "q_proj")
