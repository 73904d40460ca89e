"""Processes that prune or measure one model together, through `torch.distributed`.

They share out work, sum results, and pass on errors, so that no process waits for one that has failed. A process alone
needs no group, and communicates with nobody.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class RankError(RuntimeError):
    """Another process of the group has failed; the message is its own."""


class Ranks:
    """The processes of a group, or this one alone.

    Args:
        group: The process group, such as `torch.distributed.group.WORLD`. None: this process alone.

    Attributes:
        rank: This process's number in the group.
        size: Processes in the group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes files."""
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> list[T]:
        """Return this process's share of items that all processes have: every `size`-th."""
        return list(items[self.rank :: self.size])

    def assign_by_cost(self, costs: Sequence[float]) -> list[int]:
        """Choose the process for each piece of work: the costliest first, to the one that has least to do."""
        load, owner = [0.0] * self.size, [0] * len(costs)
        # In this order the greedy choice is at most 4/3 of the best (Graham 1969).
        for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
            owner[index] = load.index(min(load))
            load[owner[index]] += costs[index]
        return owner

    def reduce(self, tensor: Tensor, owner: int) -> None:
        """Sum a tensor over all processes, in place; only the owner has the sum afterwards."""
        if self.size > 1:
            dist.reduce(tensor, group=self._group, group_dst=owner)

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum a tensor over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self._group)

    def broadcast(self, tensor: Tensor, owner: int) -> Tensor:
        """Overwrite a contiguous tensor with the owner's, and return it."""
        if self.size > 1:
            dist.broadcast(tensor, group=self._group, group_src=owner)
        return tensor

    def broadcast_object(self, value: T, owner: int = 0) -> T:
        """Return the owner's value, which may be any that can be pickled."""
        if self.size == 1:
            return value
        values: list[Any] = [value if self.rank == owner else None]
        dist.broadcast_object_list(values, group=self._group, group_src=owner, device=self._device())
        return values[0]

    def all_gather_object(self, value: T) -> list[T]:
        """Return every process's value, in the order of their ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    @contextmanager
    def errors_shared(self) -> Iterator[None]:
        """Wait at the end of work that each process does for itself, until all are done or have failed.

        Raises:
            RankError: Another process has failed.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        # All processes meet here, so that one that has failed is heard by those that have not.
        messages = self.all_gather_object(None if failure is None else str(failure)) if self.size > 1 else []
        if failure is not None:
            raise failure
        for rank, message in enumerate(messages):
            if message is not None:
                raise RankError(f"process {rank} has failed: {message}")

    def _device(self) -> torch.device | None:
        # NCCL sends tensors on a GPU alone, so that pickled objects must go there first.
        on_cuda = dist.get_backend(self._group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if on_cuda else None
