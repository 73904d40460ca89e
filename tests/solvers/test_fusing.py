"""Passes over memory: as they stand, and as `torch.compile` fuses them, for a CPU where it has a compiler."""

import functools
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException
from torch.testing import assert_close

from helpers.problems import make_problem
from maiht_lightning import MAIHTConfig, prune, prune_layer
from maiht_lightning.data.batches import Windows
from maiht_lightning.pruning import pruner
from maiht_lightning.solvers import PruningSpec, fusing, hard_thresholding, splitting
from maiht_lightning.solvers.config import PRESETS
from maiht_lightning.solvers.fusing import WORTHWHILE, compiled, fused, one_pass, run_by


@one_pass
def halve(matrix, *, scratch=None):
    """Half of a matrix, by way of a buffer."""
    return torch.mul(matrix, 0.5, out=scratch)


def test_a_pass_writes_to_its_buffers():
    matrix, buffer = torch.ones(3), torch.empty(3)
    assert halve(matrix, scratch=buffer) is buffer
    with run_by(fused):  # a CPU's stays as it stands
        assert halve(matrix, scratch=buffer) is buffer


def test_how_passes_are_run_ends_with_its_context():
    calls = []

    def how(function, scratch, *args):
        calls.append(scratch)
        return function(*args, scratch=scratch)

    def fail():
        with run_by(how):
            halve(torch.ones(3), scratch=buffer)
            with run_by(None):
                halve(torch.ones(3))
            raise KeyError

    buffer = torch.empty(3)
    with pytest.raises(KeyError):
        fail()
    halve(torch.ones(3))
    assert len(calls) == 1
    assert calls[0] is buffer


# What a pass takes for a matrix on a GPU here: something that says so.
ON_GPU = SimpleNamespace(is_cuda=True)


@pytest.mark.parametrize("early", [True, False], ids=["no compiler", "a pass it cannot compile"])
def test_a_compiler_that_fails_is_given_up_with_a_warning(monkeypatch, early):
    """The pass is run as it stands, with its buffers, then and in future."""
    asked = []

    def broken(function):
        asked.append(function)
        if early:
            raise RuntimeError("torch.compile is not supported on this Python")

        def run(*_):
            raise TorchDynamoException("no C compiler\nand so on")

        return run

    monkeypatch.setattr(fusing, "compiled", broken)
    monkeypatch.setattr(fusing, "_failures", [])
    with run_by(fused):
        run = one_pass(lambda matrix, *, scratch: (matrix, scratch))
        with pytest.warns(UserWarning, match="could not fuse the solver's passes over memory"):
            assert run(ON_GPU, scratch="buffer") == (ON_GPU, "buffer")
        assert run(ON_GPU, scratch="buffer") == (ON_GPU, "buffer")
    assert len(asked) == 1


def test_a_pass_that_fails_while_it_runs_is_not_run_again(monkeypatch):
    """It may have changed what it was given; memory that ran out is for those to handle who can do with less."""

    def run(*_):
        raise torch.OutOfMemoryError("8 GiB")

    monkeypatch.setattr(fusing, "compiled", lambda _: run)
    monkeypatch.setattr(fusing, "_failures", [])
    with run_by(fused), pytest.raises(torch.OutOfMemoryError):
        one_pass(lambda matrix, *, scratch: None)(ON_GPU)
    assert fusing._failures == []


def test_passes_are_compiled_where_that_pays():
    def fuses(weights=int(WORTHWHILE / 80), device="cuda", config="paper", **settings):
        return PruningSpec.parse(config=config, **settings).fuses(weights, device)

    assert fuses()
    assert fuses(pattern="row")
    assert fuses(method="iht")
    assert not fuses(int(WORTHWHILE / 80) - 1)
    assert not fuses(config="fast")  # fewer iterations
    assert fuses(config=MAIHTConfig(iterations=60, refine_iterations=20))
    assert not fuses(config=MAIHTConfig(iterations=60, refine_iterations=19))
    assert not fuses(device="cpu")
    assert not fuses(pattern="2:4")
    assert not fuses(method="admm")


def linear_weights(model):
    return sum(layer.weight.numel() for layer in model.model.layers.modules() if isinstance(layer, torch.nn.Linear))


