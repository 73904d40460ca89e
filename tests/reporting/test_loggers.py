"""What Lightning's loggers are told of a run: numbers that are there, also where a run goes on or is done again."""

import csv
import json
import shutil
import threading
import warnings
from dataclasses import replace

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from helpers.own_module import NoTokenizer, OwnModule, Windows, trainer
from helpers.wandb_file import finished_records, read_run, records
from maiht_lightning import FrozenSparsity, MAIHTConfig, MAIHTPruning
from maiht_lightning.estimate.devices import SHEETS
from maiht_lightning.records import StageResult, Stages
from maiht_lightning.reporting.loggers import finish_pruning, log_block, log_stage
from maiht_lightning.reporting.summary import Summary

SECONDS = ("fit", "capture", "solve", "journal", "evaluate")


QUICK = MAIHTConfig(iterations=3, refine_iterations=2)


@pytest.fixture
def run(tiny_llama, text, tmp_path, monkeypatch):
    """A function that trains and prunes in the folder `run`, always the same, and returns the callback."""
    # Measuring this machine takes longer than the run.
    monkeypatch.setattr("maiht_lightning.estimate.plan.find_device", lambda *_: SHEETS["l40s"])

    def run(logger, *, figures=False, config=QUICK, **settings):
        if not figures:
            monkeypatch.setattr("maiht_lightning.reporting.recorder.draw_figures", lambda *_: {})
        module = OwnModule(tiny_llama(vocab_size=64).train())
        module.tokenizer = NoTokenizer()
        settings = {"keep_journal": True, "output_dir": str(tmp_path / "run"), **settings}
        callback = MAIHTPruning(calibration=Windows(), config=config, **settings)
        trainer(callback, *([FrozenSparsity()] if "prune_at" in settings else []), logger=logger).fit(module)
        return callback

    return run


def csv_values(logger):
    """What a CSVLogger has written, by name; of several values the last."""
    with open(f"{logger.log_dir}/metrics.csv") as file:
        return {key: float(value) for row in csv.DictReader(file) for key, value in row.items() if value}


def summary_of(tmp_path):
    return json.loads((tmp_path / "run" / "summary.json").read_text())


def assert_complete(metrics, summary, rates):
    """All numbers of a pruning are among a logger's metrics, and TFLOP/s only where they can be known."""
    assert metrics["pruned/sparsity"] == summary["measured_sparsity"] == 0.5
    for stage in ("dense", "pruned"):
        expected = summary["stages"][stage]["perplexity"]["random"]
        assert metrics[f"{stage}/perplexity/random"] == pytest.approx(expected, rel=1e-6)
    for phase in SECONDS:
        assert metrics[f"seconds/{phase}"] == pytest.approx(summary["seconds"][phase], rel=1e-6)
    assert metrics["peak_memory_bytes"] == pytest.approx(summary["peak_memory_bytes"], rel=1e-6)
    for phase in ("capture", "solve"):
        predicted = summary["predicted"][phase]
        assert metrics[f"predicted/{phase}_seconds"] == pytest.approx(predicted["seconds"], rel=1e-6)
        if rates:
            rate = predicted["flops"] / summary["seconds"][phase] / 1e12
            assert metrics[f"tflops/{phase}"] == pytest.approx(rate, rel=1e-6)
        else:
            assert f"tflops/{phase}" not in metrics


@pytest.fixture
def no_warnings_of_loggers():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*could not log the pruning.*")
        yield


@pytest.mark.slow
@pytest.mark.parametrize("lost_blocks", [0, 1])
def test_a_run_done_again_or_gone_on_with_is_logged_like_the_first(run, tmp_path, no_warnings_of_loggers, lost_blocks):
    first, second = CSVLogger(tmp_path / "first"), CSVLogger(tmp_path / "second")
    run(first)
    assert_complete(csv_values(first), summary_of(tmp_path), rates=True)
    for block in range(2 - lost_blocks, 2):
        (tmp_path / "run" / "journal" / f"block_{block:05d}.safetensors").unlink()
    again = run(second)
    assert again.report.resumed == 2 - lost_blocks
    # The seconds of blocks from the journal passed in another process, so that there is nothing to divide by.
    assert_complete(csv_values(second), summary_of(tmp_path), rates=False)
    blocks = [
        {k: v for k, v in csv_values(logger).items() if "prune/relative_error" in k} for logger in (first, second)
    ]
    assert blocks[0] == blocks[1] != {}


@pytest.mark.slow
def test_operations_of_the_last_of_several_shots_are_divided_by_its_own_seconds(run, tmp_path):
    logger = CSVLogger(tmp_path / "csv")
    callback = run(logger, prune_at={"step:1": 0.25, "step:2": 0.5})
    metrics, summary = csv_values(logger), summary_of(tmp_path)
    for phase, last in (("capture", callback.report.capture_seconds), ("solve", callback.report.solve_seconds)):
        assert last < summary["seconds"][phase]  # the first shot's are in it
        rate = summary["predicted"][phase]["flops"] / last / 1e12
        assert metrics[f"tflops/{phase}"] == pytest.approx(rate, rel=1e-6)


