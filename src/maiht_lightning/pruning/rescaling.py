"""Rescaling: a factor for every row and every column of the pruned weights, learnt through the whole model.

A weight W (out, in) becomes diag(1 + r) W diag(1 + c): its zeros stay, and so does the model's form. Block
reconstruction sees one block at a time and has many weights for few windows; here the loss is the divergence of the
model's predictions from the dense model's, and a layer has but out + in numbers to learn, which few windows determine.

Background: retraining a pruned model's norms and biases alone gives back much of what pruning takes (Zimmer et al.,
*PERP*, arXiv 2312.15230); factors on activations are the few parameters of Liu et al., *IA3* (arXiv 2205.05638).

A window goes through the model block by block, forwards without gradients and backwards from the last block to the
first, each of which is run once more. So it does not matter where the blocks are, and the memory is that of one block
and of the window's hidden states between them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import cos, pi
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..capture.block_inputs import Batch
from ..distributed import Ranks
from ..models.blocks import find_linears, forwards_replaced, weight_of
from ..models.divergence import distillation_loss
from ..models.offload import BlockLoader
from .reconstruction import differentiable, split

# Adam's highest step. Factors begin at 1, so that it need not follow the size of a layer's weights.
RATE = 0.003
# The share of the steps in which the rate rises to it.
WARMUP = 0.1

# A layer's r (out,) and c (in,), by its name in the block.
Factors = dict[str, tuple[Tensor, Tensor]]


class Window(NamedTuple):
    """A batch of calibration windows on its way through the whole model.

    Args:
        batch: The first block's input, hidden states (windows, seqlen, hidden).
        tokens: Token ids (windows, seqlen).
        target: What the dense model's last block returns for them (windows, seqlen, hidden).
    """

    batch: Batch
    tokens: Tensor
    target: Tensor


class Rescaling:
    """Learns the factors of a pruned model.

    Args:
        loader: Hands out the pruned blocks, in eval mode.
        logits: Returns the model's logits (windows, seqlen, vocabulary) for token ids (windows, seqlen) and the hidden
            states (windows, seqlen, hidden) that its last block has returned for them; differentiable by these.
        ranks: The processes that share the windows; all learn the same factors.
        on_step: Called with a sentence after each step.

    Attributes:
        factors: All that is learnt, r and c of every layer in the order of the blocks, float32 in one vector.
    """

    def __init__(
        self,
        loader: BlockLoader,
        logits: Callable[[Tensor, Tensor], Tensor],
        *,
        ranks: Ranks | None = None,
        on_step: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._loader, self._logits, self._ranks, self._on_step = loader, logits, ranks or Ranks(), on_step
        self._shapes = [shapes_of(block) for block in loader.blocks.modules]
        self.factors = torch.zeros(sum(map(size_of, self._shapes)), device=loader.device)

    def learn(self, windows: Sequence[Window], epochs: int, *, seed: int = 0) -> tuple[float, float]:
        """Learn the factors, one batch a step.

        They stay 0 where the divergence on the held-out batches does not fall. Of fewer than four batches none is held
        out, and the divergence is that of all.

        Args:
            windows: This process's batches. Those that block reconstruction holds out are held out here.
            epochs: Passes over them.
            seed: Decides their order.

        Returns:
            The mean KL divergence of the dense model's predictions from the pruned model's, in nats per token, on the
            held-out batches, before and after.

        Raises:
            RankError: Another process has failed.
        """
        windows = list(windows)
        training, held_out = (windows, windows) if len(windows) < 4 else split(windows)
        # A step takes one batch from every process, so that all do as many steps.
        steps = min(self._ranks.all_gather_object(len(training)))
        with differentiable():
            # Adam's step is at most about the rate, whatever the gradient's size, so that factors stay near 1.
            learnt = self.factors.clone()
            optimizer = torch.optim.Adam([learnt], betas=(0.9, 0.95), fused=True)
            start = best = self._divergence(held_out, learnt)
            order = torch.Generator().manual_seed(seed)
            for epoch in range(epochs):
                chosen = torch.randperm(len(training), generator=order)[:steps].tolist()
                for step, index in enumerate(chosen, epoch * steps):
                    with self._ranks.errors_shared():
                        learnt.grad = self._gradient(training[index], learnt)
                    self._ranks.all_reduce(learnt.grad)
                    optimizer.param_groups[0]["lr"] = RATE * _schedule((step + 0.5) / (epochs * steps))
                    optimizer.step()
                    self._on_step(f"rescaling, step {step + 1}/{epochs * steps}")
                if (now := self._divergence(held_out, learnt)) < best:
                    best = now
                    self.factors.copy_(learnt)
        return start, best

    def weights(self, index: int, block: nn.Module) -> dict[str, Tensor]:
        """The weights (out, in) of a block's layers by name, multiplied with their factors, in the block's dtype."""
        found = {name: weight_of(linear).detach() for name, linear in find_linears(block).items()}
        factors = self._views(self.factors)[index]
        return {
            name: (weight * (1 + factors[name][0])[:, None] * (1 + factors[name][1])).to(weight.dtype)
            for name, weight in found.items()
        }

    def _gradient(self, window: Window, factors: Tensor) -> Tensor:
        """The gradient of a batch's divergence, summed over its tokens, by all factors (in one vector)."""
        views = self._views(factors)
        states = self._forward(window, views)
        last = states.pop().requires_grad_()
        # A sum, since half of a mean's gradients would vanish in float16; Adam does not mind.
        (gradient,) = torch.autograd.grad(self._loss(window, last), last)
        found: list[Tensor] = []
        for index in reversed(range(len(self._loader))):
            block = self._loader.fetch(index)
            self._loader.prefetch(max(index - 1, 0))
            # The first is the window's own.
            hidden = states.pop().detach().requires_grad_()
            for part in (sought := [part for pair in views[index].values() for part in pair]):
                part.requires_grad_()
            with torch.enable_grad(), multiplied(block, views[index]):
                # Not the leaf itself, which hooks such as those of torch's counter of operations refuse.
                output = _run(block, window.batch, index, hidden.clone())
            # A layer whose output only chooses, as a router's does, has no gradient: it counts as 0.
            gradient, *parts = torch.autograd.grad(
                output, [hidden, *sought], gradient, allow_unused=True, materialize_grads=True
            )
            found.append(torch.cat(parts))
        return torch.cat(found[::-1])

    @torch.no_grad()
    def _divergence(self, windows: Sequence[Window], factors: Tensor) -> float:
        """The mean divergence per token over batches of all processes."""
        with self._ranks.errors_shared():
            views = self._views(factors)
            total = torch.stack([self._loss(w, self._forward(w, views)[-1]).double() for w in windows]).sum()
        both = torch.stack([total, total.new_tensor(sum(_predicted(window) for window in windows))])
        self._ranks.all_reduce(both)
        return float(both[0] / both[1])

    def _loss(self, window: Window, hidden: Tensor) -> Tensor:
        """The divergence of a batch, summed over tokens, from its last hidden states (windows, seqlen, hidden)."""
        with torch.no_grad():
            target = self._logits(window.tokens, window.target.to(hidden.device))
        with torch.set_grad_enabled(hidden.requires_grad):
            logits = self._logits(window.tokens, hidden.clone())
            return distillation_loss(logits, target, window.tokens) * _predicted(window)

    @torch.no_grad()
    def _forward(self, window: Window, views: list[Factors]) -> list[Tensor]:
        """The hidden states (windows, seqlen, hidden) before each block and after the last."""
        states = [window.batch.input()]
        for index, factors in enumerate(views):
            block = self._loader.fetch(index)
            self._loader.prefetch(index + 1)
            with multiplied(block, factors):
                states.append(_run(block, window.batch, index, states[-1]))
        return states

    def _views(self, factors: Tensor) -> list[Factors]:
        """Each block's part of a vector with all factors."""
        views: list[Factors] = []
        for shapes, part in zip(self._shapes, factors.split([*map(size_of, self._shapes)]), strict=True):
            pairs = part.split([size for shape in shapes.values() for size in shape])
            views.append(dict(zip(shapes, zip(pairs[::2], pairs[1::2], strict=True), strict=True)))
        return views


