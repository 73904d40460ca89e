"""Predicting a run's phases: bytes, operations, seconds.

A matrix product takes its operations divided by the device's rate for their format. Everything else takes the bytes
that it moves, divided by the rate of the device's memory.
"""

from collections.abc import Iterator
from dataclasses import replace
from math import ceil
from typing import Literal

import torch
from torch import nn

from ..capture.grams import slice_rows
from ..solvers import PruningSpec, splitting
from ..solvers.config import HELD_OUT
from ..solvers.precision import bytes_per_entry, search_form
from ..solvers.slices import solver_bytes
from .devices import GIB, Device, find_device
from .job import Estimate, Job, Phase
from .shape import ModelShape
from .solver import count_solver
from .tasks import TASKS

# Seconds in which Triton makes the solver's kernels, once.
COMPILING = 3.0
# Bytes per weight of an optimizer's state, by the weight's own bytes. In 8 bits each of two moments has a byte, and a
# float32 scale per 256 of them.
OPTIMIZERS = {"adamw": lambda itemsize: 2 * itemsize, "adamw_8bit": lambda itemsize: 2 + 8 / 256}

# An input that is kept while a block is pruned: whose it is, `pruned` or `dense`, and its number in the block.
Known = tuple[str, int]


def gram_flops(inputs: int, tokens: int, device: torch.device) -> float:
    """Count the operations of the upper triangle of XᵀX (in, in) for X (tokens, in), as it is computed in slices."""
    rows = slice_rows(inputs, device)
    return sum(2.0 * tokens * min(rows, inputs - s) * (inputs - s) for s in range(0, inputs, rows))


def estimate(shape: ModelShape, job: Job, device: Device) -> Estimate:
    """Predict what a run on one device takes.

    Args:
        shape: The model's sizes.
        job: What is to be done.
        device: Where.

    Raises:
        ValueError: The solver's `memory_budget` is too small.
    """
    phases = [*_finetune(shape, job, device), *_prune(shape, job, device)]
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
        By phase of the pruning, `capture`, `solve` and, where there is one, `reconstruct`, its `seconds`, `flops` and
        `device_bytes`; empty for models that cannot be estimated.
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
        for phase in _prune(shape, job, device)
    }


def _rate(job: Job, device: Device) -> float:
    """Choose the rate of the model's own matrix products, in operations per second."""
    return device.flops_bf16 if job.itemsize == 2 else device.flops_fp32


def _forward_flops(shape: ModelShape, job: Job, tokens: float) -> float:
    """Count the operations of one block's forward pass. Causal attention needs half of its products."""
    return tokens * (2.0 * sum(layer.weights for layer in shape.layers) + job.seqlen * shape.attention_width)


def _block_bytes(shape: ModelShape, job: Job) -> float:
    return float(shape.block_parameters * job.itemsize)


def _resident(shape: ModelShape, job: Job, blocks: int = 2) -> float:
    """Count the bytes of weights on the device while blocks are pruned or measured, so many at a time."""
    if job.offload == "none":
        return float(shape.parameters * job.itemsize)
    return shape.outside * job.itemsize + blocks * _block_bytes(shape, job)


def _hidden(shape: ModelShape, job: Job) -> float:
    """Count the bytes of all calibration windows' hidden states (samples, seqlen, hidden)."""
    return float(job.samples * job.seqlen * shape.hidden * job.itemsize)


def _finetune(shape: ModelShape, job: Job, device: Device) -> Iterator[Phase]:
    if not job.train_steps:
        return
    tokens, size = job.train_batch_size * job.seqlen, job.itemsize
    block, head = shape.block_counts(size), shape.head_counts(size)
    # The backward pass has twice the products of the forward pass; with checkpointing the latter runs twice.
    passes = 4 if job.gradient_checkpointing else 3
    head_flops = 3 * 2.0 * tokens * shape.hidden * shape.vocabulary
    flops = job.train_steps * (passes * shape.blocks * _forward_flops(shape, job, tokens) + head_flops)
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
    seconds = flops / _rate(job, device) + job.train_steps * moved / device.bandwidth_uncached
    yield Phase("finetune", flops, seconds, memory)


