"""Layers solved in slices of rows under a memory budget, and iterations that stop when they have converged."""

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from helpers.problems import FLOAT64, make_problem
from maiht_lightning.solvers import MAIHTConfig, prune_layer
from maiht_lightning.solvers.problem import relative_error, scale_gram
from maiht_lightning.solvers.slices import Slices, copy_beside, page_locked, rows_within, solver_bytes

PATTERNS = ["unstructured", "row", "2:4"]
ITERATIVE = ["maiht", "aiht", "iht"]


def budget(rows, inputs, dtype=torch.float64):
    return solver_bytes((rows, inputs), dtype)


@pytest.fixture(params=[False, True], ids=["views", "copies"])
def copies(request, monkeypatch):
    """Also the way of a GPU, where a slice is copied in and out of buffers."""
    if request.param:
        monkeypatch.setattr(Slices, "_is_offloaded", lambda self, matrix: True)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 5, 12, 23])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", ITERATIVE)
@pytest.mark.usefixtures("copies")
def test_slices_give_the_same_answer(method, pattern, rows):
    weight, gram = make_problem(rows, 24, 32)
    gram[3] = gram[:, 3] = 0
    whole = prune_layer(weight, gram, pattern=pattern, method=method, config=FLOAT64)
    config = MAIHTConfig(precision="float64", memory_budget=budget(rows, 32))
    sliced = prune_layer(weight, gram, pattern=pattern, method=method, config=config)
    assert torch.equal(sliced.mask, whole.mask)
    torch.testing.assert_close(sliced.weight, whole.weight, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.tensor(sliced.objective), torch.tensor(whole.objective), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.tensor(sliced.accelerated), torch.tensor(whole.accelerated))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_slices_in_float32(pattern):
    weight, gram = (tensor.float() for tensor in make_problem(1, 96, 64))
    whole = prune_layer(weight, gram, pattern=pattern, config="paper")
    sliced = prune_layer(weight, gram, pattern=pattern, config=MAIHTConfig(memory_budget=budget(20, 64, torch.float32)))
    assert sliced.mask.sum() == whole.mask.sum()
    assert (sliced.mask == whole.mask).float().mean() > 0.999
    assert sliced.relative_error == pytest.approx(whole.relative_error, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
def test_memory_stays_within_the_budget(pattern):
    """A whole layer takes twelve matrices at most; slices of a by-row layer their budget, beside the result."""
    weight, gram = (tensor.float() for tensor in make_problem(2, 512, 256))
    size = weight.numel() * 4

    def peak(config):
        with MemTracker() as tracker:
            prune_layer(weight, gram, pattern=pattern, config=config)
        return max(stats["Total"] for stats in tracker.get_tracker_snapshot("peak").values())

    few = {"iterations": 3, "refine_iterations": 2}
    gram_and_scaled = 4 * gram.numel() * 4
    assert peak(MAIHTConfig(**few)) < 12 * size + gram_and_scaled
    if pattern == "row":
        # A result and its mask for each slice, and these put together.
        limit = budget(64, 256, torch.float32)
        assert peak(MAIHTConfig(**few, memory_budget=limit)) < limit + 2.5 * size + gram_and_scaled


def test_rows_within_a_budget():
    assert rows_within(None, (100, 8), torch.float32) == 100
    assert rows_within(budget(7, 8, torch.float32), (100, 8), torch.float32) == 7
    assert rows_within(budget(7, 8, torch.float32) - 1, (100, 8), torch.float32) == 6
    assert rows_within(10**9, (100, 8), torch.float32) == 100
    with pytest.raises(ValueError, match=r"memory_budget must hold at least one row .* 352 bytes .*found 351"):
        rows_within(351, (100, 8), torch.float32)


def test_the_error_is_summed_over_slices(monkeypatch):
    weight, gram = make_problem(3, 24, 16)
    weight[5:9] *= 1e6  # slices of very different size
    pruned, scaled = weight * (weight.abs() > 0.5), scale_gram(gram, torch.float64)
    change = pruned - weight
    expected = ((change @ gram) * change).sum() / ((weight @ gram) * weight).sum()
    for elements in (1, 50, 10_000):
        monkeypatch.setattr("maiht_lightning.solvers.problem.ERROR_ELEMENTS", elements)
        assert relative_error(weight, pruned, scaled) == pytest.approx(expected.item(), rel=1e-10, abs=0)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", ITERATIVE)
def test_settled_courses_stop_early(method, pattern):
    weight, gram = make_problem(4, 48, 64)
    long = {"iterations": 300, "refine_iterations": 300}
    full = prune_layer(weight, gram, pattern=pattern, method=method, config=MAIHTConfig(**long))
    assert len(full.objective) == 601  # without a tolerance never
    early = prune_layer(weight, gram, pattern=pattern, method=method, config=MAIHTConfig(**long, tolerance=1e-3))
    assert len(early.objective) < 300  # neither the thresholding nor the refining alone has run to its end
    assert early.mask.sum() == full.mask.sum()
    assert early.relative_error < 1.02 * full.relative_error
    # The course is the same one, only shorter, up to where the final support is taken.
    shared = len(early.accelerated) or 5
    assert early.objective[:shared] == full.objective[:shared]


def test_slices_that_settle_at_different_times():
    weight, gram = make_problem(5, 24, 32)
    weight[:6] = 0.0  # nothing to do in the first slice
    config = {"iterations": 100, "refine_iterations": 100, "tolerance": 1e-4, "precision": "float64"}
    for pattern in PATTERNS:
        whole = prune_layer(weight, gram, pattern=pattern, config=MAIHTConfig(**config))
        sliced = prune_layer(weight, gram, pattern=pattern, config=MAIHTConfig(**config, memory_budget=budget(6, 32)))
        assert sliced.relative_error == pytest.approx(whole.relative_error, rel=1e-2)
        assert sliced.objective[-1] == pytest.approx(whole.objective[-1], rel=1e-2)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("tolerance", -1), ("tolerance", 1), ("tolerance", float("nan")), ("memory_budget", 0), ("memory_budget", 1.5)],
)
def test_bad_settings(setting, value):
    with pytest.raises(ValueError, match=setting):
        MAIHTConfig(**{setting: value})


def test_only_what_a_gpu_fetches_is_page_locked(monkeypatch):
    """As far as a CPU can tell: which matrices are asked for, and that a copy is a copy."""
    locked = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: locked.append(self) or self)
    weight, gram = make_problem(4, 24, 32)
    for config in (FLOAT64, MAIHTConfig(precision="float64", memory_budget=budget(5, 32))):
        prune_layer(weight, gram, config=config)
    assert not locked
    assert page_locked(weight, torch.device("cuda")) is weight
    assert len(locked) == 1
    copied = copy_beside(weight)
    assert torch.equal(copied, weight)
    assert copied.data_ptr() != weight.data_ptr()
