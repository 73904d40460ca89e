"""The scripts that measure, and the configurations, each from end to end with a tiny model and small texts."""

import csv
import json
import os
import shutil
import subprocess
from math import floor
from pathlib import Path
from statistics import fmean

import pytest
import torch
import yaml

from helpers.byte_model import byte_tokenizer, llama_config, save_folder
from helpers.small_texts import load_script, run_script, write_texts
from helpers.warm import WARM_CHILDREN, executable, python
from maiht_lightning import C4Calibration, MAIHTConfig, prune, prune_layer
from maiht_lightning.cli import main as maiht
from maiht_lightning.data.windows import evaluation_windows
from maiht_lightning.evaluation.perplexity import perplexity
from maiht_lightning.models.loading import load_model
from maiht_lightning.models.sparsity import count_zeros, measured_sparsity

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with its tokenizer."""
    return save_folder(tmp_path_factory.mktemp("model") / "tiny", llama_config(max_position_embeddings=512))


@pytest.fixture
def here(texts, tmp_path, monkeypatch):
    """An empty folder to work in, and the small texts."""
    monkeypatch.setenv("MAIHT_DATA_DIR", str(texts))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def measured_alone(source, *, samples, seqlen, seed=0, max_windows=None, **pruning):
    """Perplexity before and after a pruning, and its report, without any script."""
    model, tokenizer = load_model(str(source)), byte_tokenizer()
    windows = C4Calibration(samples, seqlen, "packed", seed).windows(tokenizer, seqlen)
    test = evaluation_windows("wikitext2", tokenizer, seqlen, max_windows)
    before = perplexity(model, test, progress=False)
    report = prune(model, windows, batch_size=4, progress=False, **pruning)
    return before, perplexity(model, test, progress=False), report


# ---- reproduce_paper.py

PAPER = ["--preset", "smollm2", "--samples", "6", "--seqlen", "48", "--max-windows", "5", "--tasks"]


@pytest.fixture
def reproduce(here, folder, monkeypatch):
    """Runs the script and returns `results.json`."""
    script = load_script("reproduce_paper", monkeypatch)

    def run(*options):
        run_script(script, monkeypatch, *PAPER, "--model", folder, "--output_dir", "paper", *options)
        return json.loads(Path("paper/results.json").read_text())

    return run


def test_the_papers_comparison_measures_what_single_calls_do(reproduce, folder, here):
    found = reproduce("--methods", "wanda", "sparsegpt", "--settings", "0.6", "2:4", "--seeds", "0", "3")
    asked = {("wanda", "0.6"): ("row", 0.6), ("sparsegpt", "0.6"): ("unstructured", 0.6)}
    asked |= {(method, "2:4"): ("2:4", 0.5) for method in ("wanda", "sparsegpt")}
    assert [(run["method"], run["setting"], run["seed"]) for run in found["runs"]] == [
        (method, setting, seed) for seed in (0, 3) for setting in ("0.6", "2:4") for method in ("wanda", "sparsegpt")
    ]
    assert len({json.dumps(run["perplexity"]) for run in found["runs"]}) == 8
    for run in found["runs"]:
        pattern, sparsity = asked[run["method"], run["setting"]]
        settings = {"pattern": pattern, "sparsity": sparsity, "method": run["method"]}
        dense, pruned, report = measured_alone(
            folder, samples=6, seqlen=48, seed=run["seed"], max_windows=5, **settings
        )
        assert (run["pattern"], run["sparsity"]) == (pattern, sparsity)
        assert found["dense"]["perplexity"]["wikitext2"] == pytest.approx(dense, rel=1e-5)
        assert run["perplexity"]["wikitext2"] == pytest.approx(pruned, rel=1e-4)
        assert run["mean_relative_error"] == pytest.approx(fmean(r.relative_error for r in report.layers), rel=1e-3)
        assert run["measured_sparsity"] == report.sparsity
    # What is committed names no folder of this machine.
    assert found["model"] == folder.name
    assert str(folder.parent) not in json.dumps(found)
    assert str(here) not in json.dumps(found)
    assert found["environments"][0]["torch"] == torch.__version__
    assert found["settings"]["calibration"] == {"samples": 6, "seqlen": 48, "sampling": "packed"}


def test_the_papers_comparison_goes_on_where_it_was(reproduce, monkeypatch, capsys):
    import reproduce_paper

    first = reproduce("--methods", "wanda", "--settings", "0.5")
    stamps = {path: path.stat().st_mtime_ns for path in Path("paper/0.5-wanda-0").iterdir()}
    # The next one dies in its second block.
    whole = reproduce_paper.prune

    def dying(model, *args, **options):
        def die(records):
            if records[0].block == 1:
                raise KeyboardInterrupt

        return whole(model, *args, on_block=die, **options)

    monkeypatch.setattr(reproduce_paper, "prune", dying)
    with pytest.raises(KeyboardInterrupt):
        reproduce("--methods", "wanda", "magnitude", "--settings", "0.5")
    block = Path("paper/0.5-magnitude-0/journal/block_00000.safetensors")
    written = block.stat().st_mtime_ns
    seen = []

    def watched(*args, **options):
        seen.append(block.stat().st_mtime_ns)
        report = whole(*args, **options)
        seen.append(block.stat().st_mtime_ns)
        return report

    monkeypatch.setattr(reproduce_paper, "prune", watched)
    second = reproduce("--methods", "wanda", "magnitude", "--settings", "0.5")
    assert seen == [written, written]  # one pruning, whose first block came from the journal
    assert second["runs"][0] == first["runs"][0]
    assert [run["method"] for run in second["runs"]] == ["wanda", "magnitude"]
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    # All is there: nothing is loaded any more.
    monkeypatch.setattr(reproduce_paper, "load_model", lambda *_: pytest.fail("a model was loaded"))
    assert reproduce("--methods", "wanda", "magnitude", "--settings", "0.5") == second
    printed = capsys.readouterr().out
    assert "| Wanda | row | 50 |" in printed
    with pytest.raises(SystemExit, match="other settings"):
        reproduce("--methods", "wanda", "--settings", "0.5", "--samples", "7")
    assert {p.name for p in Path("paper/report").iterdir()} >= {"report.html", "report.md", "perplexity.png"}


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--methods", "wand"], "method must be one of"), (["--settings", "half"], "settings are sparsities such as 0.5")],
)
def test_the_papers_comparison_refuses_bad_settings(reproduce, capsys, options, message):
    with pytest.raises(SystemExit):
        reproduce(*options)
    assert message in capsys.readouterr().err
    assert not Path("paper").exists()


# ---- compare_methods.py


def test_methods_are_compared_from_the_same_windows(here, folder, monkeypatch, capsys):
    script = load_script("compare_methods", monkeypatch)
    options = ["--samples", 6, "--seqlen", 48, "--max-windows", 5, "--sparsity", 0.6, "--seed", 3]
    entries = {"maiht": "unstructured", "wanda": "unstructured", "wanda:row": "row"}
    run_script(script, monkeypatch, "--model", folder, "--methods", *entries, *options, "--json", "out.json")
    results = json.loads(Path("out.json").read_text())["results"]
    assert list(results) == ["dense", *entries]
    printed = capsys.readouterr().out
    for entry, pattern in entries.items():
        dense, pruned, report = measured_alone(
            folder,
            samples=6,
            seqlen=48,
            seed=3,
            max_windows=5,
            sparsity=0.6,
            pattern=pattern,
            method=entry.partition(":")[0],
        )
        assert results["dense"]["perplexity"] == pytest.approx(dense, rel=1e-5)
        assert results[entry]["perplexity"] == pytest.approx(pruned, rel=1e-4)
        assert results[entry]["zeros"] == report.sparsity
        assert results[entry]["mean_relative_error"] == pytest.approx(
            fmean(record.relative_error for record in report.layers), rel=1e-3
        )
        assert f"{results[entry]['perplexity']:.3f}" in printed


# ---- Benchmarks

SMALL = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize("preset", ["paper", "balanced"])
def test_a_models_shape_is_benchmarked_phase_by_phase(here, monkeypatch, capsys, preset):
    script = load_script("bench_llama7b", monkeypatch)
    monkeypatch.setitem(script.SHAPES, "7b", (64, 160, 3, 4, 2, 500))
    options = ["--blocks", 2, "--samples", 3, "--seqlen", 32, "--batch-size", 2, "--dtype", "float32"]
    config = f"{preset},iterations=4,refine_iterations=2"
    run_script(script, monkeypatch, *options, "--config", config, "--output", "out.json")
    found = json.loads(Path("out.json").read_text())
    assert (found["blocks"], found["sparsity"]) == (2, 0.5)
    assert found["job"]["batch_size"] == 2
    # 2 · 4 + 1 products of the iterations, 2 of the refining and 2 of the error, for q, o, k, v, gate, up, down.
    layers = [(64, 64)] * 2 + [(32, 64)] * 2 + [(160, 64)] * 2 + [(64, 160)]
    products = 2 * 4 + 1 + 2 + 2
    if preset == "paper":
        assert found["phases"]["solve"]["flops"] == pytest.approx(
            2 * products * sum(2 * out * inputs**2 for out, inputs in layers), rel=1e-6
        )
    assert list(found["phases"]) == ["capture", "solve", *(["reconstruct"] if preset == "balanced" else [])]
    printed = capsys.readouterr().out
    for name, phase in found["phases"].items():
        assert phase["seconds"] > 0
        assert set(phase["predicted_seconds"]) == {"local", "a100-80gb", "h100-80gb"}
        rate = found["measured_device"]["flops_fp32"]
        assert phase["fraction_of_measured_peak"] == pytest.approx(phase["flops"] / phase["seconds"] / rate)
        assert f"{name}: {phase['seconds']:.2f} s" in printed


def test_solvers_are_timed_beside_bare_products(here, monkeypatch, capsys):
    script = load_script("bench_solvers", monkeypatch)
    monkeypatch.setitem(script.LLAMA_7B, "attention", (48, 64))
    options = ["--only-llama7b", "--llama7b", "attention", "--repeats", "1", "--methods", "maiht", "admm", "magnitude"]
    run_script(script, monkeypatch, *options, "--iterations", 12, "--refine-iterations", 5, "--json", "out.json")
    found = json.loads(Path("out.json").read_text())
    rows = {row["method"]: row for row in found["rows"]}
    assert set(rows) == {"maiht", "admm", "magnitude", "naive mAIHT"}
    assert "json" not in found["settings"]
    weight, gram = script.random_layer((48, 64), "cpu")
    config = MAIHTConfig(iterations=12, refine_iterations=5)
    bare = 2 * 48 * 64**2 * (2 * 12 + 5)
    for method in ("maiht", "admm", "magnitude"):
        alone = prune_layer(weight, gram, method=method, config=config)
        assert rows[method]["relative_error"] == pytest.approx(alone.relative_error, rel=1e-3)
    for row in rows.values():
        # The bare products' time, once from the multiple and once from the rate.
        seconds = row["seconds"] / row["times_bare_products"]
        assert seconds == pytest.approx(bare / row["product_gflops"] / 1e9)
    assert rows["naive mAIHT"]["relative_error"] == pytest.approx(rows["maiht"]["relative_error"], rel=0.02)


def test_frozen_zeros_are_timed(here, folder, monkeypatch, capsys):
    script = load_script("bench_frozen", monkeypatch)
    options = ["--batch-size", 2, "--seqlen", 16, "--sparsity", 0.6, "--steps", 2, "--json", "out.json"]
    run_script(script, monkeypatch, "--model", folder, *options)
    found = json.loads(Path("out.json").read_text())
    sizes = [count.size for count in count_zeros(load_model(str(folder)))]
    results = found["results"]
    assert results["frozen_weights"] == sum(floor(6 * size / 10) for size in sizes)
    assert 0 < results["seconds_masking"] < results["seconds_a_step"]
    assert results["share_of_a_step"] == results["seconds_masking"] / results["seconds_a_step"]
    assert found["settings"]["model"] == folder.name
    assert f"{results['share_of_a_step']:.2%}" in capsys.readouterr().out


def test_compact_files_are_timed_beside_dense_ones(here, folder, monkeypatch, capsys):
    script = load_script("bench_compact", monkeypatch)
    run_script(script, monkeypatch, "--model", folder, "--sparsity", 0.5, 0.75, "--repeats", 1, "--json", "out.json")
    rows, printed = json.loads(Path("out.json").read_text())["rows"], capsys.readouterr().out
    # A bit per weight of 16, and the values that are left.
    assert [row["share_of_dense_bytes"] for row in rows] == [1 / 16 + 1 / 2, 1 / 16 + 1 / 4]
    for row in rows:
        loaded, read = row["seconds_loading"], row["seconds_loading_and_reading"]
        assert row["times_dense_loading"] == loaded["compact"] / loaded["dense"]
        assert read["compact"] > loaded["compact"] > 0
        assert f"{row['times_dense_loading']:.2f} times as long" in printed
    with pytest.raises(SystemExit, match=r"must take at most 0\.001 times as long as dense, but found"):
        run_script(script, monkeypatch, "--model", folder, "--repeats", 1, "--at-most", 0.001)


@pytest.mark.timeout(900)  # five processes beside two busy ones
def test_spinning_threads_are_timed(here, monkeypatch, capsys):
    script = load_script("bench_spinning", monkeypatch)
    monkeypatch.setattr(script, "SHAPES", [(16, 8)])
    monkeypatch.setattr(script.sys, "executable", executable())
    run_script(script, monkeypatch, "--rounds", 1, "--threads", 1, 2, "--beside", "--json", "out.json")
    rows = json.loads(Path("out.json").read_text())["rows"]
    assert [(row["threads"], list(row["seconds"])) for row in rows] == [(1, script.SPINS[:1]), (2, script.SPINS)]
    assert all(seconds > 0 for row in rows for seconds in row["seconds"].values())
    printed = capsys.readouterr().out
    assert all(f"{seconds:.3f}" in printed for row in rows for seconds in row["seconds"].values())


def test_each_measurement_has_its_threads_and_spins(here, monkeypatch):
    script = load_script("bench_spinning", monkeypatch)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    asks = "import os; print([int(os.environ.get('GOMP_SPINCOUNT', 1)), int(os.environ['OMP_NUM_THREADS'])])"
    monkeypatch.setattr(script, "PROGRAM", asks)
    assert script.seconds(2, "3000", "paper") == [3000, 2]
    assert script.seconds(4, "default", "paper") == [1, 4]


# ---- reproduce_recovery.py


def test_the_recovery_runs_once_and_ends_in_its_figures(here, folder, monkeypatch):
    script = load_script("reproduce_recovery", monkeypatch)
    less = {
        "model.name_or_path": folder,
        "data.init_args.seqlen": 32,
        "trainer.max_steps": 2,
        "trainer.enable_progress_bar": "false",
        "pruning.calibration.init_args.samples": 4,
        "pruning.calibration.init_args.seqlen": 32,
        "pruning.evaluation.seqlen": 32,
        "pruning.evaluation.max_windows": 3,
        "sparse_finetune.max_steps": 3,
    }
    options = [str(text) for name, value in less.items() for text in (f"--{name}", value)]
    run_script(script, monkeypatch, "--output_dir", "recovery", *options)
    found = json.loads(Path("recovery/results.json").read_text())
    assert list(found) == ["text", "distillation"]
    for name, weight in (("text", 0.0), ("distillation", 0.5)):
        run, entry = Path("recovery") / name, found[name]
        stages = json.loads((run / "summary.json").read_text())["stages"]
        assert {stage: entry[stage] for stage in stages} == {n: s["perplexity"] for n, s in stages.items()}
        assert entry["settings"]["distillation"] == weight
        assert entry["settings"]["max_steps"] == 3
        counts = count_zeros(load_model(str(run / "model_finetuned")))
        assert sum(c.zeros for c in counts) == sum(floor(6 * c.size / 10) for c in counts)
        assert entry["measured_sparsity"] == sum(c.zeros for c in counts) / sum(c.size for c in counts)
    assert found["text"]["pruned"] == found["distillation"]["pruned"]
    assert found["text"]["finetuned"] != found["distillation"]["finetuned"]
    assert str(folder.parent) not in json.dumps(found)
    # Only what is unfinished is done again.
    shutil.rmtree("recovery/distillation")

    def stop(command):
        assert command[command.index("--output_dir") + 1] == "recovery/distillation"
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "maiht", stop)
    with pytest.raises(KeyboardInterrupt):
        run_script(script, monkeypatch, "--output_dir", "recovery", *options)


# ---- Configurations


def test_the_quickstarts_configuration(here, folder):
    """As scripts/quickstart.sh calls it, with another model and fewer windows to measure."""
    import wandb

    config = str(ROOT / "configs" / "quickstart.yaml")
    less = ["--model.name_or_path", str(folder), "--pruning.evaluation.max_windows", "2"]
    maiht(["fit", "--config", config, "--output_dir", "run", *less])
    wandb.finish()
    summary = json.loads(Path("run/summary.json").read_text())
    assert (summary["method"], summary["pattern"], summary["sparsity"]) == ("maiht", "unstructured", 0.5)
    assert list(summary["stages"]) == ["dense", "pruned"]
    assert summary["peak_memory_bytes"] > 0
    counts = count_zeros(load_model("run/model"))
    assert measured_sparsity(counts) == 0.5
    with Path("run/layers.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == [count.name for count in counts]
    assert list(Path("run").glob("wandb/offline-run-*"))
    script = (ROOT / "scripts" / "quickstart.sh").read_text()
    assert 'maiht fit --config configs/quickstart.yaml --model.name_or_path "$model" "$@"' in script


def test_the_papers_configuration(here, folder):
    """With a tiny model on the CPU, less text, no tasks and an optimizer that is not compiled; the rest as it is."""
    import wandb

    less = {
        "model.name_or_path": folder,
        "model.optimizer": "adamw",
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 2,
        "trainer.logger.init_args.offline": "true",
        "data.init_args.seqlen": 32,
        "pruning.calibration.init_args.samples": 4,
        "pruning.calibration.init_args.seqlen": 32,
        "pruning.evaluation.seqlen": 32,
        "pruning.evaluation.max_windows": 2,
        "pruning.evaluation.tasks": "[]",
    }
    options = [str(text) for name, value in less.items() for text in (f"--{name}", value)]
    maiht(["fit", "--config", str(ROOT / "configs" / "llama7b_wikitext2.yaml"), "--output_dir", "run", *options])
    wandb.finish()
    model = load_model("run/model", torch.bfloat16)
    assert json.loads(Path("run/model/config.json").read_text())["dtype"] == "bfloat16"
    assert measured_sparsity(count_zeros(model)) == 0.5
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert config["pruning"]["config"]["refine_iterations"] == 30
    # As the documentation says of this file: a crash while pruning loses the fine-tuning.
    assert not list(Path("run").rglob("*.ckpt"))
    assert not Path("run/model_dense").exists()
    assert not os.path.exists("lightning_logs")


@pytest.mark.slow
@pytest.mark.timeout(1800)  # three processes, beside whatever else runs
def test_killed_at_random_moments_and_resumed(tmp_path):
    """A short form of the script that kills runs."""
    command = [*python(), str(ROOT / "scripts" / "kill_test.py"), "--kills", "1"]
    variables = {**os.environ, **WARM_CHILDREN}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "1 of 1 resumed runs came to the same." in done.stdout
