"""Settings of the solvers, and of what is done with their results block by block."""

from ast import literal_eval
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

import torch

from ..validation import did_you_mean
from .precision import Precision, resolve_precision

Candidates = Literal["gradient", "preconditioned"]
Allocation = Literal["uniform", "depth", "owl", "error"]

# Of so many calibration windows, reconstruction holds one out, to decide by it when to stop.
HELD_OUT = 8


@dataclass(frozen=True)
class MAIHTConfig:
    """Settings of the solvers, and of a whole model's pruning. The defaults are the mAIHT paper's.

    `precision`, `keep_zeros` and the settings of a whole model, from `sublayers` on, serve every method; the others are
    those of `maiht`, `aiht` and `iht`. `prune_layer` sees one layer and has no use for those of a whole model.

    Args:
        candidates: How `maiht` finds a support. `gradient`: accelerated gradient steps under a growing penalty, as
            published. `preconditioned`: steps multiplied by (A + ρI)⁻¹, which end at a lower error, in fewer products
            with the Gram matrix but with some factorisations of it; then `iterations` counts these steps, and
            `refine_iterations` the conjugate gradient steps on the support.
        mu: ℓ2 penalty μ added to the unit-diagonal Gram matrix; it pulls the weights towards the dense ones.
        iterations: Thresholding iterations t1.
        refine_iterations: Gradient steps t2 on the support found.
        step_scale: Step size as a fraction of 1 / λmax, above 0 and below 1.
        precision: Floating-point format in which the layer's problem is solved. `float64`, `float32`; or float32
            with other products with the Gram matrix. `fp16x3`: three of half precision, as accurate as one of float32
            and on GPUs several times as fast. `mixed`: one of half precision, with the power of two that each row
            needs, while a support is sought, and `fp16x3` where the weights on it become final and for the errors
            reported. `tf32`: inputs rounded to TF32 on CUDA devices that have it (Ampere and later), and float32
            elsewhere. `auto`: `mixed` on CUDA devices, `float32` elsewhere. On a CPU the half-precision ones are
            emulated, to the same accuracy and slower.
        tolerance: Stop early when over five iterations the objective has changed by no more than this fraction, and no
            more than this fraction of the support; likewise for the refining. 0, as in the paper, means never.
        memory_budget: Bytes on the weight's device that the solver may take beside the Gram matrix; None for as many
            as it needs (11 matrices of the weight's size). A layer that needs more is solved in slices of rows, with
            the same answer but for rounding. Unless the pattern is `row`, what must outlive a slice waits in host
            memory, so that on the CPU a budget saves little.
        keep_zeros: Weights that are 0 already stay 0 and count among the zeros asked for: for pruning in several
            steps. Where there are more of them than asked for, all stay.
        sublayers: Capture a block's inputs sublayer after sublayer, each with the pruned layers before it in the same
            block: the output projection sees pruned queries, keys and values, and so on.
        dense_targets: What a layer's outputs are fitted to: 0, what its dense weights make of the pruned model's
            inputs; 1, what the dense model has there, so that it makes up for the error of the layers before it;
            between, a mixture. Above 0 it needs `sublayers`, and a second stream of hidden states, the dense model's.
            Near 1 it follows noise.
        reconstruction_epochs: Passes over the calibration windows in which a block's kept weights are trained until its
            outputs are the dense model's; see `maiht_lightning.pruning.reconstruction`. 0: none. A window is a step,
            so that the windows then go through the model one by one.
        reconstruction_rate: Adam's first step there, as a fraction of the root mean square of a layer's kept weights.
        rescaling_epochs: Passes over the calibration windows in which, when all blocks are done, every row and column
            of the pruned weights gets a factor, so that the whole model predicts what the dense one does; see
            `maiht_lightning.pruning.rescaling`. 0: none. A window is a step here, too. Models on disk and in shards
            cannot be rescaled.
        allocation: How a model's zeros are shared out to its layers; in total they are the same. `uniform`: as many in
            every layer, and always so with `N:M`. `depth`: growing evenly from the first block to the last. `owl`:
            fewer in blocks with many outliers. `error`: so that the next weight to go would add the same relative error
            in every layer. The last two need one more pass of the windows through the dense model.
        allocation_spread: By how much a layer's sparsity may lie below or above the common one, as a fraction of that.

    Raises:
        ValueError: A setting is out of range; the message names it.
    """

    mu: float = 0.1
    iterations: int = 50
    refine_iterations: int = 30
    step_scale: float = 0.95
    precision: Precision = "auto"
    tolerance: float = 0.0
    memory_budget: int | None = None
    keep_zeros: bool = False
    candidates: Candidates = "gradient"
    sublayers: bool = False
    dense_targets: float = 0.0
    reconstruction_epochs: int = 0
    reconstruction_rate: float = 0.01
    rescaling_epochs: int = 0
    allocation: Allocation = "uniform"
    allocation_spread: float = 0.125

    def __post_init__(self) -> None:
        if not 0 <= self.mu < float("inf"):
            raise ValueError(f"mu must be a finite number, at least 0, but found {self.mu!r}")
        for name, choices in (("candidates", Candidates), ("allocation", Allocation), ("precision", Precision)):
            if (found := getattr(self, name)) not in get_args(choices):
                raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, but found {found!r}")
        for name in ("iterations", "refine_iterations", "reconstruction_epochs", "rescaling_epochs"):
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
        if not 0 <= self.dense_targets <= 1:
            raise ValueError(f"dense_targets must lie between 0 and 1, but found {self.dense_targets!r}")
        for name in ("reconstruction_rate", "allocation_spread"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be a fraction, above 0 and below 1, but found {getattr(self, name)!r}")
        self._check_together()

    def _check_together(self) -> None:
        if self.dense_targets and not self.sublayers:
            raise ValueError(
                f"dense_targets = {self.dense_targets} needs sublayers = True: a layer can only make up for the error "
                f"of pruned layers whose outputs it sees"
            )
        if self.candidates == "preconditioned" and self.memory_budget is not None:
            raise ValueError(
                "memory_budget is for candidates = 'gradient', whose iteration can be done in slices of rows; "
                "'preconditioned' needs the whole layer: leave the budget out, or take the preset 'paper'"
            )

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype of weights and sums; float32 for all of `precision` but `float64`."""
        return torch.float64 if self.precision == "float64" else torch.float32

    @property
    def has_dense_stream(self) -> bool:
        """Whether the dense model's hidden states are kept beside the pruned model's."""
        return self.dense_targets > 0 or self.trains

    @property
    def trains(self) -> bool:
        """Whether anything is trained on the calibration windows once supports are found."""
        return self.reconstruction_epochs > 0 or self.rescaling_epochs > 0

    def windows_per_pass(self, asked: int) -> int:
        """Windows per calibration forward pass, of which so many are asked for: a step of training takes one."""
        return 1 if self.trains else asked

    @property
    def measures_dense(self) -> bool:
        """Whether the dense model goes first alone, so that zeros are shared out by what its layers see and return."""
        return self.allocation in ("owl", "error")

    def on(self, device: torch.device | str) -> "MAIHTConfig":
        """The same with what `auto` is on a device.

        Raises:
            ValueError: The device cannot compute in this precision.
        """
        return replace(self, precision=resolve_precision(self.precision, device))

    def identity(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """What decides the result on a device, ready for JSON.

        A memory budget is left out, since it changes nothing but rounding: a run that ran out of memory may resume
        with a smaller one. Settings that older versions did not have are left out where they are off.
        """
        off = {field.name: field.default for field in fields(self)}
        found = asdict(replace(self.on(device), memory_budget=None))
        return {name: value for name, value in found.items() if name not in _NEWER or value != off[name]}


# Settings that journals of earlier versions do not have.
_NEWER = {
    "candidates",
    "sublayers",
    "dense_targets",
    "reconstruction_epochs",
    "reconstruction_rate",
    "rescaling_epochs",
    "allocation",
    "allocation_spread",
}

PRESETS = {
    "paper": MAIHTConfig(),
    "fast": MAIHTConfig(candidates="preconditioned", iterations=24, refine_iterations=12),
    "accurate": MAIHTConfig(candidates="preconditioned", mu=0.001, iterations=60, refine_iterations=30),
    # `fast`, with what the pruned layers before and one pass of training over a block make good.
    "balanced": MAIHTConfig(
        candidates="preconditioned",
        iterations=24,
        refine_iterations=12,
        sublayers=True,
        dense_targets=0.5,
        reconstruction_epochs=1,
    ),
    "best": MAIHTConfig(
        candidates="preconditioned",
        iterations=50,
        refine_iterations=25,
        sublayers=True,
        dense_targets=0.5,
        reconstruction_epochs=4,
        rescaling_epochs=1,
    ),
}


def resolve_config(config: MAIHTConfig | str | None, method: str = "maiht") -> MAIHTConfig:
    """Return settings as they are, those of a preset by its name, and for None `balanced`.

    After a preset's name may stand what is to differ from it, as in `balanced,reconstruction_epochs=2`. Other methods
    than `maiht` are by default as they were published, without what is done for a whole model.

    Raises:
        ValueError: No preset, or no setting, has this name, or a setting is out of range.
        TypeError: It is neither settings nor text.
    """
    if config is None:
        return PRESETS["balanced" if method == "maiht" else "paper"]
    if isinstance(config, str):
        name, *changes = (part.strip() for part in config.split(","))
        if name not in PRESETS:
            asked = did_you_mean(name, PRESETS)
            raise ValueError(
                f"config must be a preset ({', '.join(PRESETS)}) or a MAIHTConfig, but found {config!r}{asked}"
            )
        return replace(PRESETS[name], **dict(_change(text) for text in changes))
    if not isinstance(config, MAIHTConfig):
        raise TypeError(f"config must be a MAIHTConfig or a preset's name, but found {type(config).__name__}")
    return config


def _change(text: str) -> tuple[str, Any]:
    """Name and value of a setting such as `reconstruction_epochs=1`."""
    name, equals, value = (part.strip() for part in text.partition("="))
    known = [field.name for field in fields(MAIHTConfig)]
    if not equals or name not in known:
        raise ValueError(
            f"after a preset's name, config has settings such as reconstruction_epochs=1, but found {text!r}"
            f"{did_you_mean(name, known)}"
        )
    default = getattr(MAIHTConfig, name)
    if isinstance(default, str):
        return name, value
    try:
        return name, literal_eval(value.capitalize() if value in ("true", "false", "none") else value)
    except (ValueError, SyntaxError):
        raise ValueError(f"{name} must be a value such as {default!r}, but found {value!r}") from None
