"""Predicting a run's phases: bytes, operations, seconds.

A matrix product takes its operations divided by the device's rate for their format. Everything else takes the bytes
that it moves, divided by the rate of the device's memory.
"""

from collections.abc import Iterator
from dataclasses import replace
from math import ceil
from typing import Literal

from torch import nn

from ..solvers import PruningSpec
from .costs import block_bytes, forward_flops, model_rate, resident_bytes
from .devices import GIB, Device, find_device
from .job import Estimate, Job, Phase
from .pruning import pruning_phases
from .shape import ModelShape
from .tasks import TASKS

# Bytes per weight of an optimizer's state, by the weight's own bytes. In 8 bits each of two moments has a byte, and a
# float32 scale per 256 of them.
OPTIMIZERS = {"adamw": lambda itemsize: 2 * itemsize, "adamw_8bit": lambda itemsize: 2 + 8 / 256}


def estimate(shape: ModelShape, job: Job, device: Device) -> Estimate:
    """Predict what a run on one device takes.

    Args:
        shape: The model's sizes.
        job: What is to be done.
        device: Where.

    Raises:
        ValueError: The solver's `memory_budget` is too small.
    """
    phases = [*_finetune(shape, job, device), *pruning_phases(shape, job, device)]
    if job.eval_windows:
        phases.append(_evaluate(shape, job, device))
    if any(task in TASKS for task in job.tasks):
        phases.append(_tasks(shape, job, device))
    weights = float(shape.parameters * job.itemsize)
    layers = float(shape.prunable * job.itemsize)
    # Python with its libraries takes about 3 GiB of host memory.
    host = 0.0 if device.is_host else 3 * GIB + (weights if job.offload == "cpu" else 0.0)
    return Estimate(tuple(phases), host, disk_bytes=weights + layers, weights=weights)


def predict_pruning(
    model: nn.Module,
    spec: PruningSpec,
    *,
    samples: int,
    seqlen: int,
    batch_size: int,
    offload: Literal["none", "cpu", "disk"] = "none",
) -> dict[str, dict[str, float]]:
    """Predict what the pruning of a model at hand should take on this machine, to stand beside what it took.

    Args:
        model: The causal language model, of which only sizes are read.
        spec: How its layers are pruned.
        samples: Calibration windows.
        seqlen: Tokens per window.
        batch_size: Windows per calibration forward pass.
        offload: As for `MAIHTPruning`.

    Returns:
        By phase of the pruning, `capture`, `solve` and, where they are, `reconstruct` and `rescale`, its `seconds`,
        `flops` and `device_bytes`; empty for models that cannot be estimated.
    """
    try:
        shape, dtype = ModelShape.of(model), str(model.dtype)
    except (ValueError, TypeError, AttributeError, RuntimeError):
        # The model is of an unusual kind: its pruning may work all the same, and must not fail for a prediction.
        return {}
    job = Job(
        dtype=dtype.removeprefix("torch."),  # type: ignore[arg-type]
        samples=samples,
        seqlen=seqlen,
        batch_size=batch_size,
        method=spec.method,
        pattern=spec.pattern.name,
        sparsity=spec.sparsity,
        config=spec.config,
        offload=offload,
    )
    device = find_device("local", shape.hidden, max(shape.grams))
    return {
        phase.name: {"seconds": phase.seconds, "flops": phase.flops, "device_bytes": phase.device_bytes}
        for phase in pruning_phases(shape, job, device)
    }


