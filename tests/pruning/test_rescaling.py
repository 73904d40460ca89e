"""Factors learnt through the whole model: their gradient, what is reported and left alone, that they do no harm."""

import copy
import gc
import weakref
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call
from torch.nn.functional import kl_div

from helpers.families import FAMILIES, VOCABULARY, make
from maiht_lightning import MAIHTPruning
from maiht_lightning.capture.block_inputs import logits_from_hidden, record_inputs
from maiht_lightning.models.blocks import find_blocks, find_linears, weight_of
from maiht_lightning.models.loading import load_model
from maiht_lightning.models.offload import BlockLoader
from maiht_lightning.pruning import rescaling
from maiht_lightning.pruning.block_pruner import PruningError
from maiht_lightning.pruning.journal import RESCALING, drop_weights
from maiht_lightning.pruning.pruner import prune
from maiht_lightning.pruning.rescaling import Rescaling, Window, multiplied
from maiht_lightning.pruning.streams import Streams
from maiht_lightning.solvers import MAIHTConfig
from maiht_lightning.solvers.config import HELD_OUT

WINDOWS = torch.randint(0, VOCABULARY, (2 * HELD_OUT + 2, 12), generator=torch.Generator().manual_seed(0))
HELD = [0, HELD_OUT, 2 * HELD_OUT]
CONFIG = MAIHTConfig(rescaling_epochs=2)


