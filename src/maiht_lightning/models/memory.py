"""Work that is done again in smaller pieces where memory runs out."""

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")

# What PyTorch's allocator on the CPU says; it has no class of error for this.
_CPU_ALLOCATOR = "DefaultCPUAllocator"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is of an allocator that had no memory left, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and _CPU_ALLOCATOR in str(error)
    )


def release_memory() -> None:
    """Give unused memory of PyTorch's allocator back; not within the handler of an error, which holds tensors."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def forget_peak(device: torch.device) -> None:
    """Let `peak_of` count from now on, where the device is a GPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_of(device: torch.device) -> int:
    """The highest memory that this process had on a GPU since `forget_peak`, in bytes; 0 elsewhere."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def with_room(
    what: str,
    work: Callable[[int], T],
    batch_size: int,
    on_retry: Callable[[str], None],
    *,
    done: str = "measured",
    retries: bool = True,
) -> T:
    """Do some work in batches of a size, or of half of it as long as memory runs out.

    Args:
        what: Names the work in the sentence for `on_retry`.
        work: Takes a batch size, and can be done again.
        batch_size: The first one to try.
        on_retry: Called with a sentence where memory ran out.
        done: What is done in the work, such as `measured`.
        retries: Whether the work is done again at all.
    """
    while True:
        try:
            return work(batch_size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or not retries or batch_size == 1:
                raise
        release_memory()
        on_retry(f"{what}: memory ran out with batch_size {batch_size}, so it is {done} with {batch_size // 2}")
        batch_size //= 2
