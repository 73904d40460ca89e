"""Every setting of MAIHTPruning is seen in what a fit leaves: the weights of `prune` with the same settings."""

import copy
import gzip
import json
import random
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from helpers.own_module import NoTokenizer, OwnModule, Windows, trainer
from helpers.sharp_model import language, perplexity_by_definition
from maiht_lightning import C4Calibration, MAIHTConfig, MAIHTPruning, load_compact, prune
from maiht_lightning.callbacks.language_model import find_language_model, find_tokenizer
from maiht_lightning.data.calibration import CalibrationSource
from maiht_lightning.data.python_docs import PythonDocsCalibration
from maiht_lightning.evaluation.evaluation import Evaluation, context_length
from maiht_lightning.solvers import METHODS

pytestmark = pytest.mark.usefixtures("no_figures")

FAST = MAIHTConfig(iterations=6, refine_iterations=4)
WINDOWS = Windows().windows(None, 0)
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
}


class Letters:
    """A tokenizer with a token a letter; the same letters are other tokens if shifted."""

    eos_token, bos_token = "\x00", None

    def __init__(self, shift=0):
        self.shift = shift

    def __call__(self, text, verbose=True):
        return {"input_ids": [(ord(letter) + self.shift) % 64 for letter in text]}

    def save_pretrained(self, folder):
        pass


def letters(tokens):
    """A text whose tokens these are."""
    return "".join(chr(64 + token) for token in tokens.tolist())


class Module(OwnModule):
    """A fit of it is one step."""

    def __init__(self, model, tokenizer=None, learning_rate=1e-2):
        super().__init__(model.train())
        self.tokenizer = tokenizer or NoTokenizer()
        self.learning_rate = learning_rate

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


class Watch(Callback):
    """Stands before MAIHTPruning: copies the model as trained, and notes all tokens that it sees from then on."""

    def on_train_end(self, trainer, pl_module):
        model = pl_module.net["lm"]
        self.dense = copy.deepcopy(model)
        self.measured, self.calibrated, self.measuring = [], [], False

        def begin(_, positional, keywords):
            self.measuring = True
            self.measured.append(positional[0] if positional else keywords["input_ids"])

        def end(*_):
            self.measuring = False

        def inside(_, positional, keywords):
            # Calibration needs no logits, and so does not call the whole model.
            if not self.measuring:
                self.calibrated.append(keywords["input_ids"])

        model.register_forward_pre_hook(begin, with_kwargs=True)
        model.register_forward_hook(end)
        model.model.register_forward_pre_hook(inside, with_kwargs=True)


class Given(CalibrationSource):
    """Windows that are given, and a note of the length that would suit the model."""

    def __init__(self, windows):
        self.given, self.suitable = windows, []

    def windows(self, tokenizer, seqlen):
        self.suitable.append(seqlen)
        return self.given


def fit(folder, module, *others, trainer_settings=None, **settings):
    """Fit for one step and prune at its end; what `Watch` has seen."""
    watch = Watch()
    defaults = {"calibration": Windows(), "evaluation": Evaluation(perplexity=[]), "config": FAST}
    callback = MAIHTPruning(**{**defaults, "output_dir": str(folder / "run"), **settings})
    trainer(watch, callback, *others, limit_train_batches=1, **(trainer_settings or {})).fit(module)
    return watch


def direct(model, windows=WINDOWS, **settings):
    """A copy of the model, pruned without Lightning."""
    pruned = copy.deepcopy(model)
    prune(pruned, windows, progress=False, **{"config": FAST, **settings})
    return pruned


def same(one, other):
    others = other.state_dict()
    assert set(one.state_dict()) == set(others)
    return all(torch.equal(tensor, others[name]) for name, tensor in one.state_dict().items())


def stages(folder):
    return json.loads((folder / "run" / "summary.json").read_text())["stages"]


@pytest.fixture
def module(tiny_llama):
    return Module(tiny_llama(vocab_size=64, **SMALL))


