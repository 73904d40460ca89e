"""Compact files: the same model back, bit for bit, and really smaller."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, MixtralConfig

from helpers.byte_model import VOCABULARY, llama_config, save_folder
from maiht_lightning import load_compact, prune, save_compact
from maiht_lightning.cli import main
from maiht_lightning.models.loading import load_model, load_tokenizer
from maiht_lightning.models.packing import pack, unpack

WINDOWS = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def sparse(tiny_llama):
    model = tiny_llama(vocab_size=64)
    prune(model, WINDOWS, sparsity=0.6, method="wanda", progress=False)
    return model


def same(one, two):
    first, second = one.state_dict(), two.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first)


def size(folder):
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 9),
    columns=st.integers(1, 21),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_bits_and_values_are_as_described(rows, columns, seed, dtype):
    """As docs/compact_format.md says, written plainly: eight weights per byte, the first in the highest bit."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    weight[torch.rand(rows, columns, generator=generator) > 0.5] = 0
    bits, values = pack(weight)
    kept = [entry for entry in weight.flatten().tolist() if entry != 0]
    assert values.dtype == dtype
    assert values.tolist() == kept
    text = "".join("1" if entry != 0 else "0" for entry in weight.flatten().tolist())
    text += "0" * (-len(text) % 8)
    assert bits.tolist() == [int(text[i : i + 8], 2) for i in range(0, len(text), 8)]
    out = torch.full_like(weight, torch.nan)
    unpack(bits, values, out)
    assert torch.equal(out, weight)


