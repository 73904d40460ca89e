"""GPUs that are asked for, and are not there."""

from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException


def check_accelerator(name: Any) -> None:
    """Raise `MisconfigurationException` if a Trainer's accelerator is a GPU and PyTorch finds none."""
    found = {"gpu": torch.accelerator.is_available, "cuda": torch.cuda.is_available}.get(str(name))
    if found is not None and not found():
        raise MisconfigurationException(
            f"trainer.accelerator must be one that is here, but found {name}, and PyTorch {torch.__version__} finds no "
            f"GPU: look whether its build is one for GPUs and whether `nvidia-smi` shows one, or give "
            f"--trainer.accelerator cpu"
        )