# ---- What is pruned, and how


@pytest.mark.parametrize(
    "changes",
    [
        {"sparsity": 0.3},
        {"pattern": "row"},
        {"pattern": "2:4"},
        {"pattern": "row", "sparsity": 0.7, "method": "iht"},
        {"config": "paper"},
        {"config": "balanced"},
        {"config": "best"},
    ],
    ids=str,
)
def test_weights_are_those_of_prune(module, tmp_path, changes):
    watch = fit(tmp_path, module, **changes)
    expected = direct(watch.dense, **changes)
    assert same(module.net["lm"], expected)
    for name in changes:
        assert not same(expected, direct(watch.dense, **{key: value for key, value in changes.items() if key != name}))
    assert not same(expected, watch.dense)


@pytest.mark.slow
def test_every_field_of_the_config_counts(module, tmp_path):
    changes = {
        "mu": 0.5,
        "iterations": 11,
        "refine_iterations": 13,
        "step_scale": 0.5,
        "precision": "float64",
        "tolerance": 0.05,
    }
    config = MAIHTConfig(**changes)
    watch = fit(tmp_path, module, config=config)
    expected = direct(watch.dense, config=config)
    assert same(module.net["lm"], expected)
    for name in changes:
        without = replace(config, **{name: getattr(MAIHTConfig(), name)})
        assert not same(expected, direct(watch.dense, config=without)), name


@pytest.mark.parametrize("method", METHODS)
def test_the_method_is_the_one_named(module, tmp_path, method):
    watch = fit(tmp_path, module, method=method)
    assert same(module.net["lm"], direct(watch.dense, method=method))


def test_methods_and_patterns_differ(tiny_llama):
    """So that the tests above test something."""
    model = tiny_llama(vocab_size=64, **SMALL)
    pruned = [direct(model, method=method) for method in METHODS]
    pruned += [direct(model, pattern=pattern) for pattern in ("row", "2:4")]
    assert not any(same(one, other) for one, other in combinations(pruned, 2))


def test_keep_zeros_keeps_those_of_the_model(tiny_llama, tmp_path):
    model = tiny_llama(vocab_size=64, **SMALL)
    zeros = {}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("_proj.weight"):
                zeros[name] = weight.abs() < weight.abs().median() / 2
                weight[zeros[name]] = 0
    module = Module(model, learning_rate=0.0)
    config = replace(FAST, keep_zeros=True)
    watch = fit(tmp_path, module, config=config, pattern="2:4")
    assert same(module.net["lm"], direct(watch.dense, config=config, pattern="2:4"))
    weights = dict(module.net["lm"].named_parameters())
    assert not any(weights[name][old].any() for name, old in zeros.items())
    forgetful = dict(direct(watch.dense, pattern="2:4").named_parameters())
    assert any(forgetful[name][old].any() for name, old in zeros.items())


def test_a_memory_budget_is_kept_to(module, tmp_path):
    rows = 11 * 32 * 4  # of the layer with most inputs
    with pytest.raises(MisconfigurationException, match=f"memory_budget must hold at least one row .* {rows} bytes"):
        fit(tmp_path / "small", module, config=replace(FAST, memory_budget=rows - 1))
    assert module.trainer.global_step == 0
    budget = replace(FAST, memory_budget=7 * rows)
    watch = fit(tmp_path, module, config=budget)
    assert same(module.net["lm"], direct(watch.dense, config=budget))


