"""What `maiht` says of settings before anything is made of them: misspelt names, and GPUs that are not there."""

import inspect
import pydoc
import re
from difflib import get_close_matches
from typing import Any, NoReturn

import torch
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override


class Parser(LightningArgumentParser):
    """A parser that says which name an unknown one is like."""

    @override
    def error(self, message: str, ex: Any = None) -> NoReturn:
        """End with the message, and with the name that was probably meant."""
        usage = (getattr(ex, "subcommand_parser", None) or self).format_usage()
        super().error(message + _suggestion(message, re.findall(r"--([\w.]+)", usage)), ex)


def _suggestion(message: str, known: list[str]) -> str:
    """A line with the known name that is most like the unknown one of a message; empty if there is none."""
    unknown = re.search(r"(?:accept option '|Option '|unrecognized arguments: --)([\w.]+)", message)
    if unknown is None:
        return ""
    owner = re.search(r"given class_path '([\w.]+)'", message)
    if owner is not None and (kind := pydoc.locate(owner[1])) is not None:
        known = list(inspect.signature(kind).parameters)  # type: ignore[arg-type]
    close = get_close_matches(unknown[1], known, n=1, cutoff=0.8)
    return f"\nDid you mean {close[0]}?" if close else ""


def check_accelerator(name: Any) -> None:
    """Raise `MisconfigurationException` if a Trainer's accelerator is a GPU and PyTorch finds none."""
    found = {"gpu": torch.accelerator.is_available, "cuda": torch.cuda.is_available}.get(str(name))
    if found is not None and not found():
        raise MisconfigurationException(
            f"trainer.accelerator must be one that is here, but found {name}, and PyTorch {torch.__version__} finds no "
            f"GPU: look whether its build is one for GPUs and whether `nvidia-smi` shows one, or give "
            f"--trainer.accelerator cpu"
        )
