"""Presets in whole prunings: what they add up to, by every way in, and what a failure leaves behind."""

import json
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file
from torch import nn

from helpers.byte_model import byte_tokenizer, same_weights, save_folder
from helpers.counts import assert_total_is
from helpers.own_module import NoTokenizer, OwnModule, trainer
from maiht_lightning import MAIHTPruning
from maiht_lightning.capture import sublayers
from maiht_lightning.capture.grams import add_gram
from maiht_lightning.cli import main
from maiht_lightning.data.calibration import CalibrationSource
from maiht_lightning.data.python_docs import PythonDocsCalibration
from maiht_lightning.evaluation.evaluation import Evaluation
from maiht_lightning.models.blocks import find_blocks, find_linears, weight_of
from maiht_lightning.models.loading import load_model
from maiht_lightning.pruning import block_pruner
from maiht_lightning.pruning.block_pruner import PruningError
from maiht_lightning.pruning.journal import read_records
from maiht_lightning.pruning.pruner import prune
from maiht_lightning.solvers import METHODS, LayerSolver, MAIHTConfig, PruningSpec, resolve_config
from maiht_lightning.solvers.config import PRESETS

WINDOWS = torch.randint(64, (6, 12), generator=torch.Generator().manual_seed(0))
# Few steps of everything, so that tests are quick.
QUICK = MAIHTConfig(
    candidates="preconditioned",
    iterations=6,
    refine_iterations=3,
    sublayers=True,
    dense_targets=0.5,
    reconstruction_epochs=1,
    reconstruction_rate=0.02,
)
STAGES = {
    "layers alone": replace(QUICK, sublayers=False, dense_targets=0.0, reconstruction_epochs=0),
    "sublayers": replace(QUICK, dense_targets=0.0, reconstruction_epochs=0),
    "dense targets": replace(QUICK, reconstruction_epochs=0),
    "reconstruction alone": replace(QUICK, sublayers=False, dense_targets=0.0),
    "all": QUICK,
}


@pytest.fixture
def make(tiny_llama):
    return lambda **more: tiny_llama(
        vocab_size=64, **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, **more}
    )


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model, before):
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def weights_of_block(model, index):
    return {f"model.layers.{index}.{name}.weight" for name in find_linears(find_blocks(model).modules[index])}


# ---- What a preset is


def test_what_the_presets_switch_on():
    paper, fast, balanced, best = (PRESETS[name] for name in ("paper", "fast", "balanced", "best"))
    assert paper == MAIHTConfig()
    assert not paper.has_dense_stream
    assert (fast.candidates, fast.sublayers, fast.has_dense_stream) == ("preconditioned", False, False)
    assert (balanced.candidates, balanced.sublayers, balanced.reconstruction_epochs) == ("preconditioned", True, 1)
    assert 0 < balanced.dense_targets <= 1
    # What is trained afterwards has as many zeros in every layer.
    assert {preset.allocation for preset in PRESETS.values()} == {"uniform"}
    # Each has more of what the one before it has.
    assert replace(balanced, sublayers=False, dense_targets=0.0, reconstruction_epochs=0) == fast
    assert best.reconstruction_epochs > balanced.reconstruction_epochs
    assert best.iterations > balanced.iterations
    assert best.rescaling_epochs > balanced.rescaling_epochs == 0
    more = "iterations", "refine_iterations", "reconstruction_epochs", "rescaling_epochs"
    steps = {name: getattr(balanced, name) for name in more}
    assert replace(best, **steps) == balanced


