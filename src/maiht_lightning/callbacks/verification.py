"""What is to be true of a pruned model when its fit has ended, and afterwards."""

from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from ..models.sparsity import count_zeros, layers_that_lost_zeros, measured_sparsity
from ..records import LayerRecord
from ..reporting.summary import Summary


def verify_zeros(model: nn.Module, records: list[LayerRecord], folder: Path) -> None:
    """Raise `MisconfigurationException` unless all layers have the zeros with which they were pruned."""
    counts = count_zeros(model)
    if lost := layers_that_lost_zeros(counts, records):
        raise MisconfigurationException(
            f"{len(lost)} pruned layers lost zeros after pruning, {lost[0]} first: another callback changed the "
            f"weights. The pruned model in {folder}/model is intact."
        )
    rank_zero_info(f"Zeros verified by counting: {measured_sparsity(counts):.4%}")


def warn_of_lost_zeros(model: nn.Module, records: list[LayerRecord], folder: Path | None) -> None:
    """Warn where layers have fewer zeros than when they were pruned, in a run's folder."""
    if lost := layers_that_lost_zeros(count_zeros(model), records):
        rank_zero_warn(
            f"{len(lost)} layers have fewer zeros than when they were pruned, {lost[0]} first: was a checkpoint "
            f"from before the pruning loaded? The pruned model is in {folder}/model."
        )


def warn_of_failures(summary: Summary) -> None:
    """Warn of what has failed beside a pruning."""
    if failures := summary.failures:
        rank_zero_warn(
            f"{len(failures)} things failed beside the pruning, and the run continued without them: "
            + "; ".join(f"{each['phase']}: {each['message']}" for each in failures)
        )
