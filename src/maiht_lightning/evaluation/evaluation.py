"""`Evaluation`: which texts, token batches, tasks and metrics a model is measured by, and the measuring."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..data.batches import TokenBatches, Windows
from ..data.windows import evaluation_windows
from ..models.memory import with_room
from ..records import StageResult
from ..validation import check_at_least, check_fits, positions_of
from .lm_eval_tasks import load_tasks
from .own_metrics import own_metrics
from .perplexity import perplexity
from .zero_shot import zero_shot

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Papers cut WikiText-2 into windows of LLaMA's 2,048 tokens, also for models with a longer context.
LONGEST_WINDOW = 2048


@dataclass(frozen=True)
class Evaluation:
    """What a model is measured by.

    Args:
        perplexity: Texts to measure perplexity on: `wikitext2`, `c4`, `python_docs`, or paths of .txt files.
            Empty to measure none. Or a dictionary from names to such texts or to token batches of your own, as
            `{"chats": loader}` for a DataLoader; see `prune` for the batches. All their tokens count, whatever labels
            they have.
        tasks: Zero-shot tasks by lm-eval's names, such as `boolq`; they need the extra `eval`. Empty for none. Papers
            use boolq, rte, hellaswag, winogrande, arc_easy, arc_challenge and openbookqa.
        seqlen: Tokens per window of text; by default the model's context, at most 2,048.
        max_windows: Only the first windows of each text or loader, for a quick look.
        limit: Only the first documents of each task, for a quick look.
        num_fewshot: Solved examples before each question of a task; by default the task's own number.
        batch_size: Windows per forward pass.
        task_batch_size: Sequences of a task per forward pass; by default as many as windows. A task's sequences are
            short, so that a GPU wants more of them at a time than it has room for windows.
        metrics: Functions of your own that take the model, in eval mode, and return numbers by name.
    """

    perplexity: list[str] | Mapping[str, str | TokenBatches] = field(default_factory=lambda: ["wikitext2"])
    tasks: list[str] = field(default_factory=list)
    seqlen: int | None = None
    max_windows: int | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 1
    task_batch_size: int | None = None
    metrics: list[Callable[[Any], Mapping[str, float]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_at_least(1, batch_size=self.batch_size)
        if not isinstance(self.perplexity, list | tuple | Mapping):
            raise TypeError(
                "perplexity must be a list of texts, or a dictionary with a name for each text or loader, as "
                f"{{'mine': loader}}, but found {type(self.perplexity).__name__}"
            )
        for given in self.perplexity if isinstance(self.perplexity, list | tuple) else ():
            if not isinstance(given, str):
                raise TypeError(
                    "perplexity must have a name for token batches, in a dictionary such as {'mine': loader}, but "
                    f"found a list with {type(given).__name__}"
                )
        if not isinstance(self.metrics, list | tuple) or not all(map(callable, self.metrics)):
            raise TypeError(
                "metrics must be a list of functions that take the model and return numbers by name, but found "
                f"{self.metrics!r}"
            )
        if self.seqlen is not None:
            check_at_least(2, seqlen=self.seqlen)
        for name, least in (("max_windows", 1), ("limit", 1), ("num_fewshot", 0), ("task_batch_size", 1)):
            if getattr(self, name) is not None:
                check_at_least(least, **{name: getattr(self, name)})

    @property
    def by_name(self) -> dict[str, str | TokenBatches]:
        """The texts and token batches on which perplexity is measured."""
        if isinstance(self.perplexity, Mapping):
            return dict(self.perplexity)
        return {text: text for text in self.perplexity}

    @property
    def needs_tokenizer(self) -> bool:
        """Whether there is a text or a task."""
        return bool(self.tasks) or any(isinstance(given, str) for given in self.by_name.values())

    @property
    def description(self) -> dict[str, Any]:
        """The settings as reports show them, with names for loaders and functions."""
        others = {each.name: getattr(self, each.name) for each in fields(self)}
        return {**others, "perplexity": list(self.by_name), "metrics": [_name(metric) for metric in self.metrics]}

    def load(self, model: nn.Module, tokenizer: "PreTrainedTokenizerBase | None" = None) -> "LoadedEvaluation":
        """Load texts, batches and tasks: what is missing or misspelt is found here, before hours of work.

        Args:
            model: A Hugging Face causal language model.
            tokenizer: Its tokenizer; not needed where there are token batches and metrics alone.

        Raises:
            ValueError, TypeError, OSError, ModuleNotFoundError: As `evaluation_windows`, `load_tasks` and `prune`.
        """
        seqlen = self.seqlen or context_length(model)
        if tokenizer is None and self.needs_tokenizer:
            raise ValueError("tokenizer must be given for texts and tasks, but found None")
        windows: dict[str, Tensor | Windows] = {}
        for name, given in self.by_name.items():
            if not isinstance(given, str):
                windows[name] = Windows.parse(given, samples=self.max_windows)
            elif tokenizer is not None:
                windows[name] = found = evaluation_windows(given, tokenizer, seqlen, self.max_windows)
                check_fits(f"windows of {name}", found, model)
        tasks = load_tasks(self.tasks, num_fewshot=self.num_fewshot) if self.tasks else {}
        return LoadedEvaluation(self, windows, tasks)


@dataclass(frozen=True)
class LoadedEvaluation:
    """An evaluation with its texts and tasks at hand, to be done at each stage of a run.

    Args:
        settings: What was asked for.
        windows: Token ids (windows, seqlen) by the text's name, or windows of several lengths.
        tasks: lm-eval's tasks by name.
    """

    settings: Evaluation
    windows: Mapping[str, Tensor | Windows]
    tasks: Mapping[str, Any]

    @torch.no_grad()
    def measure(
        self,
        model: nn.Module,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        *,
        stage: str = "",
        progress: bool = True,
        device: torch.device | None = None,
        process_group: ProcessGroup | None = None,
        on_failure: Callable[[str, Exception], None] | None = None,
        on_retry: Callable[[str], None] = lambda _: None,
    ) -> StageResult:
        """Measure a model.

        Where memory runs out in one process, the batch is halved until it is one window.

        Args:
            model: A Hugging Face causal language model.
            tokenizer: Its tokenizer; tasks alone need one.
            stage: Name of the model's state, for the progress bars.
            progress: Show progress bars.
            device: Where to compute; by default where the model is.
            process_group: Processes that share the work and all get the result; see `perplexity`.
            on_failure: Called with the name of a text, task or metric that could not be measured and with the error; it
                is left out of the result. None: the error is raised.
            on_retry: Called with a sentence where memory ran out.

        Returns:
            The perplexities by text, the tasks' metrics by task, and the user's own metrics.
        """

        def measured(what: str, work: Callable[[int], Any], batch_size: int = self.settings.batch_size) -> Any:
            """What some work gives that takes a batch size; None where it failed."""
            try:
                return with_room(what, work, batch_size, on_retry, retries=process_group is None)
            except Exception as error:
                if on_failure is None:
                    raise
                on_failure(what, error)
                return None

        def text(name: str, batch_size: int) -> float:
            return perplexity(
                model,
                self.windows[name],
                batch_size=batch_size,
                progress=progress,
                description=f"Perplexity {name} {stage}".strip(),
                device=device,
                process_group=process_group,
            )

        def task(name: str, batch_size: int) -> dict[str, float]:
            if tokenizer is None:
                raise ValueError(f"tokenizer must be given for task {name}, but found None")
            found = zero_shot(
                model,
                tokenizer,
                {name: self.tasks[name]},
                limit=self.settings.limit,
                batch_size=batch_size,
                progress=progress,
                description=f"Task {name} {stage}".strip(),
                device=device,
                process_group=process_group,
            )
            return found[name]

        perplexities = {name: measured(name, partial(text, name)) for name in self.windows}
        sequences = self.settings.task_batch_size or self.settings.batch_size
        tasks = {name: measured(name, partial(task, name), sequences) for name in self.tasks}
        metrics: dict[str, float] = {}

        def own(metric: Callable[[Any], Mapping[str, float]], _: int) -> dict[str, float]:
            return own_metrics(model, metric, taken=metrics, device=device, process_group=process_group)

        for metric in self.settings.metrics:
            # The batches are the function's own, so that it cannot be called again with smaller ones.
            metrics |= measured(_name(metric), partial(own, metric), 1) or {}
        return StageResult(
            {name: value for name, value in perplexities.items() if value is not None},
            {name: found for name, found in tasks.items() if found is not None},
            metrics,
        )


def _name(metric: Callable[..., Any]) -> str:
    return getattr(metric, "__name__", type(metric).__name__)


def context_length(model: nn.Module) -> int:
    """Find the model's context in tokens, at most 2,048."""
    return min(positions_of(model) or LONGEST_WINDOW, LONGEST_WINDOW)
