"""Fine-tune, prune, recover: one-shot pruning of language models with mAIHT in PyTorch Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Where each public name lives. They are imported on first use, so that somebody who only wants
# `prune_layer` does not wait for Lightning and transformers to load.
_HOME = {
    "C4Calibration": "data.c4",
    "CausalLMModule": "module",
    "Distillation": "callbacks.distillation",
    "FrozenSparsity": "callbacks.frozen",
    "LayerResult": "solvers",
    "MAIHTConfig": "solvers",
    "MAIHTPruning": "callbacks.pruning",
    "Perplexity": "evaluation.perplexity",
    "PruningReport": "block_pruner",
    "SparseFinetune": "recovery",
    "WikiText2DataModule": "data.wikitext2",
    "freeze": "frozen",
    "load_compact": "export",
    "prune": "pruner",
    "prune_layer": "solvers",
    "save_compact": "export",
    "sparse_finetune": "recovery",
}
__all__ = list(_HOME)

if TYPE_CHECKING:
    from .block_pruner import PruningReport as PruningReport
    from .callbacks.distillation import Distillation as Distillation
    from .callbacks.frozen import FrozenSparsity as FrozenSparsity
    from .callbacks.pruning import MAIHTPruning as MAIHTPruning
    from .data.c4 import C4Calibration as C4Calibration
    from .data.wikitext2 import WikiText2DataModule as WikiText2DataModule
    from .evaluation.perplexity import Perplexity as Perplexity
    from .export import load_compact as load_compact
    from .export import save_compact as save_compact
    from .frozen import freeze as freeze
    from .module import CausalLMModule as CausalLMModule
    from .pruner import prune as prune
    from .recovery import SparseFinetune as SparseFinetune
    from .recovery import sparse_finetune as sparse_finetune
    from .solvers import LayerResult as LayerResult
    from .solvers import MAIHTConfig as MAIHTConfig
    from .solvers import prune_layer as prune_layer


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
