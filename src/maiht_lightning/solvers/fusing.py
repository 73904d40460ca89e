"""Passes over memory: functions of several element-wise operations, which a GPU does as one kernel.

Between two products with the Gram matrix an iterative solver adds, compares and sums matrices of the layer's size. Each
of these operations reads its matrices from memory and writes one. So a pass has a Triton kernel of the same name in
`kernels`, which reads and writes each matrix once; what lies between its operations stays in registers. Where there is
no such kernel the pass runs as it stands, with the buffers that it is given as `scratch`.
"""

import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import torch

_Run = Callable[..., Any]
_run: ContextVar[_Run | None] = ContextVar("how passes are run", default=None)


def one_pass(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function of element-wise operations and sums over rows be one kernel on a GPU; see the module.

    Args:
        function: Its first argument is a matrix (rows, in). Its keyword `scratch`, buffers for what lies between its
            operations, is of no use to a kernel.
    """

    @functools.wraps(function)
    def run(*args: Any, scratch: Any = None) -> Any:
        return (_run.get() or fused)(function, scratch, *args)

    return run


@contextmanager
def run_by(how: _Run | None) -> Iterator[None]:
    """Within, each pass is run by `how(function, scratch, *args)`; with None as elsewhere, by `fused`."""
    token = _run.set(how)
    try:
        yield
    finally:
        _run.reset(token)


def unfused(function: Callable[..., Any], scratch: Any, *args: Any) -> Any:
    """Run a pass as it stands."""
    return function(*args, scratch=scratch)


def fused(function: Callable[..., Any], scratch: Any, *args: Any) -> Any:
    """Run a pass by its kernel on a GPU where Triton is at hand; as it stands elsewhere, and if the kernel declines."""
    found = NotImplemented
    if args[0].is_cuda and not failures and (kernels := _kernels()) is not None:
        try:
            # Triton launches on the current device, wherever the matrices are.
            with torch.cuda.device_of(args[0]):
                found = getattr(kernels, function.__name__)(*args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # Triton compiles before anything has run, so that the arguments are as they were.
            _give_up(error)
    return function(*args, scratch=scratch) if found is NotImplemented else found


@functools.cache
def _kernels() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from . import kernels

    return kernels


# What has kept Triton from its work in this process: it is not asked again.
failures: list[Exception] = []


def _give_up(error: Exception) -> None:
    failures.append(error)
    reason = (str(error).strip().splitlines() or [""])[0]
    warnings.warn(
        f"Triton could not make the solver's kernels ({type(error).__name__}: {reason}): the pruning goes on without, "
        f"slower and with the same weights but for rounding",
        stacklevel=2,
    )
