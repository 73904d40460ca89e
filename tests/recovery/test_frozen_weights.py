"""Frozen zeros with an optimizer that moves weights without a gradient, as stochastic rounding and noise do."""

import pytest
import torch

from helpers.frozen_fit import BATCHES, Module, check, loss_of, masks_of, trainer
from maiht_lightning import FrozenSparsity, freeze


class Noise(torch.optim.Optimizer):
    """Adds noise to every weight, and looks at no gradient."""

    def __init__(self, parameters):
        super().__init__(parameters, {})
        self.generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(torch.randn(parameter.shape, generator=self.generator), alpha=1e-3)
        return loss


@pytest.fixture
def sparse(tiny_llama):
    model = tiny_llama(vocab_size=64, hidden_size=32, intermediate_size=48)
    for name, parameter in model.named_parameters():
        if "_proj" in name:
            parameter.data[parameter.abs() < parameter.abs().median()] = 0
    return model.train()


def test_in_a_fit(sparse):
    masks, start = masks_of(sparse), {n: p.detach().clone() for n, p in sparse.named_parameters()}
    trainer(FrozenSparsity(), max_steps=2).fit(Module(sparse, Noise))
    check(sparse, masks, start)


def test_in_the_context_and_for_its_optimizer_alone(sparse, tiny_llama):
    masks, start = masks_of(sparse), {n: p.detach().clone() for n, p in sparse.named_parameters()}
    other = tiny_llama(vocab_size=64)
    with freeze(sparse):
        loss_of(sparse, BATCHES[0]).backward()
        Noise(sparse.parameters()).step()
        check(sparse, masks, start)
        # A step of an optimizer that holds other weights hides nothing that happens to these.
        with torch.no_grad():
            sparse.model.layers[0].mlp.up_proj.weight.fill_(1)
        Noise(other.parameters()).step()
        assert sparse.model.layers[0].mlp.up_proj.weight.all()
        with torch.no_grad():
            sparse.model.layers[0].mlp.up_proj.weight.zero_()


def test_by_hand(sparse):
    masks, start = masks_of(sparse), {n: p.detach().clone() for n, p in sparse.named_parameters()}
    frozen = freeze(sparse)
    Noise(sparse.parameters()).step()
    frozen.apply_to_weights()
    frozen.verify()
    check(sparse, masks, start)