@pytest.mark.slow
def test_a_solver_that_may_stop_early_has_no_rate(run, tmp_path):
    logger = CSVLogger(tmp_path / "csv")
    run(logger, config=replace(QUICK, tolerance=0.01))
    assert_complete(csv_values(logger), summary_of(tmp_path), rates=False)


def test_a_failing_logger_is_named_and_the_others_get_everything(tmp_path):
    class Broken(CSVLogger):
        def log_metrics(self, metrics, step=None):
            raise ConnectionError("no network")

    summary = Summary("maiht", 0.5, "row", 0.5, Stages(), {"solve": 2.0}, 3, {"solve": {"seconds": 4.0, "flops": 5.0}})
    first, last = CSVLogger(tmp_path / "first"), CSVLogger(tmp_path / "last")
    for loggers in ([Broken(tmp_path), last], [first, Broken(tmp_path)]):
        problem = ["Broken could not log the pruning: ConnectionError: no network"]
        assert finish_pruning(loggers, summary, {"solve": 2.5}, 7) == problem
        assert (
            log_stage(loggers, "dense", StageResult(tasks={"boolq": {"acc": 0.25}, "rte": {"acc": 0.75}}), 7) == problem
        )
    for good in (first, last):
        good.save()
    assert csv_values(first) == csv_values(last)
    assert csv_values(first) == {
        "step": 7,
        "pruned/sparsity": 0.5,
        "seconds/solve": 2.0,
        "peak_memory_bytes": 3.0,
        "predicted/solve_seconds": 4.0,
        "tflops/solve": 2.5,
        "dense/tasks/boolq/acc": 0.25,
        "dense/tasks/rte/acc": 0.75,
        "dense/mean_accuracy": 0.5,
    }


@pytest.mark.slow
def test_wandb_is_told_the_same_when_a_run_is_done_again(run, tmp_path, no_warnings_of_loggers):
    import wandb

    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        run(WandbLogger(save_dir=tmp_path / name, offline=True), figures=True)
        wandb.finish()
        history, config = read_run(tmp_path / name)
        metrics = {key: value for row in history for key, value in row.items()}
        assert_complete(metrics, summary_of(tmp_path), rates=name == "first")
        assert [row["prune/block"] for row in history if "prune/relative_error" in row] == [0, 1]
        assert metrics["prune/layers.nrows"] == 14
        assert metrics["figures/stages._type"].startswith("image")
        assert config["pruned_with"]["method"] == "maiht"

    # The reader of such files: whatever part of one is there, it is unfinished, and then it is whole.
    (whole,) = (tmp_path / "first").glob("wandb/offline-run-*/run-*.wandb")
    data, cut = whole.read_bytes(), tmp_path / "cut" / whole.relative_to(tmp_path / "first")
    cut.parent.mkdir(parents=True)
    expected = [record.SerializeToString() for record in records(whole)]
    assert len(expected) > 20
    assert list(records(whole))[-1].WhichOneof("record_type") == "exit"
    sizes = [*range(0, len(data), max(1, len(data) // 150)), *range(len(data) - 60, len(data))]
    for size in sizes:
        cut.write_bytes(data[:size])
        found = [record.SerializeToString() for record in records(cut)]
        assert found == expected[: len(found)]
        assert len(found) < len(expected)
        with pytest.raises(TimeoutError, match="has no end"):
            finished_records(tmp_path / "cut", patience=0)
    # Space that was asked for and not written to yet.
    cut.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    with pytest.raises(TimeoutError):
        finished_records(tmp_path / "cut", patience=0)
    threading.Timer(0.3, lambda: shutil.copy(whole, cut)).start()
    assert read_run(tmp_path / "cut") == read_run(tmp_path / "first")


@pytest.mark.slow
def test_tensorboard_is_told_the_same(run, tmp_path, no_warnings_of_loggers):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path / "board")
    run(logger, figures=True)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    metrics = {name: events.Scalars(name)[-1].value for name in events.Tags()["scalars"]}
    assert_complete(metrics, summary_of(tmp_path), rates=True)
    assert [event.step for event in events.Scalars("prune/relative_error")] == [0, 1]
    assert {f"figures/{path.stem}" for path in (tmp_path / "run" / "figures").iterdir()} == set(events.Tags()["images"])
    assert "figures/stages" in events.Tags()["images"]


def test_a_block_is_logged_with_its_mean_error_and_all_of_its_layers(tmp_path):
    from maiht_lightning.records import LayerRecord

    made = [
        LayerRecord(f"model.layers.3.mlp.{kind}", 3, (4, 8), 16, error, seconds=seconds)
        for kind, error, seconds in (("up_proj", 0.25, 1.0), ("down_proj", 0.75, 4.0))
    ]
    logger = CSVLogger(tmp_path)
    log_block([logger], made, 7)
    logger.save()
    assert csv_values(logger) == {
        "step": 3,
        "prune/block": 3,
        "prune/relative_error": 0.5,
        "prune/seconds": 5.0,
        "prune/relative_error/mlp.up_proj": 0.25,
        "prune/relative_error/mlp.down_proj": 0.75,
    }
