"""Metrics of the user's own: a function of the model, called at each stage of a run."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from ..data.randomness import seeded
from ..distributed import Ranks
from ..models.blocks import evaluation_mode
from ..models.offload import offloaded_forward


@torch.no_grad()
def own_metrics(
    model: nn.Module,
    metric: Callable[[Any], Mapping[str, float]],
    *,
    taken: Mapping[str, float],
    device: torch.device | None = None,
    process_group: ProcessGroup | None = None,
) -> dict[str, float]:
    """Call a function with a model in eval mode and without gradients.

    Modes are put back afterwards, and so are the generators of random numbers, which are seeded: what the function
    draws is the same at each stage, and what is drawn after it does not depend on whether it was called.

    Args:
        model: A Hugging Face causal language model. One in host memory runs on the device, layer after layer.
        metric: Takes the model and returns numbers by name, as floats or as tensors of one element.
        taken: Names that are those of other metrics.
        device: Where to compute; by default where the model is.
        process_group: Processes that have the same model, or shards of one: each of them calls the function, and all
            get what the first one has found.

    Raises:
        TypeError, ValueError: The function returns something else, or names that are taken.
        RankError: The function has failed in another process.
    """
    ranks = Ranks(process_group)
    with ranks.errors_shared():
        with seeded(), evaluation_mode(model), offloaded_forward(model, device):
            found = metric(model)
        if not isinstance(found, Mapping):
            raise TypeError(f"a metric must return a dictionary of numbers, but found {type(found).__name__}")
        if both := [name for name in found if name in taken]:
            raise ValueError(f"a metric must have a name of its own, but found {', '.join(both)} twice")
        numbers = {str(name): float(value) for name, value in found.items()}
    return ranks.broadcast_object(numbers)
