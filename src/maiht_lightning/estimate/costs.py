"""What several phases of a run have in common: a model's passes in operations, its weights in bytes."""

from .devices import Device
from .job import Job
from .shape import ModelShape


def model_rate(job: Job, device: Device) -> float:
    """Choose the rate of the model's own matrix products, in operations per second."""
    return device.flops_bf16 if job.itemsize == 2 else device.flops_fp32


def forward_flops(shape: ModelShape, job: Job, tokens: float) -> float:
    """Count the operations of one block's forward pass. Causal attention needs half of its products."""
    return tokens * (2.0 * sum(layer.weights for layer in shape.layers) + job.seqlen * shape.attention_width)


def block_bytes(shape: ModelShape, job: Job) -> float:
    """Count the bytes of one block's weights."""
    return float(shape.block_parameters * job.itemsize)


def resident_bytes(shape: ModelShape, job: Job) -> float:
    """Count the bytes of weights on the device while blocks are pruned or measured; offloaded, there are two blocks."""
    if job.offload == "none":
        return float(shape.parameters * job.itemsize)
    return shape.outside * job.itemsize + 2 * block_bytes(shape, job)


def hidden_bytes(shape: ModelShape, job: Job) -> float:
    """Count the bytes of all calibration windows' hidden states (samples, seqlen, hidden)."""
    return float(job.samples * job.seqlen * shape.hidden * job.itemsize)
