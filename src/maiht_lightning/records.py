"""What is known of a pruning when it is done: plain data that anyone may read."""

from dataclasses import dataclass, field


@dataclass
class LayerRecord:
    """What happened to one linear layer.

    Args:
        name: Dotted path in the model.
        block: Index of its decoder block.
        shape: (out, in).
        zeros: Weights that are exactly 0, counted after rounding to the model's dtype.
        relative_error: ‖X(W − W0)ᵀ‖² / ‖X W0ᵀ‖² on the calibration inputs.
        objective: The solver's objective, iteration by iteration; empty where it does not iterate.
        accelerated: The monitor's choices; see `LayerResult`.
        seconds: Wall-clock time of the solver.
    """

    name: str
    block: int
    shape: tuple[int, int]
    zeros: int
    relative_error: float
    objective: list[float] = field(default_factory=list)
    accelerated: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return self.zeros / (self.shape[0] * self.shape[1])


@dataclass
class PruningReport:
    """What `prune` did.

    Args:
        layers: One record a linear layer, in the order of the blocks.
        capture_seconds: Wall-clock time of the forward passes and Gram matrices.
        solve_seconds: Wall-clock time of the solver.
        resumed: Blocks that came finished from the journal; their work is in none of the two times.
    """

    layers: list[LayerRecord] = field(default_factory=list)
    capture_seconds: float = 0.0
    solve_seconds: float = 0.0
    resumed: int = 0

    @property
    def seconds(self) -> float:
        """Wall-clock time in all."""
        return self.capture_seconds + self.solve_seconds

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all pruned layers, counted."""
        return sum(r.zeros for r in self.layers) / sum(r.shape[0] * r.shape[1] for r in self.layers)
