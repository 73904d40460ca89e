"""Settings of the solvers."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

Precision = Literal["float32", "float64", "tf32"]


@dataclass(frozen=True)
class MAIHTConfig:
    """How mAIHT (and AIHT, IHT) iterate. The defaults are the paper's.

    Args:
        mu: ℓ2 penalty μ added to the unit-diagonal Gram matrix; pulls the weights towards the dense ones.
        iterations: Thresholding iterations t1.
        refine_iterations: Gradient steps t2 on the support found.
        step_scale: Step size as a fraction of 1 / λmax, above 0 and below 1.
        precision: Floating-point format in which the layer's problem is solved. `tf32` is float32 whose products
            round their inputs to TF32 on CUDA devices that have it (Ampere and later): faster and less accurate;
            elsewhere it is float32.
    """

    mu: float = 0.1
    iterations: int = 50
    refine_iterations: int = 30
    step_scale: float = 0.95
    precision: Precision = "float32"

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
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, but found {self.precision!r}")

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype of `precision`; float32 for `tf32`."""
        return torch.float64 if self.precision == "float64" else torch.float32


PRESETS = {"paper": MAIHTConfig()}


def resolve_config(config: MAIHTConfig | str | None) -> MAIHTConfig:
    """Settings from settings, a preset's name, or None for the paper's; `ValueError`/`TypeError` otherwise."""
    if config is None:
        return PRESETS["paper"]
    if isinstance(config, str):
        if config not in PRESETS:
            raise ValueError(f"config names a preset ({', '.join(PRESETS)}) or is a MAIHTConfig, but found {config!r}")
        return PRESETS[config]
    if not isinstance(config, MAIHTConfig):
        raise TypeError(f"config must be a MAIHTConfig or a preset's name, but found {type(config).__name__}")
    return config
