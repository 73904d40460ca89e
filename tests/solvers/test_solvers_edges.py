"""Layers at the edges of what there is, arguments beyond them, and every method on strange problems."""

import doctest
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.counts import check_zeros
from helpers.problems import FLOAT64, make_problem
from maiht_lightning.solvers import (
    METHODS,
    LayerSolver,
    MAIHTConfig,
    PruningSpec,
    layer,
    parse_pattern,
    patterns,
    prune_layer,
)
from maiht_lightning.solvers.precision import float32_products

ITERATIVE = ("maiht", "aiht", "iht")
PATTERNS = ("unstructured", "row", "2:4")


def check(result, weight, pattern, sparsity):
    """What holds for every method and every problem."""
    assert result.weight.shape == result.mask.shape == weight.shape
    assert result.weight.dtype == weight.dtype
    assert result.mask.dtype == torch.bool
    assert result.weight.isfinite().all()
    check_zeros(~result.mask, pattern, sparsity)
    assert (result.weight[~result.mask] == 0).all()
    assert 0 <= result.relative_error < float("inf")


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", METHODS)
def test_dead_features_go_first(method, pattern):
    weight, gram = make_problem(0, 12, 16)
    dead = torch.tensor([0, 3, 8, 13])
    gram[dead] = gram[:, dead] = 0
    result = prune_layer(weight.float(), gram.float(), pattern=pattern, method=method)
    check(result, weight.float(), pattern, 0.5)
    if method != "magnitude":
        assert not result.mask[:, dead].any()


@pytest.mark.parametrize("pattern", ["unstructured", "row"])
@pytest.mark.parametrize("method", ITERATIVE)
def test_dead_features_that_stay_keep_their_weights(method, pattern):
    weight, gram = make_problem(1, 8, 16)
    gram[8:] = gram[:, 8:] = 0
    weight, gram = weight.float(), gram.float()
    result = prune_layer(weight, gram, pattern=pattern, sparsity=0.25, method=method)
    check(result, weight, pattern, 0.25)
    assert result.mask[:, :8].all()
    kept = result.mask[:, 8:]
    assert kept.any()
    assert torch.equal(result.weight[:, 8:][kept], weight[:, 8:][kept])
    # Of weights that cannot matter the largest stay.
    for values, stay in [(weight[:, 8:], kept)] if pattern == "unstructured" else zip(weight[:, 8:], kept, strict=True):
        assert values.abs()[stay].min() > values.abs()[~stay].max()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", METHODS)
def test_no_input_at_all(method, pattern):
    weight = make_problem(2, 6, 8)[0].float()
    result = prune_layer(weight, torch.zeros(8, 8), pattern=pattern, method=method)
    check(result, weight, pattern, 0.5)
    assert result.relative_error == 0
    by_size = parse_pattern(pattern, 0.5).mask(weight.abs())
    assert torch.equal(result.mask, by_size)


@pytest.mark.parametrize("pattern", ["unstructured", "row"])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_to_prune(method, pattern):
    weight, gram = make_problem(3, 6, 8)
    result = prune_layer(weight.float(), gram.float(), sparsity=0, pattern=pattern, method=method)
    assert result.mask.all()
    torch.testing.assert_close(result.weight, weight.float())
    assert result.relative_error < 1e-10


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", METHODS)
def test_zero_weight(method, pattern):
    gram = make_problem(4, 1, 8)[1].float()
    result = prune_layer(torch.zeros(4, 8), gram, pattern=pattern, method=method)
    check(result, torch.zeros(4, 8), pattern, 0.5)
    assert not result.weight.any()
    assert result.relative_error == 0


