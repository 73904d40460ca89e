"""Pure tensor functions that prune one linear layer from its weight and the Gram matrix of its inputs."""

from .config import MAIHTConfig, resolve_config
from .layer import METHODS, LayerResult, LayerSolver, check_method, prune_layer
from .patterns import Pattern, parse_pattern

__all__ = [
    "METHODS",
    "LayerResult",
    "LayerSolver",
    "MAIHTConfig",
    "Pattern",
    "check_method",
    "parse_pattern",
    "prune_layer",
    "resolve_config",
]
