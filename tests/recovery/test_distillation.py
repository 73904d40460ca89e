"""Distillation, against the definition of the divergence in float64 and plain loops that mix the losses by hand."""

import copy

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from helpers.divergence import definition
from maiht_lightning import CausalLMModule, FrozenSparsity, prune, save_compact
from maiht_lightning.callbacks.distillation import Distillation
from maiht_lightning.models import divergence
from maiht_lightning.models.divergence import distillation_loss
from maiht_lightning.recovery.distillation import distilled

# Many short fits: several seconds in all.
pytestmark = pytest.mark.slow

BATCHES = torch.randint(0, 64, (100, 4, 16), generator=torch.Generator().manual_seed(3))
STEPS = 10


def logits_and_labels(dtype=torch.float32, scale=3.0):
    generator = torch.Generator().manual_seed(1)
    student, teacher = (scale * torch.randn(3, 11, 29, generator=generator) for _ in range(2))
    labels = torch.randint(0, 29, (3, 11), generator=generator)
    labels[0, :4] = labels[1, 7:] = -100
    labels[2, 5] = -100
    return student.to(dtype), teacher.to(dtype), labels


@pytest.fixture
def small(tiny_llama):
    """A function that makes a small LLaMA in training mode."""
    return lambda seed=0, **config: tiny_llama(
        seed=seed, **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, **config}
    ).train()


@pytest.fixture
def teacher(small):
    return small(seed=5, hidden_size=48, num_hidden_layers=1).eval()


@pytest.fixture
def folder(teacher, tmp_path):
    teacher.save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


class Module(LightningModule):
    def __init__(self, model, **arguments):
        super().__init__()
        self.lm, self.arguments, self.losses = model, arguments, []

    def training_step(self, batch, batch_idx):
        loss = self.lm(input_ids=batch[0], labels=batch[0], **self.arguments).loss
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.lm(batch[0], labels=batch[0]).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)

    def train_dataloader(self):
        return DataLoader(BATCHES, batch_size=1)

    def val_dataloader(self):
        return DataLoader(BATCHES[90:93], batch_size=1)


class Divergences(Callback):
    def __init__(self):
        self.found = []

    def on_train_batch_end(self, trainer, *_):
        self.found.append(float(trainer.callback_metrics["train/kl"]))


