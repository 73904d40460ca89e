"""LoRA on a pruned model: its zeros outlive training and PEFT's merge."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from helpers.frozen_fit import BATCHES, Module, trainer
from helpers.warm import python
from maiht_lightning import FrozenSparsity, freeze, prune
from maiht_lightning.models.sparsity import count_zeros
from maiht_lightning.recovery.lora import MaskedLinear, MaskedProduct, mask_lora

# Many short fits: several seconds in all.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
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


def test_several_adapters_dropout_and_gradients(sparse, monkeypatch):
    """As with the formula written out, which autograd differentiates."""
    model = with_adapters(sparse, lora_dropout=0.3)
    model.add_adapter("second", LoraConfig(r=3, lora_alpha=5, lora_dropout=0.2, target_modules=["up_proj", "q_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.second" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    model.base_model.set_adapter(["default", "second"])
    mask_lora(model).train()

    def plain(layer, x):
        result = layer.base_layer(x)
        for adapter in layer.active_adapters:
            if adapter in layer.lora_A:
                product = layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight * layer.scaling[adapter]
                result = result + layer.lora_dropout[adapter](x) @ (product * (layer.base_layer.weight != 0)).T
        return result

    def gradients():
        torch.manual_seed(1)
        model.zero_grad()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    found = gradients()
    monkeypatch.setattr(MaskedLinear, "forward", plain)
    expected = gradients()
    assert len(found) == 2 * 14 + 2 * 4
    assert all(gradient.any() for gradient in found.values())
    torch.testing.assert_close(found, expected)
    monkeypatch.undo()
    trained = logits(model.eval())
    torch.testing.assert_close(logits(model.merge_and_unload()), trained, rtol=1e-5, atol=1e-5)


def test_adapters_in_float32_over_bfloat16(sparse):
    zeros = zeros_of(sparse)
    model = mask_lora(with_adapters(sparse.bfloat16()))
    trained = logits(model)
    assert trained.dtype == torch.bfloat16
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    adapters = [p for n, p in model.named_parameters() if "lora_" in n]
    assert all(p.dtype == p.grad.dtype == torch.float32 and p.grad.any() for p in adapters)
    merged = model.merge_and_unload()
    assert all(now[zeros[name]].all() for name, now in zeros_of(merged).items())
    torch.testing.assert_close(logits(merged), trained, rtol=0.02, atol=0.02)


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
    torch.testing.assert_close(logits(again.merge_and_unload()), logits(model.merge_and_unload()))


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
    assert len(frozen.masks) == 14
    assert all(name.endswith(".base_layer") for name in frozen.masks)
    assert sum(isinstance(layer, MaskedLinear) for layer in model.modules()) == 14


def test_what_cannot_be_kept_is_refused(sparse, tiny_llama):
    dora = get_peft_model(sparse, LoraConfig(r=4, use_dora=True, target_modules=["up_proj"]))
    with pytest.raises(ValueError, match=r"up_proj has zeros and an adapter that cannot keep them.*Dora"):
        mask_lora(dora)
    with pytest.raises(MisconfigurationException, match="cannot keep them"):
        trainer(FrozenSparsity()).fit(Module(dora))
    dense = get_peft_model(tiny_llama(vocab_size=64), LoraConfig(r=4, target_modules=["up_proj"]))
    assert not any(isinstance(layer, MaskedLinear) for layer in mask_lora(dense).modules())


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}])
@pytest.mark.filterwarnings("ignore:`lora_bias=True`")
def test_adapters_added_later_are_masked_or_refused(sparse, settings):
    model = mask_lora(with_adapters(sparse))
    before = logits(model)
    with pytest.raises(ValueError, match="q_proj has zeros and an adapter that cannot keep them"):
        model.add_adapter("second", LoraConfig(r=4, target_modules="all-linear", **settings))
    assert torch.equal(logits(model), before)
    model.add_adapter("third", LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.set_adapter("third")
    zeros, trained = sum(count.zeros for count in count_zeros(model)), logits(mask_lora(model))
    assert not torch.allclose(trained, before, atol=1e-3)
    merged = model.merge_and_unload()
    assert sum(count.zeros for count in count_zeros(merged)) == zeros
    torch.testing.assert_close(logits(merged), trained, rtol=1e-5, atol=1e-5)


def test_quantised_layers_are_refused(sparse):
    model = with_adapters(sparse)
    base = next(m for n, m in model.named_modules() if n.endswith("layers.1.mlp.up_proj.base_layer"))
    base.weight = torch.nn.Parameter((base.weight * 100).to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj is quantised \(torch\.int8\)"):
        mask_lora(model)


def test_inputs_cannot_choose_among_adapters(sparse):
    layer = next(m for m in mask_lora(with_adapters(sparse)).modules() if isinstance(m, MaskedLinear))
    x = torch.randn(2, layer.in_features)
    assert torch.equal(layer(x, adapter_names=None), layer(x))
    with pytest.raises(ValueError, match="cannot be mixed within a batch"):
        layer(x, adapter_names=["default"] * len(x))


def test_adapters_must_be_merged_before_pruning(tiny_llama):
    model = get_peft_model(tiny_llama(vocab_size=64), LoraConfig(r=4, target_modules=["up_proj"]))
    with pytest.raises(ValueError, match=r"up_proj and 1 more layers have PEFT adapters: merge them"):
        prune(model, BATCHES[90], method="wanda", progress=False)


@pytest.mark.slow
def test_the_example_script(tiny_folder, tmp_path):
    from maiht_lightning.models.loading import load_model, load_tokenizer

    model = load_model(str(tiny_folder))
    prune(model, torch.randint(0, 1000, (4, 32)), sparsity=0.6, method="wanda", progress=False)
    model.save_pretrained(tmp_path / "pruned")
    load_tokenizer(str(tiny_folder)).save_pretrained(tmp_path / "pruned")
    script = ROOT / "docs" / "examples" / "lora_recovery.py"
    done = subprocess.run(
        [*python(), script, "--model", "pruned", "--output", "recovered", "--steps", "20", "--seqlen", "64"],
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
