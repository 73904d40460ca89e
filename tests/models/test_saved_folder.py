"""The folders of a run as their reader meets them: tokenizer, generated text, tied embeddings."""

import copy

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.byte_model import byte_tokenizer, llama_config, same_weights, save_folder
from helpers.own_module import OwnModule, Windows, trainer
from maiht_lightning import MAIHTConfig, MAIHTPruning, count_zeros, load_compact
from maiht_lightning.evaluation.evaluation import Evaluation
from maiht_lightning.models.loading import load_tokenizer
from maiht_lightning.pruning.journal import read_records

TEXT = "def f(x): return é"


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def run(request, tmp_path_factory):
    """(folder, model in memory, whether its embeddings are tied, model before the pruning) of a fit of own code."""
    path = tmp_path_factory.mktemp("run")
    save_folder(path / "dense", llama_config(tie_word_embeddings=request.param))
    module = OwnModule(AutoModelForCausalLM.from_pretrained(path / "dense").train())
    module.tokenizer = byte_tokenizer()
    pruning = MAIHTPruning(
        calibration=Windows(),
        evaluation=Evaluation(perplexity=[]),
        config=MAIHTConfig(iterations=3, refine_iterations=2),
        compact=True,
        save_dense=True,
        output_dir=str(path),
    )
    trained = []
    pruning_began = pruning.prune_and_record
    pruning.prune_and_record = lambda *args: (trained.append(copy.deepcopy(module.net["lm"])), pruning_began(*args))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("maiht_lightning.reporting.recorder.draw_figures", lambda *_: {})
        trainer(pruning).fit(module)
    return path, module.net["lm"].eval(), request.param, trained[0].eval()


def load(path, name):
    return load_compact(path / name) if name == "model_compact" else AutoModelForCausalLM.from_pretrained(path / name)


@pytest.mark.parametrize("name", ["model", "model_compact", "model_dense"])
def test_the_folder_holds_the_model_its_tokenizer_and_its_ties(run, name):
    path, pruned, tied, dense = run
    expected = dense if name == "model_dense" else pruned
    model, tokenizer = load(path, name), AutoTokenizer.from_pretrained(path / name)
    assert same_weights(model, expected)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    names = set()
    for file in (path / name).glob("*.safetensors"):
        with safe_open(file, "pt") as saved:
            names |= set(saved.keys())
    assert ("lm_head.weight" in names) != tied  # a tied head takes no space of its own

    for loaded in (tokenizer, load_tokenizer(str(path / name))):
        assert loaded(TEXT)["input_ids"] == byte_tokenizer()(TEXT)["input_ids"]
        assert loaded.decode(loaded(TEXT)["input_ids"]) == TEXT
        assert loaded.eos_token == "<end>"
    prompt = tokenizer(TEXT, return_tensors="pt")
    written = [m.generate(**prompt, max_new_tokens=9, do_sample=False, pad_token_id=0) for m in (model, expected)]
    assert written[0].shape == (1, len(TEXT.encode()) + 9)
    assert torch.equal(*written)


def test_the_journal_is_left_with_its_records_alone(run):
    path, pruned, _, _ = run
    assert {file.name for file in (path / "journal").iterdir()} == {"settings.json", "records.json"}
    counted = {count.name: count.zeros for count in count_zeros(pruned)}
    assert {record.name: record.zeros for record in read_records(path / "journal")} == counted


@pytest.mark.parametrize("keep", [True, False])
def test_journals_of_all_steps_are_left_as_asked(keep, tmp_path, monkeypatch):
    monkeypatch.setattr("maiht_lightning.reporting.recorder.draw_figures", lambda *_: {})
    module = OwnModule(AutoModelForCausalLM.from_pretrained(save_folder(tmp_path / "dense")).train())
    module.tokenizer = byte_tokenizer()
    pruning = MAIHTPruning(
        calibration=Windows(),
        evaluation=Evaluation(perplexity=[]),
        method="magnitude",
        prune_at={"step:1": 0.25, "end": 0.5},
        keep_journal=keep,
        output_dir=str(tmp_path),
    )
    trainer(pruning).fit(module)
    for name in ("journal", "journal_step_1"):
        assert len(list((tmp_path / name).glob("block_*.safetensors"))) == (2 if keep else 0)
        assert len(read_records(tmp_path / name)) == 14


def test_pruned_and_dense_models_write_different_texts(run):
    """So that equal texts say something."""
    _, pruned, _, dense = run
    prompt = byte_tokenizer()(TEXT, return_tensors="pt")
    written = [m.generate(**prompt, max_new_tokens=9, do_sample=False, pad_token_id=0) for m in (pruned, dense)]
    assert not torch.equal(*written)