def test_a_models_passes_are_fused_where_its_size_is_worth_it(tiny_llama, monkeypatch):
    windows = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))
    expected, model = tiny_llama(vocab_size=64), tiny_llama(vocab_size=64)
    prune(expected, windows, config="paper", progress=False)
    asked, run = [], []

    def fuses(self, weights, device):
        asked.append((weights, torch.device(device).type))
        return True

    def how(function, scratch, *args):
        run.append(function.__name__)
        return function(*args, scratch=None)

    monkeypatch.setattr(PruningSpec, "fuses", fuses)
    monkeypatch.setattr(pruner, "fused", how)
    prune(model, windows, config="paper", progress=False)
    assert asked == [(linear_weights(model), "cpu")]
    assert {"propose_accelerated", "propose", "descend", "restrict"} <= set(run)
    run.clear()
    prune_layer(torch.eye(4), torch.eye(4))
    assert run == []
    for name, weight in expected.state_dict().items():
        assert_close(model.state_dict()[name], weight, rtol=1e-4, atol=1e-6)


def test_processes_share_the_weights_that_are_to_be_worth_it(tiny_llama, monkeypatch):
    class TwoProcesses(pruner.Ranks):
        """One process that takes itself for the first of two."""

        def __init__(self, group=None):
            super().__init__(group)
            self.size = 2

    def fuses(self, weights, device):
        raise InterruptedError(weights)

    monkeypatch.setattr(pruner, "Ranks", TwoProcesses)
    monkeypatch.setattr(PruningSpec, "fuses", fuses)
    model, windows = tiny_llama(vocab_size=64), Windows.parse(torch.zeros(4, 16, dtype=torch.long))
    with pytest.raises(InterruptedError, match=f"^{linear_weights(model) // 2}$"):
        pruner.prune_model(model, windows, PruningSpec.parse())


# ---- As a compiler makes them

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler to fuse passes on a CPU")


def compile_all(function, scratch, *args):
    return compiled(function)(*args)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "pattern"), [("paper", "unstructured"), ("balanced", "row")], ids=["paper", "balanced"]
)
def test_fused_passes_give_the_same_weights(preset, pattern):
    """In float64, where rounding settles no near-ties; with another shape from the same graphs."""
    config = replace(PRESETS[preset], precision="float64", keep_zeros=preset == "paper")
    for shape in ((48, 64), (40, 96)):
        weight, gram = make_problem(3, *shape)
        weight[3, :20] = 0
        expected = prune_layer(weight, gram, config=config, pattern=pattern)
        with run_by(compile_all):
            found = prune_layer(weight, gram, config=config, pattern=pattern)
        assert torch.equal(found.mask, expected.mask)
        assert_close(found.weight, expected.weight, rtol=1e-9, atol=1e-12)
        assert found.objective == pytest.approx(expected.objective, rel=1e-9)


@needs_compiler
@pytest.mark.slow
def test_fused_passes_take_sums_from_halves_and_tf32():
    """Products that are still to be scaled; and where PyTorch's getters of the precision raise, as they do for TF32."""
    for precision in ("fp16x3", "tf32"):
        config = replace(PRESETS["paper"], precision=precision)
        weight, gram = (tensor.float() for tensor in make_problem(3, 48, 64))
        expected = prune_layer(weight, gram, config=config)
        with run_by(compile_all):
            found = prune_layer(weight, gram, config=config)
        assert found.relative_error == pytest.approx(expected.relative_error, rel=1e-3)


@pytest.mark.slow
def test_numbers_are_no_constants_of_a_graph(monkeypatch):
    """Each iteration and each layer has others; a graph for each would be compiled until torch refuses to."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    target = torch.randn(8, 16)
    graph = functools.partial(torch.compile, backend=backend, dynamic=True, fullgraph=True)
    monkeypatch.setattr(fusing, "_graph", functools.cache(graph))
    for step in (0.0, 0.25, 0.3, 0.7, 1.0, 1.5):
        stepped, dual, right = (torch.empty(8, 16) for _ in range(3))
        with run_by(compile_all):
            loss = hard_thresholding.descend(target, target, target, None, step, None, stepped)
            splitting.separate(target, target > 0, step, target, dual, right)
        assert_close(stepped, target * (1 - step))
        assert_close(loss, target.square().sum(1))
        assert_close(right, (target.clamp_min(0) - target.clamp_max(0) - target) * step)
    assert len(graphs) == 2