def test_several_shots_are_those_of_prune_on_what_was_trained_between(tiny_llama, tmp_path):
    class Copies(Callback):
        """The models before and after the first shot."""

        def on_train_batch_start(self, trainer, pl_module, *_):
            if trainer.global_step == 1:
                found.append(copy.deepcopy(pl_module.net["lm"]))

    found = []
    module = Module(tiny_llama(vocab_size=64, **SMALL))
    watch = Watch()
    # Few tokens have strongly correlated inputs, for which zeros would come back.
    windows = WINDOWS % 5
    shots = MAIHTPruning(
        calibration=Given(windows),
        evaluation=Evaluation(perplexity=[]),
        config=FAST,
        prune_at={"step:1": 0.3, "end": 0.31},
        output_dir=str(tmp_path / "run"),
    )
    trainer(Copies(), watch, shots, Copies(), limit_train_batches=3).fit(module)
    before, after = found
    assert same(after, direct(before, windows, sparsity=0.3))
    assert not same(watch.dense, after)
    kept = replace(FAST, keep_zeros=True)
    assert same(module.net["lm"], direct(watch.dense, windows, sparsity=0.31, config=kept))
    assert not same(module.net["lm"], direct(watch.dense, windows, sparsity=0.31))


def test_the_trainers_precision_holds_while_pruning_and_measuring(sharp_llama, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(letters(language(3, 20).flatten()))
    module = Module(sharp_llama(**SMALL), Letters())
    evaluation = Evaluation(perplexity=[str(text)], seqlen=20)
    watch = fit(tmp_path, module, evaluation=evaluation, trainer_settings={"precision": "bf16-mixed"})
    with torch.autocast("cpu", torch.bfloat16):
        expected = direct(watch.dense)
        dense = perplexity_by_definition(watch.dense, language(3, 20))
    assert same(module.net["lm"], expected)
    assert not same(expected, direct(watch.dense))
    assert stages(tmp_path)["dense"]["perplexity"][str(text)] == pytest.approx(dense, rel=1e-5)
    assert dense != pytest.approx(perplexity_by_definition(watch.dense, language(3, 20)), rel=1e-4)


# ---- Which model


def test_the_model_is_the_one_named(tiny_llama, tmp_path):
    module = Module(tiny_llama(vocab_size=64, **SMALL))
    module.net["other"] = tiny_llama(vocab_size=64, seed=1, **SMALL)
    before = copy.deepcopy(module.net["other"])
    watch = fit(tmp_path, module, model="net.other")
    assert same(module.net["other"], direct(before))
    assert same(module.net["lm"], watch.dense)
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model"), module.net["other"])


def test_a_model_inside_another_is_not_one_of_several(tiny_llama):
    module = Module(tiny_llama(vocab_size=64, **SMALL))
    assert isinstance(module.net["lm"].model, PreTrainedModel)
    assert find_language_model(module) is module.net["lm"]


def test_a_model_without_blocks_is_refused():
    class Plain(PreTrainedModel):
        config_class = PreTrainedConfig

    module = Module(Plain(PreTrainedConfig()))
    with pytest.raises(MisconfigurationException, match=r"'net\.lm' of Module cannot be pruned: Plain has no decoder"):
        find_language_model(module)


# ---- Calibration


def test_all_windows_are_used(module, tmp_path):
    windows = torch.randint(0, 64, (5, 24), generator=torch.Generator().manual_seed(8))
    watch = fit(tmp_path, module, calibration=Given(windows))
    assert torch.equal(torch.cat(watch.calibrated), windows)
    assert same(module.net["lm"], direct(watch.dense, windows))
    assert not same(module.net["lm"], direct(watch.dense, windows[:-1]))


def test_batch_size_is_the_windows_of_a_forward_pass(module, tmp_path):
    watch = fit(tmp_path, module, batch_size=4)
    assert [len(batch) for batch in watch.calibrated] == [4, 2]
    assert torch.equal(torch.cat(watch.calibrated), WINDOWS)
    assert same(module.net["lm"], direct(watch.dense, batch_size=4))


@pytest.fixture
def corpus(tmp_path, monkeypatch, no_hub):
    """Local copies of C4 (documents of 40 to 100 letters) and of WikiText-2; the lines of the latter."""
    import pyarrow
    from pyarrow import parquet

    draw = random.Random(0)
    monkeypatch.setenv("MAIHT_DATA_DIR", str(tmp_path / "data"))
    for name in ("c4", "wikitext2"):
        (tmp_path / "data" / name).mkdir(parents=True)
    with gzip.open(tmp_path / "data" / "c4" / "train.jsonl.gz", "wt") as file:
        for _ in range(200):
            text = "".join(draw.choices("abcdefghij", k=draw.randint(40, 100)))
            file.write(json.dumps({"text": text}) + "\n")
    lines = ["", *(letters(language(1, 30, seed=seed)[0]) for seed in range(6)), ""]
    parquet.write_table(pyarrow.table({"text": lines}), tmp_path / "data" / "wikitext2" / "test.parquet")
    return lines


@pytest.mark.parametrize(
    ("source", "settings"),
    [
        (C4Calibration, {"samples": 3, "seqlen": 20, "sampling": "packed", "seed": 5}),
        (C4Calibration, {"samples": 4, "seqlen": 50, "seed": 6}),
        (PythonDocsCalibration, {"samples": 3, "seqlen": 30, "seed": 7}),
    ],
)
def test_a_sources_settings_decide_the_windows(module, corpus, tmp_path, source, settings):
    module.tokenizer = Letters()
    watch = fit(tmp_path, module, calibration=source(**settings))
    windows = torch.cat(watch.calibrated)
    assert windows.shape == (settings["samples"], settings["seqlen"])
    assert torch.equal(windows, source(**settings).windows(Letters(), 0))
    for name in settings:
        others = source(**{key: value for key, value in settings.items() if key != name}).windows(Letters(), 40)
        assert not torch.equal(windows, others)
    assert same(module.net["lm"], direct(watch.dense, windows))


def save_tokenizer(folder):
    """Write a Hugging Face tokenizer with a token a letter; it is returned as well."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {letter: 63 - place for place, letter in enumerate("?abcdefghijklmnopqrstuvwxyz \n")}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?", eos_token="\n")
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_the_tokenizer_is_the_one_named(module, tmp_path):
    named, module.tokenizer = save_tokenizer(tmp_path / "named"), Letters()
    source = PythonDocsCalibration(samples=3, seqlen=30)
    watch = fit(tmp_path, module, calibration=source, tokenizer=str(tmp_path / "named"))
    assert torch.equal(torch.cat(watch.calibrated), source.windows(named, 0))
    assert not torch.equal(torch.cat(watch.calibrated), source.windows(Letters(), 0))
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "model").get_vocab() == named.get_vocab()


def test_the_tokenizer_is_the_modules_or_else_the_one_beside_the_weights(tiny_llama, tmp_path):
    module = Module(tiny_llama(vocab_size=64, **SMALL), Letters())
    model = module.net["lm"]
    beside = save_tokenizer(tmp_path / "model")
    model.config._name_or_path = str(tmp_path / "model")
    assert find_tokenizer(module, model) is module.tokenizer
    module.tokenizer = None
    assert find_tokenizer(module, model).get_vocab() == beside.get_vocab()
    del module.tokenizer
    assert find_tokenizer(module, model).get_vocab() == beside.get_vocab()


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        ("", r"Module has no `tokenizer`, and the model does not say .* MAIHTPruning\(tokenizer=\.\.\.\)"),
        ("/absent/model", "no model at /absent/model.* Name one with `tokenizer`"),
    ],
)
def test_without_any_tokenizer_a_fit_stops_before_training(module, tmp_path, beside, message):
    module.tokenizer, module.net["lm"].config._name_or_path = None, beside
    with pytest.raises(MisconfigurationException, match=f"no tokenizer for the calibration text: {message}"):
        fit(tmp_path, module, calibration=PythonDocsCalibration(samples=3, seqlen=30))
    assert module.steps == 0


@pytest.mark.slow
def test_by_default_balanced_at_the_models_length(sharp_llama, corpus, tmp_path):
    module, watch = Module(sharp_llama(max_position_embeddings=48, **SMALL), Letters()), Watch()
    pruning = MAIHTPruning(output_dir=str(tmp_path / "run"))
    trainer(watch, pruning, limit_train_batches=1).fit(module)
    calibrated = torch.cat(watch.calibrated)
    assert calibrated.shape == (128, 48)
    assert torch.equal(calibrated, C4Calibration(samples=128, seqlen=48).windows(Letters(), 0))
    expected = copy.deepcopy(watch.dense)
    prune(expected, calibrated, sparsity=0.5, pattern="unstructured", method="maiht", config="balanced", progress=False)
    assert same(module.net["lm"], expected)
    tokens = torch.tensor(Letters()("\n\n".join(corpus))["input_ids"])
    windows = tokens[: len(tokens) // 48 * 48].view(-1, 48)
    assert len(windows) == 4
    for stage, model in (("dense", watch.dense), ("pruned", expected)):
        assert list(stages(tmp_path)[stage]) == ["perplexity"]
        found = stages(tmp_path)[stage]["perplexity"]
        assert found == {"wikitext2": pytest.approx(perplexity_by_definition(model, windows), rel=1e-5)}


def test_no_length_goes_beyond_that_of_papers(tiny_llama, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a story " * 600)
    module, source = Module(tiny_llama(vocab_size=64, max_position_embeddings=5000, **SMALL), Letters()), Given(WINDOWS)
    watch = fit(tmp_path, module, calibration=source, evaluation=Evaluation(perplexity=[str(text)]), method="magnitude")
    assert source.suitable == [2048]
    assert [tuple(window.shape) for window in watch.measured] == 4 * [(1, 2048)]


@pytest.mark.parametrize(
    ("config", "shortest"),
    [
        ({"pad_token_id": 0}, 2),
        ({"pad_token_id": 0, "eos_token_id": 0, "bos_token_id": 1}, 2),
        ({"pad_token_id": 0, "eos_token_id": [2, 0], "bos_token_id": 0}, 3),
        ({"eos_token_id": 0, "bos_token_id": 1}, 2),
        ({"eos_token_id": [0, 2]}, 2),
        ({"eos_token_id": 0, "bos_token_id": 0}, 3),
    ],
)
def test_padded_windows_are_refused(tiny_llama, config, shortest):
    """Padding is told from text by the length of its run at a window's edge."""
    model = tiny_llama(vocab_size=64, **SMALL, **config)
    before = copy.deepcopy(model)
    for length, edge in ((length, edge) for length in (shortest, 31, 32) for edge in ("left", "right")):
        windows = WINDOWS.clamp(min=3)
        windows[3, slice(length) if edge == "left" else slice(-length, None)] = 0
        windows[5, slice(length) if edge == "left" else slice(-length, None)] = 0
        with pytest.raises(ValueError, match=r"windows must be whole.* but 2 of 6 begin or end with padding"):
            prune(model, windows, method="magnitude", progress=False)
    assert same(model, before)
    # Documents of packed text end anywhere.
    windows = WINDOWS.clamp(min=3)
    windows[0, : shortest - 1] = windows[1, 1 - shortest :] = windows[2, 7 : 6 + shortest] = 0
    windows[4, 10:20] = 0
    prune(model, windows, method="magnitude", progress=False)


@pytest.mark.parametrize("config", [{}, {"pad_token_id": -1, "eos_token_id": 1}, {"bos_token_id": 0}])
def test_without_a_padding_token_nothing_is_padding(tiny_llama, config):
    windows = WINDOWS.clamp(min=3)
    windows[0, :9] = 0
    prune(tiny_llama(vocab_size=64, **SMALL, **config), windows, method="wanda", progress=False)


def test_padded_windows_stop_a_fit_before_training(tiny_llama, tmp_path):
    module = Module(tiny_llama(vocab_size=64, pad_token_id=0, **SMALL))
    windows = WINDOWS.clamp(min=1)
    windows[0, :4] = 0
    with pytest.raises(MisconfigurationException, match="windows must be whole"):
        fit(tmp_path, module, calibration=Given(windows))
    assert module.steps == 0


# ---- Evaluation


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [("batch_size", 0, 1), ("seqlen", 1, 2), ("max_windows", 0, 1), ("limit", 0, 1), ("num_fewshot", -1, 0)],
)
def test_bad_settings_of_an_evaluation_fail_at_once(name, value, least):
    with pytest.raises(ValueError, match=f"{name} must be at least {least}, but found {value}"):
        Evaluation(**{name: value})
    Evaluation(**{name: least})


