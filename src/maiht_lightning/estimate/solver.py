"""Counting what a solver does, by letting it solve small layers."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from ..solvers import LayerSolver, PruningSpec
from ..solvers.fusing import run_by
from ..solvers.inverse import LEAF, by_products, half_of
from ..solvers.precision import Form
from .probe import Traffic, nbytes, tensors

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
def count_solver(spec: PruningSpec, *, fused: bool = False) -> SolverCounts:
    """Count what it takes to solve a layer, by solving small ones with random weights and inputs.

    Args:
        spec: How it is pruned, with the precision of the device in question: see `PruningSpec.on`.
        fused: Whether kernels do its passes over memory, so that each reads and writes every matrix once.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inputs, weight = torch.randn(4 * _WIDTH, _WIDTH), torch.randn(_MORE, _WIDTH)
    products, half_products, moved = [], [], []
    for rows in (_FEWER, _MORE):
        with FlopCounterMode(display=False) as flops, _SolverTraffic() as traffic:
            how = traffic.run_pass if fused else None
            with run_by(how):
                LayerSolver(inputs.T @ inputs, spec).prune(weight[:rows])
        half_products.append(traffic.half_flops)
        products.append(flops.get_total_flops() - traffic.half_flops)
        moved.append(traffic.moved)
    rows = _MORE - _FEWER
    plain, half, rest = (more - fewer for fewer, more in (products, half_products, moved))
    return SolverCounts(plain / rows / _WIDTH**2, half / rows / _WIDTH**2, rest / rows / _WIDTH)


@dataclass(frozen=True)
class InverseCounts:
    """What it takes to invert a Gram matrix (in, in).

    Args:
        plain: Operations in factorisations, in float32.
        halves: Operations in products of half-precision matrices.
        moved: Bytes that are read and written beside these.
    """

    plain: float
    halves: float
    moved: float


@cache
def count_inverse(size: int, form: Form) -> InverseCounts:
    """Count what `shifted_inverse` does with a matrix (size, size), and products of a `Multiplier`'s form."""
    if form == "plain" or size <= LEAF:
        # Of these three quarters are those of inverting what was factorised.
        return InverseCounts(2.0 * size**3, 0.0, 0.0)
    one = half_of(size)
    other = size - one
    first, last = count_inverse(one, form), count_inverse(other, form)
    # Each of the four products is three of half precision.
    products = 3 * 2.0 * (2 * other * one**2 + 2 * one * other**2)
    return InverseCounts(
        first.plain + last.plain,
        first.halves + last.halves + products,
        first.moved + last.moved + _moved_by_a_cut() * size**2,
    )


@cache
def _moved_by_a_cut() -> float:
    """Count the bytes that the products of one cut read and write beside, for each entry of the matrix."""
    moved = []
    for leaf in (_WIDTH, 2 * _WIDTH):
        with _SolverTraffic() as traffic:
            by_products(torch.eye(2 * _WIDTH), leaf)
        moved.append(traffic.moved)
    return (moved[0] - moved[1]) / (2 * _WIDTH) ** 2


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
        self._pass: _Pass | None = None

    def run_pass(self, function: Callable[..., Any], scratch: Any, *args: Any) -> Any:
        """Run a pass as one kernel does: each matrix is read once, each that it changes or returns written once."""
        # What a kernel has in registers is in matrices here that nobody else has.
        scratch = tree_map_only(Tensor, torch.empty_like, scratch)
        self._pass = each = _Pass({tensor.untyped_storage()._cdata: nbytes(tensor) for tensor in tensors(args)})
        found = function(*args, scratch=scratch)
        self._pass = None
        self.moved += each.moved + sum(map(nbytes, tensors(found)))
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].dtype == torch.float16:
            output = func(*args, **(kwargs or {}))
            self._turned = output.untyped_storage()._cdata
            return output
        if self._pass is not None:
            output = func(*args, **(kwargs or {}))
            self._pass.note(func, args, kwargs or {}, output)
            return output
        if func in _PRODUCTS and args[0].untyped_storage()._cdata == self._turned:
            self.half_flops += 2 * args[0].numel() * args[1].shape[1]
            self._turned = 0
        return super().__torch_dispatch__(func, types, args, kwargs)


class _Pass:
    """What a fused pass reads and writes of the matrices that it is given, each once.

    Args:
        given: Their bytes by storage.
    """

    def __init__(self, given: dict[int, int]) -> None:
        self.given = given
        self.read: set[int] = set()
        self.written: set[int] = set()

    def note(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Note an operation."""
        used, mutable = _storages(args), func._schema.is_mutable
        if mutable or not _storages(output) <= used:
            # What was written within the pass is not read from memory; nor is what is only viewed.
            self.read |= used - self.written
        for value, argument in zip(args, func._schema.arguments, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.written |= _storages(value)
        self.written |= _storages(kwargs.get("out"))

    @property
    def moved(self) -> int:
        """Bytes in all."""
        return sum(size * ((key in self.read) + (key in self.written)) for key, size in self.given.items())


def _storages(values: Any) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors(values)}