@pytest.mark.parametrize("method", METHODS)
def test_the_default(method):
    expected = PRESETS["balanced" if method == "maiht" else "paper"]
    assert resolve_config(None, method) == expected
    assert PruningSpec.parse(method=method).config == expected
    assert MAIHTPruning(method=method).spec.config == expected


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("balanced", {}),
        ("balanced,reconstruction_epochs=2", {"reconstruction_epochs": 2}),
        ("balanced, sublayers=false , dense_targets=0", {"sublayers": False, "dense_targets": 0}),
        ("balanced,allocation=owl,memory_budget=none,mu=1e-3", {"allocation": "owl", "mu": 0.001}),
    ],
)
def test_what_stands_after_a_presets_name_differs_from_it(text, changes):
    expected = replace(PRESETS["balanced"], **changes)
    assert resolve_config(text) == MAIHTPruning(config=text).spec.config == expected
    found, wanted = (config.identity() for config in (resolve_config(text), expected))
    assert found == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("balancd,mu=1", "did you mean balanced"),
        ("balanced,epochs", "such as reconstruction_epochs=1, but found 'epochs'"),
        ("balanced,sublayer=true", "found 'sublayer=true': did you mean sublayers"),
        ("balanced,", "but found ''"),
        ("balanced,mu=much", "mu must be a value such as 0.1, but found 'much'"),
        ("balanced,mu=-1", "mu must be a finite number"),
        ("balanced,allocation=deep", "allocation must be one of uniform"),
        ("paper,dense_targets=0.5", "needs sublayers"),
    ],
)
def test_changes_of_a_preset_that_cannot_be_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        MAIHTPruning(config=text)


@pytest.mark.parametrize("method", ["aiht", "iht"])
@pytest.mark.parametrize("config", ["fast", "balanced", "best"])
def test_presets_that_are_not_for_a_method_are_refused_at_once(method, config):
    with pytest.raises(ValueError, match="candidates = 'preconditioned' is for method 'maiht'"):
        MAIHTPruning(method=method, config=config)


def test_identities_of_older_journals_are_those_of_the_published_setting():
    """A journal that was begun before there were these settings goes on."""
    older = {
        "mu",
        "iterations",
        "refine_iterations",
        "step_scale",
        "precision",
        "tolerance",
        "memory_budget",
        "keep_zeros",
    }
    assert PruningSpec.parse(config="paper").identity()["config"].keys() == older
    newer = {"candidates", "sublayers", "dense_targets", "reconstruction_epochs", "rescaling_epochs"}
    assert PruningSpec.parse(config="best").identity()["config"].keys() == older | newer
    identities = [json.dumps(PruningSpec.parse(config=name).identity()) for name in PRESETS]
    assert len(set(identities)) == len(PRESETS)


# ---- Whole models


@pytest.mark.parametrize("name", STAGES)
def test_each_part_is_what_it_says(make, name):
    """Against the same in few words: whole forward passes of both models, one group after the other."""
    config = replace(STAGES[name], reconstruction_epochs=0)
    # Heads that share keys and values return nearly the same from random weights: rounding would decide which of two
    # inputs of the output projection stays.
    model, other, dense = (make(num_key_value_heads=4) for _ in range(3))
    prune(model, WINDOWS, config=config, progress=False)
    for path, found, wanted in plainly_pruned(other, dense, model, config):
        assert (found == 0).eq(wanted == 0).float().mean() > 0.995, path
        torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-4, msg=lambda text, p=path: f"{p}: {text}")


def plainly_pruned(model, dense, pruned, config):
    """Paths, and weights as they were pruned and as hooks in whole forward passes have them.

    Each group stands on what came before it in `pruned`, so that a support in which rounding has swapped two entries
    does not change all that comes after it.
    """
    blocks = [find_blocks(each).modules for each in (model, dense, pruned)]
    for index, (block, other, done) in enumerate(zip(*blocks, strict=True)):
        names = list(find_linears(block))
        groups = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]
        groups += [["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
        for group in groups if config.sublayers else [names]:
            seen = inputs_of(model, block, group), inputs_of(dense, other, group)
            for name in group:
                ours, theirs = (inputs[name] for inputs in seen)
                solver = LayerSolver(
                    ours.T @ ours,
                    PruningSpec.parse(config=config),
                    ours.T @ (theirs - ours) if config.dense_targets else None,
                )
                wanted = solver.prune(find_linears(block)[name].weight.data).weight
                yield f"{index}.{name}", find_linears(done)[name].weight.data, wanted
            for name in group:
                find_linears(block)[name].weight.data.copy_(find_linears(done)[name].weight.data)


def inputs_of(model, block, names):
    found, linears = {name: [] for name in names}, find_linears(block)
    handles = [
        linears[name].register_forward_pre_hook(lambda _, args, name=name: found[name].append(args[0].flatten(0, -2)))
        for name in names
    ]
    with torch.no_grad():
        for tokens in WINDOWS:
            model(input_ids=tokens[None])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(inputs).double() for name, inputs in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.5), ("row", 0.3), ("2:4", 0.5)])
