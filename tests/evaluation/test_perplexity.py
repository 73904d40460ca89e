import doctest
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers.sharp_model import language, perplexity_by_definition
from maiht_lightning.evaluation import perplexity as module
from maiht_lightning.evaluation.perplexity import Perplexity, perplexity, token_losses


def reference_losses(logits, targets):
    """Cross-entropy by its definition, a token at a time in float64."""
    losses = torch.empty(targets.shape, dtype=torch.float64)
    for place in torch.cartesian_prod(*(torch.arange(size) for size in targets.shape)).tolist():
        row = logits[tuple(place)].double()
        shifted = row - row.max()
        losses[tuple(place)] = torch.log(torch.exp(shifted).sum()) - shifted[targets[tuple(place)]]
    return losses


def batch(dtype=torch.float32, shape=(2, 5, 17), scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(shape, generator=generator)).to(dtype)
    return logits, torch.randint(shape[-1], shape[:-1], generator=generator)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [3.0, 400.0])
def test_token_losses_equal_the_definition(dtype, scale):
    logits, targets = batch(dtype, scale=scale)
    losses = token_losses(logits, targets)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), reference_losses(logits, targets), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_gap_of_hundreds_between_logits_is_finite(dtype):
    logits = torch.zeros(1, 2, 4, dtype=dtype)
    logits[0, 0, 0] = 512.0
    assert token_losses(logits, torch.tensor([[1, 1]]))[0].tolist() == pytest.approx([512.0, math.log(4)])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 400))
def test_chunks_do_not_change_the_losses(sequences, tokens, elements):
    logits, targets = batch(shape=(sequences, tokens, 17))
    whole, empty = token_losses(logits, targets), torch.empty
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK_ELEMENTS", elements)
        # Memory that is asked for holds NaN, and not, by chance, what was computed before.
        patch.setattr(torch, "empty", lambda *shape, **how: empty(*shape, **how).fill_(torch.nan))
        torch.testing.assert_close(token_losses(logits, targets), whole)


def test_no_float32_copy_of_all_logits_is_made(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 3 * 17)
    seen = []
    original = torch.nn.functional.cross_entropy
    monkeypatch.setattr(
        module.functional, "cross_entropy", lambda x, *a, **k: seen.append(x.shape) or original(x, *a, **k)
    )
    logits, targets = batch(torch.bfloat16, shape=(2, 8, 17))
    token_losses(logits[:, :-1], targets[:, 1:])
    assert {rows for rows, _ in seen} == {3, 1}
    assert sum(rows for rows, _ in seen) == 14