def _prune(shape: ModelShape, job: Job, device: Device) -> Iterator[Phase]:
    # As much of what layers see is kept while a block is pruned as there is room for: a tenth of the memory is left.
    known = _worth_keeping(shape, job)
    while True:
        phases = _capture(shape, job, device, known), _solve(shape, job, device, known)
        if not known or all(phase.device_bytes <= 0.9 * device.memory for phase in phases):
            break
        known = known[:-1]
    yield from phases
    if job.settings.reconstruction_epochs:
        yield _reconstruct(shape, job, device)


def _streams(job: Job) -> int:
    """Count the streams of hidden states: the pruned model's and, where it is needed, the dense one's."""
    return 2 if job.settings.has_dense_stream else 1


def _worth_keeping(shape: ModelShape, job: Job) -> list[Known]:
    """List what layers see that is of use while a block is pruned, in the order in which it is seen."""
    settings = job.settings
    found: list[Known] = []
    for group in shape.entries if settings.sublayers else ():
        if not (settings.reconstruction_epochs and group == len(shape.groups) - 1):
            found.append(("pruned", group))
        if settings.dense_targets:
            found.append(("dense", group))
    return found


def _kept(shape: ModelShape, job: Job, known: list[Known]) -> float:
    """Count the bytes of what is kept of a block's inside."""
    return float(job.samples * job.seqlen * job.itemsize * sum(shape.grams[group] for _, group in known))


def _passes(shape: ModelShape, job: Job, tokens: float, known: list[Known]) -> float:
    """Count the operations of all forward passes of one block's capture."""
    whole = _forward_flops(shape, job, tokens)
    # The dense model goes first alone where the zeros are shared out by what its layers see.
    measured = whole if job.settings.measures_dense else 0.0
    if not job.settings.sublayers:
        # The dense block runs up to the input of its last layer; then the pruned one, and the dense one beside it.
        return measured + (1 + _streams(job)) * whole - 2.0 * tokens * shape.layers[-1].weights

    def run(stream: str, end: int) -> float:
        """Operations up to the input of a group, where some of those before it are known."""
        begun = {group for whose, group in known if whose == stream and group < end}
        ran = [la for la in shape.layers if la.group < end and la.needless_after not in begun]
        # Attention comes after the first layers, and in the same module.
        attention = job.seqlen * shape.attention_width * (shape.layers[0] in ran)
        return tokens * (2.0 * sum(layer.weights for layer in ran) + attention)

    # For every group a pass up to its input, and one of the whole block in the end.
    groups = len(shape.groups)
    total = sum(run("pruned", group) for group in range(groups))
    # What is known of a block is of no use any more where the block was trained.
    total += whole if job.settings.reconstruction_epochs else run("pruned", groups)
    if job.settings.dense_targets:
        total += sum(run("dense", group) for group in range(groups + 1))
    elif job.settings.has_dense_stream:
        total += whole
    return measured + total