@pytest.mark.parametrize("preset", PRESETS)
def test_zeros_are_exact_and_presets_differ(make, preset, pattern, sparsity):
    model, other = make(num_hidden_layers=2), make(num_hidden_layers=2)
    report = prune(model, WINDOWS, config=preset, pattern=pattern, sparsity=sparsity, progress=False)
    for record in report.layers:
        weight = model.get_submodule(record.name).weight
        assert record.zeros == int((weight == 0).sum())
        assert (record.block_error is not None) == (preset in ("balanced", "best"))
    assert report.sparsity == pytest.approx(sparsity, abs=0.04)
    prune(other, WINDOWS, config="paper", pattern=pattern, sparsity=sparsity, progress=False)
    assert bool(changed(model, state(other))) == (preset != "paper")


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "admm", "magnitude"])
def test_every_method_takes_what_is_done_beyond_the_layer(make, method):
    model, other = make(), make()
    config = replace(QUICK, candidates="gradient")
    report = prune(model, WINDOWS, method=method, config=config, progress=False)
    assert all(2 * record.zeros == record.shape[0] * record.shape[1] for record in report.layers)
    assert all(record.block_error is not None for record in report.layers)
    prune(other, WINDOWS, method=method, progress=False)
    assert changed(model, state(other))


@pytest.mark.parametrize("config", ["paper", QUICK], ids=["paper", "all parts"])
def test_compiled_blocks_are_pruned_as_others(make, config):
    compiled, plain = make(), make()
    for block in find_blocks(compiled).modules:
        block.compile(backend="eager")
    with torch.no_grad():
        compiled(WINDOWS[:1])
    prune(compiled, WINDOWS, config=config, progress=False)
    prune(plain, WINDOWS, config=config, progress=False)
    assert same_weights(compiled, plain)


def test_works_in_inference_mode(make):
    model, other = make(num_hidden_layers=2), make(num_hidden_layers=2)
    with torch.inference_mode():
        prune(model, WINDOWS, config=QUICK, progress=False)
    prune(other, WINDOWS, config=QUICK, progress=False)
    assert changed(model, state(other)) == set()
    model(input_ids=WINDOWS, labels=WINDOWS).loss.backward()


def runs_of_a_layer(model, **settings):
    """How often the first block's k_proj runs while a model is pruned, in the pruned model and the dense one."""
    linear, counted = find_blocks(model).modules[0].self_attn.k_proj, [0]

    class Counted(type(linear)):
        def forward(self, x):
            counted[0] += 1
            return super().forward(x)

    # Copies of the block, such as the dense one, have the class as well.
    linear.__class__ = Counted
    config = STAGES[settings.pop("parts")]
    # So few that none is held out, and training lowers the error.
    report = prune(model, WINDOWS[:3], config=config, progress=False, **settings)
    linear.__class__ = nn.Linear
    if config.reconstruction_epochs:
        before, after = report.layers[0].block_error
        assert after < before
    return counted[0]


