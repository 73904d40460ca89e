"""Distillation against the definition in float64, and as a callback beside other people's training steps."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from maiht_lightning import CausalLMModule, Distillation, FrozenSparsity, prune
from maiht_lightning.data.python_docs import PythonDocsDataModule
from maiht_lightning.distillation import distillation_loss, distilled
from test_frozen import BATCHES, Module, trainer

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}


@pytest.fixture
def teacher(tiny_llama, tmp_path):
    """Folder of a dense model."""
    tiny_llama(**SMALL).save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


@pytest.fixture
def student(tiny_llama):
    """The same model, pruned."""
    model = tiny_llama(**SMALL)
    prune(model, BATCHES[90], sparsity=0.6, method="wanda", progress=False)
    return model.train()


def definition(student, teacher, labels, temperature):
    """Σ p (log p − log q) · T² over the positions that predict, in float64 from softmax and sums."""
    total, count = 0.0, 0
    for row in range(len(labels)):
        for position in range(labels.shape[1] - 1):
            if labels[row, position + 1] != -100:
                q, p = ((z[row, position].double() / temperature).softmax(0) for z in (student, teacher))
                total, count = total + (p * (p.log() - q.log())).sum(), count + 1
    return temperature**2 * total / count


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_and_its_gradient(temperature, dtype):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 6, 11, generator=generator).mul(3).to(dtype) for _ in range(2))
    labels = torch.randint(0, 11, (2, 6), generator=generator)
    labels[0, 3] = labels[1, :3] = -100
    gradients, losses = [], []
    for function in (distillation_loss, definition):
        logits = student.clone().requires_grad_()
        loss = function(logits, teacher, labels, temperature)
        (gradient,) = torch.autograd.grad(loss, logits)
        gradients.append(gradient.float())
        losses.append(float(loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    rounding = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(*gradients, rtol=rounding, atol=rounding * float(gradients[1].abs().max()))
    assert float(distillation_loss(teacher, teacher, labels, temperature)) == pytest.approx(0, abs=1e-6)


def test_in_chunks_as_at_once(monkeypatch):
    logits, labels = torch.randn(2, 2, 9, 7), torch.randint(0, 7, (2, 9))
    at_once = distillation_loss(*logits, labels)
    monkeypatch.setattr("maiht_lightning.distillation._CHUNK_ELEMENTS", 7 * 3)
    torch.testing.assert_close(distillation_loss(*logits, labels), at_once)


def test_the_mixture(student, tiny_llama):
    teacher, batch = tiny_llama(**SMALL), BATCHES[0]
    own = student(input_ids=batch, labels=batch).loss
    kl = definition(student(batch).logits, teacher(batch).logits, batch, 2.0)
    with distilled(student, teacher, weight=0.3, temperature=2.0):
        mixed = student(input_ids=batch, labels=batch).loss
        student.eval()
        assert student(input_ids=batch, labels=batch).loss == own  # validation is as without
        student.train()
    assert float(mixed) == pytest.approx(float(0.7 * own + 0.3 * kl), rel=1e-5)
    assert student(input_ids=batch, labels=batch).loss == own
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_a_pruned_student_comes_closer_to_its_teacher(student, teacher, precision):
    zeros = {n: p == 0 for n, p in student.named_parameters() if "_proj" in n}
    module, seen = Module(student), []
    fit = trainer(FrozenSparsity(), Distillation(teacher, weight=1.0), precision=precision)
    module.on_train_batch_end = lambda *_: seen.append(float(fit.callback_metrics["train/kl"]))
    fit.fit(module)
    assert sum(seen[-5:]) < 0.7 * sum(seen[1:6])
    assert all(not p[zeros[n]].any() for n, p in student.named_parameters() if n in zeros)
    assert not student._forward_hooks


def test_checkpoints_and_optimizers_do_not_see_the_teacher(student, teacher, tmp_path):
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=10)
    fit = trainer(Distillation(teacher), saved, max_steps=10, limit_train_batches=10)
    fit.fit(Module(student))
    checkpoint = torch.load(saved.best_model_path, weights_only=True)
    assert set(checkpoint["state_dict"]) == {f"lm.{name}" for name in student.state_dict()}
    assert len(checkpoint["optimizer_states"][0]["param_groups"][0]["params"]) == len(list(student.parameters()))


def test_accumulation_and_gradient_checkpointing(student, teacher, tiny_llama):
    other = tiny_llama(**SMALL).train()
    other.load_state_dict(student.state_dict())
    student.gradient_checkpointing_enable({"use_reentrant": False})
    losses = []
    for model in (student, other):
        module = Module(model)
        trainer(Distillation(teacher), max_steps=5, accumulate_grad_batches=2).fit(module)
        losses.append(module.losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_module_of_the_package(tiny_folder, monkeypatch):
    module = CausalLMModule(str(tiny_folder), learning_rate=1e-3)
    fit = Trainer(
        max_steps=2,
        limit_val_batches=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[Distillation(str(tiny_folder))],
    )
    fit.fit(module, PythonDocsDataModule(seqlen=32, batch_size=2))
    assert fit.callback_metrics["train/kl"] > 0


def test_what_is_refused(student, teacher, tiny_llama, tmp_path):
    for settings in ({"weight": 0.0}, {"weight": 1.5}, {"temperature": 0.0}, {"temperature": float("inf")}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            Distillation(teacher, **settings)
    with pytest.raises(FileNotFoundError, match="no model at"):
        Distillation(str(tmp_path / "missing" / "teacher"))
    tiny_llama(**{**SMALL, "vocab_size": 65}).save_pretrained(tmp_path / "other")
    module = Module(student)
    with pytest.raises(MisconfigurationException, match="65"):
        trainer(Distillation(str(tmp_path / "other"))).fit(module)
    assert not module.losses
    with distilled(student, tiny_llama(**SMALL)):
        with pytest.raises(ValueError, match="pass `labels`"):
            student(input_ids=BATCHES[0])
        with pytest.raises(ValueError, match="not a tuple"):
            student(input_ids=BATCHES[0], labels=BATCHES[0], return_dict=False)


def test_an_error_leaves_no_hook(student, teacher):
    class Failing(Module):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        trainer(Distillation(teacher)).fit(Failing(student))
    assert not student._forward_hooks