@pytest.mark.parametrize(("config", "length"), [({"max_position_embeddings": 40}, 40), ({}, 2048), (None, 2048)])
def test_a_model_that_does_not_say_its_context_has_that_of_papers(config, length):
    assert (
        context_length(SimpleNamespace(config=SimpleNamespace(**config)) if config is not None else object()) == length
    )


def test_perplexity_is_that_of_the_texts_and_windows_asked_for(sharp_llama, tmp_path):
    texts = {str(tmp_path / f"{name}.txt"): language(1, 95, seed=seed)[0] for seed, name in enumerate(("one", "two"))}
    for file, tokens in texts.items():
        Path(file).write_text(letters(tokens))
    module = Module(sharp_llama(**SMALL), Letters())
    evaluation = Evaluation(perplexity=list(texts), seqlen=20, max_windows=3, batch_size=2)
    watch = fit(tmp_path, module, evaluation=evaluation)
    assert [len(batch) for batch in watch.measured] == 4 * [2, 1]
    for stage, model in (("dense", watch.dense), ("pruned", direct(watch.dense))):
        found = stages(tmp_path)[stage]
        assert list(found) == ["perplexity"]
        assert list(found["perplexity"]) == list(texts)
        for file, tokens in texts.items():
            expected = perplexity_by_definition(model, tokens[:60].view(3, 20))
            assert found["perplexity"][file] == pytest.approx(expected, rel=1e-5)
            # What the settings would be without.
            for windows in (tokens[:80].view(4, 20), tokens[:60].view(1, 60), tokens[:40].view(2, 20)):
                assert perplexity_by_definition(model, windows) != pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_tasks_are_those_asked_for_with_their_settings(tiny_llama, tokenizer, local_data, no_hub, tmp_path):
    pytest.importorskip("lm_eval")
    from maiht_lightning.evaluation.lm_eval_tasks import load_tasks
    from maiht_lightning.evaluation.zero_shot import zero_shot

    module, names = (
        Module(tiny_llama(**SMALL | {"max_position_embeddings": 2048}), tokenizer),
        ["arc_easy", "arc_challenge"],
    )
    evaluation = Evaluation(perplexity=[], tasks=names, limit=2, num_fewshot=1, batch_size=3)
    watch = fit(tmp_path, module, evaluation=evaluation, method="magnitude")
    tasks = load_tasks(names, num_fewshot=1)
    for stage, model in (("dense", watch.dense), ("pruned", direct(watch.dense, method="magnitude"))):
        expected = zero_shot(model, tokenizer, tasks, limit=2, batch_size=3, progress=False)
        mean = (expected["arc_easy"]["acc"] + expected["arc_challenge"]["acc"]) / 2
        assert stages(tmp_path)[stage] == {"perplexity": {}, "tasks": expected, "mean_accuracy": mean}
    assert max(len(batch) for batch in watch.measured) == 3
    prompts = [text for batch in watch.measured for text in tokenizer.batch_decode(batch)]
    assert {prompt.count("Question:") for prompt in prompts} == {2}  # a solved one before each
    questions = {prompt.split("Question:")[-1].split("Answer:")[0] for prompt in prompts}
    assert len(questions) == 2 * len(names)


