"""Counting what a solver does, by letting it solve small layers."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..solvers import LayerSolver, PruningSpec
from .probe import Traffic

# The small layers have so many inputs, and two of them so many rows: what differs between these grows with the rows.
_WIDTH, _FEWER, _MORE = 64, 64, 128
_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.mm.out)


@dataclass(frozen=True)
class SolverCounts:
    """What a method does for a layer (out, in), over the sizes that it grows with.

    Args:
        products: Operations in matrix products of the spec's dtype, divided by out · in².
        halves: Operations in products of half-precision matrices, divided by the same.
        moved: Bytes that all else reads and writes, divided by out · in.
    """

    products: float
    halves: float
    moved: float


@cache
def count_solver(spec: PruningSpec) -> SolverCounts:
    """Count what it takes to solve a layer, by solving small ones with random weights and inputs.

    Args:
        spec: How it is pruned, with the precision of the device in question: see `PruningSpec.on`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inputs, weight = torch.randn(4 * _WIDTH, _WIDTH), torch.randn(_MORE, _WIDTH)
    products, halves, moved = [], [], []
    for rows in (_FEWER, _MORE):
        with FlopCounterMode(display=False) as flops, _SolverTraffic() as traffic:
            solver = LayerSolver(inputs.T @ inputs, spec)
            solver.prune(weight[:rows])
        halves.append(traffic.half_flops)
        products.append(flops.get_total_flops() - traffic.half_flops)
        moved.append(traffic.moved)
    rows = _MORE - _FEWER
    plain, half, rest = (more - fewer for fewer, more in (products, halves, moved))
    return SolverCounts(plain / rows / _WIDTH**2, half / rows / _WIDTH**2, rest / rows / _WIDTH)


class _SolverTraffic(Traffic):
    """The same of a solver on a GPU, from what it does on this machine's CPU.

    A CPU turns fp16 matrices (rows, k) to float32 to multiply them; a GPU does not. Such copies move nothing here, and
    what is multiplied next with them counts as a half-precision product.

    Attributes:
        half_flops: Operations of these.
    """

    def __init__(self) -> None:
        super().__init__()
        self.half_flops = 0
        self._turned = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].dtype == torch.float16:
            output = func(*args, **(kwargs or {}))
            self._turned = output.untyped_storage()._cdata
            return output
        if func in _PRODUCTS and args[0].untyped_storage()._cdata == self._turned:
            self.half_flops += 2 * args[0].numel() * args[1].shape[1]
            self._turned = 0
        return super().__torch_dispatch__(func, types, args, kwargs)
