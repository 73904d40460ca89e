"""What a prediction needs to know of a model: sizes, without weights."""

import copy
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models.blocks import find_blocks, find_linears, weight_of
from ..models.loading import NO_CODE, check_source
from .known_models import known_config
from .probe import Counts, count_block, reset_twin, width_of


@dataclass(frozen=True)
class LayerShape:
    """A linear layer.

    Args:
        name: Its name in the block.
        inputs: Columns of the weight.
        outputs: Rows of the weight.
        group: Number of its input in the block: layers with the same number share a Gram matrix.
        needless_after: Number of the input from which on its module can begin without it, once that input is known;
            None for the last layer of a module, and for layers in none that can.
    """

    name: str
    inputs: int
    outputs: int
    group: int
    needless_after: int | None = None

    @property
    def weights(self) -> int:
        """Entries of the weight."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only language model of equal blocks.

    Args:
        name: Where it comes from.
        parameters: All parameters, tied ones once.
        blocks: Number of decoder blocks.
        block_parameters: Parameters of a block.
        layers: The linear layers of a block, in the order in which they run.
        hidden: Width of the hidden states.
        vocabulary: Rows of the output head.
        attention_width: Heads times the sizes of a query and of a value: for L tokens that attend to L tokens the
            two products of attention cost 2 · L² times this.
        block32, block16: What one block does for a token, with weights of 4 and of 2 bytes.
        head32, head16: The same of all that is outside the blocks: embeddings, norm, head and loss.
    """

    name: str
    parameters: int
    blocks: int
    block_parameters: int
    layers: tuple[LayerShape, ...]
    hidden: int
    vocabulary: int
    attention_width: int
    block32: Counts
    block16: Counts
    head32: Counts
    head16: Counts

    @property
    def groups(self) -> tuple[tuple[LayerShape, ...], ...]:
        """The block's layers by their common input."""
        return tuple(tuple(members) for _, members in groupby(self.layers, key=lambda layer: layer.group))

    @property
    def grams(self) -> tuple[int, ...]:
        """The widths of a block's distinct inputs."""
        return tuple(group[0].inputs for group in self.groups)

    @property
    def entries(self) -> tuple[int, ...]:
        """The numbers of the inputs at which modules of a block can begin."""
        return tuple(sorted({la.needless_after for la in self.layers if la.needless_after is not None}))

    @property
    def prunable(self) -> int:
        """Weights of all layers that are pruned."""
        return self.blocks * sum(layer.weights for layer in self.layers)

    @property
    def outside(self) -> int:
        """Parameters outside the blocks: embeddings, last norm, head."""
        return self.parameters - self.blocks * self.block_parameters

    def block_counts(self, itemsize: int) -> Counts:
        """Give what a block does for a token with weights of so many bytes."""
        return self.block32 if itemsize >= 4 else self.block16

    def head_counts(self, itemsize: int) -> Counts:
        """Give what embeddings, head and loss do for a token with weights of so many bytes."""
        return self.head32 if itemsize >= 4 else self.head16

    @classmethod
    def of(cls, model: nn.Module, name: str = "") -> "ModelShape":
        """Find the shape of a Hugging Face causal language model, wherever its parameters are; none is read.

        Raises:
            ValueError: It has no decoder blocks of equal sizes, or cannot be built from its config.
        """
        found = find_blocks(model)
        sizes = [[tuple(weight_of(linear).shape) for linear in find_linears(b).values()] for b in found.modules]
        if any(size != sizes[0] for size in sizes):
            raise ValueError(f"the decoder blocks at {found.path} must be of equal sizes, but found different ones")
        config, kind = getattr(model, "config", None), type(model)
        if config is None:
            raise ValueError(f"the model must have a Hugging Face config, but found {kind.__name__} without one")

        def twin(blocks: int, dtype: torch.dtype) -> nn.Module:
            return reset_twin(kind, copy.deepcopy(config), blocks, dtype)

        counts = {dtype: count_block(twin, dtype) for dtype in (torch.float32, torch.bfloat16)}
        (block32, head32, structure), (block16, head16, _) = counts[torch.float32], counts[torch.bfloat16]
        block = found.modules[0]
        linears = find_linears(block)
        # A layer that does not run in a plain forward pass, such as an expert, has no input that could be told.
        missing = [layer for layer in linears if layer not in structure.group_of]
        if missing:
            raise ValueError(
                "each linear layer of a block must run, so that its input is known, but found that "
                f"{', '.join(missing)} did not run"
            )
        after = {
            layer: structure.group_of[entry.layer]
            for entry in structure.entries
            for layer in linears
            if layer.startswith(f"{entry.module}.") and layer != entry.layer
        }
        layers = tuple(
            LayerShape(layer, weight.shape[1], weight.shape[0], group, after.get(layer))
            for layer, group in structure.group_of.items()
            for weight in [weight_of(linears[layer])]
        )
        return cls(
            name=name or kind.__name__,
            parameters=_count(model),
            blocks=len(found.modules),
            block_parameters=_count(block),
            layers=layers,
            hidden=width_of(model),
            vocabulary=structure.vocabulary,
            attention_width=structure.attention_width,
            block32=block32,
            block16=block16,
            head32=head32,
            head16=head16,
        )

    @classmethod
    def from_source(cls, name_or_path: str) -> "ModelShape":
        """Find the shape of a hub name, folder, `.gguf` file or `config.json`.

        Of well-known models (`KNOWN_MODELS`) nothing is fetched, and of others on the hub the config alone.

        Raises:
            FileNotFoundError, OSError: As `load_model`.
            ValueError: As `of`.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        check_source(name_or_path)
        path = Path(name_or_path).expanduser()
        known = None if path.exists() else known_config(name_or_path)
        if known is not None:
            config: Any = known
        elif path.suffix == ".gguf":
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        else:
            config = AutoConfig.from_pretrained(path if path.exists() else name_or_path, **NO_CODE)
        with suppress(AttributeError):
            # Weights in files may be quantised; those of a run are not.
            del config.quantization_config
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, **NO_CODE)
        return cls.of(model, name_or_path)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
