"""CausalLMModule and loading: where weights come from, modes, precision, learning."""

import json
import math
import re

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from helpers.byte_model import byte_tokenizer
from helpers.sharp_model import language, perplexity_by_definition, sharpen
from maiht_lightning import CausalLMModule, FrozenSparsity, prune
from maiht_lightning.cli import main
from maiht_lightning.data.windows import evaluation_windows
from maiht_lightning.models.loading import load_model, load_tokenizer
from maiht_lightning.models.sparsity import count_zeros


class Repeated(LightningDataModule):
    """The same few windows again and again, which any model can learn."""

    def __init__(self, length=24):
        super().__init__()
        self.length = length

    def _loader(self):
        tokens = torch.arange(16).repeat(self.length, 2)
        return DataLoader([{"input_ids": row} for row in tokens], batch_size=2)

    def train_dataloader(self):
        return self._loader()

    def val_dataloader(self):
        return self._loader()


def quiet_trainer(**settings):
    settings = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False, **settings}
    return Trainer(enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, **settings)


@pytest.fixture
def folder(tiny_llama, tmp_path):
    tiny_llama(vocab_size=64).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_weights_of_a_folder_are_loaded_only_when_the_trainer_asks(folder, tiny_llama):
    module = CausalLMModule(str(folder))
    assert module.model is None
    module.configure_model()
    expected = tiny_llama(vocab_size=64).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in module.model.state_dict().items())


def test_config_file_means_random_weights(folder):
    torch.manual_seed(1)
    first = load_model(str(folder / "config.json"))
    torch.manual_seed(1)
    second = load_model(str(folder / "config.json"))
    stored = load_model(str(folder))
    weight = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first.state_dict()[weight], second.state_dict()[weight])
    assert not torch.equal(first.state_dict()[weight], stored.state_dict()[weight])


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "nowhere.gguf", "~/no/such/model"])
def test_missing_local_model_is_named_at_once(name):
    with pytest.raises(FileNotFoundError, match="no model at"):
        CausalLMModule(name)


@pytest.mark.parametrize("load", [CausalLMModule, load_model, load_tokenizer])
def test_a_runs_folder_is_no_model_and_the_one_in_it_is_named(load, tmp_path):
    (tmp_path / "summary.json").write_text("{}")
    message = f"no model at {tmp_path}: expected a Hugging Face folder, a .gguf file, a config.json, or a hub name"
    with pytest.raises(FileNotFoundError) as refused:
        load(str(tmp_path))
    assert str(refused.value) == message
    (tmp_path / "model").mkdir()
    with pytest.raises(FileNotFoundError) as refused:
        load(str(tmp_path))
    assert str(refused.value) == f"{message}. The model of this run is in {tmp_path / 'model'}"


def test_a_folder_may_have_a_tokenizer_alone(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path))("abc")["input_ids"] == byte_tokenizer()("abc")["input_ids"]


@pytest.mark.parametrize(
    ("setting", "value"), [("learning_rate", -1.0), ("weight_decay", float("nan")), ("warmup_fraction", 2.0)]
)
def test_settings_out_of_range_are_named(folder, setting, value):
    with pytest.raises(ValueError, match=setting):
        CausalLMModule(str(folder), **{setting: value})


@pytest.mark.slow
def test_training_lowers_the_loss_and_reports_perplexity(folder):
    module = CausalLMModule(str(folder), learning_rate=3e-3)
    trainer = quiet_trainer(max_epochs=3)
    trainer.validate(module, Repeated(), verbose=False)
    before = trainer.callback_metrics["val/perplexity"].item()
    trainer.fit(module, Repeated())
    assert trainer.callback_metrics["val/perplexity"].item() < before / 2


class Language(LightningDataModule):
    """Windows of a language that the model knows: others in each split, and a last batch of one."""

    windows = {name: language(5, 12, seed) for seed, name in enumerate(("train", "val", "test"))}  # noqa: RUF012

    def _loader(self, split):
        return DataLoader([{"input_ids": window} for window in self.windows[split]], batch_size=2)

    def train_dataloader(self):
        return self._loader("train")

    def val_dataloader(self):
        return self._loader("val")

    def test_dataloader(self):
        return self._loader("test")


