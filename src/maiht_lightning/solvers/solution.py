"""What a solver returns."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Solution:
    """A pruned layer as a solver leaves it.

    Args:
        weight: (out, in), 0 outside the mask.
        mask: Boolean (out, in), True where a weight is kept.
        objective: Loss after each iteration; empty for methods that do not iterate.
        accelerated: For each thresholding iteration the fraction of problems (1 a layer, or 1 a row) in which
            the monitor took the accelerated candidate; empty where there is no monitor.
    """

    weight: Tensor
    mask: Tensor
    objective: list[float] = field(default_factory=list)
    accelerated: list[float] = field(default_factory=list)
