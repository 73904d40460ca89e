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
from .hidden import Place, check_place, choose_place, keeping
from .replay import Batch, evaluation_mode, record_inputs, run_tail
from .residence import Workplace, is_elsewhere, skeleton, whole_tensor

__all__ = [
    "LINEAR_TYPES",
    "Batch",
    "DecoderBlocks",
    "InputGroup",
    "Place",
    "Workplace",
    "accumulate_grams",
    "advance",
    "check_place",
    "choose_place",
    "evaluation_mode",
    "find_adapters",
    "find_blocks",
    "find_linears",
    "is_elsewhere",
    "keeping",
    "record_inputs",
    "refuse_adapters",
    "run_tail",
    "skeleton",
    "weight_of",
    "whole_tensor",
    "write_weight",
]
