"""Predicting a pruning: capturing what the layers see, solving for their weights, training what is left."""

from collections.abc import Iterator
from math import ceil

import torch

from ..capture.grams import slice_rows
from ..capture.sublayers import TOKENS_AT_ONCE
from ..solvers import splitting
from ..solvers.config import HELD_OUT
from ..solvers.precision import bytes_per_entry, final_form, search_form
from ..solvers.slices import solver_bytes
from .costs import block_bytes, forward_flops, hidden_bytes, model_rate, resident_bytes
from .devices import Device
from .job import Job, Phase
from .shape import ModelShape
from .solver import count_inverse, count_solver

# Seconds in which Triton makes the solver's kernels, once.
COMPILING = 3.0

# An input that is kept while a block is pruned: whose it is, `pruned` or `dense`, and its number in the block.
Known = tuple[str, int]


def pruning_phases(shape: ModelShape, job: Job, device: Device) -> Iterator[Phase]:
    """Predict the phases `capture`, `solve` and, where something is trained, `reconstruct` and `rescale`."""
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
    if job.settings.rescaling_epochs:
        yield _rescale(shape, job, device)


def gram_flops(inputs: int, tokens: int, device: torch.device) -> float:
    """Count the operations of the upper triangle of XᵀX (in, in) for X (tokens, in), as it is computed in slices."""
    rows = slice_rows(inputs, device)
    return sum(2.0 * tokens * min(rows, inputs - s) * (inputs - s) for s in range(0, inputs, rows))


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
    whole = forward_flops(shape, job, tokens)
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
    # The products of two different inputs have no symmetry to be saved.
    drifts = shape.blocks * sum(2.0 * tokens * n**2 for n in shape.grams) if job.settings.dense_targets else 0.0
    at_once = batch = job.calibration_batch * job.seqlen
    if job.settings.sublayers and job.settings.trains:
        at_once = min(tokens, max(batch, TOKENS_AT_ONCE))
    is_joined = at_once > batch
    # Each time half of a product (in, in), and all of one of two inputs, is written and read in float32 and added to
    # the sum in float64. The inputs (tokens, in) are turned to float32, unless a GPU multiplies them in half precision.
    matrices, inputs = (1.5, 2) if job.settings.dense_targets else (0.5, 1)
    moved = ceil(tokens / at_once) * matrices * sum(n * n * (4 + 4 + 16) for n in shape.grams)
    is_turned = size > 2 or device.is_host
    moved += inputs * tokens * sum(shape.grams) * ((size + 4) * is_turned + 2 * size * is_joined)
    rounded = device.flops_tf32 if size == 2 or job.settings.precision == "tf32" else device.flops_fp32
    seconds = forward / model_rate(job, device) + (grams + drifts) / (rounded if is_turned else device.flops_bf16)
    seconds += shape.blocks * moved / device.bandwidth
    # A pass up to the last layer's input has nearly all that lies between the products of a whole one.
    whole_passes = forward / shape.blocks / forward_flops(shape, job, tokens)
    runs = whole_passes if job.settings.sublayers else 1 + _streams(job) + job.settings.measures_dense
    seconds += shape.blocks * runs * tokens * shape.block_counts(size).forward / device.bandwidth_uncached
    if job.offload != "none":
        seconds += shape.blocks * block_bytes(shape, job) / device.host_link
    widest = max(shape.grams)
    if job.settings.sublayers:
        # One group's sums exist at a time, and the dense copy of the block.
        sums = (16.0 if job.settings.dense_targets else 8.0) * widest**2 + block_bytes(shape, job)
        sums += _kept(shape, job, known)
    else:
        sums = sum(8.0 * n * n for n in shape.grams)
    sums += 4.0 * slice_rows(widest, torch_device) * widest
    working = batch * shape.block_counts(size).peak
    working += at_once * inputs * widest * (2 * size * is_joined + 4 * is_turned)
    streams = max(_streams(job), 1 + job.settings.measures_dense)
    memory = device.baseline_bytes + resident_bytes(shape, job) + sums + streams * hidden_bytes(shape, job) + working
    return Phase("capture", forward + grams + drifts, seconds, memory)


