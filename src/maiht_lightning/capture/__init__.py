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
from .residence import (
    Workplace,
    brought_by_accelerate,
    computing_device,
    hidden_bytes,
    is_elsewhere,
    skeleton,
    whole_tensor,
    whole_weight,
)

__all__ = [
    "LINEAR_TYPES",
    "Batch",
    "DecoderBlocks",
    "InputGroup",
    "Place",
    "Workplace",
    "accumulate_grams",
    "advance",
    "brought_by_accelerate",
    "check_place",
    "choose_place",
    "computing_device",
    "evaluation_mode",
    "find_adapters",
    "find_blocks",
    "find_linears",
    "hidden_bytes",
    "is_elsewhere",
    "keeping",
    "record_inputs",
    "refuse_adapters",
    "run_tail",
    "skeleton",
    "weight_of",
    "whole_tensor",
    "whole_weight",
    "write_weight",
]
