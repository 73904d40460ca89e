"""Precisions: products from half-precision ones, what they do to results, and where each is used."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers.problems import make_problem
from maiht_lightning.solvers import LayerSolver, MAIHTConfig, PruningSpec, precision, prune_layer
from maiht_lightning.solvers.config import PRESETS
from maiht_lightning.solvers.precision import Multiplier, resolve_precision
from maiht_lightning.solvers.problem import relative_error, scale_gram

SETTINGS = ({"sparsity": 0.5}, {"sparsity": 0.7}, {"pattern": "2:4"}, {"pattern": "row"})


def factors(rows=24, inputs=80, seed=0):
    """A matrix (rows, in) whose rows differ by e³⁰ and its columns by e⁸, and a symmetric one (in, in), float64."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, inputs, generator=generator, dtype=torch.float64)
    left *= torch.linspace(-15, 15, rows, dtype=torch.float64).exp()[:, None]
    left *= torch.linspace(-4, 4, inputs, dtype=torch.float64).exp()
    gram = make_problem(seed, 2, inputs)[1]
    return left.float(), scale_gram(gram).correlation


def errors(multiply, left, right):
    exact = left.double() @ right.double()
    return ((multiply(left).double() - exact).norm(dim=1) / exact.norm(dim=1)).max().item()


@pytest.mark.parametrize("scale", [2.0**-30, 1.0, 3.0, 2.0**40])
def test_three_products_of_halves_are_as_accurate_as_one_of_float32(scale):
    """For large and for tiny rows, whatever the size of the matrix."""
    left, right = factors()
    right = right * scale
    plain = errors(Multiplier(right), left, right)
    assert plain < 1e-6
    assert errors(Multiplier(right, "fp16x3"), left, right) < max(3 * plain, 5e-7)
    assert 1e-5 < errors(Multiplier(right, "fp16"), left, right) < 2.0**-10


def test_one_product_of_halves_is_that_of_rounded_numbers():
    """Eleven bits of each entry, as of TF32, as far as they are within 2²⁹ of their row's largest."""
    left, right = factors()

    def rounded(matrix):
        mantissa, exponent = torch.frexp(matrix.double())
        return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)

    expected = rounded(left) @ rounded(right)
    found = Multiplier(right, "fp16")(left).double()
    assert ((found - expected).norm(dim=1) < 2e-6 * expected.norm(dim=1)).all()


@pytest.mark.parametrize("form", ["plain", "fp16x3", "fp16"])
def test_the_product_goes_where_it_is_wanted(form):
    left, right = factors()
    left[3] = 0
    multiply, out = Multiplier(right, form), torch.full_like(left, torch.nan)
    before = left.clone(), right.clone()
    assert multiply(left, out=out) is out
    assert torch.equal(multiply(left), out)
    assert (out[3] == 0).all()
    assert torch.equal(left, before[0])
    assert torch.equal(right, before[1])


def test_the_rough_one_is_the_first_of_the_three_products():
    left, right = factors()
    assert torch.equal(Multiplier(right, "fp16x3").rough()(left), Multiplier(right, "fp16")(left))


@pytest.mark.parametrize("form", ["fp16x3", "fp16"])
@pytest.mark.parametrize("given", [False, True])
def test_on_a_gpu_halves_are_multiplied_with_sums_in_float32(form, given):
    """With tensors that pretend to be on one: dtypes, shapes and arguments are checked, nothing is computed."""
    multiply = Multiplier(factors()[1], form)
    with FakeTensorMode():
        halves = torch.empty(multiply._right.shape, dtype=torch.float16, device="cuda")
        multiply._right, multiply.device, left = halves, torch.device("cuda"), torch.empty(24, 80, device="cuda")
        out = torch.empty_like(left)
        product = multiply(left, out=out) if given else multiply(left)
    assert (product.shape, product.dtype, product.device.type) == (left.shape, torch.float32, "cuda")
    assert (product is out) == given


# ---- What becomes of layers


NAMES = ("float32", "float64", "fp16x3", "mixed")


def pruned(weight, gram, config, **setting):
    return {p: prune_layer(weight, gram, config=replace(config, precision=p), **setting) for p in NAMES}


