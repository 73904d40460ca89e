"""A small model that knows a language, the language, and perplexity by its definition.

A model with random weights has a perplexity of about its vocabulary's size, whatever is computed. This one has a small
perplexity on the language's text, a huge one if predictions and tokens are not aligned, and another one for each part
of the text.
"""

import torch
from torch import nn

VOCABULARY = 64


def successor(tokens):
    """The token that mostly follows in the language: a cycle through the whole vocabulary."""
    return (5 * tokens + 3) % VOCABULARY


def language(windows, length, seed=0):
    """Windows (windows, length) of the language: one token in five is any token."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(VOCABULARY, (windows, length), generator=generator)
    surprising = torch.rand(windows, length, generator=generator) < 0.2
    for position in range(1, length):
        expected = successor(text[:, position - 1])
        text[:, position] = torch.where(surprising[:, position], text[:, position], expected)
    return text


@torch.no_grad()
def sharpen(model, seed=0):
    """Teach a small untied LLaMA the language, by construction; its blocks disturb it, so that pruning shows."""
    generator = torch.Generator().manual_seed(seed)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    embedding.copy_(torch.randn(embedding.shape, generator=generator))
    # The last norm's outputs have the length √hidden: a logit of 12 where nothing disturbs them.
    rows = nn.functional.normalize(embedding, dim=1) * 12 / embedding.shape[1] ** 0.5
    head[successor(torch.arange(VOCABULARY))] = rows
    for name, weight in model.named_parameters():
        if name.endswith("_proj.weight"):
            weight.mul_(5)
    return model


@torch.no_grad()
def perplexity_by_definition(model, windows):
    """exp of the mean of −log p(token | tokens before it in its window), one token after another, in float64."""
    losses = []
    for window in windows:
        logits = model(input_ids=window[None], use_cache=False).logits[0].double()
        for position in range(1, len(window)):
            scores = logits[position - 1] - logits[position - 1].max()
            losses.append(scores.exp().sum().log() - scores[window[position]])
    return torch.stack(losses).mean().exp().item()
