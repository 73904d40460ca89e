"""Settings of the solvers."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

Precision = Literal["float32", "float64", "tf32"]


@dataclass(frozen=True)
class MAIHTConfig:
    """Settings of the solvers. The defaults are the mAIHT paper's.

    `precision` and `keep_zeros` serve every method; the other settings are those of `maiht`, `aiht` and `iht`.

    Args:
        mu: ℓ2 penalty μ added to the unit-diagonal Gram matrix; it pulls the weights towards the dense ones.
        iterations: Thresholding iterations t1.
        refine_iterations: Gradient steps t2 on the support found.
        step_scale: Step size as a fraction of 1 / λmax, above 0 and below 1.
        precision: Floating-point format in which the layer's problem is solved. `tf32` is float32 whose products
            round their inputs to TF32 on CUDA devices that have it (Ampere and later): faster and less accurate;
            elsewhere it is float32.
        tolerance: Stop early when over five iterations the objective has changed by no more than this fraction, and no
            more than this fraction of the support; likewise for the refining. 0, as in the paper, means never.
        memory_budget: Bytes on the weight's device that the solver may take beside the Gram matrix; None for as many
            as it needs (11 matrices of the weight's size). A layer that needs more is solved in slices of rows, with
            the same answer but for rounding. Unless the pattern is `row`, what must outlive a slice waits in host
            memory, so that on the CPU a budget saves little.
        keep_zeros: Weights that are 0 already stay 0 and count among the zeros asked for: for pruning in several
            steps. Where there are more of them than asked for, all stay.

    Raises:
        ValueError: A setting is out of range; the message names it.
    """

    mu: float = 0.1
    iterations: int = 50
    refine_iterations: int = 30
    step_scale: float = 0.95
    precision: Precision = "float32"
    tolerance: float = 0.0
    memory_budget: int | None = None
    keep_zeros: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.mu < float("inf"):
            raise ValueError(f"mu must be a finite number, at least 0, but found {self.mu!r}")
        for name in ("iterations", "refine_iterations"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                raise ValueError(f"{name} must be a whole number, at least 0, but found {getattr(self, name)!r}")
        if not 0 < self.step_scale < 1:
            raise ValueError(
                f"step_scale must lie between 0 and 1, both excluded, or the iteration need not descend, "
                f"but found {self.step_scale!r}"
            )
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance must be a fraction, at least 0 and below 1, but found {self.tolerance!r}")
        if self.memory_budget is not None and (not isinstance(self.memory_budget, int) or self.memory_budget < 1):
            raise ValueError(f"memory_budget must be a number of bytes, at least 1, but found {self.memory_budget!r}")
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, but found {self.precision!r}")

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype of `precision`; float32 for `tf32`."""
        return torch.float64 if self.precision == "float64" else torch.float32


PRESETS = {"paper": MAIHTConfig()}


def resolve_config(config: MAIHTConfig | str | None) -> MAIHTConfig:
    """Return settings as they are, those of a preset by its name, and the paper's for None.

    Raises:
        ValueError: No preset has this name.
        TypeError: It is neither settings nor a name.
    """
    if config is None:
        return PRESETS["paper"]
    if isinstance(config, str):
        if config not in PRESETS:
            raise ValueError(f"config must be a preset ({', '.join(PRESETS)}) or a MAIHTConfig, but found {config!r}")
        return PRESETS[config]
    if not isinstance(config, MAIHTConfig):
        raise TypeError(f"config must be a MAIHTConfig or a preset's name, but found {type(config).__name__}")
    return config