@pytest.mark.parametrize("parts", ["sublayers", "dense targets", "all"])
def test_what_is_kept_of_a_block_while_it_is_pruned_changes_no_weight(make, monkeypatch, parts):
    kept, anew = make(), make()
    once = runs_of_a_layer(kept, parts=parts, hidden_states="device")
    # Nothing is kept without room, and nothing beside hidden states that were sent to the disk.
    monkeypatch.setattr("maiht_lightning.pruning.pruner.has_room", lambda *_, **__: False)
    assert once < runs_of_a_layer(anew, parts=parts, hidden_states="device")
    assert same_weights(kept, anew)
    monkeypatch.setattr("maiht_lightning.pruning.pruner.has_room", lambda *_, **__: True)
    on_disk = make()
    assert once < runs_of_a_layer(on_disk, parts=parts, hidden_states="disk")
    assert same_weights(kept, on_disk)


def test_what_a_block_sees_is_kept_where_there_is_room_for_both_models(make, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "maiht_lightning.pruning.pruner.has_room", lambda size, **where: asked.append((size, where)) or True
    )
    prune(make(), WINDOWS, config=QUICK, progress=False, hidden_states="device")
    # Of 6 windows of 12 tokens the inputs of o_proj, 32 numbers of 4 bytes. Of those of down_proj, 48 numbers, the
    # dense block's alone: the pruned one is trained before it is passed.
    attention, mlp = 6 * 12 * 32 * 4, 6 * 12 * 48 * 4
    in_a_block = [attention, 2 * attention, 2 * attention + mlp]
    assert [size for size, _ in asked] == 3 * in_a_block
    asked.clear()
    prune(make(), WINDOWS, config=STAGES["dense targets"], progress=False, hidden_states="device")
    assert [size for size, _ in asked] == 3 * [*in_a_block[:2], 2 * attention + mlp, 2 * attention + 2 * mlp]
    asked.clear()
    prune(make(), WINDOWS, config=STAGES["sublayers"], progress=False, hidden_states="device")
    assert [size for size, _ in asked] == 3 * [attention, attention + mlp]
    assert all(where["device"] == torch.device("cpu") and where["working"] > 0 for _, where in asked)


def test_zeros_are_kept_through_all_parts(make):
    model = make()
    prune(model, WINDOWS, method="magnitude", sparsity=0.3, progress=False)
    zeros = {name: tensor == 0 for name, tensor in model.state_dict().items() if name.endswith("_proj.weight")}
    prune(model, WINDOWS, sparsity=0.6, config=replace(QUICK, keep_zeros=True), progress=False)
    for name, before in zeros.items():
        weight = model.state_dict()[name]
        assert before.any()
        assert not weight[before].any()
        assert int((weight == 0).sum()) == int(0.6 * weight.numel())


@pytest.mark.parametrize("hidden_states", ["device", "host", "disk"])
@pytest.mark.parametrize("config", [replace(QUICK, reconstruction_epochs=0), QUICK], ids=["balanced", "best"])
def test_a_model_elsewhere_is_pruned_as_one_at_hand(make, monkeypatch, config, hidden_states):
    """On "cpu:0", which is the CPU under another name, and so another device here."""
    expected, model = make(), make()
    records = prune(expected, WINDOWS, config=config, progress=False).layers
    monkeypatch.setattr("maiht_lightning.models.offload._same", lambda one, other: one == other)
    report = prune(model, WINDOWS, config=config, device="cpu:0", hidden_states=hidden_states, progress=False)
    assert [(r.name, r.zeros, r.block_error) for r in report.layers] == [
        (r.name, r.zeros, r.block_error) for r in records
    ]
    assert changed(model, state(expected)) == set()


