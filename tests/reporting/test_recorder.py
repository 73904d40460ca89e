"""What is known of a run: the values, their files, and the recorder that writes them without a Trainer."""

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from lightning.pytorch.loggers.logger import DummyLogger

from maiht_lightning.records import LayerRecord, PruningReport, StageResult, Stages
from maiht_lightning.reporting.comparison.runs import read_run
from maiht_lightning.reporting.recorder import RunRecorder
from maiht_lightning.reporting.run.stages import stage_rows
from maiht_lightning.reporting.summary import Summary

TASKS = {"boolq": {"acc": 0.75, "acc_stderr": 0.1}, "wikitext": {"word_perplexity": 12.0}, "rte": {"acc": 0.25}}


class Notes(DummyLogger):
    """Remembers what is logged, with its step."""

    def __init__(self):
        super().__init__()
        self.noted = {}

    def log_metrics(self, metrics, step=None):
        self.noted |= {name: (value, step) for name, value in metrics.items()}


def report(error=0.1, seconds=2.0):
    layer = LayerRecord("model.layers.0.mlp.up_proj", 0, (4, 8), 16, error, name_in_block="mlp.up_proj")
    return PruningReport([layer], capture_seconds=seconds / 2, solve_seconds=seconds)


def recorder(folder, **settings):
    return RunRecorder(folder, Summary("wanda", 0.5, "row"), {"method": "wanda"}, **settings)


# ---- Values


def test_a_stages_json_is_what_it_was_and_reads_back():
    found = StageResult({"wikitext2": 5.5}, TASKS)
    assert list(found.to_json()) == ["perplexity", "tasks", "mean_accuracy"]
    assert found.to_json() == {"perplexity": {"wikitext2": 5.5}, "tasks": TASKS, "mean_accuracy": 0.5}
    assert StageResult.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert StageResult({}).to_json() == {"perplexity": {}}
    assert StageResult({}, {"wikitext": TASKS["wikitext"]}).to_json() == {
        "perplexity": {},
        "tasks": {"wikitext": TASKS["wikitext"]},
    }
    assert StageResult.from_json({"sparsity": 0.5}) == StageResult()


def test_stages_know_their_texts_metrics_and_order():
    stages = Stages(
        later=StageResult({"c4": 1.0}),
        pruned=StageResult({"b": 2.0}, {"rte": {"acc": 0.5}}),
        dense=StageResult({}, TASKS),
    )
    assert list(stages.in_order()) == ["dense", "pruned", "later"]
    assert stages.texts == ["c4", "b"]
    assert stages.in_order().tasks == ["boolq", "wikitext", "rte"]
    assert stages.metrics == [("rte", "acc"), ("boolq", "acc"), ("wikitext", "word_perplexity")]
    assert stages["dense"].score("boolq", "acc") == (0.75, 0.1)
    assert stages["pruned"].score("boolq", "acc") == stages["dense"].score("rte", "f1") == (None, None)


def test_rows_have_the_decimals_asked_for():
    stages = Stages(dense=StageResult({"a": 12345.6789, "b": float("inf")}))
    assert [row.values for row in stage_rows(stages)] == [["12,346"], ["∞"]]
    assert [row.values for row in stage_rows(stages, decimals=3)] == [["12345.679"], ["∞"]]


def test_a_layers_kind_is_carried_whole():
    # The block's index stands in the name twice: it cannot be found by splitting.
    whole = LayerRecord("experts.1.layers.1.mlp.1.up", 1, (2, 2), 1, 0.1, name_in_block="mlp.1.up")
    assert whole.layer == "mlp.1.up"
    assert LayerRecord("model.layers.7.mlp.up_proj", 7, (2, 2), 1, 0.1).layer == "mlp.up_proj"


# ---- summary.json


def test_a_summary_reads_back_and_writes_phases_in_their_order(tmp_path):
    summary = Summary("maiht", 0.5, "2:4", stages=Stages(dense=StageResult({"a": 2.0}, TASKS), pruned=StageResult()))
    for phase, seconds in (("evaluate", 1.0), ("finetune", 8.0), ("solve", 2.0), ("evaluate", 4.0), ("fit", 0.5)):
        summary.add_seconds(phase, seconds)
    summary.write(tmp_path)
    written = json.loads((tmp_path / "summary.json").read_text())
    assert list(written["seconds"].items()) == [("fit", 0.5), ("solve", 2.0), ("finetune", 8.0), ("evaluate", 5.0)]
    assert written["stages"]["dense"]["mean_accuracy"] == 0.5
    assert Summary.read(tmp_path) == summary


