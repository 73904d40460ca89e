"""The accuracy of float32 products, whatever the process is set to."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def float32_products(*, tf32: bool) -> Iterator[None]:
    """Compute float32 products exactly as float32, or on CUDA with TF32 inputs, and restore the setting.

    A training run often calls `torch.set_float32_matmul_precision("medium")`, which would reach the solvers.
    """
    cuda: Any = torch.backends.cuda.matmul
    mkldnn: Any = torch.backends.mkldnn
    if hasattr(cuda, "fp32_precision"):  # since PyTorch 2.9, which objects to a mix of the two ways
        settings = [(cuda, "tf32" if tf32 else "ieee"), (mkldnn.matmul, "ieee")]
        before = [backend.fp32_precision for backend, _ in settings]
        try:
            for backend, value in settings:
                backend.fp32_precision = value
            yield
        finally:
            for (backend, _), value in zip(settings, before, strict=True):
                backend.fp32_precision = value
    else:
        old = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("high" if tf32 else "highest")
            yield
        finally:
            torch.set_float32_matmul_precision(old)
