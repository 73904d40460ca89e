"""What cannot be done is refused before the first training step, by what is wrong, and nothing is changed."""

import gzip
import json
import math
import re

import pytest
import torch
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from helpers.byte_model import byte_tokenizer, llama_config, save_folder
from helpers.own_module import OwnModule, Windows, trainer
from maiht_lightning import CausalLMModule, MAIHTPruning, prune, prune_layer
from maiht_lightning.cli import main
from maiht_lightning.evaluation.evaluation import Evaluation
from maiht_lightning.solvers import PruningSpec

WINDOWS = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))


def poison(value):
    def change(model):
        model.model.layers[1].mlp.up_proj.weight.data[3, 5] = value

    return change


def tie(model):
    block = model.model.layers[0].mlp
    block.up_proj.weight = block.gate_proj.weight


def quantise(model):
    linear = model.model.layers[0].self_attn.k_proj
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)


def poison_embedding(model):
    model.model.embed_tokens.weight.data[7, 0] = math.inf


def store_in_eight_bits(model):
    linear = model.model.layers[1].self_attn.o_proj
    linear.weight = nn.Parameter(linear.weight.data.to(torch.float8_e4m3fn), requires_grad=False)


class QuantisedTensor(torch.Tensor):
    """As torchao's: it says that it is of the dtype that its products have."""


def store_as_another_class(model):
    linear = model.model.layers[1].self_attn.o_proj
    linear.weight = nn.Parameter(linear.weight.data.as_subclass(QuantisedTensor), requires_grad=False)


