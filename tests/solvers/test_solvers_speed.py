"""mAIHT beside the same written naively."""

import importlib
from pathlib import Path

import pytest

from helpers.problems import make_problem
from maiht_lightning.solvers import MAIHTConfig, prune_layer
from maiht_lightning.solvers.maiht import step_size
from maiht_lightning.solvers.problem import relative_error, scale_gram


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    return importlib.import_module("bench_solvers")


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