def trainer(*callbacks, **settings):
    defaults = {
        "max_steps": STEPS,
        "accelerator": "cpu",
        "logger": False,
        "limit_val_batches": 0,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(callbacks=list(callbacks), **{**defaults, **settings})


def by_hand(model, teacher, weight=0.5, temperature=1.0, accumulate=1, steps=STEPS):
    """A plain loop. Returns the mixed losses."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for some in BATCHES[: steps * accumulate].split(accumulate):
        for batch in some:
            output = model(input_ids=batch, labels=batch)
            with torch.no_grad():
                target = teacher(input_ids=batch).logits
            loss = (1 - weight) * output.loss + weight * definition(output.logits, target, batch, temperature)
            losses.append(float(loss.detach()))
            (loss / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


# ---- The divergence


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("elements", [2**24, 3 * 29])
def test_value_and_gradient_by_the_definition(monkeypatch, dtype, temperature, elements):
    monkeypatch.setattr(divergence, "_CHUNK_ELEMENTS", elements)
    student, teacher, labels = logits_and_labels(dtype)
    student.requires_grad_()
    teacher.requires_grad_()
    exact = student.detach().double().requires_grad_()
    expected = definition(exact, teacher.detach(), labels, temperature)
    expected.backward()
    found = distillation_loss(student, teacher, labels, temperature)
    found.backward()
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert teacher.grad is None
    assert student.grad.dtype == dtype
    # What rounding the gradient to the logits' dtype costs, and no more.
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=max(2 * torch.finfo(dtype).eps, 1e-4), atol=1e-7)
    assert not student.grad[:, -1].any()
    assert not student.grad[:, :-1][labels[:, 1:] == -100].any()


def test_gradient_by_finite_differences():
    student, teacher, labels = logits_and_labels(scale=1.0)
    student.requires_grad_()
    distillation_loss(student, teacher, labels, 2.0).backward()
    direction, step = torch.randn(student.shape, generator=torch.Generator().manual_seed(2)), 1e-4
    ahead, behind = (
        definition(student.detach() + sign * step * direction.double(), teacher, labels, 2.0) for sign in (1, -1)
    )
    assert (student.grad * direction).sum().item() == pytest.approx(((ahead - behind) / (2 * step)).item(), rel=1e-4)


def test_equal_logits_are_zero_apart_and_far_ones_finite():
    student, teacher, labels = logits_and_labels(scale=100.0)
    assert distillation_loss(teacher, teacher, labels) == 0
    # Softmax and then the logarithm would give infinity here.
    far = distillation_loss(student.requires_grad_(), teacher, labels)
    assert 100 < far < 1000
    far.backward()
    assert student.grad.isfinite().all()


def test_what_is_left_out_may_be_anything():
    student, teacher, labels = logits_and_labels()
    expected = distillation_loss(student, teacher, labels)
    for logits in (student, teacher):
        logits[:, :-1][labels[:, 1:] == -100] = torch.nan
        logits[:, -1] = torch.nan
    student.requires_grad_()
    found = distillation_loss(student, teacher, labels)
    found.backward()
    assert found == expected
    assert student.grad.isfinite().all()


def test_shapes_that_do_not_fit_are_refused():
    student, teacher, labels = logits_and_labels()
    for arguments in [(student, teacher[..., :-1], labels), (student, teacher, labels[:, 1:]), (student[0],) * 2]:
        with pytest.raises(ValueError, match="logits must have shape"):
            distillation_loss(*arguments, *[labels[0]] * (3 - len(arguments)))


# ---- A model of one's own


@pytest.mark.parametrize(("weight", "temperature"), [(0.3, 1.0), (0.7, 2.0), (1.0, 1.0)])
def test_a_plain_loop(small, teacher, weight, temperature):
    model, other = small(), small()
    expected, losses = by_hand(other, teacher, weight, temperature), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    teacher.train()  # is in eval mode where it runs, and as it was afterwards
    with distilled(model, teacher, weight, temperature) as handle:
        for batch in BATCHES[:STEPS]:
            loss = model(batch, labels=batch).loss
            losses.append(float(loss.detach()))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert losses == pytest.approx(expected, rel=1e-5)
    assert all(module.training for module in teacher.modules())
    assert all(p.grad is None for p in teacher.parameters())
    assert handle.kl.item() > 0
    assert not handle.kl.requires_grad
    assert not model._forward_hooks


def test_padding_and_positions_reach_the_teacher(small, teacher):
    model, batch = small(), BATCHES[0]
    mask = torch.ones_like(batch)
    mask[1, :5] = 0
    positions, labels = (mask.cumsum(1) - 1).clamp(min=0), batch.masked_fill(mask == 0, -100)
    inputs = {"attention_mask": mask, "position_ids": positions}
    plain, target = model(batch, labels=labels, **inputs), teacher(batch, **inputs).logits
    expected = definition(plain.logits, target, labels)
    with distilled(model, teacher, weight=0.25) as handle:
        mixed = model(batch, mask, positions, labels=labels)
    assert handle.kl.item() == pytest.approx(expected.item(), rel=1e-5)
    assert mixed.loss.item() == pytest.approx((0.75 * plain.loss + 0.25 * expected).item(), rel=1e-5)
    assert mixed["loss"] is mixed.loss
    without = definition(plain.logits, teacher(batch).logits, labels)
    assert handle.kl.item() != pytest.approx(without.item(), rel=1e-3)


def test_nothing_changes_in_eval_mode(small, teacher):
    model = small().eval()
    expected = model(BATCHES[0], labels=BATCHES[0])
    with distilled(model, teacher) as handle:
        found = model(BATCHES[0], labels=BATCHES[0])
        model(BATCHES[0])
    assert torch.equal(found.loss, expected.loss)
    assert handle.kl is None


def test_a_copy_of_the_model_copies_no_teacher(small, teacher):
    model = small()
    with distilled(model, teacher) as handle:
        ((_, hook),) = copy.deepcopy(model)._forward_hooks.items()
        (cell,) = [cell for cell in hook.__closure__ if cell.cell_contents is handle]
        assert cell.cell_contents.teacher is teacher


def test_calls_that_cannot_be_distilled_are_refused(small, teacher):
    model = small()
    with distilled(model, teacher):
        with pytest.raises(ValueError, match="pass `labels`"):
            model(BATCHES[0])
        with pytest.raises(ValueError, match="return_dict=False"):
            model(BATCHES[0], labels=BATCHES[0], return_dict=False)
        with pytest.raises(ValueError, match="pass `input_ids`"):
            model(inputs_embeds=model.get_input_embeddings()(BATCHES[0]), labels=BATCHES[0])
    assert not model._forward_hooks


def test_models_that_do_not_fit_are_refused(small):
    model = small()
    with pytest.raises(ValueError, match="one of 64 tokens but the teacher one of 65"):
        distilled(model, small(vocab_size=65))
    with pytest.raises(ValueError, match="LlamaModel has no output embeddings"):
        distilled(model, small().model)
    assert not model._forward_hooks


@pytest.mark.parametrize(
    ("setting", "value"),
    [("weight", 0.0), ("weight", 1.1), ("weight", float("nan")), ("temperature", 0.0), ("temperature", float("inf"))],
)
def test_settings_out_of_range_are_refused(small, teacher, folder, setting, value):
    with pytest.raises(ValueError, match=setting):
        distilled(small(), teacher, **{setting: value})
    with pytest.raises(ValueError, match=setting):
        Distillation(folder, **{setting: value})


# ---- The callback


@pytest.mark.parametrize("accumulate", [1, 2])
def test_as_by_hand(small, teacher, folder, accumulate):
    model, other = small(), small()
    expected = by_hand(other, teacher, 0.7, 2.0, accumulate)
    module = Module(model)
    trainer(Distillation(folder, weight=0.7, temperature=2.0), accumulate_grad_batches=accumulate).fit(module)
    assert module.losses == pytest.approx(expected, rel=1e-5)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)
    assert not model._forward_hooks


def test_gradient_checkpointing(small, teacher, folder):
    model = small()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    module = Module(model, use_cache=False)
    trainer(Distillation(folder)).fit(module)
    assert module.losses == pytest.approx(by_hand(small(), teacher), rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_half_precision(small, teacher, folder, precision):
    seen = []

    class Watch(Callback):
        def on_train_start(self, trainer, pl_module):
            (one,) = [c for c in trainer.callbacks if isinstance(c, Distillation)]
            assert all(not p.requires_grad for p in one._distilled.teacher.parameters())
            seen.append(one._distilled.teacher.dtype)
            one._distilled.teacher.register_forward_hook(lambda _, __, output: seen.append(output.logits.dtype))

    module = Module(small())
    trainer(Distillation(folder), Watch(), precision=precision).fit(module)
    assert seen == [torch.bfloat16 if precision == "bf16-true" else torch.float32] + STEPS * [torch.bfloat16]
    tolerance = 0.02 if precision == "bf16-mixed" else 0.05
    assert module.losses == pytest.approx(by_hand(small(), teacher), rel=tolerance)


def test_our_module_its_validation_and_what_is_stored(tiny_folder, tmp_path):
    """The teacher is in no checkpoint, parameter or optimizer, and validation is the model's own."""
    from maiht_lightning.models.loading import load_model

    tokens = torch.randint(0, 1000, (12, 2, 16), generator=torch.Generator().manual_seed(4))
    loader, found = DataLoader([{"input_ids": batch} for batch in tokens], batch_size=None), {}

    class Watch(Callback):
        def on_train_start(self, trainer, pl_module):
            (optimizer,) = trainer.optimizers
            found["optimized"] = {id(p) for group in optimizer.param_groups for p in group["params"]}

    module, divergences = CausalLMModule(str(tiny_folder), learning_rate=1e-3), Divergences()
    saved = ModelCheckpoint(tmp_path, save_last=True)
    # Its own teacher: as long as nothing is learned, the divergence is 0 and the loss is halved.
    fit = trainer(
        Distillation(str(tiny_folder)),
        divergences,
        saved,
        Watch(),
        max_steps=5,
        limit_val_batches=2,
        val_check_interval=5,
    )
    fit.fit(module, loader, loader)
    assert divergences.found[0] == 0  # before the first step
    assert divergences.found[-1] > 0
    assert found["optimized"] == {id(p) for p in module.parameters()}
    plain = load_model(str(tiny_folder))
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(stored["state_dict"]) == {f"model.{name}" for name in plain.state_dict()}
    validated = trainer(limit_val_batches=2).validate(module, loader, verbose=False)[0]["val/perplexity"]
    assert float(fit.callback_metrics["val/perplexity"]) == pytest.approx(validated)
    assert not module.model._forward_hooks


def test_validation_loss_is_the_models_own(small, folder):
    model = small()
    fit = trainer(Distillation(folder), max_steps=3, limit_val_batches=3, val_check_interval=3)
    fit.fit(Module(model))
    model.eval()
    expected = sum(float(model(batch, labels=batch).loss) for batch in BATCHES[90:93]) / 3
    assert float(fit.callback_metrics["val/loss"]) == pytest.approx(expected, rel=1e-6)


def test_a_pruned_student_keeps_its_zeros_and_comes_closer_to_a_compact_teacher(small, tmp_path):
    dense = small(seed=2, initializer_range=0.2)
    student = copy.deepcopy(dense)
    prune(student, BATCHES[90], sparsity=0.6, method="wanda", progress=False)
    masks = {name: p != 0 for name, p in student.named_parameters() if "_proj" in name}
    save_compact(dense, tmp_path / "dense")
    undistilled, callback, divergences = copy.deepcopy(student), Distillation(str(tmp_path / "dense")), Divergences()
    trainer(FrozenSparsity(), callback, divergences, max_steps=50).fit(Module(student))
    trainer(FrozenSparsity(), max_steps=50).fit(Module(undistilled))
    assert sum(divergences.found[-5:]) < 0.7 * sum(divergences.found[:5])
    batch = BATCHES[95]
    far, near = (float(definition(m(batch).logits, dense(batch).logits, batch)) for m in (undistilled, student))
    assert near < 0.8 * far
    for name, mask in masks.items():
        assert not student.get_parameter(name)[~mask].any(), name


def test_resumed_from_a_checkpoint_as_uninterrupted(small, folder, tmp_path):
    epochs = {"limit_train_batches": 5, "max_steps": 20}
    whole = Module(small())
    trainer(Distillation(folder), **epochs).fit(whole)
    first, again = Module(small()), Module(small(seed=9))
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=10, save_top_k=-1)
    trainer(Distillation(folder), saved, **{**epochs, "max_steps": 10}).fit(first)
    (checkpoint,) = tmp_path.glob("*.ckpt")
    trainer(Distillation(folder), **epochs).fit(again, ckpt_path=checkpoint)
    assert first.losses + again.losses == whole.losses
    for one, two in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