def problem(seed, out=96, inputs=128):
    return tuple(tensor.float() for tensor in make_problem(seed, out, inputs, spread=1.5))


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("method", ["maiht", "aiht", "admm", "sparsegpt", "wanda"])
def test_layers_are_as_in_float32(method, setting):
    weight, gram = problem(7)
    found = pruned(weight, gram, MAIHTConfig(), method=method, **setting)
    base, three = found["float32"], found["fp16x3"]
    # Near-ties are settled by rounding, with float32 by the processor's order of sums: either answer is right.
    nearest = min(base, found["float64"], key=lambda other: int((other.mask != three.mask).sum()))
    assert three.relative_error == pytest.approx(nearest.relative_error, rel=1e-4)
    assert (three.mask == base.mask).float().mean() >= 0.999
    assert found["mixed"].relative_error == pytest.approx(base.relative_error, rel=3e-3)
    for other in found.values():
        assert other.mask.sum() == base.mask.sum()
        # What is reported is right to many digits, whatever the support was sought with.
        exact = relative_error(weight.double(), other.weight.double(), scale_gram(gram, torch.float64))
        assert other.relative_error == pytest.approx(exact, rel=2e-6)


def test_layers_with_preconditioned_candidates_are_as_good():
    """Which of near-ties stay is settled by rounding, in float32 as well, so that small layers differ both ways."""
    ratios = {"fp16x3": [], "mixed": []}
    for seed in range(8):
        found = pruned(*problem(seed), PRESETS["fast"])
        for name, others in ratios.items():
            assert found[name].mask.sum() == found["float32"].mask.sum()
            others.append(found[name].relative_error / found["float32"].relative_error)
    for others in ratios.values():
        assert sum(others) / len(others) == pytest.approx(1, abs=2e-3)
        assert others == pytest.approx([1] * 8, abs=1e-2)


@pytest.mark.parametrize("config", [MAIHTConfig(), PRESETS["fast"]], ids=["gradient", "preconditioned"])
def test_weights_that_were_fitted_to_dense_outputs(config):
    """What they are fitted to is computed in float32, and the layers are those that such weights would be."""
    weight, gram = problem(3)
    drift = 0.01 * torch.randn(128, 128, generator=torch.Generator().manual_seed(0)) * gram.diagonal().sqrt()
    config = replace(config, sublayers=True, dense_targets=0.5)
    for name in ("fp16x3", "mixed"):
        solver = LayerSolver(gram, PruningSpec.parse(config=replace(config, precision=name)), drift)
        found = solver.prune(weight)
        dense = solver.correction.apply(weight)
        expected = prune_layer(dense, gram, config=replace(config, precision=name))
        assert torch.equal(found.weight, expected.weight)
        assert found.relative_error == expected.relative_error
        assert not torch.equal(found.mask, prune_layer(weight, gram, config=replace(config, precision=name)).mask)


# ---- Where each is used


@pytest.fixture
def forms(monkeypatch):
    """The form and dtype of every product that a solver makes."""
    seen = []
    product = Multiplier.product

    def watch(self, left, out=None):
        seen.append((self.form, left.matrix.dtype))
        return product(self, left, out)

    monkeypatch.setattr(Multiplier, "product", watch)
    return seen


ONE, THREE = ("fp16", torch.float16), ("fp16x3", torch.float16)