def _capture(shape: ModelShape, job: Job, device: Device, known: list[Known]) -> Phase:
    tokens, size = job.samples * job.seqlen, job.itemsize
    torch_device = torch.device("cpu" if device.is_host else "cuda")
    forward = shape.blocks * _passes(shape, job, tokens, known)
    grams = shape.blocks * sum(gram_flops(n, tokens, torch_device) for n in shape.grams)
    # The products of two different inputs have no symmetry to be saved, and a difference is not of half precision.
    drifts = shape.blocks * sum(2.0 * tokens * n**2 for n in shape.grams) if job.settings.dense_targets else 0.0
    batches = ceil(job.samples / job.calibration_batch)
    # Per batch, half of a product (in, in) is written and read in float32 and added to the sum in float64. The inputs
    # (tokens, in) are turned to float32, unless a GPU multiplies them in half precision.
    moved = batches * sum(n * n / 2 * (4 + 4 + 16) for n in shape.grams)
    is_direct = size == 2 and not device.is_host
    is_turned = not is_direct or bool(job.settings.dense_targets)
    moved += tokens * sum(shape.grams) * (size + 4) * is_turned
    rounded = device.flops_tf32 if size == 2 or job.settings.precision == "tf32" else device.flops_fp32
    seconds = forward / _rate(job, device) + grams / (device.flops_bf16 if is_direct else rounded) + drifts / rounded
    seconds += shape.blocks * moved / device.bandwidth
    # A pass up to the last layer's input has nearly all that lies between the products of a whole one.
    whole_passes = forward / shape.blocks / _forward_flops(shape, job, tokens)
    runs = whole_passes if job.settings.sublayers else 1 + _streams(job) + job.settings.measures_dense
    seconds += shape.blocks * runs * tokens * shape.block_counts(size).forward / device.bandwidth_uncached
    if job.offload != "none":
        seconds += shape.blocks * _block_bytes(shape, job) / device.host_link
    widest = max(shape.grams)
    if job.settings.sublayers:
        # One group's sums exist at a time, and the dense copy of the block.
        sums = (16.0 if job.settings.dense_targets else 8.0) * widest**2 + _block_bytes(shape, job)
        sums += _kept(shape, job, known)
    else:
        sums = sum(8.0 * n * n for n in shape.grams)
    sums += 4.0 * slice_rows(widest, torch_device) * widest
    working = job.calibration_batch * job.seqlen * (shape.block_counts(size).peak + 4 * widest * is_turned)
    streams = max(_streams(job), 1 + job.settings.measures_dense)
    memory = device.baseline_bytes + _resident(shape, job) + sums + streams * _hidden(shape, job) + working
    return Phase("capture", forward + grams + drifts, seconds, memory)


def _solve(shape: ModelShape, job: Job, device: Device, known: list[Known]) -> Phase:
    spec = job.spec.on("cpu" if device.is_host else "cuda")
    # What keeps N of M has no kernel.
    fuses = not device.is_host and not spec.pattern.group
    counts, config = count_solver(spec, fused=fuses), spec.config
    flops = shape.blocks * sum(counts.products * layer.outputs * layer.inputs**2 for layer in shape.layers)
    # TF32 does not reach factorisations and what is solved with them.
    solved = 0.0
    if job.method in ("sparsegpt", "admm"):
        # Both factorise and invert the Gram matrix (in, in).
        solved += shape.blocks * sum(2.0 * n**3 for n in shape.grams)
    if job.spec.method == "maiht" and job.settings.candidates == "preconditioned":
        solved += shape.blocks * sum(2.0 * splitting.levels(job.settings.iterations) * n**3 for n in shape.grams)
    if job.settings.dense_targets:
        # A factorisation for each input, a product and two triangular solutions for each layer.
        solved += shape.blocks * sum(n**3 / 3 for n in shape.grams)
        solved += shape.blocks * sum(4.0 * layer.outputs * layer.inputs**2 for layer in shape.layers)
    if job.method == "sparsegpt":
        # SparseGPT also updates the columns in later blocks of columns. `count_solver` does not see it, as its small
        # layers have one block.
        flops += shape.blocks * sum(1.0 * layer.outputs * layer.inputs**2 for layer in shape.layers)
    moved = shape.blocks * counts.moved * sum(layer.weights for layer in shape.layers)
    full_rate = device.flops_fp32 / (2 if config.precision == "float64" else 1)
    rate = device.flops_tf32 if config.precision == "tf32" else full_rate
    # A CPU multiplies halves as float32 numbers.
    half_rate = device.flops_fp32 if device.is_host else device.flops_bf16
    halves = shape.blocks * sum(counts.halves * layer.outputs * layer.inputs**2 for layer in shape.layers)
    seconds = flops / rate + solved / full_rate + halves / half_rate + moved / device.bandwidth
    seconds += COMPILING * fuses
    state = max(solver_bytes((la.outputs, la.inputs), config.dtype, config.memory_budget) for la in shape.layers)
    # A block's Gram matrices (in, in), and the one at work once more, scaled; or one group's, with what is made of it.
    # Beside it there is what products with it need.
    widest = max(shape.grams)
    grams = float(config.dtype.itemsize * (sum(n * n for n in shape.grams) + widest**2))
    if config.sublayers:
        grams = config.dtype.itemsize * (4 if config.dense_targets else 2) * widest**2 + _block_bytes(shape, job)
        grams += _kept(shape, job, known)
    if job.method in ("maiht", "aiht", "iht"):
        grams += bytes_per_entry(config.precision) * widest**2
    if job.method == "maiht" and config.candidates == "preconditioned":
        inverse = 2 if search_form(config.precision) == "fp16" else bytes_per_entry(config.precision)
        grams += (config.dtype.itemsize + inverse * splitting.levels(config.iterations)) * widest**2
    results = job.itemsize * sum(layer.weights for layer in shape.layers) if job.offload == "none" else 0
    memory = device.baseline_bytes + _resident(shape, job) + grams + state + results
    return Phase("solve", flops + solved + halves, seconds, memory + _streams(job) * _hidden(shape, job))


