"""How many threads a layer is solved with: one where it is small, else those that torch is set to."""

import threading

import pytest
import torch

from helpers.problems import make_problem
from maiht_lightning.solvers import METHODS, LayerSolver, PruningSpec, prune_layer
from maiht_lightning.solvers.methods import Method
from maiht_lightning.solvers.threads import threads_for


@pytest.fixture
def three_threads():
    """More than there may be cores, so that no default can be taken for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def seen(monkeypatch):
    """The numbers of threads with which Gram matrices are prepared and layers are solved, in this order."""
    numbers = []

    def prepare(gram, config):
        numbers.append(torch.get_num_threads())

    def solve(*arguments):
        numbers.append(torch.get_num_threads())
        return METHODS["wanda"].solve(*arguments)

    monkeypatch.setitem(METHODS, "magnitude", Method(prepare, solve))
    return numbers


# A product of (rows, in) with (in, in) has rows · in · in multiplications: 2**26 are shared.
@pytest.mark.parametrize(
    ("rows", "inputs", "expected"),
    [(8, 16, [1, 1]), (255, 512, [3, 1]), (256, 512, [3, 3]), (1023, 256, [1, 1]), (1024, 256, [1, 3])],
)
def test_small_layers_are_solved_with_one_thread(rows, inputs, expected, seen, three_threads):
    prune_layer(torch.ones(rows, inputs), torch.eye(inputs), method="magnitude")
    assert seen == expected
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("rows", [1, 1024])
def test_threads_are_never_more_than_torch_is_set_to(rows, seen, three_threads):
    torch.set_num_threads(1)
    prune_layer(torch.ones(rows, 256), torch.eye(256), method="magnitude")
    assert seen == [1, 1]
    assert torch.get_num_threads() == 1


def test_an_error_leaves_the_callers_threads(three_threads, monkeypatch):
    within = []

    def fail(*_):
        within.append(torch.get_num_threads())
        raise FloatingPointError("from the solver")

    weight, gram = torch.ones(4, 4), torch.eye(4)
    monkeypatch.setitem(METHODS, "wanda", Method(METHODS["wanda"].prepare, fail))
    solver = LayerSolver(gram, PruningSpec.parse(0.5, "unstructured", "wanda", None))
    with pytest.raises(FloatingPointError, match="from the solver"):
        solver.prune(weight)
    monkeypatch.setitem(METHODS, "wanda", Method(fail, METHODS["wanda"].solve))
    with pytest.raises(FloatingPointError, match="from the solver"):
        prune_layer(weight, gram, method="wanda")
    assert within == [1, 1]
    assert torch.get_num_threads() == 3


def test_layers_on_other_devices_leave_threads_alone(three_threads):
    with threads_for(torch.empty(4, 4, device="meta")):
        assert torch.get_num_threads() == 3


def test_other_threads_keep_their_number(three_threads):
    """A data loader's, say, that has used torch before."""
    begun, solving, found = threading.Event(), threading.Event(), []

    def other():
        found.append(torch.get_num_threads())
        begun.set()
        solving.wait()
        found.append(torch.get_num_threads())

    thread = threading.Thread(target=other)
    thread.start()
    begun.wait()
    with threads_for(torch.empty(4, 4)):
        solving.set()
        thread.join()
        assert torch.get_num_threads() == 1
    assert found == [3, 3]


@pytest.mark.parametrize("config", ["paper", "balanced"])
def test_a_small_layer_is_the_same_whatever_the_number_of_threads(config, three_threads):
    """Factorisations sum in an order of their own for each number of threads."""
    weight, gram = (tensor.float() for tensor in make_problem(0, 64, 256))
    several = prune_layer(weight, gram, config=config)
    torch.set_num_threads(1)
    one = prune_layer(weight, gram, config=config)
    assert torch.equal(several.weight, one.weight)
    assert several.objective == one.objective
