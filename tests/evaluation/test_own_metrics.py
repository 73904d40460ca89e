"""Other people's metrics and batches beside perplexity: in every table, by stage, and at no model's cost."""

import json
import random
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from helpers.own_module import OwnModule, Windows, trainer
from helpers.strangers import dictionaries, language_model, sequences
from helpers.wandb_file import read_run
from maiht_lightning import Evaluation, MAIHTPruning
from maiht_lightning.pruning.journal import Journal
from maiht_lightning.records import StageResult, Stages
from maiht_lightning.reporting.comparison.rows import comparison
from maiht_lightning.reporting.comparison.runs import read_run as read_folder
from maiht_lightning.reporting.run.stages import stage_rows


@pytest.fixture(scope="module")
def model():
    return language_model().eval()


def held_out():
    return DataLoader(sequences(2), batch_size=3, collate_fn=dictionaries)


def measure(model, **settings):
    return Evaluation(**{"perplexity": [], **settings}).load(model).measure(model, progress=False)


def test_batches_have_a_name_and_stand_beside_texts(model, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("some letters " * 40)
    letters = lambda text, verbose=True: {"input_ids": [ord(letter) % 64 for letter in text]}  # noqa: E731
    evaluation = Evaluation(perplexity={"mine": held_out(), "file": str(file)}, seqlen=16)
    assert evaluation.needs_tokenizer
    found = evaluation.load(model, letters).measure(model, progress=False).perplexity
    alone = Evaluation(perplexity=[str(file)], seqlen=16).load(model, letters).measure(model, progress=False)
    assert list(found) == ["mine", "file"]
    assert found["file"] == alone.perplexity[str(file)]
    assert found["mine"] == measure(model, perplexity={"mine": sequences(2)}, batch_size=4).perplexity["mine"]
    with pytest.raises(ValueError, match="tokenizer must be given for texts and tasks"):
        evaluation.load(model)


def test_only_the_first_windows_of_a_loader_for_a_quick_look(model):
    found = measure(model, perplexity={"mine": held_out()}, max_windows=4).perplexity
    assert found == measure(model, perplexity={"mine": sequences(2)[:4]}).perplexity
    assert found != measure(model, perplexity={"mine": held_out()}).perplexity


def test_a_metric_sees_the_model_as_it_is_measured(model):
    seen = []

    def look(given):
        seen.append((given is model, given.training, torch.is_grad_enabled(), random.random(), torch.rand(()).item()))
        return {"weights": torch.tensor(3.0), "layers": 2}

    model.train()
    random.seed(7)
    torch.manual_seed(7)
    expected = random.random(), torch.rand(()).item()
    for seed in (7, 8):
        random.seed(seed)
        torch.manual_seed(seed)
        assert measure(model, metrics=[look]).metrics == {"weights": 3.0, "layers": 2.0}
        after = random.random(), torch.rand(()).item()
        assert (after == expected) == (seed == 7)
    assert model.training
    model.eval()
    assert seen[0][:3] == (True, False, False)
    assert seen[0] == seen[1]


class Broken:
    def __call__(self, model):
        raise KeyError("its own fault")


@pytest.mark.parametrize(
    ("metrics", "error", "message"),
    [
        ([Broken()], KeyError, "its own fault"),
        ([lambda model: 3.0], TypeError, "a metric must return a dictionary of numbers, but found float"),
        ([lambda model: {"a": "b"}], ValueError, "could not convert"),
        ([lambda model: {"a": 1}, lambda model: {"a": 2}], ValueError, "a name of its own, but found a twice"),
    ],
)
def test_what_a_metric_may_not_do(model, metrics, error, message):
    with pytest.raises(error, match=message):
        measure(model, metrics=metrics)
    failed = []
    loaded = Evaluation(perplexity=[], metrics=[*metrics, lambda model: {"later": 1.0}]).load(model)
    found = loaded.measure(model, progress=False, on_failure=lambda what, error: failed.append((what, type(error))))
    assert failed == [("Broken" if metrics[0].__class__ is Broken else "<lambda>", error)]
    assert found.metrics == {**({"a": 1.0} if len(metrics) > 1 else {}), "later": 1.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"perplexity": held_out()}, r"a name for each text or loader, as \{'mine': loader\}, but found DataLoader"),
        ({"perplexity": [held_out()]}, "must have a name for token batches.* but found a list with DataLoader"),
        ({"perplexity": "wikitext2"}, "must be a list of texts.* but found str"),
        ({"metrics": len}, "metrics must be a list of functions"),
        ({"metrics": [3]}, "metrics must be a list of functions"),
    ],
)
def test_settings_of_another_kind_are_refused_at_once(settings, message):
    with pytest.raises(TypeError, match=message):
        Evaluation(**settings)


