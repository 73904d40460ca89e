"""Well-known models are known by the sizes that their authors give."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from maiht_lightning.cli import main
from maiht_lightning.estimate.known_models import KNOWN_MODELS, known_config
from maiht_lightning.estimate.shape import ModelShape

# Parameters as the models' pages and their safetensors indices count them, tied ones once.
PARAMETERS = {
    "huggyllama/llama-7b": 6_738_415_616,
    "huggyllama/llama-13b": 13_015_864_320,
    "huggyllama/llama-30b": 32_528_943_616,
    "huggyllama/llama-65b": 65_285_660_672,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
}


def test_all_are_counted():
    assert PARAMETERS.keys() == set(KNOWN_MODELS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(known_config(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_names_are_taken_in_any_case_and_others_are_not_known():
    assert known_config("Huggyllama/LLaMA-7B").hidden_size == 4096
    assert known_config("huggyllama/llama-8b") is None


@pytest.mark.slow
def test_no_network_is_needed(monkeypatch, capsys):
    def refuse(*args, **kwargs):
        pytest.fail(f"the hub was asked for {args}")

    monkeypatch.setattr("huggingface_hub.file_download.hf_hub_download", refuse)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", refuse)
    assert ModelShape.from_source("meta-llama/Llama-2-70b-hf").parameters == PARAMETERS["meta-llama/Llama-2-70b-hf"]
    main(["estimate", "--model", "huggyllama/llama-7b", "--gpu", "h100-80gb"])
    assert "6.74 B parameters" in capsys.readouterr().out


def test_a_folder_of_that_name_goes_before(tiny_llama, tmp_path, monkeypatch):
    tiny_llama(vocab_size=64).save_pretrained(tmp_path / "huggyllama" / "llama-7b")
    monkeypatch.chdir(tmp_path)
    assert ModelShape.from_source("huggyllama/llama-7b").vocabulary == 64
