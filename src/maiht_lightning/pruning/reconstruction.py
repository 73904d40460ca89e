"""Block reconstruction: training a pruned block so that it returns what the dense model's block does.

Background: the weights that are kept are trained block by block, masks fixed, towards the outputs of the dense model,
after Guo et al., *EBFT: Effective and Block-Wise Fine-Tuning for Sparse LLMs* (arXiv 2402.12419). Here the loss is
relative token by token, since the plain squared error of a few tokens with massive activations would outweigh all
others, and held-out windows decide when to stop.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import cos, pi
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..capture.block_inputs import Batch
from ..distributed import Ranks
from ..models.blocks import find_linears
from ..solvers import MAIHTConfig
from ..solvers.config import HELD_OUT

T = TypeVar("T")

# Inputs of a block, hidden states (windows, seqlen, hidden), and what it is to return for them.
Pair = tuple[Batch, Tensor]


def reconstruct(
    block: nn.Module,
    inputs: Sequence[Batch],
    targets: Sequence[Tensor],
    config: MAIHTConfig,
    *,
    seed: int = 0,
    ranks: Ranks | None = None,
) -> tuple[float, float]:
    """Train the weights of a block's linear layers that are not zero, in place; the zeros stay.

    Adam in float32 with a cosine rate, one batch a step: many steps are worth more than large ones. Nothing changes
    where the error on the held-out batches does not fall. Of fewer than four batches none is held out, and the error is
    that of all.

    Args:
        block: The pruned block in eval mode. Its weights may be in any floating dtype.
        inputs: Its inputs, hidden states (windows, seqlen, hidden) per batch.
        targets: For each batch the dense model's hidden states (windows, seqlen, hidden) after this block.
        config: `reconstruction_epochs` passes, with steps of `reconstruction_rate` times a layer's root mean square.
        seed: Decides the order of the batches.
        ranks: The processes that share the batches; all end with the same weights.

    Returns:
        The mean relative error per token, ‖y − t‖² / ‖t‖², on the held-out batches, before and after.

    Raises:
        RankError: Another process has failed; the block is as it was.
    """
    ranks = ranks or Ranks()
    pairs = list(zip(inputs, targets, strict=True))
    training, held_out = (pairs, pairs) if len(pairs) < 4 else split(pairs)
    # A step takes one batch from every process, so that all do as many steps.
    steps = min(ranks.all_gather_object(len(training)))
    with differentiable():
        names = [f"{name}.weight" for name in find_linears(block)]
        # As the block multiplies with them, in its dtype; and in float32, as Adam has them: the same where it is that.
        rounded = {name: block.get_parameter(name).detach().clone().requires_grad_() for name in names}
        weights = {name: weight.detach().float() for name, weight in rounded.items()}
        is_kept = [weight != 0 for weight in weights.values()]

        def error(batch: Batch, target: Tensor) -> Tensor:
            output = batch.run(lambda *args, **kwargs: functional_call(block, rounded, args, kwargs))
            return relative_error_per_token(output, target.to(output.device)).mean()

        def held_out_error() -> float:
            # Batches may have different lengths, and each of their tokens counts the same.
            tokens = [target.shape[:-1].numel() for _, target in held_out]
            with ranks.errors_shared(), torch.no_grad():
                found = [error(*pair).double() * count for pair, count in zip(held_out, tokens, strict=True)]
                total = torch.stack(found).sum()
            both = torch.stack([total, total.new_tensor(sum(tokens))])
            ranks.all_reduce(both)
            return float(both[0] / both[1])

        start = best = held_out_error()
        kept = {name: weight.detach().clone() for name, weight in rounded.items()}
        rates = [config.reconstruction_rate * _root_mean_square(weight) for weight in weights.values()]
        optimizer = torch.optim.Adam(
            [{"params": [weight], "lr": rate} for weight, rate in zip(weights.values(), rates, strict=True)],
            betas=(0.9, 0.95),
            fused=True,  # one pass over the weights, where each step is worth one window only
        )
        for weight in weights.values():
            weight.grad = torch.empty_like(weight)
        order = torch.Generator().manual_seed(seed)
        total_steps = config.reconstruction_epochs * steps
        for epoch in range(config.reconstruction_epochs):
            chosen = torch.randperm(len(training), generator=order)[:steps].tolist()
            for step, index in enumerate(chosen, epoch * steps):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * (1 + cos(pi * step / total_steps)) / 2
                # Not `backward`, which would leave gradients in the block's other parameters.
                with ranks.errors_shared():
                    # A layer whose output only chooses, as a router's does, has no gradient: it counts as 0.
                    gradients = torch.autograd.grad(
                        error(*training[index]) / ranks.size,
                        list(rounded.values()),
                        allow_unused=True,
                        materialize_grads=True,
                    )
                for weight, gradient, keep in zip(weights.values(), gradients, is_kept, strict=True):
                    # Without a gradient, ever, Adam leaves a zero as it is. Processes sum tensors whose numbers lie in
                    # the same order.
                    ranks.all_reduce(torch.mul(gradient, keep, out=weight.grad))
                with ranks.errors_shared(), torch.no_grad():
                    optimizer.step()
                    for name, weight in weights.items():
                        if weight.dtype != rounded[name].dtype:
                            rounded[name].copy_(weight)
            if (now := held_out_error()) < best:
                best = now
                for name, weight in rounded.items():
                    kept[name].copy_(weight.detach())
        if best < start:
            with torch.no_grad():
                for name, weight in kept.items():
                    block.get_parameter(name).copy_(weight)
    return start, best


def split(batches: Sequence[T]) -> tuple[list[T], list[T]]:
    """Split batches into those to train with and those held out, every `HELD_OUT`-th and at least one."""
    chosen = set(range(0, len(batches), HELD_OUT))
    return (
        [batch for index, batch in enumerate(batches) if index not in chosen],
        [batch for index, batch in enumerate(batches) if index in chosen],
    )


def relative_error_per_token(output: Tensor, target: Tensor) -> Tensor:
    """‖y − t‖² / ‖t‖² for outputs and targets (windows, seqlen, hidden): float32 (windows, seqlen)."""
    output, target = output.float(), target.float()
    # A hidden state of a language model is never near this; it keeps one that is 0 from dividing.
    return (output - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-12)


def _root_mean_square(weight: Tensor) -> float:
    """The root mean square of the weights (out, in) that are not zero; 0 where all are."""
    return float((weight.detach().square().sum() / weight.count_nonzero().clamp_min(1)).sqrt())


@contextmanager
def differentiable() -> Iterator[None]:
    """Gradients, also where the caller has switched them off."""
    with torch.inference_mode(False), torch.enable_grad():
        yield