@contextmanager
def multiplied(block: nn.Module, factors: Factors) -> Iterator[None]:
    """Let a block's layers return what they would with weights diag(1 + r) W diag(1 + c)."""

    def make(linear: nn.Module, rows: Tensor, columns: Tensor) -> Callable[[Tensor], Tensor]:
        forward, bias = linear.forward, getattr(linear, "bias", None)

        def run(x: Tensor) -> Tensor:
            # In float32, whatever the model's dtype: a factor of 1.003 would be 1 in bfloat16.
            output: Tensor = forward((x * (1 + columns)).to(x.dtype))
            change = output if bias is None else output - bias
            return (output + rows * change).to(output.dtype)

        return run

    linears = find_linears(block)
    with forwards_replaced([(linears[name], make(linears[name], *pair)) for name, pair in factors.items()]):
        yield


def shapes_of(block: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of a block's layers by name."""
    found: dict[str, tuple[int, int]] = {}
    for name, linear in find_linears(block).items():
        out_features, in_features = weight_of(linear).shape
        found[name] = out_features, in_features
    return found


def size_of(shapes: dict[str, tuple[int, int]]) -> int:
    """How many factors layers of these shapes have."""
    return sum(out_features + in_features for out_features, in_features in shapes.values())


def _run(block: nn.Module, batch: Batch, index: int, hidden: Tensor) -> Tensor:
    return Batch(hidden, batch.arguments, batch.device, index).run(block)


def _predicted(window: Window) -> int:
    """How many tokens of a batch are predicted: all but the first of each window."""
    return window.tokens.numel() - len(window.tokens)


def _schedule(progress: float) -> float:
    """The rate at a share of all steps, in (0, 1), by the highest one: it rises evenly, and falls as a cosine does."""
    return min(progress / WARMUP, 1.0) * (1 + cos(pi * progress)) / 2
