"""Where the windows' hidden states are kept between two blocks."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

Storage = Literal["auto", "device", "host", "disk"]


def check_storage(place: str) -> str:
    """Return `place`, or raise `ValueError` listing the known ones."""
    if place not in get_args(Storage):
        raise ValueError(f"hidden_states must be one of {', '.join(get_args(Storage))}, but found {place!r}")
    return place


def choose_storage(size: int, device: torch.device, working: int = 0) -> Storage:
    """Where hidden states fit: on the device beside what works there, in half of the free host memory, or on disk.

    Args:
        size: Their bytes.
        device: Where to compute.
        working: Bytes that blocks, Gram matrices and solver need on the device.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What the allocator holds and does not use is free as well.
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if size <= 0.9 * free - working:
            return "device"
    elif device.type != "cpu":
        return "device"
    return "host" if size <= available_host_memory() / 2 else "disk"


def available_host_memory() -> float:
    """Bytes of host memory that programs may still take; infinite where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), float("inf"))


@contextmanager
def keeping(place: str, device: torch.device, folder: Path | None = None) -> Iterator[Callable[[Tensor], Tensor]]:
    """A function that puts hidden states into their place, and gives them back there.

    Args:
        place: `device`; `host`, in pinned memory if the device is a GPU; or `disk`, in mapped files.
        device: Where to compute.
        folder: Where the files are made; by default the system's temporary folder. They are deleted at the end.
    """
    if place != "disk":
        yield lambda hidden: _in_memory(hidden, place, device)
        return
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="hidden_states_", dir=folder) as files:
        numbers = count()

        def keep(hidden: Tensor) -> Tensor:
            path = str(Path(files) / f"batch_{next(numbers):06d}.bin")
            mapped = torch.from_file(path, shared=True, size=hidden.numel(), dtype=hidden.dtype)
            return mapped.view(hidden.shape).copy_(hidden)

        yield keep


def _in_memory(hidden: Tensor, place: str, device: torch.device) -> Tensor:
    if place == "device" or device.type == "cpu":
        return hidden.to(device)
    pinned = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=device.type == "cuda")
    return pinned.copy_(hidden)
