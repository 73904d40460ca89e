"""MAIHTPruning in somebody's own script: what it does, what it refuses, what it leaves behind."""

import copy
import csv
import json
import math
import subprocess
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from transformers import AutoModelForCausalLM

from helpers.own_module import NoTokenizer, OwnModule, Windows, trainer
from helpers.sharp_model import perplexity_by_definition
from helpers.wandb_file import artifact_files, read_run
from helpers.warm import python
from maiht_lightning import MAIHTPruning
from maiht_lightning.callbacks import verification
from maiht_lightning.models.sparsity import count_zeros, measured_sparsity
from maiht_lightning.pruning.pruner import prune_model
from maiht_lightning.solvers.config import PRESETS

LAYERS = 14
# As by default, but for the number of steps.
FEW_STEPS = replace(PRESETS["balanced"], iterations=6, refine_iterations=4)


@pytest.fixture
def module(sharp_llama):
    module = OwnModule(sharp_llama(hidden_size=32, intermediate_size=64).train())
    module.tokenizer = NoTokenizer()
    return module


def pruning(tmp_path, **settings):
    settings = {"config": FEW_STEPS, **settings}
    return MAIHTPruning(calibration=Windows(), output_dir=str(tmp_path / "run"), **settings)


class Copy(Callback):
    """Copies the model as trained; stands before MAIHTPruning."""

    def on_train_end(self, trainer, pl_module):
        self.dense = copy.deepcopy(pl_module.net["lm"])


def weights(model):
    """The weights (out, in) of the decoder blocks' linear layers by name, without the package's help."""
    return {name: weight for name, weight in model.named_parameters() if name.endswith("_proj.weight")}


@torch.no_grad()
def errors_by_definition(dense, pruned):
    """‖X(W − W0)ᵀ‖² / ‖X W0ᵀ‖² of each layer, X (tokens, in) its inputs behind pruned blocks, in its dense block."""
    model, found = copy.deepcopy(dense).double().eval(), {}
    for index, block in enumerate(model.model.layers):
        solved = {name: linear for name, linear in block.named_modules() if name.endswith("_proj")}
        inputs = {name: [] for name in solved}
        hooks = [
            linear.register_forward_hook(lambda _, given, __, seen=inputs[name]: seen.append(given[0].flatten(0, 1)))
            for name, linear in solved.items()
        ]
        model(input_ids=Windows().windows(None, 0), use_cache=False)
        for hook in hooks:
            hook.remove()
        for name, linear in solved.items():
            path = f"model.layers.{index}.{name}"
            x, after = torch.cat(inputs[name]), pruned.get_submodule(path).weight.double()
            found[path] = float((x @ (after - linear.weight).T).square().sum() / (x @ linear.weight.T).square().sum())
            linear.weight.copy_(after)
    return found


