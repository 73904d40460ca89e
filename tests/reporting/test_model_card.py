"""The cards of saved models, as the hub's own library reads them, and their upload to a stand-in of it."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.byte_model import byte_tokenizer, save_folder
from helpers.own_module import NoTokenizer, OwnModule, Windows, trainer
from maiht_lightning import MAIHTPruning, load_compact
from maiht_lightning.cli import main
from maiht_lightning.evaluation.evaluation import Evaluation
from maiht_lightning.records import StageResult, Stages
from maiht_lightning.reporting.hub import find_model, push
from maiht_lightning.reporting.model_card import BaseModel, model_card
from maiht_lightning.reporting.summary import Summary

SETTINGS = {
    "method": "maiht",
    "config": {"mu": 0.1},
    "calibration": {"class": "C4Calibration", "samples": 128, "tokenizer": "/home/somebody/secret/tokenizer"},
    "evaluation": {"perplexity": ["wikitext2"]},
}


def summary(**changes):
    stages = Stages(
        dense=StageResult({"wikitext2": 5.678}, {"boolq": {"acc": 0.75, "acc_stderr": 0.01}}),
        pruned=StageResult({"wikitext2": 7.25}, {"boolq": {"acc": 0.7, "acc_stderr": 0.011}}),
        finetuned=StageResult({"wikitext2": 6.5}),
    )
    values = {"measured_sparsity": 0.50001, "stages": stages, "saved": ["model_dense", "model", "model_finetuned"]}
    return Summary("maiht", 0.5, "unstructured", **{**values, **changes})


def card(base="org/base-7b", *, stage="pruned", name="model", licence=None, **changes):
    on_hub = base == "org/base-7b"
    text = str(
        model_card(
            summary(**changes),
            BaseModel(base, on_hub, licence),
            SETTINGS,
            {"torch": "2.0"},
            "maiht fit --config /home/somebody/run.yaml",
            stage=stage,
            name=name,
        )
    )
    return text, ModelCard(text).data


def test_the_hub_reads_what_was_measured():
    _, data = card(licence="mit")
    assert (data.base_model, data.license, data.pipeline_tag) == ("org/base-7b", "mit", "text-generation")
    assert {"maiht", "unstructured", "sparse"} <= set(data.tags)
    found = {(each.dataset_type, each.metric_type): each.metric_value for each in data.eval_results}
    assert found == {("Salesforce/wikitext", "perplexity"): 7.25, ("boolq", "accuracy"): 0.7}


def test_a_reader_sees_all_stages_up_to_this_one():
    text, _ = card()
    assert "| perplexity, wikitext2 | 5.68 | 7.25 |" in text
    assert "| boolq, acc % | 75.00 ± 1.00 | 70.00 ± 1.10 |" in text
    assert "6.50" not in text
    assert "50.00 %" in text
    assert "An Efficient Pruner" in text
    text, data = card(stage="finetuned", name="model_finetuned")
    assert "| perplexity, wikitext2 | 5.68 | 7.25 | 6.50 |" in text
    assert "fine-tuned with its zeros frozen" in text
    assert [each.metric_value for each in data.eval_results] == [6.5]


def test_settings_command_and_versions_without_folders_of_the_machine():
    text, _ = card()
    assert "| calibration.samples | 128 |" in text
    assert "| torch | 2.0 |" in text
    assert "maiht fit --config run.yaml" in text
    assert "somebody" not in text


def test_names_from_outside_are_text():
    text, data = card("<script>alert(1)</script>|x`y")
    assert "<script>" not in text.split("---\n", 2)[2]
    assert data.base_model is None


def test_without_measurements_there_is_a_card_all_the_same():
    text, data = card(stages=Stages())
    assert "Nothing was measured." in text
    assert data.eval_results is None


@pytest.mark.parametrize("licence", ["apache-2.0", None])
def test_the_licence_is_that_of_the_base_models_card(tmp_path, licence):
    if licence:
        (tmp_path / "README.md").write_text(f"---\nlicense: {licence}\n---\n# x\n")
    base = BaseModel.of(str(tmp_path))
    assert (base.name, base.on_hub, base.licence) == (tmp_path.name, False, licence)


def test_nothing_is_fetched_for_a_hub_name(monkeypatch):
    monkeypatch.setattr("huggingface_hub.ModelCard.load", lambda *_, **__: pytest.fail("fetched"))
    assert BaseModel.of("org/nowhere") == BaseModel("org/nowhere", True, None)


# ---- In a run, and on the hub


class Hub:
    """In place of `HfApi`: repositories are folders."""

    def __init__(self, root):
        self.root, self.calls = root, []

    def create_repo(self, repo_id, *, private, exist_ok):
        self.calls.append((repo_id, private, exist_ok))
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder by the callback, with compact files."""
    folder = tmp_path_factory.mktemp("card")
    save_folder(folder / "base")
    (folder / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
    module = OwnModule(AutoModelForCausalLM.from_pretrained(folder / "base"))
    module.tokenizer = byte_tokenizer()
    evaluation = Evaluation(perplexity=["python_docs"], seqlen=64, max_windows=2)
    pruning = MAIHTPruning(
        sparsity=0.6,
        config="paper",
        calibration=Windows(),
        evaluation=evaluation,
        output_dir=folder / "run",
        compact=True,
        save_dense=True,
    )
    trainer(pruning).fit(module)
    return folder / "run"


@pytest.mark.slow
def test_a_runs_models_have_cards_with_its_figures(run):
    found = Summary.read(run)
    assert not found.failures
    for name in ("model", "model_compact"):
        data = ModelCard.load(run / name / "README.md").data
        assert data.license == "mit"
        assert [each.metric_value for each in data.eval_results] == [found.stages["pruned"].perplexity["python_docs"]]
    assert not (run / "model_dense" / "README.md").exists()
    zeros = f"{100 * found.measured_sparsity:.2f} %"
    assert zeros in (run / "model" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, "model_compact"])
