"""What `maiht doctor` finds on this machine: packages, devices, folders, and whether a layer can be pruned."""

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from packaging.requirements import Requirement

PACKAGE = "maiht-lightning"
# What each extra is for, in the order in which a person meets it.
FEATURES = {
    "gguf": "models in .gguf files",
    "eval": "zero-shot tasks",
    "lora": "LoRA on a pruned model",
    "lowmem": "8-bit optimizer for large models",
    "wandb": "`maiht report --wandb`",
}
TEXTS = ("wikitext2/train.parquet", "wikitext2/test.parquet", "c4/train.jsonl.gz", "c4/validation.jsonl.gz", "tasks")
GIB = 2**30


def packages() -> tuple[dict[str, str], list[dict[str, str]]]:
    """Versions by name, and a problem for each package that is missing or too old."""
    from .. import __version__

    found = {"maiht-lightning": __version__, "Python": f"{platform.python_version()} ({sys.executable})"}
    problems = []
    requirements = list(_requirements())
    if not requirements:
        problems.append({"what": f"{PACKAGE} is not installed, or not as a whole", "do": f"pip install {PACKAGE}"})
    for requirement in requirements:
        problem = _unmet(requirement)
        found[requirement.name] = "missing" if problem == "missing" else version(requirement.name)
        if problem:
            problems.append({"what": f"{requirement}: {problem}", "do": f"pip install '{requirement}'"})
    return found, problems


def features() -> list[dict[str, Any]]:
    """Each extra: what it is for, whether it is ready, and the command that makes it so."""
    listed = []
    for extra, purpose in FEATURES.items():
        wanted = list(_requirements(extra))
        unmet = [f"{each.name} ({problem})" for each in wanted if (problem := _unmet(each))]
        install = f"pip install '{PACKAGE}[{extra}]'"
        ready = bool(wanted) and not unmet
        listed.append(
            {"feature": purpose, "extra": extra, "ready": ready, "missing": unmet, "do": "" if ready else install}
        )
    return listed


def _requirements(extra: str = "") -> Iterator["Requirement"]:
    """What the package, or one of its extras, needs, as its metadata says; nothing where it is not installed."""
    try:
        from packaging.requirements import Requirement

        lines = requires(PACKAGE) or []
    except (ImportError, PackageNotFoundError):
        return
    for line in lines:
        requirement = Requirement(line)
        of_extra = bool(re.search(r"\bextra\b", str(requirement.marker)))
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            if of_extra != bool(extra):
                continue
            requirement.marker = None
            yield requirement


def _unmet(requirement: "Requirement") -> str:
    """Why a requirement is not met; empty if it is."""
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        return "missing"
    return "" if requirement.specifier.contains(installed, prereleases=True) else f"found {installed}"


def devices() -> dict[str, str]:
    """Processor, threads, memory and GPUs, as PyTorch sees them."""
    import psutil
    import torch

    from ..reporting.environment import device_name

    memory = psutil.virtual_memory()
    found = {
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads in use",
        "memory": f"{memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} GiB free",
    }
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            found[f"GPU {index}"] = f"{name}, {total / GIB:.1f} GiB, {free / GIB:.1f} GiB free"
        found["CUDA"] = str(torch.version.cuda)
    elif torch.backends.mps.is_available():
        found["GPU"] = device_name()
    elif shutil.which("nvidia-smi") is None:
        found["GPU"] = "none; the CPU computes, which is enough for small models"
    elif torch.version.cuda is None:
        found["GPU"] = "not used: this torch is built without CUDA; https://pytorch.org/get-started has the command"
    else:
        found["GPU"] = f"none found by torch, which is built for CUDA {torch.version.cuda}: is the driver as new?"
    return found


def try_pruning() -> None:
    """Load all that a run needs, prune a small layer, and count its zeros.

    Raises:
        RuntimeError: There are not as many as there must be.
        Exception: Whatever a library that cannot be loaded raises.
    """
    import torch

    from ..callbacks import pruning  # noqa: F401  (with it Lightning and transformers)
    from ..solvers import prune_layer

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 32, generator=generator)
    inputs = torch.randn(64, 32, generator=generator)
    zeros = int((prune_layer(weight, inputs.T @ inputs).weight == 0).sum())
    if 2 * zeros != weight.numel():
        raise RuntimeError(f"{zeros} of {weight.numel()} weights are zero, not half of them")


def disk() -> dict[str, str]:
    """Room where runs are written."""
    usage = shutil.disk_usage(Path.cwd())
    return {"disk": f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free in {Path.cwd()}"}


def caches() -> dict[str, str]:
    """Where models and data sets from the hub are kept."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    hub = Path(os.environ.get("HF_HOME") or home / "huggingface").expanduser()
    models = Path(os.environ.get("HF_HUB_CACHE") or hub / "hub").expanduser()
    own = Path(os.environ.get("MAIHT_CACHE_DIR") or home / "maiht-lightning").expanduser()
    return {"cache of the hub": _state(models), "cache of maiht": _state(own)}


def _state(folder: Path) -> str:
    if not folder.exists():
        return f"{folder}, made when it is needed"
    entries = sum(1 for _ in folder.iterdir())
    usage = f"{entries} {'entry' if entries == 1 else 'entries'}, {shutil.disk_usage(folder).free / GIB:.1f} GiB free"
    return f"{folder}, {usage}" if os.access(folder, os.W_OK) else f"{folder}, {usage}, not writable"


def data_folder() -> dict[str, str]:
    """Local copies of texts and tasks."""
    name = "MAIHT_DATA_DIR"
    chosen = os.environ.get(name)
    if not chosen:
        return {name: "not set: texts and tasks come from the hub, and PythonDocs... from Python itself"}
    folder = Path(chosen).expanduser()
    if not folder.is_dir():
        return {name: f"{folder} is no folder: make it, or unset {name}"}
    absent = [text for text in TEXTS if not (folder / text).exists()]
    return {name: f"{folder}, without {', '.join(absent)}" if absent else f"{folder}, with all texts and tasks"}
