"""Perplexity that holds for half precision and for badly damaged models."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional
from torchmetrics import Metric
from tqdm.auto import tqdm

from ..capture.block_inputs import logits_from_hidden, record_inputs
from ..capture.hidden_states import HiddenStateStore, choose_storage, pinned_bytes
from ..data.batches import TokenBatches, Windows
from ..distributed import Ranks
from ..models.blocks import evaluation_mode, find_blocks
from ..models.offload import BlockLoader, execution_device, hidden_bytes, is_offloaded, without_block_weights
from ..validation import check_at_least

# Hugging Face's label for padding: such a token is not predicted.
_IGNORED = -100

# Logits that are turned to float32 at a time: 64 MiB, whatever the vocabulary.
_CHUNK_ELEMENTS = 2**24


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the cross-entropy of every token, in float32 from a log-softmax.

    Unlike softmax followed by a logarithm, this is right for float16 and bfloat16 logits and however far a
    target's logit lies below the largest. The logits are turned to float32 some rows at a time, so that a
    second copy of them all never exists.

    Args:
        logits: (batch, tokens, vocabulary), any floating dtype.
        targets: (batch, tokens), int64: the token that each position's logits should have predicted. The loss is 0
            where it is -100.

    Returns:
        (batch, tokens), float32, in nats.

    Raises:
        ValueError: The shapes do not fit.
    """
    if logits.ndim != 3 or logits.shape[:2] != targets.shape:
        raise ValueError(
            "logits and targets must have shapes (batch, tokens, vocabulary) and (batch, tokens), "
            f"but found {tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    rows = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    losses = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
    # Rows are taken from one sequence at a time: `logits[index, part]` is a view even where `logits` is sliced, and
    # flattening the batch would copy it.
    for index in range(len(logits)):
        for start in range(0, logits.shape[1], rows):
            part = slice(start, start + rows)
            losses[index, part] = functional.cross_entropy(
                logits[index, part].float(), targets[index, part], reduction="none", ignore_index=_IGNORED
            )
    return losses


class Perplexity(Metric):
    """The exponential of the mean cross-entropy over all tokens seen, as a torchmetrics metric.

    Background: `torchmetrics.text.Perplexity` takes a softmax and then its logarithm. That makes the perplexity
    infinite for float16 logits, and where a target's logit lies 110 below the largest. Here float32 log-softmax losses
    are summed in float64.

    Logits and targets must be aligned already: nothing is shifted. For a causal model and `input_ids` (batch, seqlen),
    give `logits[:, :-1]` and `input_ids[:, 1:]`. Targets of -100 are left out. Under distributed training the sums of
    all processes are added.

    Example:
        >>> import torch
        >>> metric = Perplexity()
        >>> metric.update(torch.zeros(1, 3, 50), torch.tensor([[4, 8, 15]]))
        >>> round(metric.compute().item(), 3)
        50.0
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    loss_sum: Tensor
    tokens: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("loss_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add a batch.

        Args:
            logits: (batch, tokens, vocabulary), any floating dtype.
            targets: (batch, tokens), int64, aligned with the logits.

        Raises:
            ValueError: The shapes do not fit.
        """
        # The state is replaced and not added to in place: after `Trainer.validate` it may be an inference tensor, which
        # `fit` may not write to.
        self.loss_sum = self.loss_sum + token_losses(logits, targets).sum(dtype=torch.float64)
        self.tokens = self.tokens + (targets != _IGNORED).sum()

    def compute(self) -> Tensor:
        """Compute the perplexity of what was seen.

        Returns:
            A float64 scalar: infinite beyond its range, NaN (with torchmetrics' warning) where nothing was seen.
        """
        return torch.exp(self.loss_sum / self.tokens)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        # The state follows the module to its device but not to its dtype: `.to(torch.bfloat16)` on a parent,
        # as Lightning's bf16-true does, would otherwise leave a sum with three digits.
        return super()._apply(lambda state: state.to(fn(state.new_empty(0)).device), exclude_state)


@torch.no_grad()
def perplexity(
    model: nn.Module,
    windows: Tensor | TokenBatches | Windows,
    *,
    batch_size: int = 1,
    progress: bool = True,
    description: str = "perplexity",
    device: torch.device | str | None = None,
    process_group: ProcessGroup | None = None,
) -> float:
    """Measure a causal language model's perplexity by the protocol of papers (GPTQ, https://arxiv.org/abs/2210.17323).

    Each window stands alone: its seqlen - 1 predictions count, and the losses are averaged over all windows. The model
    runs in eval mode; each submodule's mode is put back afterwards. Precision is the caller's: the model's dtype, or an
    autocast around the call. A model that is not on the computing device (see `prune`) goes there block by block, each
    with all windows, so that its weights are moved once.

    Args:
        model: A Hugging Face causal language model: called as `model(input_ids=..., use_cache=False)`, it answers with
            `.logits`.
        windows: (windows, seqlen), int64, or batches of them, padded or not, as for `prune`.
        batch_size: Windows per forward pass. The result does not depend on it.
        progress: Show a progress bar.
        description: The bar's name.
        device: Where to compute; by default where the model is.
        process_group: Processes that have the same model, or shards of one, and share the windows; all of them get
            the result.

    Returns:
        The perplexity: infinite beyond float64's range.

    Raises:
        ValueError: There is nothing to predict in `windows`, or `batch_size` is below 1.
    """
    found = Windows.parse(windows)
    # A window of one token has nothing to predict.
    groups = tuple(group for group in found.groups if group.ndim == 2 and group.shape[1] > 1 and len(group))
    if not groups:
        raise ValueError(
            "windows must have shape (windows, seqlen), with at least one window of two tokens, but found "
            f"{', '.join(str(tuple(group.shape)) for group in found.groups)}"
        )
    check_at_least(1, batch_size=batch_size)
    ranks = Ranks(process_group)
    device = execution_device(model, device)
    batches = ranks.shard(Windows(groups).batches(batch_size))
    metric = Perplexity(sync_on_compute=False).to(device)
    bar = {"desc": description, "disable": not (progress and ranks.is_main)}
    # `errors_shared` lets none of the processes wait for one that has failed.
    with ranks.errors_shared(), evaluation_mode(model):
        for input_ids, logits in _logits(model, [batch.to(device) for batch in batches], device, bar):
            metric.update(logits[:, :-1], input_ids[:, 1:])
    for total in (metric.loss_sum, metric.tokens):
        ranks.all_reduce(total)
    return metric.compute().item()


def _logits(
    model: nn.Module, batches: list[Tensor], device: torch.device, bar: dict[str, Any]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Run the model on each batch of token ids (batch, seqlen), and yield these with their logits."""
    if not is_offloaded(model, device):
        for input_ids in tqdm(batches, unit="batch", **bar):
            yield input_ids, model(input_ids=input_ids, use_cache=False).logits
        return
    blocks = find_blocks(model)
    sizes = [batch.numel() * hidden_bytes(model) for batch in batches]
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    logits = max(batch.numel() for batch in batches) * embedding.shape[0] * embedding.element_size()
    outer = without_block_weights(model, blocks, device)
    outer_blocks = find_blocks(outer).modules
    with BlockLoader(blocks, device) as loader:
        # Beside the hidden states lie the block at work, the one before it, the one that is read meanwhile, and what
        # a block computes, which is taken to be as large; in the end a batch's logits (batch, seqlen, vocabulary).
        working = 4 * loader.block_bytes() + logits
        storage = choose_storage(sum(sizes), device, working, pinned=sum(map(pinned_bytes, sizes)))
        with HiddenStateStore(storage, device) as store:
            inputs = record_inputs(outer, outer_blocks, batches, device=device, store=store)
            for index in tqdm(range(len(loader)), unit="block", **bar):
                block = loader.fetch(index)
                loader.prefetch(index + 1)
                inputs.pass_through(block)
            for input_ids, batch in zip(batches, inputs, strict=True):
                yield input_ids, logits_from_hidden(outer, outer_blocks, input_ids, batch.input())
