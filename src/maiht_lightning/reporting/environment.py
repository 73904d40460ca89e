"""What a run was made with: versions and device, and nothing that names a person or a machine."""

import os
import platform
import resource
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "lightning", "transformers", "lm_eval")


def environment() -> dict[str, str]:
    """Name versions, device, threads and seed, in the order in which to show them.

    Packages that are not installed are absent, and so is the seed where `seed_everything` was not called.
    """
    from .. import __version__

    found = {"maiht_lightning": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["Python"] = platform.python_version()
    # `platform.platform()` would also name the kernel, and one built by hand carries its builder's name.
    found["platform"] = f"{platform.system()} {platform.machine()}"
    found["device"] = device_name()
    if torch.version.cuda and torch.cuda.is_available():
        found["CUDA"] = torch.version.cuda
    found["threads"] = str(torch.get_num_threads())
    if seed := os.environ.get("PL_GLOBAL_SEED"):
        found["seed"] = seed
    return found


def device_name() -> str:
    """Name the GPU, with its number where there are several, or else the CPU's model."""
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return f"{count} × {torch.cuda.get_device_name()}" if count > 1 else torch.cuda.get_device_name()
    if torch.backends.mps.is_available():
        return f"{_cpu_model()} GPU"
    return _cpu_model()


def _cpu_model() -> str:
    """Name the CPU's model as Linux does, or what Python knows of it."""
    try:
        with open("/proc/cpuinfo") as file:
            models = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        models = []
    return models[0] if models else platform.processor() or platform.machine()


def command() -> str:
    """Write down the command that started this process."""
    program = Path(sys.argv[0]).name
    return shlex.join([*([] if program == "maiht" else ["python"]), program, *sys.argv[1:]])


def peak_memory_bytes() -> int:
    """Find the highest GPU memory of this process, or without a GPU its highest resident memory, in bytes."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    # The system counts in kilobytes on Linux, in bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