def test_a_summary_with_less_and_more_in_it_is_read(tmp_path):
    content = {"method": "iht", "sparsity": 0.3, "pattern": "row", "invented": 1, "stages": {"pruned": {"new": 2}}}
    (tmp_path / "summary.json").write_text(json.dumps(content))
    assert Summary.read(tmp_path) == Summary("iht", 0.3, "row", stages=Stages(pruned=StageResult()))
    for broken in ("{", "[]", '{"method": "iht"}', '{"stages": {"pruned": 1}}'):
        (tmp_path / "summary.json").write_text(broken)
        with pytest.raises(ValueError, match=r"summary\.json is not a run's summary"):
            Summary.read(tmp_path)
    with pytest.raises(FileNotFoundError):
        Summary.read(tmp_path / "nowhere")


# ---- The recorder


def test_a_run_without_a_trainer_is_recorded_whole(tmp_path):
    logger = Notes()
    record = recorder(tmp_path / "run", loggers=[logger], global_step=lambda: 7)
    record.stage("dense", StageResult({"a": 2.0}))
    record.pruned(report(seconds=1.0), is_last=False)
    assert logger.noted["pruned/sparsity"] == (0.5, 7)
    assert not (tmp_path / "run" / "layers.csv").exists()
    record.block(report().layers)
    record.pruned(report(error=0.25, seconds=2.0))
    with record.timed("evaluate"):
        found = StageResult({"a": 3.0}, TASKS)
    # A comparison reads the stage `pruned` as the sign of a finished run, so that the layers must be there by then.
    assert (tmp_path / "run" / "layers.csv").exists()
    record.stage("pruned", found)
    run = read_run(tmp_path / "run")
    assert run.summary.seconds == {"capture": 1.5, "solve": 3.0, "evaluate": run.summary.seconds["evaluate"]}
    assert run.summary.peak_memory_bytes > 0
    assert run.summary.pruning_memory_bytes == 0
    assert run.mean_relative_error == 0.25
    record.finish_pruning(report())
    assert "prune/peak_memory_bytes" not in logger.noted
    assert logger.noted["dense/perplexity/a"] == (2.0, 7)
    assert logger.noted["pruned/mean_accuracy"] == (0.5, 7)
    assert logger.noted["prune/relative_error/mlp.up_proj"] == (0.1, 0)
    assert logger.noted["seconds/solve"] == (3.0, 7)
    assert "perplexity, a" in (tmp_path / "run" / "report.html").read_text()
    with (tmp_path / "run" / "layers.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["name"], row["relative_error"]) == ("model.layers.0.mlp.up_proj", "0.25")


def test_seconds_of_the_journal_are_a_phase_where_there_are_any(tmp_path):
    record, found = recorder(tmp_path / "run", loggers=[]), report()
    record.pruned(found)
    assert "journal" not in record.summary.seconds
    found.journal_seconds = 4.0
    record.pruned(found)
    record.pruned(found)
    assert record.summary.seconds["journal"] == 8.0
    assert list(record.summary.seconds_in_order)[-1] == "journal"


def test_other_processes_know_the_same_and_write_nothing(tmp_path, capsys):
    logger = Notes()
    record = recorder(tmp_path / "run", loggers=[logger], is_main=False)
    record.block(report().layers)
    record.pruned(report())
    record.stage("pruned", StageResult({"a": 3.0}))
    record.finish_pruning(report())
    record.finish_finetuning(report().layers)
    assert record.summary.stages == {"pruned": StageResult({"a": 3.0})}
    assert (record.summary.measured_sparsity, record.summary.seconds["solve"]) == (0.5, 2.0)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert logger.noted == {}
    assert capsys.readouterr().out == ""


def test_what_an_earlier_process_wrote_is_taken_over(tmp_path):
    first = recorder(tmp_path)
    for name in ("dense", "pruned", "finetuned"):
        first.stage(name, StageResult({"a": 2.0}))
    again = recorder(tmp_path)
    again.reload()
    assert list(again.summary.stages) == ["dense", "pruned"]
    # Whoever has measured something by then keeps that.
    other = recorder(tmp_path)
    other.summary.stages["dense"] = StageResult({"a": 9.0})
    other.reload()
    assert other.summary.stages == {"dense": StageResult({"a": 9.0})}
    fresh = recorder(tmp_path / "nowhere")
    fresh.reload()
    assert fresh.summary.stages == {}


@pytest.mark.slow
def test_only_a_saved_model_is_said_to_load(tmp_path, capsys):
    recorder(tmp_path).finish_pruning(report())
    assert "from_pretrained" not in capsys.readouterr().out
    (tmp_path / "model").mkdir()
    recorder(tmp_path).finish_pruning(report())
    assert "from_pretrained" in capsys.readouterr().out


# ---- What may know what


@pytest.mark.slow
@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("records", "torch transformers lightning matplotlib"),
        (
            "reporting.summary reporting.comparison.runs reporting.comparison.rows reporting.comparison.table "
            "reporting.comparison.figure reporting.comparison.wandb_report",
            "torch transformers lightning",
        ),
        (
            "reporting.run.console reporting.run.figures reporting.run.page reporting.environment reporting.formats "
            "reporting.html",
            "transformers lightning",
        ),
    ],
)
def test_reading_and_comparing_runs_needs_no_torch_and_reporting_no_lightning(modules, absent):
    script = f"""
import sys
from importlib import import_module
for name in {modules.split()!r}:
    import_module("maiht_lightning." + name)
found = sorted(set({absent.split()!r}) & set(sys.modules))
assert not found, found
"""
    source = str(Path(__file__).parents[2] / "src")
    subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {source!r})\n{script}"], check=True)


