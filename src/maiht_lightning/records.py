"""Results of a pruning and of its measurements: plain data that anyone may read."""

from dataclasses import dataclass, field
from typing import Any

STAGE_ORDER = ("dense", "pruned", "finetuned")


@dataclass
class LayerRecord:
    """How one linear layer was pruned.

    Args:
        name: Dotted path in the model.
        block: Index of its decoder block.
        shape: (out, in).
        zeros: Weights that are exactly 0, counted after rounding to the model's dtype.
        relative_error: ‖X(W − W0)ᵀ‖² / ‖X W0ᵀ‖² on the calibration inputs.
        objective: The solver's objective, iteration by iteration; empty where it does not iterate.
        accelerated: The monitor's choices; see `LayerResult`.
        seconds: Wall-clock time of the solver, in seconds.
        name_in_block: Dotted path in its block. None in records of older journals, which have `name` alone.
        block_error: Mean relative error per token of the block's output on held-out calibration windows, before and
            after its reconstruction; None where there was none. It is the same for all layers of a block.
    """

    name: str
    block: int
    shape: tuple[int, int]
    zeros: int
    relative_error: float
    objective: list[float] = field(default_factory=list)
    accelerated: list[float] = field(default_factory=list)
    seconds: float = 0.0
    name_in_block: str | None = None
    block_error: tuple[float, float] | None = None

    @property
    def layer(self) -> str:
        """Path in its block, such as `mlp.down_proj`: which kind of layer it is."""
        if self.name_in_block is not None:
            return self.name_in_block
        return self.name.split(f".{self.block}.", 1)[-1]

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return self.zeros / (self.shape[0] * self.shape[1])


@dataclass
class PruningReport:
    """What `prune` has done.

    Args:
        layers: One record per linear layer, in the order of the blocks.
        capture_seconds: Wall-clock time of forward passes and Gram matrices, in seconds.
        solve_seconds: Wall-clock time of the solver, in seconds.
        reconstruction_seconds: Wall-clock time of the blocks' reconstruction, in seconds.
        resumed: Blocks that came finished from the journal; their work is in none of these times.
        journal_seconds: Wall-clock time of opening the journal, for which the model's weights are digested, and of
            writing finished blocks to it, in seconds.
        peak_memory_bytes: Highest GPU memory of this process meanwhile, in bytes; 0 without a GPU.
        rescaling_seconds: Wall-clock time in which factors were learnt through the whole model, in seconds.
        divergence: KL divergence of the dense model's predictions from the pruned model's on held-out calibration
            windows, in nats per token, before and after that; None where nothing was learnt so.
    """

    layers: list[LayerRecord] = field(default_factory=list)
    capture_seconds: float = 0.0
    solve_seconds: float = 0.0
    resumed: int = 0
    reconstruction_seconds: float = 0.0
    journal_seconds: float = 0.0
    peak_memory_bytes: int = 0
    rescaling_seconds: float = 0.0
    divergence: tuple[float, float] | None = None

    @property
    def seconds(self) -> float:
        """Wall-clock time of all parts, in seconds."""
        trained = self.reconstruction_seconds + self.rescaling_seconds
        return self.capture_seconds + self.solve_seconds + trained + self.journal_seconds

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all pruned layers, counted."""
        return sum(r.zeros for r in self.layers) / sum(r.shape[0] * r.shape[1] for r in self.layers)


@dataclass(frozen=True)
class StageResult:
    """What was measured of one state of a model.

    Args:
        perplexity: Perplexity by text.
        tasks: Metrics by zero-shot task, such as `{"boolq": {"acc": 0.6, "acc_stderr": 0.02}}`.
        metrics: What functions of the user's own have measured, by the names that they give.
    """

    perplexity: dict[str, float] = field(default_factory=dict)
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def mean_accuracy(self) -> float | None:
        """Unweighted mean of the tasks' plain `acc`, as a fraction; None where no task has it.

        The tables of Wanda (https://arxiv.org/abs/2306.11695) and of the mAIHT paper print this mean: each task counts
        the same, whatever its number of questions, and `acc_norm` is not used.
        """
        accuracies = [metrics["acc"] for metrics in self.tasks.values() if "acc" in metrics]
        return sum(accuracies) / len(accuracies) if accuracies else None

    def score(self, task: str, metric: str) -> tuple[float | None, float | None]:
        """A task's metric and its standard error; None for what was not measured."""
        metrics = self.tasks.get(task, {})
        return metrics.get(metric), metrics.get(f"{metric}_stderr")

    def to_json(self) -> dict[str, Any]:
        """The form in `summary.json`: tasks, their mean and metrics are absent where there are none."""
        found: dict[str, Any] = {"perplexity": self.perplexity}
        if self.tasks:
            found["tasks"] = self.tasks
        if self.mean_accuracy is not None:
            found["mean_accuracy"] = self.mean_accuracy
        if self.metrics:
            found["metrics"] = self.metrics
        return found

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "StageResult":
        """Read what `to_json` or an older version has written. Other keys are left out; absent parts are empty."""
        return cls(**{name: dict(found[name]) for name in ("perplexity", "tasks", "metrics") if name in found})


class Stages(dict[str, StageResult]):
    """What was measured at each stage of a run: `dense`, `pruned`, `finetuned`. Stages that were not run are absent."""

    def in_order(self) -> "Stages":
        """The stages in the order in which they happen; unknown ones come last, in the order given."""
        known = [name for name in STAGE_ORDER if name in self]
        return Stages({name: self[name] for name in [*known, *(name for name in self if name not in known)]})

    @property
    def texts(self) -> list[str]:
        """The texts of which some stage has a perplexity."""
        return list(dict.fromkeys(text for stage in self.values() for text in stage.perplexity))

    @property
    def tasks(self) -> list[str]:
        """The zero-shot tasks that some stage has done."""
        return list(dict.fromkeys(task for stage in self.values() for task in stage.tasks))

    @property
    def own_metrics(self) -> list[str]:
        """What some stage was measured by with functions of the user's own."""
        return list(dict.fromkeys(name for stage in self.values() for name in stage.metrics))

    @property
    def metrics(self) -> list[tuple[str, str]]:
        """Each task with each of its metrics, without the standard errors."""
        return list(
            dict.fromkeys(
                (task, metric)
                for stage in self.values()
                for task, metrics in stage.tasks.items()
                for metric in metrics
                if not metric.endswith("_stderr")
            )
        )