def test_validation_and_test_log_perplexity_by_its_definition(tiny_llama, tmp_path):
    """Of a model that was trained a little, so that its perplexity is neither its vocabulary's size nor what it was."""
    sharpen(tiny_llama(vocab_size=64)).save_pretrained(tmp_path)
    module, data, found = CausalLMModule(str(tmp_path), learning_rate=3e-3, warmup_fraction=0), Language(), {}
    trainer = quiet_trainer(max_epochs=2)
    trainer.fit(module, data)
    found["fit"] = trainer.callback_metrics["val/perplexity"].item()
    found["val"] = trainer.validate(module, data, verbose=False)[0]["val/perplexity"]
    found["test"] = trainer.test(module, data, verbose=False)[0]["test/perplexity"]
    expected = {split: perplexity_by_definition(module.model, data.windows[split]) for split in ("val", "test")}
    assert found == pytest.approx({"fit": expected["val"], **expected}, rel=1e-5)
    before = perplexity_by_definition(load_model(str(tmp_path)).eval(), data.windows["val"])
    assert len({round(value, 2) for value in (before, expected["val"], expected["test"], 64)}) == 4


@pytest.mark.slow
def test_maiht_validate_and_test_print_perplexity_by_its_definition(tiny_folder, tokenizer, tmp_path, capsys):
    model = load_model(str(tiny_folder)).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # predictions that differ from token to token
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    windows = evaluation_windows("python_docs", tokenizer, 32, 5)
    options = ["--model.name_or_path", str(tmp_path / "model"), "--data", "PythonDocsDataModule"]
    options += ["--data.seqlen", "32", "--data.batch_size", "3", "--trainer.accelerator", "cpu"]
    options += ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false", "--output_dir", str(tmp_path)]
    for command, split, batches in (("validate", "val", 1), ("test", "test", 1)):
        main([command, *options, f"--trainer.limit_{split}_batches", str(batches)])
        printed = re.search(rf"{split}/perplexity\D+([\d.]+)", capsys.readouterr().out)
        expected = perplexity_by_definition(model, windows[: 3 * batches])
        assert float(printed[1]) == pytest.approx(expected, rel=1e-5)
        assert not 0.5 < expected / len(tokenizer) < 2


def test_a_fit_is_that_of_a_plain_loop(tiny_llama, tmp_path):
    """AdamW with decay of matrices alone, a linear warm-up, and a cosine to 0, by their definitions."""
    rate, decay, steps, warm = 3e-3, 0.5, 6, 3
    model = sharpen(tiny_llama(vocab_size=64))
    model.save_pretrained(tmp_path)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    module = CausalLMModule(str(tmp_path), learning_rate=rate, weight_decay=decay, warmup_fraction=warm / steps)
    quiet_trainer(max_epochs=2, limit_val_batches=0).fit(module, Language())

    model.train()
    moments = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in model.named_parameters()}
    for step, batch in enumerate(list(Language().train_dataloader()) * 2):
        tokens = batch["input_ids"]
        logits = model(input_ids=tokens, use_cache=False).logits
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        share = step / warm if step < warm else (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2
        for name, p in model.named_parameters():
            first, second = moments[name]
            first.mul_(0.9).add_(0.1 * p.grad)
            second.mul_(0.999).add_(0.001 * p.grad**2)
            direction = first / (1 - 0.9 ** (step + 1)) / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            p.data -= share * rate * (direction + (decay * p.data if p.ndim == 2 else 0))
    for name, p in module.model.named_parameters():
        moved, expected = p.detach() - start[name], model.get_parameter(name).detach() - start[name]
        assert (moved - expected).norm() < 0.01 * expected.norm(), name


def test_learning_rate_warms_up_and_decays_to_zero(folder):
    module = CausalLMModule(str(folder), learning_rate=1e-3, warmup_fraction=0.25)
    rates = []
    module.on_train_batch_start = lambda *_: rates.append(module.optimizers().param_groups[0]["lr"])
    quiet_trainer(limit_val_batches=0).fit(module, Repeated())
    assert len(rates) == 12
    assert rates[0] == 0
    assert max(rates) == rates[3] == pytest.approx(1e-3)
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] < 1e-4


def test_weight_decay_spares_norms(folder):
    module = CausalLMModule(str(folder), weight_decay=0.1)
    groups = []
    module.on_train_start = lambda: groups.extend(module.optimizers().param_groups)
    quiet_trainer(max_steps=1, limit_val_batches=0).fit(module, Repeated())
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(p.ndim >= 2 for p in groups[0]["params"])
    assert len(groups[1]["params"]) == 5  # two norms a block and the last one


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_submodule_trains_and_checkpointing_is_really_on(folder, checkpointing):
    module = CausalLMModule(str(folder), gradient_checkpointing=checkpointing)
    calls, modes = [], []

    def count(_, __):
        calls.append(1)

    def start():
        modes.extend(m.training for m in module.model.modules())
        module.model.model.layers[0].mlp.up_proj.register_forward_pre_hook(count)

    module.on_train_start = start
    quiet_trainer(max_steps=1, limit_val_batches=0).fit(module, Repeated())
    assert all(modes)
    # A checkpointed block runs a second time in the backward pass.
    assert len(calls) == (2 if checkpointing else 1)


