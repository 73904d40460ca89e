"""Rotary frequencies under `bf16-true`: those of the saved folder, in everybody's modules."""

import json

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from helpers import device
from helpers.byte_model import byte_tokenizer
from helpers.own_module import NoTokenizer, OwnModule, Windows, trainer
from maiht_lightning import CausalLMModule, MAIHTPruning
from maiht_lightning.cli import main
from maiht_lightning.evaluation.evaluation import Evaluation


class Ours(CausalLMModule):
    """Notes the frequencies with which it trains, on batches that are no dictionaries."""

    seen = ()

    def training_step(self, batch, batch_idx):
        self.seen = [*self.seen, dict(self.model.model.rotary_emb.named_buffers())]
        return super().training_step({"input_ids": batch}, batch_idx)


class Watching(OwnModule):
    """Notes the frequencies with which it trains."""

    def __init__(self, model):
        super().__init__(model)
        self.tokenizer, self.seen = NoTokenizer(), []

    def training_step(self, batch, batch_idx):
        rotary = self.net["lm"].model.rotary_emb
        self.seen.append({name: buffer.clone() for name, buffer in rotary.named_buffers()})
        return super().training_step(batch, batch_idx)


def pruning(folder, **settings):
    settings = {"calibration": Windows(), "evaluation": Evaluation(perplexity=[]), "config": "paper", **settings}
    return MAIHTPruning(output_dir=folder, **settings)


def exact(model):
    found = dict(model.model.rotary_emb.named_buffers())
    assert found["inv_freq"].dtype == torch.float32
    # Bits that bfloat16 has not.
    assert not torch.equal(found["inv_freq"], found["inv_freq"].bfloat16().float())
    return {name: buffer.clone() for name, buffer in found.items()}


def same(one, other):
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "32-true"])
def test_our_module_keeps_buffers_in_float32(tiny_llama, tmp_path, precision):
    model = tiny_llama(vocab_size=64)
    wanted = exact(model)
    model.save_pretrained(tmp_path / "model")
    module = Ours(str(tmp_path / "model"), learning_rate=0.0)
    trainer(precision=precision).fit(module, OwnModule(model).train_dataloader())
    dtype = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "32-true": torch.float32}[precision]
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert len(module.seen) == 4
    assert all(same(each, wanted) for each in module.seen)


def test_our_module_moves_its_buffers_all_the_same(tiny_llama):
    module = CausalLMModule("x")
    module.model = tiny_llama(vocab_size=64)
    module.to("meta")
    assert {buffer.device.type for buffer in module.buffers()} == {"meta"}
    module.to(torch.float64)
    assert {p.dtype for p in module.parameters()} == {torch.float64}
    assert module.model.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.slow
def test_in_other_peoples_modules_they_are_restored_before_the_first_step(tiny_llama, tmp_path):
    model = tiny_llama(vocab_size=64)
    wanted, module = exact(model), Watching(model)
    trainer(pruning(tmp_path / "run"), precision="bf16-true").fit(module)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert len(module.seen) == 4
    assert all(same(each, wanted) for each in module.seen)


def test_what_cannot_be_restored_is_refused_before_the_first_step(tiny_llama, tmp_path):
    model = tiny_llama(vocab_size=64)
    model.model.rotary_emb.inv_freq *= 1.1  # somebody's own
    module = Watching(model)
    with pytest.raises(
        MisconfigurationException, match=r"rotary_emb\.inv_freq was rounded to torch\.bfloat16.*bf16-mixed"
    ):
        trainer(pruning(tmp_path / "run"), precision="bf16-true").fit(module)
    assert module.seen == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "device",
    [torch.device("cpu"), *([pytest.param(device.DEVICE, marks=pytest.mark.gpu)] if device.THERE else [])],
    ids=str,
)
def test_a_runs_figures_are_those_of_its_saved_folder(tiny_llama, tmp_path, capsys, device):
    model = tiny_llama(vocab_size=257, max_position_embeddings=512)
    with torch.no_grad():
        for block in model.model.layers:
            # Attention that depends much on positions.
            for linear in (block.self_attn.q_proj, block.self_attn.k_proj):
                linear.weight *= 15
            block.self_attn.o_proj.weight *= 15
        model.lm_head.weight *= 15
    rotary = exact(model)
    model.bfloat16()
    for name, buffer in rotary.items():
        setattr(model.model.rotary_emb, name, buffer)
    model.save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    settings = {
        "seed_everything": 0,
        "model": {"name_or_path": str(tmp_path / "dense"), "learning_rate": 1e-3},
        "data": {"class_path": "PythonDocsDataModule", "init_args": {"seqlen": 512, "batch_size": 1}},
        "trainer": {"accelerator": "gpu" if device.type == "cuda" else "cpu", "devices": 1}
        | {"precision": "bf16-true", "max_steps": 2, "limit_val_batches": 0}
        | {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False},
        "pruning": {
            "sparsity": 0.5,
            "config": "paper",
            "save_dense": True,
            "calibration": {"class_path": "PythonDocsCalibration", "init_args": {"samples": 4, "seqlen": 128}},
            "evaluation": {"perplexity": ["python_docs"], "seqlen": 512, "max_windows": 6},
        },
    }
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    main(["fit", "--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "run")])
    stages = json.loads((tmp_path / "run" / "summary.json").read_text())["stages"]
    for stage, folder in (("dense", "model_dense"), ("pruned", "model")):
        output = tmp_path / f"{stage}.json"
        options = ["--perplexity", "[python_docs]", "--seqlen", "512", "--max_windows", "6", "--output", str(output)]
        options += ["--device", device.type]
        main(["evaluate", "--model", str(tmp_path / "run" / folder), *options])
        found = json.loads(output.read_text())["perplexity"]["python_docs"]
        assert stages[stage]["perplexity"]["python_docs"] == pytest.approx(found, rel=1e-4)
