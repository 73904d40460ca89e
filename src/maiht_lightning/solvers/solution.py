"""What a solver returns."""

from dataclasses import dataclass, field
from operator import mul
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass
class Solution:
    """A pruned layer as a solver leaves it.

    Args:
        weight: (out, in), 0 outside the mask.
        mask: Boolean (out, in), True where a weight is kept.
        objective: Loss after each iteration; empty for methods that do not iterate.
        accelerated: For each thresholding iteration, the fraction of independent problems (one per layer, or one per
            row) in which the monitor took the accelerated candidate; empty where there is no monitor.
    """

    weight: Tensor
    mask: Tensor
    objective: list[float] = field(default_factory=list)
    accelerated: list[float] = field(default_factory=list)

    @classmethod
    def concatenate(cls, parts: "list[Solution]") -> "Solution":
        """Join the solutions of slices of rows: objectives are summed, the monitor's choices averaged over the rows.

        A slice that has stopped early stays at its last values.
        """
        objectives = [padded(part.objective, max(len(p.objective) for p in parts)) for part in parts]
        choices = [padded(part.accelerated, max(len(p.accelerated) for p in parts)) for part in parts]
        rows = sum(len(part.weight) for part in parts)
        shares = [len(part.weight) / rows for part in parts]
        return cls(
            torch.cat([part.weight for part in parts]),
            torch.cat([part.mask for part in parts]),
            objective=[sum(values) for values in zip(*objectives, strict=True)],
            accelerated=[sum(map(mul, shares, values)) for values in zip(*choices, strict=True)],
        )


def padded(values: list[T], length: int) -> list[T]:
    """Repeat the last value until the list has a length."""
    return values + values[-1:] * (length - len(values))
