"""Each setting of a configuration file is seen in what `maiht prune --config FILE` makes of a model."""

import gzip
import json
from dataclasses import replace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.byte_model import byte_tokenizer, llama_config, same_weights, save_folder, watching
from helpers.sharp_model import perplexity_by_definition
from helpers.small_task import questions, write_boolq
from maiht_lightning import C4Calibration, MAIHTConfig, load_compact, prune
from maiht_lightning.cli import main
from maiht_lightning.data.python_docs import PythonDocsCalibration
from maiht_lightning.data.windows import evaluation_windows

CONFIG = MAIHTConfig(
    mu=0.3, iterations=12, refine_iterations=3, step_scale=0.7, precision="float64", tolerance=0.3, keep_zeros=True
)
FOX = "The quick brown fox jumps over the lazy dog. " * 9


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A model whose linear layers have some zeros already, any ones."""
    path = save_folder(tmp_path_factory.mktemp("dense"))
    model = load(path)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("_proj.weight"):
                weight.mul_(torch.rand(weight.shape, generator=generator) > 0.2)
    model.save_pretrained(path)
    return path


@pytest.fixture
def run(dense, tmp_path, monkeypatch):
    """A function that writes a file with these settings of the pruning and runs a command with it, in `out`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("maiht_lightning.reporting.recorder.draw_figures", lambda *_: {})

    def run(pruning, *options, command="prune", **sections):
        trainer = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
        pruning = {"evaluation": {"perplexity": []}, **pruning}
        config = {"model": {"name_or_path": str(dense)}, "pruning": pruning, "trainer": trainer, **sections}
        if command == "prune":
            config["data"] = "PythonDocsDataModule"
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        # A test may run with one file after another.
        main([command, "--config", "run.yaml", "--output_dir", "out", "--fresh", *options])
        return tmp_path / "out"

    return run


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def pruned(path, windows, *, blocks=2, **settings):
    """What `prune` itself makes of the model, or of its first blocks."""
    model = load(path)
    del model.model.layers[blocks:]
    prune(model, windows, progress=False, **settings)
    return model


def docs(samples=5, seqlen=24, seed=3):
    return {"class_path": "PythonDocsCalibration", "init_args": {"samples": samples, "seqlen": seqlen, "seed": seed}}


def docs_windows(samples=5, seqlen=24, seed=3):
    return PythonDocsCalibration(samples, seqlen, seed).windows(byte_tokenizer(), 128)


@pytest.mark.slow
def test_method_pattern_sparsity_solver_and_windows_decide_the_weights(run, dense):
    out = run(
        {
            "method": "aiht",
            "pattern": "row",
            "sparsity": 0.3,
            "config": {name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__},
            "calibration": docs(),
        }
    )
    settings = {"method": "aiht", "pattern": "row", "sparsity": 0.3, "config": CONFIG}
    found = load(out / "model")
    assert same_weights(found, pruned(dense, docs_windows(), **settings))
    # None of them could have been left out: with the default the first block is another one already.
    left_out = {
        name: {name: value} for name, value in (("method", "maiht"), ("pattern", "unstructured"), ("sparsity", 0.5))
    }
    for name in ("mu", "iterations", "refine_iterations", "step_scale", "precision", "tolerance", "keep_zeros"):
        left_out[name] = {"config": replace(CONFIG, **{name: getattr(MAIHTConfig(), name)})}
    others = {name: (docs_windows(), {**settings, **change}) for name, change in left_out.items()}
    others |= {
        "samples": (docs_windows(samples=64), settings),
        "seqlen": (docs_windows(seqlen=256)[:, :128], settings),
        "seed": (docs_windows(seed=0), settings),
    }
    del found.model.layers[1:]
    equal = [name for name, (w, given) in others.items() if same_weights(found, pruned(dense, w, blocks=1, **given))]
    assert equal == []


@pytest.fixture
def small_c4(tmp_path, monkeypatch):
    (tmp_path / "data" / "c4").mkdir(parents=True)
    with gzip.open(tmp_path / "data" / "c4" / "train.jsonl.gz", "wt") as file:
        for i in range(9):
            file.write(json.dumps({"text": f"Document {i}, " + f"which says {i * i} and {i**3}. " * (i + 1)}) + "\n")
    monkeypatch.setenv("MAIHT_DATA_DIR", str(tmp_path / "data"))


