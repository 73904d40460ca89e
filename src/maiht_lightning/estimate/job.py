"""What is to be predicted, and a prediction."""

from dataclasses import dataclass, field
from typing import Literal

import torch

from ..solvers import MAIHTConfig, PruningSpec
from ..validation import check_at_least


@dataclass(frozen=True)
class Job:
    """What is to be done; the defaults are the paper's.

    Args:
        dtype: Format of the weights: `bfloat16`, `float16` or `float32`.
        samples: Calibration windows.
        seqlen: Tokens per window, in calibration, training and evaluation.
        batch_size: Windows per calibration forward pass; one where blocks are reconstructed.
        method: Pruning method.
        pattern: Sparsity pattern.
        sparsity: Fraction of zeros.
        config: A preset's name or settings one by one, as for `MAIHTPruning`.
        offload: As for `MAIHTPruning`.
        train_steps: Forward and backward passes; 0 for none.
        train_batch_size: Windows per pass.
        gradient_checkpointing: As for `CausalLMModule`.
        optimizer: As for `CausalLMModule`.
        eval_windows: Windows of each measurement, before and after the pruning; 166 are WikiText-2's test set in
            LLaMA's tokens.
        eval_batch_size: Windows per forward pass of a measurement.
        tasks: Zero-shot tasks that are measured before and after the pruning; see `estimate.tasks.TASKS`.
        task_limit: Only so many documents of each.
        task_batch_size: Sequences of a task per forward pass; by default as many as windows.
    """

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    samples: int = 128
    seqlen: int = 2048
    batch_size: int = 8
    method: str = "maiht"
    pattern: str = "unstructured"
    sparsity: float = 0.5
    config: MAIHTConfig | str | None = None
    offload: Literal["none", "cpu", "disk"] = "none"
    train_steps: int = 0
    train_batch_size: int = 1
    gradient_checkpointing: bool = True
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw_8bit"
    eval_windows: int = 166
    eval_batch_size: int = 1
    tasks: list[str] = field(default_factory=list)
    task_limit: int | None = None
    task_batch_size: int | None = None

    def __post_init__(self) -> None:
        # Parsing the spec checks the method, the pattern and the sparsity.
        _ = self.spec
        for name in ("samples", "seqlen", "batch_size", "train_batch_size", "eval_batch_size"):
            check_at_least(1, **{name: getattr(self, name)})
        for name in ("task_limit", "task_batch_size"):
            if getattr(self, name) is not None:
                check_at_least(1, **{name: getattr(self, name)})
        for name in ("train_steps", "eval_windows"):
            check_at_least(0, **{name: getattr(self, name)})

    @property
    def spec(self) -> PruningSpec:
        """How the layers are pruned."""
        return PruningSpec.parse(self.sparsity, self.pattern, self.method, self.config)

    @property
    def settings(self) -> MAIHTConfig:
        """The settings that `config` stands for."""
        return self.spec.config

    @property
    def calibration_batch(self) -> int:
        """Windows per calibration forward pass with these settings."""
        return self.settings.windows_per_pass(self.batch_size)

    @property
    def itemsize(self) -> int:
        """Bytes of a weight."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype.itemsize


@dataclass(frozen=True)
class Phase:
    """A part of a run.

    Args:
        name: `finetune`, `capture`, `solve`, `reconstruct`, `rescale`, `evaluate` or `tasks`.
        flops: Operations in matrix products.
        seconds: Wall-clock time.
        device_bytes: Most memory of the computing device that is in use.
    """

    name: str
    flops: float
    seconds: float
    device_bytes: float


@dataclass(frozen=True)
class Estimate:
    """A prediction.

    Args:
        phases: In the order in which they run.
        host_bytes: Most host memory beside what the device holds; none where the host's memory is the device's.
        disk_bytes: The run's folder when it is done: the pruned model and the journal.
        weights: Bytes of the model.
    """

    phases: tuple[Phase, ...]
    host_bytes: float
    disk_bytes: float
    weights: float

    @property
    def peak(self) -> Phase:
        """The phase that needs most of the device's memory."""
        return max(self.phases, key=lambda phase: phase.device_bytes)

    @property
    def flops(self) -> float:
        """Operations of all phases."""
        return sum(phase.flops for phase in self.phases)