@pytest.mark.slow
@pytest.mark.parametrize("config", [replace(QUICK, reconstruction_epochs=0), QUICK], ids=["balanced", "best"])
def test_blocks_on_disk_are_pruned_as_in_memory(make, tmp_path, config):
    make().save_pretrained(tmp_path / "dense")
    expected, model = make(), load_model(str(tmp_path / "dense"), blocks_on_disk=True)
    prune(expected, WINDOWS, config=config, progress=False)
    prune(model, WINDOWS, config=config, journal_dir=tmp_path / "journal", progress=False)
    for index in range(3):
        stored = load_file(tmp_path / "journal" / f"block_{index:05d}.safetensors")
        for name, linear in find_linears(find_blocks(expected).modules[index]).items():
            assert torch.equal(stored[name], weight_of(linear)), name
    with torch.no_grad():
        assert torch.equal(model(input_ids=WINDOWS).logits, expected(input_ids=WINDOWS).logits)


# ---- The journal, and what a failure leaves behind


class Stopped(Exception):
    pass


def stop_at(block):
    def stop(records):
        if records[0].block == block:
            raise Stopped

    return stop


@pytest.mark.parametrize("config", [replace(QUICK, reconstruction_epochs=0), QUICK], ids=["balanced", "best"])
@pytest.mark.parametrize("at", [0, 1])
def test_a_pruning_that_is_cut_off_resumes_to_the_same_bits(make, tmp_path, config, at):
    whole, first, second = make(), make(), make()
    expected = prune(whole, WINDOWS, config=config, progress=False)
    with pytest.raises(Stopped):
        prune(first, WINDOWS, config=config, journal_dir=tmp_path / "journal", on_block=stop_at(at), progress=False)
    report = prune(second, WINDOWS, config=config, journal_dir=tmp_path / "journal", progress=False)
    assert report.resumed == at + 1
    assert changed(second, state(whole)) == set()
    without_seconds = [
        [(r.name, r.zeros, r.relative_error, r.objective, r.block_error) for r in records]
        for records in (expected.layers, report.layers, read_records(tmp_path / "journal"))
    ]
    assert without_seconds[0] == without_seconds[1] == without_seconds[2]
    assert [path.name for path in tmp_path.iterdir()] == ["journal"]


@pytest.mark.parametrize("config", [replace(QUICK, reconstruction_epochs=0), QUICK], ids=["balanced", "best"])
def test_a_partly_pruned_model_is_refused_where_the_dense_one_is_needed(make, tmp_path, config):
    model, folder = make(), tmp_path / "journal"
    with pytest.raises(Stopped):
        prune(model, WINDOWS, config=config, journal_dir=folder, on_block=stop_at(0), progress=False)
    before, files = state(model), {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=r"partly pruned already.*the dense one is needed.*load it again"):
        prune(model, WINDOWS, config=config, journal_dir=folder, progress=False)
    assert changed(model, before) == set()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert [path.name for path in tmp_path.iterdir()] == ["journal"]


def test_without_a_dense_stream_a_partly_pruned_model_goes_on(make, tmp_path):
    config, whole, model = STAGES["sublayers"], make(), make()
    prune(whole, WINDOWS, config=config, progress=False)
    with pytest.raises(Stopped):
        prune(model, WINDOWS, config=config, journal_dir=tmp_path / "journal", on_block=stop_at(1), progress=False)
    report = prune(model, WINDOWS, config=config, journal_dir=tmp_path / "journal", progress=False)
    assert report.resumed == 2
    assert changed(model, state(whole)) == set()


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("failing", [7 + 1, 7 + 4, 7 + 7])
def test_a_failing_layer_leaves_its_block_as_it_was(make, monkeypatch, name, failing):
    """Also where layers before it in the same block were pruned already."""
    model, calls, original = make(), [], LayerSolver.prune
    before = state(model)

    def fail(self, weight, *pattern):
        calls.append(weight)
        if len(calls) == failing:
            raise FloatingPointError("x")
        return original(self, weight, *pattern)

    monkeypatch.setattr(LayerSolver, "prune", fail)
    with pytest.raises(PruningError, match=r"^model\.layers\.1\.[\w.]+ could not be pruned: x"):
        prune(model, WINDOWS, config=STAGES[name], progress=False)
    assert changed(model, before) == weights_of_block(model, 0)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.OutOfMemoryError("no memory left")])