class Case:
    """A model that has lost the smaller half of each weight, and what the dense one's last block returns."""

    def __init__(self, name="llama", dtype=torch.float32, windows=WINDOWS):
        self.dense = make(name).to(dtype)
        self.model = copy.deepcopy(self.dense)
        self.blocks = find_blocks(self.model)
        with torch.no_grad():
            for _, linear in self.blocks.linears():
                linear.weight[linear.weight.abs() < linear.weight.abs().median()] = 0
        self.tokens = list(windows.split(1))
        passed = record_inputs(self.dense, find_blocks(self.dense).modules, self.tokens)
        for block in find_blocks(self.dense).modules:
            passed.pass_through(block)
        passed.settle()
        inputs = record_inputs(self.model, self.blocks.modules, self.tokens).batches
        targets = [batch.hidden for batch in passed.batches]
        self.windows = [Window(*each) for each in zip(inputs, self.tokens, targets, strict=True)]
        self.loader = BlockLoader(self.blocks, torch.device("cpu"))
        self.rescaling = Rescaling(self.loader, partial(logits_from_hidden, self.model, self.blocks.modules))

    def with_factors(self, factors):
        """Weights by their names in the model, multiplied with the factors by the definition; differentiable."""
        parts = iter(factors.split([size for _, linear in self.blocks.linears() for size in weight_of(linear).shape]))
        weights = {}
        for path, linear in self.blocks.linears():
            rows, columns = next(parts), next(parts)
            weight = torch.diag(1 + rows) @ weight_of(linear).to(factors.dtype) @ torch.diag(1 + columns)
            weights[f"{path}.weight"] = weight if isinstance(linear, nn.Linear) else weight.T
        return weights

    def divergence(self, index, weights=None):
        """KL(dense ‖ model) of a window, a mean over its predicted tokens, with some weights exchanged."""
        window = self.tokens[index]
        with torch.no_grad():
            target = self.dense(input_ids=window).logits
        logits = functional_call(self.model, weights or {}, kwargs={"input_ids": window}).logits
        predicted = [logits[0, :-1].log_softmax(-1), target[0, :-1].log_softmax(-1)]
        return kl_div(*predicted, log_target=True, reduction="sum") / (window.shape[1] - 1)

    def state(self):
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_gradient_is_autograds_through_the_whole_model(name):
    case = Case(name, torch.float64)
    factors = 0.1 * torch.randn(len(case.rescaling.factors), generator=torch.Generator().manual_seed(1)).double()
    sought = factors.clone().requires_grad_()
    expected = case.divergence(3, case.with_factors(sought))
    (gradient,) = torch.autograd.grad(expected * (WINDOWS.shape[1] - 1), sought)
    found = case.rescaling._gradient(case.windows[3], factors)
    # The divergence itself is computed in float32.
    torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
    assert case.rescaling._divergence([case.windows[3]], factors) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_weights_multiplied_return_what_multiplied_layers_do(name):
    case = Case(name, torch.float64)
    generator = torch.Generator().manual_seed(1)
    case.rescaling.factors = 0.1 * torch.randn(len(case.rescaling.factors), generator=generator).double()
    expected = case.with_factors(case.rescaling.factors)
    for index, block in enumerate(case.blocks.modules):
        for layer, weight in case.rescaling.weights(index, block).items():
            linear = find_linears(block)[layer]
            path = f"{case.blocks.path}.{index}.{layer}.weight"
            wanted = expected[path] if isinstance(linear, nn.Linear) else expected[path].T
            torch.testing.assert_close(weight, wanted)
            assert torch.equal(weight == 0, weight_of(linear) == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_held_out_divergence_falls_and_is_the_one_reported(dtype):
    case = Case(dtype=dtype)
    before = case.state()
    start, end = case.rescaling.learn(case.windows, 2)
    rel = 1e-4 if dtype == torch.float32 else 0.02
    assert start == pytest.approx(sum(float(case.divergence(i)) for i in HELD) / len(HELD), rel=rel)
    with torch.no_grad():
        weights = {name: weight.to(dtype) for name, weight in case.with_factors(case.rescaling.factors.float()).items()}
        assert end == pytest.approx(sum(float(case.divergence(i, weights)) for i in HELD) / len(HELD), rel=rel)
    assert end < start
    # The model itself is left to the caller.
    assert all(torch.equal(tensor, before[name]) for name, tensor in case.state().items())


def test_factors_stay_0_where_the_divergence_does_not_fall():
    """Windows to learn from that ask for something else than those held out."""
    case = Case()
    wrong = [w if i in HELD else w._replace(target=-w.target) for i, w in enumerate(case.windows)]
    start, end = case.rescaling.learn(wrong, 3)
    assert end == start
    assert not case.rescaling.factors.any()


def test_the_same_twice_and_another_with_another_order():
    found = []
    for seed in (1, 1, 2):
        case = Case()
        case.rescaling.learn(case.windows, 1, seed=seed)
        found.append(case.rescaling.factors)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_nothing_else_is_touched():
    case = Case()
    for number, parameter in enumerate(case.model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    wanted = [parameter.requires_grad for parameter in case.model.parameters()]
    hidden = [window.batch.hidden.clone() for window in case.windows]
    random = torch.get_rng_state()
    with torch.no_grad():
        start, end = case.rescaling.learn(case.windows, 1)
        assert not torch.is_grad_enabled()
    assert end < start
    assert [parameter.requires_grad for parameter in case.model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in case.model.parameters())
    assert all(torch.equal(w.batch.hidden, before) for w, before in zip(case.windows, hidden, strict=True))
    assert not any(w.batch.hidden.requires_grad or w.target.requires_grad for w in case.windows)
    assert not any("forward" in vars(linear) for _, linear in case.blocks.linears())
    assert torch.equal(torch.get_rng_state(), random)


def test_small_factors_reach_layers_of_half_precision():
    """1.003 is 1 in bfloat16, in which neighbouring numbers are 0.8 % apart."""
    case = Case(dtype=torch.bfloat16)
    block = case.blocks.modules[0]
    x = torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    linear = block.self_attn.q_proj
    small, none = torch.full((32,), 0.003), torch.zeros(32)
    expected = x.double() @ linear.weight.double().T
    for factors in ((small, none), (none, small)):
        with torch.no_grad(), multiplied(block, {"self_attn.q_proj": factors}):
            ratio = (linear(x).double() * expected).sum() / expected.square().sum()
        assert ratio == pytest.approx(1.003, abs=4e-4)


def test_the_rate_rises_and_falls():
    rates = [rescaling._schedule((step + 0.5) / 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.05, rel=0.01)
    assert max(rates) == rates[10] > 0.97
    assert all(one > other for one, other in pairwise(rates[10:]))
    assert 0 < rates[-1] < 0.001
    assert rescaling._schedule(0.5) == pytest.approx(0.5)


# ---- In whole prunings


def pruned(model, config=CONFIG, windows=WINDOWS, **settings):
    return prune(model, windows, method="magnitude", config=config, progress=False, **settings)


def test_a_pruning_is_rescaled_and_says_so():
    model, plain = make("llama"), make("llama")
    report = pruned(model)
    unscaled = pruned(plain, MAIHTConfig())
    before, after = report.divergence
    assert 0 < after < before
    assert unscaled.divergence is None
    assert unscaled.rescaling_seconds == 0 < report.rescaling_seconds
    assert report.seconds == report.capture_seconds + report.solve_seconds + report.rescaling_seconds
    dense, found = make("llama"), []
    with torch.no_grad():
        for one in (plain, model):
            both = [m(input_ids=WINDOWS[HELD]).logits[:, :-1].log_softmax(-1) for m in (one, dense)]
            found.append(float(kl_div(*both, log_target=True, reduction="sum")) / both[0][..., 0].numel())
    assert found == pytest.approx([before, after], rel=1e-4)
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(one == 0, other == 0), name
        assert torch.equal(one, other) != name.endswith("_proj.weight"), name
    assert all(r.zeros == int((model.get_submodule(r.name).weight == 0).sum()) for r in report.layers)


def test_rows_and_columns_alone_differ():
    """What is learnt is a product of two vectors for each layer, beside its weight."""
    model, plain = make("llama"), make("llama")
    pruned(model)
    pruned(plain, MAIHTConfig())
    for path, linear in find_blocks(model).linears():
        ratio = linear.weight / plain.get_submodule(path).weight
        logs = ratio.log()
        # A matrix of sums rᵢ + cⱼ is known from those entries that are there: least squares leave nothing.
        rows, columns = torch.nonzero(~logs.isnan(), as_tuple=True)
        entries = torch.arange(len(rows))
        design = torch.zeros(len(rows), sum(logs.shape), dtype=torch.float64)
        design[entries, rows] = design[entries, len(logs) + columns] = 1
        found = logs[rows, columns].double()[:, None]
        solution = torch.linalg.lstsq(design, found, driver="gelsd").solution
        assert found.abs().max() > 1e-3
        torch.testing.assert_close(design @ solution, found, rtol=0, atol=2e-6)


@pytest.mark.parametrize("epochs", [1, 3])
def test_as_many_epochs_as_asked_for(epochs, monkeypatch):
    seen = []
    monkeypatch.setattr(rescaling, "_schedule", lambda progress: seen.append(progress) or 0.1)
    pruned(make("llama"), MAIHTConfig(rescaling_epochs=epochs))
    steps = epochs * (len(WINDOWS) - len(HELD))
    assert seen == pytest.approx([(step + 0.5) / steps for step in range(steps)])


def test_windows_go_one_by_one(monkeypatch):
    sizes, original = [], Rescaling._gradient
    monkeypatch.setattr(Rescaling, "_gradient", lambda self, w, f: sizes.append(len(w.tokens)) or original(self, w, f))
    pruned(make("llama"), batch_size=4)
    assert set(sizes) == {1}


def test_after_reconstruction_and_with_dense_targets():
    config = "best,iterations=6,refine_iterations=3,reconstruction_epochs=1,rescaling_epochs=2"
    report = prune(make("llama"), WINDOWS, sparsity=0.7, config=config, progress=False)
    # Nothing is left to be learnt of a model with random weights.
    assert report.divergence[1] <= report.divergence[0]
    assert any(record.block_error[1] < record.block_error[0] for record in report.layers)


def test_windows_of_several_lengths():
    batches = [torch.randint(0, VOCABULARY, (6, n), generator=torch.Generator().manual_seed(n)) for n in (12, 9)]
    report = pruned(make("llama"), windows=batches)
    assert report.divergence[1] < report.divergence[0]


@pytest.mark.parametrize("storage", ["host", "disk"])
def test_where_hidden_states_are_changes_nothing(storage, tmp_path):
    expected, model = make("llama"), make("llama")
    pruned(expected)
    pruned(model, hidden_states=storage, journal_dir=tmp_path / "journal")
    assert_same(model, expected)


@pytest.mark.parametrize("storage", ["device", "host", "disk"])
def test_a_model_elsewhere_is_rescaled_as_one_at_hand(storage, monkeypatch):
    """On "cpu:0", which is the CPU under another name, and so another device here."""
    expected, model = make("llama"), make("llama")
    report = pruned(expected)
    monkeypatch.setattr("maiht_lightning.models.offload._same", lambda one, other: one == other)
    for block in model.model.layers:
        block.mlp.up_proj.register_forward_pre_hook(lambda *_: pytest.fail("the model itself runs"))
    found = pruned(model, device="cpu:0", hidden_states=storage)
    assert found.divergence == report.divergence
    assert_same(model, expected)


@pytest.mark.parametrize("storage", ["device", "host"])
def test_the_pruned_models_hidden_states_are_gone_before_there_are_others(storage, monkeypatch):
    seen, original = [], Streams.finish

    def finish(self):
        seen.extend(weakref.ref(batch.hidden) for batch in self._inputs.batches)
        targets = original(self)
        gc.collect()
        assert [ref() for ref in seen] == [None] * len(WINDOWS)
        return targets

    monkeypatch.setattr(Streams, "finish", finish)
    pruned(make("llama"), hidden_states=storage)
    assert seen


def test_callers_in_inference_mode():
    expected, model = make("llama"), make("llama")
    pruned(expected)
    with torch.inference_mode():
        pruned(model)
    assert_same(model, expected)


def assert_same(model, expected):
    for (name, one), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other), name


# ---- The journal


def test_a_pruning_that_dies_while_it_learns_goes_on(tmp_path, monkeypatch):
    expected, model = make("llama"), make("llama")
    report = pruned(expected)
    calls, original = [], Rescaling._gradient

    def fail(self, *arguments):
        calls.append(None)
        if len(calls) == 5:
            raise RuntimeError("no memory left")
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Rescaling, "_gradient", fail)
        with pytest.raises(PruningError, match=r"rescaled: no memory left.*rescaling_epochs = 0 leaves"):
            pruned(model, journal_dir=tmp_path / "journal")
    plain = make("llama")
    pruned(plain, MAIHTConfig())
    assert_same(model, plain)
    model = make("llama")
    resumed = pruned(model, journal_dir=tmp_path / "journal")
    assert resumed.resumed == 3
    assert resumed.divergence == report.divergence
    assert_same(model, expected)


def test_factors_come_from_the_journal(tmp_path, monkeypatch):
    expected, model = make("llama"), make("llama")
    report = pruned(expected, journal_dir=tmp_path / "journal")
    monkeypatch.setattr(Rescaling, "learn", None)
    again = pruned(model, journal_dir=tmp_path / "journal")
    assert (again.resumed, again.divergence) == (3, report.divergence)
    assert_same(model, expected)


@pytest.mark.parametrize("damage", ["cut", "changed", "shorter", "another block"])
def test_factors_that_are_not_those_written_are_learnt_again(tmp_path, damage):
    expected, model = make("llama"), make("llama")
    report = pruned(expected, journal_dir=tmp_path / "journal")
    file = tmp_path / "journal" / RESCALING
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "changed":
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
    elif damage == "shorter":
        save_file({"factors": load_file(file)["factors"][:-1].clone()}, file)
    else:
        # Pruned anew, a block might be another one.
        (tmp_path / "journal" / "block_00001.safetensors").unlink()
    again = pruned(model, journal_dir=tmp_path / "journal")
    assert again.divergence == report.divergence
    assert_same(model, expected)
    assert load_file(file)["factors"].any()


def test_a_new_block_takes_the_factors_with_it(tmp_path):
    folder = tmp_path / "journal"
    pruned(make("llama"), journal_dir=folder)
    (folder / "block_00001.safetensors").unlink()

    def look(records):
        # Before it the blocks are those of the journal, and after it there is a new one.
        assert (folder / RESCALING).exists() == (records[0].block == 0)

    pruned(make("llama"), journal_dir=folder, on_block=look)
    assert (folder / RESCALING).exists()


def test_dropped_weights_take_the_factors_with_them(tmp_path):
    folder = tmp_path / "journal"
    pruned(make("llama"), journal_dir=folder)
    assert (folder / RESCALING).exists()
    drop_weights(folder)
    assert not (folder / RESCALING).exists()
    assert (folder / "records.json").exists()


def test_epochs_are_part_of_what_a_journal_is_of(tmp_path):
    pruned(make("llama"), journal_dir=tmp_path / "journal")
    pruned(make("llama"), MAIHTConfig(rescaling_epochs=1), journal_dir=tmp_path / "journal")
    assert (tmp_path / "journal.1").exists()


# ---- What is refused


@pytest.mark.parametrize("epochs", [-1, 0.5, "1"])
def test_epochs_are_a_number_of_passes(epochs):
    with pytest.raises(ValueError, match="rescaling_epochs must be a whole number, at least 0"):
        MAIHTConfig(rescaling_epochs=epochs)


def test_models_on_disk_are_refused(tmp_path):
    make("llama").save_pretrained(tmp_path / "dense")
    model = load_model(str(tmp_path / "dense"), blocks_on_disk=True)
    with pytest.raises(ValueError, match=r"q_proj is on disk.*rescaling_epochs = 0 leaves"):
        pruned(model, journal_dir=tmp_path / "journal")
    assert not (tmp_path / "journal").exists()
    pruned(model, replace(CONFIG, rescaling_epochs=0), journal_dir=tmp_path / "journal")


def test_a_preset_can_do_without():
    assert MAIHTPruning(config="best").spec.config.rescaling_epochs > 0
    assert MAIHTPruning(config="best,rescaling_epochs=0").spec.config.rescaling_epochs == 0
