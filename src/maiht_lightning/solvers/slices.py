"""Matrices cut into slices of rows, for layers larger than the memory given to the solver."""

import torch
from torch import Tensor

# Matrices of a slice's size (rows, in) that an iterative solver holds at once, temporaries included.
MATRICES = 11


def solver_bytes(shape: torch.Size | tuple[int, ...], dtype: torch.dtype, memory_budget: int | None = None) -> int:
    """Bytes that the solver takes for a layer (out, in) beside its Gram matrix, within the budget if there is one."""
    row = MATRICES * shape[1] * dtype.itemsize
    return row * shape[0] if memory_budget is None else min(row * shape[0], max(row, memory_budget))


def rows_within(memory_budget: int | None, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> int:
    """Rows of a layer (out, in) that can be solved at a time within the budget; all where there is none.

    Raises:
        ValueError: The budget does not hold even one row.
    """
    if memory_budget is None:
        return shape[0]
    row = MATRICES * shape[1] * dtype.itemsize
    if memory_budget < row:
        raise ValueError(
            f"memory_budget must hold at least one row of a layer with {shape[1]} inputs, {row} bytes in {dtype}, "
            f"but found {memory_budget}"
        )
    return min(shape[0], memory_budget // row)


def page_locked(matrix: Tensor, device: torch.device) -> Tensor:
    """A matrix (out, in) of host memory where a GPU fetches slices from it, and writes them back, without a detour."""
    return matrix.pin_memory() if device.type == "cuda" and not matrix.is_cuda else matrix


def copy_beside(matrix: Tensor) -> Tensor:
    """A copy of a matrix (out, in) in memory of the same kind, page-locked or not."""
    return torch.empty_like(matrix, pin_memory=matrix.is_pinned()).copy_(matrix)


class Slices:
    """Lends rows of matrices (out, in) to the execution device: views where they are there, else copies in buffers.

    Args:
        out: Rows of the matrices.
        rows: Rows of a slice.
        device: Where to compute.

    Attributes:
        parts: The slices, in order.
    """

    def __init__(self, out: int, rows: int, device: torch.device) -> None:
        self.parts = [slice(start, min(start + rows, out)) for start in range(0, out, rows)]
        self._rows, self._device = rows, device
        self._buffers: dict[int, Tensor] = {}

    def borrow(self, matrix: Tensor, part: slice, *, read: bool = True) -> Tensor:
        """The rows `part` of a matrix (out, in) on the execution device; unless `read`, their values do not matter."""
        rows = matrix[part]
        if not self._is_offloaded(matrix):
            return rows
        # A matrix is known by its address, which is its own, since every matrix lives as long as the slices do.
        if matrix.data_ptr() not in self._buffers:
            self._buffers[matrix.data_ptr()] = torch.empty(
                self._rows, matrix.shape[1], dtype=matrix.dtype, device=self._device
            )
        buffer = self._buffers[matrix.data_ptr()][: len(rows)]
        # What is borrowed lies still until something is given back, which waits for what was asked for before it.
        return buffer.copy_(rows, non_blocking=True) if read else buffer

    def give_back(self, matrix: Tensor, part: slice, borrowed: Tensor) -> None:
        """Write changed rows back to where the matrix is."""
        if self._is_offloaded(matrix):
            matrix[part].copy_(borrowed)

    def _is_offloaded(self, matrix: Tensor) -> bool:
        return matrix.device != self._device