def test_an_error_in_training_leaves_no_hook_and_no_teacher(small, folder):
    class Failing(Module):
        def training_step(self, batch, batch_idx):
            assert self.lm._forward_hooks
            raise RuntimeError("out of luck")

    model, callback = small(), Distillation(folder)
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer(callback).fit(Failing(model))
    assert not model._forward_hooks
    assert callback._distilled is None


def test_the_same_callback_twice_distils_once(small, teacher, folder):
    model, callback = small(), Distillation(folder)
    trainer(callback, max_steps=1).fit(Module(small(seed=1)))
    module = Module(model)
    trainer(callback).fit(module)
    assert module.losses == pytest.approx(by_hand(small(), teacher), rel=1e-5)


def test_a_missing_teacher_is_named_at_once():
    with pytest.raises(FileNotFoundError, match="no model at"):
        Distillation("./nowhere/teacher")


def test_what_does_not_fit_is_refused_before_training(small, folder, tmp_path):
    class Untrained(Module):
        def training_step(self, batch, batch_idx):
            pytest.fail("training began")

    model = small()
    cases = [
        (model.train(), "nobody/has-this-model", "Distillation from nobody/has-this-model: "),
        (small(vocab_size=65), folder, "one of 65 tokens but the teacher one of 64"),
        (small().eval(), folder, "eval mode"),
        (torch.nn.Linear(2, 2), folder, "found none"),
    ]
    for student, source, message in cases:
        with pytest.raises(MisconfigurationException, match=message):
            trainer(Distillation(source)).fit(Untrained(student))
        assert not student._forward_hooks


