"""Zero-shot accuracy through EleutherAI's lm-eval, on a model in memory.

Background: https://github.com/EleutherAI/lm-evaluation-harness. Prompts, scoring and standard errors are lm-eval's
own, so figures are those of its command line with the same batch size. What lm-eval changes around itself is put back
by `lm_eval_state`.
"""

import copy
from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from ..distributed import Ranks
from ..models.blocks import evaluation_mode
from ..models.offload import offloaded_forward
from ..validation import check_integer
from .lm_eval_state import OTHER_SEED, lm_eval_at_work, named_bars, tying_off

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# lm-eval's default, so that standard errors are those of its command line. The standard error of a mean (acc, acc_norm)
# has a closed form, for which nothing is drawn: the number costs time only with metrics such as F1. Zero would leave
# out the closed forms as well.
_BOOTSTRAP_ITERATIONS = 100_000


def zero_shot(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Mapping[str, Any],
    *,
    limit: int | None = None,
    batch_size: int = 1,
    progress: bool = True,
    description: str = "",
    device: torch.device | None = None,
    process_group: ProcessGroup | None = None,
) -> dict[str, dict[str, float]]:
    """Evaluate a causal language model on tasks; no copy of it on disk is needed.

    The model runs on its own device and in its own dtype. As in lm-eval, log-probabilities have the dtype of the
    logits: in bfloat16 their rounding may turn a close choice.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: The model's tokenizer; a copy of it is used.
        tasks: What `load_tasks` has returned.
        limit: Only the first so many documents of each task, for a quick look.
        batch_size: Sequences per forward pass. As padding moves float rounding, a close choice may turn with it.
        progress: Show progress bars.
        description: Stands before the bars' names.
        device: Where to compute; by default where the model is. A model in host memory goes there as a whole where it
            fits. Else Accelerate brings each layer, in every forward pass: a large `batch_size` pays.
        process_group: Processes that have the same model, or shards of one, and share the documents; all of them get
            the result.

    Returns:
        By task the metrics that lm-eval reports for it, such as `acc`, `acc_stderr`, `acc_norm`, `acc_norm_stderr`:
        fractions of 1 for these. A standard error that lm-eval cannot give, as for a single document, is absent.
        lm-eval's suffix `,none` is dropped, the name of another filter stays.

    Raises:
        ValueError: `limit` or `batch_size` is out of range, or there are no tasks.
        TypeError: `tasks` is not what `load_tasks` returns.
        ModuleNotFoundError: lm-eval is not installed.
    """
    check_integer(1, batch_size=batch_size)
    if limit is not None:
        # A fraction is refused too: lm-eval takes a `limit` of 0.5 for half of all documents, and 1.0 for one of them.
        check_integer(1, limit=limit)
    if not isinstance(tasks, Mapping):
        raise TypeError(f"tasks must be the dictionary that load_tasks returns, but found {type(tasks).__name__}")
    if not tasks:
        raise ValueError("tasks must hold at least one task, but found none")
    ranks = Ranks(process_group)
    with (
        lm_eval_at_work(),
        evaluation_mode(model),
        tying_off(model),
        offloaded_forward(model, device),
        named_bars(progress and ranks.is_main, description),
    ):
        from lm_eval.evaluator import evaluate

        wrapped = _wrapped(model, tokenizer, batch_size, ranks, device)
        for task in tasks.values():
            # The seed is set at each evaluation, so that all stages of a run see the same solved examples.
            task.set_fewshot_seed(OTHER_SEED)
        # `simple_evaluate` would read all task files again and have git and pip describe the machine.
        answer = evaluate(
            wrapped,
            {"tasks": dict(tasks), "groups": {}, "group_map": {}},
            limit=limit,
            bootstrap_iters=_BOOTSTRAP_ITERATIONS,
            log_samples=False,
        )
    # lm-eval gives the first process the results, and all others None.
    numbers = {name: _numbers(answer["results"][name]) for name in tasks} if answer is not None else {}
    return ranks.broadcast_object(numbers)


def _wrapped(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    batch_size: int,
    ranks: Ranks,
    device: torch.device | None,
) -> Any:
    """Wrap a model in memory as lm-eval's own kind of model, at work for its process's share of the documents."""
    from lm_eval.models.huggingface import HFLM

    class Wrapped(HFLM):
        # lm-eval knows several processes only where it has loaded the model itself.
        def all_gather(self, tensor: Tensor) -> Tensor:
            return torch.stack(ranks.all_gather_object(tensor.cpu())).flatten()

        def barrier(self) -> None:
            ranks.all_gather_object(None)

        def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
            gathered = ranks.all_gather_object(obj)
            return gathered if ranks.rank == dst else None

    # lm-eval sets the tokenizer's padding side and may give it a padding token, so it gets a copy.
    # Processes with shards of one model must run the same forward passes. lm-eval runs equal requests once, of which
    # one process's share may have more than another's.
    is_shared = ranks.size > 1 and any(isinstance(parameter, DTensor) for parameter in model.parameters())
    wrapped = Wrapped(
        pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, logits_cache=not is_shared
    )
    if device is not None:
        # lm-eval takes the parameters' device, which is `meta` where Accelerate brings them.
        wrapped._device = device
    wrapped._rank, wrapped._world_size = ranks.rank, ranks.size
    return wrapped


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Take the metrics from lm-eval's entry of a task: keys with a filter (`acc,none`) whose values are numbers."""
    numbers = {key: value for key, value in metrics.items() if "," in key and isinstance(value, Real)}
    return {key.removesuffix(",none"): float(value) for key, value in numbers.items()}