# ---- Where things lie


class Moves(Module):
    """Notes where it is moved, among other events."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.events = []

    def to(self, *arguments, **keywords):
        self.events.append(arguments)
        return super().to(*arguments, **keywords)


@pytest.mark.parametrize("offload", ["cpu", "none"])
def test_offload_moves_the_model_to_host_memory_while_it_is_pruned_and_measured(sharp_llama, tmp_path, offload):
    """`cpu:0` stands in for a GPU: PyTorch takes it for the CPU's memory, but it is another name."""
    gpu, host = torch.device("cpu", 0), "cpu"
    text = tmp_path / "text.txt"
    text.write_text(letters(language(2, 20).flatten()))
    module = Moves(sharp_llama(**SMALL), Letters())
    model, events = module.net["lm"], module.events

    class Note(Callback):
        def on_train_end(self, trainer, pl_module):
            events.append("trained")
            # Blocks alone run in calibration, the whole model in measurements.
            model.register_forward_hook(lambda *_: events.append("measured"))
            model.model.layers[0].register_forward_hook(lambda *_: events.append("block"))

    watch, note = Watch(), Note()
    pruning = MAIHTPruning(
        calibration=Windows(),
        evaluation=Evaluation(perplexity=[str(text)], seqlen=20),
        config=FAST,
        offload=offload,
        output_dir=str(tmp_path / "run"),
    )
    strategy = SingleDeviceStrategy(device=gpu)
    trainer(watch, note, pruning, strategy=strategy, limit_train_batches=1).fit(module)
    after = events[events.index("trained") + 1 :]
    measured = ["block", "measured"]
    moves = [event for event in after if event not in measured]
    assert events[0] == (gpu,)
    assert moves == ([(host,), (gpu,)] if offload == "cpu" else [])
    work = [event for event in after if event in measured]
    assert work[:4] == work[-4:] == 2 * measured
    assert len(work) > 8
    if offload == "cpu":
        assert [after[0], after[-1]] == moves
    assert same(module.net["lm"], direct(watch.dense))