def test_bf16_true_trains_in_bfloat16(folder):
    module = CausalLMModule(str(folder))
    quiet_trainer(max_steps=2, precision="bf16-true").fit(module, Repeated())
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    # The metric's sums keep their precision.
    assert module.perplexity.loss_sum.dtype == torch.float64


@pytest.mark.slow
def test_gguf_file_becomes_a_plain_model_that_can_be_saved(smollm2_folder):
    """The fixture has read a .gguf file, saved what it got, and noted its logits."""
    model, tokenizer = load_model(str(smollm2_folder), None).eval(), load_tokenizer(str(smollm2_folder))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert type(model).__name__ == "LlamaForCausalLM"
    assert len(model.model.layers) == 30
    assert "quantization_config" not in json.loads((smollm2_folder / "config.json").read_text())
    as_read = torch.load(smollm2_folder / "as_read.pt", weights_only=True)
    tokens = torch.tensor([tokenizer("The capital of France is").input_ids])
    assert torch.equal(tokens, as_read["tokens"])
    with torch.no_grad():
        logits = model(tokens).logits
    torch.testing.assert_close(logits, as_read["logits"])
    assert tokenizer.decode(logits[0, -1].argmax()).strip() == "Paris"


@pytest.mark.slow
def test_eight_bit_adamw_keeps_small_updates_and_frozen_zeros(tiny_llama, tmp_path):
    """In bfloat16 plain AdamW stands still where float32 moves; measured along float32's way."""
    # Square, so that few shapes are compiled.
    model = tiny_llama(vocab_size=64, intermediate_size=64, num_key_value_heads=4, num_hidden_layers=1)
    model.save_pretrained(tmp_path)

    def moved(optimizer, precision):
        module = CausalLMModule(str(tmp_path), learning_rate=2e-6, warmup_fraction=0.0, optimizer=optimizer)
        trainer = quiet_trainer(precision=precision)
        trainer.fit(module, Repeated(64))
        weights = torch.cat([p.detach().float().flatten() for p in module.parameters()])
        return weights - torch.cat([p.detach().to(torch.bfloat16).float().flatten() for p in model.parameters()])

    exact = moved("adamw", "32-true")
    exact = exact + torch.cat([(p.to(torch.bfloat16).float() - p).detach().flatten() for p in model.parameters()])
    with pytest.warns(UserWarning, match="adamw_8bit"):
        plain = moved("adamw", "bf16-true")
    stochastic = moved("adamw_8bit", "bf16-true")
    shares = [float((way * exact).sum() / exact.square().sum()) for way in (plain, stochastic)]
    assert shares[0] < 0.5
    assert shares[1] == pytest.approx(1, abs=0.2)


@pytest.mark.slow
def test_eight_bit_adamw_keeps_zeros_frozen(tiny_llama, tmp_path):
    model = tiny_llama(vocab_size=64, intermediate_size=64, num_key_value_heads=4, num_hidden_layers=1)
    windows = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(1))
    prune(model, windows, method="magnitude", progress=False)
    model.save_pretrained(tmp_path)
    module = CausalLMModule(str(tmp_path), learning_rate=1e-3, weight_decay=0.1, optimizer="adamw_8bit")
    quiet_trainer(callbacks=[FrozenSparsity()], precision="bf16-true").fit(module, Repeated())
    assert [c.zeros for c in count_zeros(module.model)] == [c.zeros for c in count_zeros(model)]
    assert not torch.equal(
        module.model.model.layers[0].mlp.up_proj.weight.float(), model.model.layers[0].mlp.up_proj.weight
    )


def test_optimizers_that_cannot_be_had_are_named(folder, monkeypatch):
    with pytest.raises(ValueError, match="adamw or adamw_8bit"):
        CausalLMModule(str(folder), optimizer="sgd")
    monkeypatch.setattr("maiht_lightning.training.module.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="lowmem"):
        CausalLMModule(str(folder), optimizer="adamw_8bit")