UNFIT = {
    "nan": (poison(math.nan), r"layers\.1\.mlp\.up_proj has weights that are NaN or infinite"),
    "infinite": (poison(-math.inf), r"layers\.1\.mlp\.up_proj has weights that are NaN or infinite"),
    "tied": (tie, r"layers\.0\.mlp\.\w+ shares its weight with another module"),
    "quantised": (quantise, r"layers\.0\.self_attn\.k_proj has weights of torch\.int8: load the model in a floating"),
    "eight_bits": (store_in_eight_bits, r"layers\.1\.self_attn\.o_proj has weights of torch\.float8_e4m3fn: load"),
    "another_class": (store_as_another_class, r"layers\.1\.self_attn\.o_proj has weights of QuantisedTensor: load"),
    "embedding": (poison_embedding, r"model\.embed_tokens\.weight has weights that are NaN or infinite"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_unfit_weights_are_refused_before_training(tiny_llama, tmp_path, name):
    change, message = UNFIT[name]
    module = OwnModule(tiny_llama(vocab_size=64).train())
    change(module.net["lm"])
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    module.tokenizer = byte_tokenizer()
    module.training_step = lambda *_: pytest.fail("a training step was made")
    pruning = MAIHTPruning(
        calibration=Windows(), evaluation=Evaluation(perplexity=[]), output_dir=str(tmp_path / "run")
    )
    with pytest.raises(MisconfigurationException, match=message):
        trainer(pruning).fit(module)
    assert all(torch.equal(before[key], t) or t.isnan().any() for key, t in module.state_dict().items())


@pytest.mark.parametrize("name", UNFIT)
def test_unfit_weights_are_refused_by_prune(tiny_llama, name):
    change, message = UNFIT[name]
    model = tiny_llama(vocab_size=64)
    change(model)
    with pytest.raises((ValueError, TypeError), match=message):
        prune(model, WINDOWS, progress=False)


def test_a_head_that_is_tied_to_the_embedding_is_no_hindrance(tiny_llama):
    """Neither is pruned."""
    prune(tiny_llama(vocab_size=64, tie_word_embeddings=True), WINDOWS, method="magnitude", progress=False)


def test_a_model_whose_layers_are_quantised_is_refused_for_that(tiny_llama):
    model = tiny_llama(vocab_size=64)
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, _ in list(parent.named_children()):
                if name.endswith("_proj"):
                    setattr(parent, name, nn.Identity())
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is quantised.*load the model that it was made from"):
        prune(model, WINDOWS, progress=False)


# ---- Windows that a model cannot take


@pytest.fixture
def no_step(monkeypatch):
    monkeypatch.setattr(CausalLMModule, "training_step", lambda *_: pytest.fail("a training step was made"))


@pytest.fixture
def setting(tmp_path, monkeypatch):
    """A function that writes the configuration of a small run, of a model of 128 positions and 257 tokens."""
    monkeypatch.chdir(tmp_path)
    save_folder(tmp_path / "bytes")

    def write(**changes):
        text = {"class_path": "PythonDocsCalibration", "init_args": {"samples": 4, "seqlen": 64}}
        config = {
            "model": {"name_or_path": "bytes"},
            "data": {"class_path": "PythonDocsDataModule", "init_args": {"seqlen": 64, "batch_size": 4}},
            "trainer": {
                "accelerator": "cpu",
                "max_steps": 1,
                "limit_val_batches": 0,
                "logger": False,
                "enable_progress_bar": False,
                "enable_checkpointing": False,
            },
            "pruning": {
                "calibration": text,
                "evaluation": {"perplexity": ["python_docs"], "seqlen": 64, "max_windows": 2},
            },
        }
        for name, value in changes.items():
            *path, last = name.split("__")
            part = config
            for key in path:
                part = part[key]
            part[last] = value
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
        return ["--config", "run.yaml"]

    return write


def refused(capsys, *arguments):
    """What a command that ends with exit status 2 has said, in one line."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return " ".join(said.split())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"pruning__calibration__init_args__seqlen": 129},
            "settings: windows must have at most as many tokens as the ",
        ),
        (
            {"pruning__evaluation__seqlen": 129},
            "windows of python_docs must have at most as many tokens as the model has",
        ),
        (
            {"data__init_args__seqlen": 129},
            "train windows of PythonDocsDataModule must have at most as many tokens as ",
        ),
    ],
)
def test_windows_longer_than_the_models_positions_are_refused(setting, no_step, capsys, change, message):
    """Also of a rotary model, as LLaMA is, which would compute beyond them without a word."""
    said = refused(capsys, "fit", *setting(**change))
    assert message in said
    assert "128 by max_position_embeddings in its config, but have 129: choose a smaller seqlen" in said


@pytest.mark.slow
def test_windows_as_long_as_the_models_positions_are_taken(setting, no_figures, tmp_path):
    lengths = ("pruning__calibration__init_args__seqlen", "pruning__evaluation__seqlen", "data__init_args__seqlen")
    main(["fit", *setting(**dict.fromkeys(lengths, 128)), "--output_dir", "out"])
    assert (tmp_path / "out" / "model" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("own", "message"),
    [
        (True, "train windows of PythonDocsDataModule hold token ids"),
        (False, "pruning cannot work with these settings"),
    ],
)
def test_tokens_that_the_model_does_not_know_are_refused(setting, no_step, capsys, tmp_path, own, message):
    """Those of the model's own tokenizer, or of another one that the data is given."""
    save_folder(tmp_path / "few", llama_config(vocab_size=100))
    if own:
        # All of the calibration's and the evaluation's tokens are zeros.
        change = {"data__init_args__tokenizer": "bytes", "model__name_or_path": "few", "pruning__tokenizer": "zeros"}
        zeros = json.loads((tmp_path / "few" / "tokenizer.json").read_text())
        zeros["normalizer"] = {"type": "Replace", "pattern": {"Regex": "[^!]"}, "content": "!"}
        save_folder(tmp_path / "zeros")
        (tmp_path / "zeros" / "tokenizer.json").write_text(json.dumps(zeros))
    else:
        change = {"model__name_or_path": "few"}
    said = refused(capsys, "fit", *setting(**change))
    assert message in said
    assert re.search(r"hold token ids from \d+ to \d+, but the model knows 0 to 99: were they made with another", said)


# ---- Texts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "text.txt: the text must fill 1 window(s) of seqlen=64 tokens (64 tokens), but found 0 tokens"),
        (b"A few words.", "text.txt: the text must fill 1 window(s) of seqlen=64 tokens (64 tokens), but found 12"),
        (
            "é".encode("latin-1") * 999,
            "text.txt must hold text in UTF-8, whole, but cannot be read: UnicodeDecodeError",
        ),
    ],
)
def test_texts_that_are_none_are_refused_by_name(setting, no_step, capsys, tmp_path, content, message):
    (tmp_path / "text.txt").write_bytes(content)
    assert message in refused(capsys, "fit", *setting(pruning__evaluation__perplexity=["text.txt"]))


