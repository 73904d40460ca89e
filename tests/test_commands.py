"""`maiht evaluate`, `report` and `estimate` as a user calls them, each option; a run with tasks from end to end."""

import csv
import json
import os
import subprocess
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from transformers import AutoModelForCausalLM

from helpers.byte_model import VOCABULARY, byte_tokenizer, llama_config, save_folder, watching
from helpers.html_page import Page
from helpers.sharp_model import perplexity_by_definition
from helpers.small_task import questions, write_boolq
from helpers.wandb_file import read_run
from helpers.wandb_server import wandb_server
from helpers.warm import python
from maiht_lightning import MAIHTConfig, prune
from maiht_lightning.cli import main
from maiht_lightning.estimate.devices import SHEETS
from maiht_lightning.estimate.plan import Job, estimate
from maiht_lightning.estimate.shape import ModelShape
from maiht_lightning.evaluation.evaluation import Evaluation
from maiht_lightning.evaluation.perplexity import perplexity
from maiht_lightning.models.loading import load_model

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 40


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fox.txt").write_text(TEXT)
    return "fox.txt"


def failed(capsys, *args):
    with pytest.raises(SystemExit) as stopped:
        main(list(args))
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_evaluate_prints_and_writes_what_is_measured(tiny_folder, tokenizer, text, tmp_path, capsys, dtype):
    model = load_model(str(tiny_folder), getattr(torch, dtype))
    ids = tokenizer(TEXT)["input_ids"]
    windows = torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)
    prune(model, windows[:2], method="magnitude", sparsity=0.25, progress=False)
    model.save_pretrained("pruned")
    tokenizer.save_pretrained("pruned")

    options = ["--perplexity", f"[{text}]", "--seqlen", "64", "--dtype", dtype, "--batch_size", "4"]
    main(["evaluate", "--model", "pruned", *options, "--output", "result.json"])
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["perplexity"][text] == pytest.approx(perplexity(model, windows, progress=False), rel=1e-4)
    assert found["sparsity"] == 0.25
    printed = capsys.readouterr().out
    assert "25.0000%" in printed
    assert f"{found['perplexity'][text]:.3f}" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "/nowhere/at/all"], "no model at /nowhere/at/all"),
        (
            ["--model", "MODEL", "--perplexity", "[wikitext3]"],
            "text must be one of wikitext2, c4, python_docs, or the path of a .txt file, but found 'wikitext3'",
        ),
        # lm-eval reads all of its 14,000 task files to say what is similar.
        pytest.param(
            ["--model", "MODEL", "--perplexity", "[]", "--tasks", "[boolk]"],
            "boolk.*similar names.*boolq",
            marks=pytest.mark.slow,
        ),
        (["--model", "MODEL", "--limit", "0"], "limit"),
        (["--model", "MODEL", "--output", "not/there.json"], "output must be a file in an existing folder"),
        (
            ["--model", "MODEL", "--perplexity", "[fox.txt]", "--output", "."],
            "output must be a file in an existing folder",
        ),
        (
            ["--model", "MODEL", "--perplexity", "[fox.txt]", "--device", "abacus"],
            "device must be one that PyTorch finds here.*'abacus'",
        ),
        ([], "model"),
    ],
)
def test_evaluate_refuses_bad_input_before_it_computes(folder, text, capsys, monkeypatch, options, message):
    import re

    options = [str(folder) if option == "MODEL" else option for option in options]
    with watching(monkeypatch) as seen:
        said = failed(capsys, "evaluate", *options)
    assert re.search(message, said, re.DOTALL)
    assert "Traceback" not in said
    assert seen.shapes == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of bytes, saved in bfloat16."""
    return save_folder(tmp_path_factory.mktemp("bytes"), dtype=torch.bfloat16)


def byte_windows(seqlen, text=TEXT):
    ids = byte_tokenizer()(text)["input_ids"]
    return torch.tensor(ids[: len(ids) // seqlen * seqlen]).view(-1, seqlen)


def test_each_option_of_evaluate_is_seen_in_what_the_model_is_given(folder, text, monkeypatch, tmp_path, capsys):
    def shapes(*options):
        with watching(monkeypatch) as seen:
            main(["evaluate", "--model", str(folder), "--perplexity", f"[{text}]", *options])
        return seen.shapes

    length = len(TEXT)
    context = llama_config().max_position_embeddings
    assert shapes() == [(1, context)] * (length // context)
    assert shapes("--seqlen", "64") == [(1, 64)] * (length // 64)
    assert shapes("--seqlen", "64", "--max_windows", "3") == [(1, 64)] * 3
    assert shapes("--seqlen", "64", "--max_windows", "5", "--batch_size", "2") == [(2, 64), (2, 64), (1, 64)]
    assert shapes("--perplexity", "[]") == []
    # The same from a file, which options change.
    config = {"model": str(folder), "perplexity": [text], "seqlen": 64, "max_windows": 3, "batch_size": 3}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(config))
    with watching(monkeypatch) as seen:
        main(["evaluate", "--config", "settings.yaml", "--max_windows", "4"])
    assert seen.shapes == [(3, 64), (1, 64)]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "--config", "settings.yaml", "--seqlen", "32", "--print_config"])
    assert not stopped.value.code
    printed = yaml.safe_load(capsys.readouterr().out)
    assert {name: printed[name] for name in config} == {**config, "seqlen": 32}
    assert printed["dtype"] == "auto"


def test_evaluate_calls_functions_by_their_paths(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "my_metrics.py").write_text("def size(model):\n    return {'parameters': model.num_parameters()}\n")
    monkeypatch.syspath_prepend(tmp_path)
    options = ["--perplexity", "[]", "--metrics", "[my_metrics.size]", "--output", str(tmp_path / "found.json")]
    main(["evaluate", "--model", str(folder), *options])
    expected = load_model(str(folder)).num_parameters()
    assert json.loads((tmp_path / "found.json").read_text())["metrics"] == {"parameters": expected}
    assert "parameters" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [None, "auto", "float32", "bfloat16", "float16"])
def test_evaluate_measures_in_the_checkpoints_format_or_the_one_asked_for(folder, text, monkeypatch, tmp_path, dtype):
    used = torch.bfloat16 if dtype in (None, "auto") else getattr(torch, dtype)
    options = [] if dtype is None else ["--dtype", dtype]
    with watching(monkeypatch) as seen:
        short = ["--seqlen", "64", "--max_windows", "3", "--output", "found.json"]
        main(["evaluate", "--model", str(folder), "--perplexity", f"[{text}, python_docs]", *short, *options])
    assert set(seen.dtypes) == {used}
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["model"] == str(folder)
    assert list(found["perplexity"]) == [text, "python_docs"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=used)
    assert found["perplexity"][text] == pytest.approx(perplexity_by_definition(model, byte_windows(64)[:3]), rel=1e-4)
    other = torch.float32 if used == torch.bfloat16 else torch.bfloat16
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=other)
    assert found["perplexity"][text] != pytest.approx(perplexity_by_definition(other, byte_windows(64)[:3]), rel=1e-4)


def test_evaluate_computes_on_the_device_asked_for(folder, text, capsys):
    # Nothing can be computed on the device `meta`: the refusal shows that the model is there.
    assert "on the meta device" in failed(
        capsys, "evaluate", "--model", str(folder), "--perplexity", f"[{text}]", "--device", "meta"
    )


@pytest.mark.slow
def test_evaluate_asks_what_tasks_limit_and_num_fewshot_say(text, tmp_path, monkeypatch):
    write_boolq(tmp_path / "data")
    monkeypatch.setenv("MAIHT_DATA_DIR", str(tmp_path / "data"))
    long = save_folder(tmp_path / "long", llama_config(max_position_embeddings=1024))
    options = ["--model", str(long), "--perplexity", "[]", "--tasks", "[boolq]", "--output", "found.json"]
    for more, documents, solved in (([], 5, 0), (["--limit", "2", "--num_fewshot", "3", "--batch_size", "3"], 2, 3)):
        with questions(monkeypatch) as asked:
            main(["evaluate", *options, *more])
        prompts = [prompt.rpartition("Answer:")[0] for batch in asked for prompt in batch]
        assert len(prompts) == 2 * documents
        assert {prompt.rpartition("Of ")[2].partition(".")[0] for prompt in prompts} == {
            f"validation: number {i}" for i in range(documents)
        }
        assert {prompt.count("Of train:") for prompt in prompts} == {solved}
        assert max(map(len, asked)) == (3 if more else 1)
        found = json.loads((tmp_path / "found.json").read_text())
        assert found["tasks"]["boolq"]["acc"] * documents == pytest.approx(
            round(found["tasks"]["boolq"]["acc"] * documents)
        )
        assert found["mean_accuracy"] == found["tasks"]["boolq"]["acc"]


SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "bos_token_id": None,
    "eos_token_id": None,
}
UNCOUNTED = {
    "mixture of experts": lambda: transformers.MixtralConfig(
        **SMALL, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1, num_local_experts=4
    ),
    "state space": lambda: transformers.MambaConfig(**SMALL, state_size=4),
}


@pytest.mark.parametrize("kind", UNCOUNTED)
def test_models_whose_zeros_cannot_be_counted_are_measured(text, tmp_path, capsys, kind):
    path = save_folder(tmp_path / "model", UNCOUNTED[kind]())
    options = ["--perplexity", f"[{text}]", "--seqlen", "48", "--max_windows", "3", "--output", "found.json"]
    main(["evaluate", "--model", str(path), *options])
    found = json.loads((tmp_path / "found.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(path)
    expected = perplexity_by_definition(model, byte_windows(48)[:3])
    assert found == {"model": str(path), "perplexity": {text: pytest.approx(expected, rel=1e-4)}}
    out, err = capsys.readouterr()
    assert "zeros not counted" in " ".join(out.split())
    assert f"{found['perplexity'][text]:.3f}" in out
    assert "The zeros are not counted: " in err
    assert type(model).__name__ in err


def test_settings_of_an_evaluation_are_checked():
    for name, value in (("limit", 0), ("num_fewshot", -1), ("max_windows", 0), ("seqlen", 1), ("batch_size", 0)):
        with pytest.raises(ValueError, match=name):
            Evaluation(**{name: value})


def run_folder(folder, method, dense, pruned):
    folder.mkdir()
    stages = {"dense": {"perplexity": {"wikitext2": dense}}, "pruned": {"perplexity": {"wikitext2": pruned}}}
    summary = {"method": method, "sparsity": 0.5, "pattern": "unstructured", "measured_sparsity": 0.5}
    (folder / "summary.json").write_text(json.dumps({**summary, "stages": stages, "seconds": {"solve": 3.0}}))
    (folder / "layers.csv").write_text("name,relative_error\na,0.1\nb,0.3\n")


def test_report_puts_runs_side_by_side(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_folder(tmp_path / "a", "maiht", 29.9, 54.4)
    run_folder(tmp_path / "b", "wanda", 29.9, 80.7)
    main(["report", "a", "b", "--output_dir", "both"])
    assert {"report.md", "report.csv", "report.html", "perplexity.png"} <= {
        p.name for p in (tmp_path / "both").iterdir()
    }
    rows = list(csv.DictReader((tmp_path / "both" / "report.csv").open()))
    assert {row["method"] for row in rows} >= {"maiht", "wanda"}
    printed = capsys.readouterr().out
    assert "54.4" in printed
    assert "80.7" in printed


def test_a_report_without_a_folder_goes_to_a_fresh_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_folder(tmp_path / "a", "maiht", 29.9, 54.4)
    for _ in range(2):
        main(["report", "a"])
    printed = capsys.readouterr().out
    pages = sorted((tmp_path / "reports").glob("*/report.html"))
    assert len(pages) == 2
    for page in pages:
        assert f"Written: {page.relative_to(tmp_path)}" in printed
        assert any("54.40" in row for row in Page(page.read_text()).tables[0])


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--entity", "me", "--project", "mine"], []])
def test_a_published_report_reaches_the_server(tmp_path, options):
    """The real W&B client publishes to a server on this machine."""
    pytest.importorskip("wandb_workspaces.reports.v2")
    for name, method, found in (("a", "maiht", 54.4), ("b", "wanda", 80.7)):
        run_folder(tmp_path / name, method, 29.9, found)
        (tmp_path / name / "wandb" / f"offline-run-20250101_120000-id{name}").mkdir(parents=True)
        loggers = [True, {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"project": "theirs"}}]
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump({"trainer": {"logger": loggers}}))
    source = str(Path(__file__).parents[1] / "src")
    command = [*python(), "-m", "maiht_lightning.cli", "report", "a", "b", "--wandb", "true", *options]
    with wandb_server() as (environment, saved):
        settings = {**environment, "WANDB_ENTITY": "our-team", "PYTHONPATH": source}
        done = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, **settings}, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr[-3000:]
    entity, project = ("me", "mine") if options else ("our-team", "theirs")
    (view,) = saved
    assert (view["entityName"], view["projectName"], view["type"]) == (entity, project, "runs")
    assert view["displayName"] == "Pruning runs compared"
    (address,) = [line for line in done.stdout.splitlines() if line.startswith("Published: ")]
    assert address.startswith(f"Published: {environment['WANDB_BASE_URL']}/{entity}/{project}/reports/")
    spec = json.loads(view["spec"])
    (table,) = [block["content"] for block in spec["blocks"] if block["type"] == "markdown-block"]
    assert "54.40" in table
    assert "80.70" in table
    (grid,) = [block["metadata"] for block in spec["blocks"] if block["type"] == "panel-grid"]
    (runset,) = grid["runSets"]
    assert (runset["project"]["entityName"], runset["project"]["name"]) == (entity, project)
    assert "ida" in json.dumps(runset["filters"])
    shown = json.dumps(grid["panelBankSectionConfig"]["panels"])
    for metric in ("pruned/perplexity/wikitext2", "prune/relative_error", "prune/seconds", "prune/block"):
        assert metric in shown


# Every setting is another than the default.
JOB = Job(
    dtype="float32",
    samples=16,
    seqlen=64,
    batch_size=2,
    method="sparsegpt",
    pattern="2:8",
    sparsity=0.75,
    config=MAIHTConfig(memory_budget=20_000),
    offload="cpu",
    train_steps=3,
    train_batch_size=4,
    gradient_checkpointing=False,
    optimizer="adamw",
    eval_windows=7,
    eval_batch_size=3,
    tasks=["rte"],
    task_limit=100,
    task_batch_size=5,
)


@pytest.mark.slow
def test_each_option_of_estimate_is_seen_in_the_prediction(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--config.memory_budget", "20000"]
    for field in fields(Job):
        if field.name != "config":
            options += [f"--{field.name}", str(getattr(JOB, field.name)).lower()]
    main(["estimate", "--model", str(folder), "--gpu", "rtx4090", "--output", "found.json", *options])
    found = json.loads((tmp_path / "found.json").read_text())
    shape = ModelShape.from_source(str(folder))

    def predicted(job, gpu="rtx4090"):
        return json.loads(json.dumps(asdict(estimate(shape, job, SHEETS[gpu]))))

    expected = predicted(JOB)
    assert {key: found[key] for key in expected} == expected
    assert found["job"] == asdict(JOB)
    assert (found["model"], found["device"]["name"]) == (str(folder), "rtx4090")
    left_out = {
        field.name: replace(JOB, **{field.name: getattr(Job(), field.name)})
        for field in fields(Job)
        if field.name not in ("pattern", "sparsity")
    }
    # Quicker to count than the default method.
    left_out |= {"pattern": replace(JOB, pattern="unstructured"), "method": replace(JOB, method="magnitude")}
    assert [name for name, job in left_out.items() if predicted(job) == expected] == []
    assert predicted(JOB, "h200") != expected
    printed = " ".join(capsys.readouterr().out.split())
    for phase in expected["phases"]:
        assert f"{phase['flops'] / 1e15:.3g}" in printed
    # Operations do not depend on how many zeros there are, but what cannot be is refused.
    assert "2:8" in failed(capsys, "estimate", "--model", str(folder), "--pattern", "2:8", "--sparsity", "0.6")


@pytest.mark.parametrize(("runs", "message"), [(["nothing"], "nothing is no run's folder"), ([], "runs")])
def test_report_refuses_what_is_no_run(tmp_path, monkeypatch, capsys, runs, message):
    monkeypatch.chdir(tmp_path)
    assert message in failed(capsys, "report", *runs)


@pytest.mark.slow
def test_a_real_run_with_tasks_reports_everything(smollm2_folder, tokenizer, local_data, tmp_path, monkeypatch):
    """SmolLM2's first blocks, real text and tasks, offline W&B: data store and folder hold what is promised."""
    import wandb

    monkeypatch.chdir(tmp_path)
    model = load_model(str(smollm2_folder))
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:3], 3
    model.save_pretrained("small")
    tokenizer.save_pretrained("small")
    tasks = ["boolq", "hellaswag"]
    main(
        "prune --model.name_or_path small --data WikiText2DataModule --output_dir run --trainer.logger "
        "WandbLogger --trainer.logger.offline true --trainer.accelerator cpu --pruning.method wanda "
        "--pruning.calibration C4Calibration --pruning.calibration.samples 4 --pruning.calibration.seqlen 128 "
        "--pruning.calibration.sampling packed --pruning.evaluation.seqlen 128 --pruning.evaluation.max_windows 4 "
        f"--pruning.evaluation.tasks [{','.join(tasks)}] --pruning.evaluation.limit 6 "
        "--pruning.evaluation.batch_size 4".split()
    )
    wandb.finish()
    run = tmp_path / "run"
    stages = json.loads((run / "summary.json").read_text())["stages"]
    history, config = read_run(run)
    metrics = {key: value for row in history for key, value in row.items()}
    for name, stage in stages.items():
        assert metrics[f"{name}/perplexity/wikitext2"] == stage["perplexity"]["wikitext2"]
        assert metrics[f"{name}/mean_accuracy"] == stage["mean_accuracy"]
        assert metrics[f"{name}/mean_accuracy"] == pytest.approx(sum(stage["tasks"][t]["acc"] for t in tasks) / 2)
        for task in tasks:
            for metric, value in stage["tasks"][task].items():
                assert metrics[f"{name}/tasks/{task}/{metric}"] == value
    assert set(stages) == {"dense", "pruned"}
    assert metrics["tasks.nrows"] == 3  # boolq acc, hellaswag acc and acc_norm
    assert metrics["prune/layers.nrows"] == 21
    assert [row["prune/block"] for row in history if "prune/relative_error" in row] == [0, 1, 2]
    assert all(metrics[f"figures/{name}.count"] == 1 for name in ("relative_error", "stages", "kept"))
    assert config["model"]["name_or_path"] == "small"
    assert config["pruned_with"]["method"] == "wanda"
    assert config["seed_everything"] == 0
    assert "lightning" in config["environment"]
    page = (run / "report.html").read_text()
    assert "boolq" in page
    assert len(list((run / "figures").glob("*.png"))) == 3