def _finetune(shape: ModelShape, job: Job, device: Device) -> Iterator[Phase]:
    if not job.train_steps:
        return
    tokens, size = job.train_batch_size * job.seqlen, job.itemsize
    block, head = shape.block_counts(size), shape.head_counts(size)
    # The backward pass has twice the products of the forward pass; with checkpointing the latter runs twice.
    passes = 4 if job.gradient_checkpointing else 3
    head_flops = 3 * 2.0 * tokens * shape.hidden * shape.vocabulary
    flops = job.train_steps * (passes * shape.blocks * forward_flops(shape, job, tokens) + head_flops)
    state = OPTIMIZERS[job.optimizer](size)
    moved = tokens * (shape.blocks * (block.training + block.forward * (passes - 3)) + head.training)
    # In the optimizer's step, gradients, weights and moments are read and all but the gradients written; before it, the
    # backward pass has written the gradients.
    moved += shape.parameters * (3 * size + 2 * state + size)
    saved = tokens * (
        shape.hidden * size * shape.blocks + block.saved if job.gradient_checkpointing else block.saved * shape.blocks
    )
    # The gradient by the logits (tokens, vocabulary) exists in float32 and in the weights' format.
    logits = tokens * (head.saved + shape.vocabulary * (4 + size))
    memory = device.baseline_bytes + shape.parameters * (2 * size + state) + saved + logits
    seconds = flops / model_rate(job, device) + job.train_steps * moved / device.bandwidth_uncached
    yield Phase("finetune", flops, seconds, memory)


def _evaluate(shape: ModelShape, job: Job, device: Device) -> Phase:
    # The model is measured twice, before and after the pruning.
    tokens, size = 2 * job.eval_windows * job.seqlen, job.itemsize
    block, head = shape.block_counts(size), shape.head_counts(size)
    flops = shape.blocks * forward_flops(shape, job, tokens) + 2.0 * tokens * shape.hidden * shape.vocabulary
    moved = tokens * (shape.blocks * block.forward + head.forward)
    seconds = flops / model_rate(job, device) + moved / device.bandwidth_uncached
    batch = job.eval_batch_size * job.seqlen
    # Beside a block's tensors lie the logits (batch, vocabulary), of which chunks are turned to float32.
    memory = device.baseline_bytes + resident_bytes(shape, job) + batch * (block.peak + shape.vocabulary * size) + 2**28
    if job.offload != "none":
        seconds += 2 * shape.blocks * block_bytes(shape, job) / device.host_link
        memory += job.eval_windows * job.seqlen * shape.hidden * size
    return Phase("evaluate", flops, seconds, memory)


def _tasks(shape: ModelShape, job: Job, device: Device) -> Phase:
    # All are measured twice, in passes of sequences that lm-eval has sorted by length, so that little is padding.
    sizes = [TASKS[task].first(job.task_limit) for task in job.tasks if task in TASKS]
    batch_size, size = job.task_batch_size or job.eval_batch_size, job.itemsize
    passes = 2 * sum(ceil(each.sequences / batch_size) for each in sizes)
    block, head, longest = shape.block_counts(size), shape.head_counts(size), max(each.longest for each in sizes)
    flops = tokens = 0.0
    for each in sizes:
        given = 2.0 * each.tokens
        flops += shape.blocks * forward_flops(shape, replace(job, seqlen=ceil(each.tokens / each.sequences)), given)
        flops += 2.0 * given * shape.hidden * shape.vocabulary
        tokens += given
    # Short passes take what the weights take to be read, if that is more than their products.
    weights = float(shape.parameters * size)
    moved = tokens * (shape.blocks * block.forward + head.forward)
    seconds = (
        max(flops / model_rate(job, device), passes * weights / device.bandwidth) + moved / device.bandwidth_uncached
    )
    # A model in host memory goes to the device for the tasks, where that has room for it; else each pass brings it.
    is_whole = job.offload == "none" or 1.5 * weights <= device.memory
    if job.offload != "none":
        seconds += (2 if is_whole else passes) * weights / device.host_link
    resident = weights if is_whole else resident_bytes(shape, job)
    # The logits (batch, vocabulary) and their logarithms.
    working = batch_size * longest * (block.peak + 2 * shape.vocabulary * size)
    return Phase("tasks", flops, seconds, device.baseline_bytes + resident + working)
