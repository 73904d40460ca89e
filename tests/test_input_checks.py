"""What cannot be pruned is refused before the first training step, by layer, and nothing is changed."""

import math

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from helpers.byte_model import byte_tokenizer
from helpers.own_module import OwnModule, Windows, trainer
from maiht_lightning import MAIHTPruning, prune
from maiht_lightning.evaluation.evaluation import Evaluation

WINDOWS = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))


def poison(value):
    def change(model):
        model.model.layers[1].mlp.up_proj.weight.data[3, 5] = value

    return change


def tie(model):
    block = model.model.layers[0].mlp
    block.up_proj.weight = block.gate_proj.weight


def quantise(model):
    linear = model.model.layers[0].self_attn.k_proj
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)


UNFIT = {
    "nan": (poison(math.nan), r"layers\.1\.mlp\.up_proj has weights that are NaN or infinite"),
    "infinite": (poison(-math.inf), r"layers\.1\.mlp\.up_proj has weights that are NaN or infinite"),
    "tied": (tie, r"layers\.0\.mlp\.\w+ shares its weight with another module"),
    "quantised": (quantise, r"layers\.0\.self_attn\.k_proj has weights of torch\.int8: load the model in a floating"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_unfit_weights_are_refused_before_training(tiny_llama, tmp_path, name):
    change, message = UNFIT[name]
    module = OwnModule(tiny_llama(vocab_size=64).train())
    change(module.net["lm"])
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    module.tokenizer = byte_tokenizer()
    module.training_step = lambda *_: pytest.fail("a training step was made")
    pruning = MAIHTPruning(
        calibration=Windows(), evaluation=Evaluation(perplexity=[]), output_dir=str(tmp_path / "run")
    )
    with pytest.raises(MisconfigurationException, match=message):
        trainer(pruning).fit(module)
    assert all(torch.equal(before[key], t) or t.isnan().any() for key, t in module.state_dict().items())


@pytest.mark.parametrize("name", UNFIT)
def test_unfit_weights_are_refused_by_prune(tiny_llama, name):
    change, message = UNFIT[name]
    model = tiny_llama(vocab_size=64)
    change(model)
    with pytest.raises((ValueError, TypeError), match=message):
        prune(model, WINDOWS, progress=False)


def test_a_head_that_is_tied_to_the_embedding_is_no_hindrance(tiny_llama):
    """Neither is pruned."""
    prune(tiny_llama(vocab_size=64, tie_word_embeddings=True), WINDOWS, method="magnitude", progress=False)
