"""LoRA on a pruned model: its zeros outlive training and PEFT's merge."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from maiht_lightning import FrozenSparsity, freeze, prune
from maiht_lightning.lora import MaskedLinear, MaskedProduct, mask_lora
from maiht_lightning.sparsity import count_zeros
from test_frozen import BATCHES, Module, trainer

ROOT = Path(__file__).parents[1]
TOKENS = BATCHES[95]


@pytest.fixture
def sparse(tiny_llama):
    model = tiny_llama(vocab_size=64, hidden_size=32, intermediate_size=48)
    prune(model, BATCHES[90], sparsity=0.6, method="wanda", progress=False)
    return model


def with_adapters(model, **settings):
    """Adapters whose product is not zero, as after some training."""
    peft_model = get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": "all-linear", **settings}))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    return peft_model


def zeros_of(model):
    return {n: p == 0 for n, p in model.named_parameters() if "_proj" in n and "lora" not in n}


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def test_the_product_and_its_gradients():
    generator = torch.Generator().manual_seed(0)
    x, down, up = (
        torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)
        for shape in ((2, 3, 7), (2, 7), (5, 2))
    )
    weight = torch.randn(5, 7, dtype=torch.float64, generator=generator) * (torch.rand(5, 7, generator=generator) > 0.5)
    expected = x @ (0.7 * (up @ down) * (weight != 0)).T
    torch.testing.assert_close(MaskedProduct.apply(x, down, up, weight, 0.7), expected)
    assert torch.autograd.gradcheck(lambda *t: MaskedProduct.apply(*t, weight, 0.7), (x, down, up))


def test_merging_keeps_the_zeros_and_the_outputs(sparse):
    zeros, before = zeros_of(sparse), logits(sparse)
    model = mask_lora(with_adapters(sparse))
    trained = logits(model)
    merged = model.merge_and_unload()
    assert all(torch.equal(zeros[name], now) for name, now in zeros_of(merged).items())
    torch.testing.assert_close(logits(merged), trained, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(trained, before, atol=1e-3)


def test_without_masks_peft_loses_them(sparse):
    assert not any(count.zeros for count in count_zeros(with_adapters(sparse).merge_and_unload()))


def test_as_a_dense_layer_with_the_masked_sum(sparse):
    """The same outputs as plain layers that hold W + s B A ∘ M."""
    model = mask_lora(with_adapters(sparse, lora_alpha=3))
    sums = {}
    for name, layer in model.named_modules():
        if isinstance(layer, MaskedLinear):
            base, a, b = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
            sums[name.removeprefix("base_model.model.")] = base + (base != 0) * (b @ a) * 0.75
    assert len(sums) == 14
    found = logits(model)
    plain = model.unload()
    for name, weight in sums.items():
        plain.get_submodule(name).weight.data = weight
    torch.testing.assert_close(found, logits(plain), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_with_frozen_sparsity(sparse, precision, checkpointing):
    zeros = zeros_of(sparse)
    dense = {n: p.detach().clone() for n, p in sparse.named_parameters()}
    peft_model = get_peft_model(sparse, LoraConfig(r=4, lora_dropout=0.05, target_modules="all-linear"))
    if checkpointing:
        peft_model.enable_input_require_grads()
        sparse.gradient_checkpointing_enable({"use_reentrant": False})
    module = Module(peft_model.train(), lambda p: torch.optim.AdamW([q for q in p if q.requires_grad], lr=1e-2))
    # The same batch again and again: the loss must fall.
    module.batches = BATCHES[:1].expand(40, -1, -1)
    trainer(FrozenSparsity(), max_steps=40, precision=precision).fit(module)
    assert module.losses[-1] < 0.9 * module.losses[0]
    for name, parameter in peft_model.named_parameters():
        if "base_layer" in name:
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(parameter, dense[plain].to(parameter.dtype))
    merged = peft_model.eval().merge_and_unload()
    assert all(now[zeros[name]].all() for name, now in zeros_of(merged).items())


def test_saved_adapters_are_masked_when_they_come_back(sparse, tiny_llama, tmp_path):
    sparse.save_pretrained(tmp_path / "base")
    model = mask_lora(with_adapters(sparse))
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapters")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(base, tmp_path / "adapters")
    torch.testing.assert_close(logits(mask_lora(again)), expected)


def test_switched_off_and_unmerged(sparse):
    before = logits(sparse)
    model = mask_lora(mask_lora(with_adapters(sparse)))
    on = logits(model)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), before)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), on, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), on, rtol=1e-5, atol=1e-5)


def test_freezing_masks_adapters_and_lets_them_learn(sparse):
    model = get_peft_model(sparse, LoraConfig(r=4, target_modules="all-linear"))
    frozen = freeze(model)
    assert len(frozen.kept) == 14
    assert all(name.endswith(".base_layer") for name in frozen.kept)
    assert sum(isinstance(layer, MaskedLinear) for layer in model.modules()) == 14


def test_what_cannot_be_kept_is_refused(sparse, tiny_llama):
    dora = get_peft_model(sparse, LoraConfig(r=4, use_dora=True, target_modules=["up_proj"]))
    with pytest.raises(ValueError, match=r"up_proj has zeros and an adapter that cannot keep them.*Dora"):
        mask_lora(dora)
    with pytest.raises(MisconfigurationException, match="cannot keep them"):
        trainer(FrozenSparsity()).fit(Module(dora))
    dense = get_peft_model(tiny_llama(vocab_size=64), LoraConfig(r=4, target_modules=["up_proj"]))
    assert not any(isinstance(layer, MaskedLinear) for layer in mask_lora(dense).modules())


def test_adapters_must_be_merged_before_pruning(tiny_llama):
    model = get_peft_model(tiny_llama(vocab_size=64), LoraConfig(r=4, target_modules=["up_proj"]))
    with pytest.raises(ValueError, match=r"up_proj and 1 more layers have PEFT adapters: merge them"):
        prune(model, BATCHES[90], method="wanda", progress=False)


@pytest.mark.slow
def test_the_example_script(tiny_folder, tmp_path):
    from maiht_lightning.loading import load_model, load_tokenizer

    model = load_model(str(tiny_folder))
    prune(model, torch.randint(0, 1000, (4, 32)), sparsity=0.6, method="wanda", progress=False)
    model.save_pretrained(tmp_path / "pruned")
    load_tokenizer(str(tiny_folder)).save_pretrained(tmp_path / "pruned")
    script = [sys.executable, ROOT / "configs" / "lora_recovery.py", "--model", "pruned", "--output", "recovered"]
    done = subprocess.run(
        [*script, "--steps", "20", "--seqlen", "64"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    recovered = load_model(str(tmp_path / "recovered"))
    before, after = zeros_of(model), zeros_of(recovered)
    assert all(torch.equal(zeros, after[name]) for name, zeros in before.items())
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), recovered.parameters(), strict=True))
    assert "59.9" in done.stdout or "60.0" in done.stdout