def test_what_was_pushed_generates(run, tmp_path, name):
    hub = Hub(tmp_path)
    address = push(run, "user/pruned", name=name, api=hub)
    assert address == "https://hub/user/pruned/commit/1"
    assert hub.calls == [("user/pruned", True, True)]
    pushed = tmp_path / "user" / "pruned"
    model = load_compact(pushed) if name else AutoModelForCausalLM.from_pretrained(pushed)
    inputs = AutoTokenizer.from_pretrained(pushed)("The", return_tensors="pt")
    with torch.no_grad():
        tokens = model.generate(input_ids=inputs.input_ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokens.shape[1] == inputs.input_ids.shape[1] + 4
    assert (pushed / "README.md").is_file()


def test_a_card_that_cannot_be_written_costs_nothing(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("maiht_lightning.reporting.recorder.write_cards", lambda *_: 1 / 0)
    monkeypatch.setattr("maiht_lightning.reporting.recorder.draw_figures", lambda *_: {})
    module = OwnModule(tiny_llama(vocab_size=64))
    module.tokenizer = NoTokenizer()
    settings = {"config": "paper", "calibration": Windows(), "evaluation": Evaluation(perplexity=[])}
    trainer(MAIHTPruning(output_dir=tmp_path / "run", **settings)).fit(module)
    found = Summary.read(tmp_path / "run")
    assert [each["phase"] for each in found.failures] == ["model card"]
    assert (tmp_path / "run" / "model" / "config.json").exists()


def finished(tmp_path, monkeypatch, hub, **settings):
    """A run by the callback that pushes its model to a stand-in of the hub; what it came to."""
    monkeypatch.setattr("huggingface_hub.HfApi", lambda **_: hub)
    monkeypatch.setattr("maiht_lightning.reporting.recorder.draw_figures", lambda *_: {})
    torch.manual_seed(0)
    save_folder(tmp_path / "base")
    module = OwnModule(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    module.tokenizer = byte_tokenizer()
    settings = {"config": "paper", "calibration": Windows(), "evaluation": Evaluation(perplexity=[]), **settings}
    trainer(MAIHTPruning(output_dir=tmp_path / "run", push_to_hub="user/pruned", **settings), max_epochs=2).fit(module)
    return Summary.read(tmp_path / "run")


@pytest.mark.parametrize(("prune_at", "name"), [("end", "model"), ("epoch:1", "model_finetuned")])
def test_a_run_pushes_what_it_ends_with_once(tmp_path, monkeypatch, prune_at, name):
    hub = Hub(tmp_path)
    found = finished(tmp_path, monkeypatch, hub, prune_at=prune_at)
    assert not found.failures
    assert hub.calls == [("user/pruned", True, True)]
    pushed = tmp_path / "user" / "pruned" / "model.safetensors"
    assert pushed.read_bytes() == (tmp_path / "run" / name / "model.safetensors").read_bytes()


def test_a_hub_that_refuses_costs_no_run(tmp_path, monkeypatch):
    hub = Hub(tmp_path)
    hub.upload_folder = lambda **_: 1 / 0
    found = finished(tmp_path, monkeypatch, hub)
    assert [each["phase"] for each in found.failures] == ["push to hub"]
    assert "hf auth login" in found.failures[0]["message"]
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["pruned", "a/b/c", "", 7, "user/a b"])
def test_a_repository_of_another_form_is_refused_at_once(name):
    with pytest.raises(ValueError, match="push_to_hub must be a repository such as USER/NAME, but found"):
        MAIHTPruning(push_to_hub=name)


@pytest.mark.slow
def test_the_command_pushes(run, tmp_path, monkeypatch, capsys):
    hub = Hub(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda **_: hub)
    main(["push", str(run), "user/small", "--name", "model_compact", "--private", "false"])
    assert "https://hub/user/small/commit/1" in capsys.readouterr().out
    assert hub.calls == [("user/small", False, True)]
    assert list((tmp_path / "user" / "small").glob("*.json"))
    hub.create_repo = lambda *_, **__: 1 / 0
    with pytest.raises(SystemExit) as stopped:
        main(["push", str(run), "user/small"])
    assert stopped.value.code == 2
    assert "hf auth login" in capsys.readouterr().err


def test_only_a_runs_models_are_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        find_model(tmp_path)
    summary(saved=["model_dense"]).write(tmp_path)
    (tmp_path / "model_dense").mkdir()
    with pytest.raises(ValueError, match=r"holds no pruned model: is its run finished\?"):
        find_model(tmp_path)
    summary().write(tmp_path)
    (tmp_path / "model").mkdir()
    assert find_model(tmp_path).name == "model"
    (tmp_path / "model_finetuned").mkdir()
    assert find_model(tmp_path).name == "model_finetuned"
    assert find_model(tmp_path, "model").name == "model"
    with pytest.raises(ValueError, match=r"holds the models model_dense, model, model_finetuned, but found 'modell'"):
        find_model(tmp_path, "modell")