@pytest.mark.parametrize(("out", "inputs"), [(1, 1), (1, 16), (16, 1), (1, 4)])
@pytest.mark.parametrize("method", METHODS)
def test_thin_layers(method, out, inputs):
    weight, gram = make_problem(5, out, inputs)
    weight, gram = weight.float(), gram.float()
    for pattern in PATTERNS[: 3 if inputs % 4 == 0 else 2]:
        check(prune_layer(weight, gram, pattern=pattern, method=method), weight, pattern, 0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_the_weight_keeps_its_dtype(method, dtype):
    weight, gram = make_problem(6, 16, 24)
    weight = weight.to(dtype)
    result = prune_layer(weight, gram.float(), method=method)
    check(result, weight, "unstructured", 0.5)
    wide = prune_layer(weight.float(), gram.float(), method=method)
    assert torch.equal(result.mask, wide.mask)
    torch.testing.assert_close(result.weight.float(), wide.weight.to(dtype).float())


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", METHODS)
def test_views_are_solved_as_copies_are_and_left_alone(method, pattern):
    weight, gram = make_problem(7, 12, 16)
    stored = weight.float().T.contiguous()  # as Conv1D has it
    gram = gram.float()
    before = stored.clone(), gram.clone()
    view = prune_layer(stored.T, gram, pattern=pattern, method=method)
    copy = prune_layer(stored.T.contiguous(), gram.T, pattern=pattern, method=method)
    assert torch.equal(stored, before[0])
    assert torch.equal(gram, before[1])
    assert torch.equal(view.mask, copy.mask)
    torch.testing.assert_close(view.weight, copy.weight)
    check(view, stored.T, pattern, 0.5)


@pytest.mark.parametrize("method", METHODS)
def test_a_parameter_that_wants_gradients(method):
    weight, gram = make_problem(8, 6, 8)
    result = prune_layer(torch.nn.Parameter(weight.float()), gram.float(), method=method)
    assert not result.weight.requires_grad


@pytest.mark.parametrize("method", METHODS)
def test_autocast_changes_nothing(method):
    weight, gram = make_problem(9, 12, 16)
    weight, gram = weight.float(), gram.float()
    expected = prune_layer(weight, gram, method=method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = prune_layer(weight, gram, method=method)
    assert torch.equal(found.weight, expected.weight)
    assert found.objective == expected.objective


def matmul_settings():
    new = hasattr(torch.backends.cuda.matmul, "fp32_precision")
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    names = ("allow_fp16_reduced_precision_reduction", "allow_fp16_accumulation")
    halves = [getattr(backends[0], name, None) for name in names]
    return torch.get_float32_matmul_precision(), [b.fp32_precision for b in backends if new], halves


@pytest.mark.parametrize("outside", ["highest", "high", "medium"])
def test_the_callers_matmul_precision_is_restored_and_changes_nothing(outside):
    weight, gram = make_problem(12, 12, 16)
    weight, gram = weight.float(), gram.float()
    expected = prune_layer(weight, gram, config="paper")
    start = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(outside)
        before = matmul_settings()
        assert torch.equal(prune_layer(weight, gram, config="paper").weight, expected.weight)
        assert torch.equal(prune_layer(weight, gram, config=MAIHTConfig(precision="tf32")).weight, expected.weight)
        assert matmul_settings() == before
        with pytest.raises(FloatingPointError):
            overflow_in_half_precision()
        assert matmul_settings() == before
    finally:
        torch.set_float32_matmul_precision(start)


@pytest.mark.parametrize("tf32", [False, True])
def test_products_are_tf32_only_where_asked_for(tf32):
    cuda = torch.backends.cuda.matmul
    with float32_products(tf32=tf32):
        # The older flag raises an error in PyTorch 2.9 and later once the newer one has been used.
        allowed = cuda.fp32_precision == "tf32" if hasattr(cuda, "fp32_precision") else cuda.allow_tf32
        assert allowed is tf32


def test_the_callers_random_numbers_are_left_alone():
    weight, gram = make_problem(10, 6, 8)
    state = torch.get_rng_state()
    for method in METHODS:
        prune_layer(weight, gram, method=method)
    assert torch.equal(torch.get_rng_state(), state)


def overflow_in_half_precision():
    # Four copies of a feature share what one of them carried: the one that stays must be four times as large.
    weight = torch.full((1, 8), 60_000.0, dtype=torch.float16)
    gram = torch.ones(8, 8)
    return prune_layer(weight, gram, sparsity=0.75, config=MAIHTConfig(mu=0.0))


def test_overflow_in_half_precision_is_an_error():
    with pytest.raises(FloatingPointError, match=r"not finite in torch\.float16"):
        overflow_in_half_precision()


@pytest.mark.parametrize("pattern", ["unstructured", "row"])
def test_a_weight_that_was_pruned_before(pattern):
    """With more zeros than λ0's quantile, λ must not start, and stay, at 0: the support would be Wanda's."""
    weight, gram = make_problem(11, 24, 32)
    weight = weight * (torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) > 0.3)
    result = prune_layer(weight, gram, sparsity=0.6, pattern=pattern, config="paper")
    check(result, weight, pattern, 0.6)
    assert not torch.equal(result.mask, prune_layer(weight, gram, sparsity=0.6, pattern=pattern, method="wanda").mask)
    no_schedule = MAIHTConfig(iterations=0, refine_iterations=80)
    wanda_refined = prune_layer(weight, gram, sparsity=0.6, pattern=pattern, config=no_schedule)
    assert result.relative_error < wanda_refined.relative_error


SPECIAL_FEATURES = st.sampled_from(["none", "zero", "duplicated", "opposite", "tiny", "huge"])


@pytest.mark.slow
@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    out=st.integers(1, 64),
    inputs=st.integers(1, 64),
    rank=st.integers(0, 80),
    weight_scale=st.integers(-12, 12),
    gram_scale=st.integers(-12, 12),
    sparsity=st.sampled_from([0.0, 0.01, 0.2, 0.5, 0.7, 0.95, 0.999]),
    pattern=st.sampled_from(["unstructured", "row", "2:4", "4:8", "1:2"]),
    special=SPECIAL_FEATURES,
    method=st.sampled_from(sorted(METHODS)),
    repeat_rows=st.booleans(),
)
def test_every_method_on_strange_problems(
    seed, out, inputs, rank, weight_scale, gram_scale, sparsity, pattern, special, method, repeat_rows
):
    group = parse_pattern(pattern, 0.5).group or 1
    inputs = -(-inputs // group) * group
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(rank, inputs, generator=generator)
    some = torch.randperm(inputs, generator=generator)[: 1 + inputs // 3]
    if special in ("duplicated", "opposite"):
        features[:, some] = features[:, some[:1]] * (1 if special == "duplicated" else -1)
    elif special != "none":
        features[:, some] *= {"zero": 0, "tiny": 1e-8, "huge": 1e8}[special]
    weight = torch.randn(out, inputs, generator=generator) * 10.0**weight_scale
    if repeat_rows:
        weight[1:] = weight[:1].clone()
    gram = features.T @ features * 10.0**gram_scale
    if group > 1:
        sparsity = 0.5

    config = MAIHTConfig(iterations=20, refine_iterations=10)
    solve = {"sparsity": sparsity, "pattern": pattern, "method": method, "config": config}
    result = prune_layer(weight, gram, **solve)
    check(result, weight, pattern, sparsity)
    again = prune_layer(weight, gram, **solve)
    assert torch.equal(result.weight, again.weight)
    assert result.objective == again.objective
    if method in ITERATIVE:
        losses = torch.tensor(result.objective, dtype=torch.float64)
        assert losses.isfinite().all()
        refining = losses[20:]
        # Products cancel where features are correlated, and rounding of S leaves about eps² ‖B‖².
        floor = (weight.double() * gram.diagonal().double().sqrt()).square().sum() * 1e-12
        assert (refining.diff() <= 1e-5 * refining[0] + floor).all()


GOOD = {"weight": torch.eye(4, 8), "gram": torch.eye(8)}


def with_entry(tensor, value):
    changed = tensor.clone()
    changed[1, 1] = value
    return changed


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "obs"}, ValueError, "method must be one of maiht.*found 'obs'"),
        ({"method": None}, ValueError, "method"),
        *(({"sparsity": value}, ValueError, "sparsity") for value in (1.5, 1, -0.1, float("nan"), True, "0.5", None)),
        *(({"pattern": value}, ValueError, "pattern") for value in ("3:2", "0:4", "x", None)),
        ({"pattern": "3:5"}, ValueError, "divisible by 5"),
        ({"pattern": "2:4", "sparsity": 0.7}, ValueError, "sparsity"),
        ({"gram": torch.eye(4)}, ValueError, r"gram must have shape \(in, in\) = \(8, 8\)"),
        ({"gram": torch.ones(8)}, ValueError, "gram must have shape"),
        ({"weight": with_entry(GOOD["weight"], torch.nan)}, ValueError, "weight must be finite, but found 1 entries"),
        ({"gram": with_entry(GOOD["gram"], torch.inf)}, ValueError, "gram must be finite, but found 1 entries"),
        ({"weight": torch.ones(4, 8, dtype=torch.int64)}, TypeError, "weight must be a floating-point"),
        ({"gram": torch.eye(8, dtype=torch.int32)}, TypeError, "gram must be a floating-point"),
        ({"weight": [[1.0]]}, TypeError, "weight.*found list"),
        ({"weight": torch.ones(8)}, ValueError, r"weight must have shape \(out, in\)"),
        ({"weight": torch.ones(0, 8)}, ValueError, "weight must have shape"),
        ({"weight": torch.ones(2, 4, 8)}, ValueError, "weight must have shape"),
        ({"config": {"mu": 0.1}}, TypeError, "config.*found dict"),
        ({"config": "quick"}, ValueError, r"config must be a preset \(paper"),
        ({"weight": torch.eye(4, 8, device="meta")}, ValueError, "meta and gram on cpu"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        prune_layer(**{**GOOD, **arguments})


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("mu", value) for value in (-0.1, float("nan"), float("inf"))),
        *(("step_scale", value) for value in (0, 1, 1.5, -1, float("nan"))),
        *(("iterations", value) for value in (-1, 2.5)),
        *(("refine_iterations", value) for value in (-1, 2.5)),
        *(("precision", value) for value in ("float16", "bf16", None)),
    ],
)
def test_bad_settings(setting, value):
    with pytest.raises(ValueError, match=setting):
        replace(FLOAT64, **{setting: value})