@pytest.mark.slow
def test_sampling_of_c4_a_schedules_last_sparsity_and_groups_of_four(run, dense, small_c4):
    drawn = {"samples": 4, "seqlen": 40, "sampling": "packed", "seed": 2}
    shared = {"method": "wanda", "calibration": {"class_path": "C4Calibration", "init_args": drawn}}
    found = load(run({**shared, "prune_at": {"step:1": 0.3, "end": 0.7}}) / "model")
    windows = C4Calibration(**drawn).windows(byte_tokenizer(), 128)
    assert same_weights(found, pruned(dense, windows, method="wanda", sparsity=0.7))
    cropped = C4Calibration(**{**drawn, "sampling": "wanda"}).windows(byte_tokenizer(), 128)
    assert not same_weights(found, pruned(dense, cropped, method="wanda", sparsity=0.7))

    groups = load(run({**shared, "pattern": "2:4"}) / "model")
    assert same_weights(groups, pruned(dense, windows, method="wanda", pattern="2:4"))
    weight = groups.model.layers[1].mlp.down_proj.weight
    assert ((weight.view(len(weight), -1, 4) != 0).sum(2) <= 2).all()


def test_windows_have_the_models_own_length_where_none_is_given(run, dense):
    found = load(run({"method": "wanda", "calibration": docs(seqlen=None)}) / "model")
    windows = PythonDocsCalibration(5, None, 3).windows(byte_tokenizer(), llama_config().max_position_embeddings)
    assert windows.shape == (5, 128)
    assert same_weights(found, pruned(dense, windows, method="wanda"))


@pytest.mark.slow
def test_batches_texts_lengths_and_files(run, dense, tmp_path, monkeypatch):
    """What changes no weights: how many windows at once, where hidden states are kept, what is measured and saved."""
    (tmp_path / "fox.txt").write_text(FOX)
    pruning = {
        "method": "wanda",
        "batch_size": 4,
        "calibration": docs(),
        "hidden_states": "disk",
        "compact": True,
        "save_dense": True,
        "evaluation": {"perplexity": ["fox.txt", "python_docs"], "seqlen": 50, "max_windows": 7, "batch_size": 3},
    }
    with watching(monkeypatch, look=lambda: bool(list((tmp_path / "out").glob("hidden_states_*")))) as seen:
        out = run(pruning)
    # Four and one calibration windows once; seven windows of each text before the pruning and after it.
    measured = [(3, 50), (3, 50), (1, 50)] * 2
    assert seen.shapes == [*measured, (4, 24), (1, 24), *measured]
    assert {shape for shape, on_disk in seen.blocks if on_disk} == {(4, 24), (1, 24)}
    assert {shape for shape, on_disk in seen.blocks if not on_disk} == {(3, 50), (1, 50)}
    assert not list(out.glob("hidden_states_*"))

    text = "Tokens, or bytes: é."
    for folder in ("model", "model_dense", "model_compact"):
        tokenizer = AutoTokenizer.from_pretrained(out / folder)
        assert tokenizer(text)["input_ids"] == byte_tokenizer()(text)["input_ids"]
    assert same_weights(load(out / "model_dense"), load(dense))
    assert same_weights(load_compact(out / "model_compact"), load(out / "model"))
    stages = json.loads((out / "summary.json").read_text())["stages"]
    for stage, folder in (("dense", dense), ("pruned", out / "model")):
        model = load(folder)
        assert list(stages[stage]["perplexity"]) == ["fox.txt", "python_docs"]
        for name, value in stages[stage]["perplexity"].items():
            windows = evaluation_windows(name, byte_tokenizer(), 50)
            assert value == pytest.approx(perplexity_by_definition(model, windows[:7]), rel=1e-5)
            assert value != pytest.approx(perplexity_by_definition(model, windows[:8]), rel=1e-3)


def test_without_them_nothing_more_is_saved_and_one_window_is_taken_at_a_time(run, monkeypatch):
    with watching(monkeypatch) as seen:
        out = run({"method": "magnitude", "calibration": docs()})
    assert seen.shapes == [(1, 24)] * 5
    assert not list(out.glob("model_*"))


@pytest.mark.parametrize(("offload", "moves"), [("none", 1), ("cpu", 0)])
def test_offload_leaves_the_model_where_it_is(run, monkeypatch, offload, moves):
    from lightning.pytorch.strategies import SingleDeviceStrategy

    moved = []
    monkeypatch.setattr(SingleDeviceStrategy, "model_to_device", lambda self: moved.append(self.root_device))
    run({"method": "magnitude", "calibration": docs(), "offload": offload})
    assert len(moved) == moves