def test_a_reconstruction_that_fails_leaves_its_block_as_it_was(make, monkeypatch, error):
    model, original, calls = make(), block_pruner.reconstruct, []
    before = state(model)

    def fail(block, *arguments, **settings):
        result = original(block, *arguments, **settings)
        calls.append(block)
        if len(calls) == 2:
            raise error
        return result

    monkeypatch.setattr(block_pruner, "reconstruct", fail)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else PruningError
    with pytest.raises(expected, match="" if expected is KeyboardInterrupt else "layers.1 could not be reconstructed"):
        prune(model, WINDOWS, config=QUICK, progress=False)
    assert changed(model, before) == weights_of_block(model, 0)


# ---- Through Lightning, and from the command line


class Given(CalibrationSource):
    def windows(self, tokenizer, seqlen):
        return WINDOWS


def fit(folder, model, *others, **settings):
    """Two steps of training without a change of the weights; the callback."""
    module = OwnModule(model)
    module.tokenizer = NoTokenizer()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    defaults = {"calibration": Given(), "evaluation": Evaluation(perplexity=[]), "output_dir": str(folder / "run")}
    callback = MAIHTPruning(**{**defaults, **settings})
    trainer(callback, *others, limit_train_batches=3).fit(module)
    return callback


@pytest.mark.slow
def test_a_callback_that_is_cut_off_in_best_resumes(make, tmp_path, monkeypatch, no_figures):
    whole, first, second = make(), make(), make()
    fit(tmp_path / "whole", whole, config=QUICK)
    with monkeypatch.context() as patch:
        calls, original = [], block_pruner.reconstruct

        def fail(*arguments, **settings):
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("no memory left")
            return original(*arguments, **settings)

        patch.setattr(block_pruner, "reconstruct", fail)
        with pytest.raises(
            PruningError,
            match=r"layers\.1 could not be reconstructed: no memory left.*reconstruction_epochs = 0 leaves",
        ):
            fit(tmp_path, first, config=QUICK)
    callback = fit(tmp_path, second, config=QUICK)
    assert callback.report.resumed == 1
    assert changed(second, state(whole)) == set()


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["whole", "in place", "blocks"])
def test_a_compiled_model_is_pruned_within_its_training_as_it_is_otherwise(make, tmp_path, no_figures, compiled):
    class Still(OwnModule):
        """Steps of no length: a compiled backward pass rounds otherwise, which would settle near-ties otherwise."""

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    found = []
    for name in (compiled, "not"):
        model = trained = make()
        if name == "whole":
            trained = torch.compile(model, backend="eager")
        for module in {"in place": [model], "blocks": find_blocks(model).modules}.get(name, []):
            module.compile(backend="eager")
        callback = MAIHTPruning(
            config=QUICK,
            prune_at="step:2",
            calibration=WINDOWS,
            evaluation=Evaluation(perplexity={"own": WINDOWS}),
            output_dir=str(tmp_path / name),
        )
        torch.manual_seed(0)
        module = Still(trained)
        trainer(callback, default_root_dir=tmp_path).fit(module)
        assert module.steps > 2
        found.append({stage: result.perplexity["own"] for stage, result in callback.summary.stages.items()})
        assert callback.report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert list(found[0]) == ["dense", "pruned", "finetuned"]


