"""Counting what a solver does, by letting it solve small layers."""

from dataclasses import dataclass
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..solvers import LayerSolver, PruningSpec
from .probe import Traffic

# The small layers have so many inputs, and two of them so many rows: what differs between these grows with the rows.
_WIDTH, _FEWER, _MORE = 64, 64, 128


@dataclass(frozen=True)
class SolverCounts:
    """What a method does for a layer (out, in), over the sizes that it grows with.

    Args:
        products: Operations in matrix products, divided by out · in².
        moved: Bytes that all else reads and writes, divided by out · in.
    """

    products: float
    moved: float


@cache
def count_solver(spec: PruningSpec) -> SolverCounts:
    """Count what it takes to solve a layer, by solving small ones with random weights and inputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inputs, weight = torch.randn(4 * _WIDTH, _WIDTH), torch.randn(_MORE, _WIDTH)
    products, moved = [], []
    for rows in (_FEWER, _MORE):
        with FlopCounterMode(display=False) as flops, Traffic() as traffic:
            solver = LayerSolver(inputs.T @ inputs, spec)
            solver.prune(weight[:rows])
        products.append(flops.get_total_flops())
        moved.append(traffic.moved)
    rows = _MORE - _FEWER
    return SolverCounts((products[1] - products[0]) / rows / _WIDTH**2, (moved[1] - moved[0]) / rows / _WIDTH)
