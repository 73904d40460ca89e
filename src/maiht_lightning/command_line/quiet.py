"""What other libraries say in `maiht`'s process and nobody can act on is left out here, message by message.

Nothing else is: warnings of the user's own code, of this package, and other ones of the same libraries are shown. All
is undone when the command ends, and importing the package changes nothing.
"""

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# (module that warns, its message from the beginning): regular expressions, as `warnings.filterwarnings` takes them.
WARNINGS = (
    # The windows lie in memory: workers would only cost time.
    (r"lightning\.pytorch\.", r"The '\w+' does not have many workers"),
    # Lightning calls a function that torch has renamed.
    (r"lightning\.", r"`?isinstance\(treespec, LeafSpec\)"),
    # Lightning recommends a logger to who has asked for none; results are in the run's folder.
    (r"lightning\.pytorch\.", r"Starting from v1\.9\.0, `tensorboardX` has been removed"),
)
# (logger, its message from the beginning).
RECORDS = (
    # torchao is loaded by transformers and peft, whether it is used or not, and tries kernels of other GPUs.
    ("torchao", r"Failed to load .*\.so"),
    # torchao registers enumerations in a way that torch no longer needs.
    ("torch.utils._pytree", r".* is an Enum subclass and is now natively supported"),
    # Advertising for other products.
    ("lightning.pytorch.utilities.rank_zero", r".*Tip: For seamless cloud "),
)


class _LeftOut(logging.Filter):
    def __init__(self, message: str) -> None:
        super().__init__()
        self.message = re.compile(message, re.DOTALL)

    def filter(self, record: logging.LogRecord) -> bool:
        return self.message.match(record.getMessage()) is None


@contextmanager
def noise_silenced() -> Iterator[None]:
    """Leave out `WARNINGS` and `RECORDS` inside, and nothing else."""
    filters = [(logging.getLogger(name), _LeftOut(message)) for name, message in RECORDS]
    # The user's own filters stay, and those that libraries set inside are undone with these.
    with warnings.catch_warnings():
        for module, message in WARNINGS:
            warnings.filterwarnings("ignore", message=message, module=module)
        for logger, each in filters:
            logger.addFilter(each)
        try:
            yield
        finally:
            for logger, each in filters:
                logger.removeFilter(each)


def is_plain() -> bool:
    """Whether progress goes to a file or a pipe, where bars would become hundreds of lines."""
    return not sys.stderr.isatty()


def prepare_process() -> None:
    """Set what libraries read when they are loaded, and processes that are started inherit; the user's choice stays."""
    # OpenMP's threads wait at barriers by spinning, beside other work for whole time slices, so that a small layer
    # takes many times as long.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # Tokenizers warn of processes that are forked after they were used, as data loaders do.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # By this variable a process that uses W&B, such as a sweep's agent, hands its service to those that it starts. The
    # service outlives a run that is killed, and would say that it is in use when it is resumed.
    os.environ.pop("WANDB_SERVICE", None)
    if is_plain():
        # Of all libraries: reading GGUF files, loading weights, downloads.
        os.environ.setdefault("TQDM_DISABLE", "1")