def test_damaged_local_copies_are_named(tmp_path, monkeypatch):
    from maiht_lightning.data.sources import load_texts

    monkeypatch.setenv("MAIHT_DATA_DIR", str(tmp_path))
    (tmp_path / "c4").mkdir()
    (tmp_path / "wikitext2").mkdir()
    whole = gzip.compress(b'{"text": "a"}\n' * 999)
    damaged = [b"no gzip", whole[: len(whole) // 2], whole[:20] + bytes(8) + whole[28:]]
    damaged += [gzip.compress(text) for text in (b"{", b"{}\n", b"[]\n", b"\xff\n")]
    for content in damaged:
        (tmp_path / "c4" / "train.jsonl.gz").write_bytes(content)
        with pytest.raises(ValueError, match=r"train\.jsonl\.gz must hold text in UTF-8, whole, but cannot be read"):
            load_texts("c4", "train")
    (tmp_path / "c4" / "train.jsonl.gz").write_bytes(whole)
    assert load_texts("c4", "train") == ["a"] * 999
    (tmp_path / "wikitext2" / "test.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"test\.parquet must hold text in UTF-8, whole, but cannot be read"):
        load_texts("wikitext2", "test")


@pytest.mark.slow
def test_calibration_shorter_than_a_window_is_refused(setting, no_step, capsys, tmp_path):
    save_folder(tmp_path / "long", llama_config(max_position_embeddings=10**6))
    said = refused(capsys, "fit", *setting(model__name_or_path="long", pruning__calibration__init_args__seqlen=999_999))
    assert re.search(
        r"the text must fill 4 window\(s\) of seqlen=999999 tokens .*, but found \d+ tokens, which make", said
    )


# ---- Folders and devices


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_refused(setting, no_step, capsys, tmp_path, tiny_llama):
    (tmp_path / "file").touch()
    said = refused(capsys, "fit", *setting(), "--output_dir", "file/run")
    assert "output_dir file/run cannot be made" in said
    module = OwnModule(tiny_llama(vocab_size=64).train())
    module.tokenizer = byte_tokenizer()
    module.training_step = lambda *_: pytest.fail("a training step was made")
    pruning = MAIHTPruning(
        calibration=Windows(), evaluation=Evaluation(perplexity=[]), output_dir=str(tmp_path / "file" / "run")
    )
    with pytest.raises(MisconfigurationException, match=r"output_dir .*file/run cannot be written .*Not a directory"):
        trainer(pruning).fit(module)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpus_that_are_not_there_are_refused(setting, no_step, capsys, tiny_llama):
    for name in ("gpu", "cuda"):
        said = refused(capsys, "fit", *setting(trainer__accelerator=name))
        assert f"trainer.accelerator must be one that is here, but found {name}, and PyTorch" in said
        assert "or give --trainer.accelerator cpu" in said
    with pytest.raises(ValueError, match=r"device must be one that PyTorch finds here, such as cpu, but found 'cuda'"):
        prune(tiny_llama(vocab_size=64), WINDOWS, device="cuda", progress=False)
    said = refused(capsys, "evaluate", "--model", "bytes", "--device", "cuda")
    assert "device must be one that PyTorch" in said


# ---- Settings


@pytest.mark.parametrize("value", [1, 1.5, -0.1, math.nan, math.inf, True, "0.5", None])
def test_sparsity_is_a_fraction_in_every_door(tiny_llama, value):
    message = r"sparsity.* but found "
    for door in (
        lambda: MAIHTPruning(sparsity=value),
        lambda: MAIHTPruning(prune_at={"epoch:1": value}),
        lambda: MAIHTPruning(prune_at={"epoch:1": 0.2, "end": value}),
        lambda: prune(tiny_llama(vocab_size=64), WINDOWS, sparsity=value, progress=False),
        lambda: prune_layer(torch.ones(4, 4), torch.eye(4), sparsity=value),
        lambda: PruningSpec.parse(value),
        lambda: PruningSpec.parse().at(value),
    ):
        with pytest.raises(ValueError, match=message):
            door()


@pytest.mark.parametrize("command", ["fit", "prune"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pruning.sparsity", "1"], "sparsity must be the fraction of zeros, at least 0 and below 1, but found 1.0"),
        (["--pruning.sparsity", "-0.1"], "at least 0 and below 1, but found -0.1"),
        (["--pruning.sparsity", "nan"], "sparsity"),
        (["--pruning.prune_at", "{'epoch:1': 1.5}"], "sparsity at epoch:1 must lie in [0, 1), but found 1.5"),
        (["--pruning.sparsty", "0.5"], "no setting --pruning.sparsty: did you mean --pruning.sparsity?"),
    ],
)
def test_bad_settings_are_refused_on_the_command_line(setting, no_step, capsys, command, options, message):
    assert message in refused(capsys, command, *setting(), *options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pruning__sparsty": 0.5}, "no setting pruning.sparsty: did you mean pruning.sparsity?"),
        ({"prunning": {"sparsity": 0.5}}, "no section prunning: did you mean pruning?"),
        ({"trainer__max_step": 3}, "no setting trainer.max_step: did you mean trainer.max_steps?"),
        ({"pruning__config": {"itertions": 3}}, "MAIHTConfig has no setting itertions: did you mean iterations?"),
        ({"data__init_args": {"seq_len": 64}}, "PythonDocsDataModule has no setting seq_len: did you mean seqlen?"),
        ({"pruning__zzz": 1}, "no setting pruning.zzz"),
    ],
)
def test_unknown_keys_of_a_file_are_refused_with_the_nearest_name(setting, no_step, capsys, change, message):
    said = refused(capsys, "fit", *setting(**change))
    assert message in said
    assert ("did you mean" in said) == ("pruning.zzz" not in said)