PAPER = {
    "mu": 0.1,
    "iterations": 50,
    "refine_iterations": 30,
    "step_scale": 0.95,
    "precision": "auto",
    "tolerance": 0.0,
    "memory_budget": None,
    "keep_zeros": False,
    "candidates": "gradient",
    "sublayers": False,
    "dense_targets": 0.0,
    "reconstruction_epochs": 0,
}


def test_the_preset_paper_is_the_published_setting():
    weight, gram = make_problem(13, 12, 16)
    expected = prune_layer(weight, gram, sparsity=0.5, config=MAIHTConfig(**PAPER))
    for config in ("paper", MAIHTConfig()):
        found = prune_layer(weight, gram, config=config)
        assert torch.equal(found.weight, expected.weight)
        assert found.objective == expected.objective


def test_by_default_it_is_balanced_at_half_the_weights():
    weight, gram = make_problem(13, 12, 16)
    everything = {"sparsity": 0.5, "pattern": "unstructured", "method": "maiht"}
    expected = prune_layer(weight, gram, **everything, config="balanced")
    others = [prune_layer(weight, gram, config=config) for config in (None, "balanced")]
    for found in (*others, prune_layer(weight, gram), LayerSolver(gram, PruningSpec.parse()).prune(weight)):
        assert torch.equal(found.weight, expected.weight)
        assert found.objective == expected.objective
    assert expected.objective != prune_layer(weight, gram, config="paper").objective


@pytest.mark.parametrize("method", [method for method in METHODS if method != "maiht"])
def test_other_methods_are_by_default_as_they_were_published(method):
    assert PruningSpec.parse(method=method).config == MAIHTConfig(**PAPER)


def test_a_bad_layer_does_not_spoil_the_others_of_its_group():
    solver = LayerSolver(torch.eye(8), PruningSpec.parse())
    with pytest.raises(ValueError, match="gram must have shape"):
        solver.prune(torch.eye(4))
    assert torch.equal(solver.prune(torch.eye(8)).weight, prune_layer(torch.eye(8), torch.eye(8)).weight)


def test_examples_in_docstrings():
    for module, least in ((layer, 4), (patterns, 1)):
        failed, attempted = doctest.testmod(module)
        assert failed == 0
        assert attempted >= least