@pytest.mark.parametrize("shape", [(2, 4), (2, 5, 1), (10,)])
def test_shapes_that_do_not_fit_are_refused(shape):
    logits, _ = batch()
    with pytest.raises(ValueError, match=r"found \(2, 5, 17\) and"):
        token_losses(logits, torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_metric_over_unequal_batches_is_the_exp_of_the_mean_over_tokens(dtype):
    metric, losses = Perplexity(), []
    for seed, shape in enumerate([(2, 5, 17), (1, 3, 17)]):
        logits, targets = batch(dtype, shape, seed=seed)
        metric.update(logits, targets)
        losses.append(reference_losses(logits, targets).flatten())
    assert metric.compute().item() == pytest.approx(torch.cat(losses).mean().exp().item(), rel=1e-5)


def test_metric_leaves_padding_out():
    logits, targets = batch()
    padded = targets.clone()
    padded[0, 2:] = -100
    kept = torch.cat([reference_losses(logits, targets)[0, :2], reference_losses(logits, targets)[1]])
    metric = Perplexity()
    metric.update(logits, padded)
    assert metric.compute().item() == pytest.approx(kept.mean().exp().item(), rel=1e-5)


def test_metric_states_are_summed_over_processes():
    whole, parts = Perplexity(), []
    for seed in range(2):
        logits, targets = batch(seed=seed, shape=(1, 3 + seed, 17))
        whole.update(logits, targets)
        part = Perplexity()
        part.update(logits, targets)
        parts.append(part)
    gathered = Perplexity(
        dist_sync_fn=lambda state, group=None: [
            getattr(part, "tokens" if state.dtype == torch.long else "loss_sum") for part in parts
        ],
        distributed_available_fn=lambda: True,
    )
    gathered.update(*batch())
    assert gathered.compute().item() == pytest.approx(whole.compute().item(), rel=1e-12)


@pytest.mark.parametrize("convert", [lambda part: part.to(torch.bfloat16), nn.Module.half])
def test_metric_stays_in_float64_inside_a_half_precision_module(convert):
    parent = nn.Module()
    parent.metric = Perplexity()
    convert(parent)
    logits, targets = batch(torch.bfloat16)
    parent.metric.update(logits, targets)
    convert(parent)
    expected = reference_losses(logits, targets).mean().exp().item()
    assert parent.metric.compute().item() == pytest.approx(expected, rel=1e-5)
    assert parent.metric.loss_sum.dtype == torch.float64
    parent.metric.reset()
    assert parent.metric.loss_sum.dtype == torch.float64


def test_a_huge_mean_is_infinite_and_nothing_is_nan():
    metric = Perplexity()
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert math.isnan(metric.compute())
    logits = torch.zeros(1, 1, 2)
    logits[0, 0, 0] = 1e6
    metric.update(logits, torch.tensor([[1]]))
    assert metric.compute().item() == math.inf


def test_docstring_example():
    assert doctest.testmod(module).failed == 0


WINDOWS = language(5, 12)


def test_perplexity_of_a_model_equals_a_plain_loop(sharp_llama):
    model = sharp_llama()
    expected = perplexity_by_definition(model, WINDOWS)
    for batch_size in (1, 2, 5, 9):
        found = perplexity(model, WINDOWS, batch_size=batch_size, progress=False)
        assert found == pytest.approx(expected, rel=1e-5)


def test_perplexity_of_this_model_tells_what_was_measured(sharp_llama):
    """So that tests which compare perplexities of such a model test something."""
    model = sharp_llama()
    assert perplexity_by_definition(model, WINDOWS) < 12
    logits = model(input_ids=WINDOWS).logits
    misaligned = Perplexity()
    misaligned.update(logits[:, :-2], WINDOWS[:, 2:])
    assert misaligned.compute().item() > 1000
    for part in (WINDOWS[:, :-1], WINDOWS[:, 1:], WINDOWS[1:], WINDOWS[:-1]):
        assert perplexity_by_definition(model, part) != pytest.approx(perplexity_by_definition(model, WINDOWS), rel=0.1)


def test_perplexity_of_a_half_precision_model(sharp_llama):
    model = sharp_llama()
    expected = perplexity_by_definition(model, WINDOWS)
    model.bfloat16()
    # The definition in float64 of what this model says; and what bfloat16's three digits make of the true model.
    found = perplexity(model, WINDOWS, batch_size=2, progress=False)
    assert found == pytest.approx(perplexity_by_definition(model, WINDOWS), rel=1e-3)
    assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("fails", [False, True])
def test_perplexity_restores_every_submodule_and_runs_in_eval_mode(tiny_llama, fails):
    model = tiny_llama(vocab_size=64).train()
    model.model.layers[0].eval()
    before = {name: part.training for name, part in model.named_modules()}
    seen = []

    def look(part, args, kwargs):
        seen.append((any(p.training for p in part.modules()), torch.is_grad_enabled(), kwargs["use_cache"]))
        if fails:
            raise KeyboardInterrupt

    model.register_forward_pre_hook(look, with_kwargs=True)
    if fails:
        with pytest.raises(KeyboardInterrupt):
            perplexity(model, WINDOWS, progress=False)
    else:
        perplexity(model, WINDOWS, progress=False)
    assert set(seen) == {(False, False, False)}
    assert {name: part.training for name, part in model.named_modules()} == before


def test_progress_bar_has_the_description(tiny_llama, capsys):
    perplexity(tiny_llama(vocab_size=64), WINDOWS, description="pruned, wikitext2")
    assert "pruned, wikitext2: 100%" in capsys.readouterr().err
    perplexity(tiny_llama(vocab_size=64), WINDOWS, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("shape", [(0, 12), (3, 1), (12,)])
def test_windows_with_nothing_to_predict_are_refused(tiny_llama, shape):
    with pytest.raises(ValueError, match=r"windows must have shape \(windows, seqlen\)"):
        perplexity(tiny_llama(vocab_size=64), torch.zeros(shape, dtype=torch.long))


def test_batch_size_below_one_is_refused(tiny_llama):
    with pytest.raises(ValueError, match="batch_size must be at least 1, but found 0"):
        perplexity(tiny_llama(vocab_size=64), WINDOWS, batch_size=0)
