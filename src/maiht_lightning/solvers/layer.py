"""`prune_layer`: every method behind one function."""

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .config import MAIHTConfig
from .correction import Correction
from .methods import IN_SLICES, METHODS
from .patterns import DEFAULT_SPARSITY, Pattern
from .precision import Multiplier, error_form, float32_products
from .problem import relative_error, scale_gram
from .slices import rows_within, solver_bytes
from .spec import PruningSpec
from .threads import threads_for


@dataclass
class LayerResult:
    """A pruned linear layer.

    Args:
        weight: (out, in), dtype and device of the weight given; exactly 0 outside the mask.
        mask: Boolean (out, in), True where a weight is kept.
        relative_error: ‖X(W − W0)ᵀ‖² / ‖X W0ᵀ‖² of `weight`, after rounding to its dtype. Where it was fitted to other
            outputs than X W0ᵀ, W0 is here the dense weight that comes nearest to them.
        objective: f(S) = ½ tr((S − B) A (S − B)ᵀ) after each iteration: `iterations` values while the support
            shrinks, then one as the exact support is taken and one for each refining step; fewer where the
            solver was allowed to stop early. With preconditioned candidates, of the support that they found, after
            each monitored iteration from there, and after each conjugate gradient step: it never rises. Empty for
            methods that do not iterate.
        accelerated: For each iteration, the fraction of independent problems (one per layer; with pattern `row`
            one per row) in which the monitor took the accelerated candidate. Empty without a monitor.
        seconds: Wall-clock time of the solver.
    """

    weight: Tensor
    mask: Tensor
    relative_error: float
    objective: list[float]
    accelerated: list[float]
    seconds: float


def prune_layer(
    weight: Tensor,
    gram: Tensor,
    *,
    sparsity: float = DEFAULT_SPARSITY,
    pattern: str = "unstructured",
    method: str = "maiht",
    config: MAIHTConfig | str | None = None,
) -> LayerResult:
    """Prune one linear layer so that its outputs on the calibration inputs change little.

    Args:
        weight: W0 (out, in), the layout of `nn.Linear.weight`; any floating dtype, any device.
        gram: The Gram matrix G = XᵀX (in, in) of the layer's inputs X (tokens, in), which SparseGPT and GPTQ call the
            Hessian; not averaged, any floating dtype, on the weight's device.
        sparsity: Fraction of zeros, in [0, 1): exactly floor(sparsity · numel) zeros per layer for `unstructured`,
            floor(sparsity · in) per row for `row`. An `N:M` pattern fixes it, so that it may be left out.
        pattern: `unstructured` (weights compete within a layer), `row` (within an output row), or `N:M` (N kept of
            every M consecutive inputs).
        method: `maiht`, `aiht`, `iht`, `sparsegpt`, `admm`, `wanda` or `magnitude`.
        config: A preset's name, `paper`, `fast`, `accurate`, `balanced` or `best`, perhaps with changes, as in
            `balanced,reconstruction_epochs=2`, or settings one by one, with those left out as in `paper`. By default
            `balanced`, and for other methods than `maiht` as they were published.

    Returns:
        The pruned weight, its mask, error and the objective's course. `weight` and `gram` stay as they are.

    Raises:
        TypeError: A tensor is not a floating-point tensor.
        ValueError: Wrong shapes, different devices, non-finite entries, a setting out of range; the message names the
            argument.
        FloatingPointError: The method cannot factorise the Gram matrix, or the result is not finite.

    Source:
        Wen, Zuo, Pan, ICML 2025 (PMLR 267:66575-66596), Algorithm 1.

    Example:
        >>> import torch
        >>> inputs = torch.randn(256, 32, generator=torch.Generator().manual_seed(0))
        >>> weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
        >>> result = prune_layer(weight, inputs.T @ inputs, sparsity=0.5)
        >>> int((result.weight == 0).sum())
        256
    """
    return LayerSolver(gram, PruningSpec.parse(sparsity, pattern, method, config)).prune(weight)


