"""Training with frozen zeros, against a loop that multiplies every weight by its mask inside the forward pass."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim.optimizer import _global_optimizer_post_hooks

from helpers.frozen_fit import BATCHES, OPTIMIZERS, STEPS, Module, check, loss_of, masks_of, trainer
from maiht_lightning import FrozenSparsity, freeze, prune
from maiht_lightning.recovery.freeze import LostZerosError


@pytest.fixture
def sparse(tiny_llama):
    """A small pruned LLaMA in training mode."""
    model = tiny_llama(vocab_size=64, hidden_size=32, intermediate_size=48)
    prune(model, BATCHES[90], sparsity=0.6, method="wanda", progress=False)
    return model.train()


def reference(model, optimizer_of, batches=BATCHES, clip=1.0, accumulate=1):
    """Weights are multiplied by masks inside the forward pass. Returns the losses."""
    masks, optimizer, losses = masks_of(model), optimizer_of(model.parameters()), []
    for some in batches[: STEPS * accumulate].split(accumulate):
        for batch in some:
            effective = {n: p * masks[n] if n in masks else p for n, p in model.named_parameters()}
            loss = loss_of(model, batch, effective)
            losses.append(float(loss.detach()))
            (loss / accumulate).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def copy_of(model, tiny_llama, **config):
    other = tiny_llama(vocab_size=64, hidden_size=32, intermediate_size=48, **config).train()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_as_with_masks_in_the_forward_pass(sparse, tiny_llama, name):
    other = copy_of(sparse, tiny_llama)
    masks, start = masks_of(sparse), {n: p.detach().clone() for n, p in sparse.named_parameters()}
    expected = reference(other, OPTIMIZERS[name])
    module = Module(sparse, OPTIMIZERS[name])
    trainer(FrozenSparsity()).fit(module)
    check(sparse, masks, start)
    assert module.losses == pytest.approx(expected, rel=1e-5)
    for (parameter, weight), twin in zip(sparse.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(weight, twin * masks.get(parameter, 1), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_plain_loop_with_the_context(sparse, tiny_llama, name):
    other = copy_of(sparse, tiny_llama)
    masks, start = masks_of(sparse), {n: p.detach().clone() for n, p in sparse.named_parameters()}
    expected, losses = reference(other, OPTIMIZERS[name]), []
    optimizer = OPTIMIZERS[name](sparse.parameters())
    with freeze(sparse):
        for batch in BATCHES[:STEPS]:
            loss = loss_of(sparse, batch)
            losses.append(float(loss.detach()))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(sparse.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    check(sparse, masks, start)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert not _global_optimizer_post_hooks
    assert not any(p._post_accumulate_grad_hooks for p in sparse.parameters())


@pytest.mark.slow
def test_a_plain_loop_by_hand(sparse, tiny_llama):
    other = copy_of(sparse, tiny_llama)
    expected, losses = reference(other, OPTIMIZERS["AdamW"]), []
    frozen, optimizer = freeze(sparse), OPTIMIZERS["AdamW"](sparse.parameters())
    for batch in BATCHES[:STEPS]:
        loss = loss_of(sparse, batch)
        losses.append(float(loss.detach()))
        loss.backward()
        frozen.apply_to_gradients()
        torch.nn.utils.clip_grad_norm_(sparse.parameters(), 1.0)
        optimizer.step()
        frozen.apply_to_weights()
        optimizer.zero_grad()
    frozen.verify()
    assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_gradient_accumulation(sparse, tiny_llama):
    other = copy_of(sparse, tiny_llama)
    expected = reference(other, OPTIMIZERS["AdamW"], accumulate=2)
    module = Module(sparse)
    trainer(FrozenSparsity(), accumulate_grad_batches=2).fit(module)
    assert module.losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AdamW", "AdamW fused", "SGD", "Adafactor"])
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_half_precision(sparse, precision, name):
    """Zeros stay exactly zero at every step, and all others move, though in bfloat16 some come back."""
    masks = masks_of(sparse)
    start = {n: p.detach().clone() for n, p in sparse.named_parameters()}
    moved = {name: torch.zeros_like(mask) for name, mask in masks.items()}

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            for name, weight in sparse.named_parameters():
                if name in masks:
                    assert not weight[~masks[name]].any()
                    moved[name] |= weight.detach() != start[name].to(weight.dtype)

    # Lightning does not clip for a fused optimizer under mixed precision.
    clip = None if (precision, name) == ("bf16-mixed", "AdamW fused") else 1.0
    fit = trainer(FrozenSparsity(), Watch(), precision=precision, gradient_clip_val=clip).fit
    # Adafactor's steps are small beside the weights: in bfloat16 many round away, with or without masks.
    rounds_away = (precision, name) == ("bf16-true", "Adafactor")
    fit(Module(sparse, (lambda p: torch.optim.Adafactor(p, lr=0.3)) if rounds_away else OPTIMIZERS[name]))
    if rounds_away:
        assert all(moved[name].any() for name in masks)
        return
    assert all(torch.equal(moved[name], mask) for name, mask in masks.items())


@pytest.mark.slow
def test_gradient_checkpointing(sparse, tiny_llama):
    other = copy_of(sparse, tiny_llama)
    expected = reference(other, OPTIMIZERS["AdamW"])
    sparse.gradient_checkpointing_enable({"use_reentrant": False})
    module = Module(sparse)
    trainer(FrozenSparsity()).fit(module)
    assert module.losses == pytest.approx(expected, rel=1e-5)


def test_moments_from_before_the_pruning_are_cleared(sparse):
    """Dense training first: Adam remembers weights that are pruned afterwards."""
    optimizer = OPTIMIZERS["AdamW"](sparse.parameters())
    for batch in BATCHES[:5]:
        loss_of(sparse, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    prune(sparse, BATCHES[90], sparsity=0.6, method="wanda", progress=False)
    frozen = freeze(sparse)
    frozen.apply_to_optimizer(optimizer)
    for name, kept in frozen.masks.items():
        zero = kept == 0
        state = optimizer.state[sparse.get_submodule(name).weight]
        for moment in ("exp_avg", "exp_avg_sq"):
            assert not state[moment][zero].any()
            assert state[moment][~zero].any()
        assert state["step"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("steps", [20, 30])
def test_resumed_from_a_checkpoint_as_uninterrupted(sparse, tiny_llama, tmp_path, steps):
    other = copy_of(sparse, tiny_llama)
    whole, epochs = Module(sparse), {"limit_train_batches": 10}  # checkpoints at an epoch's end need no more state
    trainer(FrozenSparsity(), **epochs).fit(whole)
    first = Module(other)
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=steps, save_top_k=-1)
    trainer(FrozenSparsity(), saved, max_steps=steps, **epochs).fit(first)
    (checkpoint,) = tmp_path.glob("*.ckpt")
    again = Module(copy_of(sparse, tiny_llama, seed=9))
    trainer(FrozenSparsity(), **epochs).fit(again, ckpt_path=checkpoint)
    assert first.losses + again.losses == whole.losses
    for one, two in zip(sparse.parameters(), again.lm.parameters(), strict=True):
        assert torch.equal(one, two)
    stored = torch.load(checkpoint, weights_only=True)["state_dict"]
    for name, mask in masks_of(sparse).items():
        assert not stored[f"lm.{name}"][~mask].any()


def test_zeros_that_get_lost_are_an_error(sparse):
    class Regrow(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == STEPS:
                pl_module.lm.model.layers[1].mlp.up_proj.weight.data += 1e-3

    with pytest.raises(MisconfigurationException, match=r"zeros were lost in 1 layers, model\.layers\.1\.mlp\.up_proj"):
        trainer(FrozenSparsity(), Regrow()).fit(Module(sparse))
    frozen = freeze(sparse)
    next(iter(frozen._weights.values())).data += 1
    with pytest.raises(LostZerosError, match="1 layers"):
        frozen.verify()


def test_nothing_to_freeze_is_refused(tiny_llama):
    with pytest.raises(ValueError, match="has no zeros to freeze"):
        freeze(tiny_llama(vocab_size=64))
    with pytest.raises(MisconfigurationException, match=r"FrozenSparsity: .* no zeros to freeze"):
        trainer(FrozenSparsity()).fit(Module(tiny_llama(vocab_size=64)))


def test_an_error_in_training_leaves_no_hooks(sparse):
    optimizers = []

    class Failing(Module):
        def training_step(self, batch, batch_idx):
            optimizers.append(self.trainer.optimizers[0])
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        trainer(FrozenSparsity()).fit(Failing(sparse))
    assert not optimizers[0]._optimizer_step_post_hooks
    with pytest.raises(RuntimeError, match="out of luck"), freeze(sparse):
        raise RuntimeError("out of luck")
    assert not _global_optimizer_post_hooks


def test_a_module_that_steps_twice_a_batch(sparse):
    class Manual(Module):
        def __init__(self, model):
            super().__init__(model)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            for _ in range(2):
                optimizer.zero_grad()
                self.manual_backward(loss_of(self.lm, batch[0]))
                optimizer.step()
                assert all(not dict(self.lm.named_parameters())[n][~m].any() for n, m in masks.items())

    masks = masks_of(sparse)
    trainer(FrozenSparsity(), gradient_clip_val=None, max_steps=10).fit(Manual(sparse))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_module_that_clips_by_itself(sparse, tiny_llama, accumulate):
    """The norm by which gradients are clipped is that of the weights that are trained."""

    class Clipping(Module):
        def __init__(self, model):
            super().__init__(model)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer, loss = self.optimizers(), loss_of(self.lm, batch[0])
            self.losses.append(float(loss.detach()))
            self.manual_backward(loss / accumulate)
            if (batch_idx + 1) % accumulate == 0:
                self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
                optimizer.step()
                optimizer.zero_grad()

    other = copy_of(sparse, tiny_llama)
    masks, start = masks_of(sparse), {n: p.detach().clone() for n, p in sparse.named_parameters()}
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.5)  # noqa: E731
    expected = reference(other, sgd, BATCHES[: 10 * accumulate], clip=0.1, accumulate=accumulate)
    module = Clipping(sparse)
    module.optimizer_of = sgd
    trainer(FrozenSparsity(), max_steps=10, gradient_clip_val=None).fit(module)
    check(sparse, masks, start)
    assert module.losses == pytest.approx(expected, rel=1e-5)
    for (parameter, weight), twin in zip(sparse.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(weight, twin * masks.get(parameter, 1), rtol=1e-4, atol=1e-6)


class Restless(torch.optim.SGD):
    """Moves weights that have no gradient, as an optimizer with noise or with moments in places of its own does."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            parameter.add_(1e-3)
        return loss


