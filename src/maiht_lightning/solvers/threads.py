"""One thread for small layers on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Multiplications in a product of a matrix (rows, in) with one (in, in), from which on several threads share the work.
# Below, threads wait for each other about as long as they save, and beside other work many times as long; a layer
# takes some tenths of a second then. 400 x 400 weights are below, 512 x 512 above.
SHARED_FROM = 2**26


@contextmanager
def threads_for(matrix: Tensor) -> Iterator[None]:
    """Solve with one thread where a matrix (rows, in) on a CPU is small, else with those that torch is set to.

    The calling thread gets its number back in the end. Others keep theirs, but for one that calls torch for the first
    time within: it begins, and stays, with one.
    """
    threads, multiplications = torch.get_num_threads(), matrix.numel() * matrix.shape[1]
    if matrix.device.type != "cpu" or multiplications >= SHARED_FROM or threads == 1:
        yield
        return
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)
