"""Where the calibration windows' hidden states wait between two blocks: on the device, in host memory or on disk."""

import os
import tempfile
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Literal, Self, get_args

import psutil
import torch
from torch import Tensor

from ..models.offload import free_memory

Storage = Literal["auto", "device", "host", "disk"]


def check_storage(storage: str) -> str:
    """Return `storage`, or raise `ValueError` that lists the known ones."""
    if storage not in get_args(Storage):
        raise ValueError(f"hidden_states must be one of {', '.join(get_args(Storage))}, but found {storage!r}")
    return storage


def pinned_bytes(size: int) -> int:
    """Bytes that a tensor takes in pinned memory: PyTorch's allocator rounds them up to a power of two."""
    return 1 << (size - 1).bit_length() if size else 0


def choose_storage(size: int, device: torch.device, working: int = 0, pinned: int = 0) -> Storage:
    """Choose where hidden states fit: on the device, in half of the free host memory, or on disk.

    Args:
        size: Bytes of the hidden states.
        device: Where the blocks are computed.
        working: Bytes that blocks, Gram matrices and solver need on the device beside them.
        pinned: Bytes that they take in pinned memory, where a GPU's wait in the host's, if those are more than `size`.

    Returns:
        `device`, `host` or `disk`.
    """
    if device.type != "cpu":
        if has_room(size, device, working):
            return "device"
        size = max(size, pinned)
    return "host" if has_room(size, torch.device("cpu")) else "disk"


def has_room(size: int, device: torch.device, working: int = 0) -> bool:
    """Whether so many bytes fit on a device, beside what works there: on the CPU, in half of its free memory.

    Of devices that are neither CPU nor CUDA nothing is known, and they are taken to have room.
    """
    if device.type == "cuda":
        return size <= 0.9 * free_memory(device) - working
    return device.type != "cpu" or size <= available_host_memory() / 2


def available_host_memory() -> int:
    """Bytes of host memory that programs may still take."""
    return int(psutil.virtual_memory().available)


class HiddenStateStore:
    """Stores hidden states between two blocks; a context, at whose end its files are deleted.

    Args:
        storage: `device`; `host`, in pinned memory if the device is a GPU; or `disk`, in mapped files.
        device: Where the blocks are computed.
        folder: Where the files are made; by default the system's temporary folder.
    """

    def __init__(self, storage: Storage, device: torch.device, folder: Path | None = None) -> None:
        self.storage, self.device, self._folder = storage, device, folder
        self._files: Path | None = None
        self._numbers = count()
        self._open = ExitStack()

    def __enter__(self) -> Self:
        if self.storage == "disk":
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
            folder = tempfile.TemporaryDirectory(prefix="hidden_states_", dir=self._folder)
            self._files = Path(self._open.enter_context(folder))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def put(self, hidden: Tensor) -> Tensor:
        """Store hidden states (windows, seqlen, hidden); returns them as a tensor there, which can be written to."""
        if self._files is not None:
            path = self._files / f"batch_{next(self._numbers):06d}.bin"
            _reserve(path, hidden.nbytes)
            mapped = torch.from_file(str(path), shared=True, size=hidden.numel(), dtype=hidden.dtype)
            return mapped.view(hidden.shape).copy_(hidden)
        if self.storage == "device" or self.device.type == "cpu":
            return hidden.to(self.device)
        pinned = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=self.device.type == "cuda")
        return pinned.copy_(hidden)


class NoStore:
    """Stands for a store where hidden states are of no use."""

    def put(self, hidden: Tensor) -> Tensor:
        """Return an empty tensor."""
        return hidden.new_empty(0)


def _reserve(path: Path, size: int) -> None:
    """Make a file of so many bytes that are on the disk: writing to a mapped one without room ends the process.

    Raises:
        OSError: The disk has no room.
    """
    with path.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise OSError(
                f"{path} could not be written: {error}. Hidden states on disk take {size} bytes per batch: make room, "
                f"or choose hidden_states device or host"
            ) from error
