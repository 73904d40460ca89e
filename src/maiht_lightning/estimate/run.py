"""What a run that has a model at hand should take on this machine, to stand beside what it took."""

from typing import TYPE_CHECKING, Any

from ..solvers import PruningSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

from .devices import find_device
from .plan import Job, estimate
from .shape import ModelShape


def predict_pruning(
    model: "PreTrainedModel", spec: PruningSpec, *, samples: int, seqlen: int, batch_size: int, offload: Any
) -> dict[str, dict[str, float]]:
    """By phase of the pruning its `seconds`, `flops` and `device_bytes`; empty for models that cannot be estimated.

    Args:
        model: The causal language model, of which only sizes are read.
        job: What is done with it.
    """
    job = Job(
        dtype=str(model.dtype).removeprefix("torch."),  # type: ignore[arg-type]
        samples=samples,
        seqlen=seqlen,
        batch_size=batch_size,
        offload=offload,
        eval_windows=0,
        method=spec.method,
        pattern=spec.pattern.name,
        sparsity=spec.sparsity,
        config=spec.config,
    )
    try:
        shape = ModelShape.of(model)
    except (ValueError, TypeError, AttributeError, RuntimeError):
        # A model of an unusual kind: its pruning may well have worked.
        return {}
    found = estimate(shape, job, find_device("local", shape.hidden, max(shape.grams)))
    return {
        phase.name: {"seconds": phase.seconds, "flops": phase.flops, "device_bytes": phase.device_bytes}
        for phase in found.phases
        if phase.name in ("capture", "solve")
    }