@pytest.mark.parametrize(
    ("method", "config", "search", "final"),
    [
        # Two for the error in each; one more where the refining begins.
        ("maiht", MAIHTConfig(iterations=5, refine_iterations=4), 10, 1 + 4 + 2),
        ("aiht", MAIHTConfig(iterations=5, refine_iterations=4), 5, 1 + 4 + 2),
        # Of the refining, too, all but the last ten are like those of the search.
        ("maiht", MAIHTConfig(iterations=5, refine_iterations=14), 10 + 5, 10 + 2),
        # With a tolerance it may end at any time.
        ("maiht", MAIHTConfig(iterations=5, refine_iterations=14, tolerance=1e-12), 10, 15 + 2),
        # The first point, two pairs of candidates with six each.
        ("maiht", MAIHTConfig(iterations=9, refine_iterations=4, candidates="preconditioned"), 9, 1 + 12 + 4 + 2),
        # It does not seek a support first and weights then: all of its products are those of final weights.
        ("admm", MAIHTConfig(), 0, 1 + 20 + 2),
        ("sparsegpt", MAIHTConfig(), 0, 2),
        ("wanda", MAIHTConfig(), 0, 2),
    ],
    ids=["maiht", "aiht", "refining", "tolerance", "preconditioned", "admm", "sparsegpt", "wanda"],
)
def test_products_are_in_the_precision_asked_for(forms, method, config, search, final):
    weight, gram = (tensor.float() for tensor in make_problem(1, 16, 24))
    plain = [("plain", torch.float32)]
    double = [("plain", torch.float64)]
    everything = search + final
    for name, expected in {
        "auto": plain * everything,  # on a CPU
        "float32": plain * everything,
        "tf32": plain * everything,
        "float64": double * everything,
        "fp16x3": [THREE] * everything,
    }.items():
        forms.clear()
        prune_layer(weight, gram, method=method, config=replace(config, precision=name))
        assert forms == expected, name
    forms.clear()
    prune_layer(weight, gram, method=method, config=replace(config, precision="mixed"))
    assert (forms.count(ONE), forms.count(THREE)) == (search, final)
    assert forms[-2:] == [THREE, THREE]  # the error


def test_slices_of_rows_have_products_from_halves(forms):
    weight, gram = (tensor.float() for tensor in make_problem(2, 40, 32))
    config = MAIHTConfig(iterations=12, refine_iterations=6, precision="mixed")
    whole = prune_layer(weight, gram, config=config)
    budget = replace(config, memory_budget=11 * 4 * 32 * 15)
    forms.clear()
    sliced = prune_layer(weight, gram, config=budget)
    assert (forms.count(ONE), forms.count(THREE)) == (3 * 2 * 12, 3 * 7 + 2)
    assert (sliced.mask == whole.mask).float().mean() > 0.99
    assert sliced.relative_error == pytest.approx(whole.relative_error, rel=1e-3)


def test_what_auto_is():
    assert resolve_precision("auto", "cpu") == "float32"
    assert resolve_precision("auto", "mps") == "float32"
    assert MAIHTConfig().precision == "auto"
    for name in ("float32", "float64", "tf32", "fp16x3", "mixed"):
        assert resolve_precision(name, "cpu") == name
    for name in ("fp16x3", "mixed"):
        with pytest.raises(ValueError, match=f"precision '{name}' needs .* found mps and PyTorch .*: take 'float32'"):
            MAIHTConfig(precision=name).on("mps")


@pytest.mark.parametrize(
    ("capability", "overloads", "expected"),
    [((8, 0), ["dtype_out"], "mixed"), ((6, 1), ["dtype_out"], "float32"), ((9, 0), ["default"], "float32")],
)
def test_what_auto_is_on_a_gpu(monkeypatch, capability, overloads, expected):
    """With one that is pretended: half precision needs the hardware, and a PyTorch that sums in float32."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(type(torch.ops.aten.mm), "overloads", lambda self: overloads)
    assert resolve_precision("auto", "cuda") == expected
    assert precision.error_form("tf32", "cuda") == ("fp16x3" if expected == "mixed" else "plain")
    assert precision.error_form("float32", "cuda") == "plain"
    if expected == "float32":
        with pytest.raises(ValueError, match=r"capability 7\.0 and PyTorch 2\.8 or newer"):
            MAIHTConfig(precision="fp16x3").on("cuda")


def test_a_journal_is_told_what_auto_was():
    """Journals from before there was `auto` have float32, and go on where that is what it is."""
    assert MAIHTConfig().identity() == MAIHTConfig(precision="float32").identity()
    assert MAIHTConfig().identity("cuda")["precision"] == "mixed"
    assert PruningSpec.parse(config="paper").identity("cuda")["config"]["precision"] == "mixed"
    assert PruningSpec.parse(config="best").on("cuda").identity()["config"]["precision"] == "mixed"


def test_every_precision_has_another_identity():
    names = ("float32", "float64", "tf32", "fp16x3", "mixed")
    assert len({str(MAIHTConfig(precision=name).identity()) for name in names}) == len(names)
