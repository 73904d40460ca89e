"""mAIHT beside the same written naively; on a GPU its speed beside that of its products, within one run."""

import importlib
import time
from pathlib import Path

import pytest
import torch

from helpers.problems import make_problem
from maiht_lightning.solvers import MAIHTConfig, prune_layer
from maiht_lightning.solvers.maiht import step_size
from maiht_lightning.solvers.precision import float32_products
from maiht_lightning.solvers.problem import relative_error, scale_gram


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    return importlib.import_module("bench_solvers")


def timed(action):
    start = time.perf_counter()
    return action(), time.perf_counter() - start


def test_as_good_as_written_naively(bench):
    """230 products and two sorts against 130 products: the same answer. How long they take the script says."""
    weight, gram = (tensor.float() for tensor in make_problem(0, 192, 144))
    config = MAIHTConfig(iterations=20, refine_iterations=12)
    result = prune_layer(weight, gram, config=config)
    naive = bench.naive_maiht(weight, gram, 0.5, config, step_size(scale_gram(gram), config))
    # The naive top-k fills up with whatever zeros come first where λ went too far; so ours may be a little lower.
    error = relative_error(weight, naive, scale_gram(gram))
    assert 0.95 * error < result.relative_error < 1.001 * error


def test_a_speed_that_is_asked_for_is_looked_at(bench, monkeypatch):
    seconds = {("a", "maiht"): 1.0, ("a", "naive mAIHT"): 2.0, ("b", "maiht"): 4.0, ("b", "naive mAIHT"): 6.0}
    rows = [{"layer": layer, "method": method, "seconds": value} for (layer, method), value in seconds.items()]
    bench.require_speed(rows, 1.5)
    with pytest.raises(SystemExit, match=r"1\.6 times as fast .* found 1\.50 for b$"):
        bench.require_speed(rows, 1.6)
    monkeypatch.setattr("sys.argv", ["bench_solvers.py", "--at-least", "2", "--pattern", "row"])
    with pytest.raises(SystemExit, match="2"):
        bench.parse_arguments()


# One skip where there is no device, and not one a case.
ON_A_GPU = (
    [
        (shape, precision, most)
        for shape in ((4096, 4096), (11008, 4096), (4096, 11008))
        for precision, most in (("float32", 1.15), ("tf32", 1.5))
    ]
    if torch.cuda.is_available()
    else [pytest.param((1, 1), "float32", 1.0, marks=pytest.mark.skip("no CUDA device"))]
)


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "precision", "most"), ON_A_GPU)
def test_little_beside_the_products_on_a_gpu(shape, precision, most):
    """LLaMA-7B's layers: 130 products with the Gram matrix and hardly more."""
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(shape, generator=generator, device="cuda")
    features = torch.randn(shape[1] + 512, shape[1], generator=generator, device="cuda")
    gram, out = features.T @ features, torch.empty_like(weight)

    def bare():
        with float32_products(tf32=precision == "tf32"):
            for _ in range(130):
                torch.matmul(weight, gram, out=out)
        torch.cuda.synchronize()

    def solve():
        prune_layer(weight, gram, config=MAIHTConfig(precision=precision))
        torch.cuda.synchronize()

    products, ours = [], []
    for _ in range(3):
        products.append(timed(bare)[1])
        ours.append(timed(solve)[1])
    assert min(ours) < most * min(products)