def failed(capsys, run, *args, **kwargs):
    with pytest.raises(SystemExit) as stopped:
        run(*args, **kwargs)
    assert stopped.value.code == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_settings_that_only_show_where_they_do_not_fit(run, tmp_path, capsys):
    calibrated = {"calibration": docs()}
    assert "compact files are made of a model that is in memory" in failed(
        capsys, run, {**calibrated, "offload": "disk", "compact": True}
    )
    assert "no submodule of that name" in failed(capsys, run, {**calibrated, "model": "student"})
    assert "no model at" in failed(capsys, run, {**calibrated, "tokenizer": "./elsewhere"})
    small = {"config": {"memory_budget": 1}}
    assert "memory_budget must hold at least one row" in failed(capsys, run, {**calibrated, **small})


@pytest.mark.slow
def test_options_come_before_the_file_and_a_preset_is_found(run, dense):
    out = run(
        {"method": "aiht", "sparsity": 0.6, "pattern": "row", "config": "paper", "calibration": docs(samples=64)},
        *["--pruning.method", "sparsegpt", "--pruning.pattern", "unstructured", "--pruning.sparsity", "0.25"],
        *["--pruning.calibration.init_args.samples", "5"],
    )
    assert same_weights(load(out / "model"), pruned(dense, docs_windows(), method="sparsegpt", sparsity=0.25))


@pytest.mark.slow
def test_a_schedule_of_a_file_prunes_during_the_fit(run, dense):
    out = run(
        {"method": "wanda", "prune_at": {"step:1": 0.3, "step:2": 0.6}, "calibration": docs()},
        *["--trainer.max_steps", "3", "--trainer.limit_val_batches", "0"],
        command="fit",
        data={"class_path": "PythonDocsDataModule", "init_args": {"seqlen": 32, "batch_size": 2}},
    )
    assert {path.name for path in out.glob("journal*")} == {"journal", "journal_step_1"}
    for name in ("model", "model_finetuned"):
        weights = [w for n, w in load(out / name).named_parameters() if n.endswith("_proj.weight")]
        assert all(int((w == 0).sum()) == w.numel() * 6 // 10 for w in weights)
    assert not same_weights(load(out / "model"), load(out / "model_finetuned"))


@pytest.mark.slow
def test_tasks_their_limit_and_solved_examples(run, tmp_path, monkeypatch):
    """lm-eval asks the model about each document with both answers, after as many solved examples as asked for."""
    write_boolq(tmp_path / "data")
    monkeypatch.setenv("MAIHT_DATA_DIR", str(tmp_path / "data"))
    save_folder(tmp_path / "long", llama_config(max_position_embeddings=1024))
    evaluation = {"perplexity": [], "tasks": ["boolq"], "limit": 3, "num_fewshot": 2, "batch_size": 4}
    with questions(monkeypatch) as asked:
        out = run(
            {"method": "magnitude", "calibration": docs(), "evaluation": evaluation},
            *["--model.name_or_path", "long"],
        )
    # Before the pruning and after it, two answers for each of the three documents.
    assert [len(texts) for texts in asked] == [4, 2] * 2
    prompts = {text.rpartition("Answer:")[0] for texts in asked for text in texts}
    assert {prompt.rpartition("Of ")[2].partition(".")[0] for prompt in prompts} == {
        f"validation: number {i}" for i in range(3)
    }
    assert {prompt.count("Of train:") for prompt in prompts} == {2}
    assert list(json.loads((out / "summary.json").read_text())["stages"]["pruned"]["tasks"]) == ["boolq"]


def test_a_fit_calibrates_on_what_it_trains_on_and_calls_functions_by_their_paths(run, tmp_path, monkeypatch):
    (tmp_path / "own_metrics.py").write_text("def size(model):\n    return {'parameters': model.num_parameters()}\n")
    monkeypatch.syspath_prepend(tmp_path)
    data = {"class_path": "PythonDocsDataModule", "init_args": {"seqlen": 32, "batch_size": 2}}
    settings = {
        "calibration": "train",
        "method": "wanda",
        "evaluation": {"perplexity": [], "metrics": ["own_metrics.size"]},
    }
    folder = run(settings, "--trainer.max_steps", "3", command="fit", data=data)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["stages"]["pruned"]["metrics"] == {"parameters": load(folder / "model").num_parameters()}
    assert "<td>6, 32</td>" in (folder / "report.html").read_text()
    written = yaml.safe_load((folder / "config.yaml").read_text())["pruning"]
    assert written["calibration"] == "train"
    assert written["evaluation"]["metrics"] == ["own_metrics.size"]
