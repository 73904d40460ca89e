"""`PruningSpec`: how layers are pruned, as one value."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from .config import MAIHTConfig, resolve_config
from .methods import check_method
from .patterns import DEFAULT_SPARSITY, Pattern, parse_pattern
from .slices import rows_within


@dataclass(frozen=True)
class PruningSpec:
    """How layers are pruned. It is parsed where a user's settings come in, and carried whole from there on.

    Args:
        method: A name in `METHODS`.
        pattern: Which entries compete, and the fraction of zeros.
        config: Settings of the solver.
    """

    method: str
    pattern: Pattern
    config: MAIHTConfig

    @classmethod
    def parse(
        cls,
        sparsity: float = DEFAULT_SPARSITY,
        pattern: str = "unstructured",
        method: str = "maiht",
        config: MAIHTConfig | str | None = None,
    ) -> "PruningSpec":
        """Read and check settings as users write them; see `prune_layer`.

        Raises:
            ValueError, TypeError: A setting is out of range or unknown; the message names it.
        """
        config = resolve_config(config, check_method(method))
        if config.candidates == "preconditioned" and method in ("aiht", "iht"):
            raise ValueError(f"candidates = 'preconditioned' is for method 'maiht', but found method {method!r}")
        parsed = parse_pattern(pattern, sparsity)
        if parsed.group:
            # The pattern fixes the sparsity of every layer.
            config = replace(config, allocation="uniform")
        return cls(method, parsed, config)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return self.pattern.sparsity

    def check_shape(self, shape: torch.Size | tuple[int, ...], layer: str) -> None:
        """Raise `ValueError` unless a weight of shape (out, in) can be pruned so; `layer` names it in the message."""
        self.pattern.check_shape(shape, layer)
        try:
            rows_within(self.config.memory_budget, shape, self.config.dtype)
        except ValueError as error:
            raise ValueError(f"{layer}: {error}") from error

    def at(self, sparsity: float) -> "PruningSpec":
        """The same with another fraction of zeros.

        Raises:
            ValueError: The fraction is out of range, or not the one that an N:M pattern implies.
        """
        return replace(self, pattern=parse_pattern(self.pattern.name, sparsity))

    def keeping_zeros(self) -> "PruningSpec":
        """The same, with weights that are zero already staying zero."""
        return replace(self, config=replace(self.config, keep_zeros=True))

    def on(self, device: torch.device | str) -> "PruningSpec":
        """The same with what the precision `auto` is on a device.

        Raises:
            ValueError: The device cannot compute in this precision.
        """
        return replace(self, config=self.config.on(device))

    def identity(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """What decides the result on a device, ready for JSON: two prunings of one model that share it are alike."""
        return {
            "method": self.method,
            "pattern": self.pattern.name,
            "sparsity": self.sparsity,
            "config": self.config.identity(device),
        }