def test_weights_larger_than_a_chunk_are_packed(monkeypatch):
    monkeypatch.setattr("maiht_lightning.models.packing.CHUNK", 64)
    weight = torch.randn(33, 7) * (torch.rand(33, 7) > 0.5)
    out = torch.empty(33, 7)
    unpack(*pack(weight), out)
    assert torch.equal(out, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_model_comes_back(sparse, tmp_path, dtype):
    sparse = sparse.to(dtype)
    folder = save_compact(sparse, tmp_path / "compact")
    loaded = load_compact(folder)
    same(loaded, sparse)
    sparse.save_pretrained(tmp_path / "dense")
    assert torch.equal(loaded(WINDOWS).logits, load_model(str(tmp_path / "dense"), dtype)(WINDOWS).logits)
    same(load_model(str(folder), dtype), sparse)


def test_tied_heads_stay_tied(tiny_llama, tmp_path):
    model = tiny_llama(vocab_size=64, tie_word_embeddings=True)
    prune(model, WINDOWS, method="magnitude", progress=False)
    loaded = load_compact(save_compact(model, tmp_path / "compact"))
    same(loaded, model)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_really_smaller(sparse, tmp_path):
    sparse = sparse.half()
    sparse.save_pretrained(tmp_path / "dense")
    save_compact(sparse, tmp_path / "compact")
    linears = sum(p.numel() for name, p in sparse.named_parameters() if "_proj" in name)
    saved = size(tmp_path / "dense") - size(tmp_path / "compact")
    expected = linears * (2 * 0.6 - 1 / 8)
    assert abs(saved - expected) < 0.05 * expected + 4096  # headers


def test_a_dense_model_stays_as_it_is(tiny_llama, tmp_path):
    model = tiny_llama(vocab_size=64)
    folder = save_compact(model, tmp_path / "compact")
    tensors = json.loads((folder / "compact.json").read_text())["tensors"]
    assert all(list(tensor["xxh3"]) == [name] for name, tensor in tensors.items())
    same(load_compact(folder), model)


def test_an_older_compact_model_is_replaced_and_other_files_are_not(sparse, tmp_path):
    folder = save_compact(sparse, tmp_path / "compact")
    other = copy.deepcopy(sparse)
    other.model.norm.weight.data += 1
    save_compact(other, folder)
    same(load_compact(folder), other)
    assert not (tmp_path / "compact.partial").exists()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").touch()
    with pytest.raises(ValueError, match="other files than a compact model"):
        save_compact(sparse, tmp_path / "photos")
    assert (tmp_path / "photos" / "one.jpg").exists()


def written_bytes(folder):
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("asked", [None, "auto", "float32", "bfloat16", "float16"])
def test_export_keeps_the_checkpoints_format_unless_told_otherwise(tmp_path, monkeypatch, capsys, saved, asked):
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(save_folder(tmp_path / "pruned", dtype=saved))
    prune(model, WINDOWS, sparsity=0.5, method="magnitude", progress=False)
    model.save_pretrained("pruned")
    main(["export", "--model", "pruned", "--output", "small", *([] if asked is None else ["--dtype", asked])])
    dtype = saved if asked in (None, "auto") else getattr(torch, asked)
    loaded = load_compact("small")
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    same(loaded, model.to(dtype))
    weights = [p.numel() for p in loaded.parameters()]
    pruned = sum(p.numel() for name, p in loaded.named_parameters() if name.endswith("_proj.weight"))
    dense = sum(weights) * dtype.itemsize
    # A bit a weight and the half that is left; names and shapes take some more.
    expected = dense - pruned * dtype.itemsize // 2 + pruned // 8
    assert expected < written_bytes(tmp_path / "small") < expected + 6000
    said = capsys.readouterr().out
    sizes = f"{written_bytes(tmp_path / 'small') / 2**20:.1f} MiB instead of {dense / 2**20:.1f} MiB"
    assert f"small: {sizes} in {str(dtype).removeprefix('torch.')}" in said


def test_a_bfloat16_folder_becomes_smaller(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = llama_config(hidden_size=128, intermediate_size=256)
    model = AutoModelForCausalLM.from_pretrained(save_folder(tmp_path / "pruned", config, dtype=torch.bfloat16))
    prune(model, WINDOWS, sparsity=0.5, method="magnitude", progress=False)
    model.save_pretrained("pruned")
    main(["export", "--model", "pruned", "--output", "small"])
    assert written_bytes(tmp_path / "small") < 0.75 * written_bytes(tmp_path / "pruned")
    small, dense = (written_bytes(tmp_path / name) / 2**20 for name in ("small", "pruned"))
    # Large enough for the digits that are printed.
    assert f"{small:.1f} MiB instead of {dense:.1f} MiB in bfloat16" in capsys.readouterr().out
    assert round(dense, 1) != round(2 * dense, 1) != round(small, 1)


def test_a_config_alone_has_its_own_format_or_float32(tmp_path):
    for name, dtype, expected in (("half", torch.float16, torch.float16), ("plain", None, torch.float32)):
        llama_config(dtype=dtype).save_pretrained(tmp_path / name)
        assert load_model(str(tmp_path / name / "config.json"), None).dtype == expected
        assert load_model(str(tmp_path / name / "config.json"), torch.bfloat16).dtype == torch.bfloat16


def test_what_export_cannot_do_is_said_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_folder(
        tmp_path / "mixture",
        MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=4,
        ),
    )
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").touch()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    for options, message in (
        (["--model", "mixture", "--output", "small"], "mixture-of-experts weights"),
        # Said before the model is looked for.
        (["--model", "/nowhere", "--output", "photos"], "photos holds other files than a compact model"),
        (["--model", "/nowhere", "--output", "file"], "file holds other files than a compact model"),
        (["--model", "/nowhere", "--output", "small"], "no model at /nowhere"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["export", *options])
        assert stopped.value.code == 2
        said = capsys.readouterr().err
        assert message in said
        assert "Traceback" not in said
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_export_and_evaluate_from_the_command_line(tiny_folder, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fox.txt").write_text("The quick brown fox jumps over the lazy dog. " * 30)
    model = load_model(str(tiny_folder))
    prune(model, WINDOWS, sparsity=0.75, method="magnitude", progress=False)
    model.save_pretrained("pruned")
    tokenizer.save_pretrained("pruned")
    main(["export", "--model", "pruned", "--output", "compact"])
    assert "compact" in capsys.readouterr().out
    same(load_model("compact"), model)
    assert load_tokenizer("compact")("a b")["input_ids"] == tokenizer("a b")["input_ids"]
    for folder in ("pruned", "compact"):
        options = ["--perplexity", "[fox.txt]", "--seqlen", "32", "--output", f"{folder}.json"]
        main(["evaluate", "--model", folder, *options])
    found = [json.loads((tmp_path / f"{folder}.json").read_text()) for folder in ("pruned", "compact")]
    assert found[0]["perplexity"] == found[1]["perplexity"]
    assert found[1]["sparsity"] == 0.75
