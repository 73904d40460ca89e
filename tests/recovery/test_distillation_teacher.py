"""A teacher that is in training mode when it is handed over."""

import pytest
import torch

from maiht_lightning.models.divergence import distillation_loss
from maiht_lightning.recovery.distillation import distilled

TOKENS = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))


def test_it_answers_without_dropout_and_keeps_its_mode(tiny_llama):
    student, teacher = tiny_llama(vocab_size=64).train(), tiny_llama(vocab_size=64, seed=1, attention_dropout=0.5)
    with torch.no_grad():
        logits = [model(input_ids=TOKENS, use_cache=False).logits for model in (student, teacher)]
    teacher.train()
    with distilled(student, teacher, weight=1.0) as distillation:
        loss = student(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
    expected = float(distillation_loss(*logits, TOKENS))
    assert float(loss.detach()) == float(distillation.kl) == pytest.approx(expected, rel=1e-6)
    assert all(module.training for module in teacher.modules())
