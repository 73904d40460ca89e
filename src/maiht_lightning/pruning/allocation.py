"""Allocation: how many zeros each layer gets, at the same total.

Layers do not suffer alike from the same sparsity. Every allocation moves a layer's sparsity away from the common one by
at most a given spread, and all of them end with exactly the zeros that a uniform one has.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.block_inputs import BlockInputs
from ..capture.norms import LayerNorms, pass_and_measure
from ..distributed import Ranks
from ..models.blocks import find_linears, weight_of
from ..models.offload import BlockLoader, full_weight
from ..solvers import PruningSpec
from ..solvers.patterns import Pattern, zeros_of

# OWL's outliers: entries of |W| ‖x‖ that are so many times larger than their mean in a block.
OUTLIER = 5.0
# Scores are counted by their logarithm, in bins of 0.02.
_LOWEST, _HIGHEST, _BINS = -80.0, 8.0, 4400


@dataclass(frozen=True)
class LayerSize:
    """A layer as an allocation sees it.

    Args:
        path: Dotted path in the model.
        block: Index of its block.
        units: Entries that get one more zero together: 1 for `unstructured`, the number of rows for `row`.
        size: Entries of one unit, of which some become zero.
        least: Zeros of a unit that are there already and stay.
    """

    path: str
    block: int
    units: int
    size: int
    least: int = 0

    @property
    def entries(self) -> int:
        """Weights of the layer."""
        return self.units * self.size


def allocate(
    loader: BlockLoader, sizes: Sequence[LayerSize], inputs: BlockInputs | None, spec: PruningSpec, ranks: Ranks
) -> dict[str, int]:
    """Decide how many zeros each unit of each layer gets.

    Args:
        loader: Hands out the dense model's blocks.
        sizes: Its layers, as `layer_sizes` lists them.
        inputs: The calibration windows as inputs of the first block, which are passed through all blocks; None for
            `depth`, which looks at nothing.
        spec: How layers are pruned; its config names the `allocation` and the `allocation_spread`.
        ranks: The processes that share the windows; all get the same.

    Returns:
        By the layer's path in the model the zeros in each of its units, in total as many as a uniform allocation has;
        for `row` there may be one more in each row of one layer.

    Raises:
        RankError: Another process has failed.
    """
    wanted, spread = spec.sparsity, spec.sparsity * spec.config.allocation_spread
    # A layer keeps at least half of what it would keep in a uniform allocation.
    low, high = max(0.0, wanted - spread), min((1 + wanted) / 2, wanted + spread)
    if spec.config.allocation == "depth":
        last = max(1, len(loader) - 1)
        shares = [wanted + spread * (2 * layer.block / last - 1) for layer in sizes]
    else:
        assert inputs is not None
        measure = outlier_shares if spec.config.allocation == "owl" else score_histograms
        measured: list[Any] = []
        for index in range(len(loader)):
            block = loader.fetch(index)
            with ranks.errors_shared():
                norms = pass_and_measure(block, inputs)
            for each in norms.values():
                ranks.all_reduce(each.inputs)
                ranks.all_reduce(each.outputs)
            measured += measure(block, norms)
            loader.prefetch(index + 1)
        if spec.config.allocation == "owl":
            shares = _less_where_outliers_are(measured, wanted, spread)
        else:
            shares = at_equal_score(measured, sizes, wanted, low, high)
    return distribute(sizes, shares, spec.pattern, low, high)


def layer_sizes(loader: BlockLoader, spec: PruningSpec) -> list[LayerSize]:
    """List the layers with their units."""
    found = []
    keeps = spec.config.keep_zeros
    for index, block in enumerate(loader.blocks.modules):
        for name, linear in find_linears(block).items():
            rows, columns = weight_of(linear).shape
            units, size = (rows, columns) if spec.pattern.by_row else (1, rows * columns)
            least = int((spec.pattern.units(full_weight(linear)) == 0).sum(1).max()) if keeps else 0
            found.append(LayerSize(f"{loader.blocks.path}.{index}.{name}", index, units, size, least))
    return found


def outlier_shares(block: nn.Module, norms: dict[str, LayerNorms]) -> list[float]:
    """For each layer, the share of a block's scores |W| ‖x‖ that are outliers; the same for all of a block.

    Source:
        Yin et al., *Outlier Weighed Layerwise Sparsity (OWL)*, ICML 2024 (arXiv 2310.05175).
    """
    linears = find_linears(block)
    scores = [weight_of(linears[name]).abs().float() * each.inputs.sqrt().float() for name, each in norms.items()]
    entries = sum(score.numel() for score in scores)
    limit = OUTLIER * sum(float(score.sum(dtype=torch.float64)) for score in scores) / entries
    return [sum(int((score > limit).sum()) for score in scores) / entries] * len(scores)


def score_histograms(block: nn.Module, norms: dict[str, LayerNorms]) -> list[Tensor]:
    """For each layer, how many weights have which score: what a weight's removal adds to the layer's relative error.

    To first order that is W² Σx² / ‖XW0ᵀ‖². The weights that stay will make up for a part of it, in all layers alike.

    Returns:
        Counts (bins,), float64, of the scores' logarithms.
    """
    found = []
    for name, linear in find_linears(block).items():
        each = norms[name]
        weight = weight_of(linear).float()
        scale = (each.inputs / each.outputs.clamp_min(torch.finfo(torch.float64).tiny)).float()
        score = (weight.square() * scale).log_().clamp_(_LOWEST, _HIGHEST)
        found.append(torch.histc(score, _BINS, _LOWEST, _HIGHEST).double().cpu())
    return found


def _less_where_outliers_are(outliers: list[float], wanted: float, spread: float) -> list[float]:
    low, high = min(outliers), max(outliers)
    if high == low:
        return [wanted] * len(outliers)
    scaled = [2 * spread * (value - low) / (high - low) for value in outliers]
    mean = sum(scaled) / len(scaled)
    return [wanted + mean - value for value in scaled]


def at_equal_score(
    histograms: list[Tensor], sizes: Sequence[LayerSize], wanted: float, low: float, high: float
) -> list[float]:
    """Sparsities at which the next weight to go has the same score in all layers, but for limits.

    Moving a zero from one layer to another would then save nothing.

    Args:
        histograms: Of each layer, as `score_histograms` returns them.
        sizes: The layers.
        wanted: The sparsity of all together.
        low: The least sparsity of a layer.
        high: The largest.
    """
    # (layers, bins): the share of a layer's weights below the end of a bin.
    below = torch.stack([(histogram / histogram.sum()).cumsum(0) for histogram in histograms])
    entries = torch.tensor([float(layer.entries) for layer in sizes], dtype=torch.float64)
    together = (below.clamp(low, high) * entries[:, None]).sum(0) / entries.sum()
    # Between the ends of two bins the shares are interpolated.
    after = int(torch.searchsorted(together, torch.tensor(wanted, dtype=torch.float64)).clamp_max(_BINS - 1))
    before = max(0, after - 1)
    step = together[after] - together[before]
    part = float((wanted - together[before]) / step) if step > 0 else 0.0
    return torch.lerp(below[:, before], below[:, after], part).clamp(low, high).tolist()


def distribute(
    sizes: Sequence[LayerSize], shares: Sequence[float], pattern: Pattern, low: float, high: float
) -> dict[str, int]:
    """Turn sparsities into whole numbers of zeros with the total of a uniform allocation.

    Args:
        sizes: The layers.
        shares: The sparsity that each should have; all are shifted alike until the total is right.
        pattern: What would be asked of every layer in a uniform allocation.
        low: The least sparsity of a layer.
        high: The largest; a layer that has more zeros already keeps them.

    Returns:
        Zeros of each unit, by the layer's path.
    """
    total = sum(layer.units * (layer.size - pattern.kept((layer.units, layer.size))) for layer in sizes)
    limits = [
        (max(layer.least, zeros_of(low, layer.size)), max(layer.least, zeros_of(high, layer.size))) for layer in sizes
    ]

    def zeros(shift: float) -> list[float]:
        return [
            min(max((share + shift) * layer.size, bottom), top)
            for layer, share, (bottom, top) in zip(sizes, shares, limits, strict=True)
        ]

    shift = _bisect(lambda shift: sum(z * layer.units for z, layer in zip(zeros(shift), sizes, strict=True)), total)
    exact = zeros(shift)
    found = [int(value) for value in exact]
    missing = total - sum(z * layer.units for z, layer in zip(found, sizes, strict=True))
    while missing > 0 and (open_ := [i for i in range(len(sizes)) if found[i] < limits[i][1]]):
        # The largest remainder is rounded up; where no unit is so small, the smallest one.
        fitting = [i for i in open_ if sizes[i].units <= missing]
        index = max(fitting, key=lambda i: exact[i] - found[i]) if fitting else min(open_, key=lambda i: sizes[i].units)
        found[index] += 1
        missing -= sizes[index].units
    return {layer.path: z for layer, z in zip(sizes, found, strict=True)}


def _bisect(function: Callable[[float], float], target: float) -> float:
    """The shift in [-1, 1] up to which a growing function stays at or below a target."""
    low, high = -1.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) <= target else (low, middle)
    return low