class LayerSolver:
    """Prunes layers that see the same inputs, such as q, k and v: what only the Gram matrix decides is computed once.

    Args:
        gram: G = XᵀX (in, in), as for `prune_layer`, which prunes one layer.
        spec: How the layers are pruned.
        drift: Xᵀ(X_d − X) (in, in), floating dtype, with the dense model's inputs X_d: outputs are fitted to
            (X + c (X_d − X)) W0ᵀ then, with c the config's `dense_targets`.
        on_host: Solve in host memory, where `gram` is, wherever the weights are.

    Raises:
        TypeError, ValueError: As for `prune_layer`, in what concerns the Gram matrix.
        FloatingPointError: The method cannot factorise the Gram matrix.
    """

    @torch.no_grad()
    def __init__(self, gram: Tensor, spec: PruningSpec, drift: Tensor | None = None, *, on_host: bool = False) -> None:
        self.on_host = on_host
        _check_finite("gram", gram)
        if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or gram.numel() == 0:
            raise ValueError(f"gram must have shape (in, in), at least (1, 1), but found {tuple(gram.shape)}")
        self.spec = spec = spec.on(gram.device)
        # Seconds spent on the Gram matrix (in, in), which the first layer's result takes over.
        self._seconds = -time.perf_counter()
        with self._products(gram):
            self.gram = scale_gram(gram, spec.config.dtype)
            self.prepared = METHODS[spec.method].prepare(self.gram, spec.config)
            self.correction = None if drift is None else Correction.prepare(self.gram, drift, spec.config)
        self._seconds += time.perf_counter()

    @torch.no_grad()
    def prune(self, weight: Tensor, pattern: Pattern | None = None) -> LayerResult:
        """Prune one layer, with a pattern of its own or that of all; the rest as for `prune_layer`.

        The first result's `seconds` holds the time spent on the Gram matrix, too.
        """
        start, given = time.perf_counter(), weight
        if self.on_host:
            weight = weight.cpu()
        self._check(weight)
        with self._products(weight):
            method, config = METHODS[self.spec.method], self.spec.config
            dense = weight if self.correction is None else self.correction.apply(weight)
            if config.keep_zeros and dense is not weight:
                dense = torch.where(weight == 0, 0, dense)
            solution = method.solve(dense, self.gram, self.prepared, pattern or self.spec.pattern, config)
            pruned = solution.weight.to(weight.dtype)
            if not all(extreme.isfinite() for extreme in pruned.aminmax()):
                raise FloatingPointError(
                    f"{self.spec.method} left weights that are not finite in {weight.dtype}; solve in precision "
                    f"'float64' or look at the layer's inputs"
                )
            with float32_products(tf32=False):
                error = relative_error(dense, pruned, self.gram, error_form(config.precision, weight.device))
        seconds, self._seconds = self._seconds + time.perf_counter() - start, 0.0
        pruned, mask = pruned.to(given.device), solution.mask.to(given.device)
        return LayerResult(pruned, mask, error, solution.objective, solution.accelerated, seconds)

    def with_less_memory(self, weight: Tensor) -> "tuple[LayerSolver, str] | None":
        """A solver with the same answer, but for rounding, that takes less memory for a weight (out, in), and how.

        In slices of half as many rows where the method's iteration can be done so; else, from a GPU, in host memory.
        None where there is no such way.
        """
        config = self.spec.config
        other = copy.copy(self)
        # Methods without an iteration in slices have no use for a budget.
        if self.spec.method in IN_SLICES and config.candidates == "gradient":
            rows = rows_within(config.memory_budget, weight.shape, config.dtype) // 2
            if rows:
                budget = solver_bytes((rows, weight.shape[1]), config.dtype)
                other.spec = replace(self.spec, config=replace(config, memory_budget=budget))
                return other, f"in slices of {rows} rows"
        elif self.gram.norms.device.type != "cpu":
            other.gram, other.prepared, other.correction = moved((self.gram, self.prepared, self.correction), "cpu")
            other.on_host = True
            return other, "in host memory"
        return None

    @contextmanager
    def _products(self, tensor: Tensor) -> Iterator[None]:
        # Under a training run's autocast, the solver's products would be computed in half precision.
        with (
            torch.autocast(tensor.device.type, enabled=False),
            float32_products(tf32=self.spec.config.precision == "tf32"),
            threads_for(tensor),
        ):
            yield

    def _check(self, weight: Tensor) -> None:
        if isinstance(weight, Tensor) and (weight.ndim != 2 or weight.numel() == 0):
            raise ValueError(f"weight must have shape (out, in), both at least 1, but found {tuple(weight.shape)}")
        norms = self.gram.norms
        if isinstance(weight, Tensor) and weight.device != norms.device:
            raise ValueError(
                f"weight and gram must be on one device, but found weight on {weight.device} and gram on "
                f"{norms.device}: move one of them"
            )
        _check_finite("weight", weight)
        if len(norms) != weight.shape[1]:
            inputs = weight.shape[1]
            raise ValueError(
                f"gram must have shape (in, in) = ({inputs}, {inputs}) for a weight of shape {tuple(weight.shape)}, "
                f"but found ({len(norms)}, {len(norms)})"
            )
        self.spec.pattern.check_shape(weight.shape)


def moved(value: Any, device: str) -> Any:
    """What a solver has computed from a Gram matrix, with its tensors on another device."""
    if isinstance(value, Tensor | Multiplier):
        return value.to(device)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: moved(getattr(value, field.name), device) for field in fields(value)})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(each, device) for each in value))
    if isinstance(value, list | tuple):
        return type(value)(moved(each, device) for each in value)
    return value


def _check_finite(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a floating-point tensor, but found {kind}")
    # NaN propagates through the extremes: they are found in one pass, without temporaries.
    if tensor.numel() and not all(extreme.isfinite() for extreme in tensor.aminmax()):
        bad = int((~tensor.isfinite()).sum())
        raise ValueError(f"{name} must be finite, but found {bad} entries that are NaN or infinite")