@pytest.mark.parametrize(
    ("settings", "sparsity"),
    [
        ({"sparsity": 0.6}, 0.6),
        ({"sparsity": 0.7, "method": "wanda", "pattern": "row"}, 0.7),
        ({"pattern": "1:4", "method": "sparsegpt"}, 0.75),
    ],
)
def test_a_fit_ends_pruned_saved_and_measured(module, text, no_figures, tmp_path, settings, sparsity):
    copied, model = Copy(), module.net["lm"]
    trainer(copied, pruning(tmp_path, **{"config": "paper", **settings})).fit(module)
    assert module.steps == 4

    zeros = 0
    for weight in weights(model).values():
        zero, (out, inputs) = weight == 0, weight.shape
        zeros += int(zero.sum())
        if "1:4" in settings.values():
            assert (zero.view(out, inputs // 4, 4).sum(2) == 3).all()
        elif "row" in settings.values():
            assert (zero.sum(1) == math.floor(sparsity * inputs)).all()
        else:
            assert zero.sum() == math.floor(sparsity * weight.numel())
            assert len(zero.sum(1).unique()) > 1
    run = tmp_path / "run"
    reloaded = AutoModelForCausalLM.from_pretrained(run / "model")
    assert all(torch.equal(a, b) for a, b in zip(reloaded.parameters(), model.parameters(), strict=True))

    summary = json.loads((run / "summary.json").read_text())
    assert summary["measured_sparsity"] == zeros / sum(weight.numel() for weight in weights(model).values())
    assert summary["measured_sparsity"] == pytest.approx(sparsity, abs=0.02)  # rows are short
    assert set(summary["seconds"]) == {"fit", "capture", "solve", "journal", "evaluate"}
    assert summary["peak_memory_bytes"] > 0
    measured = {stage: found["perplexity"]["random"] for stage, found in summary["stages"].items()}
    expected = {
        "dense": perplexity_by_definition(copied.dense, text),
        "pruned": perplexity_by_definition(reloaded, text),
    }
    assert measured == pytest.approx(expected, rel=1e-5)
    assert expected["dense"] != pytest.approx(expected["pruned"], rel=0.01)

    with (run / "layers.csv").open() as file:
        rows = {row.pop("name"): row for row in csv.DictReader(file)}
    errors = errors_by_definition(copied.dense, model)
    assert list(rows) == list(errors)
    assert len(rows) == LAYERS
    for name, row in rows.items():
        weight = model.get_submodule(name).weight
        assert row["block"] == name.split(".")[2]
        assert (int(row["out"]), int(row["in"])) == weight.shape
        assert float(row["sparsity"]) == int((weight == 0).sum()) / weight.numel()
        assert float(row["relative_error"]) == pytest.approx(errors[name], rel=1e-3)
        # 50 thresholding iterations, the exact support, and 30 steps of refining.
        assert int(row["iterations"]) == (0 if "method" in settings else 81)


def test_gradients_and_moments_are_freed_before_pruning(module, text, no_figures, tmp_path, monkeypatch):
    held = {"given_back": 0}

    def give_back():
        # Nothing is given back that is still in use.
        held["given_back"] += not any(optimizer.state for optimizer in module.trainer.optimizers)

    def look(model, *args, **kwargs):
        held["gradients"] = [p.grad for p in module.parameters() if p.grad is not None]
        held["moments"] = [len(optimizer.state) for optimizer in module.trainer.optimizers]
        return prune_model(model, *args, **kwargs)

    monkeypatch.setattr("maiht_lightning.callbacks.pruning_run.prune_model", look)
    monkeypatch.setattr("maiht_lightning.callbacks.pruning.release_memory", give_back)
    trainer(pruning(tmp_path)).fit(module)
    assert held == {"gradients": [], "moments": [0], "given_back": 1}


def test_when_a_fit_ends_zeros_are_counted_once(module, text, no_figures, tmp_path, monkeypatch):
    """The Trainer has moved the model to the CPU by then: its gigabytes should be read no oftener."""
    counted = []
    monkeypatch.setattr(verification, "count_zeros", lambda model: counted.append(model) or count_zeros(model))
    trainer(pruning(tmp_path)).fit(module)
    assert len(counted) == 1


def test_bf16_true(module, text, no_figures, tmp_path):
    trainer(pruning(tmp_path), precision="bf16-true").fit(module)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert measured_sparsity(count_zeros(module.net["lm"])) == 0.5


@pytest.mark.slow
def test_without_output_dir_a_fresh_folder_is_made_each_time(module, text, no_figures, tmp_path):
    for _ in range(2):
        trainer(MAIHTPruning(calibration=Windows(), config=FEW_STEPS), default_root_dir=tmp_path).fit(module)
    assert len(list(tmp_path.glob("runs/*/model/config.json"))) == 2


@pytest.mark.slow
def test_csv_logger_gets_blocks_and_stages(module, text, no_figures, no_prediction, tmp_path):
    logger = CSVLogger(tmp_path / "csv")
    trainer(pruning(tmp_path), logger=logger).fit(module)
    with open(logger.log_dir + "/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["prune/block"] for row in rows if row["prune/block"]] == ["0", "1"]
    values = {key: value for row in rows for key, value in row.items() if value}
    assert float(values["pruned/sparsity"]) == 0.5
    stages = json.loads((tmp_path / "run" / "summary.json").read_text())["stages"]
    for stage in ("dense", "pruned"):
        assert float(values[f"{stage}/perplexity/random"]) == stages[stage]["perplexity"]["random"]


@pytest.mark.slow
def test_offline_wandb_run_holds_curves_stages_table_and_settings(module, text, no_prediction, tmp_path):
    import wandb

    (tmp_path / "run").mkdir()
    logger = WandbLogger(save_dir=tmp_path / "run", offline=True)
    trainer(pruning(tmp_path, compact=True), logger=logger, log_every_n_steps=1).fit(module)
    wandb.finish()
    history, config = read_run(tmp_path / "run")
    assert "compact.json" in artifact_files(tmp_path / "run", "model")
    assert config["pruned_model"]["class"] == "LlamaForCausalLM"
    blocks = [row for row in history if "prune/relative_error" in row]
    assert [row["prune/block"] for row in blocks] == [0, 1]
    with (tmp_path / "run" / "layers.csv").open() as file:
        errors = {row["name"]: float(row["relative_error"]) for row in csv.DictReader(file)}
    for row in blocks:
        name = f"model.layers.{row['prune/block']}.mlp.down_proj"
        assert row["prune/relative_error/mlp.down_proj"] == pytest.approx(errors[name])
    assert [row["prune/layers.nrows"] for row in history if "prune/layers.nrows" in row] == [LAYERS]
    metrics = {key: value for row in history for key, value in row.items()}
    for name in ("relative_error", "objective", "stages", "kept"):
        assert metrics[f"figures/{name}._type"].startswith("image")
        assert metrics[f"figures/{name}.width"] > 500
    assert config["environment"]["torch"] == torch.__version__
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert metrics["seconds/solve"] == summary["seconds"]["solve"]
    for stage in ("dense", "pruned"):
        assert metrics[f"{stage}/perplexity/random"] == summary["stages"][stage]["perplexity"]["random"]
    assert metrics["pruned/sparsity"] == 0.5
    assert config["pruned_with"]["method"] == "maiht"
    assert config["pruned_with"]["calibration"] == {"class": "Windows", "windows": [6, 32]}


@pytest.mark.slow
def test_a_logger_that_fails_costs_nothing(module, text, no_figures, no_prediction, tmp_path):
    class Broken(CSVLogger):
        def log_metrics(self, metrics, step=None):
            if any(key.startswith(("prune", "dense")) for key in metrics):
                raise ConnectionError("no network")

    with pytest.warns(UserWarning, match="could not log the pruning"):
        trainer(pruning(tmp_path), logger=Broken(tmp_path)).fit(module)
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


@pytest.mark.slow
def test_several_loggers_at_once(module, text, no_prediction, tmp_path):
    import wandb

    (tmp_path / "run").mkdir()
    csv_logger = CSVLogger(tmp_path / "csv")
    loggers = [WandbLogger(save_dir=tmp_path / "run", offline=True), csv_logger]
    trainer(pruning(tmp_path), logger=loggers).fit(module)
    wandb.finish()
    history, _ = read_run(tmp_path / "run")
    of_wandb = {key: value for row in history for key, value in row.items()}
    with open(csv_logger.log_dir + "/metrics.csv") as file:
        of_csv = {key: value for row in csv.DictReader(file) for key, value in row.items() if value}
    for key in ("dense/perplexity/random", "pruned/perplexity/random", "pruned/sparsity", "seconds/solve"):
        assert float(of_csv[key]) == pytest.approx(of_wandb[key], rel=1e-6)


def test_a_page_that_cannot_be_drawn_costs_nothing(module, text, tmp_path, monkeypatch):
    monkeypatch.setattr("maiht_lightning.reporting.recorder.draw_figures", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="figures failed: ZeroDivisionError"):
        trainer(pruning(tmp_path)).fit(module)
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.slow
def test_works_where_wandb_is_not_installed(tmp_path):
    """In a process of its own, in which wandb cannot be imported."""
    program = """
        import sys
        sys.modules["wandb"] = None
        import pytest
        sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "TESTS", "-k", "csv_logger or costs_nothing"]))
    """.replace("TESTS", str(Path(__file__)))
    done = subprocess.run([*python(), "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "3 passed" in done.stdout


@pytest.mark.parametrize("averaging", [EMAWeightAveraging, lambda: StochasticWeightAveraging(swa_lrs=1e-3)])
def test_averaging_after_pruning_is_refused(module, text, tmp_path, averaging):
    with pytest.raises(MisconfigurationException, match="put it before MAIHTPruning"):
        trainer(pruning(tmp_path), averaging()).fit(module)
    assert module.steps == 0


def test_averaging_before_pruning_is_fine(module, text, no_figures, tmp_path):
    trainer(EMAWeightAveraging(), pruning(tmp_path)).fit(module)
    assert measured_sparsity(count_zeros(module.net["lm"])) == 0.5


def test_a_callback_that_brings_weights_back_is_found_out(module, text, no_figures, tmp_path):
    class Undo(Callback):
        def on_train_end(self, trainer, pl_module):
            pl_module.net["lm"].model.layers[1].mlp.up_proj.weight.data += 1

    with pytest.raises(MisconfigurationException, match=r"model\.layers\.1\.mlp\.up_proj first"):
        trainer(pruning(tmp_path), Undo()).fit(module)


def test_a_fit_with_nothing_to_do_says_that_it_did_not_prune(module, text, tmp_path):
    with pytest.raises(MisconfigurationException, match="ended without pruning"):
        trainer(pruning(tmp_path), max_epochs=0).fit(module)


def test_two_models_must_be_told_apart(module, text, no_figures, tiny_llama, tmp_path):
    module.net["teacher"] = tiny_llama(vocab_size=64, seed=1)
    with pytest.raises(MisconfigurationException, match=r"several: net\.lm, net\.teacher"):
        trainer(pruning(tmp_path)).fit(module)
    with pytest.raises(MisconfigurationException, match="no submodule of that name"):
        trainer(pruning(tmp_path, model="student")).fit(module)
    assert module.steps == 0
    trainer(pruning(tmp_path, model="net.lm")).fit(module)
    assert measured_sparsity(count_zeros(module.net["lm"])) == 0.5
    assert sum(count.zeros for count in count_zeros(module.net["teacher"])) == 0


def test_what_cannot_be_pruned_is_refused_before_training(module, text, tmp_path):
    class Short(Windows):
        def windows(self, tokenizer, seqlen):
            raise ValueError("the text is too short")

    class Foreign(Windows):
        def windows(self, tokenizer, seqlen):
            return torch.full((2, 8), 64)

    for callback, message in (
        (MAIHTPruning(calibration=Short()), "too short"),
        (MAIHTPruning(calibration=Foreign()), "another model's tokenizer"),
        (MAIHTPruning(calibration=Windows(), pattern="2:7"), "divisible by 7"),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            trainer(callback, default_root_dir=tmp_path).fit(module)
    module.net["lm"] = torch.nn.Linear(4, 4)
    with pytest.raises(MisconfigurationException, match=r"must hold one Hugging Face model.*found none"):
        trainer(pruning(tmp_path)).fit(module)
    assert module.steps == 0
    assert not (tmp_path / "run" / "model").exists()


def test_settings_are_checked_when_written():
    with pytest.raises(ValueError, match="method must be one of"):
        MAIHTPruning(method="foo")
    with pytest.raises(ValueError, match="sparsity"):
        MAIHTPruning(sparsity=1.5)
    with pytest.raises(ValueError, match="batch_size"):
        MAIHTPruning(batch_size=0)
    with pytest.raises(TypeError, match="config"):
        MAIHTPruning(config={"mu": 0.1})
    with pytest.raises(ValueError, match="offload must be none, cpu or disk, but found 'gpu'"):
        MAIHTPruning(offload="gpu")
    with pytest.raises(ValueError, match="hidden_states must be one of auto, device, host, disk, but found 'ram'"):
        MAIHTPruning(hidden_states="ram")
