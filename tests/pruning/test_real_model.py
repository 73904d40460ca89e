"""The real thing: the first blocks of SmolLM2 with C4 calibration and WikiText-2."""

import copy
import math

import pytest
import torch

from maiht_lightning import C4Calibration, prune
from maiht_lightning.data.windows import evaluation_windows
from maiht_lightning.evaluation.perplexity import perplexity
from maiht_lightning.models.loading import load_model
from maiht_lightning.models.sparsity import count_zeros
from maiht_lightning.solvers import resolve_config

pytestmark = pytest.mark.slow
BLOCKS = 2


@pytest.fixture(scope="module")
def smollm2(smollm2_folder):
    model = load_model(str(smollm2_folder))
    model.model.layers = model.model.layers[:BLOCKS]
    model.config.num_hidden_layers = BLOCKS
    return model


def test_maiht_beats_wanda_beats_magnitude_in_every_layer(smollm2, tokenizer, real_data):
    windows = C4Calibration(samples=8, sampling="packed").windows(tokenizer, 256)
    reports = {}
    # Errors of layers: fewer steps are enough for these.
    quick = resolve_config("fast,iterations=20,refine_iterations=10")
    for method, config in (("maiht", quick), ("wanda", None), ("magnitude", None)):
        model = copy.deepcopy(smollm2)
        reports[method] = prune(model, windows, method=method, config=config, batch_size=4, progress=False)
        counts = count_zeros(model)
        assert len(counts) == 7 * BLOCKS
        assert all(count.zeros == count.size // 2 for count in counts)
        assert torch.equal(model.model.embed_tokens.weight, smollm2.model.embed_tokens.weight)
    # Block 0 sees the same inputs whatever the method; later ones see what the blocks before made of them.
    for layer in zip(*(report.layers[:7] for report in reports.values()), strict=True):
        maiht, wanda, magnitude = (record.relative_error for record in layer)
        assert maiht < wanda <= magnitude, layer[0].name
    mean = {name: sum(r.relative_error for r in report.layers) for name, report in reports.items()}
    assert mean["maiht"] < 0.85 * mean["wanda"]
    assert mean["wanda"] < mean["magnitude"]


def test_factors_bring_the_predictions_nearer_to_the_dense_models(smollm2, tokenizer, real_data):
    """On text that nothing was learnt from, in both data sets."""
    windows = C4Calibration(samples=12, sampling="packed").windows(tokenizer, 96)
    unseen = torch.cat(
        [
            C4Calibration(samples=5, sampling="packed", seed=1).windows(tokenizer, 96),
            evaluation_windows("wikitext2", tokenizer, 96, max_windows=5),
        ]
    )

    def predictions(model):
        with torch.no_grad():
            return model(input_ids=unseen).logits.log_softmax(-1)

    dense, found = predictions(smollm2), []
    for epochs in (0, 1):
        model = copy.deepcopy(smollm2)
        config = resolve_config(f"paper,rescaling_epochs={epochs}")
        report = prune(model, windows, sparsity=0.6, method="wanda", config=config, progress=False)
        divergence = torch.nn.functional.kl_div(predictions(model), dense, log_target=True, reduction="none").sum(-1)
        found.append(divergence.mean(1))
    before, after = report.divergence
    assert after < before
    # Ten windows, each of which might be an exception.
    assert (found[1] < found[0]).sum() > 7
    assert found[1].mean() < 0.97 * found[0].mean()


def test_dense_perplexity_on_wikitext2(smollm2_folder, tokenizer, real_data):
    """The whole model, against the losses that transformers itself computes, window by window."""
    model = load_model(str(smollm2_folder)).eval()
    windows = evaluation_windows("wikitext2", tokenizer, 512, max_windows=3)
    with torch.no_grad():
        losses = [float(model(input_ids=window[None], labels=window[None]).loss) for window in windows]
    value = perplexity(model, windows, batch_size=2, progress=False)
    assert value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert 20 < value < 50  # the model reads English; a wrong protocol or tokenizer gives hundreds
