"""What a run was made with: versions and device, and nothing that names a person or a machine."""

import os
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = ("torch", "lightning", "transformers", "lm_eval")


def environment() -> dict[str, str]:
    """Versions, device, threads and seed, in the order in which to show them.

    Packages that are not installed are absent, and so is the seed where `seed_everything` was not called.
    """
    import torch

    from .. import __version__

    found = {"maiht_lightning": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["Python"] = platform.python_version()
    # Not `platform.platform()`: a kernel built by hand carries its builder's name.
    found["platform"] = f"{platform.system()} {platform.machine()}"
    found["device"] = device_name()
    if torch.version.cuda and torch.cuda.is_available():
        found["CUDA"] = torch.version.cuda
    found["threads"] = str(torch.get_num_threads())
    if seed := os.environ.get("PL_GLOBAL_SEED"):
        found["seed"] = seed
    return found


def device_name() -> str:
    """The GPU's name, with its number where there are several, or else the CPU's model."""
    import torch

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return f"{count} × {torch.cuda.get_device_name()}" if count > 1 else torch.cuda.get_device_name()
    if torch.backends.mps.is_available():
        return f"{_cpu_model()} GPU"
    return _cpu_model()


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            models = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        models = []
    return models[0] if models else platform.processor() or platform.machine()


def peak_memory_bytes() -> int:
    """Highest GPU memory allocated by this process, or its highest resident memory without a GPU, in bytes."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    # Kilobytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
