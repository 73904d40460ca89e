"""Random layer problems."""

from math import sqrt

import torch

from maiht_lightning.solvers import MAIHTConfig

FLOAT64 = MAIHTConfig(precision="float64")


def make_problem(seed, out, inputs, tokens=None, spread=1.0):
    """A random weight (out, in) and Gram matrix (in, in) of correlated features of unequal norms, float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mixing = torch.eye(inputs, dtype=torch.float64) + 0.5 * normal(inputs, inputs) / sqrt(inputs)
    features = normal(tokens or 4 * inputs, inputs) @ mixing * (spread * normal(inputs)).exp()
    return normal(out, inputs), features.T @ features
