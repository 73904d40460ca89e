"""Decoder blocks, their inputs, and the Gram matrices of their linear layers."""

from .blocks import (
    LINEAR_TYPES,
    DecoderBlocks,
    find_adapters,
    find_blocks,
    find_linears,
    refuse_adapters,
    weight_of,
    write_weight,
)
from .grams import InputGroup, accumulate_grams, advance
from .replay import Batch, evaluation_mode, record_inputs

__all__ = [
    "LINEAR_TYPES",
    "Batch",
    "DecoderBlocks",
    "InputGroup",
    "accumulate_grams",
    "advance",
    "evaluation_mode",
    "find_adapters",
    "find_blocks",
    "find_linears",
    "record_inputs",
    "refuse_adapters",
    "weight_of",
    "write_weight",
]
