"""Pure tensor functions that prune one linear layer from its weight and the Gram matrix of its inputs."""

from .config import MAIHTConfig, resolve_config
from .layer import LayerResult, LayerSolver, prune_layer
from .methods import METHODS, check_method
from .patterns import Pattern, parse_pattern
from .spec import PruningSpec

__all__ = [
    "METHODS",
    "LayerResult",
    "LayerSolver",
    "MAIHTConfig",
    "Pattern",
    "PruningSpec",
    "check_method",
    "parse_pattern",
    "prune_layer",
    "resolve_config",
]
