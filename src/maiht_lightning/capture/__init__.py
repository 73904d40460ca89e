"""Decoder blocks, their inputs, and the Gram matrices of their linear layers."""

from .blocks import DecoderBlocks, find_blocks, find_linears, weight_of, write_weight
from .grams import InputGroup, accumulate_grams, advance
from .replay import Batch, evaluation_mode, record_inputs

__all__ = [
    "Batch",
    "DecoderBlocks",
    "InputGroup",
    "accumulate_grams",
    "advance",
    "evaluation_mode",
    "find_blocks",
    "find_linears",
    "record_inputs",
    "weight_of",
    "write_weight",
]