def test_how_far_predictions_were_is_told(tmp_path, tiny_llama, capsys):
    logger = Notes()
    record = recorder(tmp_path / "run", loggers=[logger])
    record.begin(tiny_llama(vocab_size=64))
    # Of several prunings the last one's is the model's.
    for divergence in ((9.0, 8.0), (0.75, 0.5)):
        record.pruned(replace(report(), divergence=divergence, rescaling_seconds=2.0))
    record.finish_pruning(report())
    assert logger.noted["prune/divergence/before"] == (0.75, 0)
    assert logger.noted["prune/divergence/after"] == (0.5, 0)
    assert logger.noted["seconds/rescale"] == (4.0, 0)
    assert Summary.read(tmp_path / "run").divergence == [0.75, 0.5]
    assert "0.750 → 0.500" in (tmp_path / "run" / "report.html").read_text()
    assert "rescale 4 s" in capsys.readouterr().out


def test_the_pruning_has_a_peak_of_its_own(tmp_path, tiny_llama, monkeypatch, capsys):
    from maiht_lightning.reporting import recorder as module
    from maiht_lightning.reporting.run.page import cost

    peak = 8
    monkeypatch.setattr(module, "peak_memory_bytes", lambda: peak * 2**30)
    logger = Notes()
    record = recorder(tmp_path / "run", loggers=[logger])
    record.begin(tiny_llama(vocab_size=64))
    # The pruning forgets a GPU's peak of the fit for its own.
    peak = 4
    for gigabytes in (4, 2):
        record.pruned(replace(report(), peak_memory_bytes=gigabytes * 2**30))
    record.stage("pruned", StageResult())
    record.finish_pruning(report())
    assert logger.noted["peak_memory_bytes"] == (8.0 * 2**30, 0)
    assert logger.noted["prune/peak_memory_bytes"] == (4.0 * 2**30, 0)
    assert "Peak memory: 8.0 GiB, while pruning 4.0 GiB." in capsys.readouterr().out
    assert list(cost(record.summary).items())[-2:] == [("highest memory", "8.00 GiB"), ("while pruning", "4.00 GiB")]


def test_sentences_are_not_broken_in_a_log_file(tmp_path, monkeypatch, capsys):
    from maiht_lightning.reporting.run.console import print_run

    monkeypatch.setenv("COLUMNS", "40")
    phases = dict.fromkeys(("fit", "capture", "solve", "finetune", "evaluate"), 1234.0)
    predicted = {phase: {"seconds": 1234.0} for phase in ("capture", "solve", "reconstruct")}
    summary = Summary("maiht", 0.5, "row", seconds=phases, peak_memory_bytes=2**30, predicted=predicted)
    print_run(summary, [], tmp_path)
    lines = capsys.readouterr().out.splitlines()
    for begins, ends in (("Time: fit 1234 s", "Peak memory: 1.0 GiB."), ("Predicted for", "reconstruct 1234 s.")):
        assert any(line.startswith(begins) and line.endswith(ends) for line in lines), lines
