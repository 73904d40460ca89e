"""Memory that runs out in capture, reconstruction and solver: the same again with less of it."""

import copy

import pytest
import torch
from transformers.models.llama import modeling_llama

from maiht_lightning import MAIHTConfig
from maiht_lightning.data.batches import Windows
from maiht_lightning.models.memory import is_out_of_memory
from maiht_lightning.pruning.pruner import prune_model
from maiht_lightning.solvers import LayerSolver, PruningSpec
from maiht_lightning.solvers.layer import moved
from maiht_lightning.solvers.maiht import HardThresholding
from maiht_lightning.solvers.methods import METHODS

WINDOWS = torch.randint(0, 64, (9, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def short_of_memory(monkeypatch):
    """A function that lets memory run out in blocks: once, in a certain pass of more than two windows, or always."""

    def set_up(at, error=torch.OutOfMemoryError):
        real, passes = modeling_llama.LlamaDecoderLayer.forward, []

        def forward(self, hidden_states, *args, **kwargs):
            passes.append(len(hidden_states))
            large = [size for size in passes if size > 2]
            if len(hidden_states) > 2 and (at is None or len(large) == at):
                raise error("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 GiB")
            return real(self, hidden_states, *args, **kwargs)

        monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", forward)
        return passes

    return set_up


def pruned(model, said=None, batch_size=4, **settings):
    model = copy.deepcopy(model)
    spec = PruningSpec.parse(**settings)
    more = {} if said is None else {"on_retry": said.append}
    report = prune_model(model, Windows.parse(WINDOWS), spec, progress=False, batch_size=batch_size, **more)
    return dict(model.named_parameters()), report


CALIBRATION = "calibration: memory ran out with batch_size {}, so it is captured with {}"


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_where_no_large_batch_fits_all_is_as_with_small_ones(tiny_llama, short_of_memory, method, error):
    model, said = tiny_llama(vocab_size=64), []
    expected, _ = pruned(model, batch_size=2, method=method)
    passes = short_of_memory(None, error)
    found, _ = pruned(model, said, method=method)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert said == [CALIBRATION.format(4, 2)]
    assert passes[0] == 4
    assert set(passes[1:]) == {1, 2}


# What is done beyond the layer, with a method whose support rounding does not change.
CONFIGS = {
    "blocks": MAIHTConfig(),
    "sublayers": MAIHTConfig(sublayers=True, dense_targets=0.5),
}


# Passes while the first inputs are recorded, while a block is captured, and while it is passed.
@pytest.mark.parametrize(
    ("config", "at"),
    [
        (config, at)
        for config, last in zip(CONFIGS, (7, 30), strict=True)
        for at in (1, 2, 3, 5, 7, 12, 21, 30)
        if at <= last
    ],
)
def test_wherever_it_runs_out_the_result_is_the_same(tiny_llama, short_of_memory, config, at):
    settings = {"method": "wanda", "config": CONFIGS[config]}
    model, said = tiny_llama(vocab_size=64), []
    _, expected = pruned(model, **settings)
    passes = short_of_memory(at)
    _, report = pruned(model, said, **settings)
    assert sum(size > 2 for size in passes) == at
    assert said == [CALIBRATION.format(4, 2)]
    for one, two in zip(report.layers, expected.layers, strict=True):
        assert one.relative_error == pytest.approx(two.relative_error, rel=1e-3)
        assert one.zeros == two.zeros


def test_a_reconstruction_takes_windows_one_by_one(tiny_llama, short_of_memory):
    """So its steps, and all that follows from them, do not depend on how many are asked for at a time."""
    settings = {"method": "wanda", "config": MAIHTConfig(reconstruction_epochs=1)}
    model, said = tiny_llama(vocab_size=64), []
    expected, _ = pruned(model, batch_size=1, **settings)
    passes = short_of_memory(None)
    found, _ = pruned(model, said, **settings)
    assert set(passes) == {1}
    assert not said
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_single_window_that_does_not_fit_is_an_error(tiny_llama, monkeypatch):
    def forward(*_, **__):
        raise torch.OutOfMemoryError("8 GiB")

    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", forward)
    said = []
    with pytest.raises(torch.OutOfMemoryError):
        pruned(tiny_llama(vocab_size=64), said, method="wanda")
    assert said == [CALIBRATION.format(4, 2), CALIBRATION.format(2, 1)]


# ---- The solver


@pytest.fixture
def few_rows(monkeypatch):
    """Memory runs out in the solver for more rows than these."""
    real = HardThresholding.measure

    def measure(self, multiply, left, value, *into):
        if len(value) > 20:
            raise torch.OutOfMemoryError("8 GiB")
        return real(self, multiply, left, value, *into)

    monkeypatch.setattr(HardThresholding, "measure", measure)


@pytest.mark.parametrize("pattern", ["unstructured", "row", "2:4"])
def test_layers_are_solved_in_slices_of_rows(tiny_llama, few_rows, monkeypatch, pattern):
    model, said = tiny_llama(vocab_size=64), []
    settings = {"config": MAIHTConfig(iterations=10, refine_iterations=6), "pattern": pattern}
    found, report = pruned(model, said, **settings)
    monkeypatch.undo()
    expected, whole = pruned(model, **settings)
    for name in expected:
        assert torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-6), name
    assert [record.zeros for record in report.layers] == [record.zeros for record in whole.layers]
    # Each once, although there are two blocks of seven layers.
    assert len(said) == len(set(said))
    assert "solver: memory ran out for a layer of 128 x 64 weights, so it is solved in slices of 16 rows" in said


def test_where_there_is_no_smaller_way_the_error_names_the_layer(tiny_llama, monkeypatch):
    def solve(*_):
        raise torch.OutOfMemoryError("8 GiB")

    monkeypatch.setitem(METHODS, "wanda", METHODS["wanda"]._replace(solve=solve))
    with pytest.raises(RuntimeError, match=r"model\.layers\.0\.self_attn\.q_proj could not be pruned: 8 GiB"):
        pruned(tiny_llama(vocab_size=64), method="wanda")


@pytest.mark.parametrize(
    ("method", "config"),
    [(method, MAIHTConfig()) for method in METHODS] + [("maiht", MAIHTConfig(candidates="preconditioned"))],
)
def test_all_that_a_solver_holds_can_be_moved(method, config):
    solver = LayerSolver(torch.eye(16), PruningSpec.parse(method=method, config=config), torch.zeros(16, 16))
    devices = set()

    def look(value):
        if isinstance(value, torch.Tensor):
            devices.add(value.device.type)
        elif isinstance(value, list | tuple):
            [look(each) for each in value]
        elif hasattr(value, "__dict__"):
            look(list(vars(value).values()))

    look(moved((solver.gram, solver.prepared, solver.correction), "meta"))
    assert devices == {"meta"}


def test_what_an_allocator_says():
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**55, dtype=torch.uint8)
    assert is_out_of_memory(real.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))


# ---- The highest memory


def test_the_highest_memory_of_a_pruning_is_a_gpus(monkeypatch, tiny_llama):
    from maiht_lightning.models.memory import forget_peak, peak_of
    from maiht_lightning.pruning import pruner

    allocated = {"peak": 7}
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: allocated.update(peak=1))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: allocated["peak"])
    forget_peak(torch.device("cpu"))
    assert allocated["peak"] == 7
    assert peak_of(torch.device("cpu")) == 0
    forget_peak(torch.device("cuda"))
    assert peak_of(torch.device("cuda")) == 1

    allocated["peak"] = 9
    for name, function in (("forget_peak", forget_peak), ("peak_of", peak_of)):
        monkeypatch.setattr(pruner, name, lambda device, function=function: function(torch.device("cuda")))
    found = pruner.prune(tiny_llama(vocab_size=64), WINDOWS, sparsity=0.5, config="fast", progress=False)
    assert found.peak_memory_bytes == 1
