"""The solver against the answers of the mAIHT authors' published implementation on two real layers."""

from dataclasses import replace
from itertools import product
from math import floor, log10

import pytest

from helpers.oracle import FOLDER, LAYERS, MISSING, load
from maiht_lightning.solvers import parse_pattern, prune_layer, resolve_config
from maiht_lightning.solvers.maiht import step_size
from maiht_lightning.solvers.problem import relative_error, scale_gram

CASES = {
    "maiht_50": {"sparsity": 0.5},
    "maiht_70": {"sparsity": 0.7},
    "maiht_2_4": {"pattern": "2:4"},
}
# The iteration ends with fewer nonzeros than are to be kept, see the test of this case.
OVERSHOT = ("layers.12.self_attn.v_proj", "maiht_70")


if not FOLDER.is_dir():
    pytest.skip(MISSING, allow_module_level=True)


def test_step_size():
    for layer in LAYERS:
        tensors = load(layer)
        # The authors' λmax is that of a float32 eigensolver, ours an upper estimate.
        step = step_size(scale_gram(tensors["gram"]), resolve_config("paper"))
        assert step == pytest.approx(tensors["step_size"].item(), rel=2e-5)


@pytest.mark.parametrize(("layer", "case"), [pair for pair in product(LAYERS, CASES) if pair != OVERSHOT])
def test_weight_is_the_authors(layer, case):
    tensors = load(layer)
    expected = tensors[case]
    result = prune_layer(tensors["weight"], tensors["gram"], config="paper", **CASES[case])

    error = relative_error(tensors["weight"], expected, scale_gram(tensors["gram"]))
    half_a_unit = 0.5 * 10 ** (floor(log10(error)) - 3)
    assert result.relative_error == pytest.approx(error, rel=0, abs=half_a_unit)  # four significant digits
    assert (result.mask == (expected != 0)).float().mean() >= 0.999
    both = result.mask & (expected != 0)
    assert (result.weight - expected)[both].norm() <= 5e-3 * expected[both].norm()


def test_overshot_support():
    """λ goes too far at 70 % of this layer: 32,880 weights are left of the 33,178 to keep.

    The authors' top-k then fills up with zeros that happen to come first, and refines them; ours takes those
    that the next gradient step would raise highest. So the two differ in twice the 298 weights that are
    missing, and ours has the lower error.
    """
    layer, case = OVERSHOT
    tensors = load(layer)
    weight, gram, expected = tensors["weight"], tensors["gram"], tensors[case]
    pattern = parse_pattern("unstructured", 0.7)
    scaled = scale_gram(gram)

    before = nonzero_before_top_k(weight, scaled, pattern)
    assert 32_800 < before.sum() < pattern.kept(weight.shape)
    assert (expected != 0)[before].float().mean() >= 0.999

    result = prune_layer(weight, gram, sparsity=0.7, config="paper")
    assert result.mask[before].all()
    assert result.mask.sum() == pattern.kept(weight.shape)
    assert (result.mask == (expected != 0)).float().mean() >= 0.994
    assert result.relative_error < 0.99 * relative_error(weight, expected, scaled)


def nonzero_before_top_k(weight, scaled, pattern):
    """Where the weight is not 0 after the thresholding iterations, with nothing to refine or fill up."""
    from maiht_lightning.solvers import maiht

    seen = []

    class Spy(maiht.HardThresholding):
        def current(self):
            seen.append(super().current() != 0)
            return super().current()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maiht, "HardThresholding", Spy)
        config = resolve_config("paper")
        maiht.solve(weight, scaled, maiht.prepare(scaled, config), pattern, config)
    return seen[0]


@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.5), ("unstructured", 0.7), ("2:4", 0.5)])
@pytest.mark.parametrize("layer", LAYERS)
def test_methods_rank_on_real_layers(layer, pattern, sparsity):
    """By layer error in the order in which publications have them by perplexity.

    How far apart they are no publication says. The factors guard what was measured on these two layers, at most 0.849
    for ADMM, 0.838 for mAIHT (0.943 with 2:4), 0.804 for SparseGPT and 0.515 for Wanda.
    """
    tensors = load(layer)
    error = {
        method: prune_layer(
            tensors["weight"], tensors["gram"], sparsity=sparsity, pattern=pattern, method=method
        ).relative_error
        for method in ("admm", "maiht", "sparsegpt", "wanda", "magnitude")
    }
    assert error["admm"] < 0.86 * error["sparsegpt"], error
    assert error["maiht"] < (0.97 if pattern == "2:4" else 0.86) * error["sparsegpt"], error
    assert error["sparsegpt"] < 0.85 * error["wanda"], error
    assert error["wanda"] < 0.6 * error["magnitude"], error


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["paper", "balanced"])
@pytest.mark.parametrize("setting", [{"sparsity": 0.5}, {"pattern": "2:4"}], ids=str)
def test_precisions_give_what_float32_does(preset, setting):
    """The bounds of scripts/bench_precision.py, which has more layers."""
    tensors = load("layers.12.self_attn.v_proj")
    found = {
        name: prune_layer(
            tensors["weight"], tensors["gram"], config=replace(resolve_config(preset), precision=name), **setting
        )
        for name in ("float32", "fp16x3", "mixed")
    }
    base = found["float32"]
    assert found["mixed"].relative_error == pytest.approx(base.relative_error, rel=3e-3)
    is_published = preset == "paper"
    assert found["fp16x3"].relative_error == pytest.approx(base.relative_error, rel=1e-4 if is_published else 3e-3)
    if is_published:
        assert (found["fp16x3"].mask == base.mask).float().mean() >= 0.999
