"""What `prune_layer` says of the weight that it returns."""

import pytest
import torch

from maiht_lightning.solvers import METHODS, MAIHTConfig, prune_layer
from maiht_lightning.solvers.methods import Method


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_error_is_that_of_the_rounded_weight(dtype):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 24, generator=generator, dtype=torch.float64)
    weight = torch.randn(8, 24, generator=generator, dtype=torch.float64).to(dtype)
    result = prune_layer(weight, inputs.T @ inputs, sparsity=0.3, config=MAIHTConfig(precision="float64"))
    assert result.weight.dtype == dtype
    change, dense = inputs @ (result.weight.double() - weight.double()).T, inputs @ weight.double().T
    assert result.relative_error == pytest.approx((change.norm() / dense.norm()).item() ** 2, rel=1e-9)


@pytest.mark.parametrize("pattern", ["unstructured", "row", "2:4"])
def test_tiny_weights_are_pruned_as_those_near_one_are(pattern):
    """In float32, where the squares of the tiny ones are 0. A power of two changes no rounding."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(60, 24, generator=generator)
    weight = torch.randn(8, 24, generator=generator)
    near_one, tiny = (prune_layer(w, inputs.T @ inputs, pattern=pattern) for w in (weight, weight * 2.0**-90))
    assert torch.equal(tiny.weight * 2.0**90, near_one.weight)
    assert tiny.relative_error == near_one.relative_error > 0


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="needs PyTorch 2.9")
@pytest.mark.parametrize(("precision", "products"), [("float32", "ieee"), ("tf32", "tf32"), ("float64", "ieee")])
def test_products_are_tf32_where_the_settings_say_so(precision, products, monkeypatch):
    seen = []

    def watch(*arguments):
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        return METHODS["wanda"].solve(*arguments) if len(arguments) > 2 else None

    monkeypatch.setitem(METHODS, "watched", Method(watch, watch))
    prune_layer(torch.ones(2, 4), torch.eye(4), method="watched", config=MAIHTConfig(precision=precision))
    assert seen == [products, products]  # while the Gram matrix is prepared, and while the layer is solved
