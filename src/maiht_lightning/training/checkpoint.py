"""Reading a Trainer's checkpoints, without running anything that is in them."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


def read_checkpoint(path: str | Path, *, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint into host memory.

    Args:
        path: The file.
        mmap: Map its tensors, so that weights are read only when they are looked at.

    Raises:
        OSError: There is no such file.
        pickle.UnpicklingError: It holds other things than data.
    """
    with suppress(ImportError):
        # It tells PyTorch that the states of its optimizers are data, which checkpoints with `adamw_8bit` hold.
        import torchao.optim  # noqa: F401
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