def _solve(shape: ModelShape, job: Job, device: Device, known: list[Known]) -> Phase:
    spec = job.spec.on("cpu" if device.is_host else "cuda")
    # What keeps N of M has no kernel.
    fuses = not device.is_host and not spec.pattern.group
    counts, config = count_solver(spec, fused=fuses), spec.config
    flops = shape.blocks * sum(counts.products * layer.outputs * layer.inputs**2 for layer in shape.layers)
    # TF32 does not reach factorisations. Each penalty of the splitting has an inverse, and so has the correction.
    inverted = (job.method == "admm") + (config.dense_targets > 0)
    if job.method == "maiht" and config.candidates == "preconditioned":
        inverted += splitting.levels(config.iterations)
    form = final_form(config.precision)
    inverses = [count_inverse(n, form) for n in shape.grams]
    solved, halves, moved = (
        float(shape.blocks * inverted * sum(numbers))
        for numbers in zip(*((each.plain, each.halves, each.moved) for each in inverses), strict=True)
    )
    if config.dense_targets:
        # A product for each input, and one for each layer.
        corrected = sum(2.0 * n**3 for n in shape.grams) + sum(2.0 * la.outputs * la.inputs**2 for la in shape.layers)
        if form == "plain":
            flops += shape.blocks * corrected
        else:
            halves += shape.blocks * 3 * corrected
    if job.method == "sparsegpt":
        # It factorises and inverts the Gram matrix (in, in), and updates the columns in later blocks of columns, which
        # `count_solver` does not see, as its small layers have one block.
        solved += shape.blocks * sum(2.0 * n**3 for n in shape.grams)
        flops += shape.blocks * sum(1.0 * layer.outputs * layer.inputs**2 for layer in shape.layers)
    moved += shape.blocks * counts.moved * sum(layer.weights for layer in shape.layers)
    full_rate = device.flops_fp32 / (2 if config.precision == "float64" else 1)
    rate = device.flops_tf32 if config.precision == "tf32" else full_rate
    # A CPU multiplies halves as float32 numbers.
    half_rate = device.flops_fp32 if device.is_host else device.flops_bf16
    halves += shape.blocks * sum(counts.halves * layer.outputs * layer.inputs**2 for layer in shape.layers)
    seconds = flops / rate + solved / full_rate + halves / half_rate + moved / device.bandwidth
    seconds += COMPILING * fuses
    state = max(solver_bytes((la.outputs, la.inputs), config.dtype, config.memory_budget) for la in shape.layers)
    # A block's Gram matrices (in, in), and the one at work once more, scaled; or one group's, with what is made of it.
    # Beside it there is what products with it need.
    widest = max(shape.grams)
    grams = float(config.dtype.itemsize * (sum(n * n for n in shape.grams) + widest**2))
    if config.sublayers:
        grams = config.dtype.itemsize * (4 if config.dense_targets else 2) * widest**2 + block_bytes(shape, job)
        grams += _kept(shape, job, known)
    if job.method in ("maiht", "aiht", "iht"):
        grams += bytes_per_entry(config.precision) * widest**2
    if job.method == "maiht" and config.candidates == "preconditioned":
        inverse = 2 if search_form(config.precision) == "fp16" else bytes_per_entry(config.precision)
        grams += (config.dtype.itemsize + inverse * splitting.levels(config.iterations)) * widest**2
    results = job.itemsize * sum(layer.weights for layer in shape.layers) if job.offload == "none" else 0
    memory = device.baseline_bytes + resident_bytes(shape, job) + grams + state + results
    return Phase("solve", flops + solved + halves, seconds, memory + _streams(job) * hidden_bytes(shape, job))


def _reconstruct(shape: ModelShape, job: Job, device: Device) -> Phase:
    tokens, size, epochs = job.samples * job.seqlen, job.itemsize, job.settings.reconstruction_epochs
    held_out = 1 / HELD_OUT
    # Forward and backward passes of what is trained with, forward passes of what is held out, the first one before.
    passes = epochs * 3 * (1 - held_out) + (epochs + 1) * held_out
    flops = shape.blocks * passes * forward_flops(shape, job, tokens)
    block, weights = shape.block_counts(size), sum(layer.weights for layer in shape.layers)
    steps = epochs * job.samples
    # A step of Adam reads and writes seven numbers a weight in float32. Before it the gradient is read and written with
    # its zeros; after it, where the model is in half precision, weights are rounded.
    turned = size + 1 + 4 + (4 + size if size < 4 else 0)
    moved = tokens * epochs * block.training + steps * weights * (4.0 * 7 + turned)
    seconds = flops / model_rate(job, device) + shape.blocks * moved / device.bandwidth_uncached
    # In float32 gradient, two moments and, where the model is in half precision, weight; where there are zeros; in the
    # model's dtype weight, best weight and gradient.
    working = job.calibration_batch * job.seqlen * block.saved + weights * (4.0 * (4 if size < 4 else 3) + 1 + 3 * size)
    memory = device.baseline_bytes + resident_bytes(shape, job) + 2 * hidden_bytes(shape, job) + working
    return Phase("reconstruct", flops, seconds, memory + block_bytes(shape, job))


def _rescale(shape: ModelShape, job: Job, device: Device) -> Phase:
    tokens, size, epochs = job.samples * job.seqlen, job.itemsize, job.settings.rescaling_epochs
    held_out = 1 / HELD_OUT
    steps, measured = epochs * (1 - held_out), (epochs + 1) * held_out
    # A step is a forward pass, another one of each block on the way back, and gradients by inputs, not by weights.
    flops = (3 * steps + measured) * shape.blocks * forward_flops(shape, job, tokens)
    # Logits of both models, and the gradient by one of them. To learn how blocks return their output, one is run.
    flops += (3 * steps + 2 * measured) * 2.0 * tokens * shape.hidden * shape.vocabulary
    flops += 2 * (steps + measured) * forward_flops(shape, job, tokens)
    block, head = shape.block_counts(size), shape.head_counts(size)
    # What a layer sees is multiplied in float32 and rounded, and what it returns as well; the way back is twice that.
    factors = sum(la.inputs * (2 * size + 8) + la.outputs * (3 * size + 16) for la in shape.layers)
    moved = steps * (block.forward + block.training + 4 * factors) + measured * (block.forward + factors)
    moved = tokens * (shape.blocks * moved + (steps + measured) * (head.forward + head.training))
    seconds = flops / model_rate(job, device) + moved / device.bandwidth_uncached
    if job.offload != "none":
        seconds += job.samples * (2 * steps + measured) * shape.blocks * block_bytes(shape, job) / device.host_link
    # A window's hidden states before each block and after the last, what one block and its factors remember, and both
    # models' logits with the gradient.
    kept = sum((la.inputs + la.outputs) * (size + 4) for la in shape.layers)
    logits = head.saved + shape.vocabulary * (4 + 3 * size)
    window = (shape.blocks + 1) * shape.hidden * size + max(block.saved + kept, logits)
    memory = device.baseline_bytes + resident_bytes(shape, job) + 2 * hidden_bytes(shape, job)
    return Phase("rescale", flops, seconds, memory + job.calibration_batch * job.seqlen * window)