@pytest.mark.parametrize(("epochs", "batches"), [(0, 3), (1, 1)])
def test_windows_that_pass_one_by_one_are_multiplied_together(make, monkeypatch, epochs, batches):
    """Six windows, two in a batch where blocks are not trained."""
    seen = []

    def watch(gram, tokens, buffer):
        seen.append(len(tokens))
        add_gram(gram, tokens, buffer)

    monkeypatch.setattr(sublayers, "add_gram", watch)
    prune(make(), WINDOWS, config=replace(QUICK, reconstruction_epochs=epochs), batch_size=2, progress=False)
    assert seen == [WINDOWS.numel() // batches] * batches * 4 * 3  # groups, blocks


@pytest.mark.slow
def test_several_steps_keep_their_zeros_with_the_default(make, tmp_path, no_figures):
    """A later step's dense model is the sparse one that was trained: zeros stay through all that is done with it."""

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            seen.append({n: t == 0 for n, t in pl_module.net["lm"].state_dict().items() if n.endswith("_proj.weight")})

    seen, model = [], make()
    callback = fit(tmp_path, model, Look(), prune_at={"step:1": 0.3, "step:2": 0.5, "end": 0.6})
    assert callback.spec.config == PRESETS["balanced"]
    now = {name: tensor == 0 for name, tensor in model.state_dict().items() if name.endswith("_proj.weight")}
    for sparsity, before, after in zip((0.3, 0.5, 0.6), [*seen[1:], None], [*seen[2:], now, now], strict=False):
        if before is None:
            continue
        for name, zeros in before.items():
            assert not (zeros & ~after[name]).any()
        assert_total_is(sparsity, [(int(zeros.sum()), zeros.numel()) for zeros in before.values()])
    assert_total_is(0.6, [(int(zeros.sum()), zeros.numel()) for zeros in now.values()])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "config"),
    [
        ([], PRESETS["balanced"]),
        (["--pruning.config", "best"], PRESETS["best"]),
        (["--pruning.config", "best,reconstruction_epochs=1"], replace(PRESETS["best"], reconstruction_epochs=1)),
        (["--pruning.config", "paper"], PRESETS["paper"]),
        (["--pruning.method", "wanda"], PRESETS["paper"]),
        (
            [
                *["--pruning.config.candidates", "preconditioned", "--pruning.config.iterations", "6"],
                *["--pruning.config.refine_iterations", "3", "--pruning.config.sublayers", "true"],
                *["--pruning.config.dense_targets", "0.3", "--pruning.config.reconstruction_epochs", "1"],
                *["--pruning.config.reconstruction_rate", "0.02"],
            ],
            replace(QUICK, dense_targets=0.3),
        ),
        (
            ["--pruning.config", "{candidates: preconditioned, sublayers: true, dense_targets: 0.3, mu: 0.2}"],
            MAIHTConfig(candidates="preconditioned", sublayers=True, dense_targets=0.3, mu=0.2),
        ),
    ],
    ids=["default", "best", "changed", "paper", "wanda", "one by one", "as one"],
)
def test_from_the_command_line(tmp_path, monkeypatch, no_figures, options, config):
    monkeypatch.chdir(tmp_path)
    save_folder(tmp_path / "dense")
    main(
        [
            *["prune", "--model.name_or_path", "dense", "--data", "PythonDocsDataModule", "--output_dir", "out"],
            *["--pruning.calibration", "PythonDocsCalibration", "--pruning.calibration.samples", "5"],
            *["--pruning.calibration.seqlen", "24", "--pruning.evaluation.perplexity", "[]"],
            *["--trainer.accelerator", "cpu", "--trainer.logger", "false", *options],
        ]
    )
    found = json.loads((tmp_path / "out" / "journal" / "settings.json").read_text())["config"]
    assert found == config.identity()
    expected = load_model("dense", torch.float32)
    windows = PythonDocsCalibration(5, 24, 0).windows(byte_tokenizer(), 128)
    method = "wanda" if "wanda" in options else "maiht"
    prune(expected, windows, method=method, config=config, progress=False)
    assert same_weights(load_model("out/model", torch.float32), expected)


def test_targets_without_sublayers_are_refused_on_the_command_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(
            [
                *["prune", "--pruning.config.dense_targets", "0.3", "--model.name_or_path", "x"],
                *["--data", "PythonDocsDataModule"],
            ]
        )
    assert stopped.value.code == 2
    assert "dense_targets = 0.3 needs sublayers = True" in " ".join(capsys.readouterr().err.split())
