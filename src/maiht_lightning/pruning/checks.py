"""What a model and windows must be like to be pruned with, looked at before anything is computed."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from ..data.batches import Windows
from ..models.blocks import DecoderBlocks, find_blocks, refuse_adapters, weight_of
from ..models.offload import full_tensor, full_weight
from ..solvers import PruningSpec
from ..validation import check_fits

# Formats of weights that can be pruned; others that float, of 8 bits, are those of quantised models.
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_weights(model: nn.Module, blocks: DecoderBlocks, spec: PruningSpec, *, on_disk_allowed: bool) -> None:
    """Raise `TypeError` or `ValueError` unless every layer's weight can be pruned; the message names the layer."""
    refuse_adapters(model)
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for path, linear in blocks.linears():
        weight = weight_of(linear)
        if owners[id(linear.weight)] > 1:
            raise ValueError(f"{path} shares its weight with another module, which would be pruned with it: untie them")
        # torchao's quantised weights are tensors of a class of their own, of a dtype that they do not have.
        kind = type(linear.weight.data)
        if weight.dtype not in DTYPES or kind not in (Tensor, DTensor):
            found = weight.dtype if kind in (Tensor, DTensor) else kind.__name__
            raise TypeError(
                f"{path} has weights of {found}: load the model in a floating-point dtype, such as torch.bfloat16, not "
                f"quantised"
            )
        spec.check_shape(weight.shape, path)
        if spec.config.rescaling_epochs and (weight.is_meta or isinstance(weight, DTensor)):
            where = "on disk" if weight.is_meta else "in shards"
            raise ValueError(
                f"{path} is {where}, and to learn factors through the whole model would bring all of it from there "
                f"twice for each window: rescaling_epochs = 0 leaves them out, as in config = 'best,rescaling_epochs=0'"
            )
        if weight.is_meta:
            if not on_disk_allowed:
                raise ValueError(f"{path} is on disk, as its pruned weights must be: give journal_dir")
            if isinstance(linear, Conv1D):
                raise ValueError(f"{path} is a Conv1D on disk, which is not supported: load the model into memory")
        if weight.is_meta or isinstance(weight, DTensor):
            weight = full_tensor(linear, "weight")
        _check_finite(path, weight)
    # Embedding, norms, biases and head run in the calibration, and a NaN in one of them is in every Gram matrix.
    pruned = {id(linear.weight) for _, linear in blocks.linears()}
    for path, parameter in model.named_parameters():
        if id(parameter) not in pruned and parameter.is_floating_point() and not parameter.is_meta:
            _check_finite(path, parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach())


def _check_finite(name: str, weight: Tensor) -> None:
    # NaN propagates through the extremes, which need no temporaries.
    if weight.numel() and not all(extreme.isfinite() for extreme in weight.aminmax()):
        raise ValueError(f"{name} has weights that are NaN or infinite: did training diverge?")


def check_windows(windows: Tensor | Windows, model: nn.Module) -> None:
    """Raise `TypeError` or `ValueError` unless `windows` are whole token ids that suit the model."""
    found = Windows.parse(windows)
    for group in found.groups:
        _check_group(group, model, is_masked=found.is_masked)


def _check_group(windows: Tensor, model: nn.Module, *, is_masked: bool) -> None:
    """Check windows (samples, seqlen) of one length."""
    if not isinstance(windows, Tensor) or windows.dtype != torch.long:
        found = windows.dtype if isinstance(windows, Tensor) else type(windows).__name__
        raise TypeError(f"windows must be a LongTensor of token ids (samples, seqlen), but found {found}")
    if windows.ndim != 2 or windows.numel() == 0:
        raise ValueError(
            f"windows must have shape (samples, seqlen), both at least 1, but found {tuple(windows.shape)}"
        )
    check_fits("windows", windows, model)
    if is_masked:
        return
    if padded := _count_padded(windows, getattr(model, "config", None)):
        raise ValueError(
            f"windows must be whole, since there is no attention mask and padding would count in the Gram matrices, "
            f"but {padded} of {len(windows)} begin or end with padding tokens: give batches with attention_mask, cut "
            f"them from longer text, or join short texts end to end"
        )


def _count_padded(windows: Tensor, config: Any) -> int:
    """How many windows (samples, seqlen) look padded: they begin or end with a run of the padding token."""
    ends = getattr(config, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends]
    # Tokenizers without a padding token are commonly told to pad with the end-of-text token.
    padding = getattr(config, "pad_token_id", None)
    padding = next(iter(ends), None) if padding is None else padding
    # One end-of-text token at a window's edge is where a document of packed text ends. Two are, if documents begin
    # with the same token. A longer run is no text: of padded windows, nearly all but the longest have one.
    shortest = 3 if padding in ends and padding == getattr(config, "bos_token_id", None) else 2
    if padding is None or windows.shape[1] < shortest:
        return 0
    is_padding = windows == padding
    return int((is_padding[:, :shortest].all(1) | is_padding[:, -shortest:].all(1)).sum())


def has_zeros(model: nn.Module, spec: PruningSpec) -> bool:
    """Whether the linear layers in the decoder blocks have the zeros asked for: each its own, or all together."""
    weights = (full_weight(linear) for _, linear in find_blocks(model).linears())
    if spec.config.allocation == "uniform":
        return all(spec.pattern.holds_for(weight) for weight in weights)
    missing = 0
    for weight in weights:
        units = spec.pattern.units(weight)
        missing += len(units) * (units.shape[1] - spec.pattern.kept(weight.shape)) - int((weight == 0).sum())
    return missing <= 0