def test_an_optimizer_that_moves_every_weight(sparse):
    masks, start = masks_of(sparse), {n: p.detach().clone() for n, p in sparse.named_parameters()}
    seen = []

    def step(trainer, pl_module):
        seen.append(all(not p[~masks[name]].any() for name, p in sparse.named_parameters() if name in masks))

    restless = lambda parameters: Restless(parameters, lr=1e-3)  # noqa: E731
    trainer(FrozenSparsity(), Clock(2, step), max_steps=3).fit(Module(sparse, restless))
    assert seen == [True]
    check(sparse, masks, start)
    optimizer = restless(sparse.parameters())
    with freeze(sparse):
        loss_of(sparse, BATCHES[0]).backward()
        optimizer.step()
        check(sparse, masks, start)


class Clock(Callback):
    """Something done in the middle of a fit, after a number of steps."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_train_batch_start(self, trainer, pl_module, *_):
        if trainer.global_step == self.step:
            self.action(trainer, pl_module)


def test_moments_of_weights_that_are_frozen_later_are_zero(sparse):
    """More zeros in the middle of a fit: Adam remembers what it knew of them, unless it is made to forget."""
    frozen, weight = FrozenSparsity(), sparse.model.layers[0].mlp.up_proj.weight

    def more_zeros(trainer, pl_module):
        weight.data[:20] = 0
        assert trainer.optimizers[0].state[weight]["exp_avg"][:20].any()
        frozen.freeze(trainer, pl_module)

    fit = trainer(frozen, Clock(5, more_zeros), max_steps=7)
    fit.fit(Module(sparse))
    (optimizer,) = fit.optimizers
    for layer, kept in frozen.masks.masks.items():
        held = sparse.get_submodule(layer).weight
        for moment in ("exp_avg", "exp_avg_sq"):
            assert not optimizer.state[held][moment][kept == 0].any(), layer
            assert optimizer.state[held][moment][kept == 1].any(), layer
    assert not weight[:20].any()


def test_zeros_are_verified_after_each_epoch(sparse):
    def regrow(trainer, pl_module):
        # The optimizer does not see it: the weights are masked after its steps only.
        pl_module.trainer.optimizers[0].register_step_post_hook(
            lambda *_: pl_module.lm.model.layers[1].mlp.up_proj.weight.data.add_(1e-3)
        )

    fit = trainer(FrozenSparsity(), Clock(2, regrow), max_steps=-1, max_epochs=3, limit_train_batches=4)
    with pytest.raises(MisconfigurationException, match="zeros were lost in 1 layers"):
        fit.fit(Module(sparse))
    assert fit.global_step == 4


class Averaging(WeightAveraging):
    """Leaves what its `average` makes of the weights, after all other callbacks."""

    def __init__(self, average):
        super().__init__()
        self.average = average

    def on_train_end(self, trainer, pl_module):
        super().on_train_end(trainer, pl_module)
        self.average(pl_module.lm.model.layers[0].mlp.up_proj.weight.data)


def test_what_averages_leave_is_verified(sparse):
    masks = masks_of(sparse)
    trainer(FrozenSparsity(), Averaging(lambda weight: weight), max_steps=3).fit(Module(sparse))
    assert all(not p[~masks[name]].any() for name, p in sparse.named_parameters() if name in masks)
    with pytest.raises(MisconfigurationException, match="zeros were lost in 1 layers"):
        trainer(FrozenSparsity(), Averaging(lambda weight: weight.add_(1e-3)), max_steps=3).fit(Module(sparse))


@pytest.fixture
def checkpoint(sparse, tiny_llama, tmp_path):
    """A checkpoint from within a sparse fit, and its file."""
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=2)
    trainer(FrozenSparsity(), saved, max_steps=2).fit(Module(copy_of(sparse, tiny_llama)))
    return torch.load(saved.best_model_path, weights_only=True), tmp_path / "changed.ckpt"


def test_a_checkpoint_holds_the_number_of_zeros_and_no_masks(sparse, checkpoint):
    zeros = sum(int((~mask).sum()) for mask in masks_of(sparse).values())
    assert checkpoint[0]["callbacks"]["FrozenSparsity"] == {"zeros": zeros}


def test_a_checkpoint_whose_weights_lost_zeros_is_refused(sparse, checkpoint):
    stored, path = checkpoint
    weight, state = stored["state_dict"]["lm.model.layers.0.mlp.up_proj.weight"], stored["callbacks"]["FrozenSparsity"]
    row, column = (weight == 0).nonzero()[0]
    weight[row, column] = 1e-6
    torch.save(stored, path)
    module = Module(sparse)
    message = rf"written with {state['zeros']:,} zeros, but its weights have {state['zeros'] - 1:,}"
    with pytest.raises(MisconfigurationException, match=message):
        trainer(FrozenSparsity(), max_steps=4).fit(module, ckpt_path=path)
    assert not module.losses


def test_a_checkpoint_without_frozen_zeros_is_loaded_with_a_warning(sparse, checkpoint, recwarn):
    stored, path = checkpoint
    masks, counted = masks_of(sparse), stored["callbacks"].pop("FrozenSparsity")
    torch.save(stored, path)
    frozen = FrozenSparsity()
    with pytest.warns(UserWarning, match="not written with frozen zeros"):
        trainer(frozen, max_steps=4).fit(Module(sparse), ckpt_path=path)
    assert frozen.state_dict() == counted
    assert all(not p[~masks[name]].any() for name, p in sparse.named_parameters() if name in masks)
    stored["callbacks"]["FrozenSparsity"] = counted
    torch.save(stored, path)
    recwarn.clear()
    trainer(FrozenSparsity(), max_steps=4).fit(Module(sparse), ckpt_path=path)
    assert not [warning for warning in recwarn if "not written with frozen zeros" in str(warning.message)]


def test_a_gradient_scaler(sparse, tiny_llama):
    """float16 with a GradScaler: clipping sees unscaled gradients, and steps with infinite ones are left out."""
    other, scale = copy_of(sparse, tiny_llama), 2.0**30
    masks, start = masks_of(sparse), {n: p.detach().clone() for n, p in sparse.named_parameters()}
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.5)  # noqa: E731
    scaler, optimizer = torch.amp.GradScaler("cpu", scale), sgd(other.parameters())
    for batch in BATCHES[:25]:
        effective = {n: p * masks[n] if n in masks else p for n, p in other.named_parameters()}
        with torch.autocast("cpu", torch.half, cache_enabled=False):
            loss = loss_of(other, batch, effective)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(other.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() < scale  # some steps were left out
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", scale))
    settings = {"max_steps": -1, "max_epochs": 1, "limit_train_batches": 25, "gradient_clip_val": 0.1}
    trainer(FrozenSparsity(), plugins=[precision], **settings).fit(Module(sparse, sgd))
    assert precision.scaler.get_scale() == scaler.get_scale()
    check(sparse, masks, start)
    for (name, weight), twin in zip(sparse.named_parameters(), other.parameters(), strict=True):
        moved, expected = weight - start[name], twin * masks.get(name, 1) - start[name]
        assert (moved - expected).norm() < 0.02 * expected.norm(), name