def test_a_fit_cannot_leave_blocks_on_disk(module, tmp_path):
    with pytest.raises(MisconfigurationException, match="offload: disk leaves blocks in files, for `maiht prune`"):
        fit(tmp_path, module, offload="disk")
    assert module.steps == 0


@pytest.mark.parametrize("place", ["disk", "device", "host", "auto"])
def test_hidden_states_lie_where_they_are_asked_to(module, tmp_path, monkeypatch, place):
    # Without this `auto` would choose the host's memory.
    monkeypatch.setattr("maiht_lightning.capture.hidden_states.available_host_memory", lambda: 0)
    files = []

    class Look(Callback):
        def on_train_end(self, trainer, pl_module):
            last = pl_module.net["lm"].model.layers[0].mlp.down_proj
            run = tmp_path / "run"
            last.register_forward_hook(lambda *_: files.append(len(list(run.glob("hidden_states_*/*")))))

    watch = Watch()
    pruning = MAIHTPruning(
        calibration=Windows(),
        evaluation=Evaluation(perplexity=[]),
        config=FAST,
        hidden_states=place,
        batch_size=2,
        output_dir=str(tmp_path / "run"),
    )
    trainer(watch, Look(), pruning, limit_train_batches=1).fit(module)
    assert max(files) == (3 if place in ("disk", "auto") else 0)
    assert not list((tmp_path / "run").glob("hidden_states_*"))
    assert same(module.net["lm"], direct(watch.dense, batch_size=2))


@pytest.mark.parametrize("also", ["save_dense", "compact", None])
def test_the_run_folder_holds_the_models_asked_for(module, tmp_path, also):
    watch = fit(tmp_path, module, **({also: True} if also else {}))
    run = tmp_path / "run"
    assert same(AutoModelForCausalLM.from_pretrained(run / "model"), module.net["lm"])
    assert (run / "model_dense").exists() == (also == "save_dense")
    assert (run / "model_compact").exists() == (also == "compact")
    if also == "save_dense":
        assert same(AutoModelForCausalLM.from_pretrained(run / "model_dense"), watch.dense)
    elif also == "compact":
        assert same(load_compact(run / "model_compact"), module.net["lm"])
