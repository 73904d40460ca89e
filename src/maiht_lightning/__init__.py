"""Fine-tune, prune, recover: one-shot pruning of language models with mAIHT in PyTorch Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Where each public name lives. They are imported on first use, so that somebody who only wants
# `prune_layer` does not wait for Lightning and transformers to load.
_HOME = {
    "C4Calibration": "data.c4",
    "CausalLMModule": "training.module",
    "CompactFileError": "models.compact_index",
    "Distillation": "callbacks.distillation",
    "Evaluation": "evaluation.evaluation",
    "FrozenSparsity": "callbacks.frozen",
    "LayerResult": "solvers",
    "MAIHTConfig": "solvers",
    "MAIHTPruning": "callbacks.pruning",
    "Perplexity": "evaluation.perplexity",
    "PruningReport": "records",
    "SparseFinetune": "training.sparse_finetune",
    "WikiText2DataModule": "data.wikitext2",
    "count_zeros": "models.sparsity",
    "freeze": "recovery.freeze",
    "load_compact": "models.compact",
    "load_model": "models.loading",
    "load_tokenizer": "models.loading",
    "prune": "pruning.pruner",
    "prune_layer": "solvers",
    "save_compact": "models.compact",
    "sparse_finetune": "training.sparse_finetune",
}
__all__ = list(_HOME)

if TYPE_CHECKING:
    from .callbacks.distillation import Distillation as Distillation
    from .callbacks.frozen import FrozenSparsity as FrozenSparsity
    from .callbacks.pruning import MAIHTPruning as MAIHTPruning
    from .data.c4 import C4Calibration as C4Calibration
    from .data.wikitext2 import WikiText2DataModule as WikiText2DataModule
    from .evaluation.evaluation import Evaluation as Evaluation
    from .evaluation.perplexity import Perplexity as Perplexity
    from .models.compact import load_compact as load_compact
    from .models.compact import save_compact as save_compact
    from .models.compact_index import CompactFileError as CompactFileError
    from .models.loading import load_model as load_model
    from .models.loading import load_tokenizer as load_tokenizer
    from .models.sparsity import count_zeros as count_zeros
    from .pruning.pruner import prune as prune
    from .records import PruningReport as PruningReport
    from .recovery.freeze import freeze as freeze
    from .solvers import LayerResult as LayerResult
    from .solvers import MAIHTConfig as MAIHTConfig
    from .solvers import prune_layer as prune_layer
    from .training.module import CausalLMModule as CausalLMModule
    from .training.sparse_finetune import SparseFinetune as SparseFinetune
    from .training.sparse_finetune import sparse_finetune as sparse_finetune


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
