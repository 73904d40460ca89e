"""Passes over memory: functions of several element-wise operations, which a GPU can do as one kernel.

Between two products with the Gram matrix an iterative solver adds, compares and sums matrices of the layer's size. Each
of these operations reads its matrices from memory and writes one; `torch.compile` makes one kernel of several, which
reads and writes each matrix once. No product may stand in such a function: see `precision.float32_products`.

A pass is one source for both ways. Beside its arguments it takes `scratch`, buffers for what lies between its
operations: one after the other they write there; fused, `scratch` is None, and what lies between stays in registers.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

# Seconds that compiling takes, once for all layers: assumed, between what it took on a CPU with and without PyTorch's
# cache. About as much is saved, at some 80 bytes a weight and iteration, where one process has so many weights, times
# iterations.
COMPILING, WORTHWHILE = 20.0, 4e11

_Run = Callable[..., Any]
_run: ContextVar[_Run | None] = ContextVar("how passes are run", default=None)


def one_pass(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function of element-wise operations and sums over rows be fused; see the module.

    Args:
        function: Changes none but the tensors that it says it does, and returns small ones or masks. Its keyword
            `scratch` is None, or buffers as it says.
    """

    @functools.wraps(function)
    def run(*args: Any, scratch: Any = None) -> Any:
        how = _run.get()
        return function(*args, scratch=scratch) if how is None else how(function, scratch, *args)

    return run


@contextmanager
def run_by(how: _Run | None) -> Iterator[None]:
    """Within, each pass is run by `how(function, scratch, *args)`; with None as it stands."""
    token = _run.set(how)
    try:
        yield
    finally:
        _run.reset(token)


def fused(function: Callable[..., Any], scratch: Any, *args: Any) -> Any:
    """Run a pass as `torch.compile` makes it on a GPU; as it stands on a CPU, and where there is no compiler."""
    if args[0].is_cuda and not failures:
        try:
            run = compiled(function)
        except RuntimeError as error:
            # Not on every version of Python.
            _give_up(error)
        else:
            try:
                return run(*args)
            except torch._dynamo.exc.TorchDynamoException as error:
                # Compiling fails before anything has run, so that the arguments are as they were.
                _give_up(error)
    return function(*args, scratch=scratch)


# What has kept `torch.compile` from its work in this process: it is not asked again.
failures: list[Exception] = []


def _give_up(error: Exception) -> None:
    failures.append(error)
    reason = (str(error).strip().splitlines() or [""])[0]
    warnings.warn(
        f"torch.compile could not fuse the solver's passes over memory ({type(error).__name__}: {reason}): the pruning "
        f"goes on without, slower and with the same weights but for rounding",
        stacklevel=2,
    )


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A pass as one graph, for matrices of any size and any numbers."""
    graph = _graph(function)

    def run(first: Tensor, *args: Any) -> Any:
        # A number would be a constant of the graph, and each other one need a graph of its own.
        return graph(
            first,
            *(torch.full((), x, dtype=first.dtype, device=first.device) if isinstance(x, float) else x for x in args),
            scratch=None,
        )

    return run


@functools.cache
def _graph(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True, fullgraph=True)


def add_scaled(one: Tensor, other: Tensor, scale: float | Tensor, out: Tensor) -> Tensor:
    """Write one + scale · other to `out`; the scale is a number, or in a graph a tensor ()."""
    if isinstance(scale, Tensor):
        return torch.add(one, other * scale, out=out)
    return torch.add(one, other, alpha=scale, out=out)
