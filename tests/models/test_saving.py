"""`model/` and its like: whole, on the disk, and compared with the model, or else as they were."""

import json
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers.byte_model import byte_tokenizer, same_weights
from helpers.families import FAMILIES, make
from maiht_lightning.models.durable import put_in_place
from maiht_lightning.models.saving import save_model


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_written_and_found_to_be_right(family, tmp_path):
    model = make(family)
    save_model(model, tmp_path / "model")
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), model)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_older_folder_is_replaced_as_a_whole(tiny_llama, tmp_path):
    one, two = tiny_llama(vocab_size=64, seed=1), tiny_llama(vocab_size=64, seed=2)
    one.save_pretrained(tmp_path / "model", max_shard_size="50KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    save_model(two, tmp_path / "model", byte_tokenizer())
    assert [path.name for path in (tmp_path / "model").glob("*.safetensors")] == ["model.safetensors"]
    assert (tmp_path / "model" / "tokenizer.json").exists()
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), two)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def flip(folder):
    path = next(folder.glob("*.safetensors"))
    written = bytearray(path.read_bytes())
    written[random.Random(0).randrange(len(written) // 2, len(written))] ^= 1
    path.write_bytes(written)


def lose(folder):
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def cut(folder):
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])


def fail(folder):
    raise OSError("no space left on device")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, r"in .*model\.safetensors is not what was written, one of 2 such tensors: is the disk at fault"),
        (lose, r"model\.layers\.1\.mlp\.up_proj\.weight in .*model\.partial is not what was written"),
        (cut, r"model\.safetensors cannot be read after it was written: .* Is the disk at fault"),
        (fail, "no space left"),
    ],
    ids=["flip", "lose", "cut", "full"],
)
def test_what_the_disk_has_changed_leaves_the_older_folder(tiny_llama, tmp_path, monkeypatch, damage, message):
    model = tiny_llama(vocab_size=64)
    save_model(model, tmp_path / "model")
    before = content(tmp_path / "model")
    save = model.save_pretrained
    monkeypatch.setattr(model, "save_pretrained", lambda folder, **more: (save(folder, **more), damage(folder)))
    with pytest.raises(OSError, match=message):
        save_model(model, tmp_path / "model")
    assert content(tmp_path / "model") == before
    # What the failed one left is not in the way of another.
    monkeypatch.undo()
    save_model(model, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_tied_weights_are_written_once(tiny_llama, tmp_path):
    model = tiny_llama(vocab_size=64, tie_word_embeddings=True)
    save_model(model, tmp_path / "model")
    with safe_open(tmp_path / "model" / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in set(file.keys())


@pytest.mark.parametrize("tied", [True, False])
def test_gathered_weights_are_compared_as_well(tiny_llama, tmp_path, monkeypatch, tied):
    """As of a model in shards, whose head may be a parameter of its own although it is tied."""
    model = tiny_llama(vocab_size=64, tie_word_embeddings=tied)
    if tied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach())
    monkeypatch.setattr("maiht_lightning.models.saving.is_sharded", lambda _: True)
    save_model(model, tmp_path / "model")
    found, expected = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("crash_at", ["first rename", "second rename"])
def test_a_crash_while_a_folder_is_replaced_leaves_a_whole_one(tmp_path, monkeypatch, crash_at):
    for name in ("model", "model.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(name))
    kind = type(tmp_path)
    monkeypatch.setattr(kind, "rename" if crash_at == "first rename" else "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        put_in_place(tmp_path / "model.partial", tmp_path / "model")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"model.partial", "model" if crash_at == "first rename" else "model.replaced"}
    monkeypatch.undo()
    put_in_place(tmp_path / "model.partial", tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text()) == "model.partial"
