"""What to change where a run will not fit."""

from dataclasses import replace
from typing import Any

from .devices import GIB, Device
from .plan import Estimate, Job, estimate
from .shape import ModelShape

# Share of a device's memory that a run can use: the rest is lost to fragments.
USABLE = 0.95

# What may be changed, by phase, in the order in which it is tried: what costs least comes first.
_CHANGES: dict[str, list[dict[str, Any]]] = {
    "finetune": [{"optimizer": "adamw_8bit"}, {"gradient_checkpointing": True}, {"train_batch_size": 1}],
    "capture": [{"batch_size": 1}, {"offload": "cpu"}],
    "solve": [{"offload": "cpu"}],
    "reconstruct": [{"offload": "cpu"}],
    "rescale": [{"offload": "cpu"}],
    "evaluate": [{"eval_batch_size": 1}, {"offload": "cpu"}],
    "tasks": [{"task_batch_size": 1}, {"offload": "cpu"}],
}


def advise(shape: ModelShape, job: Job, device: Device, found: Estimate) -> list[str]:
    """Write one sentence for each phase that needs more memory than the device has; none where all fit."""
    room = USABLE * device.memory
    return [_advise(shape, job, device, p.name, room) for p in found.phases if p.device_bytes > room]


def _advise(shape: ModelShape, job: Job, device: Device, phase: str, room: float) -> str:
    changes = [change for change in _CHANGES[phase] if replace(job, **change) != job]
    if device.is_host:
        # Host memory is the device's own, so that only the disk takes weights out of it.
        changes = [{"offload": "disk"} if "offload" in change else change for change in changes]
    made: dict[str, Any] = {}
    for change in changes:
        made |= change
        needed = _needed(shape, replace(job, **made), device, phase)
        if needed <= room:
            settings = ", ".join(f"{name}: {str(value).lower()}" for name, value in made.items())
            return f"{phase} does not fit on {device.name}: with {settings} it takes {needed / GIB:.1f} GiB"
    needed = _needed(shape, replace(job, **made), device, phase)
    remedy = (
        "shard it over several GPUs (ModelParallelStrategy), train adapters (LoRA), or prune without training"
        if phase == "finetune"
        else "take a GPU with more memory, fewer or shorter windows, or a memory_budget for the solver"
    )
    return f"{phase} does not fit on {device.name}, which would need {needed / GIB:.1f} GiB at least: {remedy}"


def _needed(shape: ModelShape, job: Job, device: Device, phase: str) -> float:
    return next(p.device_bytes for p in estimate(shape, job, device).phases if p.name == phase)