def test_a_module_that_goes_past_the_models_loss_is_refused(small, folder):
    class Past(Module):
        def training_step(self, batch, batch_idx):
            return self.lm.forward(input_ids=batch[0], labels=batch[0]).loss

    class Without(Module):
        def training_step(self, batch, batch_idx):
            return self.lm(input_ids=batch[0]).logits.mean()

    with pytest.raises(MisconfigurationException, match=r"Past made a training step without calling its model"):
        trainer(Distillation(folder)).fit(Past(small()))
    with pytest.raises(ValueError, match="pass `labels`"):
        trainer(Distillation(folder)).fit(Without(small()))


def test_a_step_that_is_skipped_is_no_error(small, folder):
    class Skipping(Module):
        def training_step(self, batch, batch_idx):
            return None if batch_idx < 2 else super().training_step(batch, batch_idx)

    module = Skipping(small())
    trainer(Distillation(folder), max_steps=-1, max_epochs=1, limit_train_batches=5).fit(module)
    assert len(module.losses) == 3


def test_a_model_is_named_where_there_are_several(small, folder):
    module = Module(small())
    module.other = small(seed=1)
    with pytest.raises(MisconfigurationException, match="several"):
        trainer(Distillation(folder)).fit(module)
    trainer(Distillation(folder, model="lm"), max_steps=1).fit(module)
    assert len(module.losses) == 1
