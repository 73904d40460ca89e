"""`Evaluation`: which texts and tasks a model is measured by, and the measuring."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..data.windows import evaluation_windows
from ..records import StageResult
from ..validation import check_at_least
from .lm_eval_tasks import load_tasks
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
            Empty to measure none.
        tasks: Zero-shot tasks by lm-eval's names, such as `boolq`; they need the extra `eval`. Empty for none. Papers
            use boolq, rte, hellaswag, winogrande, arc_easy, arc_challenge and openbookqa.
        seqlen: Tokens per window of text; by default the model's context, at most 2,048.
        max_windows: Only the first windows of each text, for a quick look.
        limit: Only the first documents of each task, for a quick look.
        num_fewshot: Solved examples before each question of a task; by default the task's own number.
        batch_size: Windows, or a task's sequences, per forward pass.
    """

    perplexity: list[str] = field(default_factory=lambda: ["wikitext2"])
    tasks: list[str] = field(default_factory=list)
    seqlen: int | None = None
    max_windows: int | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 1

    def __post_init__(self) -> None:
        check_at_least(1, batch_size=self.batch_size)
        if self.seqlen is not None:
            check_at_least(2, seqlen=self.seqlen)
        for name, least in (("max_windows", 1), ("limit", 1), ("num_fewshot", 0)):
            if getattr(self, name) is not None:
                check_at_least(least, **{name: getattr(self, name)})

    def load(self, model: nn.Module, tokenizer: "PreTrainedTokenizerBase") -> "LoadedEvaluation":
        """Load texts and tasks: what is missing or misspelt is found here, before hours of work.

        Raises:
            ValueError, OSError, ModuleNotFoundError: As `evaluation_windows` and `load_tasks`.
        """
        seqlen = self.seqlen or context_length(model)
        windows = {name: evaluation_windows(name, tokenizer, seqlen, self.max_windows) for name in self.perplexity}
        tasks = load_tasks(self.tasks, num_fewshot=self.num_fewshot) if self.tasks else {}
        return LoadedEvaluation(self, windows, tasks)


@dataclass(frozen=True)
class LoadedEvaluation:
    """An evaluation with its texts and tasks at hand, to be done at each stage of a run.

    Args:
        settings: What was asked for.
        windows: Token ids (windows, seqlen) by the text's name.
        tasks: lm-eval's tasks by name.
    """

    settings: Evaluation
    windows: Mapping[str, Tensor]
    tasks: Mapping[str, Any]

    @torch.no_grad()
    def measure(
        self,
        model: nn.Module,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        stage: str = "",
        progress: bool = True,
        device: torch.device | None = None,
        process_group: ProcessGroup | None = None,
    ) -> StageResult:
        """Measure a model.

        Args:
            model: A Hugging Face causal language model.
            tokenizer: Its tokenizer.
            stage: Name of the model's state, for the progress bars.
            progress: Show progress bars.
            device: Where to compute; by default where the model is.
            process_group: Processes that share the work and all get the result; see `perplexity`.

        Returns:
            The perplexities by text, and the tasks' metrics by task.
        """
        perplexities = {
            name: perplexity(
                model,
                windows,
                batch_size=self.settings.batch_size,
                progress=progress,
                description=f"Perplexity {name} {stage}".strip(),
                device=device,
                process_group=process_group,
            )
            for name, windows in self.windows.items()
        }
        if not self.tasks:
            return StageResult(perplexities)
        tasks = zero_shot(
            model,
            tokenizer,
            self.tasks,
            limit=self.settings.limit,
            batch_size=self.settings.batch_size,
            progress=progress,
            description=f"Tasks {stage}".strip(),
            device=device,
            process_group=process_group,
        )
        return StageResult(perplexities, tasks)


def context_length(model: nn.Module) -> int:
    """Find the model's context in tokens, at most 2,048."""
    return min(getattr(getattr(model, "config", None), "max_position_embeddings", LONGEST_WINDOW), LONGEST_WINDOW)