def test_metrics_stand_in_the_table_and_are_read_again():
    stages = Stages(dense=StageResult(metrics={"rouge": 0.25, "length": 12345.678}), pruned=StageResult())
    assert [tuple(row) for row in stage_rows(stages)] == [
        ("rouge", ["0.25", "–"], False),
        ("length", ["1.235e+04", "–"], False),
    ]
    written = stages["dense"].to_json()
    assert written == {"perplexity": {}, "metrics": {"rouge": 0.25, "length": 12345.678}}
    assert StageResult.from_json(json.loads(json.dumps(written))) == stages["dense"]


# ---- In a run


def fit(folder, *metrics, **settings):
    module = OwnModule(language_model().train())
    callback = MAIHTPruning(
        method="wanda",
        calibration=Windows(),
        evaluation=Evaluation(perplexity={"mine": held_out()}, metrics=list(metrics)),
        output_dir=str(folder / "run"),
    )
    trainer(callback, **settings).fit(module)
    return callback


@pytest.mark.slow
def test_metrics_are_in_summary_page_table_and_loggers_by_stage(tmp_path, capsys, no_figures):
    import wandb

    def share_of_zeros(model):
        weights = [weight for name, weight in model.named_parameters() if name.endswith("_proj.weight")]
        return {"zeros/<share>": sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)}

    loggers = [WandbLogger(project="t", save_dir=tmp_path, offline=True), CSVLogger(tmp_path, name="csv")]
    fit(tmp_path, share_of_zeros, Broken(), logger=loggers)
    wandb.finish()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    expected = {"dense": 0.0, "pruned": summary["measured_sparsity"]}
    assert {name: stage["metrics"] for name, stage in summary["stages"].items()} == {
        name: {"zeros/<share>": value} for name, value in expected.items()
    }
    assert [failure["phase"] for failure in summary["failures"]] == [
        "evaluate dense, Broken",
        "evaluate pruned, Broken",
    ]
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    history, config = read_run(tmp_path)
    logged = {key: value for row in history for key, value in row.items()}
    assert {name: logged[f"{name}/metrics/zeros/<share>"] for name in expected} == expected
    assert logged["pruned/perplexity/mine"] == summary["stages"]["pruned"]["perplexity"]["mine"]
    described = config["pruned_with"]["evaluation"]
    assert (described["perplexity"], described["metrics"]) == (["mine"], ["share_of_zeros", "Broken"])
    (csv,) = (tmp_path / "csv").glob("*/metrics.csv")
    assert "pruned/metrics/zeros/<share>" in csv.read_text()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "zeros/&lt;share&gt;" in page
    assert "<share>" not in page
    assert "zeros/<share>" in capsys.readouterr().out
    table = comparison([read_folder(tmp_path / "run")]).markdown()
    assert "zeros/<share>, pruned" in table.replace("&lt;", "<").replace("&gt;", ">")


def test_a_run_that_resumes_measures_no_stage_again(tmp_path, monkeypatch, no_figures):
    class Died(BaseException):
        pass

    calls = []

    def count(model):
        calls.append(model)
        return {"calls": len(calls)}

    def die(*_):
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "save", die)
        with pytest.raises(Died):
            fit(tmp_path, count)
    assert len(calls) == 1
    stages = fit(tmp_path, count).summary.stages
    assert {name: stage.metrics for name, stage in stages.items()} == {"dense": {"calls": 1}, "pruned": {"calls": 2}}


def test_padding_without_a_mask_is_refused_before_training(tmp_path):
    module = OwnModule(language_model().train())
    module.net["lm"].config.pad_token_id = 0
    loader = [batch["input_ids"] for batch in held_out()]
    callback = MAIHTPruning(calibration=Windows(), evaluation=Evaluation(perplexity={"mine": loader}))
    with pytest.raises(MisconfigurationException, match="windows must be whole"):
        trainer(callback).fit(module)
    assert module.steps == 0


def test_a_task_without_a_tokenizer_is_a_failure(model):
    from maiht_lightning.evaluation.evaluation import LoadedEvaluation

    loaded = LoadedEvaluation(Evaluation(perplexity=[]), {}, {"boolq": SimpleNamespace()})
    with pytest.raises(ValueError, match="tokenizer must be given for task boolq"):
        loaded.measure(model)
