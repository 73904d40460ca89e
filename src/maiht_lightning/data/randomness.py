"""Random draws in somebody else's code that neither depend on what was drawn before nor change what is drawn after."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(python_seed: int = 0, other_seed: int = 0) -> Iterator[None]:
    """Seed `random`, and with another seed NumPy and torch; put all generators back afterwards."""
    # Only generators of a CUDA that is in use already are seeded: a model on the CPU must not initialise CUDA.
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=devices):
        try:
            random.seed(python_seed)
            np.random.seed(other_seed)  # noqa: NPY002
            # `torch.manual_seed` would also seed a CUDA that is initialised later, where nothing could be put back.
            torch.default_generator.manual_seed(other_seed)
            for device in devices:
                torch.cuda.default_generators[device].manual_seed(other_seed)
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