def _reconstruct(shape: ModelShape, job: Job, device: Device) -> Phase:
    tokens, size, epochs = job.samples * job.seqlen, job.itemsize, job.settings.reconstruction_epochs
    held_out = 1 / HELD_OUT
    # Forward and backward passes of what is trained with, forward passes of what is held out, the first one before.
    passes = epochs * 3 * (1 - held_out) + (epochs + 1) * held_out
    flops = shape.blocks * passes * _forward_flops(shape, job, tokens)
    block, weights = shape.block_counts(size), sum(layer.weights for layer in shape.layers)
    steps = epochs * job.samples
    # A step of Adam reads and writes seven numbers a weight in float32. Before it the gradient is read and written with
    # its zeros; where the model is in half precision, weight and gradient are also turned from one to the other.
    turned = 2 * (4 + size) if size < 4 else 0
    moved = tokens * epochs * block.training + steps * weights * (4.0 * 7 + 4 + 1 + 4 + turned)
    seconds = flops / _rate(job, device) + shape.blocks * moved / device.bandwidth_uncached
    # In float32: weight, best weight, gradient, two moments; and where there are zeros.
    working = job.calibration_batch * job.seqlen * block.saved + weights * (4.0 * 5 + 1 + 2 * size)
    memory = device.baseline_bytes + _resident(shape, job) + 2 * _hidden(shape, job) + working
    return Phase("reconstruct", flops, seconds, memory + _block_bytes(shape, job))


def _evaluate(shape: ModelShape, job: Job, device: Device) -> Phase:
    # The model is measured twice, before and after the pruning.
    tokens, size = 2 * job.eval_windows * job.seqlen, job.itemsize
    block, head = shape.block_counts(size), shape.head_counts(size)
    flops = shape.blocks * _forward_flops(shape, job, tokens) + 2.0 * tokens * shape.hidden * shape.vocabulary
    moved = tokens * (shape.blocks * block.forward + head.forward)
    seconds = flops / _rate(job, device) + moved / device.bandwidth_uncached
    batch = job.eval_batch_size * job.seqlen
    # Beside a block's tensors lie the logits (batch, vocabulary), of which chunks are turned to float32.
    memory = device.baseline_bytes + _resident(shape, job) + batch * (block.peak + shape.vocabulary * size) + 2**28
    if job.offload != "none":
        seconds += 2 * shape.blocks * _block_bytes(shape, job) / device.host_link
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
        flops += shape.blocks * _forward_flops(shape, replace(job, seqlen=ceil(each.tokens / each.sequences)), given)
        flops += 2.0 * given * shape.hidden * shape.vocabulary
        tokens += given
    # Short passes take what the weights take to be read, if that is more than their products.
    weights = float(shape.parameters * size)
    moved = tokens * (shape.blocks * block.forward + head.forward)
    seconds = max(flops / _rate(job, device), passes * weights / device.bandwidth) + moved / device.bandwidth_uncached
    # A model in host memory goes to the device for the tasks, where that has room for it; else each pass brings it.
    is_whole = job.offload == "none" or 1.5 * weights <= device.memory
    if job.offload != "none":
        seconds += (2 if is_whole else passes) * weights / device.host_link
    resident = weights if is_whole else _resident(shape, job)
    # The logits (batch, vocabulary) and their logarithms.
    working = batch_size * longest * (block.peak + 2 * shape.vocabulary * size)
    return Phase("tasks", flops, seconds, device.baseline_bytes + resident + working)
